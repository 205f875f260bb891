"""Demonstrations taken from a pool: drawn by a seed, or the nearest for each question."""

import json
from pathlib import Path

import pytest

from odqa import config
from odqa.corpus.examples import read_solved
from odqa.errors import DataError
from odqa.read.demonstrations import Nearest, draw, solved
from odqa.read.prompts import TEMPLATES, Demonstration, Prompt
from odqa.recipes import Places, build_demonstrations
from tests.unit.test_prompts import chat

QUESTIONS = (
    "Which river flows through Paris?",
    "Who wrote the first symphony of Brahms?",
    "Which river flows through Rome and reaches the sea?",
    "When was the bridge over the river opened?",
)
POOL = [Demonstration(question, f"answer {n}") for n, question in enumerate(QUESTIONS)]


def test_a_draw_depends_on_the_seed_alone_and_shows_nothing_twice() -> None:
    drawn = [draw(POOL, 3, seed) for seed in range(8)]
    assert drawn == [draw(POOL, 3, seed) for seed in range(8)]
    assert len(set(drawn)) > 1 and all(len(set(shown)) == 3 for shown in drawn)


def test_the_most_alike_stands_next_to_the_question() -> None:
    shown = Nearest(POOL, 2)("Which river flows through Rome?")
    assert [POOL.index(one) for one in shown] == [0, 2]


@pytest.mark.parametrize("question", [QUESTIONS[0], "which river FLOWS through paris"])
def test_a_question_is_never_shown_its_own_answer(question: str) -> None:
    assert POOL[0] not in Nearest(POOL, 3)(question)


def test_a_question_without_known_words_is_shown_the_first_ones() -> None:
    assert Nearest(POOL, 2)("ожидание") == (POOL[1], POOL[0])


def test_a_pool_that_is_too_small_is_refused() -> None:
    with pytest.raises(DataError, match="4 examples to choose from; at least 5 are needed"):
        draw(POOL, 5, 0)
    with pytest.raises(DataError, match="4 examples to choose from; at least 5 are needed"):
        Nearest(POOL, 4)


@pytest.mark.parametrize("as_chat", [False, True])
def test_each_question_has_its_own_prompt(as_chat: bool) -> None:
    prompt = Prompt(TEMPLATES["closed-book"], Nearest(POOL, 1), chat if as_chat else None)
    assert "answer 2" in prompt.text("Which river reaches the sea?")
    assert "answer 1" in prompt.text("Who wrote a symphony?")


@pytest.fixture
def places(tmp_path: Path) -> Places:
    rows = [
        {"id": str(n), "question": question, "answers": [f"answer {n}", "other"], "title": "T", "passage": f"text {n}"}
        for n, question in enumerate(QUESTIONS)
    ]
    rows.append({"id": "none", "question": "what", "answers": [], "title": "", "passage": ""})
    lines = [json.dumps(row | {"source": "a" if n < 3 else "b", "positive_ids": ["9"]}) for n, row in enumerate(rows)]
    (tmp_path / "examples.jsonl").write_text("\n".join(lines))
    return Places(data=tmp_path)


def test_a_pool_is_read_from_a_file_of_reading_examples(places: Places) -> None:
    """Examples without an answer are none; named sources alone; passages need not be at hand."""
    file = places.file("data:examples.jsonl")
    pool = [solved(example) for example in read_solved(file)]
    assert [(one.question, one.answer) for one in pool] == [(one.question, one.answer) for one in POOL]
    assert pool[1].passage is not None and (pool[1].passage.title, pool[1].passage.text) == ("T", "text 1")
    assert [example.id for example in read_solved(file, sources=("b",))] == ["3"]
    assert solved(next(read_solved(file)), with_passage=False).passage is None


def test_a_recipe_names_the_pool_and_how_to_choose(places: Places) -> None:
    pool = config.DemonstrationPool(file="data:examples.jsonl", count=2, passages=False)
    drawn = build_demonstrations(pool, places)
    assert drawn == draw(POOL, 2, 0)
    nearest = build_demonstrations(pool.model_copy(update={"choose": "similar"}), places)
    assert callable(nearest) and nearest("Which river flows through Rome?") == (POOL[0], POOL[2])
