"""What the commands do, callable from Python: build an index, ask, run, evaluate, train.

Each job takes recipes and places, leaves an artifact, and says what it is doing through `log`. Printing results is the
command line's business.
"""

import dataclasses
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import odqa
from odqa import config
from odqa.artifacts import MANIFEST, Artifact, load_artifact, save_file, sha256_file, sha256_json
from odqa.errors import ArtifactError, ArtifactMismatch, DataError, MissingExtra, RecipeError
from odqa.evaluate import (
    GAIN_METRICS,
    AnswerSearch,
    Check,
    Evaluation,
    Expectation,
    Gain,
    check_expectations,
    compare,
    evaluate,
    measure_gain,
)
from odqa.models import identify_model
from odqa.recipes import (
    Kept,
    Places,
    Recipe,
    build_pipeline,
    build_reranker,
    build_retriever,
    check_index_recipe,
    describe_file,
    index_folder,
    load_recipe,
    load_variants,
    read_source,
    with_defaults,
)
from odqa.replay import Leading, Replay, find_leading, without_times
from odqa.report import Published, Style, changed_tables, comparison_table, explain_question, join, render, stage_table
from odqa.runs import SCORES, Run, find_run, load_run, recording, trace_to_json
from odqa.runtime import Progress, progress
from odqa.stages import ChecksQueries, CountsSpending, ProvesFrozen
from odqa.text import Matcher, token_string
from odqa.types import Gold, Hit, Query, Trace

if TYPE_CHECKING:
    from odqa.corpus.dump import DumpPassages
    from odqa.pipeline import Pipeline, Watch
    from odqa.report.content import LookUp, Section, Source
    from odqa.retrieve.dense import EncoderSettings
    from odqa.retrieve.given import GivenVectors, IndexVectors
    from odqa.retrieve.index import Index
    from odqa.stages import Reranker, Retriever

Log = Callable[[str], None]
RUNS = Path("runs")  # where runs go if nothing else is said
SAMPLE = 60  # our choice: questions of a set that a report shows; about half a megabyte of page
_REMEMBERED = 250_000  # our choice: pairs and rows that the systems of one evaluation share; about 1 GB when full

_MOST_FIRST: tuple[Leading, ...] = ("ranking", "retrieval")

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
    processes: int | None = None,
    log: Log = _silent,
) -> "Index":
    """Build the index of a recipe, or open it if it is there already.

    `dump` replaces the recipe's source by a MediaWiki dump, cut as the recipe says if its own source is a dump, which
    `processes` read (None: as the recipe says). Resumes an index that was being built. Raises DataError for a source
    that cannot be read; with `strict` also for a damaged dump, which otherwise is read as far as it goes.
    """
    from odqa.corpus.mediawiki import DumpReport
    from odqa.retrieve import index as retrieve
    from odqa.retrieve.dense import Encoder
    from odqa.retrieve.tuned import TunedMethod

    places = places or Places.from_environment()
    recipe = _recipe(recipe, "index")
    settings = recipe.settings
    assert isinstance(settings, config.IndexRecipe)
    settings = settings.model_copy(update={"passages": _source(settings.passages, dump, strict, processes)})
    recipe = Recipe(recipe.path, settings)
    path = places.file(settings.passages.file)
    folder = out or places.artifacts / recipe.name
    source_file = describe_file(settings.passages.file, path)
    encoder = encoder_settings(settings.dense)
    device = search_device(settings)
    given = _given_vectors(settings.dense, places)
    method = None if settings.dense is None or settings.dense.method is None else places.file(settings.dense.method)
    found = finished_artifact(folder, retrieve.KIND, recipe, log)
    if found is not None:
        inputs = found.manifest["inputs"]
        is_same = encoder is None or inputs["encoder"] == retrieve.encoder_weights(Encoder(encoder))
        is_same = is_same and inputs.get("vectors") == (None if given is None else given.identity)
        is_same = is_same and inputs.get("method") == (None if method is None else TunedMethod.load(method).hash)
        if is_same and inputs["passages"] == source_file:
            log(f"{folder}: built already")
            return retrieve.load_index(folder, device=device)
    report = DumpReport()
    with progress("articles", path.stat().st_size, "B") as bar:
        index = retrieve.build_index(
            folder,
            read_source(settings.passages, path, report, places=places, watch=_show(bar)),
            source=source_file,
            bm25=_bm25_settings(settings.bm25),
            encoder=encoder,
            vectors=_vector_settings(settings.dense),
            given=given,
            method=method,
            recipe=recipe.resolved,
            device=device,
            memory_budget=settings.memory_budget,
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


def _source(
    source: "config.DumpPassages | config.FilePassages", dump: str | None, strict: bool, processes: int | None
) -> "config.DumpPassages | config.FilePassages":
    """The source of a recipe, with what the command line says of it."""
    changes: dict[str, Any] = {"strict": True} if strict else {}
    if processes is not None:
        changes["processes"] = processes
    if dump is not None:
        changes["file"] = dump
        source = source if isinstance(source, config.DumpPassages) else config.DumpPassages(file=dump)
    return source.model_copy(update=changes) if isinstance(source, config.DumpPassages) else source


def _show(bar: Progress) -> "Callable[[DumpPassages], None]":
    """Put the state of a dump that is being read on a progress line: it counts bytes of the file, which give the time
    left, and tells articles, passages, and megabytes of XML a second of this try."""
    started, known = time.monotonic(), 0

    def show(dump: "DumpPassages") -> None:
        nonlocal known
        megabytes = (dump.report.bytes_read - dump.earlier_bytes) / 1e6 / max(1e-3, time.monotonic() - started)
        bar.note(f"{dump.report.articles:,} articles, {dump.passages:,} passages, {megabytes:.1f} MB/s of XML")
        bar.advance(dump.position - known)
        known = dump.position
        if known == dump.path.stat().st_size:
            bar.close()  # the steps that follow have lines of their own

    return show


def finished_artifact(folder: Path, kind: str, recipe: Recipe, log: Log) -> Artifact | None:
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
    return found if with_defaults(found.manifest["recipe"], recipe) == recipe.resolved else None


def search_device(settings: config.IndexRecipe) -> str:
    """The device that an index recipe names; auto if it names none."""
    return "auto" if settings.dense is None else settings.dense.device


def _bm25_settings(settings: config.Bm25 | None) -> Any:
    if settings is None:
        return None
    from odqa.retrieve.bm25 import CHARACTERS, ENGLISH_STOP_WORDS, Analyzer, Bm25Settings, LuceneAnalyzer

    words, pattern = settings.analyzer.stop_words, settings.analyzer.token_pattern
    changes = {
        "stop_words": tuple({"english": ENGLISH_STOP_WORDS, "none": ()}[words] if isinstance(words, str) else words),
        "token_pattern": CHARACTERS if pattern == "characters" else pattern,
    }
    analyzer = Analyzer(**{**settings.analyzer.model_dump(), **changes})
    lucene = None if settings.lucene is None else LuceneAnalyzer(**settings.lucene.model_dump())
    return Bm25Settings(**settings.model_dump(exclude={"analyzer", "lucene"}), analyzer=analyzer, lucene=lucene)


def encoder_settings(settings: config.Dense | None) -> "EncoderSettings | None":
    """What a recipe says of its encoder; None for an index without one."""
    if settings is None:
        return None
    from odqa.retrieve.dense import EncoderSettings

    return EncoderSettings(**settings.model_dump(exclude={"vectors", "device", "method"}))


def _vector_settings(settings: config.Dense | None) -> Any:
    if settings is None:
        return None
    from odqa.retrieve.vectors import VectorSettings

    return VectorSettings(**settings.vectors.model_dump(exclude={"given"}))


def _given_vectors(settings: config.Dense | None, places: Places) -> "GivenVectors | IndexVectors | None":
    """The vectors that an index recipe need not make: another index's, or made elsewhere and told of by a sidecar.

    A sidecar's files lie beside it, or in data:.
    """
    if settings is None or settings.vectors.given is None:
        return None
    from odqa.retrieve.given import GivenVectors, IndexVectors

    name = settings.vectors.given
    if Path(name).suffix not in (".yaml", ".yml"):
        return IndexVectors(name, load_artifact(places.file(name), "index"))
    sidecar = load_recipe(places.file(name) if name.startswith("data:") else name)
    if isinstance(sidecar.settings, config.IndexRecipe):
        folder = places.artifacts / sidecar.name
        if not (folder / MANIFEST).is_file():
            raise ArtifactError(f"{folder}: the index is not built yet. Build it with: odqa index {name}")
        return IndexVectors(name, load_artifact(folder, "index"))
    sidecar = load_recipe(sidecar.path, "vectors")
    told = sidecar.settings
    assert isinstance(told, config.GivenVectors)
    if told.faiss is not None and settings.vectors.faiss is not None:
        raise RecipeError(f"{name}: brings a FAISS index of its own. Remove dense.vectors.faiss from the recipe.")

    def find(file: str) -> list[Path]:
        folder = places.file("data:.") if file.startswith("data:") else sidecar.path.parent
        path = folder / file.removeprefix("data:")
        found = sorted(path.parent.glob(path.name)) if "*" in path.name else [path]
        if not found or not found[0].is_file():
            raise DataError(f"{name}: no file {path}.")
        return found

    embeddings = [path for pattern in told.embeddings for path in find(pattern)]
    faiss = None if told.faiss is None else find(told.faiss)[0]
    ids = None if told.ids == "rows" else find(told.ids)[0]
    files = [*embeddings, *(path for path in (faiss, ids) if path is not None)]
    identity = {"sidecar": sidecar.resolved, "files": [describe_file(path.name, path) for path in files]}
    return GivenVectors(
        name,
        told.encoder,
        told.normalized,
        tuple(embeddings),
        faiss,
        told.metric,
        ids,
        told.id_prefix,
        json.loads(json.dumps(identity)),
    )


# --- answering --------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """A pipeline ready to answer, with the recipe it came from, the index it reads, and where its files lie."""

    recipe: Recipe
    pipeline: "Pipeline"
    index: "Index | None"
    places: Places

    @property
    def settings(self) -> config.PipelineRecipe:
        settings = self.recipe.settings
        assert isinstance(settings, config.PipelineRecipe)
        return settings

    @cached_property
    def reranker_identity(self) -> Any:
        """What the re-ranker's model or scores are, by content; a list for a cascade, None without a re-ranker."""
        return _reranker_identity(self.settings.reranker, self.places)

    def ask(self, question: str, watch: "Watch | None" = None) -> Trace:
        """Answer one question; `watch` gets each step as it ends. Raises DataError for an empty one."""
        if not question.strip():
            raise DataError("the question is empty. Ask something.")
        return self.pipeline.answer([Query("question", question)], watch)[0]


def load_pipeline(
    recipe: str | Path | Recipe,
    *,
    places: Places | None = None,
    build: bool = False,
    changes: Sequence[str] = (),
    indexes: dict[str, "Index"] | None = None,
    kept: Kept | None = None,
    log: Log = _silent,
) -> Loaded:
    """Open a pipeline. `build` makes a missing index first; without it a missing index is an ArtifactError.

    `indexes` holds what earlier calls opened, by the name in the recipe, and is added to: an index shared by several
    pipelines is opened once. `kept` does the same for the models of the last call.
    """
    places = places or Places.from_environment()
    recipe = _recipe(recipe, "pipeline", changes)
    settings = recipe.settings
    assert isinstance(settings, config.PipelineRecipe)
    index = _open_index(settings, places, build=build, indexes=indexes, log=log)
    return Loaded(recipe, build_pipeline(recipe, index, places=places, kept=kept), index, places)


def load_with_passes(recipe: str | Path, passes: int | None, *, changes: Sequence[str] = ()) -> Recipe:
    """A pipeline recipe with another bound on its passes (None: its own; 1: without its recursion).

    Raises RecipeError if it has no recursion that could make further passes, or if they are too many.
    """
    loaded = load_recipe(recipe, "pipeline", changes=changes)
    settings = loaded.settings
    assert isinstance(settings, config.PipelineRecipe)
    if passes is None or (passes == 1 and settings.recursion is None):
        return loaded
    if settings.recursion is None:
        raise RecipeError(
            f"{loaded.path}: --passes {passes} needs a recursion, and this recipe has none. Add one under recursion, "
            "such as {kind: retrieval}."
        )
    change = "recursion=null" if passes == 1 else f"recursion.passes={passes}"
    return load_recipe(recipe, "pipeline", changes=[*changes, change])


def _open_index(
    settings: config.PipelineRecipe, places: Places, *, build: bool, indexes: dict[str, "Index"] | None, log: Log
) -> "Index | None":
    """The index that a pipeline names, opened once for all callers that share `indexes`; None if it names none."""
    if settings.index is None:
        return None
    index = (indexes or {}).get(settings.index)
    if index is None:
        index = open_index(settings.index, places, build=build, log=log)
    if indexes is not None:
        indexes[settings.index] = index
    return index


def open_index(
    name: str, places: Places, *, build: bool = False, device: str | None = None, log: Log = _silent
) -> "Index":
    """Open an index by recipe or folder; its questions are encoded on `device` (None: as the recipe says).

    `build` makes a missing one of a recipe; without it that is an ArtifactError.
    """
    from odqa.retrieve.index import load_index

    folder, recipe = index_folder(name, places)
    if build and recipe is not None:
        folder = build_index(recipe, places=places, log=log).path
    elif not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder}: the index is not built yet. Build it with: odqa index {name}")
    if device is None:
        settings = None if recipe is None else recipe.settings
        device = search_device(settings) if isinstance(settings, config.IndexRecipe) else "auto"
    index = load_index(folder, device=device)
    if recipe is not None:
        check_index_recipe(index.artifact.manifest["recipe"], recipe, folder)
    return index


@dataclass(slots=True)
class Ranker:
    """The first stages of a pipeline, without its reader; `identity` stands for index, settings and weights."""

    retriever: "Retriever"
    reranker: "Reranker | None"
    k: int
    identity: str

    def rank(self, queries: Sequence[Query]) -> list[list[Hit]]:
        """At most `k` hits a query, best first."""
        hits = self.retriever.retrieve(queries, self.k)
        return hits if self.reranker is None else self.reranker.rerank(queries, hits)


def load_ranker(
    recipe: str | Path | Recipe,
    *,
    places: Places | None = None,
    build: bool = False,
    changes: Sequence[str] = (),
    log: Log = _silent,
) -> Ranker:
    """Open a pipeline's retriever and re-ranker. Raises RecipeError for a closed-book pipeline."""
    places = places or Places.from_environment()
    recipe = _recipe(recipe, "pipeline", changes)
    settings = recipe.settings
    assert isinstance(settings, config.PipelineRecipe)
    index = _open_index(settings, places, build=build, indexes=None, log=log)
    retriever = build_retriever(settings, index)
    if retriever is None or index is None:
        raise RecipeError(f"{recipe.path}: a pipeline without a retriever ranks nothing. Name another one.")
    first = {key: recipe.resolved[key] for key in ("retriever", "k", "reranker")}
    weights = [] if settings.reranker is None else [_reranker_identity(settings.reranker, places)]
    identity = sha256_json([index.artifact.hash, first, *weights])
    return Ranker(retriever, build_reranker(settings.reranker, places), settings.k, identity)


def run(
    recipe: str | Path | Recipe,
    questions: str,
    out: Path,
    *,
    places: Places | None = None,
    build: bool = False,
    changes: Sequence[str] = (),
    share: bool = True,
    log: Log = _silent,
) -> Run:
    """Answer a question file into a run folder; questions answered by an earlier, killed try are not asked again.

    With `share`, leading stages that a finished run nearby had (below runs/, or else beside `out`) are taken from
    there: `odqa.replay`.
    """
    from odqa.corpus.io import read_questions

    places = places or Places.from_environment()
    recipe = _recipe(recipe, "pipeline", changes)
    path = places.file(questions)
    queries = read_questions(path)
    loaded = load_pipeline(recipe, places=places, build=build, log=log)
    root = next((folder for folder in out.parents if folder.name == RUNS.name), out.parent)
    source = describe_file(questions, path)
    return run_queries(loaded, queries, out, source=source, share=root if share else None, log=log)


def run_queries(
    loaded: Loaded,
    queries: Sequence[Query],
    out: Path,
    *,
    source: Mapping[str, str],
    share: Path | None = None,
    log: Log = _silent,
) -> Run:
    """`run` for a loaded pipeline and questions in memory; `source` identifies them in the manifest.

    `share` is a folder of runs: leading stages that one there had are replayed and not computed (None: never).
    """
    settings, pipeline = loaded.settings, loaded.pipeline
    inputs: dict[str, Any] = {"questions": dict(source), "index": loaded.index.artifact.hash if loaded.index else None}
    inputs |= {"reranker": loaded.reranker_identity, "reader": _reader_identity(loaded)}
    inputs |= stage_identities(loaded, source)
    resolved = loaded.recipe.resolved
    if find_run(out, recipe=resolved, inputs=inputs) is not None:
        log(f"{out}: answered already")
        return load_run(out)
    reranker: object = pipeline.reranker
    if isinstance(reranker, ChecksQueries):
        reranker.check_queries(queries)
    reader: object = pipeline.reader
    spent = reader.spent() if isinstance(reader, CountsSpending) else {}
    taken = _leading_stages(inputs, share, log)
    with recording(out, [query.id for query in queries], recipe=resolved, inputs=inputs) as writer:
        if writer.finished:
            log(f"{out}: {len(writer.finished)} of {len(queries)} questions were answered already")
        if taken is not None and loaded.index is not None:
            log(f"{out}: the {taken.what} is taken from {taken.run.path}")
            replay = Replay(taken.run, loaded.index.store)
            pipeline = dataclasses.replace(pipeline, first_retriever=replay)
            if taken.what == "ranking" and pipeline.reranker is not None:
                pipeline.first_reranker = replay
            writer.measured[f"{taken.what}_from"] = os.path.relpath(taken.run.path, out)
        with progress("answer", len(queries), "questions") as bar:
            # Blocks are the same in every try: what a question is batched with may move the last digit of a score.
            for start in range(0, len(queries), settings.batch):
                block = queries[start : start + settings.batch]
                if any(query.id not in writer.finished for query in block):
                    traces = [trace for trace in pipeline.answer(block) if trace.query.id not in writer.finished]
                    writer.add(traces if taken is None else [without_times(trace, taken.what) for trace in traces])
                bar.advance(len(block))
        if isinstance(reader, ProvesFrozen):
            reader.check_frozen()
            writer.measured["backbone_unchanged"] = True
        if isinstance(reader, CountsSpending):
            writer.measured["reader"] = {name: count - spent[name] for name, count in reader.spent().items()}
    return load_run(out)


@dataclass(frozen=True, slots=True)
class _Taken:
    """Leading stages of a finished run: its retrieval alone, or its whole ranking."""

    what: Leading
    run: Run


def _leading_stages(inputs: Mapping[str, Any], share: Path | None, log: Log) -> _Taken | None:
    """The most that a run below `share` has in common with one of these inputs."""
    for what in _MOST_FIRST:
        if share is not None and inputs[what] is not None:
            found = find_leading(share, what, inputs[what], log=log)
            if found is not None:
                return _Taken(what, found)
    return None


def stage_identities(loaded: Loaded, source: Mapping[str, str]) -> dict[str, str | None]:
    """A hash for each leading stage over what decides what comes out of it; None without a retriever.

    "retrieval": index, retriever, k, and the questions (`source`); the batch, too, because what a question is batched
    with may move the last digit of a score. "ranking": that, and the re-ranker with its weights. Not the machine: as in
    a run that is resumed elsewhere, a stage may come from another processor than the answers.
    """
    if loaded.settings.retriever is None or loaded.index is None:
        return {"retrieval": None, "ranking": None}
    recipe = loaded.recipe.resolved
    first = {key: recipe[key] for key in ("retriever", "k", "batch")}
    parts = [odqa.__version__, loaded.index.artifact.hash, first, source["sha256"]]
    parts += [source[part] for part in ("first", "without") if part in source]  # not all questions of the file
    retrieval = sha256_json(parts)
    return {
        "retrieval": retrieval,
        "ranking": sha256_json([retrieval, recipe["reranker"], loaded.reranker_identity]),
    }


def _reranker_identity(settings: config.RerankerSettings | None, places: Places) -> Any:
    """See `Loaded.reranker_identity`."""
    match settings:
        case None:
            return None
        case config.Cascade():
            return [_reranker_identity(stage, places) for stage in settings.stages]
        case config.GivenScores():
            path = places.file(settings.run)
            return load_run(path).artifact.hash if path.is_dir() else sha256_file(path)
        case config.CrossEncoder() | config.QuestionLikelihood():
            name = settings.model
            if name.startswith(("embedded:", "data:")):
                return identify_model(name, places.file(name))
            return identify_model(name, Path(name) if Path(name).is_dir() else None)


def _reader_identity(loaded: Loaded) -> str:
    """What the readers are, by content: that of the first pass, and that of later ones if there is one."""
    first = _identity_of_reader(loaded.settings.reader, loaded.pipeline.reader, loaded.places)
    second = loaded.settings.second_reader
    if second is None:
        return first
    reader = loaded.pipeline.rereader or getattr(loaded.pipeline.recursion, "asker", None)
    return sha256_json([first, _identity_of_reader(second, reader, loaded.places)])


def _identity_of_reader(settings: config.AnyReader, reader: object, places: Places) -> str:
    """What a reader is, by content: the hash of its trained part, or of the frozen model that reads alone.

    A calibration belongs to it: it decides on confidence and abstention. Of a model behind a server it is address, name
    and the rule of its prices: nobody can see more from here.
    """
    if isinstance(settings, config.SpanReaderSettings):
        folder = places.file(settings.model)
        files = (folder / name for name in ("method.safetensors", "head.safetensors", "calibration.json"))
        return sha256_json([sha256_file(file) for file in files if file.is_file()])
    if isinstance(settings, config.ApiReaderSettings):
        from odqa.read.api import ApiReader

        assert isinstance(reader, ApiReader)
        parts = [reader.identity]
    else:
        from odqa.read.lm import LmReader

        assert isinstance(reader, LmReader)
        parts = [reader.backbone.fingerprint]
    if isinstance(settings, config.LmReaderSettings):
        folders = [places.file(name) for name in settings.methods]
        parts += [sha256_file(folder / name) for folder in folders for name in ("method.safetensors", "method.json")]
    if isinstance(settings.demonstrations, config.DemonstrationPool):
        parts.append(sha256_file(places.file(settings.demonstrations.file)))
    return parts[0] if len(parts) == 1 else sha256_json(parts)


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
    gains: list[Gain] = field(default_factory=list)
    checks: list[tuple[str, Check]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every expected number is within its tolerance."""
        return all(check.ok for _, check in self.checks)

    def render(self, style: Style = "text") -> str:
        """The report: per question set scores, gains, funnel and times of all pipelines; expectations; published."""
        named = [(system.pipeline.name, system.evaluation) for system in self.systems]
        return render(named, self.checks, gains=self.gains, published=self.published, style=style)

    @property
    def published(self) -> list[Published]:
        """The figures of others that the recipe puts beside ours."""
        settings = self.recipe.settings
        assert isinstance(settings, config.EvalRecipe)
        return [Published(**figure.model_dump()) for figure in settings.published]

    def to_json(self) -> dict[str, Any]:
        """The result file: recipes and hashes, inputs, scores, funnel, time, gains. Without the questions."""
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
            "gains": [gain.to_json() for gain in self.gains],
            "published": [dataclasses.asdict(figure) for figure in self.published],
        }

    def save(self, stem: Path, log: Log = _silent) -> None:
        """Write the report as STEM.md and STEM.json, and the figure, if the recipe has one, as STEM.svg or STEM.png.

        Without matplotlib there is no figure but a warning: the numbers must not be lost.
        """
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_name(stem.name + ".md").write_text(self.render("markdown"), encoding="utf-8")
        record = json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n"
        stem.with_name(stem.name + ".json").write_text(record, encoding="utf-8")
        settings = self.recipe.settings
        assert isinstance(settings, config.EvalRecipe)
        if settings.figure is not None:
            try:
                self._draw(settings.figure, stem)
            except MissingExtra as error:
                log(f"warning: the figure is missing. {error}")

    def _draw(self, figure: config.FigureSettings, stem: Path) -> None:
        from odqa.figures import Measured, save_figure

        systems = [Measured(s.pipeline.name, number_at(s.pipeline, figure.x), s.evaluation) for s in self.systems]
        path = stem.with_name(f"{stem.name}.{figure.format}")
        save_figure(path, systems, metrics=figure.y, x_label=figure.x_label or figure.x, x_scale=figure.x_scale)


def run_evaluation(
    recipe: str | Path | Recipe,
    *,
    places: Places | None = None,
    out: Path | None = None,
    changes: Sequence[str] = (),
    share: bool = True,
    log: Log = _silent,
) -> EvaluationResult:
    """Build what is missing, answer every question set, score, compare with the expected numbers.

    Runs lie in `out`/RECIPE/PIPELINE-VERSION/QUESTION_SET with scores.json in each (`out` is ./runs if not given); the
    version is eight digits that stand for the pipeline's settings, its index, re-ranker and reader.

    With `share`, pipelines with equal leading stages compute them once: what any run below `out` had is taken from
    there (`odqa.replay`), and what a model said of a pair or a row is not asked again. Without, each computes all.
    """
    out = out or RUNS
    places = places or Places.from_environment()
    recipe = _recipe(recipe, "eval", changes)
    settings = recipe.settings
    assert isinstance(settings, config.EvalRecipe)
    variants = load_variants(recipe)
    if settings.figure is not None:
        for variant in variants:
            number_at(variant, settings.figure.x)  # an error now, not after hours
    sets = [(question_set, *load_questions(question_set, places)) for question_set in settings.questions]
    result = EvaluationResult(recipe)
    index_of: dict[str, Index] = {}
    asked = [(gold, question_set.matcher) for question_set, _, _, gold in sets]
    kept = Kept(remember=_REMEMBERED if share else 0)
    for variant in variants:
        loaded = load_pipeline(variant, places=places, build=True, indexes=index_of, kept=kept, log=log)
        held = questions_in_collection(loaded.index if settings.ceiling else None, asked, places=places)
        for (question_set, source, queries, gold), ids in zip(sets, held, strict=True):
            version = f"{loaded.recipe.name}-{_version(loaded)}"
            folder = out / recipe.name / version / question_set.name
            log(f"{loaded.recipe.name} on {question_set.name}: {len(queries)} questions, into {folder}")
            finished = run_queries(loaded, queries, folder, source=source, share=out if share else None, log=log)
            evaluation = score_run(
                finished, gold, loaded.index, question_set=question_set.name, split=question_set.split,
                matcher=question_set.matcher, depths=settings.recall_at, seed=settings.seed,
                in_collection=ids,
            )  # fmt: skip
            expected = question_set.expected.get(loaded.recipe.name, {})
            checks = check_expectations(evaluation, _expectations(expected))
            result.systems.append(System(loaded.recipe, evaluation, finished))
            result.checks += [(loaded.recipe.name, check) for check in checks]
        del loaded  # before the next one is loaded: two readers need not fit into memory
    _compare_systems(result, settings)
    return result


def questions_in_collection(
    index: "Index | None", asked: Sequence[tuple[Sequence[Gold], Matcher]], *, places: Places
) -> list[frozenset[str] | None]:
    """For each set the ids of its questions that any passage of the index answers; None without an index.

    One pass over the collection for all sets that have not been looked for yet. What was found is kept below
    artifacts/ceilings, under a hash of the passages, the answers and the matcher. See `odqa.evaluate.ceiling`.
    """
    if index is None:
        return [None] * len(asked)
    stored = index.artifact.manifest["files"].items()
    texts = sorted((name, file["sha256"]) for name, file in stored if name.startswith("passages/"))
    keys = [
        sha256_json([odqa.__version__, texts, [[item.query_id, item.answers] for item in gold], matcher])
        for gold, matcher in asked
    ]
    files = [places.artifacts / "ceilings" / f"{key[:32]}.json" for key in keys]
    searches = {
        file: AnswerSearch(gold, matcher)
        for file, (gold, matcher) in zip(files, asked, strict=True)
        if not file.is_file()
    }
    if searches:
        with progress("look for answers", len(index.store), "passages") as bar:
            for passage in index.store:
                for search in searches.values():
                    search.see(passage.text)
                bar.advance()
    for file, search in searches.items():
        save_file(file, json.dumps({"found": sorted(search.found)}, ensure_ascii=False, indent=1) + "\n")
    return [_load_found(file) for file in files]


def _load_found(file: Path) -> frozenset[str]:
    try:
        return frozenset(json.loads(file.read_text(encoding="utf-8"))["found"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: not what a search for answers leaves ({error!r}). Delete it; it is made again."
        ) from error


def number_at(recipe: Recipe, path: str) -> float:
    """The setting of a pipeline recipe that a path such as packer.budget leads to; RecipeError if it is no number."""
    found: Any = recipe.resolved
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise RecipeError(
            f"figure.x: {path} of {recipe.name} is {found!r}; a figure needs a number there, such as packer.budget."
        )
    return float(found)


def _expectations(expected: Mapping[str, config.Expected], *, of_gain: bool = False) -> list[Expectation]:
    """What a recipe expects, as `odqa.evaluate` checks it; the lower bound of a gain must also be a clear gain."""
    found = []
    for name, number in expected.items():
        if number.value is not None:
            found.append(Expectation(name, number.value, 1.0 if number.tolerance is None else number.tolerance))
        elif number.at_least is not None:
            found.append(Expectation(name, number.at_least, 0.0, is_lower_bound=True, must_be_clear=of_gain))
    return found


def _compare_systems(result: EvaluationResult, settings: config.EvalRecipe) -> None:
    """Add the gains that the recipe names, on every question set, and check what is expected of them."""
    found = {(s.pipeline.name, s.evaluation.question_set): s.evaluation for s in result.systems}
    for question_set in settings.questions:
        for named in settings.gains:
            first, second = found[named.from_, question_set.name], found[named.to, question_set.name]
            expected = named.expected.get(question_set.name, {})
            metrics = dict.fromkeys((*GAIN_METRICS, *expected))
            gain = measure_gain(named.from_, first, named.to, second, metrics=tuple(metrics), seed=settings.seed)
            result.gains.append(gain)
            result.checks += [(gain.name, check) for check in gain.check(_expectations(expected, of_gain=True))]


def _version(loaded: Loaded) -> str:
    """Eight hex digits for the run folder of a pipeline: its settings, its index, its re-ranker, its reader."""
    index_hash = loaded.index.artifact.hash if loaded.index else None
    return sha256_json([loaded.recipe.hash, index_hash, loaded.reranker_identity, _reader_identity(loaded)])[:8]


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
    measured = finished.manifest["measured"]
    with progress("score", len(gold), "questions") as bar:
        evaluation = evaluate(bar.over(finished.traces()), gold, _text_of(index), measured=measured, **options)
    finished.save_scores(evaluation.to_json())
    return evaluation


def _text_of(index: "Index | None") -> Callable[[str], str]:
    if index is None:
        return lambda passage_id: ""
    store = index.store
    return lambda passage_id: store[store.row_of(passage_id)].text


def load_questions(question_set: config.QuestionSet, places: Places) -> tuple[dict[str, str], list[Query], list[Gold]]:
    """Source, queries and gold of a question set, from a file or through `datasets`."""
    source, queries, gold = _all_questions(question_set, places)
    if question_set.without:
        source, queries, gold = _leave_out(question_set, source, queries, gold, places)
    limit = question_set.limit
    if limit is not None and limit < len(queries):
        source = {**source, "first": str(limit)}
    return source, queries[:limit], gold[:limit]


def _leave_out(
    question_set: config.QuestionSet, source: dict[str, str], queries: list[Query], gold: list[Gold], places: Places
) -> tuple[dict[str, str], list[Query], list[Gold]]:
    """Without the questions that other files ask in the same words; case and punctuation's blanks do not count."""
    from odqa.corpus.io import read_questions

    files = [places.file(name) for name in question_set.without]
    asked = {token_string(query.text) for file in files for query in read_questions(file)}
    kept = [number for number, query in enumerate(queries) if token_string(query.text) not in asked]
    if not kept:
        raise DataError(f"{source['name']}: every question is in {', '.join(question_set.without)}; none is left.")
    source = {**source, "without": sha256_json([sha256_file(file) for file in files])}
    return source, [queries[number] for number in kept], [gold[number] for number in kept]


def _all_questions(question_set: config.QuestionSet, places: Places) -> tuple[dict[str, str], list[Query], list[Gold]]:
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
    """Paired differences of two scored runs, and the questions that changed, both ways."""
    evaluations = [Evaluation.from_json(load_run(path).scores()) for path in (first, second)]
    comparison = compare(*evaluations)
    if as_json:
        ways = {"won": comparison.won, "lost": comparison.lost, "moved": comparison.moved}
        ids = {way: [question.id for question, _ in pairs] for way, pairs in ways.items()}
        return json.dumps({**dataclasses.asdict(comparison), **ids}, ensure_ascii=False)
    names = (str(first), str(second))
    texts = {trace.query.id: trace.query.text for trace in load_run(first).traces()}
    return join([comparison_table(*names, comparison), *changed_tables(*names, comparison, texts)])


@dataclass(frozen=True, slots=True)
class Report:
    """A report that was written: where, and what it says, a section a question set."""

    path: Path
    sections: "Sequence[Section]"

    def to_json(self) -> dict[str, Any]:
        systems = [system.to_json() for section in self.sections for system in section.systems]
        return {"path": str(self.path), "systems": systems}


def report(
    paths: Sequence[Path], out: Path | None = None, *, places: Places | None = None, sample: int = SAMPLE, seed: int = 0
) -> Report:
    """Write one file about scored runs: HTML, or markdown if `out` ends in .md.

    `paths` are run folders, or folders of `odqa eval` with runs two levels below. Runs of the same question set are
    compared, each with the first. Without `out` it is report.html in the folder, if it is one, else in the current one.
    Passages that were found and not packed are shown where the index of the run is there. Raises DataError for a folder
    without scored runs and for runs of different questions under one name, ArtifactMismatch for an unfinished one.
    """
    from odqa.report.content import gather
    from odqa.report.page import render_page
    from odqa.report.paper import render_paper

    places = places or Places.from_environment()
    out = out or (paths[0] if len(paths) == 1 else Path()) / "report.html"
    if out.suffix not in (".html", ".md"):
        raise DataError(f"{out}: a report is written as .html or .md. Name the file so.")
    runs = [run for path in paths for run in _runs_in(path)]
    with progress("report", len(runs), "runs") as bar:
        sources = [_reported(name, run, places) for name, run in zip(_run_names(runs), runs, strict=True)]
        sections = gather(sources, sample=sample, seed=seed, advance=bar.advance)
    render_file = render_page if out.suffix == ".html" else render_paper
    save_file(out, render_file(sections, title=" and ".join(path.resolve().name for path in paths)))
    return Report(out, sections)


def _runs_in(path: Path) -> list[Run]:
    """The run at `path`, or the scored runs of an evaluation, PIPELINE-VERSION/SET below it, the oldest first."""
    if (path / MANIFEST).is_file():
        return [load_run(path)]
    found = [file.parent for file in path.glob(f"*/*/{MANIFEST}") if not file.parent.parent.name.startswith(".")]
    found = [folder for folder in found if (folder / SCORES).is_file() and not folder.name.startswith(".")]
    if not found:
        raise DataError(
            f"{path}: neither a run nor a folder of odqa eval with scored runs. Score one: odqa eval RECIPE"
        )
    return [
        load_run(folder) for folder in sorted(found, key=lambda folder: ((folder / MANIFEST).stat().st_mtime, folder))
    ]


def _run_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run: its pipeline's folder, or as much of the path as tells them apart."""
    paths = [run.path.resolve() for run in runs]
    sets = [run.scores().get("question_set") for run in runs]
    short = [path.parent.name if path.name == name else path.name for path, name in zip(paths, sets, strict=True)]
    plain = [re.sub(r"-[0-9a-f]{8}$", "", name) for name in short]  # less the version that odqa eval puts behind it
    for names in (plain, short):
        if len(set(zip(names, sets, strict=True))) == len(runs):
            return names
    return [str(run.path) for run in runs]


def _reported(name: str, run: Run, places: Places) -> "Source":
    from odqa.report.content import Source

    inputs = run.manifest["inputs"]
    facts = {
        "run": str(run.path),
        "pipeline recipe": run.manifest["recipe_hash"],
        "questions": f"{inputs['questions']['name']}, sha256 {inputs['questions']['sha256']}",
        "index": str(inputs["index"]),
        "peak memory": f"{run.manifest['measured'].get('peak_memory_bytes', 0) / 2**20:,.0f} MiB",
        "odqa": str(run.manifest["odqa"]),
    }
    return Source(name, Evaluation.from_json(run.scores()), run.traces(), facts, _look_up(run, places))


def _look_up(run: Run, places: Places) -> "LookUp":
    """Passages of the index that a run was answered from; none if that index is not here any more."""
    from odqa.retrieve.index import load_index

    name = run.manifest["recipe"]["index"]
    folder = None if name is None else index_folder(name, places)[0]
    if folder is None or not (folder / MANIFEST).is_file():
        return lambda passage_id: None
    index = load_index(folder)
    if index.artifact.hash != run.manifest["inputs"]["index"]:
        return lambda passage_id: None
    return lambda passage_id: index.store[index.store.row_of(passage_id)]


def _recipe(recipe: str | Path | Recipe, kind: str, changes: Sequence[str] = ()) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe, kind, changes=changes)
