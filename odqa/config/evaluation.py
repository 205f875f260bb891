"""Recipes of an evaluation: pipelines on question sets, and what is expected of them."""

from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from odqa.config.base import GrownSettings, Settings
from odqa.errors import DataError


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


class QuestionSet(GrownSettings):
    """Questions with answers, and what is expected of them: a file, or a data set that `datasets` loads (`hub`).

    A data set has the columns question, answer or answers (lists of strings), perhaps id. `name` is a folder's, too.
    """

    LATER = frozenset({"without"})

    name: str = Field(pattern=r"^\w[\w.-]*$")
    file: str | None = None
    hub: str | None = Field(None, description="a name of the hub or a local folder; needs the extra datasets")
    split: str
    without: tuple[str, ...] = Field((), description="question files; what is asked there, word by word, is left out")
    limit: int | None = Field(None, ge=1, description="only so many questions, the first ones that are left")
    matcher: Literal["string", "regex", "characters"] = Field(
        "string",
        description="who compares: string (SQuAD and DPR), regex (answers are patterns), characters (Chinese, Japanese,"
        " Thai and other scripts without blanks)",
    )
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
    set: dict[str, Any] = Field({})

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


class EvalRecipe(GrownSettings):
    """Pipelines side by side on question sets. A missing index is built first."""

    LATER = frozenset({"ceiling"})

    kind: Literal["eval"]
    pipelines: tuple[Variant, ...] = Field(min_length=1)
    questions: tuple[QuestionSet, ...] = Field(min_length=1)
    recall_at: tuple[Annotated[int, Field(ge=1)], ...] = (1, 5, 20, 100)
    gains: tuple[Gain, ...] = Field((), description="paired differences to report")
    published: tuple[Published, ...] = Field((), description="figures of others to print beside ours")
    figure: FigureSettings | None = Field(None, description="drawn by odqa eval --save; needs the extra plots")
    seed: int = 0
    ceiling: bool = Field(False, description="count the questions that any passage of the collection answers")

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
