"""The values that travel between stages: frozen, slotted, standard library only.

The order of a list is its rank. Nothing here knows a gold answer except `Gold`, and no stage ever sees one:
`odqa.evaluate` joins traces with gold after a run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Passage:
    """A block of text of a collection, with the title of the article it is from (may be empty)."""

    id: str
    text: str
    title: str = ""


@dataclass(frozen=True, slots=True)
class Query:
    """A question as it enters the pipeline."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Gold:
    """What is known to be right for a query; no answers means: only abstaining is right."""

    query_id: str
    answers: tuple[str, ...]
    passage_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage that a stage proposes for a query; `source` names the stage that gave `score` (higher is better)."""

    passage: Passage
    score: float
    source: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A hit that was not packed, and why."""

    passage_id: str
    reason: Literal["does not fit", "duplicate", "near duplicate", "over the limit"]
    tokens: int


@dataclass(frozen=True, slots=True)
class TokenCosts:
    """What a reader charges for one query, in tokens summed over all its forward passes.

    `fixed` is spent on a window whatever is packed into it (question, instruction, answer prefix); of no hits it is the
    price of the question alone. `passages` has one entry a hit: its own price with title and separators, or None if the
    reader can never read it whole. Prices add up exactly. `limit` is the most that one window of the reader allows
    (None: it reads passages apart, only a budget bounds their number).
    """

    fixed: int
    passages: tuple[int | None, ...]
    limit: int | None


@dataclass(frozen=True, slots=True)
class PackedContext:
    """What the reader really sees for one query.

    `hits` are the packed passages in reading order; one that was trimmed holds the kept text. `ranks` are their places
    from 1 among the packed ones, by rank (empty: reading order is rank). `windows` are the windows that they are read
    in, from 1 and never falling; each window is read by itself, with the question (empty: all in one). `tokens` counts
    every token given to the reader over all its forward passes (question, separators and titles included); never more
    than `budget`. `text` is the context as a generative reader's prompt shows it; a reader that sees passages apart
    uses `hits`. `candidates` are answers of an earlier pass that the prompt shows beside the question; they count in
    `tokens`, and `budget` is the packer's with what they cost on top.
    """

    query: Query
    text: str
    hits: tuple[Hit, ...]
    tokens: int
    budget: int
    dropped: tuple[Dropped, ...] = ()
    ranks: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    candidates: tuple[str, ...] = ()

    def by_window(self) -> list[tuple[Hit, ...]]:
        """The packed passages of each window; one window without passages if nothing was packed."""
        if not self.windows:
            return [self.hits]
        pairs = list(zip(self.hits, self.windows, strict=True))
        return [tuple(hit for hit, at in pairs if at == window) for window in dict.fromkeys(self.windows)]


@dataclass(frozen=True, slots=True)
class LatentContext:
    """Vectors of an earlier pass to read again; `handle` means something to the reader that made it, to nobody else."""

    query: Query
    handle: object


@dataclass(frozen=True, slots=True)
class Candidate:
    """A possible answer: `logprob` in nats, the passage it was found in (None for a generated one), its place there.

    `start` and `end` are characters of the passage's text. An empty `text` stands for "no answer"; a reader that can
    abstain lists it with its probability.
    """

    text: str
    logprob: float
    passage_id: str | None = None
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A text drawn from a reader: cleaned as an answer is (may be empty), `logprob` in nats over its `tokens`."""

    text: str
    logprob: float
    tokens: int

    @property
    def mean_logprob(self) -> float:
        """Nats a token."""
        return self.logprob / self.tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """A reader's answer to one query; an empty `text` means that it abstained. `score` is a log-probability in nats.

    `confidence` is the calibrated probability (0 to 1) that the text is right, or, if the reader abstained, that its
    best candidate with a text would have been; None: the reader is not calibrated.
    """

    query_id: str
    text: str
    score: float
    candidates: tuple[Candidate, ...] = ()
    passes: int = 1
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """What one stage did for one query in one pass.

    `seconds` is this query's share of a batch of `batch` queries; NaN if the stage did not run here, because its result
    was taken from another run. `ids`, `scores` and `tokens` go together, best first: passages for retrieve, fuse,
    rerank and pack (tokens only for pack), nothing for recurse and read. `notes` holds what a stage wants explained,
    such as why passages were dropped. `sources` go with the ids of retrieve, fuse and rerank: which stage gave each
    score.
    """

    stage: str
    pass_no: int
    seconds: float
    batch: int
    ids: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    notes: Mapping[str, object] = field(default_factory=dict)
    sources: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trace:
    """Everything that happened to one query, in order; `answers` holds one answer per pass, the last one counts."""

    query: Query
    steps: tuple[Step, ...]
    answers: tuple[Answer, ...]
    contexts: tuple[PackedContext, ...] = ()

    @property
    def answer(self) -> Answer:
        """The answer of the last pass."""
        return self.answers[-1]


def as_recorded(score: float) -> float:
    """A score with the six significant digits that a trace keeps, which are more than a ranking needs.

    Fewer than the last bits that a batch's padding changes. Stages get scores with these digits, so that one that goes
    on from a trace does what one that goes on from the stage before did.
    """
    return float(f"{score:.6g}")


Hits = Sequence[Hit]
