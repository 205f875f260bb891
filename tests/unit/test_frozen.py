"""Methods on a frozen backbone: what they start as, what they train, and that the backbone never moves."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from odqa.errors import ArtifactMismatch, DataError
from odqa.frozen.backbone import Backbone, fingerprint, frozen_guard, load_backbone
from odqa.frozen.method import Method, create_method, load_method
from tests.tiny_models import tiny_bert

SETTINGS = {
    "lora": {"rank": 4, "alpha": 8.0},
    "deep-prompt": {"length": 5},
    "prompt-tuning": {"length": 5},
    "prefix-tuning": {"length": 5, "inner": None},
    "adapter": {"rank": 3, "norms": True},
    "id-pt": {"length": 5, "encoder_length": 2, "inner": 8, "heads": 2},
    "neural-recursion": {"depth": 0, "vectors": 3, "prompt": 2},
    "fine-tuning": {"skip": ["pooler"]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture
def backbone(folder: Path) -> Backbone:
    return load_backbone(str(folder), "encoder", device="cpu", dtype="float32", attention="eager")


@pytest.fixture(params=sorted(SETTINGS))
def method(request: pytest.FixtureRequest, backbone: Backbone) -> Method:
    return create_method(request.param, backbone, **SETTINGS[request.param])


def states(backbone: Backbone, lengths: tuple[int, ...] = (9, 6), *, left: bool = False) -> torch.Tensor:
    """Last hidden states of rows of different lengths, pads cut off, one after the other: (sum of lengths, D)."""
    torch.manual_seed(0)
    width = max(lengths)
    ids = torch.full((len(lengths), width), 0)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        tokens = torch.arange(10, 10 + length)
        place = slice(width - length, width) if left else slice(0, length)
        ids[row, place], mask[row, place] = tokens, 1
    with torch.no_grad():
        out = backbone.model(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids)).last_hidden_state
    return out[mask.bool()]


def move(method: Method) -> None:
    """Any change of every trained value."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in method.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.05)


def test_detach_leaves_the_backbone_bit_identical(method: Method, backbone: Backbone) -> None:
    before, marked = states(backbone), fingerprint(backbone.model)
    method.attach(backbone)
    move(method)
    assert not torch.equal(states(backbone), before)
    method.detach()
    assert torch.equal(states(backbone), before)
    assert fingerprint(backbone.model) == marked == backbone.fingerprint


@pytest.mark.parametrize("kind", ["lora", "fine-tuning"])
def test_a_fresh_method_changes_nothing_where_the_paper_says_so(kind: str, backbone: Backbone) -> None:
    before = states(backbone)
    create_method(kind, backbone, **SETTINGS[kind]).attach(backbone)
    assert torch.equal(states(backbone), before)


def test_saved_and_loaded_gives_identical_states(
    method: Method, backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    method.attach(backbone)
    move(method)
    expected = states(backbone)
    method.save(tmp_path)
    other = load_backbone(str(folder), "encoder", device="cpu", dtype="float32", attention="eager")
    load_method(tmp_path, other).attach(other)
    assert torch.equal(states(other), expected)


def test_the_saved_tensors_are_exactly_the_trained_ones(method: Method, tmp_path: Path) -> None:
    method.save(tmp_path)
    saved = load_file(tmp_path / "method.safetensors")
    assert {name: tuple(t.shape) for name, t in saved.items()} == {
        n: tuple(t.shape) for n, t in method.tensors().items()
    }


def test_counts_are_the_formulas(backbone: Backbone) -> None:
    config = backbone.model.config
    layers, width, inner = config.num_hidden_layers, config.hidden_size, config.intermediate_size
    # LoRA: r * (d_in + d_out) a matrix; four square ones of the attention, two of the feed-forward part, a layer.
    lora = create_method("lora", backbone, **SETTINGS["lora"]).count(backbone)
    assert lora.trainable == 4 * layers * (4 * 2 * width + 2 * (width + inner))
    # Deep prompts: keys and values of 5 positions in every layer.
    assert create_method("deep-prompt", backbone, length=5).count(backbone).trainable == 2 * layers * 5 * width
    # Adapters: two bottlenecks a layer, 2 D r + D + r each; two normalisations with scale and shift.
    adapter = create_method("adapter", backbone, **SETTINGS["adapter"]).count(backbone)
    assert adapter.trainable == layers * (2 * (2 * width * 3 + width + 3) + 2 * 2 * width)
    # Fine-tuning: everything but the pooler's matrix and bias.
    everything = create_method("fine-tuning", backbone, skip=["pooler"]).count(backbone)
    assert everything.trainable == everything.frozen - width * width - width


def test_every_counted_value_gets_a_gradient_and_no_frozen_one(method: Method, backbone: Backbone) -> None:
    method.attach(backbone)
    move(method)  # LoRA's A has no gradient while B is zero
    ids = torch.arange(10, 20).reshape(1, -1)
    types = torch.tensor([[0] * 5 + [1] * 5])
    out = backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=types).last_hidden_state
    out.square().sum().backward()
    for name, tensor in method.tensors().items():
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0, name
    method.detach()
    assert all(p.grad is None and not p.requires_grad for p in backbone.model.parameters())


@pytest.mark.parametrize("left", [False, True])
def test_padding_and_batching_do_not_change_a_row(method: Method, backbone: Backbone, left: bool) -> None:
    method.attach(backbone)
    move(method)
    alone = torch.cat([states(backbone, (9,)), states(backbone, (6,))])
    if left:
        # BERT's positions are absolute and count the pads, so a left-padded row is another input: only the longest,
        # which has no pads, can agree.
        torch.testing.assert_close(states(backbone, (9, 6), left=True)[:9], alone[:9], atol=1e-5, rtol=0)
    else:
        torch.testing.assert_close(states(backbone, (9, 6)), alone, atol=1e-5, rtol=0)


def test_another_backbone_is_refused(method: Method, backbone: Backbone, tmp_path: Path) -> None:
    method.save(tmp_path / "method")
    stranger = load_backbone(str(tiny_bert(tmp_path / "other", seed=7)), "encoder", device="cpu", dtype="float32")
    with pytest.raises(ArtifactMismatch, match=f"backbone {backbone.fingerprint[:8]}.*{stranger.fingerprint[:8]}"):
        load_method(tmp_path / "method", stranger)
    with pytest.raises(ArtifactMismatch):
        method.attach(stranger)


def test_the_fingerprint_is_of_the_stored_weights_whatever_type_computes(folder: Path, backbone: Backbone) -> None:
    half = load_backbone(str(folder), "encoder", device="cpu", dtype="bfloat16")
    assert half.fingerprint == backbone.fingerprint


def test_one_flipped_bit_changes_the_fingerprint(backbone: Backbone) -> None:
    with torch.no_grad():
        next(backbone.model.parameters()).view(torch.int32)[0, 0] ^= 1
    assert fingerprint(backbone.model) != backbone.fingerprint


def test_the_guard_catches_a_weight_that_moves(backbone: Backbone) -> None:
    with pytest.raises(AssertionError, match="have changed"), frozen_guard(backbone), torch.no_grad():
        next(backbone.model.parameters()).add_(1.0)


def test_an_unknown_lora_target_is_named(backbone: Backbone) -> None:
    with pytest.raises(DataError, match="q_proj"):
        create_method("lora", backbone, rank=2, alpha=2.0, targets=["q_proj"])


def test_the_order_of_virtual_positions_is_immaterial(backbone: Backbone) -> None:
    method = create_method("deep-prompt", backbone, length=3)
    method.attach(backbone)
    first = states(backbone, (6,))
    with torch.no_grad():
        method.tensors()["prompt"].copy_(method.tensors()["prompt"].flip(3))
    torch.testing.assert_close(states(backbone, (6,)), first, atol=1e-5, rtol=0)  # sums in another order


@pytest.mark.peers
def test_lora_equals_pefts(folder: Path, backbone: Backbone) -> None:
    peft = pytest.importorskip("peft", reason="parity with PEFT needs the extra peft")
    from transformers import AutoModel

    method = create_method("lora", backbone, rank=4, alpha=8.0, targets=["query", "value"])
    method.attach(backbone)
    move(method)
    theirs = peft.get_peft_model(
        AutoModel.from_pretrained(folder, attn_implementation="eager"),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.0),
    ).eval()
    ours = method.tensors()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "lora_" in name:
                module = name.split("base_model.model.")[1].split(".lora_")[0].replace(".", "/")
                tensor.copy_(ours[f"{'A' if 'lora_A' in name else 'B'}.{module}"])
    ids = torch.arange(10, 19).reshape(1, -1)
    with torch.no_grad():
        expected = theirs(
            input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids)
        ).last_hidden_state
    torch.testing.assert_close(states(backbone, (9,)), expected[0], atol=1e-5, rtol=0)
