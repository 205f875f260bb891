"""Recipes of trainings: mining, readers, re-rankers, methods, language models, weighted means."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from odqa.config.base import GrownSettings, Settings


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


class NeuralRecursionSettings(Settings):
    """Two passes joined by a trained connector, see `odqa.frozen.neural` (arXiv 2204.10019)."""

    kind: Literal["neural-recursion"]
    vectors: int | None = Field(None, ge=1, description="that pass 2 reads beside the text; null: one for each token")
    depth: int = Field(1, ge=0, description="inner layers of the connector; 0: linear")
    width: int | None = Field(None, ge=1, description="of the inner layers; null: the model's")
    prompt: int = Field(0, ge=0, description="vectors of the soft prompt of each pass")
    start: Literal["text", "random"] = "text"
    seed: int = 0


class AdapterSettings(Settings):
    """Houlsby adapters: bottlenecks behind attention and feed-forward part of every layer (arXiv 1902.00751)."""

    kind: Literal["adapter"]
    rank: int = Field(64, ge=1, description="inner width of a bottleneck")
    norms: bool = Field(True, description="train the layers' normalisations too, as the paper does")
    cross: bool = Field(False, description="encoder-decoders: a bottleneck behind the attention to the source too")
    targets: tuple[str, ...] | None = Field(
        None, description="endings of names of the linear maps they stand behind; None: known ones"
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


class InputPromptSettings(Settings):
    """ID-PT: a frozen encoder and a small network write a prompt for each text from that text (arXiv 2204.10019)."""

    kind: Literal["id-pt"]
    length: int = Field(50, ge=1, description="vectors before the text, whatever its length")
    encoder: str | None = Field(None, description="the frozen model that reads the text; null: the backbone's own")
    encoder_length: int = Field(10, ge=1, description="learned vectors before the text in the encoder")
    inner: int = Field(64, ge=1, description="width of the attention from prompt to text, a multiple of heads")
    heads: int = Field(4, ge=1)
    read: int | None = Field(None, ge=1, description="tokens that the encoder reads, from the text's beginning")
    seed: int = 0


class AugmentingSettings(Settings):
    """A frozen model whose states the reader's model reads, by folder or hub name; see `odqa.frozen.augment`."""

    model: str
    architecture: Literal["causal", "encoder"] = "causal"
    links: tuple[tuple[int, int], ...] | int | None = Field(
        None, description="pairs [its layer, the reader's layer], or a number of links; None: four, evenly"
    )
    reads: Literal["all", "source"] | None = Field(
        None, description="all: what has been written too; None: all that it can (an encoder reads the source)"
    )


class CalmSettings(Settings):
    """Links from other frozen models (CALM, arXiv 2401.02412)."""

    kind: Literal["calm"]
    models: tuple[AugmentingSettings, ...] = Field(min_length=1)
    heads: int | None = Field(None, ge=1, description="of a link; None: as many as the reader's model has")
    rotary: bool = Field(True, description="links see positions; the paper's do not")
    normalise: bool = Field(True, description="links see states of one size; the paper's do not")
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
    source_weights: dict[str, int] = Field({})
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
    method: Annotated[
        LoraSettings | AdapterSettings | DeepPromptSettings | FineTuningSettings, Field(discriminator="kind")
    ]
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
    source_weights: dict[str, int] = Field({})
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
    method: Annotated[
        LoraSettings | AdapterSettings | DeepPromptSettings | FineTuningSettings, Field(discriminator="kind")
    ]
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


class ContrastRecipe(Settings):
    """Training batches of a bi-encoder, see `odqa.retrieve.train.BatchSettings`."""

    questions: int = Field(64, ge=2)
    hard: int = Field(1, ge=0, description="hard negatives a question")
    pool: int = Field(20, ge=1, description="they are drawn from so many, the hardest ones")
    part_tokens: int = Field(4096, ge=1)
    cache: bool = Field(True, description="gradient cache: memory is that of a part, whatever the batch")
    source_weights: dict[str, int] = Field({})
    seed: int = 0


class BiEncoderFit(FitRecipe):
    """The training loop; the rate of the method."""

    learning_rates: dict[Literal["method"], float]  # type: ignore[assignment]


class BiEncoderTraining(Settings):
    """Trains a method on the frozen encoder of an index: for questions, passages or both.

    With `side: questions` passages keep the index's vectors, and tune questions are searched in it.
    """

    kind: Literal["train-bi-encoder"]
    index: str = Field(description="an index recipe or folder: its encoder with all its settings, and its vectors")
    side: Literal["questions", "passages", "both"]
    method: Annotated[LoraSettings | DeepPromptSettings | FineTuningSettings, Field(discriminator="kind")]
    train: str = Field(description="training examples: jsonl, or DPR's training json")
    passages: tuple[str, ...] = Field((), description="files that hold the passages that examples and rankings name")
    rankings: str | None = Field(None, description="a mining recipe or what it made; null: only the file's negatives")
    unranked: bool = Field(False, description="train on questions without a ranking too")
    batch: ContrastRecipe = ContrastRecipe()
    temperature: float = Field(0.05, gt=0)
    fit: BiEncoderFit
    tune: tuple[TuneSet, ...] = ()
    candidate_depth: int = Field(
        20, ge=2, description="side passages or both: passages of the index that a tune question's are ranked from"
    )
    start: str | None = Field(None, description="a trained bi-encoder of the same method to go on from")
    device: str = "auto"
    autocast: bool | None = Field(None, description="forward pass in bfloat16; None: where that is fast")
    stored: Literal["float16", "float32"] = "float16"
    threads: int | None = Field(None, ge=1)


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


AnyMethod = (
    PromptTuningSettings
    | DeepPromptSettings
    | PrefixTuningSettings
    | LoraSettings
    | AdapterSettings
    | InputPromptSettings
    | NeuralRecursionSettings
    | CalmSettings
    | FineTuningSettings
)


class ContextRecipe(Settings):
    """Training batches of a generative reader's method, see `odqa.read.adapt.ContextSettings`."""

    questions: int = Field(16, ge=1)
    examples: int | None = Field(None, ge=1)
    source_weights: dict[str, float] = Field({})
    seed: int = 0


class BlackboxTrainer(Settings):
    """Searches for a soft prompt by CMA-ES through the model's API alone, see `odqa.frozen.blackbox.SearchSettings`.

    A call is one pass of `contexts.questions` questions with one prompt; each generation has questions of its own.
    """

    kind: Literal["blackbox"]
    calls: int = Field(8000, ge=2)
    dimensions: int = Field(500, ge=2, description="of z")
    population: int = Field(20, ge=2, description="prompts a generation")
    sigma: float = Field(1.0, gt=0, description="first step size of z")
    scale: float = Field(1.0, gt=0, description="how wide A z is at first, in deviations of word vectors")
    projection: Literal["normal", "uniform"] = "normal"
    bound: float | None = Field(5.0, gt=0, description="z stays within +- so much; null: anywhere")
    tune_every: int = Field(5, ge=1, description="generations between two trials on tune")
    seed: int = Field(1, ge=1)


class LmReaderTraining(GrownSettings):
    """Trains a method on the frozen language model that a pipeline reads with, on contexts as that pipeline packs them.

    `pipeline` says all of it: model, prompt, packing, and for the tune questions retrieval and re-ranking. Either by
    gradients (`fit`) or by another trainer.
    """

    LATER = frozenset({"second", "trainer"})

    kind: Literal["train-lm-reader"]
    pipeline: str
    second: bool = Field(
        False,
        description="train the second reader of the pipeline's textual recursion, on candidates that the first one "
        "samples for the training questions",
    )
    method: Annotated[AnyMethod, Field(discriminator="kind")]
    train: str = Field(description="training examples: jsonl, or DPR's training json")
    passages: tuple[str, ...] = Field((), description="files that hold the passages that examples and rankings name")
    rankings: str | None = Field(None, description="a mining recipe or what it made; null: the file's negatives")
    contexts: ContextRecipe = ContextRecipe()
    fit: FitRecipe | None = Field(None, description="training by gradients")
    trainer: BlackboxTrainer | None = Field(None, description="instead of fit; needs a method of kind prompt-tuning")
    tune: tuple[TuneSet, ...] = ()
    start: str | None = Field(None, description="a trained method of the same kind to go on from")
    autocast: bool | None = Field(None, description="forward pass in bfloat16; None: where that is fast")
    stored: Literal["float16", "float32"] = "float32"
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_trainer(self) -> Self:
        if (self.fit is None) == (self.trainer is None):
            raise ValueError("a method is trained by gradients (fit) or by a trainer. Give one of them.")
        if self.trainer is None:
            return self
        if self.method.kind != "prompt-tuning":
            raise ValueError(
                f"trainer blackbox searches for a prompt; the method is {self.method.kind}. Use prompt-tuning."
            )
        if not self.tune:
            raise ValueError("trainer blackbox chooses by tune questions. Name some under tune.")
        if self.trainer.calls < self.trainer.population:
            raise ValueError(
                f"trainer blackbox: the budget of {self.trainer.calls} calls is smaller than one generation "
                f"({self.trainer.population}). Raise calls or lower population."
            )
        return self


class ConnectorTraining(Settings):
    """Pre-trains a connector between two passes of a frozen model on plain text; `train-lm-reader` starts from it."""

    kind: Literal["train-connector"]
    pipeline: str = Field(description="the model that its reader names is read with twice")
    method: NeuralRecursionSettings
    passages: tuple[str, ...] = Field(min_length=1, description="files of passages, whose texts are the language")
    texts: int | None = Field(None, ge=1, description="at most so many passages, drawn at random; null: all")
    tokens: int = Field(64, ge=2, description="of a text, beginning and continuation together")
    batch: int = Field(16, ge=1)
    seed: int = 0
    fit: FitRecipe
    autocast: bool | None = Field(None, description="forward pass in bfloat16; None: where that is fast")
    stored: Literal["float16", "float32"] = "float32"
    threads: int | None = Field(None, ge=1)


class MixRecipe(Settings):
    """Pre-training batches, see `odqa.lm.pretrain.MixSettings`."""

    shares: dict[str, float] = Field(description="of each task of odqa.lm.tasks its share")
    items: int = Field(32, ge=1)
    longest: int = Field(256, ge=16)
    longest_target: int = Field(24, ge=1)
    long_share: float = Field(0.0, ge=0, le=1, description="passages lengthened by others of their article")
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
    start: str | None = Field(None, description="an encoder-decoder of the same sizes to go on from; null: its encoder")
    tune: tuple[TuneSet, ...] = ()
    device: str = "auto"
    autocast: bool | None = Field(None, description="forward pass in bfloat16; None: where that is fast")
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        wanted = {"update", "decoder"} if self.model.kind == "encoder-decoder" else {"model"}
        if set(self.fit.learning_rates) != wanted:
            raise ValueError(f"fit.learning_rates must name {' and '.join(sorted(wanted))} for a {self.model.kind}.")
        if self.start is not None and self.model.kind != "encoder-decoder":
            raise ValueError("start is for encoder-decoders; a decoder begins with random values. Remove it.")
        return self
