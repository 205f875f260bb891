"""What makes a BERT fast must not change what it computes: merged LoRA, and the last layer for one token."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from odqa.errors import ArtifactMismatch
from odqa.frozen.backbone import Backbone, load_backbone
from odqa.frozen.fast_bert import speed_up
from odqa.frozen.lora import Lora
from tests.tiny_models import tiny_bert, tiny_cross_encoder, tiny_gpt2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


def load(folder: Path, attention: str = "sdpa") -> Backbone:
    return load_backbone(str(folder), "encoder", device="cpu", dtype="float32", attention=attention)


def moved_lora(backbone: Backbone, targets: list[str] | None = None) -> Lora:
    """A LoRA whose B is not zero any more."""
    method = Lora(backbone, rank=4, alpha=8.0, targets=targets)
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in method.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return method


def states(backbone: Backbone, lengths: tuple[int, ...] = (9, 6)) -> torch.Tensor:
    """(B, T or 1, D) last hidden states of rows of these lengths, padded to the longest."""
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, :length] = torch.arange(10 + row, 10 + row + length)
        mask[row, :length] = 1
    with torch.inference_mode():
        out: torch.Tensor = backbone.model(input_ids=ids, attention_mask=mask).last_hidden_state
    return out


@pytest.mark.parametrize("targets", [None, ["query", "value"]])
def test_merged_lora_computes_what_attached_lora_does(folder: Path, targets: list[str] | None) -> None:
    attached, merged = load(folder), load(folder)
    plain = states(merged)
    moved_lora(attached, targets).attach(attached)
    moved_lora(merged, targets).merge(merged)
    # (W + s B A) x and W x + s B (A x) differ by float32 rounding of sums of 32 terms, through two layers.
    torch.testing.assert_close(states(merged), states(attached), atol=1e-4, rtol=0)
    assert (states(merged) - plain).abs().max() > 0.1


def test_only_the_targets_are_written_to(folder: Path) -> None:
    before, backbone = load(folder).model.state_dict(), load(folder)
    moved_lora(backbone, ["query"]).merge(backbone)
    changed = {name for name, tensor in backbone.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"encoder.layer.{layer}.attention.self.query.weight" for layer in range(2)}


def test_a_merged_backbone_is_another_model_to_every_method(folder: Path) -> None:
    backbone = load(folder)
    frozen = backbone.fingerprint
    method, second = moved_lora(backbone), moved_lora(backbone)
    method.merge(backbone)
    assert backbone.fingerprint != frozen
    for again in (method.merge, second.merge, second.attach):  # twice the update is an easy mistake
        with pytest.raises(ArtifactMismatch, match=f"trained on backbone {frozen[:8]}"):
            again(backbone)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [(9, 6), (8, 8), (1,)], ids=["padded", "full", "one token"])
def test_the_first_token_is_that_of_the_whole_layer(folder: Path, attention: str, lengths: tuple[int, ...]) -> None:
    backbone = load(folder, attention)
    expected = states(backbone, lengths)
    assert speed_up(backbone.model, torch.float32)
    found = states(backbone, lengths)
    assert found.shape == (len(lengths), 1, expected.shape[-1])
    torch.testing.assert_close(found, expected[:, :1], atol=1e-5, rtol=0)  # the fused attention sums in another order


def test_bfloat16_maps_lose_less_than_a_model_in_bfloat16(folder: Path) -> None:
    exact, whole, maps = states(load(folder)), load(folder), load(folder)
    assert speed_up(maps.model, torch.bfloat16)
    whole.model.to(torch.bfloat16)
    types = {tensor.dtype: name for name, tensor in maps.model.encoder.named_parameters() if "LayerNorm" not in name}
    assert set(types) == {torch.bfloat16}
    found = states(maps)
    assert found.dtype == torch.float32
    error, error_of_whole = ((s[:, 0] - exact[:, 0]).norm().item() for s in (found, states(whole).float()))
    assert 0 < error < error_of_whole
    # 8 significant bits (2 ** -9 at most, relative) at the entrance of 12 maps in a row, with weights drawn wide.
    assert error < 0.05 * exact[:, 0].norm().item()


def test_a_classifier_gives_the_same_logits(tmp_path: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(tiny_cross_encoder(tmp_path / "cross", 2)).eval()
    inputs = {
        "input_ids": torch.arange(10, 30).reshape(2, 10),
        "attention_mask": torch.tensor([[1] * 10, [1, 1] + [0] * 8]),
    }
    with torch.inference_mode():
        expected = model(**inputs).logits
        assert speed_up(model, torch.float32) and speed_up(model, torch.float32)  # once more changes nothing
        torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-5, rtol=0)


def test_a_model_that_is_no_bert_stays_as_it_is(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_gpt2(tmp_path / "gpt2")), "causal", device="cpu", dtype="float32")
    before = [type(module) for module in backbone.model.modules()]
    assert not speed_up(backbone.model, torch.bfloat16)
    assert [type(module) for module in backbone.model.modules()] == before
