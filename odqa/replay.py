"""Stages that runs share: systems with equal leading stages retrieve and re-rank once.

A run's manifest names its leading stages, each by a hash over everything that decides what comes out of it
(`odqa.jobs.stage_identities`): `inputs.retrieval` stands for the retriever's hits, `inputs.ranking` for the passages
that come to the packer and their order. Another run with the same ranking takes the retrieve and rerank steps out of
the first one's traces, and only packs and reads; one with the same retrieval alone takes that step, and re-ranks.

The invariant: a run that took a stage from another one has the same answers.jsonl and traces.jsonl as one that computed
it. What it did not do it does not time either: those steps have no seconds.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from odqa.artifacts import MANIFEST, load_artifact
from odqa.errors import ArtifactError, DataError
from odqa.runs import KIND, Run
from odqa.types import Hit, Query, Step, Trace

if TYPE_CHECKING:
    from odqa.corpus.store import PassageStore

_DEPTHS = (1, 2, 3)  # folders below an output root: --out DIR/RUN, runs/PIPELINE/QUESTIONS, runs/EVAL/PIPELINE/SET

Leading = Literal["retrieval", "ranking"]
STAGES: Mapping[Leading, tuple[str, ...]] = {"retrieval": ("retrieve",), "ranking": ("retrieve", "rerank")}
"""The steps of a trace that each of the two hashes stands for."""


def find_leading(root: Path, what: Leading, identity: str, *, log: Callable[[str], None]) -> Run | None:
    """A finished run below `root` whose manifest names this retrieval or ranking; of several the first by path.

    None: there is none. Its files are compared with their hashes; one that is damaged is passed over, and `log` says
    so.
    """
    for depth in _DEPTHS:
        for file in sorted(root.glob("/".join(["*"] * depth + [MANIFEST]))):
            is_hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
            if is_hidden or _leading_of(file, what) != identity:
                continue
            try:
                return Run(load_artifact(file.parent, KIND, verify=True))
            except ArtifactError as error:
                log(f"warning: {error} Its {what} is not used.")
    return None


def _leading_of(manifest: Path, what: Leading) -> object:
    """What a manifest names; None if it is another artifact's, or no manifest of ours at all."""
    try:
        record = json.loads(manifest.read_text(encoding="utf-8"))
        return record["inputs"].get(what) if record["kind"] == KIND else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class Replay:
    """The leading stages of a finished run, served as a retriever and as a re-ranker.

    Queries must come in the run's question order (some may be left out). Order and scores are those that the run
    stored; passages come from `store`, those of one call at a time.
    """

    def __init__(self, run: Run, store: "PassageStore") -> None:
        self.run, self._store = run, store
        self._traces = run.traces()
        self._steps: dict[tuple[str, str], Step] = {}  # of the last call's queries, by query id and stage

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """The hits of the run's retrieve step. Raises DataError for a query that the run does not have from here on."""
        self._steps = {}
        for query in queries:
            trace = next((trace for trace in self._traces if trace.query == query), None)
            if trace is None:
                raise DataError(f"{self.run.path}: this run has no question {query.id!r}, or has it earlier.")
            self._steps |= {(query.id, step.stage): step for step in trace.steps if step.pass_no == 1}
        return [self._hits(query)[:k] for query in queries]

    def rerank(self, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> list[list[Hit]]:
        """The hits of the run's rerank step, for the queries just retrieved."""
        ranked = []
        for query, found in zip(queries, hits, strict=True):
            passages = {hit.passage.id: hit.passage for hit in found}
            ranked.append([Hit(passages[pid], score, source) for pid, score, source in self._entries(query, "rerank")])
        return ranked

    def _hits(self, query: Query) -> list[Hit]:
        store = self._store
        return [
            Hit(store[store.row_of(passage_id)], score, source)
            for passage_id, score, source in self._entries(query, "retrieve")
        ]

    def _entries(self, query: Query, stage: str) -> Iterable[tuple[str, float, str]]:
        step = self._steps[query.id, stage]
        return zip(step.ids, step.scores, step.sources, strict=True)


def without_times(trace: Trace, what: Leading = "ranking") -> Trace:
    """The trace of a replay: what was taken from another run has no seconds."""
    taken = STAGES[what]
    steps = (
        replace(step, seconds=math.nan) if step.stage in taken and step.pass_no == 1 else step for step in trace.steps
    )
    return replace(trace, steps=tuple(steps))


def reranked_order(run: Run) -> dict[str, dict[str, float]]:
    """The order of a run's re-ranker as scores by query and passage id: minus the rank.

    Not its scores, because those do not compare across the depth of a re-ranker. Raises DataError if it has none.
    """
    scores = {}
    for trace in run.traces():
        step = next((step for step in trace.steps if step.stage == "rerank"), None)
        if step is None:
            raise DataError(f"{run.path}: this run has no re-ranker (question {trace.query.id!r} has no rerank step).")
        scores[trace.query.id] = {passage_id: -float(rank) for rank, passage_id in enumerate(step.ids, start=1)}
    return scores
