"""From a YAML file to running stages: `load_recipe` reads and checks, `build_*` call plain constructors.

A recipe is one file, without inheritance or interpolation. All mistakes of a file are reported at once, each with its
path and the nearest valid name. No class outside this module sees a recipe.
"""

import copy
import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from odqa import config
from odqa.artifacts import MANIFEST, sha256_file, sha256_json
from odqa.errors import ArtifactError, DataError, RecipeError
from odqa.runtime import Recent

if TYPE_CHECKING:
    from odqa.corpus.dump import DumpPassages
    from odqa.corpus.mediawiki import DumpReport
    from odqa.frozen.backbone import Backbone
    from odqa.pack.trim import SentenceTrimmer
    from odqa.pipeline import Fuse, Pipeline
    from odqa.read.prompts import ChooseDemonstrations, Demonstration
    from odqa.retrieve.index import Index
    from odqa.stages import Packer, Reader, Reranker, Retriever
    from odqa.types import Passage

R = TypeVar("R", bound=config.Settings)
S = TypeVar("S")
P = TypeVar("P")

FOLDERS = ("indexes", "pipelines", "eval")
_SHIPPED = "recipes_shipped"  # where the wheel keeps the three folders


# --- reading and checking ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe: `settings` with every default filled in, `name` for folders, `hash` for manifests.

    `given_name` is what an eval recipe calls this pipeline; empty: it is called as its file.
    """

    path: Path
    settings: config.Settings
    given_name: str = ""

    @property
    def name(self) -> str:
        return self.given_name or self.path.stem

    @property
    def resolved(self) -> dict[str, Any]:
        """The recipe as JSON values, every default written out."""
        return self.settings.model_dump(mode="json")

    @property
    def hash(self) -> str:
        return sha256_json(self.resolved)


def load_recipe(
    path: str | Path, kind: str | None = None, *, changes: Sequence[str] = (), settings: Mapping[str, Any] | None = None
) -> Recipe:
    """Read and check a recipe; `changes` are "a.b=value" with values in YAML, `settings` the same as {"a.b": value}.

    Raises RecipeError with every mistake of the file: unknown, missing and doubled keys, wrong types, wrong kind.
    """
    file = find_recipe(path)
    values = _load_yaml(file)
    for key, value in (settings or {}).items():
        _put(values, key, value, f"set {key}")
    for change in changes:
        _apply(values, change)
    found = values.get("kind")
    if not isinstance(found, str) or found not in config.RECIPES:
        raise RecipeError(f"{file}: kind is {found!r}; expected one of {', '.join(config.RECIPES)}.")
    if kind is not None and not found.startswith(kind):
        raise RecipeError(f"{file}: this is a recipe of kind {found!r}; a recipe of kind {kind!r} is needed here.")
    try:
        return Recipe(file, config.RECIPES[found].model_validate(values))
    except ValidationError as error:
        details = error.errors()
        wrong = [detail["loc"] for detail in details]
        mistakes = [
            _explain(detail, config.RECIPES[found])
            for detail in details
            # A list whose items are wrong also counts as too short.
            if detail["type"] != "too_short"
            or not any(loc[: len(detail["loc"])] == detail["loc"] != loc for loc in wrong)
        ]
        raise RecipeError("\n".join(f"{file}: {mistake}" for mistake in mistakes)) from None


def load_variants(recipe: Recipe) -> list[Recipe]:
    """The pipelines of an eval recipe, each under its name there and with the settings that are changed there.

    Raises RecipeError with the mistakes of all of them, each with its place in the eval recipe.
    """
    settings = recipe.settings
    assert isinstance(settings, config.EvalRecipe)
    loaded, mistakes = [], []
    for number, variant in enumerate(settings.pipelines):
        try:
            found = load_recipe(variant.recipe, "pipeline", settings=variant.set)
            loaded.append(dataclasses.replace(found, given_name=variant.name))
        except RecipeError as error:
            where = f"{recipe.path}: pipelines.{number} ({variant.name})"
            mistakes += [f"{where}: {line}" for line in str(error).splitlines()]
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return loaded


def save_setting(path: str | Path, key: str, value: float) -> None:
    """Put a number in the place of the one that a recipe file has under "a.b"; all other text stays, comments too.

    Raises RecipeError for a file that is not there, a key that the file lacks or that is not a number there, and for a
    number that the recipe may not have; the file is then as before.
    """
    file = Path(path)
    if not file.is_file():
        raise RecipeError(f"{file}: no such file to write {key} into. Copy a recipe there first.")
    load_recipe(file, settings={key: value})
    text = file.read_bytes().decode("utf-8")
    place = yaml.compose(text, yaml.SafeLoader)
    for name in key.split("."):
        pairs = place.value if isinstance(place, yaml.MappingNode) else []
        place = next((node for found, node in pairs if found.value == name), None)
    if not isinstance(place, yaml.ScalarNode) or not place.tag.endswith((":float", ":int")):
        raise RecipeError(f"{file}: {key} is not written there as a number. Write one, then it can be replaced.")
    number = format(Decimal(repr(value)), "f")  # YAML 1.1 reads 1e-05 as a text
    changed = f"{text[: place.start_mark.index]}{number}{text[place.end_mark.index :]}"
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(changed.encode("utf-8"))
    partial.replace(file)


def find_recipe(path: str | Path) -> Path:
    """The file itself, or the shipped recipe of that name (pipelines/nq-mini.yaml works from any folder)."""
    path = Path(path)
    if path.is_file():
        return path
    candidates = [root / path for root in _recipe_roots()]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    shipped = sorted({f"{folder}/{file.name}" for folder, file in _shipped_recipes()})
    near = difflib.get_close_matches(str(path), shipped, n=1)
    hint = f" Did you mean {near[0]}?" if near else f" Shipped are {', '.join(shipped)}."
    raise RecipeError(f"{path}: no such recipe here or among the shipped ones.{hint}")


def _recipe_roots() -> list[Path]:
    package = Path(str(resources.files("odqa")))
    return [package / _SHIPPED, package.parent]  # an installed wheel, a source checkout


def _shipped_recipes() -> Iterator[tuple[str, Path]]:
    for root in _recipe_roots():
        for folder in FOLDERS:
            for file in sorted((root / folder).glob("*.yaml")):
                yield folder, file


class _UniqueKeys(yaml.SafeLoader):
    """A loader that refuses a key given twice, which YAML's own takes for a later, better idea."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        where = f"{key_node.start_mark.name}, line {key_node.start_mark.line + 1}"
        if not isinstance(key, str):
            raise RecipeError(f"{where}: key {key!r} is not a name. Put it into quotes if it is meant as one.")
        if key in seen:
            raise RecipeError(f"{where}: key {key!r} is given twice. Remove one.")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            values = yaml.load(file, _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping with a kind; found {type(values).__name__}.")
    return values


def _apply(values: dict[str, Any], change: str) -> None:
    """Put the value of "a.b=value" in its place."""
    path, equals, value = change.partition("=")
    if not equals or not all(path.split(".")):
        raise RecipeError(f"--set {change}: expected KEY=VALUE or KEY.KEY=VALUE.")
    try:
        parsed = yaml.load(value, _UniqueKeys)
    except RecipeError as error:
        raise RecipeError(f"--set {change}: {str(error).split(': ', 1)[1]}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {change}: {value!r} is not a YAML value.") from error
    _put(values, path, parsed, f"--set {change}")


def _put(values: dict[str, Any], path: str, value: Any, told: str) -> None:
    """Set "a.b" to a value; items of a list go by their number from 0. Mistakes begin with `told`."""
    *parents, last = path.split(".")
    if not all((*parents, last)):
        raise RecipeError(f"{told}: expected KEY or KEY.KEY.")
    place: Any = values
    for key in parents:
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        place = place[_key(place, key, told)]
    place[_key(place, last, told)] = copy.deepcopy(value)  # a later key may change a part of it


def _key(place: Any, key: str, told: str) -> str | int:
    """What `key` means in a mapping or a list. Raises RecipeError in a value, or for an item that a list lacks."""
    if isinstance(place, dict):
        return key
    if not isinstance(place, list):
        raise RecipeError(f"{told}: {key!r} is to be set in {place!r}, which is a value, not settings.")
    if not (key.isascii() and key.isdecimal() and int(key) < len(place)):
        raise RecipeError(f"{told}: {key!r} is not an item of the list; items are 0 to {len(place) - 1}.")
    return int(key)


def _explain(detail: ErrorDetails, model: type[config.Settings]) -> str:
    """One mistake in a line: where, what was found, what is expected, the nearest valid name."""
    where, kind, context = detail["loc"], detail["type"], detail.get("ctx", {})
    members, parts = _follow(model, where)
    path = ".".join(parts)
    if kind == "extra_forbidden":
        owner = _follow(model, where[:-1])[0][0]
        names = [field.alias or name for name, field in owner.model_fields.items()]
        # A component is called by its kind, settings without one by the key they stand under.
        name = _tag(owner) or next((part for part in reversed(parts[:-1]) if not part.isdecimal()), owner.__name__)
        return f"{path} is not a setting of {name} ({', '.join(names)}).{_did_you_mean(parts[-1], names)}"
    if kind == "missing":
        return f"{path} is missing."
    tags = [tag for member in members if (tag := _tag(member))]
    if kind == "union_tag_not_found":
        return f"{path}.kind is missing ({', '.join(tags)})."
    if kind == "union_tag_invalid":
        found, hint = context["tag"], _did_you_mean(context["tag"], tags)
        return f"{path}.kind is {found!r}; expected one of {', '.join(tags)}.{hint}"
    if kind == "value_error":  # of a validator in odqa.config, which says all there is to say
        return f"{path}: {context['error']}" if path else str(context["error"])
    return f"{path} is {_shortened(detail['input'])}: {detail['msg']}."


def _did_you_mean(name: str, valid: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, valid, n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _follow(model: type[config.Settings], where: Sequence[int | str]) -> tuple[list[type[config.Settings]], list[str]]:
    """The settings classes that may stand where the path leads to, and the path as the recipe has it.

    pydantic puts the tag of a union into the path; a reader of the recipe does not see it there.
    """
    members: list[type[config.Settings]] = [model]
    path = []
    for part in where:
        tagged = [member for member in members if len(members) > 1 and _tag(member) == part]
        if tagged:
            members = tagged
            continue
        path.append(str(part))
        if len(members) == 1 and isinstance(part, str) and part in members[0].model_fields:
            members = _classes(members[0].model_fields[part].annotation)
    return members, path


def _classes(annotation: Any) -> list[type[config.Settings]]:
    """The settings classes in an annotation such as `A`, `A | B | None`, `tuple[A, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, config.Settings):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _classes(argument)]


def _tag(model: type[config.Settings]) -> str | None:
    field = model.model_fields.get("kind")
    values = getattr(field.annotation, "__args__", (None,)) if field is not None else (None,)
    return values[0]


# --- places -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Places:
    """Where things lie: `data` is the data folder (None: not given), `artifacts` holds what odqa makes."""

    data: Path | None = None
    artifacts: Path = Path("artifacts")

    @classmethod
    def from_environment(cls, data: Path | None = None, artifacts: Path | None = None) -> "Places":
        """Arguments first, then ODQA_DATA and ODQA_ARTIFACTS, then no data folder and ./artifacts."""
        from_env = os.environ.get("ODQA_DATA")
        return cls(
            data if data is not None else Path(from_env) if from_env else None,
            artifacts if artifacts is not None else Path(os.environ.get("ODQA_ARTIFACTS", "artifacts")),
        )

    def file(self, name: str) -> Path:
        """The path that a recipe's `embedded:NAME`, `data:NAME` or plain path means. Raises DataError for none."""
        scheme, colon, rest = name.partition(":")
        if colon and scheme == "embedded":
            path = Path(str(resources.files("odqa"))) / "assets" / rest
        elif colon and scheme == "data":
            if self.data is None:
                raise DataError(
                    f"{name} lies in the data folder, which is not known. Give --data DIR or set ODQA_DATA."
                )
            path = self.data / rest
        else:
            path = Path(name)
        if not path.exists():
            is_lost = scheme == "data" and self.data is not None and not self.data.is_dir()
            hint = " The data folder itself is not there: check --data and ODQA_DATA." if is_lost else ""
            raise DataError(f"{name}: no such file ({path.absolute()}).{hint}")
        return path


def describe_file(name: str, path: Path) -> dict[str, str]:
    """How a manifest names an input file: as the recipe does, and by content. Raises DataError for a folder."""
    if path.is_dir():
        raise DataError(f"{name}: a folder; a file is needed here.")
    return {"name": name, "sha256": sha256_file(path)}


# --- building ---------------------------------------------------------------------------------------------------------


class Kept:
    """The parts of the pipeline built last, so that the next one loads no model twice.

    A part with other settings is let go before its successor is built: two readers are never in memory together.
    What a model said of single passages is kept longer, the last `remember` of them for each model (0: nothing).
    """

    def __init__(self, remember: int = 0) -> None:
        self.remember = remember
        self._parts: dict[str, tuple[Any, Any]] = {}
        self._memories: dict[tuple[object, ...], Recent[Any, Any]] = {}

    def memory(self, *model: object) -> "Recent[Any, Any] | None":
        """What is known of single passages by the model that `model` stands for."""
        return self._memories.setdefault(model, Recent(self.remember)) if self.remember else None

    def part(self, name: str, settings: S, build: Callable[[S], P]) -> P:
        """What the last pipeline had under this name if its settings are equal, else what `build` makes of them."""
        if name not in self._parts or self._parts[name][0] != settings:
            self._parts.pop(name, None)
            self._parts[name] = settings, build(settings)
        part: P = self._parts[name][1]
        return part


def build_pipeline(
    recipe: Recipe, index: "Index | None", *, places: Places | None = None, kept: Kept | None = None
) -> "Pipeline":
    """The pipeline of a recipe, over an open index (None: closed-book); see `Kept` for pipelines in a row."""
    from odqa.pipeline import Pipeline

    settings = recipe.settings
    assert isinstance(settings, config.PipelineRecipe)
    kept = kept or Kept()
    wanted = (settings.reader, shares_model(settings))
    reader = kept.part("reader", wanted, lambda found: build_reader(found[0], places, kept=kept, is_shared=found[1]))
    retriever = build_retriever(settings, index)
    reranker = kept.part("reranker", settings.reranker, lambda found: build_reranker(found, places, kept=kept))
    packer = build_packer(settings.packer, reader, reranker)
    pipeline = Pipeline(reader, packer, retriever, reranker, k=settings.k)
    return with_recursion(pipeline, settings, places)


def shares_model(settings: config.PipelineRecipe) -> bool:
    """Whether both readers of a pipeline compute with one frozen model, each with a method of its own."""
    first, second = settings.reader, settings.second_reader
    if not isinstance(first, config.LmReaderSettings) or not isinstance(second, config.LmReaderSettings):
        return False
    return all(
        getattr(first, name) == getattr(second, name)
        for name in ("model", "architecture", "device", "dtype", "load_options")
    )


def with_recursion(pipeline: "Pipeline", settings: config.PipelineRecipe, places: Places | None) -> "Pipeline":
    """The pipeline itself, with what the recipe says of further passes."""
    from odqa.recurse import CandidateRecursion, Gate, RetrievalRecursion, Samples, VectorRecursion, surer
    from odqa.stages import DrawsSamples, GivesVectors, ReadsCandidates

    chosen = settings.recursion
    if chosen is None:
        return pipeline
    pipeline.max_passes = chosen.passes
    pipeline.keep = surer if chosen.keep == "surer" else None
    gate = Gate(chosen.below)
    second = settings.second_reader
    reader = None if second is None else _second_reader(second, pipeline.reader, settings, places)
    first: object = pipeline.reader
    if isinstance(chosen, config.NeuralRecursion):
        pipeline.rereader = reader
        gives: object = reader
        assert isinstance(gives, GivesVectors)  # the recipe was checked: it is of kind lm
        pipeline.recursion = VectorRecursion(gives, gate=gate)
        return pipeline
    if isinstance(chosen, config.TextualRecursion):
        pipeline.rereader = reader
        shows: object = reader
        assert isinstance(shows, ReadsCandidates)  # the recipe was checked: it is of kind lm
        if chosen.source == "reader":
            pipeline.recursion = CandidateRecursion(shows, listed=chosen.candidates, gate=gate)
        else:
            assert isinstance(first, DrawsSamples)
            samples = Samples(chosen.candidates, chosen.temperature, chosen.top_p, chosen.seed)
            pipeline.recursion = CandidateRecursion(shows, first, samples=samples, gate=gate)
        return pipeline
    packer = None if reader is None else build_packer(settings.packer, reader, pipeline.reranker)
    pipeline.recursion = RetrievalRecursion(chosen.query, asker=reader, packer=packer, gate=gate)
    pipeline.fuse = _fusion(chosen.fusion)
    return pipeline


def _fusion(name: str) -> "Fuse | None":
    from odqa.retrieve.fuse import fuse_hits_by_rank, fuse_hits_by_score

    return {"rrf": fuse_hits_by_rank, "mean": fuse_hits_by_score, "new": None}[name]


def _second_reader(
    settings: config.LmReaderSettings | config.ApiReaderSettings,
    first: "Reader",
    pipeline: config.PipelineRecipe,
    places: Places | None,
) -> "Reader":
    """The reader of later passes, on the first one's model where it names the same."""
    from odqa.read.lm import LmReader

    if isinstance(settings, config.LmReaderSettings) and shares_model(pipeline):
        assert isinstance(first, LmReader)
        return _build_lm_reader(settings, places or Places.from_environment(), first.backbone, is_shared=True)
    return build_reader(settings, places)


def build_retriever(settings: config.PipelineRecipe, index: "Index | None") -> "Retriever | None":
    """The retriever; RecipeError if the recipe names one half only, or one that the index has no files for."""
    from odqa.retrieve import index as retrieve

    if settings.retriever is None:
        return None
    if index is None:
        raise RecipeError(f"pipeline: a {settings.retriever.kind} retriever needs an index. Name one under index.")
    chosen = settings.retriever
    match chosen:
        case config.Bm25Retriever():
            return retrieve.Bm25Retriever(index)
        case config.DenseRetriever():
            return retrieve.DenseRetriever(index)
        case config.HybridRetriever():
            return retrieve.HybridRetriever(index, **chosen.model_dump(exclude={"kind"}))
        case config.AlphaHybridRetriever():
            return retrieve.AlphaHybridRetriever(index, **chosen.model_dump(exclude={"kind"}))


def build_packer(settings: config.PackerSettings, reader: "Reader", reranker: "Reranker | None") -> "Packer":
    """The packer, which budgets with the prices of this reader and has sentences scored as the recipe says."""
    from odqa.pack.greedy import GreedyPacker

    trim = None if settings.trim is None else _build_trimmer(settings.trim, reranker)
    return GreedyPacker(reader, **{**dict(settings), "trim": trim})


def _build_trimmer(settings: config.TrimSettings, reranker: "Reranker | None") -> "SentenceTrimmer":
    from odqa.pack.trim import ModelScores, SentenceTrimmer, TermOverlap

    own = settings.model_dump(include={"sentences", "around", "whole"})
    if settings.by == "terms":
        return SentenceTrimmer(**own, scorer=TermOverlap())
    from odqa.rerank.cascade import CascadeReranker
    from odqa.rerank.pairs import PairReranker

    last = reranker.stages[-1] if isinstance(reranker, CascadeReranker) else reranker
    assert isinstance(last, PairReranker)  # the recipe was checked: there is one, and it reads text
    return SentenceTrimmer(**own, scorer=ModelScores(last, settings.depth))


def build_reranker(
    settings: config.RerankerSettings | None, places: Places | None = None, *, kept: Kept | None = None
) -> "Reranker | None":
    """The re-ranker, or None; `kept` has the memory that re-rankers with the same model share."""
    if settings is None:
        return None
    if isinstance(settings, config.Cascade):
        from odqa.rerank.cascade import CascadeReranker

        return CascadeReranker([stage for one in settings.stages if (stage := build_reranker(one, places, kept=kept))])
    if isinstance(settings, config.GivenScores):
        return _build_score_reranker(settings, places or Places.from_environment())
    model = settings.model
    if model.startswith(("embedded:", "data:")):  # anything else is a folder or a name on the hub
        model = str((places or Places.from_environment()).file(model))
    options = settings.model_dump(exclude={"kind", "load_options"}) | {"model": model}
    if isinstance(settings, config.QuestionLikelihood):
        from odqa.rerank.likelihood import QuestionLikelihoodReranker

        options |= settings.load_options
        of_model = (model, settings.architecture, settings.prompt, settings.max_tokens, settings.device, settings.dtype)
        memory = None if kept is None else kept.memory("likelihood", *of_model, repr(settings.load_options))
        return QuestionLikelihoodReranker(memory=memory, **options)
    from odqa.rerank.cross import CrossEncoderReranker

    of_cross = (model, settings.max_tokens, settings.positive_label, settings.device, settings.dtype)
    memory = None if kept is None else kept.memory("rerank", *of_cross)
    return CrossEncoderReranker(memory=memory, **options)


def _build_score_reranker(settings: config.GivenScores, places: Places) -> "Reranker":
    """Scores of a run folder of odqa, or of a TREC run file."""
    from odqa.rerank.scores import ScoreReranker, load_trec_run

    path = places.file(settings.run)
    if not path.is_dir():
        scores = load_trec_run(path, tag=settings.tag)
        return ScoreReranker(scores, settings.tag or path.stem, depth=settings.depth)
    if settings.tag is not None:
        raise RecipeError(f"reranker scores: {settings.run} is a run folder, which has no tags. Remove tag.")
    from odqa.replay import reranked_order
    from odqa.runs import load_run

    return ScoreReranker(reranked_order(load_run(path)), path.name, depth=settings.depth)


def build_reader(
    settings: config.AnyReader,
    places: Places | None = None,
    *,
    kept: Kept | None = None,
    is_shared: bool = False,
) -> "Reader":
    """The reader, its frozen model loaded; `kept` has the memory that readers with the same model share.

    `is_shared`: another reader will compute with the same generative model, too. A reader behind a server asks it
    nothing yet. Raises RecipeError if its key is missing.
    """
    places = places or Places.from_environment()
    if isinstance(settings, config.ApiReaderSettings):
        return _build_api_reader(settings, places)
    if isinstance(settings, config.SpanReaderSettings):
        from odqa.read.span import SpanReader, load_span_reader

        model = load_span_reader(
            places.file(settings.model), backbone=settings.backbone, device=settings.device, dtype=settings.dtype
        )
        loading = {"kind", "model", "backbone", "device", "dtype"}
        of_model = (settings.model, settings.backbone, settings.device, settings.dtype, settings.candidates)
        memory = None if kept is None else kept.memory("read", *of_model)
        return SpanReader(model, memory=memory, **settings.model_dump(exclude=loading))
    from odqa.frozen.backbone import load_backbone
    from odqa.read.lm import load_lm

    load = {"device": settings.device, "dtype": settings.dtype, **settings.load_options}
    named = settings.architecture
    backbone = load_backbone(settings.model, named, **load) if named else load_lm(settings.model, **load)
    return _build_lm_reader(settings, places, backbone, is_shared=is_shared)


def _build_lm_reader(
    settings: config.LmReaderSettings, places: Places, backbone: "Backbone", *, is_shared: bool
) -> "Reader":
    """A generative reader on a model that is loaded."""
    from odqa.frozen.method import load_method
    from odqa.read.lm import LmReader
    from odqa.read.prompts import find_template

    methods = [load_method(places.file(name), backbone) for name in settings.methods]
    own = {"kind", "model", "method", "architecture", "prompt", "template", "demonstrations"}
    own |= {"device", "dtype", "load_options"}
    template = find_template(settings.prompt, settings.template)
    shown = build_demonstrations(settings.demonstrations, places)
    options = settings.model_dump(exclude=own)
    return LmReader(backbone, template, demonstrations=shown, method=methods, is_shared=is_shared, **options)


def _build_api_reader(settings: config.ApiReaderSettings, places: Places) -> "Reader":
    """A reader behind a server, with the key that the environment holds. RecipeError if the recipe holds it, too."""
    from odqa.read.api import ApiReader, ByteEstimate, CountsTokens, LocalTokenizer
    from odqa.read.endpoint import Endpoint, Secret
    from odqa.read.prompts import find_template

    key = None if settings.key_variable is None else Secret.from_environment(settings.key_variable)
    if key is not None and key.hide(written := settings.model_dump_json()) != written:
        raise RecipeError(f"reader api: the key of {key.variable} stands in the recipe, too. Take it out there.")
    patience = settings.model_dump(include={"timeout", "retries", "longest_wait"})
    cache = None if settings.cache is None else places.artifacts / settings.cache
    endpoint = Endpoint(settings.base_url, key=key, cache=cache, **patience)
    tokens: CountsTokens
    if settings.bytes_per_token is not None:
        tokens = ByteEstimate(settings.bytes_per_token)
    else:
        tokens = LocalTokenizer(str(settings.tokenizer))
    own = {"kind", "base_url", "model", "key_variable", "endpoint", "tokenizer", "bytes_per_token", "cache"}
    own |= {"prompt", "template", "demonstrations", *patience}
    return ApiReader(
        endpoint,
        settings.model,
        tokens,
        find_template(settings.prompt, settings.template),
        chat=settings.endpoint == "chat",
        demonstrations=build_demonstrations(settings.demonstrations, places),
        **settings.model_dump(exclude=own),
    )


def build_demonstrations(
    settings: tuple[config.DemonstrationSettings, ...] | config.DemonstrationPool, places: Places
) -> "Sequence[Demonstration] | ChooseDemonstrations":
    """What a prompt shows before a question: written in the recipe, drawn from a file, or chosen for each question."""
    from odqa.corpus.examples import read_solved
    from odqa.read.demonstrations import Nearest, draw, solved
    from odqa.read.prompts import Demonstration
    from odqa.types import Passage

    if not isinstance(settings, config.DemonstrationPool):
        passages = [
            None if d.text is None else Passage(f"demonstration-{i}", d.text, d.title) for i, d in enumerate(settings)
        ]
        return [Demonstration(d.question, d.answer, passage) for d, passage in zip(settings, passages, strict=True)]
    examples = read_solved(places.file(settings.file), sources=settings.sources)
    pool = [solved(example, with_passage=settings.passages) for example in examples]
    return Nearest(pool, settings.count) if settings.choose == "similar" else draw(pool, settings.count, settings.seed)


def read_source(
    settings: config.DumpPassages | config.FilePassages,
    path: Path,
    report: "DumpReport | None" = None,
    *,
    places: Places | None = None,
    watch: "Callable[[DumpPassages], object] | None" = None,
) -> "Iterator[Passage]":
    """The passages of a source in order; of a dump, article by article, with ids counted from 1.

    `watch` is called from time to time while a dump is read.
    """
    if isinstance(settings, config.FilePassages):
        from odqa.corpus.io import read_passages

        return read_passages(path)
    from odqa.corpus.dump import DumpPassages, DumpSettings
    from odqa.corpus.mediawiki import PageOptions
    from odqa.corpus.split import Cut

    window = settings.window
    names_index = settings.index not in (None, "none")
    dump = DumpSettings(
        PageOptions(settings.skip_disambiguation, settings.headings, settings.infoboxes),
        Cut(settings.words) if window is None else Cut(sentences=window.sentences, stride=window.stride),
        is_strict=settings.strict,
        index=(places or Places.from_environment()).file(str(settings.index)) if names_index else None,
        finds_index=settings.index is None,
    )
    return DumpPassages(path, dump, processes=settings.processes, report=report, watch=watch)


def check_index_recipe(found: Mapping[str, Any], recipe: Recipe, folder: Path) -> None:
    """Raises ArtifactError if the index in `folder` was built with other settings than the recipe's.

    The passages may be others: `odqa index RECIPE --dump FILE` builds a recipe's index over a dump of one's own.
    """
    wanted, built = recipe.resolved, with_defaults(found, recipe)
    differing = sorted(key for key in wanted if key != "passages" and built.get(key) != wanted[key])
    if differing:
        raise ArtifactError(
            f"{folder}: built with other settings of {', '.join(differing)} than {recipe.path} has now. Build it again "
            f"with: odqa index {recipe.path}"
        )


def with_defaults(found: Mapping[str, Any], recipe: Recipe) -> Mapping[str, Any]:
    """The recipe in a manifest, with the defaults of settings that are newer than it; as it is if it is not one."""
    try:
        return type(recipe.settings).model_validate(found).model_dump(mode="json")
    except ValidationError:
        return found


def index_folder(name: str, places: Places) -> tuple[Path, Recipe | None]:
    """Where the index that a pipeline names lies: the folder itself, or the place of what a recipe builds."""
    path = Path(name)
    if (path / MANIFEST).is_file():
        return path, None
    if path.suffix not in (".yaml", ".yml"):
        raise ArtifactError(f"{name}: neither an index folder nor an index recipe (.yaml).")
    recipe = load_recipe(path, "index")
    return places.artifacts / recipe.name, recipe
