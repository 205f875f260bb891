"""Rankings as other systems keep them: read one question at a time, written so that their scorers take them, judged.

    trec       `query Q0 passage rank score tag`, a line a passage: trec_eval, Pyserini, ir_measures
    dpr        a JSON list of {question, answers, ctxs: [{id, title, text, score, has_answer}]}: DPR's
               dense_retriever.py (save_results), FiD, Rankify
    pyserini   a JSON object: query id -> {question, answers, contexts: [{docid, score, text, has_answer}]}:
               pyserini/eval/convert_trec_run_to_dpr_retrieval_run.py, and evaluate_dpr_retrieval.py beside it
    flashrag   a JSON list of {id, question, golden_answers, output: {retrieval_result, pred}}: FlashRAG's
               intermediate_data.json (flashrag/dataset/dataset.py)

The order of a JSON list is its rank. In a TREC run the scores decide and ranks are not read, as in trec_eval; equal
scores keep the order of the file. Nothing here knows an index; numbers are made of the verdicts by `odqa.evaluate`.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, get_args

from odqa.corpus.io import join_contents, read_lines, read_trec_lines, split_contents, writing
from odqa.corpus.json_stream import stream_records
from odqa.errors import DataError
from odqa.text import Matcher, has_answer
from odqa.types import Passage

RunFormat = Literal["trec", "dpr", "pyserini", "flashrag"]
RUN_FORMATS: tuple[RunFormat, ...] = get_args(RunFormat)
TREC_SUFFIXES = (".trec", ".run", ".txt", ".res")

_STEP = 2.0**-20  # relative: below a sixth digit, above what a 32-bit float, which trec_eval holds, can tell apart


@dataclass(frozen=True, slots=True)
class RankedPassage:
    """A passage in a ranking; title, text and `holds` (has_answer) are None where the file says nothing."""

    id: str
    score: float
    title: str | None = None
    text: str | None = None
    holds: bool | None = None


@dataclass(frozen=True, slots=True)
class RankedQuestion:
    """What a system found for one question, best first; None: the file does not say. DPR's has no ids.

    `where` names file and record for messages. `prediction` is the answer of a system that also reads.
    """

    where: str
    id: str | None
    question: str | None
    answers: tuple[str, ...] | None
    passages: tuple[RankedPassage, ...]
    prediction: str | None = None


# --- reading ----------------------------------------------------------------------------------------------------------


def read_run(path: Path, *, tag: str | None = None) -> Iterator[RankedQuestion]:
    """The questions of a run file of any of these formats (gzipped or not), in its order, one in memory at a time.

    A name in .trec, .run, .res or .txt is a TREC run, of which `tag` keeps one tag; one in .json is told by the keys of
    its records, and .jsonl has such a record a line. Raises DataError with file and record for anything else, a missing
    file, a question or passage that comes twice, a score that is no number, and a run without questions.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: {'a folder, not a run file' if path.is_dir() else 'no such file'}.")
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix in TREC_SUFFIXES:
        questions = _read_trec(path, tag)
    elif suffix in (".json", ".jsonl"):
        questions = _read_json(path, is_lines=suffix == ".jsonl")
    else:
        raise DataError(
            f"{path}: unknown kind of run {suffix!r} (expected {', '.join(TREC_SUFFIXES)} for TREC's; .json or .jsonl "
            "for those of DPR, Pyserini and FlashRAG)."
        )
    return _checked(path, questions)


def _checked(path: Path, questions: Iterator[RankedQuestion]) -> Iterator[RankedQuestion]:
    seen: dict[str, str] = {}
    is_empty = True
    for found in questions:
        is_empty = False
        if found.id is not None:
            if found.id in seen:
                hint = f" Sort its lines by query: sort -s -k1,1 {path.name}" if "line" in found.where else ""
                raise DataError(f"{found.where}: question {found.id!r} comes again, after {seen[found.id]}.{hint}")
            seen[found.id] = found.where.rsplit(": ", 1)[-1]
        passages: set[str] = set()
        for passage in found.passages:
            if passage.id in passages:
                raise DataError(f"{found.where}: passage {passage.id!r} stands twice in one ranking.")
            passages.add(passage.id)
        yield found
    if is_empty:
        raise DataError(f"{path}: an empty run.")


def _read_trec(path: Path, tag: str | None) -> Iterator[RankedQuestion]:
    query_id: str | None = None
    first, passages = 0, list[RankedPassage]()

    def ranked() -> RankedQuestion:
        best = tuple(sorted(passages, key=lambda passage: -passage.score))  # stable
        return RankedQuestion(f"{path}: line {first}", query_id, None, None, best)

    tags: dict[str, None] = {}
    for number, columns in read_trec_lines(path):
        tags[columns[5]] = None
        if tag is not None and columns[5] != tag:
            continue
        if tag is None and len(tags) > 1:
            raise DataError(f"{path}: line {number}: a second run, {columns[5]!r}, begins. Name one of them: --tag.")
        if columns[0] != query_id:
            if query_id is not None:
                yield ranked()
            query_id, first, passages = columns[0], number, []
        passages.append(RankedPassage(columns[2], _score(columns[4], f"{path}: line {number}")))
    if query_id is not None:
        yield ranked()
    elif tags:
        raise DataError(f"{path}: no lines of tag {tag!r} (there is {', '.join(list(tags)[:5])}).")


def _read_json(path: Path, *, is_lines: bool) -> Iterator[RankedQuestion]:
    for place, key, value in _json_records(path, is_lines=is_lines):
        where = f"{path}: {place}"
        if not isinstance(value, dict):
            raise DataError(f"{where}: expected an object, found {type(value).__name__}.")
        kind = next((kind for mark, kind in _MARKS.items() if mark in value), None)
        if kind is None:
            found = ", ".join(value)[:100] or "nothing"
            raise DataError(f"{where}: none of {', '.join(_MARKS)} among its keys (found: {found}). Is this a run?")
        yield kind(value, key, where)


def _json_records(path: Path, *, is_lines: bool) -> Iterator[tuple[str, str | None, Any]]:
    if not is_lines:
        for record in stream_records(path):
            yield f"record {record.number}", record.key, record.value
        return
    for number, line in read_lines(path):
        if line.strip():
            try:
                yield f"record {number}", None, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError(f"{path}: record {number}: not JSON ({error}).") from error


def _from_dpr(value: Mapping[str, Any], key: str | None, where: str) -> RankedQuestion:
    return RankedQuestion(
        where,
        key if key is not None else _optional_id(value, where),
        _text(value, "question", where),
        _answers(value, "answers", where),
        _passages(value["ctxs"], "ctxs", ("id", "passage_id"), where),
    )


def _from_pyserini(value: Mapping[str, Any], key: str | None, where: str) -> RankedQuestion:
    return RankedQuestion(
        where,
        key,
        _text(value, "question", where),
        _answers(value, "answers", where),
        _passages(value["contexts"], "contexts", ("docid",), where),
    )


def _from_flashrag(value: Mapping[str, Any], key: str | None, where: str) -> RankedQuestion:
    output = value["output"]
    if not isinstance(output, dict):
        raise DataError(f"{where}: expected an object under output, found {type(output).__name__}.")
    found = output.get("retrieval_result", [])
    prediction = output.get("pred")
    return RankedQuestion(
        where,
        key if key is not None else _optional_id(value, where),
        _text(value, "question", where),
        _answers(value, "golden_answers", where),
        _passages(found, "output.retrieval_result", ("id",), where),
        prediction=None if prediction is None else str(prediction),
    )


_MARKS: Mapping[str, Callable[[Mapping[str, Any], str | None, str], RankedQuestion]] = {
    "ctxs": _from_dpr,
    "contexts": _from_pyserini,
    "output": _from_flashrag,
}


def _passages(found: Any, name: str, id_keys: Sequence[str], where: str) -> tuple[RankedPassage, ...]:
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise DataError(f"{where}: expected a list of passages under {name}.")
    return tuple(_passage(item, place, f"{where}: {name}[{place}]", id_keys) for place, item in enumerate(found))


def _passage(item: Mapping[str, Any], place: int, where: str, id_keys: Sequence[str]) -> RankedPassage:
    given = next((item[key] for key in id_keys if key in item), None)
    if type(given) not in (str, int) or given == "":
        raise DataError(f"{where}: no id (expected a string or a whole number under {id_keys[0]}, found {given!r}).")
    score = _score(item["score"], where) if item.get("score") is not None else -float(place + 1)
    title, text = item.get("title"), item.get("text")
    joint = text if "docid" in item else item.get("contents") if text is None else None
    if isinstance(joint, str):
        split_title, text = split_contents(joint)
        title = title or split_title
    if not isinstance(title, str | None) or not isinstance(text, str | None):
        raise DataError(f"{where}: title and text must be strings.")
    holds = item.get("has_answer")
    if not isinstance(holds, bool | None):
        raise DataError(f"{where}: has_answer must be true or false, found {holds!r}.")
    return RankedPassage(str(given), score, title, text, holds)


def _optional_id(value: Mapping[str, Any], where: str) -> str | None:
    given = value.get("id", value.get("q_id"))
    if given is not None and type(given) not in (str, int):
        raise DataError(f"{where}: the id must be a string or a whole number, found {given!r}.")
    return None if given is None else str(given)


def _text(value: Mapping[str, Any], key: str, where: str) -> str | None:
    found = value.get(key)
    if not isinstance(found, str | None):
        raise DataError(f"{where}: expected a string under {key}, found {type(found).__name__}.")
    return found


def _answers(value: Mapping[str, Any], key: str, where: str) -> tuple[str, ...] | None:
    found = value.get(key)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(answer, str) for answer in found):
        raise DataError(f"{where}: {key} must be a list of strings.")
    return tuple(found)


def _score(given: Any, where: str) -> float:
    try:
        score = float(given)
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{where}: the score {given!r} is not a finite number.")
    return score


# --- judging ----------------------------------------------------------------------------------------------------------


class Judge:
    """Finds where in a ranking the first passage with an answer stands; counts what the file itself says otherwise.

    Texts are those of the file, else those of `text_of` (by passage id; None: there is no index). Where neither has
    one, the file's has_answer is believed.
    """

    def __init__(self, matcher: Matcher, text_of: Callable[[str], str] | None = None) -> None:
        self._matcher, self._text_of = matcher, text_of
        self.looked_at = 0  # passages that were matched against answers
        self.believed = 0  # passages without a text, of which has_answer was taken as it stands
        self.differing = 0  # passages whose has_answer in the file is not ours

    def rank(self, found: RankedQuestion, answers: Sequence[str]) -> int | None:
        """The rank from 1, None if no passage holds an answer. DataError for a passage of which nothing is known."""
        if not answers:
            return None
        holding = (place for place, passage in enumerate(found.passages, 1) if self._holds(passage, found, answers))
        return next(holding, None)

    def _holds(self, passage: RankedPassage, found: RankedQuestion, answers: Sequence[str]) -> bool:
        self.looked_at += 1
        text = passage.text if passage.text is not None else self._text_of(passage.id) if self._text_of else None
        if text is not None:
            holds = has_answer(text, answers, self._matcher)
            self.differing += passage.holds not in (None, holds)
            return holds
        if passage.holds is None:
            raise DataError(
                f"{found.where}: passage {passage.id!r} has neither a text nor has_answer. Name the index that has its "
                "text: --index"
            )
        self.believed += 1
        return passage.holds

    @property
    def notes(self) -> list[str]:
        """What a reader of the numbers should know."""
        notes = []
        if self.differing:
            notes.append(
                f"has_answer in the file is not ours for {self.differing} of {self.looked_at} passages looked at; ours "
                "counts"
            )
        if self.believed:
            notes.append(f"{self.believed} of {self.looked_at} passages have no text: has_answer is the file's")
        return notes


# --- writing ----------------------------------------------------------------------------------------------------------


def save_ranked(
    path: Path,
    questions: Iterable[RankedQuestion],
    run_format: RunFormat,
    *,
    tag: str = "odqa",
    matcher: Matcher = "string",
) -> int:
    """Write rankings as another system's scorer reads them, one question at a time; how many questions.

    `tag` names a TREC run. The JSON formats need ids, questions, answers and texts; has_answer is computed from the
    text where it is not given. TREC scores fall strictly: one that does not lie below the one before it (a tie, or a
    passage that a re-ranker did not score) is lowered by a millionth, so that who sorts by score finds our order.
    Raises DataError for what a format cannot hold: an id with blanks in a TREC run, a question without answers or text
    in the others.
    """
    count = 0
    with writing(Path(path)) as file:
        if run_format == "trec":
            for found in questions:
                _write_trec(file, found, tag)
                count += 1
            return count
        opening, closing = ("{", "}") if run_format == "pyserini" else ("[", "]")
        file.write(opening)
        for count, found in enumerate(questions, 1):
            record = _TO_JSON[run_format](found, _known_answers(found), matcher)
            key = f"{json.dumps(found.id, ensure_ascii=False)}: " if run_format == "pyserini" else ""
            file.write(("," if count > 1 else "") + "\n" + key + json.dumps(record, ensure_ascii=False))
        file.write(f"\n{closing}\n")
    return count


def _write_trec(file: IO[str], found: RankedQuestion, tag: str) -> None:
    for name in (found.id or "", tag, *(passage.id for passage in found.passages)):
        if not name or name.split() != [name]:
            raise DataError(f"{found.where}: {name!r} cannot stand in a TREC run, whose columns are parted by blanks.")
    before = math.inf
    for rank, passage in enumerate(found.passages, 1):
        before = min(passage.score, before - max(abs(before) * _STEP, 1e-9)) if rank > 1 else passage.score
        file.write(f"{found.id} Q0 {passage.id} {rank} {before:.9g} {tag}\n")


def _known_answers(found: RankedQuestion) -> tuple[str, ...]:
    if found.id is None or found.question is None or found.answers is None:
        raise DataError(f"{found.where}: this format holds ids, questions and answers; name the question file.")
    return found.answers


def _to_dpr(found: RankedQuestion, answers: Sequence[str], matcher: Matcher) -> dict[str, Any]:
    contexts = [
        {
            "id": passage.id,
            "title": passage.title or "",
            "text": _text_of(passage, found),
            "score": f"{passage.score:.9g}",  # a string, as DPR writes it
            "has_answer": _holds(passage, found, answers, matcher),
        }
        for passage in found.passages
    ]
    return {"id": found.id, "question": found.question, "answers": list(answers), "ctxs": contexts}


def _to_pyserini(found: RankedQuestion, answers: Sequence[str], matcher: Matcher) -> dict[str, Any]:
    contexts = [
        {
            "docid": passage.id,
            "score": f"{passage.score:.9g}",
            # Its scorer takes the second line for the text, so that neither part may have line breaks of its own.
            "text": f'"{_one_line(passage.title or "")}"\n{_one_line(_text_of(passage, found))}',
            "has_answer": _holds(passage, found, answers, matcher),
        }
        for passage in found.passages
    ]
    return {"question": found.question, "answers": list(answers), "contexts": contexts}


def _to_flashrag(found: RankedQuestion, answers: Sequence[str], matcher: Matcher) -> dict[str, Any]:
    passages = [
        {
            "id": passage.id,
            "contents": join_contents(Passage(passage.id, _text_of(passage, found), passage.title or "")),
            "score": float(f"{passage.score:.9g}"),
        }
        for passage in found.passages
    ]
    output: dict[str, Any] = {"retrieval_result": passages}
    if found.prediction is not None:
        output["pred"] = found.prediction
    return {"id": found.id, "question": found.question, "golden_answers": list(answers), "output": output}


_TO_JSON: Mapping[str, Callable[[RankedQuestion, Sequence[str], Matcher], dict[str, Any]]] = {
    "dpr": _to_dpr,
    "pyserini": _to_pyserini,
    "flashrag": _to_flashrag,
}


def _text_of(passage: RankedPassage, found: RankedQuestion) -> str:
    if passage.text is None:
        raise DataError(f"{found.where}: passage {passage.id!r} has no text; name the index that has it.")
    return passage.text


def _holds(passage: RankedPassage, found: RankedQuestion, answers: Sequence[str], matcher: Matcher) -> bool:
    return passage.holds if passage.holds is not None else has_answer(_text_of(passage, found), answers, matcher)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())
