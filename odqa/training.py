"""Trainings as jobs: mine hard negatives, train readers, re-rankers, retrievers. Recipes go in, artifacts come out.

Files are read and models loaded here; batches, losses and scores are in `odqa.read.train`, `odqa.rerank.train` and
`odqa.retrieve.train`, the gradient loop is `odqa.frozen.fit`.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odqa import config
from odqa.artifacts import MANIFEST, Artifact, Draft, building, load_artifact, sha256_file, sha256_json
from odqa.errors import ArtifactError, ArtifactMismatch, DataError, MissingExtra, RecipeError
from odqa.jobs import finished_artifact, load_ranker
from odqa.recipes import Places, Recipe, describe_file, load_recipe
from odqa.runtime import progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import nn

    from odqa.corpus.examples import Example, Ranking
    from odqa.frozen.backbone import Backbone
    from odqa.frozen.blackbox import SearchSettings
    from odqa.frozen.fit import FitSettings
    from odqa.frozen.method import Method
    from odqa.lm.mixture import Mixture
    from odqa.read.adapt import Again, ContextBatches, TuneSet
    from odqa.retrieve.train import Asked
    from odqa.types import Gold, Passage, Query

Log = Callable[[str], None]
RANKINGS = "rankings"  # the kind of what `mine` makes
SWEEP = "sweep"  # ... of what `sweep` makes
PICTURE = "curve.svg"  # beside a training's curve.json; not part of the artifact, for it needs matplotlib
_PART = 1000  # our choice: questions a part of a mining; a killed one repeats at most this many


def _silent(_line: str) -> None:
    """The default log."""


# --- mining -----------------------------------------------------------------------------------------------------------


def mine(
    recipe: str | Path | Recipe,
    *,
    places: Places | None = None,
    out: Path | None = None,
    changes: Sequence[str] = (),
    log: Log = _silent,
) -> Artifact:
    """Rank passages for training questions with one or more pipelines: the hard negatives of a training.

    The artifact holds, by question, the best passages and whether each has an answer. Resumes by parts of questions.
    """
    from odqa.corpus.examples import read_examples, write_rankings
    from odqa.corpus.io import read_passages

    places = places or Places.from_environment()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, "mine", changes=changes)
    settings = recipe.settings
    assert isinstance(settings, config.Mining)
    folder = out or places.artifacts / recipe.name
    files = {name: places.file(name) for name in (settings.train, *settings.passages)}
    passages = {passage.id: passage for name in settings.passages for passage in read_passages(files[name])}
    examples = _sample(list(read_examples(files[settings.train], passages)), settings.limits, settings.seed)
    finders = [load_ranker(path, places=places, build=True, log=log) for path in settings.pipelines]
    inputs = {name: describe_file(name, path)["sha256"] for name, path in files.items()} | {
        "pipelines": [finder.identity for finder in finders]
    }
    found = finished_artifact(folder, RANKINGS, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: mined already")
        return found
    with building(folder, RANKINGS, recipe=recipe.resolved, inputs=inputs) as draft:
        with progress("mine", len(examples), "questions") as bar:
            for number, start in enumerate(range(0, len(examples), _PART)):
                block = examples[start : start + _PART]
                name = f"part-{number:05}.jsonl"
                if not draft.has(name):
                    rankings = _rank(block, finders, settings)
                    draft.part(name, lambda path, rankings=rankings: write_rankings(path, rankings))  # type: ignore[misc]
                bar.advance(len(block))
        draft.counts |= {"questions": len(examples)}
    return load_artifact(folder, RANKINGS)


def _rank(examples: Sequence["Example"], finders: Sequence[Any], settings: config.Mining) -> dict[str, "Ranking"]:
    """The best `depth` passages of all pipelines together, with what `has_answer` says of each."""
    from odqa.corpus.examples import Ranking
    from odqa.text import has_answer
    from odqa.types import Query

    queries = [Query(example.id, example.question) for example in examples]
    lists = [finder.rank(queries) for finder in finders]
    rankings = {}
    for number, example in enumerate(examples):
        best: dict[str, Any] = {}
        for hits in lists:
            for rank, hit in enumerate(hits[number]):
                score = hit.score if settings.merge == "score" else -float(rank)
                if hit.passage.id not in best or best[hit.passage.id][0] < score:
                    best[hit.passage.id] = (score, hit.passage)
        chosen = sorted(best.values(), key=lambda entry: -entry[0])[: settings.depth]
        right = {passage.id for passage in example.positives}
        rankings[example.id] = Ranking(
            tuple(passage.id for _, passage in chosen),
            tuple(float(score) for score, _ in chosen),
            tuple(passage.id in right or has_answer(passage.text, example.answers) for _, passage in chosen),
        )
    return rankings


def _sample(examples: list["Example"], limits: Mapping[str, int], seed: int) -> list["Example"]:
    """At most `limits[source]` examples of a source, drawn without replacement; all of a source without a limit."""
    order = np.random.default_rng(seed).permutation(len(examples))
    left = dict(limits)
    chosen = []
    for number in order.tolist():
        source = examples[number].source
        if left.get(source, 1) > 0:
            chosen.append(examples[number])
            if source in left:
                left[source] -= 1
    return chosen


# --- training ---------------------------------------------------------------------------------------------------------


def train(
    recipe: str | Path | Recipe,
    *,
    places: Places | None = None,
    out: Path | None = None,
    changes: Sequence[str] = (),
    log: Log = _silent,
) -> Artifact:
    """Train what a recipe describes, such as a reader; continues a killed training at its last checkpoint."""
    places = places or Places.from_environment()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, "train", changes=changes)
    folder = out or places.artifacts / recipe.name
    if isinstance(recipe.settings, config.ModelAverage):
        return _average(recipe, recipe.settings, places, folder, log)
    if isinstance(recipe.settings, config.LmReaderTraining):
        return _train_lm_reader(recipe, recipe.settings, places, folder, log)
    if isinstance(recipe.settings, config.MixtureTraining):
        return _train_mixture(recipe, recipe.settings, places, folder, log)
    if isinstance(recipe.settings, config.ConnectorTraining):
        return _pretrain_connector(recipe, recipe.settings, places, folder, log)
    if isinstance(recipe.settings, config.LmTraining):
        return _pretrain_lm(recipe, recipe.settings, places, folder, log)
    if isinstance(recipe.settings, config.ReaderTraining):
        return _train_reader(recipe, recipe.settings, places, folder, log)
    if isinstance(recipe.settings, config.BiEncoderTraining):
        return _train_bi_encoder(recipe, recipe.settings, places, folder, log)
    assert isinstance(recipe.settings, config.RerankerTraining)
    return _train_reranker(recipe, recipe.settings, places, folder, log)


def sweep(
    recipe: str | Path | Recipe,
    rates: Sequence[float] = (),
    *,
    steps: int | None = None,
    places: Places | None = None,
    out: Path | None = None,
    changes: Sequence[str] = (),
    log: Log = _silent,
) -> Artifact:
    """Compare learning rates for a generative reader's method by short trainings; sweep.json has their tune scores.

    Without `rates` five around the recipe's own. Each training has `steps` (a quarter of the recipe's), with schedule
    and warm-up over these, and is scored at its end by the metric of `keep_best`, or else by tune.em. The artifact
    (RECIPE-sweep) keeps curves and scores, no trained values; that of the recipe itself is not touched. Resumes at the
    rate, and inside of it at the checkpoint.
    """
    from odqa.frozen.fit import rates_around, sweep_rates
    from odqa.read import adapt

    places = places or Places.from_environment()
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, "train-lm-reader", changes=changes)
    settings = recipe.settings
    if not isinstance(settings, config.LmReaderTraining):
        raise RecipeError(f"{recipe.path}: learning rates are compared for recipes of kind train-lm-reader only.")
    if not settings.tune:
        raise RecipeError(f"{recipe.path}: learning rates are compared on tune questions. Name some under tune.")
    if settings.fit is None:
        raise RecipeError(f"{recipe.path}: its trainer has no learning rates. Compare those of a recipe with fit.")
    folder = out or places.artifacts / f"{recipe.name}-sweep"
    rates = sorted(set(rates or rates_around(settings.fit.learning_rates["method"])))
    steps = steps or max(1, settings.fit.steps // 4)
    metric = settings.fit.keep_best or "tune.em"
    setup = _LmSetup(settings, places)
    inputs = setup.inputs() | {"rates": list(rates), "steps": steps}
    found = finished_artifact(folder, SWEEP, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: swept already")
        return found
    tune, batches = setup.tune(log), setup.batches()
    assert setup.fit is not None
    short = replace(setup.fit, steps=steps, evaluate_every=0, keep_best=None, patience=0)
    curves: dict[str, Any] = {}
    with building(
        folder, SWEEP, recipe=recipe.resolved, inputs=inputs, scratch=("trials",), unlisted=(PICTURE,)
    ) as draft:

        def score_at(rate: float) -> float:
            name, trial = f"curve-{rate:g}.json", draft.path / "trials" / f"{rate:g}"
            if not draft.has(name):
                trial.mkdir(parents=True, exist_ok=True)
                fit = replace(short, learning_rates={"method": rate})
                adapt.train_method(setup.reader, setup.method(), batches, tune, Draft(trial), fit, log=log)
                draft.write_json(name, _curve(trial))
                shutil.rmtree(trial)
            curve = json.loads((draft.path / name).read_text(encoding="utf-8"))
            if metric not in curve[-1]:
                raise RecipeError(f"{recipe.path}: fit.keep_best is {metric}; found are {', '.join(curve[-1])}.")
            curves[f"{rate:g}"] = curve
            return float(curve[-1][metric])

        result = sweep_rates(score_at, rates, lower_is_better=settings.fit.lower_is_better, log=log)
        scores = {f"{rate:g}": score for rate, score in result.scores.items()}
        draft.write_json("sweep.json", {"metric": metric, "steps": steps, "scores": scores, "best": result.best})
        _draw_curves(draft.path, curves, log)
    return load_artifact(folder, SWEEP)


def _train_reader(recipe: Recipe, settings: config.ReaderTraining, places: Places, folder: Path, log: Log) -> Artifact:
    from odqa.frozen.spans import SpanHead
    from odqa.read import span
    from odqa.read import train as reading

    setup = _Setup(settings, places)
    inputs = setup.inputs(HEADS if settings.start else ())
    found = finished_artifact(folder, span.KIND, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: trained already")
        return found
    passages = setup.passages()
    tune = {}
    for name, questions in setup.tune():
        tune[name] = questions
        for query, gold in questions:
            if not gold.passage_ids or gold.passage_ids[0] not in passages:
                raise DataError(
                    f"tune set {name}: the gold passage of question {query.id!r} is not known. Give positive_ids, "
                    "and name the file that holds these passages under passages."
                )
    head = SpanHead(setup.backbone.width)
    method = setup.method(head)
    model = span.SpanModel(setup.backbone, method, head, settings.longest, settings.no_answer)
    kind, scratch = span.KIND, (reading.CHECKPOINT,)
    with building(folder, kind, recipe=recipe.resolved, inputs=inputs, scratch=scratch, unlisted=(PICTURE,)) as draft:
        reading.train_span_reader(
            model,
            setup.examples(passages) + setup.unanswerable(passages),
            tune,
            passages,
            draft,
            groups=reading.GroupSettings(**settings.groups.model_dump()),
            fit_settings=setup.fit,
            stored=setup.stored,
            log=log,
        )
        _draw_curves(draft.path, {recipe.name: _curve(draft.path)}, log)
    return load_artifact(folder, kind)


def _train_reranker(
    recipe: Recipe, settings: config.RerankerTraining, places: Places, folder: Path, log: Log
) -> Artifact:
    from odqa.frozen.pairs import PairHead
    from odqa.rerank import train as reranking

    setup = _Setup(settings, places)
    inputs = setup.inputs(())
    ranker = None
    if settings.candidates is not None:
        ranker = load_ranker(settings.candidates, places=places, build=True, log=log)
        inputs["candidates"] = ranker.identity
    found = finished_artifact(folder, reranking.KIND, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: trained already")
        return found
    tune = {}
    for name, questions in setup.tune():
        assert ranker is not None  # the recipe has been checked
        hits = ranker.rank([query for query, _ in questions])
        tune[name] = [(*pair, found[: settings.candidate_depth]) for pair, found in zip(questions, hits, strict=True)]
    head = PairHead(setup.backbone.width)
    model = reranking.PairModel(setup.backbone, setup.method(head), head)
    kind, scratch = reranking.KIND, (reranking.CHECKPOINT,)
    with building(folder, kind, recipe=recipe.resolved, inputs=inputs, scratch=scratch, unlisted=(PICTURE,)) as draft:
        reranking.train_reranker(
            model,
            setup.examples(setup.passages()),
            tune,
            draft,
            groups=reranking.GroupSettings(**settings.groups.model_dump()),
            loss=reranking.LossSettings(**settings.loss.model_dump()),
            fit_settings=setup.fit,
            stored=setup.stored,
            log=log,
        )
        _draw_curves(draft.path, {recipe.name: _curve(draft.path)}, log)
    return load_artifact(folder, kind)


def _train_bi_encoder(
    recipe: Recipe, settings: config.BiEncoderTraining, places: Places, folder: Path, log: Log
) -> Artifact:
    from odqa.retrieve import train as retrieving
    from odqa.retrieve import tuned

    setup = _BiEncoderSetup(settings, places, log)
    inputs = setup.inputs()
    found = finished_artifact(folder, tuned.KIND, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: trained already")
        return found
    model = retrieving.BiEncoder(setup.index.dense.encoder, settings.side, setup.method)
    examples, tune = setup.examples(), setup.tune()
    kind, scratch = tuned.KIND, (retrieving.CHECKPOINT,)
    with building(folder, kind, recipe=recipe.resolved, inputs=inputs, scratch=scratch, unlisted=(PICTURE,)) as draft:
        retrieving.train_bi_encoder(
            model,
            examples,
            tune,
            draft,
            batches=retrieving.BatchSettings(**settings.batch.model_dump()),
            temperature=settings.temperature,
            fit_settings=setup.fit(model.device),
            known=setup.known,
            stored=setup.stored,
            log=log,
        )
        _draw_curves(draft.path, {recipe.name: _curve(draft.path)}, log)
    return load_artifact(folder, kind)


def _average(recipe: Recipe, settings: config.ModelAverage, places: Places, folder: Path, log: Log) -> Artifact:
    """The weighted mean of trained values (Wortsman et al. 2022, arXiv 2203.05482, "model soups").

    It is a model only where the parts lie close together: each went on from another one's values.
    """
    from safetensors.torch import load_file, save_file

    from odqa.frozen.method import DESCRIPTION, TENSORS
    from odqa.read import span
    from odqa.rerank import train as reranking

    sources = [places.file(part.model) for part in settings.parts]
    like = load_artifact(sources[settings.like])
    own_files = {span.KIND: span.READER, reranking.KIND: reranking.DESCRIPTION}
    if like.kind not in own_files:
        raise ArtifactMismatch(f"{like.path}: a {like.kind}; a mean is of span readers or re-rankers.")
    inputs: dict[str, Any] = {
        part.model: sha256_json([sha256_file(source / name) for name in (TENSORS, DESCRIPTION, HEADS[0])])
        for part, source in zip(settings.parts, sources, strict=True)
    }
    found = finished_artifact(folder, like.kind, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: made already")
        return found
    descriptions = {(source / DESCRIPTION).read_text(encoding="utf-8") for source in sources}
    if len(descriptions) > 1:
        raise ArtifactMismatch(
            f"{recipe.path}: the parts' methods have different settings or backbones ({DESCRIPTION}). A mean needs the "
            "same method on the same backbone."
        )

    def mean(name: str, weights: Sequence[float]) -> dict[str, "torch.Tensor"]:
        used = [(weight, load_file(s / name)) for weight, s in zip(weights, sources, strict=True) if weight]
        return {key: sum(weight * tensors[key].float() for weight, tensors in used) for key in used[0][1]}

    with building(folder, like.kind, recipe=recipe.resolved, inputs=inputs) as draft:
        method = mean(TENSORS, [part.method for part in settings.parts])
        if settings.stored == "float16":
            method = {name: tensor.half() for name, tensor in method.items()}
        save_file(method, draft.path / TENSORS)
        save_file(mean(HEADS[0], [part.head for part in settings.parts]), draft.path / HEADS[0])
        for name in (DESCRIPTION, own_files[like.kind]):
            (draft.path / name).write_bytes((like.path / name).read_bytes())
        head = load_file(draft.path / HEADS[0])
        draft.counts["trainable"] = sum(tensor.numel() for tensor in (*method.values(), *head.values()))
        draft.extra["backbone"] = like.manifest["backbone"]
    return load_artifact(folder, like.kind)


def _train_lm_reader(
    recipe: Recipe, settings: config.LmReaderTraining, places: Places, folder: Path, log: Log
) -> Artifact:
    from odqa.read import adapt

    setup = _LmSetup(settings, places)
    inputs = setup.inputs()
    found = finished_artifact(folder, adapt.KIND, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: trained already")
        return found
    tune, batches, method = setup.tune(log), setup.batches(), setup.method()
    kind, scratch = adapt.KIND, (adapt.CHECKPOINT, adapt.JOURNAL)
    with building(folder, kind, recipe=recipe.resolved, inputs=inputs, scratch=scratch, unlisted=(PICTURE,)) as draft:
        if setup.fit is not None:
            adapt.train_method(setup.reader, method, batches, tune, draft, setup.fit, stored=setup.stored, log=log)
        else:
            adapt.search_prompt(
                setup.reader, method, batches, tune, draft, setup.search(), stored=setup.stored, log=log
            )
        _draw_curves(draft.path, {recipe.name: _curve(draft.path)}, log)
    return load_artifact(folder, kind)


def _pretrain_connector(
    recipe: Recipe, settings: config.ConnectorTraining, places: Places, folder: Path, log: Log
) -> Artifact:
    import torch

    from odqa.corpus.io import read_passages
    from odqa.frozen.fit import FitSettings
    from odqa.frozen.language import CutTexts
    from odqa.frozen.neural import NeuralRecursion
    from odqa.read import adapt
    from odqa.read.lm import LmReader
    from odqa.recipes import build_reader
    from odqa.runtime import has_fast_bf16

    pipeline = load_recipe(settings.pipeline, "pipeline").settings
    assert isinstance(pipeline, config.PipelineRecipe)
    if not isinstance(pipeline.reader, config.LmReaderSettings) or pipeline.reader.method is not None:
        raise RecipeError(f"{settings.pipeline}: a connector is trained for a reader of kind lm without a method.")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    reader = build_reader(pipeline.reader.model_copy(update={"dtype": "float32"}), places)
    assert isinstance(reader, LmReader)
    files = {name: places.file(name) for name in settings.passages}
    inputs: dict[str, Any] = {name: describe_file(name, path)["sha256"] for name, path in files.items()}
    inputs["backbone"] = reader.backbone.fingerprint
    found = finished_artifact(folder, adapt.KIND, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: trained already")
        return found
    texts = [passage.text for file in files.values() for passage in read_passages(file)]
    order = np.random.default_rng(settings.seed).permutation(len(texts))[: settings.texts]
    ids = [reader.encode_answer(texts[number]) for number in order.tolist()]
    batches = CutTexts(ids, tokens=settings.tokens, size=settings.batch, seed=settings.seed)
    method = NeuralRecursion(reader.backbone, **settings.method.model_dump(mode="json", exclude={"kind"}))
    on_cpu = reader.backbone.device.type == "cpu"
    autocast = has_fast_bf16() or not on_cpu if settings.autocast is None else settings.autocast
    fit = FitSettings(**settings.fit.model_dump(), autocast=autocast)
    stored = torch.float16 if settings.stored == "float16" else torch.float32
    kind, scratch = adapt.KIND, (adapt.CHECKPOINT,)
    with building(folder, kind, recipe=recipe.resolved, inputs=inputs, scratch=scratch, unlisted=(PICTURE,)) as draft:
        adapt.train_method(reader, method, batches, {}, draft, fit, stored=stored, log=log)
        _draw_curves(draft.path, {recipe.name: _curve(draft.path)}, log)
    return load_artifact(folder, kind)


def _pretrain_lm(recipe: Recipe, settings: config.LmTraining, places: Places, folder: Path, log: Log) -> Artifact:
    import torch

    from odqa.corpus.examples import Example, read_examples
    from odqa.corpus.io import read_gold, read_passages, read_questions
    from odqa.frozen.fit import FitSettings
    from odqa.lm import pretrain
    from odqa.lm.mini import PARTS
    from odqa.lm.tasks import Corpus
    from odqa.runtime import choose_device, has_fast_bf16, peak_memory_bytes

    names = (*settings.passages, settings.train, *(tune.file for tune in settings.tune))
    files = {name: places.file(name) for name in names}
    inputs: dict[str, Any] = {name: describe_file(name, path)["sha256"] for name, path in files.items()}
    start = None if settings.start is None else places.file(settings.start)
    if start is not None:
        inputs["start"] = sha256_file(start / PARTS)
    found = finished_artifact(folder, LANGUAGE_MODEL, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: trained already")
        return found
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    on_cpu = device.type == "cpu"
    passages = {p.id: p for name in settings.passages for p in read_passages(files[name])}
    examples = [e for e in read_examples(files[settings.train], passages) if e.source in settings.sources]
    if not examples:
        raise DataError(f"{settings.train}: no example has one of the sources {', '.join(settings.sources)}.")
    tune = {
        chosen.name: [
            Example(query.id, query.text, gold.answers, passages[gold.passage_ids[0]], (), (), chosen.name)
            for query, gold in zip(read_questions(files[chosen.file]), read_gold(files[chosen.file]), strict=True)
        ][: chosen.limit]
        for chosen in settings.tune
    }
    corpus = Corpus(list(passages.values()), examples, settings.mix.long_share)
    autocast = has_fast_bf16() or not on_cpu if settings.autocast is None else settings.autocast
    fit_settings = FitSettings(**settings.fit.model_dump(), autocast=autocast)
    common: dict[str, Any] = {"device": device, "attention": "eager" if on_cpu else "sdpa", "log": log}
    kind, scratch = LANGUAGE_MODEL, (pretrain.CHECKPOINT,)
    with building(folder, kind, recipe=recipe.resolved, inputs=inputs, scratch=scratch, unlisted=(PICTURE,)) as draft:
        common["checkpoint"] = draft.path / pretrain.CHECKPOINT
        mix = pretrain.MixSettings(**settings.mix.model_dump(exclude={"long_share"}))
        sizes = settings.model.model_dump(exclude={"kind"})
        if isinstance(settings.model, config.EncoderDecoderLm):
            curve, saved = pretrain.pretrain_encoder_decoder(
                draft.path,
                pretrain.EncoderDecoderSizes(**sizes),
                corpus,
                mix,
                tune,
                fit_settings,
                start=start,
                **common,
            )
        else:
            curve, saved = pretrain.pretrain_decoder(
                draft.path, pretrain.DecoderSizes(**sizes), corpus, mix, fit_settings, **common
            )
        pretrain.write_curve(draft.path, curve)
        _draw_curves(draft.path, {recipe.name: _curve(draft.path)}, log)
        draft.counts |= {"saved_values": saved, "passages": len(passages), "examples": len(examples)}
        draft.measured |= {"training_seconds": curve[-1]["seconds"], "peak_memory_bytes": peak_memory_bytes()}
    return load_artifact(folder, kind)


def _train_mixture(
    recipe: Recipe, settings: config.MixtureTraining, places: Places, folder: Path, log: Log
) -> Artifact:
    import torch

    from odqa.frozen.finetuning import FineTuning
    from odqa.frozen.fit import FitSettings
    from odqa.frozen.method import create_method
    from odqa.lm.mixture import Exam, ItemBatches, by_name, encoder_of, train_on_mixture
    from odqa.read import adapt
    from odqa.read.lm import load_lm
    from odqa.runtime import has_fast_bf16, peak_memory_bytes

    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    setup = MixtureSetup(settings.mixture, places)
    backbone = load_lm(settings.model, device=settings.device, dtype="float32")
    inputs = setup.inputs() | {"backbone": backbone.fingerprint}
    found = finished_artifact(folder, adapt.KIND, recipe, log)
    if found is not None and found.manifest["inputs"] == inputs:
        log(f"{folder}: trained already")
        return found
    named = settings.method
    method = create_method(named.kind, backbone, **named.model_dump(mode="json", exclude={"kind"}))
    exam = Exam.draw(setup.mixture(encoder_of(backbone), testing=True), settings.test_items)
    batches = ItemBatches(backbone, setup.mixture(encoder_of(backbone)), settings.mixture.items)
    tasks = [item.task for item in exam.items]

    def evaluate() -> dict[str, float]:
        found = exam.scores(backbone, method)
        return {f"em.{task}": score for task, score in by_name(tasks, found).items()}

    autocast = has_fast_bf16() or backbone.device.type != "cpu" if settings.autocast is None else settings.autocast
    fit_settings = FitSettings(**settings.fit.model_dump(), autocast=autocast)
    kind, scratch = adapt.KIND, (adapt.CHECKPOINT,)
    with building(folder, kind, recipe=recipe.resolved, inputs=inputs, scratch=scratch, unlisted=(PICTURE,)) as draft:
        count = method.count(backbone)
        result = train_on_mixture(
            backbone,
            method,
            batches,
            fit_settings,
            checkpoint=draft.path / adapt.CHECKPOINT,
            evaluate=evaluate,
            log=log,
        )
        method.save(draft.path, dtype=torch.float16 if settings.stored == "float16" else torch.float32)
        draft.write_json("curve.json", [{k: v for k, v in e.items() if k != "seconds"} for e in result.curve])
        draft.counts |= {
            "trainable": count.trainable,
            "frozen": 0 if isinstance(method, FineTuning) else count.frozen,
            "items_seen": result.curve[-1]["step"] * fit_settings.accumulate * settings.mixture.items,
        }
        draft.extra["backbone"] = {"name": backbone.name, "fingerprint": backbone.fingerprint}
        draft.extra |= {"held_out": list(settings.mixture.held_out), "warnings": result.warnings}
        draft.measured |= {"training_seconds": round(result.seconds, 1), "peak_memory_bytes": peak_memory_bytes()}
        _draw_curves(draft.path, {recipe.name: _curve(draft.path)}, log)
    return load_artifact(folder, kind)


class MixtureSetup:
    """What a mixture recipe names: templates, and articles to train on and to test on."""

    def __init__(self, settings: config.MixtureRecipe, places: Places) -> None:
        from odqa.corpus.examples import read_solved
        from odqa.corpus.io import read_passages
        from odqa.lm.mixture import read_templates, split_articles

        self.settings = settings
        self.templates_recipe = load_recipe(places.file(settings.templates), "templates")
        templates = self.templates_recipe.settings
        assert isinstance(templates, config.Templates)
        where = str(self.templates_recipe.path)
        self.templates = read_templates(templates.tasks, where)
        for key, names in (("held_out", settings.held_out), ("shares", settings.shares)):
            if unknown := [name for name in names if name not in self.templates]:
                raise RecipeError(f"mixture.{key}: {unknown[0]} is no task of {where} ({', '.join(self.templates)}).")
        self.files = {name: places.file(name) for name in (*settings.passages, settings.train)}
        passages = [passage for name in settings.passages for passage in read_passages(self.files[name])]
        examples = list(read_solved(self.files[settings.train], sources=settings.sources))
        self.corpora = split_articles(passages, examples, settings.test_share)

    def inputs(self) -> dict[str, Any]:
        """What the manifest says was read."""
        files = {name: describe_file(name, path)["sha256"] for name, path in self.files.items()}
        return {**files, "templates": self.templates_recipe.hash}

    @property
    def trained(self) -> list[str]:
        """The tasks that are trained on."""
        return [name for name in self.templates if name not in self.settings.held_out]

    def mixture(
        self,
        encode: "Callable[[str], list[int]]",
        *,
        testing: bool = False,
        tasks: Sequence[str] | None = None,
        seed: int | None = None,
    ) -> "Mixture":
        """To train on; or, for testing, of all tasks, under other templates and from other articles."""
        from odqa.lm.mixture import Mixture

        settings = self.settings
        names = tasks or (list(self.templates) if testing else self.trained)
        return Mixture(
            self.corpora[testing],
            {name: wordings.test if testing else wordings.train for name, wordings in self.templates.items()},
            encode,
            {name: 1.0 if testing else settings.shares.get(name, 1.0) for name in names},
            longest=settings.longest,
            examples=None if testing else settings.examples,
            seed=settings.seed if seed is None else seed,
        )


LANGUAGE_MODEL = "language-model"  # the kind of what a pre-training makes
HEADS = ("head.safetensors",)  # of readers and re-rankers alike


class _Setup:
    """What readers and re-rankers need alike to be trained: files, frozen backbone, method, examples."""

    def __init__(self, settings: config.ReaderTraining | config.RerankerTraining, places: Places) -> None:
        import torch

        from odqa.frozen.backbone import load_backbone
        from odqa.frozen.fit import FitSettings
        from odqa.runtime import choose_device, has_fast_bf16

        self.settings = settings
        names = [settings.train, *settings.passages, *(tune.file for tune in settings.tune)]
        if isinstance(settings, config.ReaderTraining) and settings.unanswerable is not None:
            names.append(settings.unanswerable)
        self.files = {name: places.file(name) for name in names}
        self.start = None if settings.start is None else places.file(settings.start)
        self.rankings = None if settings.rankings is None else _rankings_folder(settings.rankings, places)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        # Eager attention: its backward pass is a third faster than the fused one on processors (docs/LOG.md).
        on_cpu = choose_device(settings.device).type == "cpu"
        attention = "eager" if on_cpu else "sdpa"
        self.backbone = load_backbone(
            settings.backbone, "encoder", device=settings.device, dtype=settings.dtype, attention=attention
        )
        autocast = has_fast_bf16() or not on_cpu if settings.autocast is None else settings.autocast
        self.fit = FitSettings(**settings.fit.model_dump(), autocast=autocast)
        self.stored = torch.float16 if settings.stored == "float16" else torch.float32

    def inputs(self, started_from: Sequence[str]) -> dict[str, Any]:
        """What the manifest says was read; `started_from`: files that count besides the method's own."""
        from odqa.frozen.method import TENSORS

        inputs: dict[str, Any] = {name: describe_file(name, path)["sha256"] for name, path in self.files.items()}
        inputs["backbone"] = self.backbone.fingerprint
        if self.start is not None:
            inputs["start"] = sha256_json([sha256_file(self.start / name) for name in (TENSORS, *started_from)])
        if self.rankings is not None:
            inputs["rankings"] = load_artifact(self.rankings, RANKINGS).hash
        return inputs

    def passages(self) -> dict[str, "Passage"]:
        """All passages that examples and rankings may name, by id."""
        from odqa.corpus.io import read_passages

        return {p.id: p for name in self.settings.passages for p in read_passages(self.files[name])}

    def examples(self, passages: Mapping[str, "Passage"]) -> list["Example"]:
        """The training examples; with rankings only those that were ranked, if the recipe does not want the others."""
        from odqa.corpus.examples import read_examples, read_rankings

        mined = None if self.rankings is None else read_rankings(self.rankings)
        unranked = getattr(self.settings, "unranked", False)
        return list(read_examples(self.files[self.settings.train], passages, mined, unranked=unranked))

    def unanswerable(self, passages: Mapping[str, "Passage"]) -> list["Example"]:
        """Questions without an answer, but for those about a passage that a tune question asks for."""
        from odqa.corpus.examples import read_unanswerable
        from odqa.corpus.io import read_gold

        name = getattr(self.settings, "unanswerable", None)
        if name is None:
            return []
        tuned = {pid for t in self.settings.tune for gold in read_gold(self.files[t.file]) for pid in gold.passage_ids}
        return list(read_unanswerable(self.files[name], passages, split="train", avoid=tuned))

    def tune(self) -> "Iterator[tuple[str, list[tuple[Query, Gold]]]]":
        """The tune sets by name."""
        from odqa.corpus.io import read_gold, read_questions

        for chosen in self.settings.tune:
            file = self.files[chosen.file]
            pairs = list(zip(read_questions(file), read_gold(file), strict=True))
            yield chosen.name, pairs[: chosen.limit]

    def method(self, head: "nn.Module") -> "Method":
        """The method to be trained, fresh or as `start` has it; then the head too, if it is of the same kind."""
        from safetensors.torch import load_file

        from odqa.frozen.method import TENSORS, create_method, load_tensors

        named = self.settings.method
        method = create_method(named.kind, self.backbone, **named.model_dump(mode="json", exclude={"kind"}))
        if self.start is not None:
            load_tensors(method, load_file(self.start / TENSORS), str(self.start))
            tensors = load_file(self.start / HEADS[0])
            if {name: t.shape for name, t in tensors.items()} == {n: p.shape for n, p in head.named_parameters()}:
                load_tensors(head, tensors, str(self.start))
        return method


class _LmSetup:
    """What a method for a generative reader needs to be trained: files, the pipeline's reader and packer, examples."""

    def __init__(self, settings: config.LmReaderTraining, places: Places) -> None:
        import torch

        from odqa.frozen.fit import FitSettings
        from odqa.pipeline import Pipeline
        from odqa.read.lm import LmReader
        from odqa.recipes import build_packer, build_reader, build_reranker, with_recursion
        from odqa.recurse import CandidateRecursion, read_again
        from odqa.runtime import has_fast_bf16

        self.settings, self.places = settings, places
        self.pipeline = load_recipe(settings.pipeline, "pipeline")
        pipeline = self.pipeline.settings
        assert isinstance(pipeline, config.PipelineRecipe)
        if not isinstance(pipeline.reader, config.LmReaderSettings) or pipeline.reader.passages != "together":
            raise RecipeError(
                f"{settings.pipeline}: a method is trained for a reader of kind lm that reads its passages together."
            )
        trained = pipeline.second_reader if settings.second else pipeline.reader
        if settings.second and not (
            isinstance(pipeline.recursion, config.TextualRecursion) and pipeline.recursion.below is None
        ):
            raise RecipeError(
                f"{settings.pipeline}: a second reader is trained for a textual recursion that reads all questions "
                "again. Give it one, without below."
            )
        if not isinstance(trained, config.LmReaderSettings) or trained.method is not None:
            raise RecipeError(f"{settings.pipeline}: its reader has a method already. Name the pipeline without one.")
        names = (settings.train, *settings.passages, *(tune.file for tune in settings.tune))
        self.files = {name: places.file(name) for name in names}
        self.rankings = None if settings.rankings is None else _rankings_folder(settings.rankings, places)
        self.start = None if settings.start is None else places.file(settings.start)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        # By gradients the model trains in float32 (in bfloat16 under autocast), whatever the pipeline reads in.
        update = {"dtype": "float32", "batch_size": 16} if settings.fit is not None else {}
        pipeline = pipeline.model_copy(update={"reader": pipeline.reader.model_copy(update=update)})
        reader = build_reader(pipeline.reader, places, is_shared=settings.second)
        assert isinstance(reader, LmReader)
        reranker = build_reranker(pipeline.reranker, places) if pipeline.packer.needs_reranker else None
        self.reader, self.packer = reader, build_packer(pipeline.packer, reader, reranker)
        self.again: Again | None = None
        if settings.second:
            made = with_recursion(Pipeline(reader, self.packer, None, reranker), pipeline, places)
            assert isinstance(made.rereader, LmReader) and isinstance(made.recursion, CandidateRecursion)
            self.reader, self.again = made.rereader, read_again(reader, made.recursion)
        on_cpu = reader.backbone.device.type == "cpu"
        autocast = has_fast_bf16() or not on_cpu if settings.autocast is None else settings.autocast
        self.fit = None if settings.fit is None else FitSettings(**settings.fit.model_dump(), autocast=autocast)
        self.stored = torch.float16 if settings.stored == "float16" else torch.float32

    def search(self) -> "SearchSettings":
        """The settings of a black-box search."""
        from odqa.frozen.blackbox import SearchSettings

        assert self.settings.trainer is not None  # the recipe has been checked
        return SearchSettings(**self.settings.trainer.model_dump(exclude={"kind"}))

    def inputs(self) -> dict[str, Any]:
        """What the manifest says was read."""
        from odqa.frozen.method import TENSORS

        inputs: dict[str, Any] = {name: describe_file(name, path)["sha256"] for name, path in self.files.items()}
        inputs |= {"backbone": self.reader.backbone.fingerprint, "pipeline": self.pipeline.hash}
        first = self.pipeline.settings.reader.methods if self.settings.second else ()  # type: ignore[attr-defined]
        if first:
            hashes = [sha256_file(self.places.file(name) / TENSORS) for name in first]
            inputs["first"] = hashes[0] if len(hashes) == 1 else hashes
        if self.rankings is not None:
            inputs["rankings"] = load_artifact(self.rankings, RANKINGS).hash
        if self.start is not None:
            inputs["start"] = sha256_file(self.start / TENSORS)
        return inputs

    def tune(self, log: Log) -> dict[str, "TuneSet"]:
        """The tune sets by name, ranked and packed by the pipeline."""
        from odqa.corpus.io import read_gold, read_questions
        from odqa.read.adapt import TuneSet

        if not self.settings.tune:
            return {}
        ranker = load_ranker(self.settings.pipeline, places=self.places, build=True, log=log)
        tune = {}
        for chosen in self.settings.tune:
            file = self.files[chosen.file]
            pairs = list(zip(read_questions(file), read_gold(file), strict=True))[: chosen.limit]
            hits = ranker.rank([query for query, _ in pairs])
            tune[chosen.name] = TuneSet.pack(self.packer, pairs, hits, again=self.again)
        return tune

    def batches(self) -> "ContextBatches":
        """The training contexts, packed when they are asked for."""
        from odqa.corpus.examples import read_examples, read_rankings
        from odqa.corpus.io import read_passages
        from odqa.read.adapt import ContextBatches, ContextSettings

        passages = {p.id: p for name in self.settings.passages for p in read_passages(self.files[name])}
        mined = None if self.rankings is None else read_rankings(self.rankings)
        examples = list(read_examples(self.files[self.settings.train], passages, mined))
        contexts = ContextSettings(**self.settings.contexts.model_dump())
        return ContextBatches(self.reader, self.packer, examples, contexts, again=self.again)

    def method(self) -> "Method":
        """The method to be trained, fresh or as `start` has it."""
        from safetensors.torch import load_file

        from odqa.frozen.method import TENSORS, create_method, load_tensors

        named = self.settings.method
        method = create_method(named.kind, self.reader.backbone, **named.model_dump(mode="json", exclude={"kind"}))
        if self.start is not None:
            load_tensors(method, load_file(self.start / TENSORS), str(self.start))
        return method


class _BiEncoderSetup:
    """What a bi-encoder needs to be trained: the index with the frozen encoder, files, examples, tune questions."""

    def __init__(self, settings: config.BiEncoderTraining, places: Places, log: Log) -> None:
        import torch

        from odqa.jobs import open_index
        from odqa.retrieve.train import KnownVectors

        self.settings = settings
        names = (settings.train, *settings.passages, *(tune.file for tune in settings.tune))
        self.files = {name: places.file(name) for name in names}
        self.start = None if settings.start is None else places.file(settings.start)
        self.rankings = None if settings.rankings is None else _rankings_folder(settings.rankings, places)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.index = open_index(settings.index, places, build=True, device=settings.device, log=log)
        is_asymmetric = settings.side == "questions"
        self.known = KnownVectors(self.index.store, self.index.dense.vectors) if is_asymmetric else None
        self.stored = torch.float16 if settings.stored == "float16" else torch.float32

    def fit(self, device: "torch.device") -> "FitSettings":
        """The loop's settings; in bfloat16 where that is fast, unless the recipe decides."""
        from odqa.frozen.fit import FitSettings
        from odqa.runtime import has_fast_bf16

        fast = has_fast_bf16() or device.type != "cpu"
        autocast = fast if self.settings.autocast is None else self.settings.autocast
        return FitSettings(**self.settings.fit.model_dump(), autocast=autocast)

    def inputs(self) -> dict[str, Any]:
        """What the manifest says was read."""
        from odqa.frozen.method import TENSORS

        inputs: dict[str, Any] = {name: describe_file(name, path)["sha256"] for name, path in self.files.items()}
        inputs["index"] = self.index.artifact.hash
        if self.rankings is not None:
            inputs["rankings"] = load_artifact(self.rankings, RANKINGS).hash
        if self.start is not None:
            inputs["start"] = sha256_file(self.start / TENSORS)
        return inputs

    def method(self, backbone: "Backbone") -> "Method":
        """The method to be trained, fresh or as `start` has it."""
        from safetensors.torch import load_file

        from odqa.frozen.method import TENSORS, create_method, load_tensors

        named = self.settings.method
        method = create_method(named.kind, backbone, **named.model_dump(mode="json", exclude={"kind"}))
        if self.start is not None:
            load_tensors(method, load_file(self.start / TENSORS), str(self.start))
        return method

    def examples(self) -> list["Example"]:
        """The training examples, with their rankings if the recipe names some."""
        from odqa.corpus.examples import read_examples, read_rankings
        from odqa.corpus.io import read_passages

        passages = {p.id: p for name in self.settings.passages for p in read_passages(self.files[name])}
        mined = None if self.rankings is None else read_rankings(self.rankings)
        train, unranked = self.files[self.settings.train], self.settings.unranked
        return list(read_examples(train, passages, mined, unranked=unranked))

    def tune(self) -> dict[str, list["Asked"]]:
        """The tune sets by name; with the frozen encoder's first passages where the index cannot be searched."""
        from odqa.corpus.io import read_gold, read_questions
        from odqa.retrieve.train import Asked

        found = {}
        for chosen in self.settings.tune:
            file = self.files[chosen.file]
            pairs = list(zip(read_questions(file), read_gold(file), strict=True))[: chosen.limit]
            if self.known is not None:
                found[chosen.name] = [Asked(query, gold) for query, gold in pairs]
                continue
            rows = self.index.dense.search([query.text for query, _ in pairs], self.settings.candidate_depth).rows
            lists = [self.index.store.rows([row for row in line if row >= 0]) for line in rows.tolist()]
            found[chosen.name] = [Asked(*pair, tuple(ranked)) for pair, ranked in zip(pairs, lists, strict=True)]
        return found


def _rankings_folder(name: str, places: Places) -> Path:
    """The folder itself, or the place of what a mining recipe makes."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        return path
    folder = places.artifacts / load_recipe(path, "mine").name
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder}: the rankings are not mined yet. Mine them with: odqa mine {name}")
    return folder


def _curve(folder: Path) -> list[dict[str, Any]]:
    """The curve.json of a training."""
    curve: list[dict[str, Any]] = json.loads((folder / "curve.json").read_text(encoding="utf-8"))
    return curve


def _draw_curves(folder: Path, curves: Mapping[str, Sequence[Mapping[str, Any]]], log: Log) -> None:
    """Draw trainings by label into a folder: loss, and scores on tune. Without matplotlib there is no picture."""
    from odqa.figures import training_curve

    entries = [entry for curve in curves.values() for entry in curve]
    found = dict.fromkeys(key for entry in entries for key in entry if key not in ("step", "loss", "rate"))
    means = [key for key in found if key.startswith("tune.")]  # over several sets
    try:
        training_curve(folder / PICTURE, curves, scores=means or list(found))
    except MissingExtra as error:
        log(f"the picture of the loss is missing. {error}")
