"""DPR's training json as our examples, and back."""

import json
from pathlib import Path
from typing import Any

import pytest

from odqa.corpus.dpr_training import read_dpr_training, save_dpr_training
from odqa.corpus.examples import Example, Ranking, read_examples
from odqa.errors import DataError
from odqa.types import Passage


def ctx(passage_id: str, text: str, title: str = "t", key: str = "passage_id") -> dict[str, Any]:
    return {"title": title, "text": text, "score": 1000, "title_score": 1, key: passage_id}


# As in biencoder-nq-train.json, with what its older form calls psg_id.
SAMPLE = {
    "dataset": "nq_train_psgs_w100",
    "question": "big little lies season 2 how many episodes",
    "answers": ["seven"],
    "positive_ctxs": [ctx("18768923", "seven episodes", "Big Little Lies"), ctx("18768924", "also seven")],
    "negative_ctxs": [ctx("3", "far"), ctx("18768923", "seven episodes")],
    "hard_negative_ctxs": [ctx("2", "near", key="psg_id"), {"title": "", "text": "no id"}],
}


def write(path: Path, *samples: object) -> Path:
    path.write_text(json.dumps(samples, indent=4), encoding="utf-8")
    return path


def test_a_sample_becomes_an_example_hard_negatives_first(tmp_path: Path) -> None:
    (example,) = read_dpr_training(write(tmp_path / "train.json", SAMPLE))
    assert (example.id, example.question, example.answers) == ("1", SAMPLE["question"], ("seven",))
    assert example.passage == Passage("18768923", "seven episodes", "Big Little Lies") == example.positives[0]
    assert [p.id for p in example.positives] == ["18768923", "18768924"]
    # A passage without an id is called after its place; a negative that is also a positive is none.
    assert [p.id for p in example.negatives] == ["2", "1/hard_negative_ctxs/1", "3"]
    assert example.source == "nq_train_psgs_w100"


def test_samples_without_a_positive_are_left_out_and_ids_stay_their_numbers(tmp_path: Path) -> None:
    file = write(tmp_path / "train.json", SAMPLE | {"positive_ctxs": []}, SAMPLE)
    assert [example.id for example in read_dpr_training(file)] == ["2"]


def test_written_examples_are_read_back(tmp_path: Path) -> None:
    (example,) = read_dpr_training(write(tmp_path / "train.json", SAMPLE))
    mined = Example(
        "2", "q", ("a", "b"), example.passage, (example.passage,), (), "mined", example.negatives[:1], (0.5,)
    )
    assert save_dpr_training(tmp_path / "again.json.gz", [example, mined]) == 2
    again = list(read_dpr_training(tmp_path / "again.json.gz"))
    assert again[0] == example
    assert (again[1].positives, again[1].negatives) == ((example.passage,), ())


def test_what_is_written_has_dprs_keys(tmp_path: Path) -> None:
    """dpr/data/biencoder_data.py reads question, the three lists, and text and title of each passage."""
    save_dpr_training(tmp_path / "again.json", read_dpr_training(write(tmp_path / "train.json", SAMPLE)))
    (sample,) = json.loads((tmp_path / "again.json").read_text())
    assert set(sample) == set(SAMPLE)
    assert sample["positive_ctxs"][0] == ctx("18768923", "seven episodes", "Big Little Lies") | {
        "score": 0.0,
        "title_score": 0,
    }


def test_a_json_file_is_read_where_training_examples_are(tmp_path: Path) -> None:
    file = write(tmp_path / "train.json", SAMPLE, SAMPLE | {"question": "another"})
    assert list(read_examples(file, {})) == list(read_dpr_training(file))
    passages = {"9": Passage("9", "mined"), "18768923": Passage("18768923", "seven episodes", "Big Little Lies")}
    mined = {"2": Ranking(("18768923", "9"), (2.0, 1.0), (True, False))}
    (example,) = read_examples(file, passages, mined)
    assert example.question == "another" and example.scores == (2.0, 1.0)
    assert [p.id for p in example.negatives] == ["9", "2", "2/hard_negative_ctxs/1", "3"]
    assert len(list(read_examples(file, passages, mined, unranked=True))) == 2
    with pytest.raises(DataError, match="record 2: '18768923' is no known passage"):
        list(read_examples(file, {}, mined))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ([1], "record 1: expected an object with a string under question. Is this a DPR training file"),
        ({"question": "q"}, "record 1: expected a list of passages under positive_ctxs, found NoneType"),
        (SAMPLE | {"negative_ctxs": {}}, "record 1: expected a list of passages under negative_ctxs, found dict"),
        (SAMPLE | {"hard_negative_ctxs": [{"title": "x"}]}, "passage 0 of hard_negative_ctxs lacks a text"),
        (SAMPLE | {"answers": "seven"}, "record 1: answers must be a list of strings"),
    ],
)
def test_a_wrong_sample_is_one_line(tmp_path: Path, sample: object, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        list(read_dpr_training(write(tmp_path / "train.json", sample)))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
