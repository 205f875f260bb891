"""Recipes of labs: what all have, and the sizes of each world."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from odqa.config.base import Settings


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
    y_label: str
    x_scale: Literal["linear", "log"] = "linear"


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
