"""odqa.evaluate.breakdowns and .ceiling: rules by example, numbers by hand, the ceiling against has_answer itself."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odqa.evaluate import (
    AnswerSearch,
    QuestionResult,
    answer_type,
    break_down,
    question_word,
    questions_with_answer,
    reach_curve,
    recall_curve,
)
from odqa.text import Matcher, has_answer
from odqa.types import Gold


def a_result(
    query_id: str, *, em: bool = True, rank: int | None = 1, answers: tuple[str, ...] = ("x",), held: bool | None = None
) -> QuestionResult:
    outcome = "correct" if em else "misread"
    return QuestionResult(query_id, answers, "x", outcome, em, 1.0, rank, None, rank, em, 10, 1, in_collection=held)


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("who wrote carmen", "who"),
        ("Whose idea was it?", "who"),
        ("in which year did rome fall", "which"),
        ("how many seasons are there", "how many"),
        ("how much is a pound", "how many"),
        ("how long is the rhine", "how"),
        ("the capital of france is what", "what"),
        ("when was the first film with a man who flies", "when"),  # the first that counts
        ("the show about a whole town", "other"),  # "how" inside a word is none
        ("", "other"),
    ],
)
def test_the_question_word_is_the_first_one_that_counts(question: str, kind: str) -> None:
    assert question_word(question) == kind


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("who wrote carmen", "Georges Bizet", "person-like"),
        ("who painted it", "Vincent van Gogh", "person-like"),
        ("what is the capital", "Buenos Aires", "name"),  # the same shape, asked otherwise
        ("who won", "the home team", "phrase"),
        ("when", "March 2 , 1985", "date"),
        ("when", "14 December 1972 UTC", "date"),
        ("when", "the 1990s", "date"),
        ("when", "1066", "date"),
        ("when", "the 19th century", "date"),
        ("when", "in 1985 in Rome", "phrase"),  # one word that is none of a date's
        ("how many", "26", "number"),
        ("how many", "26.2 miles", "number"),
        ("how many", "about three", "number"),
        ("how much", "$ 3.5 million", "number"),
        ("how many", "2001: A Space Odyssey", "number"),  # the rule looks at the first word alone
        ("why", "because the sun heats the ground there", "long text"),
        ("why", "", "phrase"),
    ],
)
def test_the_answer_type_follows_its_rule(question: str, answer: str, kind: str) -> None:
    assert answer_type(question, [answer, "another"]) == kind


def test_no_answer_is_a_type_of_its_own() -> None:
    assert answer_type("who", []) == "none"


def test_groups_stand_in_their_order_and_count_their_own_questions() -> None:
    results = [a_result("a"), a_result("b", em=False), a_result("c"), a_result("u", answers=())]
    kinds = {"a": "x", "b": "x", "c": "z", "u": "y"}
    groups = break_down(results, lambda question: kinds[question.id], order=("z", "x"), resamples=50)
    assert [(group.name, group.n, group.scores["em"].value) for group in groups] == [
        ("z", 1, 100.0),
        ("x", 2, 50.0),
        ("y", 1, 100.0),
    ]
    assert "recall_in_context" not in groups[2].scores  # nothing to find for a question without answers
    assert groups[1].to_json()["scores"]["em"]["value"] == 50.0


def test_the_recall_curve_counts_ranks_up_to_each_depth() -> None:
    results = [a_result("a", rank=1), a_result("b", rank=3), a_result("c", rank=None), a_result("d", answers=())]
    points = [(k, round(at.value, 1)) for k, at in recall_curve(results, "recall", 5, resamples=50)]
    assert points == [(1, 33.3), (2, 33.3), (3, 66.7), (5, 66.7)]
    assert recall_curve([a_result("d", answers=())], "recall", 5) == []


def test_the_reach_curve_is_the_share_of_answers_within_the_first_tokens() -> None:
    assert reach_curve([30, 60, None, 100], 100, points=4) == [(25, 0.0), (50, 25.0), (75, 50.0), (100, 75.0)]
    assert reach_curve([], 100) == [] == reach_curve([5], 0)


# --- the ceiling ------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["rome", "Rome", "new", "york", "10", "2010", "é", "e\u0301", "-", ".", "st", "ß", "東京", "京"]
)
TEXTS = st.lists(WORDS, max_size=6).map(" ".join)


@pytest.mark.parametrize("matcher", ["string", "characters"])
@settings(max_examples=100, deadline=None)
@given(st.lists(TEXTS, max_size=5), st.lists(st.lists(TEXTS, max_size=3), max_size=4))
def test_the_ceiling_is_what_has_answer_finds_in_any_passage(
    matcher: Matcher, texts: list[str], answers: list[list[str]]
) -> None:
    gold = [Gold(str(number), tuple(found)) for number, found in enumerate(answers)]
    expected = {item.query_id for item in gold if any(has_answer(text, item.answers, matcher) for text in texts)}
    assert questions_with_answer(texts, gold, matcher) == expected


@pytest.mark.parametrize("matcher", ["string", "regex"])
def test_every_question_of_a_shared_answer_is_found(matcher: Matcher) -> None:
    gold = [Gold("a", ("Rome", "nowhere")), Gold("b", ("Rome",)), Gold("c", ("Bern",)), Gold("d", ())]
    search = AnswerSearch(gold, matcher)
    search.see("In Rome.")
    assert search.found == {"a", "b"}
    search.see("In Rome and Bern.")
    assert search.found == {"a", "b", "c"}


def test_patterns_are_searched_and_broken_ones_find_nothing() -> None:
    gold = [Gold("a", (r"19\d\d",)), Gold("b", ("(",)), Gold("c", ("Heyrovsk[yý]",))]
    assert questions_with_answer(["It was 1985.", "heyrovský"], gold, "regex") == {"a", "c"}
    assert questions_with_answer(["It was 1985."], gold) == set()  # as strings they are not there
