"""A cascade of re-rankers: made of tables of scores, so that every order can be worked out by hand."""

import pytest

from odqa.errors import DataError
from odqa.rerank.cascade import CascadeReranker
from odqa.rerank.scores import ScoreReranker
from odqa.types import Hit, Passage, Query
from tests.unit.conformance_read import HITS, QUERIES, RerankerConformance, ranked

LENGTHS = {query.id: {hit.passage.id: len(hit.passage.text) for hits in HITS for hit in hits} for query in QUERIES}
QUERY = Query("q", "?")
CHEAP = ScoreReranker({"q": {"a": 1, "b": 2, "c": 3, "d": 4}}, "cheap")
DEAR = {"q": {"a": 9, "b": 1, "c": 2, "d": 0}}


class TestCascade(RerankerConformance):
    @pytest.fixture(scope="class")
    def reranker(self) -> CascadeReranker:
        reverse = {query: {pid: -score for pid, score in scores.items()} for query, scores in LENGTHS.items()}
        return CascadeReranker([ScoreReranker(reverse, "cheap"), ScoreReranker(LENGTHS, "dear")])


def passages(names: str) -> list[Hit]:
    return ranked(*(Passage(name, f"text {name}") for name in names))


def order(hits: list[Hit]) -> list[tuple[str, str]]:
    return [(hit.passage.id, hit.source) for hit in hits]


def test_what_a_later_stage_does_not_score_stays_behind_in_the_order_of_the_stage_before() -> None:
    # cheap: d c b a. dear looks at d and c alone (a, its favourite, is out of reach) and swaps them.
    cascade = CascadeReranker([CHEAP, ScoreReranker(DEAR, "dear", depth=2)])
    (hits,) = cascade.rerank([QUERY], [passages("abcd")])
    assert order(hits) == [("c", "dear"), ("d", "dear"), ("b", "cheap"), ("a", "cheap")]


def test_three_stages_leave_three_layers() -> None:
    # first: depth 3 of a b c d: c b a, then d. second: depth 2, c and b: c b stay (2 > 1). third: depth 1: c.
    first = ScoreReranker(CHEAP.scores, "one", depth=3)
    cascade = CascadeReranker([first, ScoreReranker(DEAR, "two", depth=2), ScoreReranker(DEAR, "three", depth=1)])
    (hits,) = cascade.rerank([QUERY], [passages("abcd")])
    assert order(hits) == [("c", "three"), ("b", "two"), ("a", "one"), ("d", "test")]


def test_a_cascade_asks_its_stages_whether_they_know_the_queries() -> None:
    cascade = CascadeReranker([CHEAP, ScoreReranker({"other": {}}, "elsewhere")])
    with pytest.raises(DataError, match="elsewhere: no scores for 1 of 1 queries"):
        cascade.check_queries([QUERY])
    CascadeReranker([CHEAP]).check_queries([QUERY])


def test_a_cascade_without_stages_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one stage"):
        CascadeReranker([])
