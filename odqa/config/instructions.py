"""Recipes of templates, and of trainings on a mixture of tasks under templates."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from odqa.config.base import Settings
from odqa.config.training import AnyMethod, FitRecipe


class TaskTemplates(Settings):
    """The wordings of a task, those for testing apart; `cluster` is the group that it is reported in."""

    cluster: str
    train: tuple[str, ...] = Field(min_length=1)
    test: tuple[str, ...] = Field(min_length=1)


class Templates(Settings):
    """Templates of tasks by name; the tasks are those of `odqa.lm.records`, the language `odqa.lm.instructions`'."""

    kind: Literal["templates"]
    tasks: dict[str, TaskTemplates] = Field(min_length=1)


class MixtureRecipe(Settings):
    """A mixture of tasks under templates, see `odqa.lm.mixture`."""

    templates: str = Field("embedded:instructions.yaml", description="a recipe of kind templates")
    passages: tuple[str, ...] = Field(min_length=1)
    train: str = Field(description="jsonl of reading examples")
    sources: tuple[str, ...] = Field(min_length=1, description="the sources of examples that are used, and no other")
    held_out: tuple[str, ...] = Field((), description="tasks that are tested only")
    shares: dict[str, float] = Field({}, description="what a task weighs in the draw; 1 if not named")
    items: int = Field(16, ge=1, description="items a batch")
    examples: int | None = Field(None, ge=1, description="different items; null: each comes once")
    longest: int = Field(96, ge=8, description="tokens of a source; a longer one is drawn again")
    test_share: float = Field(0.1, gt=0, lt=1, description="share of the articles that are for testing")
    seed: int = 0


class MixtureTraining(Settings):
    """Trains a method on a mixture of tasks under templates: instruction tuning, with `method: {kind: fine-tuning}`."""

    kind: Literal["train-mixture"]
    model: str
    method: Annotated[AnyMethod, Field(discriminator="kind")]
    mixture: MixtureRecipe
    fit: FitRecipe
    test_items: int = Field(50, ge=1, description="items of each task that are tested on, under templates for testing")
    device: str = "auto"
    autocast: bool | None = Field(None, description="forward pass in bfloat16; None: where that is fast")
    stored: Literal["float16", "float32"] = "float32"
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _check_rates(self) -> Self:
        if set(self.fit.learning_rates) != {"method"}:
            raise ValueError("fit.learning_rates must name method.")
        return self
