"""What every retriever must do, whatever is inside. Subclass, give the fixtures, inherit the tests.

class TestBm25(RetrieverConformance):
    @pytest.fixture(scope="class")
    def retriever(self): return Bm25Retriever(...)
"""

import pytest

from odqa.stages import Retriever
from odqa.types import Passage, Query

COLLECTION = (
    Passage("a1", "paris is the capital of france, on the river seine.", "paris"),
    Passage("a2", "the tiber is the river of rome. it has many bridges.", "tiber"),
    Passage("a3", "berlin is the capital city of germany.", "berlin"),
    Passage("a4", "the king was born in the north and died in the great war.", "king"),
    Passage("a5", "gold, silver and iron", ""),
    Passage("a6", "the moon and the sun", "sky"),
    Passage("a7", "the moon and the sun", "sky"),  # a twin of a6: a tie for every query
)
QUERIES = (
    Query("q-capital", "what is the capital of france"),
    Query("q-river", "which river is in rome and how many bridges does it have"),
    Query("q-sky", "moon and sun"),
    Query("q-king", "who was king"),
)


class RetrieverConformance:
    """Give a fixture `retriever` (best class-scoped) over an index of `COLLECTION`, with scores in float32."""

    @pytest.fixture(scope="class")
    def retriever(self) -> Retriever:
        raise NotImplementedError

    def test_is_a_retriever(self, retriever: Retriever) -> None:
        assert isinstance(retriever, Retriever)

    def test_gives_one_list_a_query_in_order(self, retriever: Retriever) -> None:
        forwards = retriever.retrieve(QUERIES, 5)
        backwards = retriever.retrieve(QUERIES[::-1], 5)
        assert ids(backwards) == ids(forwards)[::-1]

    def test_no_queries_give_no_lists(self, retriever: Retriever) -> None:
        assert retriever.retrieve([], 5) == []

    @pytest.mark.parametrize("k", [1, 3, len(COLLECTION), 1000])
    def test_gives_at_most_k_stored_passages_best_first_and_none_twice(self, retriever: Retriever, k: int) -> None:
        for hits in retriever.retrieve(QUERIES, k):
            assert 1 <= len(hits) <= min(k, len(COLLECTION))
            assert all(hit.passage in COLLECTION for hit in hits)
            assert len({hit.passage.id for hit in hits}) == len(hits)
            scores = [hit.score for hit in hits]
            assert scores == sorted(scores, reverse=True)

    def test_a_smaller_k_is_the_start_of_a_larger(self, retriever: Retriever) -> None:
        assert [hits[:2] for hits in ids(retriever.retrieve(QUERIES, 5))] == ids(retriever.retrieve(QUERIES, 2))

    def test_twins_are_in_the_order_of_the_collection(self, retriever: Retriever) -> None:
        (hits,) = ids(retriever.retrieve(QUERIES[2:3], len(COLLECTION)))
        assert hits.index("a6") < hits.index("a7")

    def test_retrieving_again_gives_the_same(self, retriever: Retriever) -> None:
        assert retriever.retrieve(QUERIES, 5) == retriever.retrieve(QUERIES, 5)

    def test_a_list_does_not_depend_on_its_batch(self, retriever: Retriever) -> None:
        together = retriever.retrieve(QUERIES, 5)
        apart = [retriever.retrieve([query], 5)[0] for query in QUERIES]
        assert ids(together) == ids(apart)
        for one, other in zip(together, apart, strict=True):
            # float32 sums in another order
            assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], abs=1e-4)

    def test_the_same_question_twice_gets_the_same(self, retriever: Retriever) -> None:
        one, other = retriever.retrieve([QUERIES[0], Query("again", QUERIES[0].text)], 5)
        assert one == other

    def test_hits_name_their_stage(self, retriever: Retriever) -> None:
        assert all(hit.source for hits in retriever.retrieve(QUERIES, 5) for hit in hits)

    @pytest.mark.parametrize("k", [0, -1])
    def test_k_below_one_is_a_value_error(self, retriever: Retriever, k: int) -> None:
        with pytest.raises(ValueError):
            retriever.retrieve(QUERIES, k)


def ids(lists: list) -> list[list[str]]:
    """The ids of several lists of hits."""
    return [[hit.passage.id for hit in hits] for hits in lists]
