"""The run folder: what a pipeline answered, and everything that led there, one JSON line a question.

    answers.jsonl   {"id", "text", "score", "candidates", "passage_ids"}: the last answer, the passages it was read
                    from; "confidence" beside "score" if the reader is calibrated
    traces.jsonl    the whole `Trace` but for its seconds; the text of packed passages is stored once a trace, so that
                    scoring and explaining what the reader saw need no index
    timings.jsonl   {"id", "steps": [{"stage", "pass", "seconds", "batch"}]}: all that may differ between two equal
                    runs; seconds are null where a stage's result was taken from another run
    manifest.json   recipe, inputs, hashes of the first two files, seconds per stage, peak memory (`odqa.artifacts`)
    scores.json     written by the evaluation, after the run

No gold answer is ever in the first four. A run grows batch by batch in the artifact's hidden partial folder, with an
fsync a batch. Reopened after a kill, the three files are cut back to their longest common beginning of whole lines, and
the questions that remain are skipped. At the end the lines stand in question order: a run that was killed and resumed
has the same bytes in answers.jsonl and traces.jsonl as one that was not.

Scores are written with six significant digits, numbers that JSON lacks as "-inf", "inf" and "nan".
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import Any, BinaryIO

import odqa
from odqa.artifacts import MANIFEST, Artifact, Draft, building, load_artifact, partial_path
from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.runtime import peak_memory_bytes
from odqa.types import Answer, Candidate, Dropped, Hit, PackedContext, Passage, Query, Step, Trace, as_recorded

KIND = "run"
ANSWERS, TRACES, TIMINGS, SCORES = "answers.jsonl", "traces.jsonl", "timings.jsonl", "scores.json"
_IN_STEP = (ANSWERS, TRACES, TIMINGS)  # line n of each belongs to the same question
_IDENTITY = "identity.json"  # in a partial folder: what is being run, in words, for the message of a mismatch

Json = dict[str, Any]


# --- a finished run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Run:
    """A finished run; its files are read when asked for, one line at a time."""

    artifact: Artifact

    @property
    def path(self) -> Path:
        return self.artifact.path

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.artifact.manifest

    def answers(self) -> Iterator[Json]:
        """The records of answers.jsonl, in question order."""
        return _load_lines(self.path / ANSWERS)

    def traces(self) -> Iterator[Trace]:
        """The traces in question order; seconds are NaN where timings.jsonl is missing."""
        timings = self.path / TIMINGS
        times = _load_lines(timings) if timings.is_file() else iter(())
        for number, (record, timing) in enumerate(zip_longest(_load_lines(self.path / TRACES), times), start=1):
            if record is None or (timing is not None and timing["id"] != record["id"]):
                raise DataError(
                    f"{timings}: line {number} belongs to another run than {TRACES}. Delete {TIMINGS} to go on without."
                )
            try:
                yield trace_from_json(record, timing)
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise DataError(
                    f"{self.path / TRACES}: line {number} is not a trace of odqa ({error!r}). Run again."
                ) from error

    def trace(self, query_id: str) -> Trace:
        """One question's trace. Raises DataError if the run has no such question."""
        for trace in self.traces():
            if trace.query.id == query_id:
                return trace
        raise DataError(
            f"{self.path}: no question {query_id!r} in this run (it has {self.manifest['counts']['questions']})."
        )

    def scores(self) -> Json:
        """What scores.json holds. Raises DataError if the run has not been scored."""
        file = self.path / SCORES
        if not file.is_file():
            raise DataError(
                f"{self.path}: this run has not been scored ({SCORES} is missing). Score it with: odqa eval"
            )
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{file}: not JSON ({error}). Score the run again.") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{file}: holds a {type(record).__name__}, not the object of an evaluation. Score the run again."
            )
        return record

    def save_scores(self, scores: Mapping[str, Any]) -> Path:
        """Write scores.json; earlier scores are replaced in one move."""
        text = json.dumps(scores, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        return _replace_file(self.path / SCORES, text.encode())


def load_run(path: Path) -> Run:
    """Open a finished run folder. Raises ArtifactError for an unfinished one, ArtifactMismatch for another artifact."""
    return Run(load_artifact(Path(path), KIND))


def find_run(path: Path, *, recipe: Mapping[str, Any], inputs: Mapping[str, Any]) -> Run | None:
    """The finished run at `path`, or None if it is still to be made or finished.

    Raises ArtifactMismatch if what lies there, finished or not, is a run of another pipeline recipe, question file,
    index or version of odqa: a run is never overwritten by a different one.
    """
    path, wanted = Path(path), _identity(recipe, inputs)
    partial = partial_path(path) / _IDENTITY
    if partial.is_file():
        with contextlib.suppress(json.JSONDecodeError):
            _check_identity(f"{path}: the unfinished run here", json.loads(partial.read_text(encoding="utf-8")), wanted)
    if not (path / MANIFEST).is_file():
        return None
    run = load_run(path)
    found = _identity(run.manifest["recipe"], run.manifest["inputs"], run.manifest["odqa"])
    _check_identity(f"{path}: the run here", found, wanted)
    return run


# --- a run in the making ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def recording(
    path: Path, questions: Sequence[str], *, recipe: Mapping[str, Any], inputs: Mapping[str, Any]
) -> Iterator["RunWriter"]:
    """Make the run folder `path`, or continue an unfinished one; the folder is there once the block ends without error.

    `questions` are the ids of the question file in its order. `recipe` is the resolved pipeline, `inputs` names what it
    reads: `{"questions": {"name", "sha256"}, "index": hash, ...}`. Use it so:

        with recording(out, [query.id for query in queries], recipe=recipe, inputs=inputs) as writer:
            for batch in batches(query for query in queries if query.id not in writer.finished):
                writer.add(pipeline.answer(batch))

    Raises ArtifactMismatch as `find_run` does, ArtifactError if the run is finished already, DataError if at the end of
    the block a question has no trace.
    """
    path = Path(path)
    if find_run(path, recipe=recipe, inputs=inputs) is not None:
        raise ArtifactError(f"{path}: this run is finished. Read it, or choose another --out.")
    # Two equal runs have different seconds, so the manifest's hashes must not cover them.
    with building(path, KIND, recipe=recipe, inputs=inputs, scratch=(_IDENTITY,), unlisted=(TIMINGS,)) as draft:
        draft.write_json(_IDENTITY, _identity(recipe, inputs))
        with contextlib.closing(RunWriter(draft.path, questions)) as writer:
            yield writer
            writer.finish()
            _fill_manifest(draft, writer)


@dataclass(slots=True)
class StageTime:
    """What one stage took in a whole run: wall seconds summed over the questions' shares of their batches.

    `shared` of the `steps` were taken from another run and have no seconds.
    """

    seconds: float = 0.0
    steps: int = 0
    questions: int = 0
    shared: int = 0

    def to_json(self) -> Json:
        shared = {"shared": self.shared} if self.shared else {}
        return {"seconds": round(self.seconds, 6), "steps": self.steps, "questions": self.questions, **shared}


@dataclass(slots=True)
class Totals:
    """What the manifest says about the lines written so far."""

    stages: dict[str, StageTime] = field(default_factory=dict)
    abstained: int = 0
    passes: int = 0

    def add(self, answer: Json, trace: Json, timing: Json) -> None:
        self.abstained += answer["text"] == ""
        self.passes += len(trace["answers"])
        for step in timing["steps"]:
            total = self.stages.setdefault(step["stage"], StageTime())
            total.seconds += step["seconds"] or 0.0
            total.shared += step["seconds"] is None
            total.steps += 1
        for stage in {step["stage"] for step in timing["steps"]}:
            self.stages[stage].questions += 1


class RunWriter:
    """Appends traces to the three files of a folder and keeps them in step, whatever kills it.

    `finished` holds the ids whose lines are whole in all files. `measured` is for the caller: it goes into the
    manifest's `measured` as it is (device, number format).
    """

    def __init__(self, folder: Path, questions: Sequence[str]) -> None:
        """Open or reopen the files. Raises DataError if a question id occurs twice, or if a line is of no question."""
        self._rank = {query_id: rank for rank, query_id in enumerate(questions)}
        if len(self._rank) != len(questions):
            twice = next(query_id for rank, query_id in enumerate(questions) if self._rank[query_id] != rank)
            raise DataError(
                f"question id {twice!r} occurs more than once; answers could not be told apart. Make ids unique."
            )
        self._folder = folder
        self._lines: list[str] = []  # ids, in the order of the lines
        self.finished: set[str] = set()
        self.totals = Totals()
        self.measured: dict[str, Any] = {}
        self._cut_back()
        self._files: list[BinaryIO] = [(folder / name).open("ab") for name in _IN_STEP]

    def add(self, traces: Sequence[Trace]) -> None:
        """Append one batch and fsync it. Raises ValueError for an id that is unknown or written already."""
        ids = [trace.query.id for trace in traces]
        for place, query_id in enumerate(ids):
            if query_id not in self._rank:
                raise ValueError(f"a trace of question {query_id!r}, which is not one of the questions")
            if query_id in self.finished or query_id in ids[:place]:
                raise ValueError(f"a second trace of question {query_id!r}")
        records = [(answer_to_json(trace), trace_to_json(trace), timing_to_json(trace)) for trace in traces]
        blocks = [b"".join(_line(record[column]) for record in records) for column in range(len(_IN_STEP))]
        for file, block in zip(self._files, blocks, strict=True):  # every line is made before the first is written
            file.write(block)
            file.flush()
            os.fsync(file.fileno())
        for record in records:
            self._count(*record)

    def finish(self) -> None:
        """Put the lines in question order. Raises DataError if a question has none."""
        missing = [query_id for query_id in self._rank if query_id not in self.finished]
        if missing:
            counts = f"{len(missing)} of {len(self._rank)} questions have no answer yet"
            raise DataError(f"{counts} (first: {', '.join(missing[:3])}). Run again to go on.")
        self.close()
        order = sorted(range(len(self._lines)), key=lambda line: self._rank[self._lines[line]])
        if order == list(range(len(order))):
            return
        # A kill between two of these moves leaves files of different order. What they have in common at the beginning
        # is then all that the next try keeps: slow, never wrong.
        for name in _IN_STEP:
            lines = (self._folder / name).read_bytes().splitlines(keepends=True)
            _replace_file(self._folder / name, b"".join(lines[line] for line in order))

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _count(self, answer: Json, trace: Json, timing: Json) -> None:
        self._lines.append(answer["id"])
        self.finished.add(answer["id"])
        self.totals.add(answer, trace, timing)

    def _cut_back(self) -> None:
        """Cut the files back to the lines that all have, whole and of the same question, and count what is left."""
        ends = [0] * len(_IN_STEP)
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context((self._folder / name).open("a+b")) for name in _IN_STEP]
            for file in files:
                file.seek(0)
            while (records := [_whole_line(file) for file in files]) and all(records):
                answer, trace, timing = (record for record in records if record is not None)
                query_id = answer["id"]
                if not query_id == trace["id"] == timing["id"]:
                    break
                if query_id not in self._rank:
                    raise DataError(
                        f"{self._folder}: answers {query_id!r}, which is no question here. Delete the folder."
                    )
                self._count(answer, trace, timing)
                ends = [file.tell() for file in files]
            for file, end in zip(files, ends, strict=True):
                file.truncate(end)
                os.fsync(file.fileno())


def _whole_line(file: BinaryIO) -> Json | None:
    """The next line as a record with an id; None at the end, and for a line that a kill has torn."""
    line = file.readline()
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "id" in record else None


def _fill_manifest(draft: Draft, writer: RunWriter) -> None:
    totals = writer.totals
    draft.counts |= {"questions": len(writer.finished), "abstained": totals.abstained, "passes": totals.passes}
    draft.measured |= {
        "stages": {name: time.to_json() for name, time in totals.stages.items()},
        "peak_memory_bytes": peak_memory_bytes(),
        **writer.measured,
    }


def _identity(recipe: Mapping[str, Any], inputs: Mapping[str, Any], version: str = odqa.__version__) -> Json:
    """What a run is a run of, one level flat, as it looks after a way through JSON (tuples have become lists).

    Without `retrieval` and `ranking`, which follow from the other inputs and the recipe: see `odqa.replay`.
    """
    own = {name: value for name, value in inputs.items() if name not in ("retrieval", "ranking")}
    parts = {"recipe": recipe, "inputs": own}
    flat = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    identity: Json = json.loads(json.dumps({**flat, "odqa": version}))
    return identity


def _check_identity(what: str, found: Json, wanted: Json) -> None:
    differing = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if differing:
        raise ArtifactMismatch(
            f"{what} differs from this one in {', '.join(differing)}. Choose another --out, or delete it."
        )


# --- values as JSON ---------------------------------------------------------------------------------------------------


def answer_to_json(trace: Trace) -> Json:
    """The line of answers.jsonl: the last answer, and the ids of the last packed passages in reading order."""
    answer = trace.answer
    return {
        "id": trace.query.id,
        "text": answer.text,
        "score": _number(answer.score),
        **_confidence_to_json(answer),
        "candidates": [_candidate_to_json(candidate) for candidate in answer.candidates],
        "passage_ids": [hit.passage.id for hit in trace.contexts[-1].hits] if trace.contexts else [],
    }


def trace_to_json(trace: Trace) -> Json:
    """The line of traces.jsonl: all but seconds and batch sizes, which depend on the machine and on kills."""
    packed = dict.fromkeys(hit.passage for context in trace.contexts for hit in context.hits)
    number = {passage: place for place, passage in enumerate(packed)}
    return {
        "id": trace.query.id,
        "question": trace.query.text,
        "steps": [_step_to_json(step) for step in trace.steps],
        "answers": [
            {
                "text": answer.text,
                "score": _number(answer.score),
                **_confidence_to_json(answer),
                "passes": answer.passes,
                "candidates": [_candidate_to_json(candidate) for candidate in answer.candidates],
            }
            for answer in trace.answers
        ],
        "contexts": [
            {
                "text": context.text,
                "hits": [
                    {"passage": number[hit.passage], "score": _number(hit.score), "source": hit.source}
                    for hit in context.hits
                ],
                "ranks": list(context.ranks),
                **({"windows": list(context.windows)} if context.windows else {}),
                **({"candidates": list(context.candidates)} if context.candidates else {}),
                "tokens": context.tokens,
                "budget": context.budget,
                "dropped": [
                    {"id": item.passage_id, "reason": item.reason, "tokens": item.tokens} for item in context.dropped
                ],
            }
            for context in trace.contexts
        ],
        "passages": [{"id": passage.id, "title": passage.title, "text": passage.text} for passage in packed],
    }


def timing_to_json(trace: Trace) -> Json:
    """The line of timings.jsonl; seconds to the microsecond, null for NaN."""
    steps = [
        {
            "stage": step.stage,
            "pass": step.pass_no,
            "seconds": None if math.isnan(step.seconds) else round(step.seconds, 6),
            "batch": step.batch,
        }
        for step in trace.steps
    ]
    return {"id": trace.query.id, "steps": steps}


def trace_from_json(record: Json, timing: Json | None = None) -> Trace:
    """The trace of a line of traces.jsonl and its line of timings.jsonl (None: seconds are NaN, batches 0).

    Equal to what `trace_to_json` was given but for rounded scores and notes as JSON gives them back (tuples are lists).
    """
    query = Query(record["id"], record["question"])
    passages = [Passage(item["id"], item["text"], item["title"]) for item in record["passages"]]
    times = timing["steps"] if timing is not None else [{"seconds": math.nan, "batch": 0}] * len(record["steps"])
    return Trace(
        query,
        steps=tuple(_step_from_json(step, time) for step, time in zip(record["steps"], times, strict=True)),
        answers=tuple(_answer_from_json(query.id, answer) for answer in record["answers"]),
        contexts=tuple(_context_from_json(query, context, passages) for context in record["contexts"]),
    )


def _step_to_json(step: Step) -> Json:
    record: Json = {"stage": step.stage, "pass": step.pass_no, "ids": list(step.ids)}
    record["scores"] = [_number(score) for score in step.scores]
    record["sources"] = [[source, len(list(group))] for source, group in groupby(step.sources)]
    record["tokens"] = list(step.tokens)
    record["notes"] = _rounded(step.notes)
    return record


def _step_from_json(record: Json, time: Json) -> Step:
    return Step(
        stage=record["stage"],
        pass_no=record["pass"],
        seconds=math.nan if time["seconds"] is None else time["seconds"],
        batch=time["batch"],
        ids=tuple(record["ids"]),
        scores=tuple(float(score) for score in record["scores"]),
        tokens=tuple(record["tokens"]),
        notes=record["notes"],
        # Runs of the first version say nothing about sources.
        sources=tuple(name for name, count in record.get("sources", []) for _ in range(count)),
    )


def _answer_from_json(query_id: str, record: Json) -> Answer:
    return Answer(
        query_id,
        text=record["text"],
        score=float(record["score"]),
        candidates=tuple(_candidate_from_json(candidate) for candidate in record["candidates"]),
        passes=record["passes"],
        confidence=None if (confidence := record.get("confidence")) is None else float(confidence),
    )


def _context_from_json(query: Query, record: Json, passages: Sequence[Passage]) -> PackedContext:
    return PackedContext(
        query,
        text=record["text"],
        hits=tuple(Hit(passages[hit["passage"]], float(hit["score"]), hit["source"]) for hit in record["hits"]),
        tokens=record["tokens"],
        budget=record["budget"],
        dropped=tuple(Dropped(item["id"], item["reason"], item["tokens"]) for item in record["dropped"]),
        ranks=tuple(record.get("ranks", ())),
        windows=tuple(record.get("windows", ())),
        candidates=tuple(record.get("candidates", ())),
    )


def _confidence_to_json(answer: Answer) -> Json:
    """Nothing for a reader that is not calibrated."""
    return {} if answer.confidence is None else {"confidence": _number(answer.confidence)}


def _candidate_to_json(candidate: Candidate) -> Json:
    """Without the fields that a generated candidate does not have."""
    where = {"passage_id": candidate.passage_id, "start": candidate.start, "end": candidate.end}
    known = {name: value for name, value in where.items() if value is not None}
    return {"text": candidate.text, "logprob": _number(candidate.logprob), **known}


def _candidate_from_json(record: Json) -> Candidate:
    return Candidate(**{**record, "logprob": float(record["logprob"])})


def _number(value: float) -> float | str:
    """As `as_recorded`, and as a text where JSON has no number."""
    return as_recorded(value) if math.isfinite(value) else str(float(value))


def _rounded(value: object) -> object:
    """A note as JSON: numbers as `_number` writes them, numpy's scalars as Python's."""
    if isinstance(value, Mapping):
        return {str(key): _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, int | float | str):
        return _rounded(value.item())
    return _number(value) if isinstance(value, float) else value


# --- files ------------------------------------------------------------------------------------------------------------


def _line(record: Json) -> bytes:
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.encode(errors="backslashreplace") + b"\n"  # a lone surrogate becomes its JSON escape


def _load_lines(file: Path) -> Iterator[Json]:
    """The records of a jsonl file. Raises DataError with the number of a line that is none."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}: line {number} is not JSON ({error}). Run again.") from error
            if not isinstance(record, dict) or "id" not in record:
                raise DataError(f"{file}: line {number} is not an object with an id. Run again.")
            yield record


def _replace_file(file: Path, data: bytes) -> Path:
    """Write a file so that it is there whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    with temporary.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)
    return file
