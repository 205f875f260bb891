"""What other systems make of our files, and we of theirs: `odqa export`, and `odqa eval` of a run that is not ours.

The formats themselves: `odqa.interchange` (rankings), `odqa.corpus.io` (passages, questions), and beside it
`odqa.corpus.dpr_training`; `odqa.retrieve.dpr_embeddings`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from odqa.artifacts import MANIFEST, load_artifact
from odqa.errors import ArtifactMismatch, DataError
from odqa.evaluate import Evaluation, RankedResult, evaluate_rankings
from odqa.recipes import Places, index_folder
from odqa.runs import Run, load_run
from odqa.text import Matcher
from odqa.types import Gold, Passage, Query, Step, Trace

if TYPE_CHECKING:
    from odqa.interchange import RankedQuestion
    from odqa.retrieve.index import Index

ExportFormat = Literal["trec", "dpr", "pyserini", "flashrag", "dpr-training", "dpr-embeddings"]
EXPORT_FORMATS: tuple[ExportFormat, ...] = get_args(ExportFormat)
Stage = Literal["final", "retrieve", "rerank", "pack"]
STAGES: tuple[Stage, ...] = get_args(Stage)
_OF_A_RUN = ("trec", "dpr", "pyserini", "flashrag")
_OF_AN_INDEX = ("dpr", "pyserini", "flashrag", "dpr-embeddings")
_OF_A_FILE = ("dpr", "flashrag", "dpr-training")


# --- scoring ----------------------------------------------------------------------------------------------------------


def score_rankings(
    file: str,
    questions: str | None = None,
    *,
    index: str | None = None,
    matcher: Matcher = "string",
    tag: str | None = None,
    places: Places | None = None,
) -> Evaluation:
    """Score a run file of another system: recall@k, and em and f1 where it has answers. See `evaluate_rankings`.

    `questions` names the file with the gold answers; without it, those in the run file count. A run that has the texts
    of its questions is matched by them, a TREC run by ids. `index`, a recipe or a folder, has the texts of passages
    that the file does not give. The run is read one question at a time.
    """
    from odqa.interchange import Judge, read_run

    places = places or Places.from_environment()
    path = places.file(file)
    asked = _Asked(None if questions is None else questions, places)
    judge = Judge(matcher, _text_of(_open(index, places)) if index is not None else None)
    results = []
    for number, found in enumerate(read_run(path, tag=tag), 1):
        query_id = asked.id_of(found, number)
        gold = asked.gold.get(query_id)
        rank = judge.rank(found, gold.answers) if gold is not None else None
        results.append(RankedResult(query_id, rank, len(found.passages), found.prediction))
    name = Path(questions or file).name.removesuffix(".gz")
    return evaluate_rankings(
        results, list(asked.gold.values()), question_set=Path(name).stem, matcher=matcher, notes=judge.notes
    )


class _Asked:
    """The questions that a run should have answered: those of a file, or, without one, those that the run brings."""

    def __init__(self, questions: str | None, places: Places) -> None:
        self.name = questions
        self.gold: dict[str, Gold] = {}
        self._ids: dict[str, list[str]] = defaultdict(list)  # by the question's words; a question may come twice
        if questions is not None:
            queries, gold = _questions(questions, places)
            self.gold = {item.query_id: item for item in gold}
            for query in queries:
                self._ids[_words(query.text)].append(query.id)

    def id_of(self, found: "RankedQuestion", number: int) -> str:
        """The question's id. DataError if the file has no such question, or if nobody knows the answers.

        Numbers mean different things to different systems (DPR's lines count from 1, Pyserini's topics from 0): where
        the run has the question, its words decide.
        """
        if self.name is None:
            if found.answers is None:
                raise DataError(f"{found.where}: no answers in the run. Name a file that has them: --questions")
            query_id = found.id if found.id is not None else str(number)
            self.gold[query_id] = Gold(query_id, found.answers)
            return query_id
        if found.question is None:
            if found.id is None:
                raise DataError(f"{found.where}: neither an id nor a question here; nobody knows what was asked.")
            return found.id
        ids = self._ids.get(_words(found.question), [])
        if not ids:
            raise DataError(f"{found.where}: the question {found.question[:60]!r} is not in {self.name} (any more).")
        ids.remove(chosen := found.id if found.id in ids else ids[0])
        return chosen


def _words(question: str) -> str:
    return " ".join(question.split())


# --- export -----------------------------------------------------------------------------------------------------------


def export(
    source: str,
    out: Path,
    file_format: ExportFormat,
    *,
    questions: str | None = None,
    index: str | None = None,
    stage: Stage = "final",
    tag: str | None = None,
    matcher: Matcher = "string",
    places: Places | None = None,
) -> int:
    """Write a run folder, an index folder, a question file or a training file as another system reads it; how many.

    - a run: trec, dpr, pyserini, flashrag (`odqa.interchange`); `stage` says whose ranking, that of the first pass:
      "final" is the re-ranker's, or without one the retriever's. All but trec need `questions` with answers.
    - an index, by folder or recipe: its passages as dpr (tsv), pyserini, flashrag; its vectors as dpr-embeddings.
    - a question file with answers: dpr, flashrag. A file of training examples: dpr-training, with `index` for the
      passages that it names by id.

    Raises DataError for a format that the source has not, and for what a format cannot hold.
    """
    places = places or Places.from_environment()
    if (Path(source) / MANIFEST).is_file():
        kind = load_artifact(Path(source)).kind
        if kind == "run":
            _check_format(source, kind, file_format, _OF_A_RUN)
            return _export_run(
                load_run(Path(source)), out, file_format, questions=questions, stage=stage, tag=tag, matcher=matcher,
                places=places,
            )  # fmt: skip
        if kind != "index":
            raise DataError(f"{source}: an artifact of kind {kind!r}; runs and indexes are exported.")
        _check_format(source, kind, file_format, _OF_AN_INDEX)
        return _export_index(_open(source, places), out, file_format)
    if Path(source).suffix in (".yaml", ".yml"):
        _check_format(source, "index", file_format, _OF_AN_INDEX)
        return _export_index(_open(source, places), out, file_format)
    path = places.file(source)
    if path.is_dir():
        raise DataError(f"{source}: neither a run nor an index ({MANIFEST} is missing).")
    _check_format(source, "file", file_format, _OF_A_FILE)
    if file_format == "dpr-training":
        return _export_training(path, out, _open(index, places) if index is not None else None)
    return _export_questions(source, out, file_format, places)


def _check_format(source: str, kind: str, found: str, possible: tuple[str, ...]) -> None:
    if found not in possible:
        article = "an" if kind == "index" else "a"
        raise DataError(f"{source}: {article} {kind} has no format {found!r}; expected one of {', '.join(possible)}.")


def _export_run(
    run: Run,
    out: Path,
    file_format: Any,
    *,
    questions: str | None,
    stage: Stage,
    tag: str | None,
    matcher: Matcher,
    places: Places,
) -> int:
    from odqa.interchange import save_ranked

    gold: dict[str, Gold] | None = None
    store = None
    if questions is not None:
        gold = {item.query_id: item for item in _questions(questions, places)[1]}
    if file_format != "trec":
        if gold is None:
            raise DataError(f"{run.path}: a run has no gold answers, and {file_format} holds them. Name --questions.")
        store = _index_of(run, places).store

    def ranked() -> Iterator["RankedQuestion"]:
        from odqa.interchange import RankedPassage, RankedQuestion

        for trace in run.traces():
            step = _step(run, trace, stage)
            if gold is not None and trace.query.id not in gold:
                raise DataError(f"{questions}: no question {trace.query.id!r}, which {run.path} answered.")
            passages = []
            for passage_id, score in zip(step.ids, step.scores, strict=True):
                passage = store[store.row_of(passage_id)] if store is not None else None
                title, text = (passage.title, passage.text) if passage is not None else (None, None)
                passages.append(RankedPassage(passage_id, score, title, text))
            where = f"{run.path}: question {trace.query.id}"
            answers = gold[trace.query.id].answers if gold is not None else None
            yield RankedQuestion(
                where, trace.query.id, trace.query.text, answers, tuple(passages), prediction=trace.answer.text
            )

    return save_ranked(out, ranked(), file_format, tag=tag or _tag(run), matcher=matcher)


def _step(run: Run, trace: Trace, stage: Stage) -> Step:
    """The step of the first pass whose ranking is meant."""
    steps: dict[str, Step] = {}
    for step in trace.steps:
        if step.pass_no == 1:
            steps.setdefault(step.stage, step)
    names = ("rerank", "retrieve") if stage == "final" else (stage,)
    found = next((steps[name] for name in names if name in steps), None)
    if found is None:
        raise DataError(
            f"{run.path}: question {trace.query.id!r} has no {' or '.join(names)} step (it has {', '.join(steps)})."
        )
    return found


def _tag(run: Run) -> str:
    return "-".join(run.path.resolve().name.split()) or "odqa"


def _export_index(index: "Index", out: Path, file_format: Any) -> int:
    if file_format != "dpr-embeddings":
        from odqa.corpus.io import save_passages

        return save_passages(out, index.store, file_format)
    from odqa.retrieve.dpr_embeddings import save_embeddings
    from odqa.retrieve.parts import VectorParts

    folder = index.path / "dense/vectors"
    if not folder.is_dir():
        raise DataError(f"{index.path}: no vectors in this index; one with dense.vectors.keep has them beside FAISS's.")
    ids = (passage.id for passage in index.store)
    blocks = (block for _, block in VectorParts(folder).blocks(8192))
    return save_embeddings(out, ((next(ids), vector) for block in blocks for vector in block))


def _export_training(path: Path, out: Path, index: "Index | None") -> int:
    from odqa.corpus.dpr_training import save_dpr_training
    from odqa.corpus.examples import read_examples

    return save_dpr_training(out, read_examples(path, _ById(index)))


def _export_questions(source: str, out: Path, file_format: Any, places: Places) -> int:
    from odqa.corpus.io import save_questions

    queries, gold = _questions(source, places)
    save_questions(out, queries, gold, file_format)
    return len(queries)


class _ById(Mapping[str, Passage]):
    """The passages of an index by id, as training examples ask for them; none without an index."""

    def __init__(self, index: "Index | None") -> None:
        self._store = None if index is None else index.store

    def __getitem__(self, passage_id: str) -> Passage:
        try:
            if self._store is not None:
                return self._store[self._store.row_of(passage_id)]
        except DataError:
            pass
        raise KeyError(passage_id)

    def __iter__(self) -> Iterator[str]:
        return iter(()) if self._store is None else (passage.id for passage in self._store)

    def __len__(self) -> int:
        return 0 if self._store is None else len(self._store)


# --- files and indexes ------------------------------------------------------------------------------------------------


def _questions(name: str, places: Places) -> tuple[list[Query], list[Gold]]:
    from odqa.corpus.io import read_gold, read_questions

    path = places.file(name)
    return read_questions(path), read_gold(path)


def _open(name: str, places: Places) -> "Index":
    from odqa.retrieve.index import load_index

    return load_index(index_folder(name, places)[0])


def _index_of(run: Run, places: Places) -> "Index":
    """The index that a run was answered from."""
    name = run.manifest["recipe"]["index"]
    if name is None:
        raise DataError(f"{run.path}: a closed-book run has no ranking to export.")
    index = _open(name, places)
    if index.artifact.hash != run.manifest["inputs"]["index"]:
        raise ArtifactMismatch(f"{run.path}: answered from another index than {index.path} is now. Run it again.")
    return index


def _text_of(index: "Index") -> Callable[[str], str]:
    store = index.store
    return lambda passage_id: store[store.row_of(passage_id)].text
