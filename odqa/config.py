"""Recipes as data: what a YAML file may say, key by key. Validation only; `odqa.recipes` loads and builds.

Every model forbids unknown keys. Components of one stage are told apart by `kind`. Paths: `embedded:NAME` is a file of
the package, `data:NAME` lies in the data folder (--data or ODQA_DATA), anything else is relative to the current folder.
"""

import itertools
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

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
    given: str | None = Field(None, description="passage vectors made elsewhere: a recipe of kind vectors")

    @model_serializer(mode="wrap")
    def _as_written(self, serialize: SerializerFunctionWrapHandler) -> Any:
        """Without `given` where there is none: indexes from before there was such a key keep their hashes."""
        record = serialize(self)
        return record if self.given is not None else {key: value for key, value in record.items() if key != "given"}


class Dense(Settings):
    """A bi-encoder and the vectors it makes. `auto` and null take what the model's own files say."""

    question_model: str
    passage_model: str | None = Field(None, description="another model for passages (DPR); null: the same")
    pooling: Literal["auto", "mean", "cls", "pooler"] = "auto"
    normalize: bool | None = None
    query_prefix: str = Field("", description='such as "query: " (E5)')
    passage_prefix: str = Field("", description='such as "passage: " (E5); it stands before the title')
    prompts: bool = Field(True, description="where no prefix is named, those that a sentence-transformers folder names")
    query_max_tokens: int | None = Field(None, ge=4)
    passage_max_tokens: int | None = Field(None, ge=4)
    titles: Literal["space", "newline", "pair", "none"] = "space"
    segments: Literal["tokenizer", "zero"] = Field(
        "tokenizer",
        description="token types of a pair: the tokenizer's (0 and 1), or all 0 as DPR and Spider do",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    store_dtype: Literal["float16", "float32"] = "float16"
    vectors: Vectors = Vectors()


class IndexRecipe(Settings):
    """Passages in, BM25 and vectors out."""

    kind: Literal["index"]
    passages: Annotated[DumpPassages | FilePassages, Field(discriminator="kind")]
    bm25: Bm25 | None = None
    dense: Dense | None = None


class GivenVectors(Settings):
    """The sidecar of vectors or of a FAISS index made elsewhere: how they were made. Files lie beside it, or in data:.

    What it says is held against the files and against the encoder of the index recipe that names it.
    """

    kind: Literal["vectors"]
    encoder: str = Field(description="the passage encoder that made them: the recipe's, by hub name or folder name")
    normalized: bool = Field(description="whether the vectors have unit length")
    embeddings: tuple[str, ...] = Field((), description="DPR embedding files (pickles of id, vector); * as in a shell")
    faiss: str | None = Field(None, description="a FAISS index, taken as it is")
    metric: Literal["inner-product", "l2", "dpr-hnsw"] = Field(
        "inner-product", description="of the FAISS index; dpr-hnsw: L2 over one more dimension, as DPR's HNSW has it"
    )
    ids: str = Field(
        "rows",
        description="of the FAISS index: rows (the collection's order), or a file of passage ids in its order: one a "
        "line (Pyserini's docid), or DPR's index_meta.dpr",
    )
    id_prefix: str = Field("", description="what the ids have in front of the collection's, such as wiki:")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if bool(self.embeddings) == (self.faiss is not None):
            raise ValueError("name either embeddings or faiss.")
        if self.embeddings and (self.metric != "inner-product" or self.ids != "rows"):
            raise ValueError("metric and ids are those of a FAISS index; embeddings bring their ids. Remove both.")
        return self


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


class AlphaHybridRetriever(Settings):
    """Dense + alpha * BM25 over the union of both lists; a passage that one list lacks gets that list's lowest score.

    As in arXiv 2104.05740 (DPR + BM25) and 2112.07708 (Spider + BM25). scripts/tune_fusion.py chooses alpha.
    """

    kind: Literal["alpha-hybrid"]
    alpha: float = Field(ge=0, allow_inf_nan=False, description="what BM25's score weighs; chosen on tune questions")
    depth: int = Field(1000, ge=1, description="passages taken from each list")
    normalise: bool = Field(False, description="first bring each list to -0.5 ... 0.5, as Pyserini does when asked to")


AnyRetriever = Bm25Retriever | DenseRetriever | HybridRetriever | AlphaHybridRetriever


class CrossEncoder(Settings):
    """A cross-encoder: a trained re-ranker (embedded:NAME or its folder), or any for sequence classification.

    The latter by folder or hub name. `retriever_weight` times the score that a hit came with is added to the model's.
    """

    kind: Literal["cross-encoder"]
    model: str
    depth: int | None = Field(None, ge=1, description="hits a question that are re-scored; None: all")
    retriever_weight: float = Field(0.0, ge=0, allow_inf_nan=False, description="0: the model's score alone counts")
    max_tokens: int | None = Field(None, ge=8)
    positive_label: Literal[0, 1] = 1
    batch_tokens: int | None = Field(None, ge=1, description="None: what is fast on the device")
    device: str = "auto"
    dtype: str = "auto"


class QuestionLikelihood(Settings):
    """UPR: a frozen language model without training; a passage's score is the mean log-probability of the question.

    The model is named as that of a generative reader. Source, also of the default wording: arXiv 2204.07496.
    """

    kind: Literal["question-likelihood"]
    model: str
    architecture: Literal["causal", "seq2seq"] | None = Field(None, description="None: what the model's config says")
    prompt: str = Field(
        "Passage: {title} {text}. Please write a question based on this passage.",
        description="what stands before the question; the passage's end is cut if it is too long",
    )
    depth: int | None = Field(None, ge=1, description="hits a question that are re-scored; None: all")
    retriever_weight: float = Field(0.0, ge=0, allow_inf_nan=False, description="0: the model's score alone counts")
    max_tokens: int | None = Field(None, ge=8)
    batch_tokens: int | None = Field(None, ge=1, description="None: what is fast on the device")
    device: str = "auto"
    dtype: str = "auto"
    load_options: dict[str, Any] = Field({}, description="for from_pretrained: device_map, quantization_config, ...")


class GivenScores(Settings):
    """Scores made elsewhere: a TREC run file (query Q0 passage rank score tag), or the order of a run of odqa."""

    kind: Literal["scores"]
    run: str
    tag: str | None = Field(None, description="the run of this name in a TREC file that holds several")
    depth: int | None = Field(None, ge=1, description="hits a question that are re-scored; None: all")


class Cascade(Settings):
    """Re-rankers one after the other; each takes the first `depth` of what comes, the rest keeps its order behind."""

    kind: Literal["cascade"]
    stages: tuple[Annotated[CrossEncoder | QuestionLikelihood | GivenScores, Field(discriminator="kind")], ...] = Field(
        min_length=2
    )

    @model_validator(mode="after")
    def _check_depths(self) -> Self:
        depths = [stage.depth for stage in self.stages]
        for number, (before, depth) in enumerate(itertools.pairwise(depths), start=1):
            if depth is None or (before is not None and depth >= before):
                found, most = "all" if depth is None else depth, "all" if before is None else before
                raise ValueError(
                    f"stage {number} has the depth {found}, the one before {most}: nothing of that one's order would "
                    "be left. Give each stage fewer hits than the one before."
                )
        return self


RerankerSettings = Annotated[CrossEncoder | QuestionLikelihood | GivenScores | Cascade, Field(discriminator="kind")]


class TrimSettings(Settings):
    """Passages that do not fit whole are packed with their best-matching sentences, as many as fit."""

    sentences: int = Field(3, ge=1, description="the most sentences of a trimmed passage, neighbours not counted")
    around: int = Field(0, ge=0, description="neighbours kept on each side of a kept sentence")
    whole: int | None = Field(None, ge=0, description="hits that may be packed whole; null: all, 0: all are trimmed")


class PackerSettings(Settings):
    """Greedy packing by score within `budget` tokens, counted over all forward passes of the reader."""

    budget: int = Field(512, ge=1)
    windows: int = Field(1, ge=1, description="windows of budget / windows tokens that a generative reader reads apart")
    max_passages: int | None = Field(None, ge=1)
    order: Literal["score", "reverse", "sides"] = "score"
    duplicates: Literal["exact", "near"] = "exact"
    resemblance: float = Field(0.5, gt=0, le=1, description="from here on two texts are near duplicates")
    trim: TrimSettings | None = Field(None, description="null: passages go in whole or not at all")


class SpanReaderSettings(Settings):
    """The extractive reader: a trained artifact on a frozen encoder."""

    kind: Literal["span"]
    model: str
    backbone: str | None = Field(None, description="another place of the same frozen weights")
    candidates: int = Field(5, ge=1)
    combine: Literal["sum", "max"] = "sum"
    rank_prior: float = Field(0.0, ge=0, description="a span of the passage of rank r weighs r ** -rank_prior")
    score_prior: float = Field(
        0.0, ge=0, description="... of score s exp(score_prior * (s - the best s)); with a re-ranker"
    )
    abstain_below: float = Field(
        0.0, ge=0, le=1, description="answer nothing when the confidence is lower; above 0 it needs a calibrated reader"
    )
    device: str = "auto"
    dtype: str = "auto"


class DemonstrationSettings(Settings):
    """A solved example for the prompt."""

    question: str
    answer: str
    title: str = ""
    text: str | None = None


class DemonstrationPool(Settings):
    """Solved examples for the prompt, taken from a file of reading examples."""

    file: str = Field(description="jsonl of reading examples, as readers are trained on; never those of the test set")
    count: int = Field(4, ge=1)
    choose: Literal["random", "similar"] = Field(
        "random", description="random: the same for all questions; similar: for each those with the nearest questions"
    )
    seed: int = Field(0, description="of the random choice")
    sources: tuple[str, ...] = Field((), description="examples of these sources alone; none named: of all")
    passages: bool = Field(True, description="show the passage of each example with it")


class LmReaderSettings(Settings):
    """A frozen generative LM, causal or encoder-decoder, by folder or hub name."""

    kind: Literal["lm"]
    model: str
    method: str | None = Field(None, description="a method that was trained for this model; None: the model as it is")
    architecture: Literal["causal", "seq2seq"] | None = Field(None, description="None: what the model's config says")
    passages: Literal["together", "apart"] = Field(
        "together", description="apart: each encoded in a prompt of its own, one decoder reads all (FiD)"
    )
    prompt: str = "open-book"
    template: dict[str, Any] = Field({}, description="parts of the named template that are worded otherwise")
    demonstrations: tuple[DemonstrationSettings, ...] | DemonstrationPool = ()
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
    spelling: Literal["model", "passage"] = Field(
        "model", description="passage: an answer is written as a packed passage writes it, if one does"
    )
    batch_size: int = Field(8, ge=1)
    guard: bool = Field(False, description="hash the model around every call: proof that no weight changed")
    device: str = "auto"
    dtype: str = "auto"
    load_options: dict[str, Any] = Field({}, description="for from_pretrained: device_map, quantization_config, ...")


class PipelineRecipe(Settings):
    """How questions are answered. Without `index` and `retriever` it is closed-book."""

    kind: Literal["pipeline"]
    index: str | None = Field(None, description="an index recipe, or the folder of an index")
    retriever: Annotated[AnyRetriever, Field(discriminator="kind")] | None = None
    k: int = Field(100, ge=1, description="passages that leave the retriever")
    reranker: RerankerSettings | None = None
    packer: PackerSettings = PackerSettings()
    reader: Annotated[SpanReaderSettings | LmReaderSettings, Field(discriminator="kind")]
    batch: int = Field(64, ge=1, description="questions that go through the stages together in run and eval")

    @model_validator(mode="after")
    def _check_retriever(self) -> Self:
        if self.retriever is not None and self.index is None:
            raise ValueError(f"a {self.retriever.kind} retriever needs an index. Name one under index.")
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        if self.packer.windows > 1 and (self.reader.kind == "span" or self.reader.passages == "apart"):
            raise ValueError(
                f"packer.windows is {self.packer.windows}, but this reader sees every passage apart. Set windows: 1."
            )
        return self


# --- an evaluation ----------------------------------------------------------------------------------------------------


class Expected(Settings):
    """What a metric should be: a value, give or take `tolerance`, or a lower bound. The evaluation fails otherwise."""

    value: float | None = None
    tolerance: float | None = Field(None, ge=0, description="of a value; null: 1")
    at_least: float | None = Field(None, description="instead of a value; of a gain, its 95% interval is above 0, too")

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if (self.value is None) == (self.at_least is None):
            raise ValueError("give either a value (with a tolerance) or at_least.")
        if self.at_least is not None and self.tolerance is not None:
            raise ValueError("at_least takes no tolerance. State the bound that must hold.")
        return self


class QuestionSet(Settings):
    """Questions with answers, and what is expected of them: a file, or a data set that `datasets` loads (`hub`).

    A data set has the columns question, answer or answers (lists of strings), perhaps id. `name` is a folder's, too.
    """

    name: str = Field(pattern=r"^\w[\w.-]*$")
    file: str | None = None
    hub: str | None = Field(None, description="a name of the hub or a local folder; needs the extra datasets")
    split: str
    limit: int | None = Field(None, ge=1, description="only so many questions, the first ones")
    matcher: Literal["string", "regex"] = "string"
    expected: dict[str, dict[str, Expected]] = Field({}, description="by the name of a pipeline recipe, then by metric")

    @field_validator("expected")
    @classmethod
    def _check_metrics(cls, expected: dict[str, dict[str, Expected]]) -> dict[str, dict[str, Expected]]:
        _check_metrics(metric for metrics in expected.values() for metric in metrics)
        return expected

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if (self.file is None) == (self.hub is None):
            raise ValueError(f"question set {self.name} needs either a file or a data set (hub).")
        return self


class Variant(Settings):
    """A pipeline recipe under a name of its own, with settings changed as --set does; a recipe's path alone is enough.

    In the `set` of a variant, {packer.budget: 160, reranker: null} is what --set packer.budget=160 --set reranker=null
    is on the command line. A path alone has the name of its file.
    """

    recipe: str
    name: str = Field(pattern=r"^[^\s./][^/]*$", description="names the system in the report, and its folder")
    set: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _from_path(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"recipe": value, "name": PurePath(value).stem}
        if not isinstance(value, dict | Variant):
            raise ValueError(f"found {value!r}; expected the path of a pipeline recipe, or {{recipe, name, set}}.")
        return value

    @model_serializer(mode="wrap")
    def _as_written(self, serialize: SerializerFunctionWrapHandler) -> Any:
        is_path_alone = not self.set and self.name == PurePath(self.recipe).stem
        return self.recipe if is_path_alone else serialize(self)


class Gain(Settings):
    """Two pipelines compared question by question: what the second (`to`) has more than the first (`from`)."""

    model_config = ConfigDict(serialize_by_alias=True)

    from_: str = Field(alias="from", description="the name of a pipeline")
    to: str
    expected: dict[str, dict[str, Expected]] = Field({}, description="by the name of a question set, then by metric")

    @field_validator("expected")
    @classmethod
    def _check_metrics(cls, expected: dict[str, dict[str, Expected]]) -> dict[str, dict[str, Expected]]:
        _check_metrics(metric for metrics in expected.values() for metric in metrics)
        return expected


class Published(Settings):
    """A figure of the literature to stand beside the report; it is printed as not run, and nothing is checked."""

    name: str
    metric: str
    value: float
    source: str

    @field_validator("metric")
    @classmethod
    def _check_metric(cls, metric: str) -> str:
        _check_metrics([metric])
        return metric


class FigureSettings(Settings):
    """A figure beside the result files: metrics against a number of the pipelines' recipes, a panel each, with bands.

    Systems whose names differ only in that number at the end (`whole-160`, `whole-256`) are the points of one line.
    """

    x: str = Field(description="a setting of the pipelines that is a number, such as packer.budget")
    x_label: str | None = Field(None, description="null: the name of the setting")
    x_scale: Literal["linear", "log"] = "linear"
    y: tuple[str, ...] = Field(min_length=1, description="metrics")
    format: Literal["svg", "png"] = "svg"

    @field_validator("y")
    @classmethod
    def _check_y(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        _check_metrics(metrics)
        return metrics


class EvalRecipe(Settings):
    """Pipelines side by side on question sets. A missing index is built first."""

    kind: Literal["eval"]
    pipelines: tuple[Variant, ...] = Field(min_length=1)
    questions: tuple[QuestionSet, ...] = Field(min_length=1)
    recall_at: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5, 20, 100)
    gains: tuple[Gain, ...] = Field((), description="paired differences to report")
    published: tuple[Published, ...] = Field((), description="figures of others to print beside ours")
    figure: FigureSettings | None = Field(None, description="drawn by odqa eval --save; needs the extra plots")
    seed: int = 0

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        pipelines = [pipeline.name for pipeline in self.pipelines]
        sets = [question_set.name for question_set in self.questions]
        _check_unique("pipelines", pipelines)
        _check_unique("question sets", sets)
        for question_set in self.questions:
            for name in question_set.expected:
                if name not in pipelines:
                    raise ValueError(
                        f"numbers are expected of {name} on {question_set.name}; pipelines are {', '.join(pipelines)}."
                    )
        for gain in self.gains:
            for name in (gain.from_, gain.to):
                if name not in pipelines:
                    raise ValueError(f"a gain names {name}; pipelines are {', '.join(pipelines)}.")
            for name in gain.expected:
                if name not in sets:
                    raise ValueError(
                        f"a gain from {gain.from_} to {gain.to} is expected on {name}; question sets are "
                        f"{', '.join(sets)}."
                    )
        return self


def _check_metrics(names: Iterable[str]) -> None:
    from odqa.evaluate import Metric

    for name in sorted(set(names)):
        try:
            Metric.parse(name)
        except DataError as error:
            raise ValueError(str(error)) from error


def _check_unique(what: str, names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError(f"{what} need names of their own (found: {', '.join(names)}).")


# --- training ---------------------------------------------------------------------------------------------------------


class Mining(Settings):
    """Ranks passages for training questions: hard negatives, and contexts as a pipeline really finds them."""

    kind: Literal["mine"]
    train: str = Field(description="training examples: jsonl, or DPR's training json")
    passages: tuple[str, ...] = Field(min_length=1, description="files that hold the passages of all pipelines")
    pipelines: tuple[str, ...] = Field(min_length=1, description="their retrievers and re-rankers are used")
    depth: int = Field(30, ge=1, description="passages kept a question")
    merge: Literal["score", "rank"] = Field("score", description="how the lists of several pipelines are joined")
    limits: dict[str, int] = Field({}, description="the most questions of a source; all if not named")
    seed: int = 0


class LoraSettings(Settings):
    """Low-rank updates (arXiv 2106.09685)."""

    kind: Literal["lora"]
    rank: int = Field(32, ge=1)
    alpha: float = Field(64.0, gt=0)
    targets: tuple[str, ...] | None = Field(
        None, description="endings of module names; None: every linear map of the layers"
    )
    seed: int = 0


class PromptTuningSettings(Settings):
    """Learned word vectors before the text (Lester et al. 2021, arXiv 2104.08691)."""

    kind: Literal["prompt-tuning"]
    length: int = Field(50, ge=1)
    start: Literal["vocabulary", "text", "uniform"] = "vocabulary"
    text: str | None = None
    seed: int = 0


class PrefixTuningSettings(Settings):
    """Learned keys and values in every layer, made by a small network while training (arXiv 2101.00190)."""

    kind: Literal["prefix-tuning"]
    length: int = Field(50, ge=1)
    inner: int | None = Field(512, ge=1, description="inner width of the network; None: the prefix itself is trained")
    start: Literal["vocabulary", "text"] = "vocabulary"
    text: str | None = None
    cross: bool = Field(True, description="encoder-decoders: a prefix in the decoder's cross-attention too")
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
    keep_best: str | None = Field(None, description="a metric of the evaluations: the values that were best remain")
    lower_is_better: bool = False
    patience: int = Field(0, ge=0, description="evaluations without a better one after which the run ends; 0: never")


class GroupRecipe(Settings):
    """Training groups, see `odqa.read.train.GroupSettings`."""

    groups: int = Field(16, ge=1)
    negative_share: float = Field(0.4, ge=0, le=1)
    unanswerable_share: float = Field(0.08, ge=0, le=1)
    packed: int | None = Field(None, ge=1, description="the most passages of a mined context; null: pairs as above")
    restore_share: float = Field(0.7, ge=0, le=1)
    corrupted_share: float = Field(0.0, ge=0, le=1, description="questions changed so that their passage answers none")
    parts: int = Field(1, ge=1)
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
    rankings: str | None = Field(None, description="a mining recipe or what it made: contexts as a pipeline finds them")
    unranked: bool = Field(False, description="train on questions without a ranking too, on passage and negative_ids")
    unanswerable: str | None = Field(
        None, description="jsonl of questions that their passages do not answer; rows with squad_split: train are used"
    )
    groups: GroupRecipe = GroupRecipe()
    no_answer: Literal["shared", "row"] = Field("shared", description="see odqa.frozen.spans; row needs packed")
    fit: FitRecipe
    tune: tuple[TuneSet, ...] = ()
    start: str | None = Field(None, description="a trained reader of the same method to go on from; null: from nothing")
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: bool | None = Field(None, description="forward pass in bfloat16; None: where that is fast")
    stored: Literal["float16", "float32"] = "float16"
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_contexts(self) -> Self:
        if self.groups.packed is not None and self.rankings is None:
            raise ValueError("packed contexts need rankings. Name a mining recipe under rankings.")
        if self.groups.packed is None and (self.unanswerable is not None or self.no_answer == "row"):
            raise ValueError("unanswerable questions and no_answer: row go with packed contexts. Set groups.packed.")
        return self


class RerankGroups(Settings):
    """Training groups of a re-ranker, see `odqa.rerank.train.GroupSettings`."""

    groups: int = Field(8, ge=1)
    positives: int = Field(2, ge=1)
    negatives: int = Field(5, ge=1)
    pool: int = Field(24, ge=1)
    parts: int = Field(3, ge=1)
    source_weights: dict[str, int] = {}
    seed: int = 0


class RerankLoss(Settings):
    """The loss on labels, and perhaps one on the scores of the mined rankings (then of a re-ranker: the teacher)."""

    kind: Literal["listwise", "pointwise"] = "listwise"
    distillation: float = Field(0.0, ge=0)
    temperature: float = Field(1.0, gt=0)


class RerankerTraining(Settings):
    """Trains a cross-encoder re-ranker: a method on a frozen encoder, and a relevance head."""

    kind: Literal["train-reranker"]
    backbone: str
    method: Annotated[LoraSettings | DeepPromptSettings | FineTuningSettings, Field(discriminator="kind")]
    train: str = Field(description="training examples: jsonl, or DPR's training json")
    passages: tuple[str, ...] = Field((), description="files that hold the passages that examples and rankings name")
    rankings: str | None = Field(None, description="a mining recipe or what it made; null: only the file's negatives")
    groups: RerankGroups = RerankGroups()
    loss: RerankLoss = RerankLoss()
    fit: FitRecipe
    tune: tuple[TuneSet, ...] = ()
    candidates: str | None = Field(None, description="the pipeline whose ranking the tune questions are re-ranked from")
    candidate_depth: int = Field(20, ge=2)
    start: str | None = Field(None, description="a trained reader or re-ranker of the same method to go on from")
    device: str = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    autocast: bool | None = Field(None, description="forward pass in bfloat16; None: where that is fast")
    stored: Literal["float16", "float32"] = "float16"
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_candidates(self) -> Self:
        if self.tune and self.candidates is None:
            raise ValueError("tune questions need passages to re-rank. Name a pipeline under candidates.")
        if self.loss.distillation and self.rankings is None:
            raise ValueError("distillation needs a teacher's scores. Name rankings of a pipeline with a re-ranker.")
        return self


class AveragedPart(Settings):
    """A trained reader or re-ranker, and what its method and head weigh in the mean."""

    model: str
    method: float = Field(ge=0)
    head: float = Field(0.0, ge=0)


class ModelAverage(Settings):
    """A span reader or re-ranker whose values are a weighted mean of trained ones, which went on from one another."""

    kind: Literal["train-average"]
    parts: tuple[AveragedPart, ...] = Field(min_length=2)
    like: int = Field(0, ge=0, description="the part, from 0, whose kind and settings the mean has: no_answer, ...")
    stored: Literal["float16", "float32"] = "float16"

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        for name in ("method", "head"):
            total = sum(getattr(part, name) for part in self.parts)
            if abs(total - 1) > 1e-6:
                raise ValueError(f"the weights of {name} add up to {total:g}; they must add up to 1.")
        if self.like >= len(self.parts):
            raise ValueError(f"like is {self.like}; parts are 0 to {len(self.parts) - 1}.")
        return self


AnyMethod = PromptTuningSettings | DeepPromptSettings | PrefixTuningSettings | LoraSettings | FineTuningSettings


class ContextRecipe(Settings):
    """Training batches of a generative reader's method, see `odqa.read.adapt.ContextSettings`."""

    questions: int = Field(16, ge=1)
    examples: int | None = Field(None, ge=1)
    source_weights: dict[str, float] = {}
    seed: int = 0


class LmReaderTraining(Settings):
    """Trains a method on the frozen language model that a pipeline reads with, on contexts as that pipeline packs them.

    `pipeline` says all of it: model, prompt, packing, and for the tune questions retrieval and re-ranking.
    """

    kind: Literal["train-lm-reader"]
    pipeline: str
    method: Annotated[AnyMethod, Field(discriminator="kind")]
    train: str = Field(description="training examples: jsonl, or DPR's training json")
    passages: tuple[str, ...] = Field((), description="files that hold the passages that examples and rankings name")
    rankings: str | None = Field(None, description="a mining recipe or what it made; null: the file's negatives")
    contexts: ContextRecipe = ContextRecipe()
    fit: FitRecipe
    tune: tuple[TuneSet, ...] = ()
    start: str | None = Field(None, description="a trained method of the same kind to go on from")
    autocast: bool | None = Field(None, description="forward pass in bfloat16; None: where that is fast")
    stored: Literal["float16", "float32"] = "float32"
    threads: int | None = Field(None, ge=1)


class MixRecipe(Settings):
    """Pre-training batches, see `odqa.lm.pretrain.MixSettings`."""

    shares: dict[str, float] = Field(description="of each task of odqa.lm.tasks its share")
    items: int = Field(32, ge=1)
    longest: int = Field(256, ge=16)
    longest_target: int = Field(24, ge=1)
    seed: int = 0


class EncoderDecoderLm(Settings):
    """odqa-mini: MiniLM with a low-rank update reads, some of its layers once more, as a decoder, write."""

    kind: Literal["encoder-decoder"]
    encoder: str = "embedded:all-MiniLM-L6-v2"
    layers: tuple[int, ...] = Field((1, 3, 5), min_length=1, description="the encoder's layers the decoder starts from")
    rank: int = Field(32, ge=1)
    alpha: float = Field(64.0, gt=0)


class DecoderLm(Settings):
    """odqa-mini-d: a small Llama from random values, with a byte-level BPE vocabulary of its own."""

    kind: Literal["decoder"]
    vocabulary: int = Field(8192, ge=512)
    width: int = Field(192, ge=16)
    layers: int = Field(6, ge=1)
    heads: int = Field(6, ge=1)
    inner: int = Field(512, ge=16)
    window: int = Field(1024, ge=64)


class LmFit(FitRecipe):
    """The training loop; rates of `update` and `decoder` (encoder-decoder) or of `model` (decoder)."""

    learning_rates: dict[Literal["update", "decoder", "model"], float]  # type: ignore[assignment]


class LmTraining(Settings):
    """Pre-trains a small general language model on tasks made from passages and reading examples."""

    kind: Literal["train-lm"]
    model: Annotated[EncoderDecoderLm | DecoderLm, Field(discriminator="kind")]
    passages: tuple[str, ...] = Field(min_length=1)
    train: str = Field(description="jsonl of reading examples")
    sources: tuple[str, ...] = Field(min_length=1, description="the sources of examples that are used, and no other")
    mix: MixRecipe
    fit: LmFit
    tune: tuple[TuneSet, ...] = ()
    device: str = "auto"
    autocast: bool | None = Field(None, description="forward pass in bfloat16; None: where that is fast")
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        wanted = {"update", "decoder"} if self.model.kind == "encoder-decoder" else {"model"}
        if set(self.fit.learning_rates) != wanted:
            raise ValueError(f"fit.learning_rates must name {' and '.join(sorted(wanted))} for a {self.model.kind}.")
        return self


RECIPES: dict[str, type[Settings]] = {
    "index": IndexRecipe,
    "vectors": GivenVectors,
    "pipeline": PipelineRecipe,
    "eval": EvalRecipe,
    "train-span-reader": ReaderTraining,
    "train-reranker": RerankerTraining,
    "train-average": ModelAverage,
    "train-lm": LmTraining,
    "train-lm-reader": LmReaderTraining,
    "mine": Mining,
}
