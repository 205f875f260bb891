"""Training a method for a generative reader: what it is trained on is what the pipeline packs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from odqa.artifacts import Draft, building, load_artifact
from odqa.corpus.examples import Example
from odqa.errors import DataError
from odqa.frozen.fit import FitSettings
from odqa.frozen.method import create_method, load_method
from odqa.pack.greedy import GreedyPacker
from odqa.read.adapt import CHECKPOINT, KIND, ContextBatches, ContextSettings, TuneSet, holds, train_method
from odqa.read.lm import LmReader, load_lm
from odqa.types import Gold, Hit, Passage, Query
from tests.tiny_models import tiny_llama, tiny_t5

METALS, RIVER, BOATS = (
    Passage("n", "gold silver and iron", "metals"),
    Passage("r", "the tiber is a river of rome", "tiber"),
    Passage("b", "a boat on the seine in paris", "boats"),
)


def example(i: int, **changes: Any) -> Example:
    own = {"id": f"e{i}", "question": f"which river is in rome {i}", "answers": ("the moon", "Tiber"), "passage": RIVER}
    rest = {"positives": (RIVER,), "negatives": (METALS,), "source": "a" if i % 2 else "b"}
    ranked = {"ranking": (METALS, RIVER, BOATS), "scores": (3.0, 2.0, 1.0), "holds": (False, True, False)}
    return Example(**{**own, **rest, **ranked, **changes})


EXAMPLES = [example(i) for i in range(8)]


@pytest.fixture(scope="module", params=["causal", "seq2seq"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    make = tiny_llama if request.param == "causal" else tiny_t5
    return make(tmp_path_factory.mktemp("models") / request.param)


def reader_of(model: Path, **options: Any) -> LmReader:
    return LmReader(load_lm(str(model), device="cpu", dtype="float32"), max_new_tokens=4, **options)


def test_prompts_and_answers_are_what_the_reader_packs_and_writes(model: Path) -> None:
    reader = reader_of(model)
    packer = GreedyPacker(reader, budget=200)
    batches = ContextBatches(reader, packer, EXAMPLES, ContextSettings(questions=4))
    sources, targets = batches(0)
    decode = reader.backbone.tokenizer.decode
    for source, target in zip(sources, targets, strict=True):
        assert "the tiber is a river of rome" in decode(source) and "gold silver" in decode(source)
        # Of two answers the one that stands in the context, as the passage writes it.
        assert decode(target, skip_special_tokens=True).strip() == "tiber"
        assert target[-1] in reader.backbone.end_tokens()


def test_batches_depend_on_seed_and_number_alone_and_an_epoch_has_every_example(model: Path) -> None:
    reader = reader_of(model)
    packer = GreedyPacker(reader, budget=200)
    first, second = (ContextBatches(reader, packer, EXAMPLES, ContextSettings(questions=2)) for _ in range(2))
    assert second(5) == first(5) and second(0) == first(0)
    seen = [tuple(source) for batch in range(4) for source in first(batch)[0]]
    assert len(set(seen)) == 8
    other = ContextBatches(reader, packer, EXAMPLES, ContextSettings(questions=2, seed=1))
    assert any(other(number) != first(number) for number in range(4))


def test_sources_are_weighted_and_examples_limited(model: Path) -> None:
    reader = reader_of(model)
    packer = GreedyPacker(reader, budget=200)
    only = ContextBatches(reader, packer, EXAMPLES, ContextSettings(examples=3, source_weights={"b": 0.0}))
    assert len(only.examples) == 3 and {e.source for e in only.examples} == {"a"}
    with pytest.raises(DataError, match="leave no example"):
        ContextBatches(reader, packer, EXAMPLES, ContextSettings(source_weights={"a": 0.0, "b": 0.0}))


def test_a_context_without_the_answer_gets_the_passage_that_has_it(model: Path) -> None:
    reader = reader_of(model)
    batches = ContextBatches(reader, GreedyPacker(reader, budget=200), EXAMPLES, ContextSettings())
    lost = example(9, ranking=(METALS, BOATS), scores=(2.0, 1.0), holds=(False, False))
    context = batches.context(lost)
    assert holds(context, ("tiber",)) and [hit.passage.id for hit in context.hits] == ["n", "r"]
    plain = example(10, ranking=(), scores=(), holds=())
    assert [hit.passage.id for hit in batches.context(plain).hits] == ["r", "n"]


def test_of_several_windows_the_one_with_the_answer_is_learned_from(model: Path) -> None:
    reader = reader_of(model)
    whole = reader.costs(Query("q", EXAMPLES[0].question), [Hit(p, 0.0, "t") for p in (METALS, RIVER)])
    assert whole.passages[0] is not None and whole.passages[1] is not None
    one = whole.fixed + max(whole.passages[0], whole.passages[1])
    packer = GreedyPacker(reader, budget=2 * one, windows=2)
    sources, _ = ContextBatches(reader, packer, EXAMPLES, ContextSettings(questions=1))(0)
    text = reader.backbone.tokenizer.decode(sources[0])
    assert "tiber is a river" in text and "gold silver" not in text


SETTINGS: dict[str, dict[str, Any]] = {
    "prompt-tuning": {"length": 3},
    "lora": {"rank": 2, "alpha": 4.0},
    "id-pt": {"length": 3, "encoder_length": 2, "inner": 8, "heads": 2},
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_training_lowers_the_loss_leaves_the_model_alone_and_resumes(model: Path, kind: str, tmp_path: Path) -> None:
    settings = SETTINGS[kind]
    hits = [[Hit(RIVER, 1.0, "t")]]
    question = [(Query("q", "which river is in rome"), Gold("q", ("tiber",), ("r",)))]

    def trained(name: str, steps_before_kill: int | None = None) -> Path:
        reader = reader_of(model)
        packer = GreedyPacker(reader, budget=200)
        method = create_method(kind, reader.backbone, **settings)
        batches = ContextBatches(reader, packer, EXAMPLES, ContextSettings(questions=4))
        fit = FitSettings(
            steps=20, learning_rates={"method": 0.02}, autocast=False, log_every=5, checkpoint_seconds=0.0
        )

        def stop(line: str) -> None:
            if steps_before_kill is not None and line.startswith(f"step {steps_before_kill}"):
                raise KeyboardInterrupt

        folder = tmp_path / name
        with building(folder, KIND, recipe={}, inputs={}, scratch=(CHECKPOINT,)) as draft:
            tune = {"one": TuneSet.pack(packer, question, hits)}
            train_method(reader, method, batches, tune, draft, fit, log=stop)
        return folder

    whole = trained("whole")
    curve = json.loads((whole / "curve.json").read_text())
    assert curve[-1]["loss"] < curve[0]["loss"] and {"tune.em", "tune.f1", "one.em"} <= set(curve[-1])
    with pytest.raises(KeyboardInterrupt):
        trained("parts", steps_before_kill=10)
    parts = trained("parts")
    assert (parts / "method.safetensors").read_bytes() == (whole / "method.safetensors").read_bytes()
    manifest = load_artifact(whole).manifest
    assert manifest["counts"]["questions_seen"] == 80 and manifest["backbone"]["name"] == str(model)


def test_a_training_that_diverges_gives_the_model_back(model: Path, tmp_path: Path) -> None:
    reader = reader_of(model)
    batches = ContextBatches(reader, GreedyPacker(reader, budget=200), EXAMPLES, ContextSettings(questions=4))
    method = create_method("prompt-tuning", reader.backbone, length=3)
    # Weight decay multiplies by 1 - 1e37 a step: the prompt is infinite after the second one.
    fit = FitSettings(steps=4, learning_rates={"method": 1e37}, weight_decay=1.0, autocast=False)
    with pytest.raises(DataError, match="the loss is nan at step 2"):
        train_method(reader, method, batches, {}, Draft(tmp_path), fit)
    assert not method.is_attached


def test_a_reader_with_a_method_answers_otherwise_and_keeps_room_for_it(model: Path, tmp_path: Path) -> None:
    backbone = load_lm(str(model), device="cpu", dtype="float32")
    method = create_method("prompt-tuning", backbone, length=5)
    with torch.no_grad():
        method.prompt.normal_(0.0, 3.0, generator=torch.Generator().manual_seed(0))
    method.save(tmp_path)
    plain = reader_of(model)
    other = load_lm(str(model), device="cpu", dtype="float32")
    tuned = LmReader(other, max_new_tokens=4, method=load_method(tmp_path, other))
    taken = 5 if backbone.architecture == "causal" else 0
    assert plain.limit - tuned.limit == taken
    (context,) = GreedyPacker(plain, budget=100).pack([Query("q", "which river")], [[Hit(RIVER, 1.0, "t")]])
    first, second = (reader.generate([context])[0][0] for reader in (plain, tuned))
    assert (first.raw, first.logprob) != (second.raw, second.logprob)
