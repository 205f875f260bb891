"""Training examples and mined rankings as files."""

import gzip
import json
from pathlib import Path

import pytest

from odqa.corpus.examples import (
    Epochs,
    Example,
    Ranking,
    read_examples,
    read_rankings,
    read_unanswerable,
    write_rankings,
)
from odqa.errors import DataError
from odqa.types import Passage

PASSAGES = {name: Passage(name, text, "t") for name, text in {"7": "x", "8": "the tiber", "9": "y", "5": "z"}.items()}
ROW = {
    "id": 1,
    "question": "q",
    "answers": ["tiber"],
    "title": "t",
    "passage": "the tiber",
    "positive_ids": [8, 5],
    "negative_ids": [7, 9],
    "source": "s",
}


def test_the_rows_own_passage_is_the_first_positive_under_its_number(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps(ROW) + "\n" + json.dumps(ROW | {"id": 2, "positive_ids": []}) + "\n")
    first, second = read_examples(tmp_path / "train.jsonl.gz", PASSAGES)
    assert [p.id for p in first.positives] == ["8", "5"] and first.passage is PASSAGES["8"]
    assert [p.id for p in first.negatives] == ["7", "9"] and first.ranking == ()
    assert second.positives == (Passage("2/gold", "the tiber", "t"),)


def test_mined_passages_without_an_answer_stand_first_among_negatives(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | {"id": 2}) + "\n")
    ranking = Ranking(("9", "8", "5"), (3.0, 2.0, 1.0), (False, True, True))
    (example,) = read_examples(tmp_path / "train.jsonl", PASSAGES, {"1": ranking})  # question 2 was not mined
    assert [p.id for p in example.negatives] == ["9", "7"]
    assert [p.id for p in example.ranking] == ["9", "8", "5"]
    assert example.scores == ranking.scores and example.holds == ranking.holds


def test_a_mined_passage_with_an_answer_is_no_negative_though_it_is_no_known_positive(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW | {"positive_ids": [8]}) + "\n")
    ranking = Ranking(("5", "9"), (3.0, 2.0), (True, False))
    (example,) = read_examples(tmp_path / "train.jsonl", PASSAGES, {"1": ranking})
    assert [p.id for p in example.positives] == ["8"] and [p.id for p in example.negatives] == ["9", "7"]


def test_reading_examples_names_the_line_that_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({"id": "2"}) + "\n")
    examples = read_examples(tmp_path / "train.jsonl", PASSAGES)
    assert next(examples).negatives[0] == PASSAGES["7"]
    with pytest.raises(DataError, match=r"train.jsonl, line 2: 'question'"):
        next(examples)


def test_rankings_come_back_as_they_were_written(tmp_path: Path) -> None:
    rankings = {f"q{i}": Ranking((f"{i}", "x"), (i + 0.25, -1.5), (True, False)) for i in range(5)}
    first, second = dict(list(rankings.items())[:2]), dict(list(rankings.items())[2:])
    write_rankings(tmp_path / "part-00000.jsonl", first)
    write_rankings(tmp_path / "part-00001.jsonl", second)
    assert read_rankings(tmp_path) == rankings


def test_unanswerable_questions_of_a_split_without_those_about_passages_to_avoid(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "question": "q", "answers": [], "squad_split": "train", "passage_ids": [7, 9]},
        {"id": "b", "question": "q", "answers": [], "squad_split": "dev", "passage_ids": [7]},
        {"id": "c", "question": "q", "answers": [], "squad_split": "train", "passage_ids": [7, 8]},
    ]
    (tmp_path / "none.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (example,) = read_unanswerable(tmp_path / "none.jsonl", PASSAGES, split="train", avoid={"8"})
    assert example.id == "a" and example.answers == () and example.positives == ()
    assert [p.id for p in example.ranking] == ["7", "9"] and example.holds == (False, False)
    rows[0]["passage_ids"] = [77]
    (tmp_path / "none.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"none.jsonl, line 1: '77'"):
        list(read_unanswerable(tmp_path / "none.jsonl", PASSAGES, split="train"))


def test_an_epoch_has_each_example_as_often_as_its_source_weighs() -> None:
    passage = Passage("p", "text")
    examples = [Example(str(n), "q", ("a",), passage, (), (), "rare" if n < 2 else "common") for n in range(5)]
    epochs = Epochs(examples, 3, weights={"rare": 3}, seed=7)
    # 2 * 3 + 3 * 1 = 9 places, 3 a batch
    assert epochs.per_epoch == 3
    first = [number for batch in range(3) for number in epochs(batch)]
    assert sorted(first) == [0, 0, 0, 1, 1, 1, 2, 3, 4]
    assert [number for batch in range(3, 6) for number in epochs(batch)] != first
    assert Epochs(examples, 3, weights={"rare": 3}, seed=7)(1) == first[3:6]
    assert sorted(Epochs(examples, 99)(4)) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match="leave no example"):
        Epochs(examples, 3, weights={"rare": 0, "common": 0})
