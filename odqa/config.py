"""Recipes as data: what a YAML file may say, key by key. Validation only; `odqa.recipes` loads and builds.

Every model forbids unknown keys. Components of one stage are told apart by `kind`. Paths: `embedded:NAME` is a file of
the package, `data:NAME` lies in the data folder (--data or ODQA_DATA), anything else is relative to the current folder.
"""

from collections.abc import Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from odqa.errors import DataError


class Settings(BaseModel):
    """Base of all recipe models: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# --- an index ---------------------------------------------------------------------------------------------------------


class DumpPassages(Settings):
    """Passages cut from a MediaWiki dump (.xml or .xml.bz2)."""

    kind: Literal["dump"] = "dump"
    file: str
    words: int = Field(100, ge=1, description="words a passage, as DPR")
    skip_disambiguation: bool = True
    strict: bool = Field(False, description="a damaged dump is an error, not a partial collection")


class FilePassages(Settings):
    """Ready passages: DPR tsv (.gz) or jsonl with {id, contents} or {id, title, text}."""

    kind: Literal["passages"] = "passages"
    file: str


class AnalyzerSettings(Settings):
    """How texts become terms. `stop_words` is "english" (Lucene's list of 33), "none", or a list."""

    lowercase: bool = True
    stop_words: Literal["english", "none"] | tuple[str, ...] = "english"
    stemmer: str | None = Field(None, description="a Snowball algorithm such as english (extra: stemmer)")
    token_pattern: str = r"(?u)\b\w\w+\b"


class Bm25(Settings):
    """A BM25 index. The defaults of k1 and b are Anserini's for passages."""

    k1: float = Field(0.9, ge=0)
    b: float = Field(0.4, ge=0, le=1)
    titles: bool = Field(True, description="index the title together with the text")
    engine: Literal["bm25s", "rank-bm25"] = "bm25s"
    analyzer: AnalyzerSettings = AnalyzerSettings()


class Vectors(Settings):
    """How vectors are searched: exactly, or by a FAISS index-factory string with its search-time parameters."""

    faiss: str | None = Field(None, description="such as IVF1024,PQ48 or HNSW32,SQ8 (inner product); None: exact")
    search: dict[str, float] = Field({}, description="FAISS search parameters, such as {nprobe: 16}")
    train_rows: int = Field(200_000, ge=1, description="the most vectors that quantisers are trained on")
    keep: bool = Field(False, description="keep the vectors beside a FAISS index")


class Dense(Settings):
    """A bi-encoder and the vectors it makes. `auto` and null take what the model's own files say."""

    question_model: str
    passage_model: str | None = Field(None, description="another model for passages (DPR); null: the same")
    pooling: Literal["auto", "mean", "cls", "pooler"] = "auto"
    normalize: bool | None = None
    query_prefix: str = ""
    passage_prefix: str = ""
    query_max_tokens: int | None = Field(None, ge=4)
    passage_max_tokens: int | None = Field(None, ge=4)
    titles: Literal["space", "newline", "pair", "none"] = "space"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    store_dtype: Literal["float16", "float32"] = "float16"
    vectors: Vectors = Vectors()


class IndexRecipe(Settings):
    """Passages in, BM25 and vectors out."""

    kind: Literal["index"]
    passages: Annotated[DumpPassages | FilePassages, Field(discriminator="kind")]
    bm25: Bm25 | None = None
    dense: Dense | None = None


# --- a pipeline -------------------------------------------------------------------------------------------------------


class Bm25Retriever(Settings):
    kind: Literal["bm25"]


class DenseRetriever(Settings):
    kind: Literal["dense"]


class HybridRetriever(Settings):
    """BM25 and dense lists fused: by reciprocal rank, or by weighted scores (a missing score is its list's minimum)."""

    kind: Literal["hybrid"]
    depth: int = Field(100, ge=1, description="passages taken from each list")
    fusion: Literal["weighted", "rrf"] = "weighted"
    weights: tuple[float, float] = Field((0.0325, 0.9675), description="of BM25 and dense scores")
    normalise: Literal["none", "min-max", "z-score"] = "none"
    c: float = Field(60.0, ge=0, description="the constant of reciprocal rank fusion")


class CrossEncoder(Settings):
    """A sequence-classification cross-encoder, by folder or hub name."""

    kind: Literal["cross-encoder"]
    model: str
    depth: int | None = Field(None, ge=1, description="hits a question that are re-scored; None: all")
    max_tokens: int | None = Field(None, ge=8)
    positive_label: Literal[0, 1] = 1
    batch_tokens: int = 16384
    device: str = "auto"
    dtype: str = "auto"


class PackerSettings(Settings):
    """Greedy packing by score within `budget` tokens, counted over all forward passes of the reader."""

    budget: int = Field(512, ge=1)
    max_passages: int | None = Field(None, ge=1)
    order: Literal["score", "reverse"] = "score"


class SpanReaderSettings(Settings):
    """The extractive reader: a trained artifact on a frozen encoder."""

    kind: Literal["span"]
    model: str
    backbone: str | None = Field(None, description="another place of the same frozen weights")
    candidates: int = Field(5, ge=1)
    combine: Literal["sum", "max"] = "sum"
    rank_prior: float = Field(0.0, ge=0, description="a span of the passage of rank r weighs r ** -rank_prior")
    abstain_above: float = Field(1.0, ge=0, le=1, description="answer nothing when P(no answer) exceeds this")
    device: str = "auto"
    dtype: str = "auto"


class DemonstrationSettings(Settings):
    """A solved example for the prompt."""

    question: str
    answer: str
    title: str = ""
    text: str | None = None


class LmReaderSettings(Settings):
    """A frozen generative LM, causal or encoder-decoder, by folder or hub name."""

    kind: Literal["lm"]
    model: str
    architecture: Literal["causal", "seq2seq"] | None = Field(None, description="None: what the model's config says")
    prompt: str = "open-book"
    template: dict[str, Any] = Field({}, description="parts of the named template that are worded otherwise")
    demonstrations: tuple[DemonstrationSettings, ...] = ()
    chat: bool = False
    chat_options: dict[str, Any] = {}
    window: int | None = Field(None, ge=8)
    max_new_tokens: int = Field(32, ge=1)
    candidates: int = Field(1, ge=1)
    beams: int = Field(1, ge=1)
    length_penalty: float = 0.0
    sample: bool = False
    temperature: float = Field(1.0, gt=0)
    top_k: int = Field(0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0
    score: Literal["sum", "mean"] = "sum"
    batch_size: int = Field(8, ge=1)
    guard: bool = Field(False, description="hash the model around every call: proof that no weight changed")
    device: str = "auto"
    dtype: str = "auto"
    load_options: dict[str, Any] = Field({}, description="for from_pretrained: device_map, quantization_config, ...")


class PipelineRecipe(Settings):
    """How questions are answered. Without `index` and `retriever` it is closed-book."""

    kind: Literal["pipeline"]
    index: str | None = Field(None, description="an index recipe, or the folder of an index")
    retriever: Annotated[Bm25Retriever | DenseRetriever | HybridRetriever, Field(discriminator="kind")] | None = None
    k: int = Field(100, ge=1, description="passages that leave the retriever")
    reranker: CrossEncoder | None = None
    packer: PackerSettings = PackerSettings()
    reader: Annotated[SpanReaderSettings | LmReaderSettings, Field(discriminator="kind")]
    batch: int = Field(64, ge=1, description="questions that go through the stages together in run and eval")

    @model_validator(mode="after")
    def _check_retriever(self) -> Self:
        if self.retriever is not None and self.index is None:
            raise ValueError(f"a {self.retriever.kind} retriever needs an index. Name one under index.")
        return self


# --- an evaluation ----------------------------------------------------------------------------------------------------


class Expected(Settings):
    """What a metric should be; outside `tolerance` the evaluation fails."""

    value: float
    tolerance: float = Field(1.0, ge=0)


class QuestionSet(Settings):
    """Questions with answers, and what is expected of them: a file, or a data set that `datasets` loads (`hub`).

    A data set has the columns question, answer or answers (lists of strings), perhaps id. `name` is a folder's, too.
    """

    name: str = Field(pattern=r"^\w[\w.-]*$")
    file: str | None = None
    hub: str | None = Field(None, description="a name of the hub or a local folder; needs the extra datasets")
    split: str
    matcher: Literal["string", "regex"] = "string"
    expected: dict[str, dict[str, Expected]] = Field({}, description="by the name of a pipeline recipe, then by metric")

    @field_validator("expected")
    @classmethod
    def _check_metrics(cls, expected: dict[str, dict[str, Expected]]) -> dict[str, dict[str, Expected]]:
        from odqa.evaluate import Metric

        for metric in {metric for metrics in expected.values() for metric in metrics}:
            try:
                Metric.parse(metric)
            except DataError as error:
                raise ValueError(str(error)) from error
        return expected

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.file is None) == (self.hub is None):
            raise ValueError(f"question set {self.name} needs either a file or a data set (hub).")
        return self


class EvalRecipe(Settings):
    """Pipelines side by side on question sets. A missing index is built first."""

    kind: Literal["eval"]
    pipelines: tuple[str, ...] = Field(min_length=1)
    questions: tuple[QuestionSet, ...] = Field(min_length=1)
    recall_at: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5, 20, 100)
    seed: int = 0

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        pipelines = [PurePath(pipeline).stem for pipeline in self.pipelines]
        _check_unique("pipelines", pipelines)
        _check_unique("question sets", [question_set.name for question_set in self.questions])
        for question_set in self.questions:
            for name in question_set.expected:
                if name not in pipelines:
                    raise ValueError(
                        f"numbers are expected of {name} on {question_set.name}; pipelines are {', '.join(pipelines)}."
                    )
        return self


def _check_unique(what: str, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"{what} need names of their own (found: {', '.join(names)}).")


# --- training ---------------------------------------------------------------------------------------------------------


class LoraSettings(Settings):
    """Low-rank updates (arXiv 2106.09685)."""

    kind: Literal["lora"]
    rank: int = Field(32, ge=1)
    alpha: float = Field(64.0, gt=0)
    targets: tuple[str, ...] | None = Field(
        None, description="endings of module names; None: every linear map of the layers"
    )
    seed: int = 0


class DeepPromptSettings(Settings):
    """Learned keys and values in every layer (P-tuning v2, arXiv 2110.07602)."""

    kind: Literal["deep-prompt"]
    length: int = Field(64, ge=1)
    seed: int = 0


class FineTuningSettings(Settings):
    """All weights: the baseline."""

    kind: Literal["fine-tuning"]
    skip: tuple[str, ...] = Field(("pooler",), description="beginnings of names of weights that nothing reads")


class FitRecipe(Settings):
    """The training loop, see `odqa.frozen.fit.FitSettings`."""

    steps: int = Field(ge=1)
    learning_rates: dict[Literal["method", "head"], float]
    warmup: float = Field(0.05, ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(0.0, ge=0)
    clip: float = Field(1.0, gt=0)
    accumulate: int = Field(1, ge=1)
    seed: int = 0
    evaluate_every: int = Field(0, ge=0)


class GroupRecipe(Settings):
    """Training groups, see `odqa.read.train.GroupSettings`."""

    groups: int = Field(16, ge=1)
    negative_share: float = Field(0.4, ge=0, le=1)
    unanswerable_share: float = Field(0.08, ge=0, le=1)
    source_weights: dict[str, int] = {}
    seed: int = 0


class TuneSet(Settings):
    """Questions to measure on while training: never a dev file. `limit` takes the first ones."""

    name: str
    file: str
    limit: int | None = Field(None, ge=1)


class ReaderTraining(Settings):
    """Trains a span reader: a method on a frozen encoder, and a span head."""

    kind: Literal["train-span-reader"]
    backbone: str
    method: Annotated[LoraSettings | DeepPromptSettings | FineTuningSettings, Field(discriminator="kind")]
    longest: int = Field(24, ge=1, description="tokens of the longest answer")
    train: str = Field(description="jsonl of question, answers, title, passage, negative_ids, source")
    passages: tuple[str, ...] = Field(
        (), description="files that hold the passages named by negative_ids and tune sets"
    )
    groups: GroupRecipe = GroupRecipe()
    fit: FitRecipe
    tune: tuple[TuneSet, ...] = ()
    start: str | None = Field(None, description="a trained reader of the same method to go on from; null: from nothing")
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: bool | None = Field(None, description="forward pass in bfloat16; None: where that is fast")
    stored: Literal["float16", "float32"] = "float16"
    threads: int | None = Field(None, ge=1)


RECIPES: dict[str, type[Settings]] = {
    "index": IndexRecipe,
    "pipeline": PipelineRecipe,
    "eval": EvalRecipe,
    "train-span-reader": ReaderTraining,
}
