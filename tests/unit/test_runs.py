"""odqa.runs: values survive JSON, and a run survives kills at every byte."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odqa.artifacts import MANIFEST, partial_path, sha256_file
from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.runs import (
    ANSWERS,
    SCORES,
    TIMINGS,
    TRACES,
    RunWriter,
    answer_to_json,
    find_run,
    load_run,
    recording,
    timing_to_json,
    trace_from_json,
    trace_to_json,
)
from odqa.types import Answer, Candidate, Dropped, Hit, PackedContext, Passage, Query, Step, Trace

RECIPE = {"retriever": {"kind": "bm25", "k1": 0.9}, "depths": (5, 20)}
INPUTS = {"questions": {"name": "dev", "sha256": "00ff"}, "index": "abcd"}
IDS = [f"q{number}" for number in range(7)]
FILES = (ANSWERS, TRACES, TIMINGS)


def make_trace(query_id: str, *, seconds: float = 0.25, text: str = "Zürich") -> Trace:
    """Two passes over two contexts that share a passage."""
    query = Query(query_id, f"where is {query_id}?")
    near, far = Passage("p1", "In Zürich it is.\nSo they say.", "Zürich"), Passage("p2", "Not in Bern.", "")
    first = PackedContext(query, "Zürich: …", (Hit(near, 2.5, "bm25"), Hit(far, 1.25, "bm25")), 90, 128)
    second = PackedContext(query, "Bern: …", (Hit(far, -0.5, "cross"),), 40, 128, (Dropped("p9", "does not fit", 200),))
    return Trace(
        query,
        steps=(
            Step("retrieve", 1, seconds, 32, ("p1", "p2", "p9"), (2.5, 1.25, 0.125)),
            Step("pack", 1, seconds, 32, ("p1", "p2"), (2.5, 1.25), (50, 40), {"dropped": ["p9"], "share": 0.5}),
            Step("read", 1, seconds, 8),
            Step("read", 2, seconds, 8),
        ),
        answers=(
            Answer(query_id, "Bern", -1.5),
            Answer(query_id, text, -0.25, (Candidate(text, -0.25, "p1", 3, 9), Candidate("here", -2.0)), 2),
        ),
        contexts=(first, second),
    )


def test_windows_survive_json_and_a_context_without_them_says_nothing() -> None:
    trace = make_trace("q")
    split = replace(trace, contexts=(replace(trace.contexts[0], windows=(1, 2)), trace.contexts[1]))
    first, second = trace_to_json(split)["contexts"]
    assert first["windows"] == [1, 2] and "windows" not in second
    assert trace_from_json(json.loads(json.dumps(trace_to_json(split)))).contexts == split.contexts


def short_trace(query_id: str) -> Trace:
    """Few bytes to cut through, some of them inside a character."""
    return Trace(Query(query_id, "wo?"), (Step("read", 1, 0.5, 2),), (Answer(query_id, "Zürich", -0.5),))


def write_run(
    path: Path, ids: Sequence[str] = IDS, *, batch: int = 3, seconds: float = 0.25, stop_after: int | None = None
) -> None:
    """Answers every question that is not finished; `stop_after` batches it dies."""
    with recording(path, ids, recipe=RECIPE, inputs=INPUTS) as writer:
        todo = [query_id for query_id in ids if query_id not in writer.finished]
        for number, start in enumerate(range(0, len(todo), batch)):
            if number == stop_after:
                raise KeyboardInterrupt
            writer.add([make_trace(query_id, seconds=seconds) for query_id in todo[start : start + batch]])


# --- JSON -------------------------------------------------------------------------------------------------------------


def test_a_trace_comes_back_from_its_two_lines_as_it_was() -> None:
    trace = make_trace("q1")
    record, timing = json.loads(json.dumps([trace_to_json(trace), timing_to_json(trace)]))
    assert trace_from_json(record, timing) == trace


def test_a_packed_passage_is_stored_once_and_seconds_are_not_in_the_trace_line() -> None:
    line = json.dumps(trace_to_json(make_trace("q1")), ensure_ascii=False)
    assert line.count("So they say.") == 1
    assert "seconds" not in line and "batch" not in line and "0.25," not in line.replace("-0.25", "")


def test_two_kept_texts_of_one_passage_are_both_stored() -> None:
    query = Query("q", "?")
    whole, cut = Passage("p", "one two", "t"), Passage("p", "one", "t")
    contexts = tuple(PackedContext(query, "", (Hit(passage, 1.0, "x"),), 5, 9) for passage in (whole, cut))
    trace = Trace(query, (), (Answer("q", "one", 0.0),), contexts)
    assert trace_from_json(trace_to_json(trace)).contexts == contexts


def test_the_answer_line_names_the_passages_of_the_last_context() -> None:
    assert answer_to_json(make_trace("q1")) == {
        "id": "q1",
        "text": "Zürich",
        "score": -0.25,
        "candidates": [
            {"text": "Zürich", "logprob": -0.25, "passage_id": "p1", "start": 3, "end": 9},
            {"text": "here", "logprob": -2.0},
        ],
        "passage_ids": ["p2"],
    }


def test_confidence_is_written_where_there_is_one_and_older_lines_are_read_without() -> None:
    trace = make_trace("q1")
    sure = replace(trace, answers=(trace.answers[0], replace(trace.answers[1], confidence=0.62500001)))
    record = json.loads(json.dumps(trace_to_json(sure)))
    assert answer_to_json(sure)["confidence"] == record["answers"][1]["confidence"] == 0.625
    assert [answer.confidence for answer in trace_from_json(record).answers] == [None, 0.625]
    assert "confidence" not in json.dumps([trace_to_json(trace), answer_to_json(trace)])  # as the first version wrote
    assert trace_from_json(trace_to_json(trace)).answer.confidence is None


def test_scores_keep_six_significant_digits_and_numbers_that_json_lacks() -> None:
    query = Query("q", "?")
    step = Step("rerank", 1, 0.0, 1, ("a", "b", "c"), (1234567.0, 0.000123456789, -math.inf), notes={"x": (1 / 3,)})
    record = trace_to_json(Trace(query, (step,), (Answer("q", "", -math.inf),)))
    assert record["steps"][0]["scores"] == [1234570.0, 0.000123457, "-inf"]
    assert record["steps"][0]["notes"] == {"x": [0.333333]}
    back = trace_from_json(json.loads(json.dumps(record, allow_nan=False)))
    assert back.steps[0].scores[2] == back.answer.score == -math.inf


def test_seconds_are_nan_without_timings() -> None:
    trace = trace_from_json(trace_to_json(make_trace("q1")))
    assert all(math.isnan(step.seconds) for step in trace.steps)


@given(st.text(), st.text(), st.floats(allow_nan=False))
@settings(deadline=None)
def test_any_text_and_score_survive_rounding_once(question: str, text: str, score: float) -> None:
    trace = Trace(Query("q", question), (), (Answer("q", text, score, (Candidate(text, score),)),))
    once = trace_from_json(json.loads(json.dumps(trace_to_json(trace))))
    assert once.query == trace.query and once.answer.text == text
    assert trace_from_json(trace_to_json(once)) == once


# --- the run folder ---------------------------------------------------------------------------------------------------


def test_a_finished_run_has_every_question_in_order_and_a_manifest(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert [record["id"] for record in run.answers()] == IDS
    assert list(run.traces()) == [make_trace(query_id) for query_id in IDS]
    assert run.trace("q3") == make_trace("q3")
    assert sorted(run.manifest["files"]) == [ANSWERS, TRACES]
    assert run.manifest["counts"] == {"questions": 7, "abstained": 0, "passes": 14}
    # 7 questions, 0.25 s a step; read is done twice for each
    assert run.manifest["measured"]["stages"]["read"] == {"seconds": 3.5, "steps": 14, "questions": 7}
    assert run.manifest["measured"]["peak_memory_bytes"] > 0


def test_answers_may_come_in_any_order(tmp_path: Path) -> None:
    write_run(tmp_path / "straight")
    with recording(tmp_path / "mixed", IDS, recipe=RECIPE, inputs=INPUTS) as writer:
        for query_id in ["q4", "q0", "q6", "q1", "q5", "q2", "q3"]:
            writer.add([make_trace(query_id)])
    for name in FILES:
        assert (tmp_path / "mixed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_a_killed_and_resumed_run_has_the_same_bytes_and_differs_in_seconds_only(tmp_path: Path) -> None:
    write_run(tmp_path / "whole", seconds=0.5)
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path / "resumed", stop_after=2)
    assert not (tmp_path / "resumed").exists()
    with pytest.raises(ArtifactError, match="A partial one is beside it"):
        load_run(tmp_path / "resumed")
    write_run(tmp_path / "resumed", batch=2)
    for name in (ANSWERS, TRACES):
        assert sha256_file(tmp_path / "whole" / name) == sha256_file(tmp_path / "resumed" / name)
    whole, resumed = load_run(tmp_path / "whole"), load_run(tmp_path / "resumed")
    assert whole.artifact.hash == resumed.artifact.hash
    assert {**whole.manifest, "measured": 0} == {**resumed.manifest, "measured": 0}


def test_questions_that_are_finished_are_not_asked_again(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path / "run", stop_after=2)
    with pytest.raises(KeyboardInterrupt), recording(tmp_path / "run", IDS, recipe=RECIPE, inputs=INPUTS) as writer:
        assert writer.finished == set(IDS[:6])
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", FILES)
def test_a_file_cut_at_any_byte_of_the_last_batch_costs_only_the_torn_questions(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "os.fsync", lambda _: None
    )  # the cuts stand for what a kill leaves; waiting for a disk adds none
    intact = tmp_path / "intact"
    intact.mkdir()
    writer = RunWriter(intact, IDS)
    writer.add([short_trace(query_id) for query_id in IDS[:2]])
    before = {file: (intact / file).stat().st_size for file in FILES}
    writer.add([short_trace(query_id) for query_id in IDS[2:4]])
    writer.close()
    data = (intact / name).read_bytes()
    after = {file: (intact / file).read_bytes() for file in FILES}
    torn = tmp_path / "torn"
    for cut in range(before[name], len(data) + 1):
        shutil.copytree(intact, torn)
        (torn / name).write_bytes(data[:cut])
        writer = RunWriter(torn, IDS)
        whole = data[:cut].count(b"\n")
        assert writer.finished == set(IDS[:whole]), cut
        writer.add([short_trace(query_id) for query_id in IDS[whole:4]])
        writer.close()
        assert {file: (torn / file).read_bytes() for file in FILES} == after, cut
        shutil.rmtree(torn)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_files_cut_independently_come_back_in_step(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    writer = RunWriter(folder, IDS)
    writer.add([make_trace(query_id) for query_id in IDS[:5]])
    writer.close()
    whole = []
    for name in FILES:
        content = (folder / name).read_bytes()
        cut = data.draw(st.integers(0, len(content)), label=name)
        (folder / name).write_bytes(content[:cut])
        whole.append(content[:cut].count(b"\n"))
    writer = RunWriter(folder, IDS)
    writer.close()
    assert writer.finished == set(IDS[: min(whole)])
    assert {(folder / name).read_bytes().count(b"\n") for name in FILES} == {min(whole)}


def test_files_of_different_order_keep_their_common_beginning(tmp_path: Path) -> None:
    """What a kill leaves that hits while lines are put in question order: one file sorted, two not."""
    writer = RunWriter(tmp_path, IDS)
    writer.add([make_trace(query_id) for query_id in ("q0", "q2", "q1")])
    writer.close()
    lines = (tmp_path / ANSWERS).read_bytes().splitlines(keepends=True)
    (tmp_path / ANSWERS).write_bytes(lines[0] + lines[2] + lines[1])
    writer = RunWriter(tmp_path, IDS)
    writer.close()
    assert writer.finished == {"q0"}


def test_a_line_of_zeros_as_a_power_cut_leaves_them_is_cut_away(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path, IDS)
    writer.add([make_trace("q0")])
    writer.close()
    with (tmp_path / TRACES).open("ab") as file:
        file.write(b"\0" * 100 + b"\n")
    with (tmp_path / ANSWERS).open("ab") as file:
        file.write(b'{"id": "q1"}\n')
    writer = RunWriter(tmp_path, IDS)
    writer.close()
    assert writer.finished == {"q0"}
    assert (tmp_path / TRACES).read_bytes().count(b"\0") == 0


def test_a_run_of_another_recipe_is_neither_continued_nor_thrown_away(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_run(tmp_path / "run", stop_after=1)
    other = {**RECIPE, "retriever": {"kind": "bm25", "k1": 1.2}}
    with (
        pytest.raises(
            ArtifactMismatch, match=r"unfinished run here differs from this one in recipe\.retriever\. Choose"
        ),
        recording(tmp_path / "run", IDS, recipe=other, inputs=INPUTS),
    ):
        pass
    assert (partial_path(tmp_path / "run") / ANSWERS).read_bytes().count(b"\n") == 3


def test_a_finished_run_is_found_again_and_never_overwritten(tmp_path: Path) -> None:
    assert find_run(tmp_path / "run", recipe=RECIPE, inputs=INPUTS) is None
    write_run(tmp_path / "run")
    assert find_run(tmp_path / "run", recipe=RECIPE, inputs=INPUTS) is not None
    with pytest.raises(ArtifactError, match="is finished"):
        write_run(tmp_path / "run")
    with pytest.raises(ArtifactMismatch, match=r"differs from this one in inputs\.questions"):
        find_run(tmp_path / "run", recipe=RECIPE, inputs={**INPUTS, "questions": {"name": "dev", "sha256": "11"}})


def test_an_incomplete_run_stays_partial_and_says_what_is_missing(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"6 of 7 questions have no answer yet \(first: q1, q2, q3\)"),
        recording(tmp_path / "run", IDS, recipe=RECIPE, inputs=INPUTS) as writer,
    ):
        writer.add([make_trace("q0")])
    assert not (tmp_path / "run" / MANIFEST).exists()


def test_a_writer_refuses_ids_twice_and_strangers(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'a' occurs more than once"):
        RunWriter(tmp_path, ["a", "b", "a"])
    writer = RunWriter(tmp_path, IDS)
    with pytest.raises(ValueError, match="second trace of question 'q0'"):
        writer.add([make_trace("q0"), make_trace("q0")])
    with pytest.raises(ValueError, match="'q99', which is not one of the questions"):
        writer.add([make_trace("q99")])
    unwritable = Trace(Query("q0", "?"), (Step("read", 1, 0.0, 1, notes={"x": {1, 2}}),), (Answer("q0", "", 0.0),))
    with pytest.raises(TypeError, match="set"):
        writer.add([unwritable])
    writer.add([])
    writer.close()
    assert (tmp_path / ANSWERS).read_bytes() == b""  # a refused batch leaves nothing behind


def test_scores_are_written_beside_the_run_and_replaced(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    run = load_run(tmp_path / "run")
    with pytest.raises(DataError, match="has not been scored"):
        run.scores()
    run.save_scores({"em": 1.0})
    run.save_scores({"em": 2.0})
    assert load_run(tmp_path / "run").scores() == {"em": 2.0}
    (run.path / SCORES).write_text("[]")
    with pytest.raises(DataError, match="holds a list"):
        run.scores()


def test_a_run_without_timings_is_read_and_one_with_foreign_timings_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    run = load_run(tmp_path / "run")
    timings = (run.path / TIMINGS).read_text().splitlines(keepends=True)
    (run.path / TIMINGS).write_text("".join(timings[1:]))
    with pytest.raises(DataError, match="line 1 belongs to another run"):
        list(run.traces())
    (run.path / TIMINGS).unlink()
    assert all(math.isnan(step.seconds) for trace in run.traces() for step in trace.steps)


def test_a_damaged_trace_line_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    run = load_run(tmp_path / "run")
    lines = (run.path / TRACES).read_text(encoding="utf-8").splitlines(keepends=True)
    (run.path / TRACES).write_text("".join([lines[0], '{"id": "q1"}\n', *lines[2:]]), encoding="utf-8")
    with pytest.raises(DataError, match=r"traces\.jsonl: line 2 is not a trace of odqa"):
        list(run.traces())
    with pytest.raises(DataError, match="no question 'zz' in this run"):
        write_run(tmp_path / "other")
        load_run(tmp_path / "other").trace("zz")
