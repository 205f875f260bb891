"""The packer: the best passages first, as long as they fit a budget of tokens.

The frozen reader's window is the scarce thing, so it is filled greedily from the best passage down, or a small number
of windows is, each for a forward pass of its own (the packing of the frozen reader of arXiv 2204.10019). This module
knows no tokenizer: it budgets with the prices that the reader charges (`Reader.costs`) and with nothing else.

The invariant: what is packed is what the reader sees, to the token. A passage goes in whole, or trimmed to whole
sentences (`odqa.pack.trim`); the packed hit then holds the kept text. Nothing is cut afterwards, and every passage that
is left out is recorded with the reason.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal, Protocol, TypeVar, get_args, runtime_checkable

from odqa.errors import DataError, RecipeError
from odqa.pack.duplicates import NearDuplicates, mark_duplicates
from odqa.pack.trim import Cut, Found, SentenceTrimmer, TermOverlap
from odqa.stages import Reader
from odqa.types import Dropped, Hit, PackedContext, Passage, Query

PRICED_AT_ONCE = 8  # our choice: about twice what fits a window of 1,024 tokens; larger asks for prices nobody needs
Order = Literal["score", "reverse", "sides"]
Duplicates = Literal["exact", "near"]

_EMPTY = Hit(Passage("", ""), 0.0, "pack")  # its price is what any passage costs beside its words

T = TypeVar("T")
A = TypeVar("A")
R = TypeVar("R")

Packing = Generator[Cut, list[float], R]
"""Work on one query that asks what the sentences of a passage score whenever it needs to know, and goes on then."""


@runtime_checkable
class ShowsContext(Protocol):
    """A reader that can show packed passages as its prompt words them."""

    def show(self, hits: Sequence[Hit]) -> str:
        """The passages in reading order as one text, without the question."""
        ...


class GreedyPacker:
    """Takes passages in rank order while they fit; skips one that does not fit and goes on with the next.

    `budget` bounds all tokens given to the reader for one query, question and separators included; the reader's own
    limit holds as well. `max_passages` bounds the number of passages.

    `windows` n packs up to n windows that the reader reads apart, each of at most budget / n tokens with a question of
    its own, so that n windows and one compare at equal budgets. A passage goes into the first window that has room; a
    window without a passage is not read and costs nothing.

    `order` is the reading order: "score" puts the best first; "reverse" puts it last, next to the question in most
    prompts; "sides" puts the best first, the second best last and so on inwards, because long-context models lose what
    stands in the middle (Liu et al. 2023, arXiv 2307.03172). A reader that sees passages apart does not care.

    Two hits are duplicates if they have the same id or the same text but for case and blanks (titles do not count).
    The better ranked one stays, also when it then does not fit. With `duplicates` "near", a hit whose text resembles
    that of a packed one by `resemblance` or more is left out too (`odqa.pack.duplicates`; the whole texts are compared,
    trimmed or not).

    With `trim`, a passage that does not fit whole is offered again with its best sentences only, then with fewer. What
    its sentences score is asked for when it is cut, not before, and of all queries together: they are packed side by
    side, each as far as it gets without an answer.

    Pricing is lazy, because tokenising 100 passages of which 4 fit is most of the work of packing. Prices are asked for
    at most `PRICED_AT_ONCE` passages at a time, and only for what may fit: a passage whose characters, at the fewest
    tokens a character that any passage of this query has cost so far, exceed the room left is dropped unseen.
    """

    def __init__(
        self,
        reader: Reader,
        budget: int,
        max_passages: int | None = None,
        order: Order = "score",
        *,
        windows: int = 1,
        duplicates: Duplicates = "exact",
        resemblance: float = 0.5,
        trim: SentenceTrimmer | None = None,
    ) -> None:
        if budget < 1:
            raise ValueError(f"budget is {budget}; it must be at least one token")
        if max_passages is not None and max_passages < 1:
            raise ValueError(f"max_passages is {max_passages}; it must be at least 1 (None: no bound)")
        if windows < 1:
            raise ValueError(f"windows is {windows}; it must be at least 1")
        if order not in get_args(Order):
            raise ValueError(f"order is {order!r}; it must be one of {', '.join(get_args(Order))}")
        if duplicates not in get_args(Duplicates):
            raise ValueError(f"duplicates is {duplicates!r}; it must be one of {', '.join(get_args(Duplicates))}")
        if not 0 < resemblance <= 1:
            raise ValueError(f"resemblance is {resemblance}; it must be above 0 and at most 1")
        self.reader, self.budget, self.max_passages, self.order = reader, budget, max_passages, order
        self.windows = windows
        self.duplicates, self.resemblance, self.trim = duplicates, resemblance, trim

    def pack(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[PackedContext]:
        """One context a query; kept and dropped hits together are the hits that came in.

        `Dropped.reason` is "duplicate" (of a better ranked hit), "near duplicate" (of a packed one), "does not fit"
        (`tokens` is the price of the shortest form that was priced, or 0 if the reader can never read it), or "over the
        limit" (not looked at, because `max_passages` was reached or because it is too long for the room left).
        `tokens` is 0 where nothing was priced. No hits: a context of the question alone.
        Raises DataError if the question alone is over the budget of a window or over the reader's window, RecipeError
        for several windows with a reader that sees every passage apart.
        """
        work = [self._pack_one(query, list(found)) for query, found in zip(queries, hits, strict=True)]
        return _side_by_side(work, TermOverlap().scores if self.trim is None else self.trim.scorer.scores)

    def _pack_one(self, query: Query, hits: list[Hit]) -> Packing[PackedContext]:
        # 1. Duplicates leave before any token is counted. `fate` says what became of each hit: packed, or dropped.
        fate: dict[int, _Packed | Dropped] = {}
        for rank, is_duplicate in enumerate(mark_duplicates(hits)):
            if is_duplicate:
                fate[rank] = Dropped(hits[rank].passage.id, "duplicate", 0)

        # 2. The question is paid for first.
        alone = self._price_question(query)
        room = self._open(query, alone, hits)

        # 3. Passages, best first; of each the longest form that fits.
        near = NearDuplicates(self.resemblance) if self.duplicates == "near" else None
        offers = _Offers(self.reader, query, hits, self.trim, room)
        waiting = [rank for rank in range(len(hits)) if rank not in fate]
        places = len(hits) if self.max_passages is None else self.max_passages
        for at, rank in enumerate(waiting):
            if not places:
                fate[rank] = Dropped(hits[rank].passage.id, "over the limit", 0)
            elif near is not None and near.resembles_a_kept_one(hits[rank]):
                fate[rank] = Dropped(hits[rank].passage.id, "near duplicate", 0)
            else:
                fate[rank] = yield from offers.take(rank, waiting[at + 1 :], places)
            if isinstance(fate[rank], _Packed):
                places -= 1
                if near is not None:
                    near.keep(hits[rank])

        # 4. Reading order, window by window.
        outcomes = [fate[rank] for rank in range(len(hits))]
        kept = list(enumerate((found for found in outcomes if isinstance(found, _Packed)), start=1))
        chosen: list[tuple[int, _Packed]] = []
        texts = []
        for window in range(1, len(room.spent) + 1):
            inside = _in_reading_order([(rank, packed) for rank, packed in kept if packed.window == window], self.order)
            texts.append(self._show([packed.hit for _, packed in inside]))
            chosen += inside
        return PackedContext(
            query,
            "\n\n".join(texts),
            tuple(packed.hit for _, packed in chosen),
            sum(room.spent) if kept else alone,
            self.budget,
            tuple(drop for drop in outcomes if isinstance(drop, Dropped)),
            tuple(rank for rank, _ in chosen),
            tuple(packed.window for _, packed in chosen) if self.windows > 1 else (),
        )

    def _price_question(self, query: Query) -> int:
        """What the question costs without passages."""
        price, share = self.reader.costs(query, ()).fixed, self.budget // self.windows
        if price > share:
            of = f"{self.budget} for {self.windows} windows" if self.windows > 1 else str(self.budget)
            raise DataError(
                f"query {query.id}: the question alone takes {price} tokens with its prompt, the budget is {of}. Raise "
                "packer.budget or shorten the question."
            )
        return price

    def _open(self, query: Query, alone: int, hits: Sequence[Hit]) -> "_Room":
        if not hits:
            return _Room(0, alone, 0, self.windows)
        costs = self.reader.costs(query, [_EMPTY])
        if costs.limit is None and self.windows > 1:
            raise RecipeError("packer.windows: this reader sees every passage apart already. Set windows: 1.")
        share = self.budget // self.windows
        total = share if costs.limit is None else min(share, costs.limit)
        return _Room(total, costs.fixed, sum(price or 0 for price in costs.passages), self.windows)

    def _show(self, hits: Sequence[Hit]) -> str:
        return self.reader.show(hits) if isinstance(self.reader, ShowsContext) else show_passages(hits)


def show_passages(hits: Sequence[Hit]) -> str:
    """Packed passages as text for a person: title and text on lines of their own, a blank line between passages."""
    return "\n\n".join(f"{hit.passage.title}\n{hit.passage.text}".strip() for hit in hits)


def _side_by_side(work: Sequence[Generator[T, A, R]], answer: Callable[[Sequence[T]], Sequence[A]]) -> list[R]:
    """Run generators to their ends, in rounds: what all of them ask for in a round is answered together."""
    done: dict[int, R] = {}
    replies: dict[int, A | None] = dict.fromkeys(range(len(work)))
    while replies:
        asked: dict[int, T] = {}
        for number, reply in replies.items():
            try:
                asked[number] = next(work[number]) if reply is None else work[number].send(reply)
            except StopIteration as end:
                done[number] = end.value
        replies = dict(zip(asked, answer(list(asked.values())) if asked else (), strict=True))
    return [done[number] for number in range(len(work))]


def _in_reading_order(kept: Sequence[T], order: Order) -> list[T]:
    match order:
        case "score":
            return list(kept)
        case "reverse":
            return list(kept[::-1])
        case "sides":
            return [*kept[::2], *kept[1::2][::-1]]


@dataclass(frozen=True, slots=True)
class _Packed:
    """A hit as it was packed, whole or trimmed, and the window that it went into, from 1."""

    hit: Hit
    window: int


class _Offers:
    """The forms in which the hits of one query may be packed, longest first, each made once and priced once."""

    def __init__(
        self, reader: Reader, query: Query, hits: Sequence[Hit], trim: SentenceTrimmer | None, room: "_Room"
    ) -> None:
        self._reader, self._query, self._hits, self._trim, self._room = reader, query, hits, trim, room
        self._found = Found(query, hits)
        self._prices: dict[int, int | None] = {}  # of whole hits, by rank

    def take(self, rank: int, coming: Sequence[int], places: int) -> Packing[_Packed | Dropped]:
        """Pay for the longest form of a hit that fits. `coming` are the ranks after it, perhaps priced along.

        Asks for the scores of its sentences if it has to be cut.
        """
        hit, refused = self._hits[rank], Dropped(self._hits[rank].passage.id, "over the limit", 0)
        if not self._room.has_room:
            return refused
        if self._may_fit_whole(rank):
            if rank not in self._prices:
                new = (later for later in coming if later not in self._prices and self._may_fit_whole(later))
                self._ask([rank, *islice(new, min(PRICED_AT_ONCE, places) - 1)])
            if window := self._room.take(hit, self._prices[rank]):
                return _Packed(hit, window)
            refused = Dropped(hit.passage.id, "does not fit", self._prices[rank] or 0)
        if self._trim is None or not self._may_fit_cut(rank, self._trim.shortest(hit)):
            return refused
        scores = yield Cut(self._found, rank)
        for form in self._trim.forms(hit, scores):
            if (form is hit and rank in self._prices) or not self._room.may_fit(form):
                continue
            (price,) = self._reader.costs(self._query, [form]).passages
            if window := self._room.take(form, price):
                return _Packed(form, window)
            refused = Dropped(hit.passage.id, "does not fit", price or 0)
        return refused

    def _may_fit_whole(self, rank: int) -> bool:
        """Whether the hit may be packed whole, and by what is known of its price has room."""
        if self._trim is not None and not self._trim.is_offered_whole(rank):
            return False
        return rank in self._prices or self._room.may_fit(self._hits[rank])

    def _may_fit_cut(self, rank: int, shortest: Hit) -> bool:
        """Whether the shortest form of the hit may have room; not if that is the whole hit, which had none."""
        return (shortest is not self._hits[rank] or rank not in self._prices) and self._room.may_fit(shortest)

    def _ask(self, ranks: Sequence[int]) -> None:
        prices = self._reader.costs(self._query, [self._hits[rank] for rank in ranks]).passages
        self._prices.update(zip(ranks, prices, strict=True))


@dataclass(slots=True)
class _Room:
    """What is left of one query's tokens: up to `windows` windows of `total` tokens, each of which begins with `fixed`.

    `empty` is what a passage without words costs; `spent` has the tokens of each window that holds a passage.
    """

    total: int
    fixed: int
    empty: int
    windows: int
    spent: list[int] = field(default_factory=list)
    cheapest: float = 0.0
    """The fewest tokens a character any passage has cost so far; 0 before the first price: then all may fit."""

    @property
    def has_room(self) -> bool:
        """Whether any passage may still fit."""
        return self.fits(self.empty)

    def fits(self, price: int | None) -> bool:
        return price is not None and self._least_spent + price <= self.total

    def may_fit(self, hit: Hit) -> bool:
        """Whether the passage is worth asking for its price."""
        return self._least_spent + max(self.empty, self.cheapest * _characters(hit)) <= self.total

    def take(self, hit: Hit, price: int | None) -> int | None:
        """Pay for a passage and give the number of the first window that has room for it, from 1; None: none has."""
        if price is None:
            return None
        rate = price / max(1, _characters(hit))
        self.cheapest = min(self.cheapest, rate) if self.cheapest else rate
        if not self.fits(price):
            return None
        window = next((at for at, spent in enumerate(self.spent) if spent + price <= self.total), len(self.spent))
        if window == len(self.spent):
            self.spent.append(self.fixed)
        self.spent[window] += price
        return window + 1

    @property
    def _least_spent(self) -> int:
        """Tokens in the emptiest window."""
        return self.fixed if len(self.spent) < self.windows else min(self.spent)


def _characters(hit: Hit) -> int:
    return len(hit.passage.title) + len(hit.passage.text)
