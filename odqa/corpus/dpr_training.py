"""DPR's training files (biencoder-nq-train.json and its kin), read as our training examples and written from them.

One JSON list of {"dataset", "question", "answers", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"}; a passage
is {"title", "text", "score", "title_score", "passage_id"}, older files call the last "psg_id". Source:
facebookresearch/DPR, README ("Retriever input data format") and dpr/data/biencoder_data.py.

Our examples have one list of negatives, hardest first: DPR's hard negatives stand before its others there, and all are
hard negatives in a file that is written.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from odqa.corpus.examples import Example
from odqa.corpus.io import writing
from odqa.corpus.json_stream import stream_records
from odqa.errors import DataError
from odqa.types import Passage

_LISTS = ("positive_ctxs", "hard_negative_ctxs", "negative_ctxs")
_IDS = ("passage_id", "psg_id", "id")


def read_dpr_training(path: Path) -> Iterator[Example]:
    """The samples that have a positive passage, one at a time; the others are left out, as DPR leaves them out.

    The id is the sample's number from 1, `passage` the first positive. A passage without an id is called after its
    place: "12/hard_negative_ctxs/0". Raises DataError with file and record for a sample that lacks a field.
    """
    path = Path(path)
    for record in stream_records(path):
        where = f"{path}: record {record.number}"
        sample = record.value
        if not isinstance(sample, dict) or not isinstance(sample.get("question"), str):
            raise DataError(f"{where}: expected an object with a string under question. Is this a DPR training file?")
        lists = {name: _passages(sample, name, record.number, where) for name in _LISTS}
        positives = lists["positive_ctxs"]
        if not positives:
            continue
        answers = sample.get("answers", [])
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{where}: answers must be a list of strings.")
        known = {passage.id for passage in positives}
        negatives = {p.id: p for name in _LISTS[1:] for p in lists[name] if p.id not in known}  # each once, in order
        yield Example(
            str(record.number),
            sample["question"],
            tuple(answers),
            positives[0],
            positives,
            tuple(negatives.values()),
            str(sample.get("dataset", "")),
        )


def save_dpr_training(path: Path, examples: Iterable[Example]) -> int:
    """Write examples as a DPR training file, one at a time; how many. `read_dpr_training` gives the same passages back.

    Scores are those of the mined ranking where the example has one, else 0; DPR reads texts and titles alone.
    """
    count = 0
    with writing(path) as file:
        file.write("[")
        for count, example in enumerate(examples, 1):
            scores = dict(zip((p.id for p in example.ranking), example.scores, strict=False))
            sample = {
                "dataset": example.source,
                "question": example.question,
                "answers": list(example.answers),
                "positive_ctxs": [_to_json(passage, scores) for passage in example.positives],
                "negative_ctxs": [],
                "hard_negative_ctxs": [_to_json(passage, scores) for passage in example.negatives],
            }
            file.write(("," if count > 1 else "") + "\n" + json.dumps(sample, ensure_ascii=False))
        file.write("\n]\n")
    return count


def _passages(sample: Mapping[str, Any], name: str, number: int, where: str) -> tuple[Passage, ...]:
    found = sample.get(name, [] if name != "positive_ctxs" else None)
    if not isinstance(found, list):
        raise DataError(f"{where}: expected a list of passages under {name}, found {type(found).__name__}.")
    passages = []
    for place, item in enumerate(found):
        text, title = (item.get("text"), item.get("title", "")) if isinstance(item, dict) else (None, None)
        if not isinstance(text, str) or not isinstance(title, str | None):
            raise DataError(f"{where}: passage {place} of {name} lacks a text or has a title that is no string.")
        given = next((str(item[key]) for key in _IDS if item.get(key) not in (None, "")), f"{number}/{name}/{place}")
        passages.append(Passage(given, text, title or ""))
    return tuple(passages)


def _to_json(passage: Passage, scores: Mapping[str, float]) -> dict[str, Any]:
    score = scores.get(passage.id, 0.0)
    return {
        "title": passage.title,
        "text": passage.text,
        "score": score,
        "title_score": 0,
        "passage_id": passage.id,
    }
