"""Recipes of labs: what all have, and the sizes of each world."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from odqa.config.base import Settings
from odqa.config.instructions import MixtureRecipe


class Claim(Settings):
    """What must hold of an arm's mean over the seeds: absolutely, or against the best of the arms in `over`."""

    arm: str
    measure: str
    over: tuple[str, ...] = Field((), description="arms; the one with the highest mean is compared with")
    at_least: float | None = Field(None, description="points; with `over`: points more than that arm has")
    at_most: float | None = Field(None, description="the same, as an upper bound")
    times: float | None = Field(None, gt=0, description="with `over`: at least so many times what that arm has")
    surely: bool = Field(False, description="with `over`: the 95% interval of the paired difference is above 0, too")

    @model_validator(mode="after")
    def _check_bounds(self) -> Self:
        if not self.over and (self.surely or self.times is not None):
            raise ValueError(f"a claim about {self.arm} needs arms to compare with (over) for times and surely.")
        if self.at_least is None and self.at_most is None and self.times is None and not self.surely:
            raise ValueError(f"a claim about {self.arm} says nothing. Give at_least, at_most, times or surely.")
        return self


class LabFigure(Settings):
    """How a figure of a lab is drawn; its curves come from the lab, by the figure's name."""

    x_label: str
    y_label: str = ""
    x_scale: Literal["linear", "log"] = "linear"
    panels: dict[str, str] = Field(
        {}, description="y labels by the names of curves that are drawn side by side, in place of the figure's own"
    )


class Lab(Settings):
    """What all labs have. A claim or a figure can change without a new run."""

    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field((0, 1, 2), min_length=1)
    claims: tuple[Claim, ...] = Field((), description="odqa lab ends with 1 if one does not hold")
    figures: dict[str, LabFigure] = Field({}, description="drawn by odqa lab --save; needs the extra plots")

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds need to differ (found: {', '.join(map(str, self.seeds))}).")
        return self


class BlackboxLab(Lab):
    """Black-box tuning beside written prompts and gradients, few-shot (`odqa.labs.blackbox`)."""

    kind: Literal["lab-blackbox"]
    words: int = Field(40, ge=10, description="words with properties")
    tasks: int = Field(4, ge=2, description="properties, each asked for by a task")
    length: int = Field(5, ge=3, description="words of a text; odd")
    width: int = Field(64, ge=16)
    layers: int = Field(2, ge=1)
    pretraining_steps: int = Field(1000, ge=1)
    shots: int = Field(16, ge=2, description="training examples a class, and as many to choose by")
    items: int = Field(400, ge=1, description="test texts a task")
    dimensions: int = Field(50, ge=2, description="of z")
    population: int = Field(20, ge=2)
    calls: int = Field(1000, ge=2, description="passes of the training set in a black-box search")
    sigma: float = Field(1.0, gt=0)
    deep_sigma: float = Field(0.2, gt=0, description="BBTv2's sigma and scale, as in its authors' code")
    deep_scale: float = Field(0.2, gt=0)
    text_calls: int = Field(60, ge=7, description="passes of the training set in the search over texts")
    gradient_steps: int = Field(100, ge=1)

    @model_validator(mode="after")
    def _check_length(self) -> Self:
        if self.length % 2 == 0:
            raise ValueError(f"length is {self.length}; it must be odd, or texts have no majority.")
        return self


class IdptLab(Lab):
    """Tasks that only unknown words name, see `odqa.labs.idpt`. Sizes and rates are our choice."""

    kind: Literal["lab-idpt"]
    width: int = Field(96, ge=8)
    layers: int = Field(3, ge=1)
    model_steps: int = Field(1500, ge=10)
    model_rate: float = Field(2e-3, gt=0)
    encoder_width: int = Field(64, ge=8)
    encoder_steps: int = Field(600, ge=10)
    masked: float = Field(0.25, gt=0, lt=1, description="share of the words that the encoder has to restore")
    length: int = Field(5, ge=1, description="vectors of a prompt")
    encoder_length: int = Field(4, ge=1)
    inner: int = Field(64, ge=4)
    steps: int = Field(1000, ge=10)
    batch: int = Field(64, ge=1)
    rate: float = Field(5e-3, gt=0, description="learning rate of the generators")
    prompt_rate: float = Field(0.03, gt=0, description="learning rate of the prompts")
    test: int = Field(300, ge=1, description="texts of each task")


class TasksLab(Lab):
    """Many tasks that only their wording tells apart, on a real model, see `odqa.labs.tasks`. Values are our choice."""

    kind: Literal["lab-tasks"]
    model: str = "embedded:odqa-mini-1"
    encoder: str | None = Field("embedded:all-MiniLM-L6-v2", description="reads for ID-PT; null: the model's own")
    mixture: MixtureRecipe
    length: int = Field(20, ge=1, description="vectors of a prompt")
    encoder_length: int = Field(10, ge=1)
    inner: int = Field(64, ge=4)
    steps: int = Field(400, ge=8)
    prompt_rate: float = Field(3e-3, gt=0)
    rate: float = Field(3e-3, gt=0, description="learning rate of the generator")
    tuning_rate: float = Field(1e-4, gt=0, description="learning rate of fine-tuning")
    test_items: int = Field(60, ge=1, description="of each task")
    curve_items: int = Field(12, ge=1, description="of each task, other ones, for the learning curve")
    curve_points: int = Field(8, ge=1)
    threads: int | None = Field(1, ge=1)


class ProbesLab(Lab):
    """What every layer of frozen models knows, see `odqa.labs.probes`. Values are our choice."""

    kind: Literal["lab-probes"]
    models: tuple[str, ...] = Field(("embedded:all-MiniLM-L6-v2", "embedded:odqa-mini-1"), min_length=1)
    train: str = Field(description="jsonl of reading examples")
    sources: tuple[str, ...] = Field(min_length=1, description="the sources of examples that are used, and no other")
    probes: tuple[Literal["linear", "mlp"], ...] = Field(
        ("linear", "mlp"), min_length=1, description="the first is drawn"
    )
    steps: int = Field(300, ge=1, description="of a probe's training")
    train_items: int = Field(900, ge=8)
    test_items: int = Field(400, ge=8)
    threads: int | None = Field(1, ge=1)


class RecursionHopsLab(Lab):
    """Two-hop questions for a model that knows one-hop facts, see `odqa.labs.recursion_hops`. All values are ours."""

    kind: Literal["lab-recursion-hops"]
    entities: int = Field(40, ge=2)
    relations: int = Field(20, ge=2)
    train_share: float = Field(0.6, gt=0, lt=1)
    width: int = Field(64, ge=8)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    sentences: int = Field(3, ge=1, description="of a text that the model learns from")
    mentions: float = Field(0.2, ge=0, lt=1, description="share of sentences that are no fact but `e r r'`")
    fact_steps: int = Field(500, ge=1)
    fact_rate: float = Field(5e-3, gt=0)
    batch: int = Field(128, ge=1)
    prompt: int = Field(1, ge=1, description="vectors before each pass; a single pass has twice as many")
    inner: int = Field(128, ge=1, description="width of the MLP connector")
    steps: int = Field(1000, ge=1, description="on questions, of every method")
    language_steps: int = Field(1000, ge=1, description="of pre-training as a language model")
    rate: float = Field(5e-3, gt=0)
    rates: dict[str, float] = Field({}, description="of arms with another one")
    samples: tuple[int, ...] = Field((1, 4), min_length=1)


CalmArm = Literal[
    "composed", "half of the links", "links of the paper", "random m_A", "m_A as encoder", "LoRA", "fine-tuned m_B"
]


class CalmLab(Lab):
    """Arithmetic with keys whose values only one of two models knows, see `odqa.labs.calm`. Values are our choice."""

    kind: Literal["lab-calm"]
    keys: int = Field(1000, ge=20)
    seen: float = Field(0.2, gt=0, lt=1, description="share of the keys that the examples of the combined skill have")
    width_a: int = Field(64, ge=8)
    layers_a: int = Field(3, ge=1)
    width_b: int = Field(96, ge=8)
    layers_b: int = Field(4, ge=1)
    heads: int = Field(4, ge=1, description="of both models")
    model_steps: int = Field(600, ge=1)
    model_rate: float = Field(2e-3, gt=0)
    links: tuple[tuple[int, int], ...] = Field(
        ((0, 0), (1, 1), (2, 2), (3, 3)), min_length=1, description="pairs of a layer of m_A and one of m_B"
    )
    arms: tuple[CalmArm, ...] | None = Field(None, description="what is trained beside m_A and m_B; null: all")
    steps: int = Field(600, ge=1)
    rate: float = Field(3e-3, gt=0, description="of the links")
    lora_rate: float = Field(3e-3, gt=0)
    tuning_rate: float = Field(5e-4, gt=0)
    batch: int = Field(128, ge=1)
    numeric_share: float = Field(0.2, ge=0, le=1, description="of numeric arithmetic in the examples of every arm")
    substitution_share: float = Field(0.2, ge=0, le=1)
    points: int = Field(5, ge=1, description="of each curve")
    test: int = Field(1000, ge=1, description="rows a measure")
