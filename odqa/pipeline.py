"""A pipeline: retrieve, rerank, pack, read, and perhaps again. Queries in, traces out.

Knows `types` and `stages` only: no recipe, no index, no gold answer. Closed-book is the pipeline without a retriever.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from odqa.stages import LatentReading, Next, NotesReading, Packer, Reader, Recursion, Reranker, Retriever, SaysWhy
from odqa.types import Answer, Hit, LatentContext, PackedContext, Query, Step, Trace, as_recorded

Fuse = Callable[[Sequence[Sequence[Hit]]], list[Hit]]
"""The hits of all passes of one question, the first pass first, as one list, best first."""
Keep = Callable[[Answer, Answer], Answer]
"""Of the answers of two passes the one that stands."""
Watch = Callable[[Trace], None]
"""Gets a query's trace so far after each step; the last step is the one that has just ended.

After a reading its answer and context are there too. What it raises ends the call of `answer`, between two stages.
"""


@dataclass(slots=True)
class Pipeline:
    """The stages, and how many passages go from the retriever on (`k`) in at most `max_passes` passes.

    Without a retriever every context is packed empty (closed-book); without a reranker hits keep their order.

    More passes: `recursion` decides. What a Query of it finds takes the place of what was found before, or is joined
    with it by `fuse`; a context that it made itself is read by `rereader` if there is one, which may have another
    prompt. `keep` says which of an answer and the next one stands (None: the next one); what was not kept is in the
    notes of its step. `first_retriever` and `first_reranker` serve the first pass in the place of the others, as a
    replay does.
    """

    reader: Reader
    packer: Packer
    retriever: Retriever | None = None
    reranker: Reranker | None = None
    recursion: Recursion | None = None
    k: int = 100
    max_passes: int = 1
    rereader: Reader | None = None
    fuse: Fuse | None = None
    keep: Keep | None = None
    first_retriever: Retriever | None = None
    first_reranker: Reranker | None = None

    def answer(self, queries: Sequence[Query], watch: Watch | None = None) -> list[Trace]:
        """One trace a query, in order. All queries go through each stage together; see `batches` for long lists."""
        if not queries:
            return []
        records = [_Record(query, watch) for query in queries]
        self._retrieve_and_read(records, list(queries), 1)
        running = records
        for pass_no in range(2, self.max_passes + 1):
            if self.recursion is None or not running:
                break
            decided = list(zip(running, self._decide(self.recursion, running, pass_no), strict=True))
            searching = [(record, found) for record, found in decided if isinstance(found, Query)]
            reading = [(record, found) for record, found in decided if isinstance(found, PackedContext)]
            latent = [(record, found) for record, found in decided if isinstance(found, LatentContext)]
            if searching:
                self._retrieve_and_read([r for r, _ in searching], [q for _, q in searching], pass_no)
            if reading:
                self._read([r for r, _ in reading], [c for _, c in reading], pass_no, self.rereader or self.reader)
            if latent:
                self._read_latent([r for r, _ in latent], [c for _, c in latent], pass_no)
            running = [r for r, _ in searching] + [r for r, _ in reading] + [r for r, _ in latent]
        return [record.trace() for record in records]

    def batches(self, queries: Sequence[Query], size: int) -> Iterator[list[Trace]]:
        """The same traces, `size` queries at a time, so that memory does not grow with their number."""
        iterator = iter(queries)
        while batch := list(islice(iterator, size)):
            yield self.answer(batch)

    def _decide(self, recursion: Recursion, records: list["_Record"], pass_no: int) -> list[Next]:
        """What becomes of each question after a pass; a step says so."""
        says_why: object = recursion
        with _Clock() as clock:
            if isinstance(says_why, SaysWhy):
                decided = says_why.decide([record.passes for record in records], pass_no)
            else:
                contexts, answers = [r.contexts[-1] for r in records], [r.answers[-1] for r in records]
                decided = [(found, {}) for found in recursion.again(contexts, answers, pass_no)]
        for record, (found, why) in zip(records, decided, strict=True):
            notes = {**_decision(found), **why}
            record.add(Step("recurse", pass_no, clock.seconds / len(records), len(records), notes=notes))
        return [found for found, _ in decided]

    def _retrieve_and_read(self, records: list["_Record"], searched: list[Query], pass_no: int) -> None:
        """`searched` is what the retriever is asked; all other stages see the questions as they were asked."""
        queries = [record.query for record in records]
        retriever, reranker = self.retriever, self.reranker
        if pass_no == 1:
            retriever, reranker = self.first_retriever or retriever, self.first_reranker or reranker
        hits: list[list[Hit]] = [[] for _ in queries]
        if retriever is not None:
            with _Clock() as clock:
                hits = _as_recorded(retriever.retrieve(searched, self.k))
            _note(records, "retrieve", pass_no, clock, hits)
            for record, found in zip(records, hits, strict=True):
                record.found.append(found)
        if self.fuse is not None and pass_no > 1:
            with _Clock() as clock:
                hits = _as_recorded([self.fuse(record.found)[: self.k] for record in records])
            _note(records, "fuse", pass_no, clock, hits)
        if reranker is not None:
            with _Clock() as clock:
                hits = _as_recorded(reranker.rerank(queries, hits))
            _note(records, "rerank", pass_no, clock, hits)
        with _Clock() as clock:
            contexts = self.packer.pack(queries, hits)
        share = clock.seconds / len(records)
        for record, context, query in zip(records, contexts, queries, strict=True):
            costs = self.reader.costs(query, context.hits)
            record.add(
                Step(
                    "pack",
                    pass_no,
                    share,
                    len(records),
                    tuple(hit.passage.id for hit in context.hits),
                    tuple(hit.score for hit in context.hits),
                    tuple(price or 0 for price in costs.passages),
                    _notes(context),
                )
            )
        self._read(records, contexts, pass_no, self.reader)

    def _read(self, records: list["_Record"], contexts: list[PackedContext], pass_no: int, reader: Reader) -> None:
        notes_reading: object = reader
        with _Clock() as clock:
            if isinstance(notes_reading, NotesReading):
                read = notes_reading.read_with_notes(contexts)
            else:
                read = [(answer, {}) for answer in reader.read(contexts)]
        for record, context, (answer, notes) in zip(records, contexts, read, strict=True):
            step = Step("read", pass_no, clock.seconds / len(records), len(records), notes=notes)
            record.add_reading(context, answer, step, self.keep)

    def _read_latent(self, records: list["_Record"], contexts: list[LatentContext], pass_no: int) -> None:
        """Read vectors again. The context of such a pass is the packed one that the vectors came from."""
        reader: object = self.rereader or self.reader
        if not isinstance(reader, LatentReading):
            raise TypeError(
                f"pass {pass_no}: the recursion gives vectors to read, and {type(reader).__name__} reads text only. It "
                "needs a reader with read_latent."
            )
        with _Clock() as clock:
            read = reader.read_latent(contexts)
        for record, (answer, notes) in zip(records, read, strict=True):
            step = Step("read latent", pass_no, clock.seconds / len(records), len(records), notes=notes)
            record.add_reading(record.contexts[-1], answer, step, self.keep)


class _Record:
    """What becomes a query's trace."""

    def __init__(self, query: Query, watch: Watch | None = None) -> None:
        self.query, self.watch = query, watch
        self.steps: list[Step] = []
        self.answers: list[Answer] = []
        self.contexts: list[PackedContext] = []
        self.found: list[list[Hit]] = []  # by the retriever, in each pass that asked it

    @property
    def passes(self) -> list[tuple[PackedContext, Answer]]:
        return list(zip(self.contexts, self.answers, strict=True))

    def add_reading(self, context: PackedContext, answer: Answer, step: Step, keep: Keep | None) -> None:
        stands = keep(self.answers[-1], answer) if keep is not None and self.answers else answer
        if stands is not answer:
            dismissed = {"text": answer.text, "score": answer.score, "confidence": answer.confidence}
            step = replace(step, notes={**step.notes, "not kept": dismissed})
        self.contexts.append(context)
        self.answers.append(replace(stands, passes=step.pass_no))
        self.add(step)

    def add(self, step: Step) -> None:
        self.steps.append(step)
        if self.watch is not None:
            self.watch(self.trace())

    def trace(self) -> Trace:
        return Trace(self.query, tuple(self.steps), tuple(self.answers), tuple(self.contexts))


class _Clock:
    """Wall seconds of a `with` block."""

    seconds = 0.0

    def __enter__(self) -> "_Clock":
        self._started = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started


def _as_recorded(hits: list[list[Hit]]) -> list[list[Hit]]:
    """The same hits with the digits of the trace, see `odqa.types.as_recorded`."""
    return [[Hit(hit.passage, as_recorded(hit.score), hit.source) for hit in found] for found in hits]


def _note(records: list[_Record], stage: str, pass_no: int, clock: _Clock, hits: list[list[Hit]]) -> None:
    for record, found in zip(records, hits, strict=True):
        ids, scores = tuple(hit.passage.id for hit in found), tuple(hit.score for hit in found)
        sources = tuple(hit.source for hit in found)
        share = clock.seconds / len(records)
        record.add(Step(stage, pass_no, share, len(records), ids, scores, sources=sources))


def _decision(found: Next) -> dict[str, object]:
    """How a trace names what a recursion decided."""
    match found:
        case Query():
            return {"decision": "retrieve again", "query": found.text}
        case PackedContext():
            return {"decision": "read again", "tokens": found.tokens}
        case LatentContext():
            return {"decision": "read vectors again"}
        case None:
            return {"decision": "stop"}


def _notes(context: PackedContext) -> dict[str, object]:
    """Tokens, budget, passage ids by the reason for which they were not packed, and the windows if there are any."""
    reasons: dict[str, list[str]] = {}
    for drop in context.dropped:
        reasons.setdefault(drop.reason, []).append(drop.passage_id)
    notes: dict[str, object] = {"tokens": context.tokens, "budget": context.budget, "dropped": reasons}
    return notes | ({"windows": list(context.windows)} if context.windows else {})
