"""What every packer, reader and re-ranker must do, whatever is inside. Subclass, give the fixture, inherit the tests.

class TestSpanReader(ReaderConformance):
    @pytest.fixture(scope="class")
    def reader(self): return SpanReader(...)
"""

from collections.abc import Callable, Sequence

import pytest

from odqa.errors import DataError
from odqa.pack import GreedyPacker
from odqa.stages import Packer, Reader, Reranker
from odqa.types import Hit, PackedContext, Passage, Query

QUERIES = (
    Query("q-capital", "what is the capital of france"),
    Query("q-river", "which river is in rome and how many bridges does it have"),
    Query("q-king", "who was king"),
)
_PASSAGES = (
    Passage("p1", "paris is the capital of france, on the river seine.", "paris"),
    Passage("p2", "the tiber is the river of rome. it has many bridges, old and new.", "tiber"),
    Passage("p3", "berlin is the capital city of germany."),
    Passage(
        "p4", "the king was born in the north of the country and died in the year of the great war.", "king {0} %s"
    ),
    Passage("p5", "gold, silver and iron"),
)


def ranked(*passages: Passage) -> list[Hit]:
    """Hits in this order, with falling scores."""
    return [Hit(passage, -float(rank), "test") for rank, passage in enumerate(passages)]


HITS = (ranked(*_PASSAGES), ranked(*reversed(_PASSAGES)), ranked(_PASSAGES[3]))


class PackerConformance:
    """Give a fixture `make`: from a budget in tokens to a packer; no question of `QUERIES` may cost over 60 tokens."""

    @pytest.fixture
    def make(self) -> Callable[[int], Packer]:
        raise NotImplementedError

    def test_is_a_packer(self, make: Callable[[int], Packer]) -> None:
        assert isinstance(make(100), Packer)

    def test_gives_one_context_a_query_in_order(self, make: Callable[[int], Packer]) -> None:
        contexts = make(200).pack(QUERIES, HITS)
        assert [context.query for context in contexts] == list(QUERIES)

    def test_no_queries_give_no_contexts(self, make: Callable[[int], Packer]) -> None:
        assert make(200).pack([], []) == []

    @pytest.mark.parametrize("budget", [60, 80, 100, 150, 1000])
    def test_never_exceeds_the_budget(self, make: Callable[[int], Packer], budget: int) -> None:
        for context in make(budget).pack(QUERIES, HITS):
            assert context.tokens <= context.budget == budget

    @pytest.mark.parametrize("budget", [60, 100, 1000])
    def test_kept_and_dropped_are_all_hits(self, make: Callable[[int], Packer], budget: int) -> None:
        for context, hits in zip(make(budget).pack(QUERIES, HITS), HITS, strict=True):
            kept = [hit.passage.id for hit in context.hits]
            dropped = [drop.passage_id for drop in context.dropped]
            assert sorted(kept + dropped) == sorted(hit.passage.id for hit in hits)

    def test_packs_hits_as_they_came(self, make: Callable[[int], Packer]) -> None:
        for context, hits in zip(make(1000).pack(QUERIES, HITS), HITS, strict=True):
            assert all(any(kept is hit for hit in hits) for kept in context.hits)

    def test_a_query_without_hits_gets_its_question_alone(self, make: Callable[[int], Packer]) -> None:
        (context,) = make(200).pack(QUERIES[:1], [[]])
        assert context.hits == () and context.dropped == () and context.tokens > 0

    def test_packing_again_gives_the_same(self, make: Callable[[int], Packer]) -> None:
        packer = make(120)
        assert packer.pack(QUERIES, HITS) == packer.pack(QUERIES, HITS)

    def test_a_question_over_the_budget_is_an_error_with_its_id(self, make: Callable[[int], Packer]) -> None:
        with pytest.raises(DataError, match="q-capital"):
            make(1).pack(QUERIES, HITS)

    def test_refuses_lists_of_different_lengths(self, make: Callable[[int], Packer]) -> None:
        with pytest.raises(ValueError):
            make(100).pack(QUERIES, HITS[:1])


class ReaderConformance:
    """Give a fixture `reader` (best class-scoped) in float32; `too_long` is the words of a question over its window."""

    too_long = 20000
    """Words."""

    @pytest.fixture(scope="class")
    def reader(self) -> Reader:
        raise NotImplementedError

    @pytest.fixture(scope="class")
    def contexts(self, reader: Reader) -> list[PackedContext]:
        return GreedyPacker(reader, 200).pack(QUERIES, HITS)

    def test_is_a_reader(self, reader: Reader) -> None:
        assert isinstance(reader, Reader)

    def test_gives_one_answer_a_context_in_order(self, reader: Reader, contexts: Sequence[PackedContext]) -> None:
        answers = reader.read(contexts)
        assert [answer.query_id for answer in answers] == [query.id for query in QUERIES]
        backwards = reader.read(contexts[::-1])
        assert [answer.query_id for answer in backwards] == [query.id for query in QUERIES][::-1]

    def test_no_contexts_give_no_answers(self, reader: Reader) -> None:
        assert reader.read([]) == []

    def test_answers_a_context_without_passages(self, reader: Reader) -> None:
        contexts = GreedyPacker(reader, 200).pack(QUERIES[:1], [[]])
        assert reader.read(contexts)[0].query_id == "q-capital"

    def test_the_price_of_a_passage_does_not_depend_on_its_neighbours(self, reader: Reader) -> None:
        for query, hits in zip(QUERIES, HITS, strict=True):
            together = reader.costs(query, hits)
            apart = [reader.costs(query, [hit]) for hit in hits]
            assert together.passages == tuple(price for costs in apart for price in costs.passages)
            assert {costs.fixed for costs in apart} == {together.fixed}

    def test_a_longer_passage_costs_more(self, reader: Reader) -> None:
        short, long = ranked(Passage("s", "the river of rome"), Passage("l", "the river of rome " * 5))
        prices = reader.costs(QUERIES[0], [short, long]).passages
        assert prices[0] is not None and prices[1] is not None and 0 < prices[0] < prices[1]

    def test_a_question_beyond_the_window_is_an_error_with_its_id(self, reader: Reader) -> None:
        with pytest.raises(DataError, match="q-endless"):
            reader.costs(Query("q-endless", "who " * self.too_long), ())

    def test_reading_again_gives_the_same(self, reader: Reader, contexts: Sequence[PackedContext]) -> None:
        assert reader.read(contexts) == reader.read(contexts)

    def test_an_answer_does_not_depend_on_its_batch(self, reader: Reader, contexts: Sequence[PackedContext]) -> None:
        together = reader.read(contexts)
        apart = [answer for context in contexts for answer in reader.read([context])]
        assert [answer.text for answer in together] == [answer.text for answer in apart]
        for one, other in zip(together, apart, strict=True):
            assert one.score == pytest.approx(other.score, abs=1e-3)  # float32 sums in another order
            assert [candidate.text for candidate in one.candidates] == [
                candidate.text for candidate in other.candidates
            ]

    def test_candidates_are_distinct_and_at_most_one_abstains(
        self, reader: Reader, contexts: Sequence[PackedContext]
    ) -> None:
        for answer in reader.read(contexts):
            places = [(candidate.text, candidate.passage_id, candidate.start) for candidate in answer.candidates]
            assert len(set(places)) == len(places)
            assert sum(not candidate.text for candidate in answer.candidates) <= 1

    def test_a_candidate_with_a_place_is_the_text_there(
        self, reader: Reader, contexts: Sequence[PackedContext]
    ) -> None:
        for context, answer in zip(contexts, reader.read(contexts), strict=True):
            texts = {hit.passage.id: hit.passage.text for hit in context.hits}
            for candidate in answer.candidates:
                if candidate.passage_id is not None:
                    assert texts[candidate.passage_id][candidate.start : candidate.end] == candidate.text


class RerankerConformance:
    """Give a fixture `reranker` (best class-scoped) in float32 that re-scores all hits."""

    @pytest.fixture(scope="class")
    def reranker(self) -> Reranker:
        raise NotImplementedError

    def test_is_a_reranker(self, reranker: Reranker) -> None:
        assert isinstance(reranker, Reranker)

    def test_gives_the_same_passages(self, reranker: Reranker) -> None:
        for before, after in zip(HITS, reranker.rerank(QUERIES, HITS), strict=True):
            assert {hit.passage for hit in before} == {hit.passage for hit in after}
            assert len(before) == len(after)

    def test_orders_by_its_scores(self, reranker: Reranker) -> None:
        for hits in reranker.rerank(QUERIES, HITS):
            scores = [hit.score for hit in hits]
            assert scores == sorted(scores, reverse=True)

    def test_no_candidates_give_an_empty_list(self, reranker: Reranker) -> None:
        assert reranker.rerank(QUERIES[:2], [[], HITS[1]])[0] == []
        assert reranker.rerank([], []) == []

    def test_ties_keep_the_incoming_order(self, reranker: Reranker) -> None:
        twins = ranked(*(Passage(name, "the river of rome", "tiber") for name in "dacb"))
        (hits,) = reranker.rerank(QUERIES[:1], [twins])
        assert [hit.passage.id for hit in hits] == list("dacb")

    def test_a_score_does_not_depend_on_its_batch(self, reranker: Reranker) -> None:
        together = reranker.rerank(QUERIES, HITS)
        apart = [reranker.rerank([query], [hits])[0] for query, hits in zip(QUERIES, HITS, strict=True)]
        for one, other in zip(together, apart, strict=True):
            assert [hit.passage.id for hit in one] == [hit.passage.id for hit in other]
            assert [hit.score for hit in one] == pytest.approx([hit.score for hit in other], rel=1e-5, abs=1e-4)

    def test_the_incoming_scores_do_not_matter(self, reranker: Reranker) -> None:
        other = [[Hit(hit.passage, 7.0, "elsewhere") for hit in hits] for hits in HITS]
        assert reranker.rerank(QUERIES, other) == reranker.rerank(QUERIES, HITS)

    def test_refuses_lists_of_different_lengths(self, reranker: Reranker) -> None:
        with pytest.raises(ValueError):
            reranker.rerank(QUERIES, HITS[:1])
