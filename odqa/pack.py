"""Packing: which of the ranked passages the reader sees, within a budget of tokens.

The frozen reader's window is the scarce thing, so it is filled greedily from the best passage down (the packing of the
frozen reader of arXiv 2204.10019). This module knows no tokenizer: it budgets with the prices that the reader charges
(`Reader.costs`) and with nothing else.

The invariant: what is packed is what the reader sees, to the token. Passages go in whole or not at all, nothing is cut
afterwards, and every passage that is left out is recorded with the reason.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from odqa.errors import DataError
from odqa.stages import Reader
from odqa.types import Dropped, Hit, PackedContext, Query

PRICED_AT_ONCE = 8  # our choice: about twice what fits a window of 1,024 tokens; larger asks for prices nobody needs


@runtime_checkable
class ShowsContext(Protocol):
    """A reader that can show packed passages as its prompt words them."""

    def show(self, hits: Sequence[Hit]) -> str:
        """The passages in reading order as one text, without the question."""
        ...


class GreedyPacker:
    """Takes passages in rank order while they fit; skips one that does not fit and goes on with the next.

    `budget` bounds all tokens given to the reader for one query, question and separators included; the reader's own
    limit holds as well. `max_passages` bounds the number of passages. `order` is the reading order: "score" puts the
    best first, "reverse" puts it last, next to the question in most prompts.

    Two hits are duplicates if they have the same id or the same text but for case and blanks (titles do not count).
    The better ranked one stays, also when it then does not fit.

    Pricing is lazy, because tokenising 100 passages of which 4 fit is most of the work of packing. Prices are asked for
    at most `PRICED_AT_ONCE` hits at a time, and only for hits that may fit: one whose characters, at the fewest tokens
    a character that any passage of this query has cost so far, already exceed the room left is dropped unseen.
    """

    def __init__(
        self,
        reader: Reader,
        budget: int,
        max_passages: int | None = None,
        order: Literal["score", "reverse"] = "score",
    ) -> None:
        if budget < 1:
            raise ValueError(f"budget is {budget}; it must be at least one token")
        if max_passages is not None and max_passages < 1:
            raise ValueError(f"max_passages is {max_passages}; it must be at least 1 (None: no bound)")
        if order not in ("score", "reverse"):
            raise ValueError(f"order is {order!r}; it must be 'score' or 'reverse'")
        self.reader, self.budget, self.max_passages, self.order = reader, budget, max_passages, order

    def pack(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[PackedContext]:
        """One context a query; kept and dropped hits together are the hits that came in.

        `Dropped.reason` is "duplicate" (of a better ranked hit), "does not fit" (`tokens` is its price, or 0 if the
        reader can never read it whole), or "over the limit" (not looked at, because `max_passages` was reached or
        because it is too long for the room left; `tokens` is 0). No hits: a context of the question alone.
        Raises DataError if the question alone is over the budget or over the reader's window.
        """
        return [self._pack_one(query, list(found)) for query, found in zip(queries, hits, strict=True)]

    def _pack_one(self, query: Query, hits: list[Hit]) -> PackedContext:
        # 1. Duplicates leave before any token is counted. `fate` says for each hit why it was dropped, None if kept.
        fate: list[Dropped | None] = [None] * len(hits)
        waiting: deque[int] = deque()
        for rank, is_duplicate in enumerate(_mark_duplicates(hits)):
            if is_duplicate:
                fate[rank] = Dropped(hits[rank].passage.id, "duplicate", 0)
            else:
                waiting.append(rank)

        # 2. The question is paid for first.
        room = self._open(query)

        # 3. Passages, best first, a few prices at a time.
        kept: list[int] = []
        while waiting:
            places = PRICED_AT_ONCE if self.max_passages is None else self.max_passages - len(kept)
            asked: list[int] = []
            while waiting and len(asked) < min(places, PRICED_AT_ONCE):
                rank = waiting.popleft()
                if room.may_fit(hits[rank]):
                    asked.append(rank)
                else:
                    fate[rank] = Dropped(hits[rank].passage.id, "over the limit", 0)
            if not asked:  # no place left, or nothing that may fit
                break
            prices = self.reader.costs(query, [hits[rank] for rank in asked]).passages
            for rank, price in zip(asked, prices, strict=True):
                if room.take(hits[rank], price):
                    kept.append(rank)
                else:
                    fate[rank] = Dropped(hits[rank].passage.id, "does not fit", price or 0)
        for rank in waiting:
            fate[rank] = Dropped(hits[rank].passage.id, "over the limit", 0)

        # 4. Reading order.
        chosen = tuple(hits[rank] for rank in (kept if self.order == "score" else reversed(kept)))
        text = self.reader.show(chosen) if isinstance(self.reader, ShowsContext) else show_passages(chosen)
        dropped = tuple(drop for drop in fate if drop is not None)
        return PackedContext(query, text, chosen, room.spent, self.budget, dropped)

    def _open(self, query: Query) -> "_Room":
        costs = self.reader.costs(query, ())
        if costs.fixed > self.budget:
            raise DataError(
                f"query {query.id}: the question alone takes {costs.fixed} tokens with its prompt, the budget is "
                f"{self.budget}. Raise packer.budget or shorten the question."
            )
        total = self.budget if costs.limit is None else min(self.budget, costs.limit)
        return _Room(total, costs.fixed)


def show_passages(hits: Sequence[Hit]) -> str:
    """Packed passages as text for a person: title and text on lines of their own, a blank line between passages."""
    return "\n\n".join(f"{hit.passage.title}\n{hit.passage.text}".strip() for hit in hits)


@dataclass(slots=True)
class _Room:
    """What is left of one query's tokens."""

    total: int
    spent: int
    cheapest: float = 0.0
    """The fewest tokens a character any passage has cost so far; 0 before the first price: then all may fit."""

    def may_fit(self, hit: Hit) -> bool:
        """Whether the passage is worth asking for its price."""
        return self.spent + self.cheapest * _characters(hit) <= self.total

    def take(self, hit: Hit, price: int | None) -> bool:
        """Pay for a passage if it fits."""
        if price is None:
            return False
        rate = price / max(1, _characters(hit))
        self.cheapest = min(self.cheapest, rate) if self.cheapest else rate
        if self.spent + price > self.total:
            return False
        self.spent += price
        return True


def _characters(hit: Hit) -> int:
    return len(hit.passage.title) + len(hit.passage.text)


def _mark_duplicates(hits: Sequence[Hit]) -> list[bool]:
    """For each hit, whether a better ranked one has its id or its text (case and blanks aside)."""
    ids: set[str] = set()
    texts: set[str] = set()
    marks = []
    for hit in hits:
        text = " ".join(hit.passage.text.casefold().split())
        marks.append(hit.passage.id in ids or text in texts)
        ids.add(hit.passage.id)
        texts.add(text)
    return marks
