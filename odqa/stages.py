"""The five stages of a pipeline, as protocols.

Batch in, batch out, same length and same order. Settings belong to a stage's constructor; a stage sees queries, never
gold answers, and keeps nothing between calls that changes a result. Each protocol has one conformance test class
(`tests/unit/conformance*.py`) that every implementation passes.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from odqa.types import Answer, Hit, LatentContext, PackedContext, Query, Sample, TokenCosts

Next = Query | PackedContext | LatentContext | None
"""What a recursion decides for a question: the type is the control flow."""


@runtime_checkable
class Retriever(Protocol):
    """Finds passages."""

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """At most k hits a query, best first, no passage twice; fewer only if fewer match. k < 1 is a ValueError."""
        ...


@runtime_checkable
class Reranker(Protocol):
    """Re-scores hits, reading question and passage together."""

    def rerank(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """The same passages in a new order with new scores, best first; ties keep the incoming order."""
        ...


@runtime_checkable
class Packer(Protocol):
    """Fits passages into the reader's window."""

    def pack(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[PackedContext]:
        """One context a query; what is packed is what the reader sees, to the token."""
        ...


@runtime_checkable
class Reader(Protocol):
    """Answers from a packed context, with a language model whose weights never change."""

    def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
        """One answer a context; an empty text abstains."""
        ...

    def costs(self, query: Query, hits: Sequence[Hit]) -> TokenCosts:
        """The exact price of each hit in tokens, by the reader's own tokenizer; the packer budgets with nothing else.

        Raises DataError if the question alone does not fit the window.
        """
        ...


@runtime_checkable
class ProvesFrozen(Protocol):
    """A reader that can prove that its language model is still the one it loaded."""

    def check_frozen(self) -> None:
        """Raises AssertionError if a bit of the model's weights has changed since it was loaded."""
        ...


@runtime_checkable
class NotesReading(Protocol):
    """A reader that has something to say about each reading for the trace, such as what it cost."""

    def read_with_notes(self, contexts: Sequence[PackedContext]) -> list[tuple[Answer, Mapping[str, object]]]:
        """The answers of `read`, each with notes as JSON values; equal readings have equal notes."""
        ...


@runtime_checkable
class LatentReading(Protocol):
    """A reader that reads vectors of an earlier pass again (`LatentContext`), not tokens."""

    def read_latent(self, contexts: Sequence[LatentContext]) -> list[tuple[Answer, Mapping[str, object]]]:
        """One answer a context, each with notes for the trace as JSON values, such as what the pass cost.

        Raises ValueError for a handle that this reader did not make.
        """
        ...


@runtime_checkable
class GivesVectors(LatentReading, Protocol):
    """A reader that can make the vectors that it reads again."""

    def latent(self, contexts: Sequence[PackedContext]) -> list[LatentContext]:
        """What `read_latent` takes, one for each context."""
        ...


@runtime_checkable
class DrawsSamples(Protocol):
    """A reader that can write several answers to one context by chance."""

    def draw(
        self, contexts: Sequence[PackedContext], count: int, *, temperature: float, top_p: float, seed: int
    ) -> list[list[Sample]]:
        """`count` samples a window of each context, the likelier ones first, equal ones too.

        They share the encoded prompt, and depend on the seed, the query's id and their number alone. ValueError for a
        count below 1.
        """
        ...


@runtime_checkable
class ReadsCandidates(Protocol):
    """A reader whose prompt can show answers of an earlier pass."""

    def show_candidates(self, context: PackedContext, candidates: Sequence[str]) -> PackedContext:
        """The context with these answers in it, priced to the token, as `read` takes it.

        What a candidate says stays in its place in the prompt. If the window does not hold all, passages leave, the
        lowest ranked first, then candidates, the last first. Raises ValueError if no candidate has a text, DataError if
        not even one fits beside the question.
        """
        ...


@runtime_checkable
class CountsSpending(Protocol):
    """A reader that costs more than time, and counts it."""

    def spent(self) -> Mapping[str, int]:
        """Totals since the reader was made, by name."""
        ...


@runtime_checkable
class ChecksQueries(Protocol):
    """A stage that serves some queries only, and can say so before hours of work."""

    def check_queries(self, queries: Sequence[Query]) -> None:
        """Raises DataError if it cannot serve one of the queries."""
        ...


@runtime_checkable
class Recursion(Protocol):
    """Decides what happens after a pass; the type of what it returns is the control flow."""

    def again(self, contexts: Sequence[PackedContext], answers: Sequence[Answer], pass_no: int) -> list[Next]:
        """Per query: a Query retrieves again, a PackedContext or LatentContext is read again, None stops.

        The text of a Query is what is searched for; what is found is re-ranked, packed and read for the question as it
        was asked. `contexts` are the last packed ones: those that the vectors of a latent pass came from.
        """
        ...


@runtime_checkable
class SaysWhy(Protocol):
    """A recursion that sees all passes of a question, and notes why it decided as it did."""

    def decide(
        self, passes: Sequence[Sequence[tuple[PackedContext, Answer]]], pass_no: int
    ) -> list[tuple[Next, Mapping[str, object]]]:
        """As `Recursion.again`, which sees the last pass alone; the notes are JSON values for the trace."""
        ...
