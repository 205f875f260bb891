"""Questions that their passage no longer answers: what each rule changes, and what none may touch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odqa.corpus import corrupt as module
from odqa.corpus.corrupt import corrupt

PASSAGE = (
    "Gustave Eiffel built the tower for the fair of 1889. His rival, Stephen Sauvestre, drew the arches of the base. "
    "In 1957 engineers from Lyon added an antenna, and the painting takes 60 tonnes of paint."
)


def draws(rule: str, question: str, answers: tuple[str, ...] = ()) -> set[str | None]:
    """What one rule makes of a question over 30 seeds."""
    return {getattr(module, rule)(question, PASSAGE, answers, np.random.default_rng(seed)) for seed in range(30)}


def test_a_name_becomes_another_name_of_the_passage() -> None:
    assert draws("_name", "When did Gustave Eiffel build it?") == {
        "When did Stephen Sauvestre build it?",
        "When did Lyon build it?",
    }


def test_a_name_never_becomes_an_answer() -> None:
    assert draws("_name", "Who was Gustave Eiffel's rival?", ("Stephen Sauvestre",)) == {"Who was Lyon's rival?"}


def test_a_number_becomes_one_of_the_same_length_or_one_nearby() -> None:
    assert draws("_number", "What was built in 1889?") == {"What was built in 1957?"}
    nearby = draws("_number", "Which 300 workers?")
    assert all(question and question != "Which 300 workers?" for question in nearby)


def test_a_noun_becomes_another_word_with_its_ending() -> None:
    assert draws("_noun", "Who painted the arches?") == {"Who painted the tonnes?", "Who painted the takes?"}
    assert draws("_noun", "What is the antenna?") == {None}  # no other word of the passage ends in -na


def test_an_antonym_and_a_negation() -> None:
    assert draws("_antonym", "What was the largest part?") == {"What was the smallest part?"}
    assert draws("_negation", "What was the largest part?") == {"What wasn't the largest part?"}
    assert draws("_negation", "What was not painted?") == {"What was painted?"}
    assert draws("_negation", "Whose tower?") == {None}


def test_nothing_to_change_is_none() -> None:
    assert corrupt("why", "because", (), np.random.default_rng(0)) is None


@given(st.text(max_size=80), st.text(max_size=200), st.integers(0, 50))
def test_any_text_is_taken_and_a_change_changes(question: str, passage: str, seed: int) -> None:
    changed = corrupt(question, passage, ("x",), np.random.default_rng(seed))
    assert changed is None or changed != question


@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_draws_the_same_change(seed: int) -> None:
    question = "When did Gustave Eiffel build the largest tower of 1889?"
    first, second = (corrupt(question, PASSAGE, ("1889",), np.random.default_rng(seed)) for _ in range(2))
    assert first == second != question
