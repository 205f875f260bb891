"""Neural recursion beyond the promises that all methods keep (test_methods.py): two passes, a cut, a cost."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from odqa.config import NeuralRecursionSettings, PipelineRecipe
from odqa.errors import ArtifactMismatch, DataError, RecipeError
from odqa.frozen.backbone import Backbone, frozen_guard, load_backbone
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.flops import count_flops
from odqa.frozen.language import CutTexts
from odqa.frozen.method import create_method, load_method
from odqa.frozen.neural import NeuralRecursion, cost_of_passes
from odqa.pack.greedy import GreedyPacker
from odqa.pipeline import Pipeline
from odqa.read.lm import LmReader, load_lm
from odqa.recipes import Places, build_pipeline, load_recipe
from odqa.recurse import Gate, VectorRecursion
from odqa.stages import GivesVectors, LatentReading
from odqa.types import LatentContext, Query
from tests.command_line import ok
from tests.small_world import passages, questions, write_jsonl, write_yaml
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama

WHERE = {"device": "cpu", "dtype": "float32"}
SOURCES = [[41, 42, 43, 44, 45, 46, 47], [51, 52, 53]]
TARGETS = [[71, 72, 73], [74, 75]]
QUERIES = [Query("q1", "who wrote the book"), Query("q2", "what is the capital of france")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    return load_backbone(str(folder), "causal", device="cpu", dtype="float32")


def moved(backbone: Backbone, **settings: object) -> NeuralRecursion:
    """A connector with any values."""
    method = NeuralRecursion(backbone, **settings)  # type: ignore[arg-type]
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in method.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return method


# --- the passes


def test_a_connector_that_hands_on_the_embeddings_equals_one_pass(backbone: Backbone) -> None:
    """By its weights, not by its start: f([h; s e]) = [0 I/s] [h; s e] with nothing added."""
    with torch.no_grad():
        expected = backbone.token_losses(SOURCES, TARGETS)
        method = NeuralRecursion(backbone, depth=0, start="random")
        method.connector[0].weight.copy_(torch.cat([torch.zeros(32, 32), torch.eye(32) / method.scale], dim=1))
        method.connector[0].bias.zero_()
        method.attach(backbone)
        torch.testing.assert_close(backbone.token_losses(SOURCES, TARGETS), expected, atol=1e-5, rtol=0)


def test_two_passes_are_what_two_calls_by_hand_give(backbone: Backbone) -> None:
    method, source = moved(backbone, depth=1, width=5), torch.tensor([SOURCES[0]])
    with torch.no_grad():
        words = backbone.embed(source)
        states = backbone.model(input_ids=source, output_hidden_states=True).hidden_states[-1]
        first, second = method.connector[0], method.connector[2]
        inner = torch.nn.functional.gelu(torch.cat([states, method.scale * words], -1) @ first.weight.T + first.bias)
        expected = backbone.model(inputs_embeds=words + inner @ second.weight.T + second.bias).logits
        method.attach(backbone)
        torch.testing.assert_close(backbone.model(input_ids=source).logits, expected, atol=1e-5, rtol=1e-5)


def test_pooled_vectors_stand_before_the_text(backbone: Backbone) -> None:
    method, source = moved(backbone, depth=0, vectors=2), torch.tensor([SOURCES[0]])
    with torch.no_grad():
        words = backbone.embed(source)
        states = backbone.model(input_ids=source, output_hidden_states=True).hidden_states[-1]
        seen = torch.cat([states, method.scale * words], -1)[0]  # (T, 64)
        weights = (method.queries @ seen.T / 64**0.5).softmax(-1)  # (2, T)
        made = method.words + weights @ seen @ method.connector[0].weight.T + method.connector[0].bias
        expected = backbone.model(inputs_embeds=torch.cat([made[None], words], 1)).logits[:, 2:]
        method.attach(backbone)
        torch.testing.assert_close(backbone.model(input_ids=source).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"depth": 1}, {"depth": 0, "vectors": 3}], ids=["tokens", "pooled"])
def test_the_first_pass_sees_nothing_of_an_answer(backbone: Backbone, settings: dict[str, int]) -> None:
    """The logits of a target's first token do not move with what follows, as they would if vectors knew it."""
    moved(backbone, **settings).attach(backbone)
    with torch.no_grad():
        one, other = (backbone.forward(SOURCES[:1], [target]) for target in ([71, 72, 73], [71, 5, 6]))
    at = len(SOURCES[0])  # what follows the target's first token
    torch.testing.assert_close(one[0, : at + 1], other[0, : at + 1], atol=1e-6, rtol=0)
    assert not torch.allclose(one[0, at + 1], other[0, at + 1])


def test_generation_is_what_teacher_forcing_says(backbone: Backbone) -> None:
    moved(backbone, depth=1, prompt=2).attach(backbone)
    (written,) = backbone.generate(SOURCES[:1], max_new_tokens=5, do_sample=False)
    with torch.no_grad():
        logits = backbone.forward(SOURCES[:1], [written])
    best = logits[0, len(SOURCES[0]) - 1 :].argmax(-1).tolist()
    assert best[: len(written)] == written


def test_training_lowers_the_loss_through_both_passes_and_moves_no_weight(backbone: Backbone, tmp_path: Path) -> None:
    method = NeuralRecursion(backbone, depth=1, prompt=2)
    with frozen_guard(backbone):
        method.attach(backbone)
        before = float(backbone.loss(SOURCES, TARGETS).detach())
        settings = FitSettings(15, {"method": 1e-2}, autocast=False)
        fit(
            {"method": method},
            lambda _: (SOURCES, TARGETS),
            lambda pair: backbone.loss(*pair),
            settings,
            checkpoint=tmp_path / "checkpoint",
        )
        assert float(backbone.loss(SOURCES, TARGETS).detach()) < 0.5 * before
        assert method.connector[0].weight.grad is None or method.prompts[0].abs().sum() > 0


def test_a_window_without_room_for_the_vectors_is_a_data_error(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_gpt2(tmp_path / "gpt2", window=8)), "causal", device="cpu", dtype="float32")
    NeuralRecursion(backbone, vectors=3).attach(backbone)
    with pytest.raises(DataError, match="3 vectors and a text of 7 tokens do not fit the window of 8"):
        backbone.forward(SOURCES[:1])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"vectors": 0}, "vectors is 0; it must be at least 1"),
        ({"depth": -1}, "depth is -1; it must be at least 0"),
        ({"width": 0}, "width is 0"),
        ({"prompt": -2}, "prompt is -2"),
        ({"depth": 0, "width": 8}, "linear connector, and has no width"),
        ({"start": "zero"}, "start is 'zero'; it must be text or random"),
        ({"prompt": 200, "vectors": 100}, "leaves no room for text"),
    ],
)
def test_sizes_that_cannot_be_are_refused(backbone: Backbone, settings: dict[str, object], told: str) -> None:
    with pytest.raises(DataError, match=told):
        create_method("neural-recursion", backbone, **settings)


def test_a_recipe_says_all_that_a_connector_takes_and_nothing_else() -> None:
    taken = set(inspect.signature(NeuralRecursion.__init__).parameters) - {"self", "backbone"}
    assert set(NeuralRecursionSettings.model_fields) - {"kind"} == taken


def test_an_encoder_reads_twice_too(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_bert(tmp_path / "bert")), "encoder", device="cpu", dtype="float32")
    with torch.no_grad():
        expected = backbone.forward(SOURCES)
        NeuralRecursion(backbone).attach(backbone)
        torch.testing.assert_close(backbone.forward(SOURCES), expected, atol=1e-5, rtol=1e-5)


# --- the cost


def test_flops_are_those_of_the_matrix_products() -> None:
    a, b = torch.zeros(3, 4), torch.zeros(4, 5)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5


def test_two_passes_cost_at_most_2_3_times_one(backbone: Backbone) -> None:
    for settings in ({"depth": 0}, {"depth": 1, "width": 32, "prompt": 2}, {"depth": 1, "width": 32, "vectors": 4}):
        method = NeuralRecursion(backbone, **settings)  # type: ignore[arg-type]
        cost = cost_of_passes(backbone, method, tokens=64)
        assert cost.once == count_flops(lambda: backbone.forward([[backbone.padding] * 64]))
        assert 1.3 < cost.times < 2.3
        assert not method.is_attached
        assert f"{cost.times:.2f} times" in str(cost)


# --- in the pipeline


def pipeline(backbone: Backbone, method: NeuralRecursion | None, **options: object) -> Pipeline:
    first = LmReader(backbone, "closed-book", max_new_tokens=4, is_shared=True)
    second = LmReader(backbone, "closed-book", max_new_tokens=4, method=method, is_shared=True)
    recursion = VectorRecursion(second, **options)  # type: ignore[arg-type]
    return Pipeline(first, GreedyPacker(first, budget=100), recursion=recursion, max_passes=2, rereader=second)


def test_the_pipeline_chains_the_passes_and_the_trace_shows_them(backbone: Backbone) -> None:
    method = moved(backbone, depth=1)
    traces = pipeline(backbone, method).answer(QUERIES)
    assert not method.is_attached
    for trace in traces:
        assert [(step.stage, step.pass_no) for step in trace.steps] == [
            ("pack", 1),
            ("read", 1),
            ("recurse", 2),
            ("read latent", 2),
        ]
        assert trace.steps[2].notes["decision"] == "read vectors again"
        tokens = trace.contexts[0].tokens
        assert trace.steps[3].notes == {"tokens read twice": tokens, "vectors": tokens}
        assert [answer.passes for answer in trace.answers] == [1, 2]
    # The second answers are those of a reader with the connector as its method; the first those of one without.
    plain = LmReader(backbone, "closed-book", max_new_tokens=4)
    contexts = [trace.contexts[0] for trace in traces]
    assert [answer.text for answer in plain.read(contexts)] == [trace.answers[0].text for trace in traces]
    twice = LmReader(backbone, "closed-book", max_new_tokens=4, method=method)
    assert [answer.text for answer in twice.read(contexts)] == [trace.answers[1].text for trace in traces]
    assert {t.answers[0].text for t in traces} != {t.answers[1].text for t in traces}


def test_a_sure_answer_is_not_read_again(backbone: Backbone) -> None:
    traces = pipeline(backbone, moved(backbone, depth=0), gate=Gate(below=0.0)).answer(QUERIES)
    assert all(trace.steps[-1].notes["why"] == "sure enough" and len(trace.answers) == 1 for trace in traces)


def test_only_a_reader_with_a_connector_gives_vectors_and_reads_its_own_alone(backbone: Backbone) -> None:
    with pytest.raises(RecipeError, match="needs a method of kind neural-recursion; it has none"):
        pipeline(backbone, None)
    reader = LmReader(backbone, "closed-book", max_new_tokens=4, method=moved(backbone), is_shared=True)
    other = LmReader(backbone, "closed-book", max_new_tokens=4, method=moved(backbone), is_shared=True)
    assert isinstance(reader, GivesVectors) and isinstance(reader, LatentReading)
    contexts = GreedyPacker(reader, budget=100).pack(QUERIES, [[], []])
    with pytest.raises(ValueError, match="q1: these vectors are not of this reader"):
        reader.read_latent(other.latent(contexts))
    with pytest.raises(ValueError, match="not of this reader"):
        reader.read_latent([LatentContext(QUERIES[0], "words")])


def recipe_file(folder: Path, model: Path, connector: Path, **changes: object) -> Path:
    recipe = {
        "kind": "pipeline",
        "reader": {"kind": "lm", "model": str(model), "prompt": "closed-book", "max_new_tokens": 4, **WHERE},
        "recursion": {"kind": "neural", "connector": str(connector)},
    }
    path = folder / "pipeline.yaml"
    path.write_text(json.dumps(recipe | changes), encoding="utf-8")
    return path


def test_a_recipe_names_the_connector(backbone: Backbone, folder: Path, tmp_path: Path) -> None:
    method = moved(backbone, depth=1)
    method.save(tmp_path / "connector")
    recipe = load_recipe(recipe_file(tmp_path, folder, tmp_path / "connector"), "pipeline")
    built = build_pipeline(recipe, None, places=Places(tmp_path, tmp_path))
    (trace,) = built.answer(QUERIES[:1])
    expected = LmReader(backbone, "closed-book", max_new_tokens=4, method=method).read(trace.contexts[:1])
    assert trace.answer.text == expected[0].text and trace.steps[-1].stage == "read latent"


def test_a_connector_of_another_backbone_or_another_method_is_refused(folder: Path, tmp_path: Path) -> None:
    stranger = load_lm(str(tiny_llama(tmp_path / "other", seed=1)), device="cpu", dtype="float32")
    NeuralRecursion(stranger).save(tmp_path / "connector")
    create_method("lora", load_lm(str(folder), device="cpu", dtype="float32"), rank=2, alpha=2.0).save(
        tmp_path / "lora"
    )
    places = Places(tmp_path, tmp_path)
    with pytest.raises(ArtifactMismatch, match="this neural-recursion was trained on backbone"):
        path = recipe_file(tmp_path, folder, tmp_path / "connector")
        build_pipeline(load_recipe(path, "pipeline"), None, places=places)
    with pytest.raises(RecipeError, match="it has one of kind lora"):
        path = recipe_file(tmp_path, folder, tmp_path / "lora")
        build_pipeline(load_recipe(path, "pipeline"), None, places=places)


def test_more_than_two_passes_or_a_reader_without_vectors_are_mistakes_of_a_recipe() -> None:
    neural = {"kind": "neural", "connector": "c"}
    lm = {"kind": "lm", "model": "m"}
    with pytest.raises(ValueError, match="passes"):
        PipelineRecipe.model_validate({"kind": "pipeline", "reader": lm, "recursion": {**neural, "passes": 3}})
    with pytest.raises(ValueError, match="needs a reader of kind lm, not span"):
        PipelineRecipe.model_validate(
            {"kind": "pipeline", "reader": {"kind": "span", "model": "m"}, "recursion": neural}
        )


# --- training by recipes


def test_texts_are_cut_once_each_and_continued_whole() -> None:
    texts = [[1, 2, 3, 4, 5, 6, 7], [11, 12, 13], [21]]
    batches = CutTexts(texts, tokens=4, size=3)
    assert batches.examples == [[1, 2, 3, 4], [5, 6, 7], [11, 12, 13]]  # [21] has no place for a cut
    beginnings, continuations = batches(0)
    joined = [[*a, *b] for a, b in zip(beginnings, continuations, strict=True)]
    assert sorted(joined) == batches.examples and all(beginnings) and all(continuations)
    assert batches(0) == batches(0) and batches(0) != batches(1)
    with pytest.raises(DataError, match="no text has two tokens"):
        CutTexts([[21]], tokens=4, size=1)


def test_a_connector_is_trained_on_text_and_goes_on_with_questions(folder: Path, tmp_path: Path) -> None:
    rows, text = questions(4), {passage.id: passage for passage in passages()}
    found = [text[row["positive_ids"][0]] for row in rows]
    examples = [row | {"title": p.title, "passage": p.text} for row, p in zip(rows, found, strict=True)]
    listed = [{"id": p.id, "title": p.title, "text": p.text} for p in passages(20)]
    reader = {"kind": "lm", "model": str(folder), "prompt": "closed-book", "max_new_tokens": 2, **WHERE}
    shared = {
        "pipeline": str(write_yaml(tmp_path / "pipeline.yaml", {"kind": "pipeline", "reader": reader})),
        "method": {"kind": "neural-recursion", "depth": 1, "width": 4, "prompt": 2, "start": "random"},
        "passages": [str(write_jsonl(tmp_path / "passages.jsonl", listed))],
        "fit": {"steps": 3, "learning_rates": {"method": 0.01}},
        "autocast": False,
    }
    language = {"kind": "train-connector", **shared, "tokens": 12, "batch": 2}
    first = ok("train", write_yaml(tmp_path / "language.yaml", language), "--artifacts", tmp_path)
    assert "times)" in first.err and "trained values" in first.err  # FLOPs and parameters are told
    task = {"kind": "train-lm-reader", **shared, "train": str(write_jsonl(tmp_path / "train.jsonl", examples))}
    task |= {"contexts": {"questions": 2}, "start": first.out.strip()}
    trained = Path(ok("train", write_yaml(tmp_path / "task.yaml", task), "--artifacts", tmp_path).out.strip())
    values = [load_file(Path(one) / "method.safetensors") for one in (first.out.strip(), trained)]
    assert values[0].keys() == values[1].keys()
    assert all(not torch.equal(values[0][name], values[1][name]) for name in values[0])
    load_method(trained, load_backbone(str(folder), "causal", device="cpu", dtype="float32"))
