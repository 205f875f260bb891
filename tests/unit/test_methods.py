"""What every method must do on every kind of language model: one list of promises, kept by all of them."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from odqa.config import AdapterSettings
from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.frozen.adapter import Adapter, adapted_maps
from odqa.frozen.backbone import Architecture, Backbone, Encoded, fingerprint, load_backbone
from odqa.frozen.layout import insert, pad_rows, remove, text_start
from odqa.frozen.method import Method, create_method, load_method
from odqa.frozen.peft_format import load_peft, save_peft
from odqa.frozen.prefix import prefix_of_prompt
from odqa.frozen.prompt_tuning import PromptTuning
from tests.tiny_models import tiny_bert, tiny_bert2bert, tiny_gpt2, tiny_llama, tiny_odqa_mini, tiny_t5

SOURCES = [[41, 42, 43, 44, 45, 46, 47], [51, 52, 53], [61, 62, 63, 64, 65]]
TARGETS = [[71, 72, 73], [74, 75], [76]]
P, R, M = 4, 3, 8  # prompt length, rank, inner width of the prefix network and of ID-PT's attention
N = 3  # length of the encoder's prompt in ID-PT


@dataclass(frozen=True)
class Kind:
    """A tiny model, and its shapes: layers by side, widths of all key heads together, sizes of its linear maps."""

    make: Callable[[Path], Path]
    architecture: Architecture
    sides: dict[str, int]
    keys: int
    maps: tuple[tuple[int, int], ...]  # (d_in, d_out) of the linear maps of all layers
    norms: int  # values of all normalisations in the layers
    skip: tuple[str, ...] = ()


# Width 32, feed-forward 64 (GPT-2: 128), 2 layers; Llama has 2 key heads of 8. A layer of T5 and BERT has four square
# maps an attention and two between 32 and 64. A layer has two normalisations, with attention to a source three; those
# of T5 and Llama have no shift.
SQUARE, UP, DOWN = (32, 32), (32, 64), (64, 32)
KINDS = {
    "gpt2": Kind(tiny_gpt2, "causal", {"self": 2}, 32, 2 * ((32, 96), SQUARE, (32, 128), (128, 32)), 2 * 2 * 64),
    "llama": Kind(
        tiny_llama, "causal", {"self": 2}, 16, 2 * (SQUARE, SQUARE, (32, 16), (32, 16), UP, UP, DOWN), 2 * 2 * 32
    ),
    "t5": Kind(
        partial(tiny_t5, factor=1.0),
        "seq2seq",
        {"encoder": 2, "decoder": 2, "cross": 2},
        32,
        2 * (12 * (SQUARE,) + 2 * (UP, DOWN)),
        2 * (2 + 3) * 32,
    ),
    "bert2bert": Kind(
        tiny_bert2bert,
        "seq2seq",
        {"encoder": 2, "decoder": 2, "cross": 2},
        32,
        2 * (12 * (SQUARE,) + 2 * (UP, DOWN)),
        2 * (2 + 3) * 64,
        ("encoder.pooler",),
    ),
    "odqa-mini": Kind(
        tiny_odqa_mini,
        "seq2seq",
        {"encoder": 2, "decoder": 2, "cross": 2},
        32,
        2 * (12 * (SQUARE,) + 2 * (UP, DOWN)),  # not the maps behind the layers: output, pointer, gate
        2 * (2 + 3) * 64,
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "prompt-tuning": {"length": P},
    "deep-prompt": {"length": P},
    "prefix-tuning": {"length": P, "inner": M},
    "flat-prefix-tuning": {"length": P, "inner": None, "cross": False},
    "lora": {"rank": R, "alpha": 6.0},
    "adapter": {"rank": R},
    "normed-adapter": {"rank": R, "norms": True, "cross": True},
    "id-pt": {"length": P, "encoder_length": N, "inner": M, "heads": 2},
    "read-id-pt": {"length": P, "encoder_length": N, "inner": M, "heads": 2},  # a BERT reads the text
    "neural-recursion": {"depth": 1, "width": M, "prompt": P},
    "pooled-neural-recursion": {"depth": 0, "vectors": P, "start": "random"},
    "fine-tuning": {},
}
STATES = {**dict.fromkeys(KINDS, 32), "odqa-mini": 64}  # widths of last hidden states; odqa-mini's have the words, too
SOFT = ("prompt-tuning", "deep-prompt", "prefix-tuning", "flat-prefix-tuning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tiny_bert(root / "bert")
    return {name: kind.make(root / name) for name, kind in KINDS.items()}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def backbone(kind: str, folders: dict[str, Path]) -> Backbone:
    return load(kind, folders)


@pytest.fixture(autouse=True)
def detached() -> Iterator[None]:
    """Tests share the loaded models: `detach` gives them back as they were, and the first test below proves it."""
    yield
    while _made:
        method = _made.pop()
        if method.is_attached:
            method.detach()


@pytest.fixture(params=SETTINGS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def load(kind: str, folders: dict[str, Path], attention: str = "sdpa", *, fresh: bool = False) -> Backbone:
    key = folders[kind], attention
    if fresh or key not in _loaded:
        architecture = KINDS[kind].architecture
        found = load_backbone(str(folders[kind]), architecture, device="cpu", dtype="float32", attention=attention)
        if fresh:
            return found
        _loaded[key] = found
    return _loaded[key]


_loaded: dict[tuple[Path, str], Backbone] = {}
_made: list[Method] = []


def create(name: str, backbone: Backbone, **settings: Any) -> Method:
    for prefix in ("flat-", "normed-", "read-", "pooled-"):
        name = name.removeprefix(prefix)
    method = create_method(name, backbone, **settings)
    _made.append(method)
    return method


def make(name: str, kind: str, backbone: Backbone, *, moved: bool = True, **changes: Any) -> Method:
    settings = SETTINGS[name] | changes
    if name == "fine-tuning":
        settings["skip"] = list(KINDS[kind].skip)
    if name == "read-id-pt":
        settings["encoder"] = str(Path(backbone.name).parent / "bert")
    method = create(name, backbone, **settings)
    if moved:
        torch.manual_seed(1)
        with torch.no_grad():
            for tensor in method.parameters():
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return method


@torch.no_grad()
def losses(backbone: Backbone, **options: Any) -> torch.Tensor:
    return backbone.token_losses(SOURCES, TARGETS, **options)


def write(backbone: Backbone, sources: list[list[int]] = SOURCES, **options: Any) -> list[list[int]]:
    """Generated with beams or samples if asked for, else greedily."""
    return backbone.generate(sources, max_new_tokens=6, **{"do_sample": False, **options})


# --- the promises of a method -----------------------------------------------------------------------------------------


def test_detach_leaves_the_backbone_bit_identical(name: str, kind: str, backbone: Backbone) -> None:
    before = losses(backbone)
    method = make(name, kind, backbone)
    method.attach(backbone)
    assert not torch.equal(losses(backbone), before)
    if name != "fine-tuning":  # it lends its own weights to the model
        assert fingerprint(backbone.model) == backbone.fingerprint
    method.detach()
    assert torch.equal(losses(backbone), before)
    assert fingerprint(backbone.model) == backbone.fingerprint


@pytest.mark.parametrize("name", ["lora", "fine-tuning", "neural-recursion"])
def test_a_fresh_method_changes_nothing_where_the_paper_says_so(name: str, kind: str, backbone: Backbone) -> None:
    before = losses(backbone)
    settings = {"prompt": 0} if name == "neural-recursion" else {}  # a prompt is not zero at the start
    make(name, kind, backbone, moved=False, **settings).attach(backbone)
    assert torch.equal(losses(backbone), before)


@pytest.mark.parametrize("name", ["adapter", "normed-adapter"])
def test_a_fresh_adapter_changes_next_to_nothing(name: str, kind: str, backbone: Backbone) -> None:
    before = losses(backbone)
    fresh, moved = make(name, kind, backbone, moved=False), make(name, kind, backbone)
    # A bottleneck adds about 0.01 |h| sqrt(32) * 0.01 sqrt(3) = 0.001 |h|, and gelu halves it: layer by layer next to
    # nothing, whatever wide weights make of it behind.
    fresh.attach(backbone)
    change = (losses(backbone) - before).abs().max()
    fresh.detach()
    moved.attach(backbone)
    assert 0 < change < 0.1 and change < 0.05 * (losses(backbone) - before).abs().max()
    moved.detach()
    with torch.no_grad():
        for key, tensor in fresh.named_parameters():
            if key.startswith("up."):
                tensor.zero_()
    fresh.attach(backbone)
    assert torch.equal(losses(backbone), before)


def test_saved_and_loaded_gives_identical_logits(
    name: str, kind: str, backbone: Backbone, folders: dict[str, Path], tmp_path: Path
) -> None:
    method = make(name, kind, backbone)
    method.attach(backbone)
    expected, written = losses(backbone), write(backbone)
    method.save(tmp_path)
    other = load(kind, folders, fresh=True)
    load_method(tmp_path, other).attach(other)
    assert torch.equal(losses(other), expected)
    assert write(other) == written


def test_exactly_the_expected_tensors_are_saved(name: str, kind: str, backbone: Backbone, tmp_path: Path) -> None:
    method = make(name, kind, backbone)
    method.save(tmp_path)
    saved = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "method.safetensors").items()}
    model, heads = KINDS[kind], 2 if kind == "llama" else 4
    seen = STATES[kind] + 32
    if name == "prompt-tuning":
        expected: dict[str, tuple[int, ...]] = {"prompt": (P, 32)}
    elif name in SOFT:
        sides = dict(model.sides) if name == "prefix-tuning" else {s: n for s, n in model.sides.items() if s != "cross"}
        expected = {
            "prompt" if side == "self" else f"prompt.{side}": (2, layers, heads, P, 8) for side, layers in sides.items()
        }
    elif name == "lora":
        assert len(saved) == 2 * len(model.maps)
        found = sorted((saved[key][1], saved[f"B.{key[2:]}"][0]) for key in saved if key.startswith("A."))
        assert found == sorted(model.maps)
        return
    elif name.endswith("adapter"):
        # Two a layer, and with `cross` a third one in each layer of a decoder that reads a source.
        places = sum(n if s == "cross" else 2 * n for s, n in model.sides.items() if s != "cross" or "normed" in name)
        shapes = {"down": (R, 32), "down_bias": (R,), "up": (32, R), "up_bias": (32,)}
        for part, shape in shapes.items():
            assert [found for key, found in saved.items() if key.startswith(f"{part}.")] == [shape] * places
        norms = [shape for key, shape in saved.items() if key.startswith("norms.")]
        assert set(norms) <= {(32,)} and 32 * len(norms) == (model.norms if "normed" in name else 0)
        assert len(saved) == 4 * places + len(norms)
        return
    elif name.endswith("id-pt"):
        states = 64 if name == "id-pt" and kind == "odqa-mini" else 32  # states and word vectors side by side
        expected = {"encoder_prompt": (N, 32), "prompt": (P, 32), "queries": (P, M), "out.weight": (32, M)}
        expected |= {"key.weight": (M, states), "value.weight": (M, states)}
    elif name == "neural-recursion":
        network = {"connector.0.weight": (M, seen), "connector.0.bias": (M,), "connector.2.weight": (32, M)}
        expected = {**network, "connector.2.bias": (32,), "prompts.0": (P, 32), "prompts.1": (P, 32)}
    elif name == "pooled-neural-recursion":
        expected = {"connector.0.weight": (32, seen), "connector.0.bias": (32,), "queries": (P, seen)}
    else:
        named = backbone.model.named_parameters()
        expected = {
            f"weights.{key.replace('.', '/')}": tuple(tensor.shape)
            for key, tensor in named
            if not key.startswith(model.skip or ("-",))
        }
    assert saved == expected


def test_the_count_is_the_formula(name: str, kind: str, backbone: Backbone) -> None:
    count, model = make(name, kind, backbone).count(backbone), KINDS[kind]
    layers = sum(number for side, number in model.sides.items() if side != "cross")
    flat = 2 * layers * P * model.keys
    # A network a side: P vectors of 32, a map of 32 to M and one of M to the 2 L keys and values of a position.
    network = sum(P * 32 + 33 * M + (M + 1) * 2 * number * model.keys for number in model.sides.values())
    bottleneck = 2 * 32 * R + 32 + R
    seen = STATES[kind] + 32
    expected = {
        "prompt-tuning": P * 32,
        "deep-prompt": flat,
        "prefix-tuning": network,
        "flat-prefix-tuning": flat,
        "lora": sum(R * (d_in + d_out) for d_in, d_out in model.maps),
        "adapter": layers * 2 * bottleneck,
        "id-pt": N * 32 + P * M + 2 * M * (64 if kind == "odqa-mini" else 32) + M * 32 + P * 32,
        "read-id-pt": N * 32 + P * M + 2 * M * 32 + M * 32 + P * 32,
        "normed-adapter": (layers * 2 + model.sides.get("cross", 0)) * bottleneck + model.norms,
        "neural-recursion": seen * M + M + M * 32 + 32 + 2 * P * 32,
        "pooled-neural-recursion": seen * 32 + 32 + P * seen,
        "fine-tuning": count.frozen - (32 * 32 + 32 if model.skip else 0),  # without BERT's pooler
    }[name]
    assert count.trainable == expected
    if name == "prefix-tuning":  # the network is not stored
        assert count.stored_bytes == 4 * 2 * sum(model.sides.values()) * P * model.keys
    else:
        assert count.stored_bytes == 4 * expected


def test_every_counted_tensor_gets_a_gradient_and_no_frozen_one(name: str, kind: str, backbone: Backbone) -> None:
    method = make(name, kind, backbone)
    method.attach(backbone)
    backbone.loss(SOURCES, TARGETS).backward()  # type: ignore[no-untyped-call]
    for key, tensor in method.tensors().items():
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, key
    if name in SOFT or name.endswith("id-pt"):
        rows = [tensor.grad.flatten(0, -2).abs().sum(-1) for tensor in method.parameters() if tensor.ndim > 1]
        assert name == "prefix-tuning" or all((row > 0).all() for row in rows)  # every vector of the prompt
    method.detach()
    assert all(tensor.grad is None and not tensor.requires_grad for tensor in backbone.model.parameters())


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_cached_generation_equals_uncached(name: str, kind: str, backbone: Backbone, options: dict[str, Any]) -> None:
    make(name, kind, backbone).attach(backbone)
    written = []
    for cached in (True, False):
        torch.manual_seed(3)
        written.append(write(backbone, use_cache=cached, **options))
    assert written[0] == written[1]


def test_padding_and_batching_change_no_row(name: str, kind: str, backbone: Backbone) -> None:
    make(name, kind, backbone).attach(backbone)
    with torch.no_grad():
        alone = [backbone.token_losses([s], [t])[0] for s, t in zip(SOURCES, TARGETS, strict=True)]
    for side in ("left", "right"):
        together = losses(backbone, padding=side)
        for row, expected in zip(together, alone, strict=True):
            # Losses of T5 are near 100 nats a token, so the tolerance is relative: float32 has 7 digits.
            torch.testing.assert_close(row[: len(expected)], expected, atol=1e-5, rtol=1e-5)
            assert not row[len(expected) :].any()
    for options in ({}, {"num_beams": 3}):
        expected_texts = [write(backbone, [source], **options)[0] for source in SOURCES]
        assert write(backbone, padding="left", **options) == expected_texts
        if KINDS[kind].architecture == "seq2seq":
            assert write(backbone, padding="right", **options) == expected_texts


def test_a_causal_model_gives_what_its_own_generate_gives(name: str, kind: str, backbone: Backbone) -> None:
    """A reader that calls the model itself needs to know nothing of the method."""
    make(name, kind, backbone).attach(backbone)
    is_causal = KINDS[kind].architecture == "causal"
    ids, mask = pad_rows(SOURCES, backbone.padding, "left" if is_causal else "right")
    settings: dict[str, Any] = {"pad_token_id": backbone.padding, "do_sample": False, "max_new_tokens": 6}
    out = backbone.model.generate(
        input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings
    )
    for row, expected in zip(
        out.sequences[:, ids.shape[1] if is_causal else 1 :].tolist(), write(backbone), strict=True
    ):
        assert row[: len(expected)] == expected
    assert all(step.shape[0] == len(SOURCES) for step in out.logits)


def test_eager_attention_gives_the_same(name: str, kind: str, backbone: Backbone, folders: dict[str, Path]) -> None:
    make(name, kind, backbone).attach(backbone)
    eager = load(kind, folders, "eager")
    make(name, kind, eager).attach(eager)
    torch.testing.assert_close(losses(eager), losses(backbone), atol=1e-4, rtol=1e-5)


def test_another_backbone_is_refused(
    name: str, kind: str, backbone: Backbone, folders: dict[str, Path], tmp_path: Path
) -> None:
    method = make(name, kind, backbone)
    method.save(tmp_path)
    stranger = load("gpt2" if kind != "gpt2" else "llama", folders)
    with pytest.raises(ArtifactMismatch, match=f"backbone {backbone.fingerprint[:8]}.*{stranger.fingerprint[:8]}"):
        load_method(tmp_path, stranger)
    with pytest.raises(ArtifactMismatch):
        method.attach(stranger)


# --- soft prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5"])
def test_a_prompt_of_the_words_of_a_text_is_that_text(kind: str, folders: dict[str, Path]) -> None:
    """BERT is not among them: there a prompt does not take the text's positions."""
    backbone = load(kind, folders)
    words = list(backbone.tokenizer("the king was born in paris", add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        expected = backbone.token_losses([[*words, *source] for source in SOURCES], TARGETS)
    text = "the king was born in paris"
    method = create("prompt-tuning", backbone, length=len(words), start="text", text=text)
    method.attach(backbone)
    torch.testing.assert_close(losses(backbone), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert2bert", "odqa-mini"])
def test_a_prompt_of_words_before_bert_is_that_text_at_the_end_of_the_window(
    kind: str, folders: dict[str, Path]
) -> None:
    backbone = load(kind, folders)
    words = list(backbone.tokenizer("the king was born in paris", add_special_tokens=False)["input_ids"])
    window, length = backbone.window, len(words)
    assert window is not None
    ids = torch.tensor([[*words, *SOURCES[0]]])
    places = torch.tensor([[*range(window - length, window), *range(len(SOURCES[0]))]])
    encoder = backbone.model.get_encoder()
    with torch.no_grad():
        expected = encoder(input_ids=ids, attention_mask=torch.ones_like(ids), position_ids=places)[0]
    create("prompt-tuning", backbone, length=length, start="text", text="the king was born in paris").attach(backbone)
    with torch.no_grad():
        found = backbone.encode(SOURCES[:1]).states
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_prefix_of_the_words_of_a_text_is_that_text(kind: str, folders: dict[str, Path]) -> None:
    backbone = load(kind, folders)
    text = "the king was born in paris"
    words = list(backbone.tokenizer(text, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        expected = backbone.token_losses([[*words, *source] for source in SOURCES], TARGETS)
    settings = {"length": len(words), "inner": None, "start": "text", "text": text}
    create("prefix-tuning", backbone, **settings).attach(backbone)
    torch.testing.assert_close(losses(backbone), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_soft_prompt_of_a_causal_model_is_a_prefix_computed_once(kind: str, folders: dict[str, Path]) -> None:
    backbone = load(kind, folders)
    prompt = make("prompt-tuning", kind, backbone)
    assert isinstance(prompt, PromptTuning)
    prompt.attach(backbone)
    expected, written = losses(backbone), write(backbone)
    prompt.detach()
    prefix = prefix_of_prompt(backbone, prompt)
    _made.append(prefix)
    prefix.attach(backbone)
    torch.testing.assert_close(losses(backbone), expected, atol=1e-5, rtol=1e-5)
    assert write(backbone) == written


def test_the_three_starts_of_a_prompt(folders: dict[str, Path]) -> None:
    backbone = load("gpt2", folders)
    table = backbone.model.get_input_embeddings().weight
    words = create("prompt-tuning", backbone, length=6).tensors()["prompt"].detach()
    assert all((table == word).all(dim=1).any() for word in words)
    ids = backbone.tokenizer("king river")["input_ids"]
    repeated = create("prompt-tuning", backbone, length=6, start="text", text="king river").tensors()["prompt"]
    assert torch.equal(repeated, table[torch.tensor((ids * 6)[:6])])
    uniform = create("prompt-tuning", backbone, length=50, start="uniform").tensors()["prompt"].detach()
    assert 0.45 < uniform.abs().max() <= 0.5 and uniform.abs().mean() == pytest.approx(0.25, abs=0.02)


def test_logits_keep_their_shape(kind: str, backbone: Backbone) -> None:
    before = backbone.forward(SOURCES, TARGETS).shape
    make("prompt-tuning", kind, backbone).attach(backbone)
    assert backbone.forward(SOURCES, TARGETS).shape == before
    assert backbone.forward(SOURCES, TARGETS, padding="right").shape == before


def test_a_prompt_takes_no_room_from_the_text_of_a_bert(folders: dict[str, Path]) -> None:
    backbone = load("bert2bert", folders)
    method = make("prompt-tuning", "bert2bert", backbone)
    method.attach(backbone)
    assert method.virtual_tokens(backbone) == 0 and backbone.window == 128
    full = [[40 + number % 50 for number in range(128)]]
    assert backbone.token_losses(full, [[71]]).isfinite().all()


@pytest.mark.parametrize("name", ["prompt-tuning", "prefix-tuning"])
@pytest.mark.parametrize("kind", ["t5", "bert2bert", "odqa-mini"])
def test_sources_that_were_encoded_apart_can_be_read_together(kind: str, name: str, folders: dict[str, Path]) -> None:
    backbone = load(kind, folders)
    make(name, kind, backbone).attach(backbone)
    parts = [backbone.encode([source]) for source in SOURCES[:2]]
    joined = Encoded(torch.cat([part.states for part in parts], dim=1), torch.cat([part.mask for part in parts], dim=1))
    assert joined.states.shape[:2] == joined.mask.shape
    with torch.no_grad():
        assert backbone.token_losses(joined, TARGETS[:1]).isfinite().all()
        torch.testing.assert_close(
            backbone.token_losses(backbone.encode(SOURCES), TARGETS), losses(backbone), atol=0, rtol=0
        )
    greedy, uncached = (
        backbone.generate(joined, max_new_tokens=6, do_sample=False, use_cache=cached) for cached in (True, False)
    )
    assert greedy == uncached


def test_insert_puts_a_block_between_pads_and_text() -> None:
    ids, mask = pad_rows([[1, 2, 3], [4]], 0, "left")
    start = text_start(mask)
    block = torch.tensor([[8, 9], [8, 9]])
    wide = insert(ids, start, block)
    assert wide.tolist() == [[8, 9, 1, 2, 3], [0, 0, 8, 9, 4]]
    assert torch.equal(remove(wide, start, 2), ids)
    right, _ = pad_rows([[1, 2, 3], [4]], 0, "right")
    assert insert(right, torch.zeros(2, dtype=torch.long), block).tolist() == [[8, 9, 1, 2, 3], [8, 9, 4, 0, 0]]


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SOFT)
def test_a_prompt_longer_than_the_window_is_refused(name: str, folders: dict[str, Path]) -> None:
    backbone = load("gpt2", folders)
    settings = {**SETTINGS[name], "length": 256}
    with pytest.raises(DataError, match="256 vectors leaves no room for text in the window of 256"):
        create(name, backbone, **settings)


@pytest.mark.parametrize("name", SOFT)
def test_a_prompt_and_a_text_that_do_not_fit_together_are_refused(name: str, folders: dict[str, Path]) -> None:
    backbone = load("gpt2", folders)
    settings = {"length": 250, "inner": None} if name.endswith("prefix-tuning") else {"length": 250}
    create(name, backbone, **settings).attach(backbone)
    with pytest.raises(DataError, match="250 vectors and a text of 10 tokens do not fit the window of 256"):
        backbone.token_losses([[41] * 9], [[42]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length is 0"),
        ({"length": 2, "start": "zero"}, "must be vocabulary, text or uniform"),
        ({"length": 2, "start": "text"}, "goes with a text"),
        ({"length": 2, "text": "king"}, "goes with a text"),
        ({"length": 2, "start": "text", "text": ""}, "no tokens"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(
    settings: dict[str, Any], message: str, folders: dict[str, Path]
) -> None:
    with pytest.raises(DataError, match=message):
        create("prompt-tuning", load("gpt2", folders), **settings)


def test_a_layer_whose_parts_are_not_known_needs_their_names(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load("gpt2", folders)
    monkeypatch.setattr("odqa.frozen.adapter._FEED_FORWARD", ())
    with pytest.raises(
        DataError, match=r"2 attentions and 0 feed-forward parts found.*attn\.c_attn, attn\.c_proj, mlp"
    ):
        create("adapter", backbone, rank=2)
    named = create("adapter", backbone, rank=2, targets=["attn.c_proj", "mlp.c_proj"])
    assert named.count(backbone).trainable == 2 * 2 * (2 * 32 * 2 + 32 + 2)
    with pytest.raises(DataError, match=r"adapter: no linear map of .* ends in 'c_pro'"):
        create("adapter", backbone, rank=2, targets=["c_pro"])
    with pytest.raises(DataError, match="rank is 0"):
        create("adapter", backbone, rank=0)


def test_a_recipe_says_all_that_an_adapter_takes_and_nothing_else() -> None:
    taken = set(inspect.signature(Adapter.__init__).parameters) - {"self", "backbone"}
    assert set(AdapterSettings.model_fields) - {"kind"} == taken


@pytest.mark.parametrize("family", ["Bart", "Opt", "GPTNeoX", "Falcon", "DistilBert", "Qwen2", "Roberta"])
def test_layers_of_other_families_have_a_place_for_adapters(family: str) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    own = {
        "Bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
        | {"decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
        "Opt": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 32},
        "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    }.get(family, sizes)
    names = {"Opt": "OPT"}.get(family, family)
    config = getattr(transformers, f"{names}Config")(vocab_size=50, pad_token_id=1, **own)
    model = getattr(transformers, f"{names}Model")(config)
    found = adapted_maps(Backbone(family, "causal", model, None, ""), None, cross=False)  # type: ignore[arg-type]
    assert len(found) == 2 * 2, "behind attention and feed-forward part of each of two layers"


def test_two_prefixes_at_once_are_refused(folders: dict[str, Path]) -> None:
    backbone = load("llama", folders)
    make("deep-prompt", "llama", backbone).attach(backbone)
    with pytest.raises(RuntimeError, match="detach the other method first"):
        make("flat-prefix-tuning", "llama", backbone).attach(backbone)


# --- PEFT -------------------------------------------------------------------------------------------------------------

SHARED = [("prompt-tuning", kind) for kind in ("gpt2", "llama", "t5")]
SHARED += [("lora", kind) for kind in ("gpt2", "llama", "t5")]
SHARED += [(name, kind) for name in ("prefix-tuning", "flat-prefix-tuning") for kind in ("gpt2", "llama")]


@pytest.mark.peers
@pytest.mark.parametrize(("name", "kind"), SHARED)
def test_peft_reads_what_we_write_and_gives_the_same_logits(
    name: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="parity with PEFT needs the extra peft")
    backbone, theirs = load(kind, folders), load(kind, folders, fresh=True)
    method = make(name, kind, backbone)
    save_peft(method, backbone, tmp_path)
    model = peft.PeftModel.from_pretrained(theirs.model, tmp_path).eval()
    method.attach(backbone)
    ids = torch.tensor(SOURCES[:1])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if KINDS[kind].architecture == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[0, 71, 72]])
    with torch.no_grad():
        expected, found = model(**inputs).logits, backbone.model(**inputs).logits
    if name == "prompt-tuning" and KINDS[kind].architecture == "causal":
        expected = expected[:, P:]  # PEFT shows what follows the prompt's vectors too
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("name", "kind"), SHARED)
def test_a_checkpoint_in_pefts_format_is_read_back(
    name: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    backbone, other = load(kind, folders), load(kind, folders, fresh=True)
    method = make(name, kind, backbone)
    method.attach(backbone)
    save_peft(method, backbone, tmp_path)
    load_peft(tmp_path, other).attach(other)
    assert torch.equal(losses(other), losses(backbone))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "IA3 is not supported; PROMPT_TUNING, P_TUNING, PREFIX_TUNING and LORA are"),
        ({"use_dora": True}, "use_dora is True"),
        ({"r": 7}, r"shape \(3, 32\), expected \(7, 32\)"),
        ({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 3}, "expected prompt_embeddings alone"),
    ],
)
def test_an_unsupported_checkpoint_of_peft_is_refused(
    change: dict[str, Any], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    import json

    backbone = load("gpt2", folders)
    save_peft(make("lora", "gpt2", backbone), backbone, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ArtifactError, match=message):
        load_peft(tmp_path, backbone)


def test_a_method_that_peft_does_otherwise_is_not_written(folders: dict[str, Path], tmp_path: Path) -> None:
    backbone = load("t5", folders)
    for name in ("deep-prompt", "prefix-tuning"):
        with pytest.raises(ArtifactError, match="PEFT"):
            save_peft(make(name, "t5", backbone), backbone, tmp_path / name)
    with pytest.raises(ArtifactError, match=r"adapter_config\.json is missing"):
        load_peft(tmp_path, backbone)
