"""Replaying the ranking of a finished run, without models; the whole way is in tests/integration."""

import json
import math
from pathlib import Path
from typing import cast

import pytest

from odqa.corpus.store import PassageStore
from odqa.errors import DataError
from odqa.pipeline import Pipeline
from odqa.replay import Replay, find_leading, reranked_order, without_times
from odqa.runs import TIMINGS, TRACES, Run, load_run, recording
from odqa.types import Answer, Hit, PackedContext, Passage, Query, Step, TokenCosts, Trace

QUERIES = [Query(f"q{number}", f"question {number}") for number in range(4)]


class Store:
    """Passages "0" to "9" by row, as the text store of an index."""

    def row_of(self, passage_id: str) -> int:
        return int(passage_id)

    def __getitem__(self, row: int) -> Passage:
        return Passage(str(row), f"text {row}")


STORE = cast(PassageStore, Store())


class Reader:
    """Answers with the ids that were packed; every passage costs a token."""

    def read(self, contexts: list[PackedContext]) -> list[Answer]:
        return [Answer(c.query.id, " ".join(hit.passage.id for hit in c.hits), 0.0) for c in contexts]

    def costs(self, query: Query, hits: list[Hit]) -> TokenCosts:
        return TokenCosts(1, tuple(1 for _ in hits), None)


class Packer:
    def pack(self, queries: list[Query], hits: list[list[Hit]]) -> list[PackedContext]:
        return [PackedContext(q, "", tuple(h[:2]), 3, 9) for q, h in zip(queries, hits, strict=True)]


class Retriever:
    """Scores with more digits than a trace keeps: those of passages 1 and 2 are equal in six."""

    def retrieve(self, queries: list[Query], k: int) -> list[list[Hit]]:
        return [[Hit(STORE[i], 1.0000001 - i * 1e-7, "first") for i in (1, 2, 3)] for _ in queries]


class Reverser:
    """Re-scores the first two and swaps them; the last keeps its score and source."""

    def rerank(self, queries: list[Query], hits: list[list[Hit]]) -> list[list[Hit]]:
        return [[Hit(f[1].passage, 0.5, "second"), Hit(f[0].passage, 0.25, "second"), f[2]] for f in hits]


def pipeline(**stages: object) -> Pipeline:
    return Pipeline(Reader(), Packer(), **{"retriever": Retriever(), "reranker": Reverser(), **stages})  # type: ignore[arg-type]


def record(path: Path, ranking: str, traces: list[Trace] | None = None) -> Run:
    inputs = {"questions": {"name": "q", "sha256": "0"}, "ranking": ranking}
    with recording(path, [query.id for query in QUERIES], recipe={"name": path.name}, inputs=inputs) as writer:
        writer.add(pipeline().answer(QUERIES) if traces is None else traces)
    return load_run(path)


# --- replaying --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reranks", [True, False])
def test_a_replayed_run_has_the_bytes_of_a_computed_one_but_no_times(tmp_path: Path, reranks: bool) -> None:
    made = pipeline() if reranks else pipeline(reranker=None)
    first = record(tmp_path / "first", "r", made.answer(QUERIES))
    replay = Replay(first, STORE)
    again = pipeline(retriever=replay, reranker=replay if reranks else None)
    traces = [trace for batch in again.batches(QUERIES, 3) for trace in batch]
    second = record(tmp_path / "second", "r", [without_times(trace) for trace in traces])
    assert (first.path / TRACES).read_bytes() == (second.path / TRACES).read_bytes()
    timing = json.loads((second.path / TIMINGS).read_text().splitlines()[0])
    taken = ["retrieve", "rerank"] if reranks else ["retrieve"]
    assert [step["stage"] for step in timing["steps"] if step["seconds"] is None] == taken
    stages = second.manifest["measured"]["stages"]
    assert all(stages[stage]["shared"] == stages[stage]["steps"] == 4 for stage in taken)
    assert "shared" not in stages["pack"] and stages["pack"]["seconds"] > 0
    assert math.isnan(second.trace("q1").steps[0].seconds)


def test_a_re_ranker_over_replayed_hits_gives_the_bytes_of_one_over_fresh_ones(tmp_path: Path) -> None:
    """The re-ranker adds up what it gets, so a digit more or less would show."""

    class Adder:
        def rerank(self, queries: list[Query], hits: list[list[Hit]]) -> list[list[Hit]]:
            return [[Hit(h.passage, 1e6 * (h.score - 0.9999996), "second") for h in found] for found in hits]

    fresh = record(tmp_path / "fresh", "r", pipeline(reranker=Adder()).answer(QUERIES))
    plain = record(tmp_path / "plain", "p", pipeline(reranker=None).answer(QUERIES))
    made = pipeline(retriever=Replay(plain, STORE), reranker=Adder()).answer(QUERIES)
    again = record(tmp_path / "again", "r", [without_times(trace, "retrieval") for trace in made])
    assert (fresh.path / TRACES).read_bytes() == (again.path / TRACES).read_bytes()
    stages = again.manifest["measured"]["stages"]
    assert stages["retrieve"]["shared"] == 4 and "shared" not in stages["rerank"]


def test_a_replay_may_leave_questions_out_but_not_go_back(tmp_path: Path) -> None:
    replay = Replay(record(tmp_path / "run", "r"), STORE)
    assert [hit.passage.id for hit in replay.retrieve(QUERIES[1:2], 3)[0]] == ["1", "2", "3"]
    assert len(replay.retrieve(QUERIES[3:], 2)[0]) == 2
    with pytest.raises(DataError, match="no question 'q0', or has it earlier"):
        replay.retrieve(QUERIES[:1], 3)


def test_a_question_of_another_wording_is_not_that_question(tmp_path: Path) -> None:
    replay = Replay(record(tmp_path / "run", "r"), STORE)
    with pytest.raises(DataError, match="no question 'q0'"):
        replay.retrieve([Query("q0", "another one")], 3)


# --- finding ----------------------------------------------------------------------------------------------------------


def test_a_ranking_is_found_at_the_depths_that_run_and_eval_write_to(tmp_path: Path) -> None:
    for name in ("a", "b/c", "d/e/f"):
        record(tmp_path / name, name)
        found = find_leading(tmp_path, "ranking", name, log=pytest.fail)
        assert found is not None and found.path == tmp_path / name
    assert find_leading(tmp_path, "ranking", "another", log=pytest.fail) is None
    assert find_leading(tmp_path / "nowhere", "ranking", "a", log=pytest.fail) is None


def test_other_artifacts_and_runs_of_the_first_version_have_no_ranking(tmp_path: Path) -> None:
    for name, manifest in {"x": '{"kind": "index", "inputs": {"ranking": "r"}}', "y": "{", "z": "[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(manifest)
    with recording(tmp_path / "old", ["q0"], recipe={}, inputs={"index": "0"}) as writer:
        writer.add(pipeline().answer(QUERIES[:1]))
    assert find_leading(tmp_path, "ranking", "r", log=pytest.fail) is None


def test_a_damaged_run_is_passed_over_with_a_warning(tmp_path: Path) -> None:
    for name in ("a", "b"):
        record(tmp_path / name, "r")
    file = tmp_path / "a" / TRACES
    file.write_bytes(file.read_bytes().replace(b"question 0", b"question 9"))  # the same size
    lines: list[str] = []
    found = find_leading(tmp_path, "ranking", "r", log=lines.append)
    assert found is not None and found.path.name == "b"
    assert len(lines) == 1 and "traces.jsonl is damaged" in lines[0] and lines[0].endswith("Its ranking is not used.")


# --- a run as a table of scores ---------------------------------------------------------------------------------------


def test_the_order_of_a_run_becomes_scores_because_its_own_do_not_compare(tmp_path: Path) -> None:
    # re-ranked: 2 (0.5), 1 (0.25), 3 (1.0 of the retriever); by score, 3 would be first
    assert reranked_order(record(tmp_path / "run", "r"))["q2"] == {"2": -1.0, "1": -2.0, "3": -3.0}


def test_a_run_without_a_reranker_has_no_order_to_give(tmp_path: Path) -> None:
    bare = [Trace(query, (Step("read", 1, 0.1, 4),), (Answer(query.id, "x", 0.0),)) for query in QUERIES]
    with pytest.raises(DataError, match=r"this run has no re-ranker \(question 'q0'"):
        reranked_order(record(tmp_path / "run", "r", bare))
