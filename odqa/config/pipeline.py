"""Recipes of a pipeline: how questions are answered, stage by stage."""

import itertools
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, ValidationError, model_serializer, model_validator

from odqa.config.base import GrownSettings, Settings
from odqa.config.recursion import AnyRecursion, NeuralRecursion, RetrievalRecursion, TextualRecursion


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
    by: Literal["terms", "reranker"] = Field(
        "terms", description="what scores a sentence: the question's terms in it, or the pipeline's re-ranker"
    )
    depth: int = Field(4, ge=1, description="by the re-ranker: of the first so many hits; behind them by terms")

    @model_validator(mode="after")
    def _check_depth(self) -> Self:
        if self.by == "terms" and "depth" in self.model_fields_set:
            raise ValueError("depth says whose sentences the re-ranker scores. Set by: reranker, or remove depth.")
        return self

    @model_serializer(mode="wrap")
    def _as_written(self, serialize: SerializerFunctionWrapHandler) -> Any:
        """By terms without `by` and `depth`: recipes from before there was a choice keep their hashes."""
        record = serialize(self)
        return {key: record[key] for key in record if self.by == "reranker" or key not in ("by", "depth")}


class PackerSettings(Settings):
    """Greedy packing by score within `budget` tokens, counted over all forward passes of the reader."""

    budget: int = Field(512, ge=1)
    windows: int = Field(1, ge=1, description="windows of budget / windows tokens that a generative reader reads apart")
    max_passages: int | None = Field(None, ge=1)
    order: Literal["score", "reverse", "sides"] = "score"
    duplicates: Literal["exact", "near"] = "exact"
    resemblance: float = Field(0.5, gt=0, le=1, description="from here on two texts are near duplicates")
    trim: TrimSettings | None = Field(None, description="null: passages go in whole or not at all")

    @property
    def needs_reranker(self) -> bool:
        """Whether the re-ranker scores sentences, too."""
        return self.trim is not None and self.trim.by == "reranker"


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
    method: str | tuple[str, ...] | None = Field(
        None, description="a method trained for this model, or several (a composition and a prompt); None: none"
    )
    architecture: Literal["causal", "seq2seq"] | None = Field(None, description="None: what the model's config says")
    passages: Literal["together", "apart"] = Field(
        "together", description="apart: each encoded in a prompt of its own, one decoder reads all (FiD)"
    )
    prompt: str = "open-book"
    template: dict[str, Any] = Field({}, description="parts of the named template that are worded otherwise")
    demonstrations: tuple[DemonstrationSettings, ...] | DemonstrationPool = ()
    chat: bool = False
    chat_options: dict[str, Any] = Field({})
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

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods' folders."""
        return (self.method,) if isinstance(self.method, str) else self.method or ()


class ApiReaderSettings(Settings):
    """A language model behind a server that speaks OpenAI's protocol; prices come from a tokenizer at hand or a rule.

    One of `tokenizer` and `bytes_per_token` must be given.
    """

    kind: Literal["api"]
    base_url: str = Field(description="scheme, host and path, usually with /v1 at the end")
    model: str = Field(description="as the server calls it")
    key_variable: str | None = Field(None, description="environment variable that holds the key; null: none is sent")
    endpoint: Literal["chat", "completions"] = "chat"
    tokenizer: str | None = Field(None, description="folder, hub name or embedded name; best that of the model")
    bytes_per_token: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="an estimate instead of a tokenizer; 3 is on the safe side"
    )
    message_tokens: int = Field(16, ge=0, description="charged for each message of a chat beside its words")
    window: int = Field(ge=8, description="the server's, in tokens, shared with the answer")
    prompt: str = "open-book"
    template: dict[str, Any] = Field({}, description="parts of the named template that are worded otherwise")
    demonstrations: tuple[DemonstrationSettings, ...] | DemonstrationPool = ()
    max_new_tokens: int = Field(32, ge=1)
    samples: int = Field(1, ge=1, description="texts a window")
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = None
    logprobs: Literal["auto", "required", "none"] = Field(
        "auto", description="auto: used if the server gives them; none: not asked for"
    )
    spelling: Literal["model", "passage"] = Field(
        "model", description="passage: an answer is written as a packed passage writes it, if one does"
    )
    send_stop: bool = Field(True, description="the server ends a text where the answer ends, which is cheaper")
    options: dict[str, Any] = Field({}, description="fields of every request, as they are; null takes one out")
    timeout: float = Field(60.0, gt=0, description="seconds")
    retries: int = Field(5, ge=0, description="further tries after a failure that may pass")
    longest_wait: float = Field(60.0, ge=0, description="seconds that are waited at most before a further try")
    concurrency: int = Field(8, ge=1, description="requests under way at once")
    cache: str | None = Field(
        "api-cache", description="folder for replies, by the whole request, among the artifacts; null: none are kept"
    )

    @model_validator(mode="after")
    def _check_prices(self) -> Self:
        if (self.tokenizer is None) == (self.bytes_per_token is None):
            raise ValueError(
                "give either a tokenizer or bytes_per_token: the packer must know what a passage costs before the "
                "server counts."
            )
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} samples at temperature 0 are all the same. Set a temperature.")
        return self


AnyReader = SpanReaderSettings | LmReaderSettings | ApiReaderSettings


class PipelineRecipe(GrownSettings):
    """How questions are answered. Without `index` and `retriever` it is closed-book."""

    LATER = frozenset({"recursion"})

    kind: Literal["pipeline"]
    index: str | None = Field(None, description="an index recipe, or the folder of an index")
    retriever: Annotated[AnyRetriever, Field(discriminator="kind")] | None = None
    k: int = Field(100, ge=1, description="passages that leave the retriever")
    reranker: RerankerSettings | None = None
    packer: PackerSettings = PackerSettings()
    reader: Annotated[AnyReader, Field(discriminator="kind")]
    recursion: Annotated[AnyRecursion, Field(discriminator="kind")] | None = Field(
        None, description="what happens after a pass; null: one pass"
    )
    batch: int = Field(64, ge=1, description="questions that go through the stages together in run and eval")

    @model_validator(mode="after")
    def _check_retriever(self) -> Self:
        if self.retriever is not None and self.index is None:
            raise ValueError(f"a {self.retriever.kind} retriever needs an index. Name one under index.")
        return self

    @model_validator(mode="after")
    def _check_trim(self) -> Self:
        if not self.packer.needs_reranker:
            return self
        last = self.reranker.stages[-1] if isinstance(self.reranker, Cascade) else self.reranker
        if last is None or isinstance(last, GivenScores):
            found = "there is no re-ranker" if last is None else "a re-ranker of kind scores reads no sentences"
            raise ValueError(f"packer.trim.by is reranker, but {found}. Set by: terms, or name one that reads.")
        return self

    @model_validator(mode="after")
    def _check_windows(self) -> Self:
        reader = self.reader
        is_apart = reader.kind == "span" or (reader.kind == "lm" and reader.passages == "apart")
        if self.packer.windows > 1 and is_apart:
            raise ValueError(
                f"packer.windows is {self.packer.windows}, but this reader sees every passage apart. Set windows: 1."
            )
        return self

    @property
    def second_reader(self) -> "LmReaderSettings | ApiReaderSettings | None":
        """Who reads candidates, or says what is missing; None without such a recursion."""
        match self.recursion:
            case TextualRecursion(reader=changes):
                return self._reader_with(changes, {})
            case NeuralRecursion(connector=connector):
                return self._reader_with({"method": connector}, {})
            case RetrievalRecursion(asks=dict() as changes):
                # What was trained for answering is no help in asking.
                return self._reader_with(changes, {"prompt": "missing-passage", "template": {}, "method": None})
            case _:
                return None

    def _reader_with(self, changes: dict[str, Any], other: dict[str, Any]) -> LmReaderSettings | ApiReaderSettings:
        """The first reader with these settings changed; a reader of its own if they name a kind."""
        kinds: dict[str, type[LmReaderSettings | ApiReaderSettings]] = {
            "lm": LmReaderSettings,
            "api": ApiReaderSettings,
        }
        own = changes.get("kind", self.reader.kind)
        if own not in kinds:
            raise ValueError(f"a {own} reader writes nothing. Name all settings of one that does, with kind: lm.")
        like = {} if own != self.reader.kind else self.reader.model_dump(exclude_unset=True)
        try:
            other = {name: value for name, value in other.items() if name in kinds[own].model_fields}
            return kinds[own].model_validate({**like, **other, "kind": own, **changes})
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            known = ", ".join(kinds[own].model_fields)
            unknown = f"{where} is not a setting of {own} ({known})."
            raise ValueError(unknown if first["type"] == "extra_forbidden" else f"{where}: {first['msg']}.") from None

    @model_validator(mode="after")
    def _check_recursion(self) -> Self:
        match self.recursion:
            case None:
                return self
            case RetrievalRecursion(query=query) if self.retriever is None:
                raise ValueError("recursion of kind retrieval needs a retriever. Name one, or use kind: textual.")
            case RetrievalRecursion(query=query):
                left = query.replace("{question}", "").replace("{answer}", "")
                if "{answer}" not in query or "{" in left or "}" in left:
                    raise ValueError(
                        f"recursion.query is {query!r}; fields are {{question}} and {{answer}}, the latter a must."
                    )
            case NeuralRecursion() if self.reader.kind != "lm":
                raise ValueError(f"recursion of kind neural needs a reader of kind lm, not {self.reader.kind}.")
            case TextualRecursion(source="samples") if self.reader.kind != "lm":
                raise ValueError(
                    f"recursion.source is samples, and a {self.reader.kind} reader draws none. Set source: reader."
                )
            case _:
                pass
        second = self.second_reader
        if isinstance(second, ApiReaderSettings) and self.recursion.kind == "textual":
            raise ValueError("recursion.reader: a reader of kind api shows no candidates. Use kind: lm.")
        return self
