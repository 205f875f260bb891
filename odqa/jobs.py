"""What the commands do, callable from Python: build an index, ask, run, evaluate, train.

Each job takes recipes and places, leaves an artifact, and says what it is doing through `log`. Printing results is the
command line's business.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import odqa
from odqa import config
from odqa.artifacts import MANIFEST, Artifact, load_artifact, sha256_file, sha256_json
from odqa.errors import ArtifactError, ArtifactMismatch, DataError, MissingExtra
from odqa.evaluate import Check, Evaluation, Expectation, check_expectations, compare, evaluate
from odqa.recipes import (
    Places,
    Recipe,
    build_pipeline,
    check_index_recipe,
    describe_file,
    index_folder,
    load_recipe,
    read_source,
)
from odqa.report import Style, changed_table, comparison_table, explain_question, join, render, stage_table
from odqa.runs import SCORES, Run, find_run, load_run, recording, trace_to_json
from odqa.runtime import progress
from odqa.stages import ProvesFrozen
from odqa.text import Matcher
from odqa.types import Gold, Query, Trace

if TYPE_CHECKING:
    from odqa.pipeline import Pipeline
    from odqa.retrieve.dense import EncoderSettings
    from odqa.retrieve.index import Index

Log = Callable[[str], None]

DEMO_QUESTIONS = (
    "who tutored elizabeth i in latin",
    "rich man who died after drinking radium water",
    "what illness wiped out the french troops sent to the caribbean to bring back slavery",
)


def _silent(_line: str) -> None:
    """The default log."""


# --- index ------------------------------------------------------------------------------------------------------------


def build_index(
    recipe: str | Path | Recipe,
    *,
    places: Places | None = None,
    dump: str | None = None,
    out: Path | None = None,
    strict: bool = False,
    log: Log = _silent,
) -> "Index":
    """Build the index of a recipe, or open it if it is there already.

    `dump` replaces the recipe's source by a MediaWiki dump. Resumes an index that was being built. Raises DataError for
    a source that cannot be read; with `strict` also for a damaged dump, which otherwise is read as far as it goes.
    """
    from odqa.corpus.mediawiki import DumpReport
    from odqa.retrieve import index as retrieve

    places = places or Places.from_environment()
    recipe = _recipe(recipe, "index")
    settings = recipe.settings
    assert isinstance(settings, config.IndexRecipe)
    if dump is not None:
        source: config.DumpPassages | config.FilePassages = config.DumpPassages(file=dump, strict=strict)
        settings = settings.model_copy(update={"passages": source})
    elif strict and isinstance(settings.passages, config.DumpPassages):
        settings = settings.model_copy(update={"passages": settings.passages.model_copy(update={"strict": True})})
    recipe = Recipe(recipe.path, settings)
    path = places.file(settings.passages.file)
    folder = out or places.artifacts / recipe.name
    source_file = describe_file(settings.passages.file, path)
    encoder = _encoder_settings(settings.dense)
    found = _finished(folder, retrieve.KIND, recipe, log)
    if found is not None:
        inputs = found.manifest["inputs"]
        is_same = encoder is None or inputs["encoder"] == _encoder_weights(encoder)
        if is_same and inputs["passages"] == source_file:
            log(f"{folder}: built already")
            return retrieve.load_index(folder)
    report = DumpReport()
    index = retrieve.build_index(
        folder,
        read_source(settings.passages, path, report),
        source=source_file,
        bm25=_bm25_settings(settings.bm25),
        encoder=encoder,
        vectors=_vector_settings(settings.dense),
        recipe=recipe.resolved,
    )
    if report.pages:
        log(
            f"{report.pages:,} pages: {report.articles:,} articles, {report.redirects:,} redirects, "
            f"{report.disambiguations:,} disambiguation pages skipped, "
            f"{sum(report.other_namespaces.values()):,} in other namespaces"
        )
    if report.lost:
        log(f"warning: {report.lost}")
    log(f"{folder}: {len(index.store):,} passages in {index.artifact.manifest['measured']['seconds']:.1f} s")
    return index


def _finished(folder: Path, kind: str, recipe: Recipe, log: Log) -> Artifact | None:
    """The artifact in `folder` if `recipe` made it; None if it is still to be made, or to be made again."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        found = load_artifact(folder, kind)
    except ArtifactMismatch:
        raise
    except ArtifactError as error:
        log(f"warning: {error} Doing so now.")
        return None
    return found if found.manifest["recipe"] == recipe.resolved else None


def _encoder_weights(settings: "EncoderSettings") -> dict[str, str]:
    """Fingerprints of an encoder's two models, as the manifest of an index has them."""
    from odqa.retrieve.dense import Encoder, fingerprint

    encoder = Encoder(settings)
    return {"question": fingerprint(encoder.question_folder), "passage": fingerprint(encoder.passage_folder)}


def _bm25_settings(settings: config.Bm25 | None) -> Any:
    if settings is None:
        return None
    from odqa.retrieve.bm25 import ENGLISH_STOP_WORDS, Analyzer, Bm25Settings

    words = settings.analyzer.stop_words
    stop_words = {"english": ENGLISH_STOP_WORDS, "none": ()}[words] if isinstance(words, str) else words
    analyzer = Analyzer(**{**settings.analyzer.model_dump(), "stop_words": tuple(stop_words)})
    return Bm25Settings(**settings.model_dump(exclude={"analyzer"}), analyzer=analyzer)


def _encoder_settings(settings: config.Dense | None) -> "EncoderSettings | None":
    if settings is None:
        return None
    from odqa.retrieve.dense import EncoderSettings

    return EncoderSettings(**settings.model_dump(exclude={"vectors"}))


def _vector_settings(settings: config.Dense | None) -> Any:
    if settings is None:
        return None
    from odqa.retrieve.vectors import VectorSettings

    return VectorSettings(**settings.vectors.model_dump())


# --- answering --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Loaded:
    """A pipeline ready to answer, with the recipe it came from and the index it reads."""

    recipe: Recipe
    pipeline: "Pipeline"
    index: "Index | None"

    def ask(self, question: str) -> Trace:
        """Answer one question. Raises DataError for an empty one."""
        if not question.strip():
            raise DataError("the question is empty. Ask something.")
        return self.pipeline.answer([Query("question", question)])[0]


def load_pipeline(
    recipe: str | Path | Recipe,
    *,
    places: Places | None = None,
    build: bool = False,
    changes: Sequence[str] = (),
    indexes: dict[str, "Index"] | None = None,
    log: Log = _silent,
) -> Loaded:
    """Open a pipeline. `build` makes a missing index first; without it a missing index is an ArtifactError.

    `indexes` holds what earlier calls opened, by the name in the recipe, and is added to: an index shared by several
    pipelines is opened once.
    """
    from odqa.retrieve.index import load_index

    places = places or Places.from_environment()
    recipe = _recipe(recipe, "pipeline", changes)
    settings = recipe.settings
    assert isinstance(settings, config.PipelineRecipe)
    index = (indexes or {}).get(settings.index or "")
    if settings.index is not None and index is None:
        folder, index_recipe = index_folder(settings.index, places)
        if build and index_recipe is not None:
            index = build_index(index_recipe, places=places, log=log)
        elif not (folder / MANIFEST).is_file():
            raise ArtifactError(f"{folder}: the index is not built yet. Build it with: odqa index {settings.index}")
        else:
            index = load_index(folder)
            if index_recipe is not None:
                check_index_recipe(index.artifact.manifest["recipe"], index_recipe, folder)
    if indexes is not None and index is not None and settings.index is not None:
        indexes[settings.index] = index
    return Loaded(recipe, build_pipeline(recipe, index), index)


def run(
    recipe: str | Path | Recipe,
    questions: str,
    out: Path,
    *,
    places: Places | None = None,
    build: bool = False,
    changes: Sequence[str] = (),
    log: Log = _silent,
) -> Run:
    """Answer a question file into a run folder; questions answered by an earlier, killed try are not asked again."""
    from odqa.corpus.io import read_questions

    places = places or Places.from_environment()
    recipe = _recipe(recipe, "pipeline", changes)
    path = places.file(questions)
    queries = read_questions(path)
    loaded = load_pipeline(recipe, places=places, build=build, log=log)
    return run_queries(loaded, queries, out, source=describe_file(questions, path), log=log)


def run_queries(loaded: Loaded, queries: Sequence[Query], out: Path, *, source: Mapping[str, str], log: Log) -> Run:
    """`run` for a loaded pipeline and questions in memory; `source` identifies them in the manifest."""
    settings = loaded.recipe.settings
    assert isinstance(settings, config.PipelineRecipe)
    inputs = {"questions": dict(source), "index": loaded.index.artifact.hash if loaded.index else None}
    inputs |= {"reader": _reader_identity(loaded)}
    resolved = loaded.recipe.resolved
    if find_run(out, recipe=resolved, inputs=inputs) is not None:
        log(f"{out}: answered already")
        return load_run(out)
    with recording(out, [query.id for query in queries], recipe=resolved, inputs=inputs) as writer:
        if writer.finished:
            log(f"{out}: {len(writer.finished)} of {len(queries)} questions were answered already")
        with progress("answer", len(queries), "questions") as bar:
            # Blocks are the same in every try: what a question is batched with may move the last digit of a score.
            for start in range(0, len(queries), settings.batch):
                block = queries[start : start + settings.batch]
                if any(query.id not in writer.finished for query in block):
                    traces = loaded.pipeline.answer(block)
                    writer.add([trace for trace in traces if trace.query.id not in writer.finished])
                bar.advance(len(block))
        if isinstance(loaded.pipeline.reader, ProvesFrozen):
            loaded.pipeline.reader.check_frozen()
            writer.measured["backbone_unchanged"] = True
    return load_run(out)


def _reader_identity(loaded: Loaded) -> str:
    """What the reader is, by content: the hash of its trained part, or of the frozen model that reads alone."""
    settings = loaded.recipe.settings
    assert isinstance(settings, config.PipelineRecipe)
    if isinstance(settings.reader, config.SpanReaderSettings):
        return sha256_file(Places().file(settings.reader.model) / "method.safetensors")
    from odqa.read.lm import LmReader

    assert isinstance(loaded.pipeline.reader, LmReader)
    return loaded.pipeline.reader.backbone.fingerprint


# --- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class System:
    """A pipeline on one question set: its recipe, its scores, its run."""

    pipeline: Recipe
    evaluation: Evaluation
    run: Run


@dataclass(slots=True)
class EvaluationResult:
    """What an eval recipe gave: every pipeline on every question set, and the expectations beside what was found."""

    recipe: Recipe
    systems: list[System] = field(default_factory=list)
    checks: list[tuple[str, Check]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every expected number is within its tolerance."""
        return all(check.ok for _, check in self.checks)

    def render(self, style: Style = "text") -> str:
        """The report: per question set the scores, the funnel and the times of all pipelines side by side."""
        return render([(s.pipeline.name, s.evaluation) for s in self.systems], self.checks, style=style)

    def to_json(self) -> dict[str, Any]:
        """The result file: recipes and hashes, inputs, scores, funnel, time. Without the questions."""
        return {
            "eval": self.recipe.name,
            "recipe_hash": self.recipe.hash,
            "odqa": odqa.__version__,
            "ok": self.ok,
            "systems": [
                {
                    "pipeline": system.pipeline.resolved,
                    "pipeline_name": system.pipeline.name,
                    "pipeline_hash": system.pipeline.hash,
                    "inputs": dict(system.run.manifest["inputs"]),
                    **{key: value for key, value in system.evaluation.to_json().items() if key != "questions"},
                }
                for system in self.systems
            ],
        }

    def save(self, stem: Path) -> None:
        """Write the report as STEM.md and STEM.json."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_name(stem.name + ".md").write_text(self.render("markdown"), encoding="utf-8")
        record = json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n"
        stem.with_name(stem.name + ".json").write_text(record, encoding="utf-8")


def run_evaluation(
    recipe: str | Path | Recipe,
    *,
    places: Places | None = None,
    out: Path | None = None,
    changes: Sequence[str] = (),
    log: Log = _silent,
) -> EvaluationResult:
    """Build what is missing, answer every question set, score, compare with the expected numbers.

    Runs lie in `out`/RECIPE/PIPELINE-VERSION/QUESTION_SET with scores.json in each (`out` is ./runs if not given); the
    version is eight digits that stand for the pipeline's settings, its index and its reader.
    """
    places = places or Places.from_environment()
    recipe = _recipe(recipe, "eval", changes)
    settings = recipe.settings
    assert isinstance(settings, config.EvalRecipe)
    sets = [(question_set, *_load_questions(question_set, places)) for question_set in settings.questions]
    result = EvaluationResult(recipe)
    index_of: dict[str, Index] = {}
    for path in settings.pipelines:
        loaded = load_pipeline(path, places=places, build=True, indexes=index_of, log=log)
        for question_set, source, queries, gold in sets:
            version = f"{loaded.recipe.name}-{_version(loaded)}"
            folder = (out or Path("runs")) / recipe.name / version / question_set.name
            log(f"{loaded.recipe.name} on {question_set.name}: {len(queries)} questions, into {folder}")
            finished = run_queries(loaded, queries, folder, source=source, log=log)
            evaluation = score_run(
                finished, gold, loaded.index, question_set=question_set.name, split=question_set.split,
                matcher=question_set.matcher, depths=settings.recall_at, seed=settings.seed,
            )  # fmt: skip
            expected = question_set.expected.get(loaded.recipe.name, {})
            expectations = [Expectation(name, e.value, e.tolerance) for name, e in expected.items()]
            result.systems.append(System(loaded.recipe, evaluation, finished))
            result.checks += [(loaded.recipe.name, check) for check in check_expectations(evaluation, expectations)]
    return result


def _version(loaded: Loaded) -> str:
    """Eight hex digits for the run folder of a pipeline: its settings, its index, its reader's trained part."""
    index_hash = loaded.index.artifact.hash if loaded.index else None
    return sha256_json([loaded.recipe.hash, index_hash, _reader_identity(loaded)])[:8]


def score(
    folder: Path, questions: str, *, places: Places | None = None, split: str = "", matcher: Matcher = "string"
) -> Evaluation:
    """Score a finished run with the answers of a question file, and leave scores.json in its folder.

    Raises DataError if the file is about other questions than the run.
    """
    from odqa.corpus.io import read_gold
    from odqa.retrieve.index import load_index

    places = places or Places.from_environment()
    finished = load_run(folder)
    gold = read_gold(places.file(questions))
    name = finished.manifest["recipe"]["index"]
    index = load_index(index_folder(name, places)[0]) if name is not None else None
    if index is not None and index.artifact.hash != finished.manifest["inputs"]["index"]:
        raise ArtifactMismatch(
            f"{folder}: answered from another index than {index.path} is now. Run the questions again."
        )
    return score_run(finished, gold, index, question_set=Path(questions).stem, split=split, matcher=matcher)


def score_run(finished: Run, gold: Sequence[Gold], index: "Index | None", **options: Any) -> Evaluation:
    """Score a finished run and leave scores.json in its folder. `options` go to `odqa.evaluate.evaluate`."""
    evaluation = evaluate(finished.traces(), gold, _text_of(index), measured=finished.manifest["measured"], **options)
    finished.save_scores(evaluation.to_json())
    return evaluation


def _text_of(index: "Index | None") -> Callable[[str], str]:
    if index is None:
        return lambda passage_id: ""
    store = index.store
    return lambda passage_id: store[store.row_of(passage_id)].text


def _load_questions(question_set: config.QuestionSet, places: Places) -> tuple[dict[str, str], list[Query], list[Gold]]:
    """Source, queries and gold of a question set, from a file or through `datasets`."""
    from odqa.corpus.io import read_gold, read_questions

    if question_set.file is not None:
        path = places.file(question_set.file)
        return describe_file(question_set.file, path), read_questions(path), read_gold(path)
    name = f"{question_set.hub}/{question_set.split}"
    queries, gold = [], []
    for number, row in enumerate(_load_data_set(str(question_set.hub), question_set.split), 1):
        question, answers = row.get("question"), row.get("answers", row.get("answer"))
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{name}: row {number} has no text under question (found: {', '.join(row)}).")
        if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
            raise DataError(f"{name}: row {number} has no list of strings under answers or answer.")
        queries.append(Query(str(row.get("id", number)), question))
        gold.append(Gold(queries[-1].id, tuple(answers)))
    if not queries:
        raise DataError(f"{name}: no questions here.")
    content = [[query.id, query.text, item.answers] for query, item in zip(queries, gold, strict=True)]
    return {"name": name, "sha256": sha256_json(content)}, queries, gold


def _load_data_set(name: str, split: str) -> Iterable[dict[str, Any]]:
    """The rows of a data set of the hub or of a local folder. Raises DataError with what `datasets` says."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra(f"The data set {name}", "datasets", "datasets") from error
    try:
        datasets.disable_progress_bars()
        return datasets.load_dataset(name, split=split)  # type: ignore[no-any-return]
    except Exception as error:  # its errors have no common base: connection, unknown name, unknown split, damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data set {name}, split {split}: does not load ({reason}). Give a hub name, a folder, or use a file."
        ) from error


# --- looking at runs --------------------------------------------------------------------------------------------------


def explain(path: Path, question_id: str | None = None, *, as_json: bool = False) -> str:
    """The scores and the funnel of a scored run; or one question's trace, with where its answer was lost if known.

    Of a run that is not scored yet: how many questions, the time of its stages, and what would score it.
    """
    finished = load_run(path)
    evaluation = Evaluation.from_json(finished.scores()) if (path / SCORES).is_file() else None
    if question_id is not None:
        trace = finished.trace(question_id)
        if as_json:
            return json.dumps(trace_to_json(trace), ensure_ascii=False)
        if evaluation is None:
            return explain_question(trace)
        result = next((question for question in evaluation.questions if question.id == question_id), None)
        return explain_question(trace, result=result, matcher=evaluation.matcher)
    if evaluation is not None:
        return json.dumps(evaluation.to_json(), ensure_ascii=False) if as_json else render([(path.name, evaluation)])
    if as_json:
        return json.dumps({key: finished.manifest[key] for key in ("counts", "measured")} | {"scores": None})
    counts = finished.manifest["counts"]
    unscored = Evaluation("", "", "string", (), (), 0, 0, 0, measured=finished.manifest["measured"])
    return (
        f"{stage_table(path.name, [(path.name, unscored)]).text()}\n\n"
        f"{counts['questions']} questions, {counts['abstained']} of them abstained on. Not scored: that needs answers "
        "to compare with.\nName the pipeline and the questions in an eval recipe, and score with: odqa eval RECIPE\n"
    )


def diff(first: Path, second: Path, *, as_json: bool = False) -> str:
    """Paired differences of two scored runs, and the questions whose answer became right or wrong."""
    evaluations = [Evaluation.from_json(load_run(path).scores()) for path in (first, second)]
    comparison = compare(*evaluations)
    if as_json:
        return json.dumps(dataclasses.asdict(comparison), ensure_ascii=False)
    names = (str(first), str(second))
    return join([comparison_table(*names, comparison), changed_table(*names, comparison)])


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    recipe: str | Path | Recipe,
    *,
    places: Places | None = None,
    out: Path | None = None,
    changes: Sequence[str] = (),
    log: Log = _silent,
) -> Artifact:
    """Train what a recipe describes; continues a killed training at its last checkpoint."""
    import torch
    from safetensors.torch import load_file

    from odqa.artifacts import building
    from odqa.corpus.io import read_gold, read_passages, read_questions
    from odqa.frozen.backbone import load_backbone
    from odqa.frozen.fit import FitSettings
    from odqa.frozen.method import TENSORS, create_method, load_tensors
    from odqa.frozen.spans import SpanHead
    from odqa.read import span
    from odqa.read import train as training
    from odqa.runtime import choose_device, has_fast_bf16

    places = places or Places.from_environment()
    recipe = _recipe(recipe, "train", changes)
    settings = recipe.settings
    assert isinstance(settings, config.ReaderTraining)
    folder = out or places.artifacts / recipe.name
    files = {name: places.file(name) for name in (settings.train, *settings.passages, *(t.file for t in settings.tune))}
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    # Eager attention: its backward pass is a third faster than the fused one on processors (docs/LOG.md).
    on_cpu = choose_device(settings.device).type == "cpu"
    backbone = load_backbone(
        settings.backbone,
        "encoder",
        device=settings.device,
        dtype=settings.dtype,
        attention="eager" if on_cpu else "sdpa",
    )
    inputs = {name: describe_file(name, path)["sha256"] for name, path in files.items()} | {
        "backbone": backbone.fingerprint
    }
    if settings.start is not None:
        start = places.file(settings.start)
        inputs["start"] = sha256_json([sha256_file(start / name) for name in (TENSORS, span.HEAD)])
    found = _finished(folder, span.KIND, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: trained already")
        return found
    passages = {passage.id: passage for name in settings.passages for passage in read_passages(files[name])}
    tune = {}
    for chosen in settings.tune:
        pairs = list(zip(read_questions(files[chosen.file]), read_gold(files[chosen.file]), strict=True))
        tune[chosen.name] = pairs[: chosen.limit]
        for query, gold in tune[chosen.name]:
            if not gold.passage_ids or gold.passage_ids[0] not in passages:
                raise DataError(
                    f"{files[chosen.file]}: the gold passage of question {query.id!r} is not known. Give positive_ids, "
                    "and name the file that holds these passages under passages."
                )
    method = create_method(settings.method.kind, backbone, **settings.method.model_dump(mode="json", exclude={"kind"}))
    head = SpanHead(backbone.width)
    if settings.start is not None:
        load_tensors(method, load_file(start / TENSORS), str(start))
        load_tensors(head, load_file(start / span.HEAD), str(start))
    model = span.SpanModel(backbone, method, head, settings.longest)
    autocast = has_fast_bf16() or not on_cpu if settings.autocast is None else settings.autocast
    with building(folder, span.KIND, recipe=recipe.resolved, inputs=inputs, scratch=(training.CHECKPOINT,)) as draft:
        training.train_span_reader(
            model,
            list(training.read_examples(files[settings.train], passages)),
            tune,
            passages,
            draft,
            groups=training.GroupSettings(**settings.groups.model_dump()),
            fit_settings=FitSettings(**settings.fit.model_dump(), autocast=autocast),
            stored=torch.float16 if settings.stored == "float16" else torch.float32,
            log=log,
        )
    return load_artifact(folder, span.KIND)


def _recipe(recipe: str | Path | Recipe, kind: str, changes: Sequence[str] = ()) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, kind, changes=changes)
