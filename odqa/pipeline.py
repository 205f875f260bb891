"""A pipeline: retrieve, rerank, pack, read, and perhaps again. Queries in, traces out.

Knows `types` and `stages` only: no recipe, no index, no gold answer. Closed-book is the pipeline without a retriever.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from odqa.stages import NotesReading, Packer, Reader, Recursion, Reranker, Retriever
from odqa.types import Answer, Hit, LatentContext, PackedContext, Query, Step, Trace, as_recorded

Watch = Callable[[Trace], None]
"""Gets a query's trace so far after each step; the last step is the one that has just ended.

After a reading its answer and context are there too. What it raises ends the call of `answer`, between two stages.
"""


@dataclass(slots=True)
class Pipeline:
    """The stages, and how many passages go from the retriever on (`k`) in at most `max_passes` passes.

    Without a retriever every context is packed empty (closed-book); without a reranker hits keep their order.
    """

    reader: Reader
    packer: Packer
    retriever: Retriever | None = None
    reranker: Reranker | None = None
    recursion: Recursion | None = None
    k: int = 100
    max_passes: int = 1

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
            contexts, answers = [r.contexts[-1] for r in running], [r.answers[-1] for r in running]
            decisions = self.recursion.again(contexts, answers, pass_no)
            searching = [(r, d) for r, d in zip(running, decisions, strict=True) if isinstance(d, Query)]
            reading = [(r, d) for r, d in zip(running, decisions, strict=True) if isinstance(d, PackedContext)]
            if any(isinstance(decision, LatentContext) for decision in decisions):
                raise NotImplementedError("no reader of this version reads latent contexts")
            if searching:
                self._retrieve_and_read([r for r, _ in searching], [q for _, q in searching], pass_no)
            if reading:
                self._read([r for r, _ in reading], [c for _, c in reading], pass_no)
            running = [r for r, _ in searching] + [r for r, _ in reading]
        return [record.trace() for record in records]

    def batches(self, queries: Sequence[Query], size: int) -> Iterator[list[Trace]]:
        """The same traces, `size` queries at a time, so that memory does not grow with their number."""
        iterator = iter(queries)
        while batch := list(islice(iterator, size)):
            yield self.answer(batch)

    def _retrieve_and_read(self, records: list["_Record"], queries: list[Query], pass_no: int) -> None:
        hits: list[list[Hit]] = [[] for _ in queries]
        if self.retriever is not None:
            with _Clock() as clock:
                hits = _as_recorded(self.retriever.retrieve(queries, self.k))
            _note(records, "retrieve", pass_no, clock, hits)
        if self.reranker is not None:
            with _Clock() as clock:
                hits = _as_recorded(self.reranker.rerank(queries, hits))
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
        self._read(records, contexts, pass_no)

    def _read(self, records: list["_Record"], contexts: list[PackedContext], pass_no: int) -> None:
        reader: object = self.reader
        with _Clock() as clock:
            if isinstance(reader, NotesReading):
                read = reader.read_with_notes(contexts)
            else:
                read = [(answer, {}) for answer in self.reader.read(contexts)]
        for record, context, (answer, notes) in zip(records, contexts, read, strict=True):
            record.contexts.append(context)
            record.answers.append(replace(answer, passes=pass_no))
            record.add(Step("read", pass_no, clock.seconds / len(records), len(records), notes=notes))


class _Record:
    """What becomes a query's trace."""

    def __init__(self, query: Query, watch: Watch | None = None) -> None:
        self.query, self.watch = query, watch
        self.steps: list[Step] = []
        self.answers: list[Answer] = []
        self.contexts: list[PackedContext] = []

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


def _notes(context: PackedContext) -> dict[str, object]:
    """Tokens, budget, passage ids by the reason for which they were not packed, and the windows if there are any."""
    reasons: dict[str, list[str]] = {}
    for drop in context.dropped:
        reasons.setdefault(drop.reason, []).append(drop.passage_id)
    notes: dict[str, object] = {"tokens": context.tokens, "budget": context.budget, "dropped": reasons}
    return notes | ({"windows": list(context.windows)} if context.windows else {})
