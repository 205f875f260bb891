"""Recipes of a recursion: what happens after a pass. `odqa.recurse` says what the kinds do."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from odqa.config.base import Settings

_MOST_PASSES, _MOST_CANDIDATES = 8, 32  # as odqa.recurse has them


class _Recursion(Settings):
    passes: int = Field(2, ge=2, le=_MOST_PASSES, description="at most; an answer that repeats stops earlier")
    below: float | None = Field(
        None,
        ge=0,
        le=1,
        description="ask again only where the confidence is lower; null: always. scripts/tune_recursion.py chooses it",
    )
    keep: Literal["last", "surer"] = Field(
        "last", description="the answer that stands; surer: of a pass and the next one that with the higher confidence"
    )


class TextualRecursion(_Recursion):
    """Reads again with its own candidate answers beside the question and the same passages."""

    kind: Literal["textual"]
    source: Literal["samples", "reader"] = Field(
        "samples", description="reader: what the reader lists with its answer, such as a span reader's best spans"
    )
    candidates: int = Field(8, ge=1, le=_MOST_CANDIDATES, description="samples, or listed ones, a question")
    temperature: float = Field(1.0, gt=0, description="of samples, as top_p and seed")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = Field(0, ge=0)
    reader: dict[str, Any] = Field(
        {},
        description="settings of the second reader: what differs from the first of kind lm (method, prompt, template), "
        "or all of them, with kind: lm",
    )

    @model_validator(mode="after")
    def _check_samples(self) -> Self:
        drawn = {"temperature", "top_p", "seed"} & self.model_fields_set
        if self.source == "reader" and drawn:
            raise ValueError(f"{sorted(drawn)[0]} is about samples. Set source: samples, or remove it.")
        return self


class RetrievalRecursion(_Recursion):
    """Retrieves again with question and answer as a query, or with what a reader says is missing."""

    kind: Literal["retrieval"]
    query: str = Field("{question} {answer}", description="with `asks`, {answer} is what that reader writes")
    fusion: Literal["rrf", "mean", "new"] = Field(
        "mean",
        description="of what all passes found: by reciprocal rank; by mean score (a list without a passage gives its "
        "lowest); new: what the last pass found alone",
    )
    asks: dict[str, Any] | None = Field(
        None,
        description="settings of a reader that names the missing passage: what differs from the first of kind lm, or "
        "all; its prompt is missing-passage if none is named",
    )


class NeuralRecursion(_Recursion):
    """Reads again from vectors that a trained connector makes of the model's own last hidden states."""

    kind: Literal["neural"]
    connector: str = Field(description="a method of kind neural-recursion that was trained for the reader's model")
    passes: Literal[2] = 2  # a connector is trained for one further pass


AnyRecursion = TextualRecursion | RetrievalRecursion | NeuralRecursion
