"""The engine in process: what it says of a request is what the frozen model says of it, alone, with torch in hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odqa.errors import ArtifactError, DataError
from odqa.frozen.backbone import Architecture, Backbone, fingerprint, load_backbone
from odqa.frozen.bank import Bank
from odqa.frozen.engine import Ask, Engine, Prompted, Sampling, Vectors
from odqa.frozen.local import LocalEngine
from odqa.frozen.method import create_method
from odqa.frozen.prompt_tuning import PromptTuning
from tests.tiny_models import tiny_bert, tiny_bert2bert, tiny_gpt2, tiny_llama, tiny_odqa_mini, tiny_t5

MODELS: dict[str, tuple[Architecture, Callable[..., Path], dict[str, Any]]] = {
    "gpt2": ("causal", tiny_gpt2, {}),
    "llama": ("causal", tiny_llama, {}),
    "t5": ("seq2seq", tiny_t5, {"factor": 1.0}),
    "bert2bert": ("seq2seq", tiny_bert2bert, {}),
    "odqa-mini": ("seq2seq", tiny_odqa_mini, {}),
}
LENGTHS = [None, 3, 7, None, 1]  # of the prompts
TEXTS = ["where is the seine", "paris", "who wrote the song of the river and the sea", "the book", "london or rome"]
TARGETS = [[41], [42, 43, 44], [45, 46], [47], [48, 49]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


_engines: dict[str, LocalEngine] = {}


def engine_of(name: str, root: Path) -> LocalEngine:
    """An engine whose bank has a method of a kind that changes keys and values, and one that changes maps."""
    if name not in _engines:
        architecture, make, settings = MODELS[name]
        backbone = load_backbone(
            str(make(root / name / "model", **settings)), architecture, device="cpu", dtype="float32"
        )
        users = root / name / "users"
        for user, kind, own in (("deep", "deep-prompt", {"length": 2}), ("lora", "lora", {"rank": 2, "alpha": 4.0})):
            method = create_method(kind, backbone, **own)
            torch.manual_seed(1)
            with torch.no_grad():
                for tensor in method.parameters():
                    tensor.add_(torch.randn_like(tensor) * 0.1)
            method.save(users / user)
        _engines[name] = LocalEngine(backbone, Bank(backbone, users))
    return _engines[name]


@pytest.fixture(params=MODELS)
def engine(request: pytest.FixtureRequest, root: Path) -> LocalEngine:
    return engine_of(str(request.param), root)


@pytest.fixture
def gpt2(root: Path) -> LocalEngine:
    return engine_of("gpt2", root)


def prompt(engine: LocalEngine, length: int, seed: int = 0) -> Vectors:
    drawn = np.random.default_rng(seed).standard_normal((length, engine.backbone.width)) * 0.5
    return drawn.astype(np.float32)


def mixed(engine: LocalEngine) -> list[Prompted]:
    """Prompts of several lengths, none, and saved methods, side by side."""
    sources = [
        Prompted(text, prompt=None if length is None else prompt(engine, length, number))
        for number, (text, length) in enumerate(zip(TEXTS, LENGTHS, strict=True))
    ]
    sources[0] = replace(sources[0], method="deep")
    sources[3] = replace(sources[3], method="lora")
    return sources


def attached(backbone: Backbone, vectors: Vectors) -> PromptTuning:
    method = PromptTuning(backbone, length=len(vectors))
    with torch.no_grad():
        method.prompt.copy_(torch.tensor(vectors))
    method.attach(backbone)
    return method


# --- what a request gets ----------------------------------------------------------------------------------------------


def test_an_engine_is_one_of_the_protocol(engine: LocalEngine) -> None:
    spoken: Engine = engine
    facts = spoken.facts
    assert (facts.width, facts.layers, facts.vocabulary) == (32, 2, len(engine.backbone.tokenizer))
    assert facts.fingerprint == engine.backbone.fingerprint
    words = spoken.embed(range(len(engine.backbone.tokenizer)))
    assert facts.embedding_spread == pytest.approx(words.std(), rel=1e-4)


@torch.no_grad()
def test_scores_with_a_prompt_are_those_of_prompt_tuning(engine: LocalEngine) -> None:
    vectors, backbone = prompt(engine, 4), engine.backbone
    sources = [Prompted(text, prompt=vectors) for text in TEXTS]
    found = engine.score(sources, TARGETS)
    method = attached(backbone, vectors)
    expected = -backbone.token_losses([engine.ids_of(source) for source in sources], TARGETS)
    method.detach()
    for row, target in enumerate(TARGETS):
        np.testing.assert_allclose(found[row], expected[row, : len(target)], rtol=1e-5, atol=1e-5)
    chosen = engine.choose(sources, [41, 42, 45])
    np.testing.assert_allclose([chosen[0, 0], chosen[1, 1]], [found[0][0], found[1][0]], rtol=1e-5, atol=1e-5)


def test_a_mixed_call_gives_each_request_what_it_gets_alone(engine: LocalEngine) -> None:
    sources = mixed(engine)
    alone = [engine.score([source], [target])[0] for source, target in zip(sources, TARGETS, strict=True)]
    assert len({round(values[0], 3) for values in alone}) == len(alone), "every request differs from the others"
    asks = [
        Ask(source, Sampling(max_tokens=3 + row % 3, temperature=(0.0, 0.7, 1.5)[row % 3], top_p=0.9, seed=row, top=2))
        for row, source in enumerate(sources)
    ]
    written = [engine.generate([ask])[0][0] for ask in asks]
    order = [3, 1, 4, 0, 2]
    scores = engine.score([sources[row] for row in order], [TARGETS[row] for row in order])
    texts = engine.generate([asks[row] for row in order])
    for place, row in enumerate(order):
        np.testing.assert_allclose(scores[place], alone[row], rtol=1e-5, atol=1e-5)
        assert (texts[place][0].ids, texts[place][0].text) == (written[row].ids, written[row].text)
        np.testing.assert_allclose(texts[place][0].logprobs, written[row].logprobs, rtol=1e-5, atol=1e-5)
        assert len(texts[place][0].ids) <= asks[row].sampling.max_tokens


def test_many_passes_give_what_one_gives(gpt2: LocalEngine) -> None:
    sources = mixed(gpt2)
    small = LocalEngine(gpt2.backbone, gpt2.bank, pass_tokens=30)
    for found, expected in zip(small.score(sources, TARGETS), gpt2.score(sources, TARGETS), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(small.choose(sources, [41, 50]), gpt2.choose(sources, [41, 50]), rtol=1e-5, atol=1e-5)
    asks = [Ask(source, Sampling(max_tokens=4, n=2, temperature=1.0, seed=3)) for source in sources]
    assert [[one.ids for one in texts] for texts in small.generate(asks)] == [
        [one.ids for one in texts] for texts in gpt2.generate(asks)
    ]


@torch.no_grad()
def test_greedy_text_and_its_logprobs_are_the_models_own(engine: LocalEngine) -> None:
    vectors, backbone = prompt(engine, 4), engine.backbone
    written = engine.generate([Ask(Prompted(TEXTS[2], prompt=vectors), Sampling(max_tokens=6, top=3))])[0][0]
    ids = engine.ids_of(Prompted(TEXTS[2]))
    method = attached(backbone, vectors)
    expected = backbone.generate([ids], max_new_tokens=6, do_sample=False)[0]
    losses = backbone.token_losses([ids], [expected])[0]
    method.detach()
    assert list(written.ids) == expected
    np.testing.assert_allclose(written.logprobs, -losses, rtol=1e-4, atol=1e-4)
    assert [max(top, key=lambda token, top=top: top[token]) for top in written.top] == expected


def test_a_causal_model_goes_on_from_a_prompt_alone(gpt2: LocalEngine) -> None:
    """As a client that embeds its text itself sends it: the same as sending the text."""
    ids = gpt2.ids_of(Prompted(TEXTS[2]))
    whole = Prompted(prompt=np.concatenate([prompt(gpt2, 3), gpt2.embed(ids)]))
    apart = Prompted(TEXTS[2], prompt=prompt(gpt2, 3))
    np.testing.assert_allclose(gpt2.choose([whole], [41, 50]), gpt2.choose([apart], [41, 50]), rtol=1e-5, atol=1e-5)
    first, second = gpt2.generate([Ask(whole), Ask(apart)])
    assert first[0].ids == second[0].ids


@torch.no_grad()
def test_a_deep_prompt_is_added_where_states_enter_layers(gpt2: LocalEngine) -> None:
    """Worked out with hooks on GPT-2's two blocks, one row without pads."""
    vectors, model = prompt(gpt2, 3), gpt2.backbone.model
    deep = np.stack([prompt(gpt2, 3, 5), prompt(gpt2, 3, 6)])
    ids = torch.tensor([gpt2.ids_of(Prompted(TEXTS[0]))])
    embedded = torch.cat([torch.tensor(vectors)[None], model.transformer.wte(ids)], dim=1)

    def add(layer: int) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
            states = args[0].clone()
            states[:, :3] += torch.tensor(deep[layer])
            return (states, *args[1:])

        return hook

    handles = [block.register_forward_pre_hook(add(layer)) for layer, block in enumerate(model.transformer.h)]
    expected = model(inputs_embeds=embedded).logits[0, -1].log_softmax(-1)[[41, 50]]
    for handle in handles:
        handle.remove()
    sources = [Prompted(TEXTS[2]), Prompted(TEXTS[0], prompt=vectors, deep=deep), Prompted(TEXTS[2], prompt=vectors)]
    found = gpt2.choose(sources, [41, 50])
    np.testing.assert_allclose(found[1], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[[0, 2]], gpt2.choose([sources[0], sources[2]], [41, 50]), rtol=1e-5, atol=1e-5)


def test_deep_prompts_of_a_mixed_call_are_those_of_their_rows_alone(engine: LocalEngine) -> None:
    deep = [np.stack([prompt(engine, size, 5), prompt(engine, size, 6)]) for size in (2, 5)]
    sources = [
        Prompted(TEXTS[2], prompt=prompt(engine, 2), deep=deep[0]),
        Prompted(TEXTS[1]),
        Prompted(TEXTS[0], prompt=prompt(engine, 5), deep=deep[1]),
        Prompted(TEXTS[0], prompt=prompt(engine, 5)),
    ]
    alone = np.concatenate([engine.choose([source], [41, 50]) for source in sources])
    assert abs(alone[2] - alone[3]).max() > 1e-3, "it does something"
    np.testing.assert_allclose(engine.choose(sources, [41, 50]), alone, rtol=1e-5, atol=1e-5)
    asks = [Ask(source, Sampling(max_tokens=5)) for source in sources]
    assert [texts[0].ids for texts in engine.generate(asks)] == [engine.generate([ask])[0][0].ids for ask in asks]
    zero = replace(sources[2], deep=np.zeros_like(deep[1]))
    np.testing.assert_allclose(engine.choose([zero], [41, 50]), alone[3:], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_spread_of_states_is_the_clipped_deviation_at_each_layer(gpt2: LocalEngine) -> None:
    model, ids = gpt2.backbone.model, gpt2.ids_of(Prompted(TEXTS[2]))
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[:2]
    for found, entered in zip(gpt2.spread([Prompted(TEXTS[2])]), states, strict=True):
        values = entered.flatten()
        for _ in range(5):
            values = values[(values - values.mean()).abs() <= 3 * values.std(correction=0)]
        assert found == pytest.approx(float(values.std(correction=0)), rel=1e-4)
    # A row of the same text has the same states, and pads are not among them.
    assert gpt2.spread([Prompted(TEXTS[2])] * 2) == pytest.approx(gpt2.spread([Prompted(TEXTS[2])]), rel=1e-4)


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_samples_depend_on_seed_and_number_alone(gpt2: LocalEngine) -> None:
    ask = Ask(Prompted(TEXTS[0]), Sampling(max_tokens=8, n=3, temperature=1.0, seed=7))
    three = [one.ids for one in gpt2.generate([ask])[0]]
    assert len(set(three)) == 3
    assert [one.ids for one in gpt2.generate([replace(ask, sampling=replace(ask.sampling, n=2))])[0]] == three[:2]
    assert [one.ids for one in gpt2.generate([ask, ask])[1]] == three
    by_chance = Ask(ask.source, replace(ask.sampling, seed=None))
    assert len({one.ids for texts in gpt2.generate([by_chance] * 2) for one in texts}) == 6
    greedy = Ask(ask.source, Sampling(max_tokens=8, n=2))
    assert len({one.ids for one in gpt2.generate([greedy])[0]}) == 1


def test_samples_have_the_probabilities_of_the_softmax_among_top_p(gpt2: LocalEngine) -> None:
    source = Prompted(TEXTS[0])
    likely = np.exp(gpt2.choose([source], range(gpt2.facts.vocabulary or 0))[0] / 2.0)  # temperature 2
    order, shares = np.argsort(-likely), np.sort(likely)[::-1] / likely.sum()
    kept = int((shares.cumsum() - shares < 0.5).sum())
    texts = gpt2.generate([Ask(source, Sampling(max_tokens=1, n=600, temperature=2.0, top_p=0.5, seed=1))])[0]
    first = [one.ids[0] for one in texts]
    assert set(first) <= set(order[:kept].tolist())
    for token, share in zip(order[:3].tolist(), shares[:3] / shares[:kept].sum(), strict=True):
        # 600 draws: a standard deviation is at most 0.02.
        assert first.count(token) / 600 == pytest.approx(share, abs=0.07)


@pytest.mark.parametrize("name", ["gpt2", "llama", "odqa-mini"])
def test_a_text_ends_before_the_string_that_stops_it(name: str, root: Path) -> None:
    engine = engine_of(name, root)
    source = Prompted(TEXTS[1])
    whole = engine.generate([Ask(source, Sampling(max_tokens=8))])[0][0]
    assert len(whole.text) > 2
    stop = whole.text[2]
    short, again = (
        texts[0]
        for texts in engine.generate([Ask(source, Sampling(8, stop=("never", stop))), Ask(source, Sampling(8))])
    )
    assert short.text == whole.text[: whole.text.index(stop)] and short.finish == "stop"
    assert whole.ids[: len(short.ids)] == short.ids and len(short.logprobs) == len(short.ids)
    assert again.ids == whole.ids


# --- nothing else is visible, nothing moves ---------------------------------------------------------------------------


def test_the_model_is_frozen_and_no_gradient_is_computed(engine: LocalEngine) -> None:
    sources = mixed(engine)
    engine.score(sources, TARGETS)
    engine.generate([Ask(source) for source in sources])
    assert fingerprint(engine.backbone.model) == engine.backbone.fingerprint


def test_a_weight_with_a_gradient_is_a_defect(root: Path) -> None:
    folder = tiny_gpt2(root / "wrong")
    backbone = load_backbone(str(folder), "causal", device="cpu", dtype="float32")
    engine = LocalEngine(backbone)
    weight = next(backbone.model.parameters())
    weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="has been given a gradient"):
        engine.choose([Prompted("paris")], [41])
    weight.requires_grad_(False)
    weight.grad = torch.zeros_like(weight)
    with pytest.raises(AssertionError, match="has been given a gradient"):
        engine.generate([Ask(Prompted("paris"))])


# --- bad input --------------------------------------------------------------------------------------------------------


def test_a_bad_request_is_one_clear_error_that_has_its_number(gpt2: LocalEngine) -> None:
    good, vectors = Prompted("paris"), prompt(gpt2, 3)
    wild = vectors.copy()
    wild[1, 1] = np.nan
    for bad, message in {
        Prompted("a", ids=[1]): "request 1: it has a text and ids",
        Prompted(): "request 1: its text has no tokens",
        Prompted(""): "request 1: its text has no tokens",
        Prompted(ids=[9999]): r"request 1: it has token 9999; .* knows tokens 0 to",
        Prompted("a", prompt=vectors[:, :5]): r"request 1: its prompt has shape \(3, 5\); .* takes \(P, 32\)",
        Prompted("a", prompt=vectors[0]): r"request 1: its prompt has shape \(32,\)",
        Prompted("a", prompt=vectors[:0]): r"request 1: its prompt has shape \(0, 32\)",
        Prompted("a", prompt=vectors.astype(np.float64)): "request 1: its prompt is float64; it must be float32",  # type: ignore[arg-type]
        Prompted("a", prompt=wild): "request 1: its prompt has entries that are not finite",
        Prompted("a", prompt=vectors, method="deep"): "request 1: it has a prompt and names the method 'deep'",
        Prompted("a", deep=np.zeros((2, 3, 32), np.float32)): "request 1: a deep prompt adds to the places of a prompt",
        Prompted("a", prompt=vectors, deep=np.zeros((3, 3, 32), np.float32)): r"takes \(2, 3, 32\)",
        Prompted("a", prompt=np.zeros((256, 32), np.float32)): "request 1 needs .* window of 256",
    }.items():
        with pytest.raises(DataError, match=message):
            gpt2.choose([good, bad], [41])
    with pytest.raises(ArtifactError, match="request 1: the bank knows no 'nobody'; it has deep, lora"):
        gpt2.choose([good, Prompted("a", method="nobody")], [41])
    with pytest.raises(DataError, match="request 1: its target has no tokens"):
        gpt2.score([good, good], [[41], []])
    with pytest.raises(DataError, match="choose has token -1"):
        gpt2.choose([good], [-1])
    for sampling, message in {
        Sampling(max_tokens=0): "max_tokens is 0; it must be at least 1",
        Sampling(n=0): "n is 0",
        Sampling(temperature=float("nan")): "temperature is nan",
        Sampling(top_p=0.0): "top_p is 0.0; it must be above 0 and at most 1",
        Sampling(stop=("",)): "without empty strings",
        Sampling(max_tokens=256): "request 1 needs .* window of 256",
    }.items():
        with pytest.raises(DataError, match=message):
            gpt2.generate([Ask(good), Ask(good, sampling)])


def test_an_encoder_is_no_engine(root: Path) -> None:
    encoder = load_backbone(str(tiny_bert(root / "bert")), "encoder", device="cpu", dtype="float32")
    with pytest.raises(DataError, match="is an encoder; an engine needs a model that writes"):
        LocalEngine(encoder)


def test_an_encoder_decoder_needs_a_text(root: Path) -> None:
    engine = engine_of("t5", root)
    with pytest.raises(DataError, match="its text has no tokens"):
        engine.choose([Prompted(prompt=prompt(engine, 3))], [41])


def test_nothing_asked_is_nothing_answered(gpt2: LocalEngine) -> None:
    assert gpt2.generate([]) == [] and gpt2.score([], []) == [] and gpt2.tokens([]) == []
    assert gpt2.choose([], [41]).shape == (0, 1)
