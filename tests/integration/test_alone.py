"""What the embedded models say of a row is the same to the bit whatever else is in the batch."""

import pytest

from odqa.read.span import SpanReader, load_span_reader
from odqa.recipes import Places
from odqa.rerank.cross import CrossEncoderReranker
from odqa.types import Hit, PackedContext, Passage, Query

TEXT = "the queen was taught latin by her tutor who wrote a book about archery and schools in the north "
QUERY = Query("q", "who taught the queen latin")
PASSAGES = [Passage(str(number), f"title {number}", (9 * TEXT)[5 * number : 17 * number + 110]) for number in range(40)]
SOME = [3, 4, 11, 17, 29, 30, 39]


@pytest.fixture(scope="module")
def places() -> Places:
    return Places.from_environment()


def test_a_pairs_score_does_not_depend_on_the_other_pairs(places: Places) -> None:
    reranker = CrossEncoderReranker(str(places.file("embedded:reranker-2")), dtype="bfloat16")
    pairs = [(QUERY, passage) for passage in PASSAGES]

    together = reranker.score_pairs(pairs)

    assert reranker.score_pairs([pairs[number] for number in SOME]) == [together[number] for number in SOME]
    assert reranker.score_pairs(pairs[17:18]) == together[17:18]


def test_a_reading_does_not_depend_on_the_other_contexts(places: Places) -> None:
    reader = SpanReader(load_span_reader(places.file("embedded:span-reader-3")))
    contexts = [
        PackedContext(Query(str(number), QUERY.text), "", (Hit(passage, 1.0, "x"),), tokens=0, budget=512)
        for number, passage in enumerate(PASSAGES)
    ]

    together = reader.read(contexts)

    assert reader.read([contexts[number] for number in SOME]) == [together[number] for number in SOME]
