"""Training examples: a question, its answers, the passage that holds one, and passages that may be taken for it.

One file format for readers and re-rankers: jsonl (may be gzipped) with question, answers, title, passage, positive_ids,
negative_ids, source. DPR's training json is read too (`odqa.corpus.dpr_training`). Mined rankings (`odqa mine`) come
beside it: what a pipeline really finds for each question.
"""

import gzip
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from odqa.errors import DataError
from odqa.types import Passage

UNANSWERABLE = "unanswerable"  # the source of examples without an answer


@dataclass(frozen=True, slots=True)
class Ranking:
    """What a pipeline found for a question, best first. `holds[i]`: passage i holds an answer (has_answer)."""

    ids: tuple[str, ...]
    scores: tuple[float, ...]
    holds: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A question whose answer stands in `passage`.

    `positives` are that passage and others known to answer; `negatives` hold no answer, hardest first. `ranking` is
    what was mined for the question (passages and scores, positives among them), empty if nothing was.
    """

    id: str
    question: str
    answers: tuple[str, ...]
    passage: Passage
    positives: tuple[Passage, ...]
    negatives: tuple[Passage, ...]
    source: str
    ranking: tuple[Passage, ...] = ()
    scores: tuple[float, ...] = ()
    holds: tuple[bool, ...] = ()


class Epochs:
    """Which examples make a batch: `epochs(i)` are the numbers of the i-th batch's.

    An epoch is a permutation of all of them, drawn by seed and epoch alone; a source's rows are in it as often as
    `weights` says (1 if not named). What is left over at its end is not used. DataError if weights leave nothing.
    """

    def __init__(
        self, examples: Sequence[Example], size: int, *, weights: Mapping[str, int] | None = None, seed: int = 0
    ) -> None:
        self._seed = seed
        times = [(weights or {}).get(example.source, 1) for example in examples]
        self._pool = np.repeat(np.arange(len(examples)), times)
        if not len(self._pool):
            raise DataError("training: source_weights leave no example.")
        #: Examples a batch: all of them if there are fewer than were asked for.
        self.size = min(size, len(self._pool))
        self.per_epoch = len(self._pool) // self.size
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)

    def __call__(self, index: int) -> list[int]:
        epoch, number = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self._seed, 1, epoch]).permutation(self._pool)
        chosen: list[int] = self._order[number * self.size :][: self.size].tolist()
        return chosen


def read_examples(
    path: Path,
    passages: Mapping[str, Passage],
    mined: Mapping[str, Ranking] | None = None,
    *,
    unranked: bool = False,
) -> Iterator[Example]:
    """The rows of a training file.

    With `mined` only questions that have a ranking are given (with `unranked` the others too), and its passages without
    an answer stand before those of negative_ids. A mined passage that has an answer but is not known to be right is
    neither positive nor negative. A `.json` file (or `.json.gz`) is DPR's training json, which brings its own passages;
    a ranking is then added to its negatives in the same way.
    Raises DataError with file and line for a row that lacks a field or names a passage that `passages` does not have.
    """

    def example(row: Mapping[str, Any]) -> Example | None:
        ranking = mined.get(str(row["id"])) if mined is not None else None
        if mined is not None and ranking is None and not unranked:
            return None
        return _example(row, passages, ranking)

    if path.name.removesuffix(".gz").endswith(".json"):
        yield from _dpr_examples(path, passages, mined, unranked=unranked)
    else:
        yield from _read_rows(path, example)


def read_solved(path: Path, *, sources: Collection[str] = ()) -> Iterator[Example]:
    """The rows of a training file that have an answer, each with its own passage alone; of `sources` if any are named.

    Raises DataError with file and line for a row that lacks a field.
    """

    def example(row: Mapping[str, Any]) -> Example | None:
        found = _example({**row, "positive_ids": [], "negative_ids": []}, {}, None)
        return found if found.answers and (not sources or found.source in sources) else None

    yield from _read_rows(path, example)


def read_unanswerable(
    path: Path, passages: Mapping[str, Passage], *, split: str, avoid: Collection[str] = ()
) -> Iterator[Example]:
    """Questions that no passage of their paragraph answers (SQuAD 2.0): examples without answers, whose ranking is it.

    Rows are jsonl (may be gzipped) with id, question, passage_ids and squad_split; those of another `split` and those
    about a passage in `avoid` are left out. Raises DataError with file and line for a row that lacks a field or names
    an unknown passage.
    """

    def example(row: Mapping[str, Any]) -> Example | None:
        ids = [str(pid) for pid in row["passage_ids"]]
        if row["squad_split"] != split or not ids or any(pid in avoid for pid in ids):
            return None
        own = tuple(passages[pid] for pid in ids)
        zeros, nothing = (0.0,) * len(own), (False,) * len(own)
        return Example(str(row["id"]), row["question"], (), own[0], (), own, UNANSWERABLE, own, zeros, nothing)

    yield from _read_rows(path, example)


def _read_rows(path: Path, example: Callable[[Mapping[str, Any]], Example | None]) -> Iterator[Example]:
    """What `example` makes of the rows of a jsonl file, None left out; a KeyError becomes a DataError with the line."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                found = example(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}).") from error
            except KeyError as error:
                raise DataError(
                    f"{path}, line {number}: {error} is neither a field of the row nor a known passage."
                ) from error
            if found is not None:
                yield found


def _example(row: Mapping[str, object], passages: Mapping[str, Passage], found: Ranking | None) -> Example:
    question, answers = str(row["question"]), tuple(str(answer) for answer in _list(row["answers"]))
    right = [passages[str(pid)] for pid in _list(row.get("positive_ids"))]
    # The first positive is the row's own passage, under its number in the collection where it has one.
    text, title = str(row["passage"]), str(row["title"])
    own = next((p for p in right if p.text == text), Passage(f"{row['id']}/gold", text, title))
    positives = (own, *(p for p in right if p is not own))
    negatives = tuple(passages[str(pid)] for pid in _list(row.get("negative_ids")))
    source = str(row.get("source", ""))
    example = Example(str(row["id"]), question, answers, own, positives, negatives, source)
    return example if found is None else _with_ranking(example, passages, found)


def _with_ranking(example: Example, passages: Mapping[str, Passage], found: Ranking) -> Example:
    """The example with its mined ranking, whose passages without an answer are the first negatives."""
    ranking = tuple(passages[pid] for pid in found.ids)
    taken = {p.id for p in example.positives}
    hard = [p for p, holds in zip(ranking, found.holds, strict=True) if not holds and p.id not in taken]
    known = {p.id for p in hard}
    negatives = (*hard, *(p for p in example.negatives if p.id not in known))
    return replace(example, negatives=negatives, ranking=ranking, scores=found.scores, holds=found.holds)


def _dpr_examples(
    path: Path, passages: Mapping[str, Passage], mined: Mapping[str, Ranking] | None, *, unranked: bool
) -> Iterator[Example]:
    from odqa.corpus.dpr_training import read_dpr_training

    for example in read_dpr_training(path):
        found = mined.get(example.id) if mined is not None else None
        if found is not None:
            try:
                yield _with_ranking(example, passages, found)
            except KeyError as error:
                raise DataError(f"{path}: record {example.id}: {error} is no known passage.") from error
        elif mined is None or unranked:
            yield example


def _list(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else []


def read_rankings(folder: Path) -> dict[str, Ranking]:
    """The rankings of an artifact of `odqa mine`, by question id."""
    found = {}
    for part in sorted(folder.glob("part-*.jsonl")):
        with part.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                found[row["id"]] = Ranking(tuple(row["ids"]), tuple(row["scores"]), tuple(row["holds"]))
    return found


def write_rankings(path: Path, rankings: Mapping[str, Ranking]) -> None:
    """One jsonl line a question: {"id", "ids", "scores", "holds"}, scores with six significant digits."""
    with path.open("w", encoding="utf-8") as file:
        for question_id, ranking in rankings.items():
            row = {
                "id": question_id,
                "ids": ranking.ids,
                "scores": [float(f"{score:.6g}") for score in ranking.scores],
                "holds": ranking.holds,
            }
            file.write(json.dumps(row, separators=(",", ":")) + "\n")
