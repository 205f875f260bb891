"""Scores of an outside run as a re-ranker: the table, and the TREC file that it may come from."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from odqa.errors import DataError
from odqa.rerank.scores import ScoreReranker, load_trec_run
from odqa.types import Passage, Query
from tests.unit.conformance_read import HITS, QUERIES, RerankerConformance, ranked

ALL = {query.id: {hit.passage.id: len(hit.passage.text) for hits in HITS for hit in hits} for query in QUERIES}
HITS_ABC = ranked(*(Passage(name, "text") for name in "abc"))
RUN = """\
q1 Q0 a 1 2.5 bm25
q2 Q0 b 1 -1e-3 bm25

q1\tQ0\tb\t2\t7\tbm25
"""

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "run.txt"
        path.write_text(text, encoding="utf-8")
        return path

    return write


class TestScores(RerankerConformance):
    @pytest.fixture(scope="class")
    def reranker(self) -> ScoreReranker:
        return ScoreReranker(ALL, "lengths")


# --- the re-ranker ----------------------------------------------------------------------------------------------------


def test_passages_without_a_score_go_behind_in_their_old_order_and_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        (hits,) = ScoreReranker({"q": {"c": -5.0}}, "outside").rerank([Query("q", "?")], [HITS_ABC])
    assert [(hit.passage.id, hit.score, hit.source) for hit in hits] == [
        ("c", -5.0, "outside"), ("a", 0.0, "test"), ("b", -1.0, "test"),
    ]  # fmt: skip
    assert caplog.messages == ["rerank: 2 of 3 passages are not in outside; they go behind"]


def test_beyond_its_depth_nothing_is_looked_up(caplog: pytest.LogCaptureFixture) -> None:
    (hits,) = ScoreReranker({"q": {"a": 1, "b": 2, "c": 3}}, "o", depth=2).rerank([Query("q", "?")], [HITS_ABC])
    assert [hit.passage.id for hit in hits] == ["b", "a", "c"] and not caplog.messages


@pytest.mark.parametrize(("known", "told"), [("none", "3 of 3"), ("q-river", "2 of 3")])
def test_queries_without_scores_are_an_error_that_names_the_first_and_counts(known: str, told: str) -> None:
    reranker = ScoreReranker({known: {"p1": 1.0}}, "outside")
    for call in (lambda: reranker.check_queries(QUERIES), lambda: reranker.rerank(QUERIES, HITS)):
        with pytest.raises(DataError, match=rf"outside: no scores for {told} queries \(first: 'q-capital'"):
            call()


# --- the TREC file ----------------------------------------------------------------------------------------------------


def test_a_trec_run_is_read_in_any_order_and_by_its_scores_alone(write: Write) -> None:
    assert load_trec_run(write(RUN)) == {"q1": {"a": 2.5, "b": 7.0}, "q2": {"b": -0.001}}


def test_a_file_of_several_runs_is_read_by_tag(write: Write) -> None:
    path = write(RUN + "q1 Q0 a 1 9 dense\n")
    assert load_trec_run(path, tag="dense") == {"q1": {"a": 9.0}}
    assert load_trec_run(path, tag="bm25") == load_trec_run(write(RUN))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("q1 Q0 c 3 1.0", "line 5 has 5 columns; a TREC run has 6: query Q0 passage rank score tag."),
        ("q1 Q0 c 3 1.0 bm25 x", "line 5 has 7 columns"),
        ("q1 Q0 c 3 nan bm25", "line 5: the score 'nan' is not a finite number."),
        ("q1 Q0 c 3 -inf bm25", "line 5: the score '-inf' is not a finite number."),
        ("q1 Q0 c 3 high bm25", "line 5: the score 'high' is not a finite number."),
        ("q1 Q0 a 3 2.5 bm25", "line 5 scores passage 'a' of query 'q1' a second time."),
        ("q1 Q0 a 3 2.5 dense", "a second time. Name one of the file's runs under tag."),
    ],
)
def test_a_bad_line_is_told_with_its_number(write: Write, line: str, told: str) -> None:
    with pytest.raises(DataError) as caught:
        load_trec_run(write(f"{RUN}{line}\n"))
    assert told in str(caught.value) and "run.txt: line 5" in str(caught.value)


@pytest.mark.parametrize(("text", "tag", "told"), [("", None, "an empty run"), (RUN, "x", "no lines of tag 'x' ")])
def test_a_run_without_lines_is_told(write: Write, text: str, tag: str | None, told: str) -> None:
    with pytest.raises(DataError, match=told):
        load_trec_run(write(text), tag=tag)


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        load_trec_run(tmp_path / "run.bin")
