"""Checkpoints that PEFT itself wrote, read here, trained on here, and given back; what cannot be read is one error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from odqa.errors import ArtifactError, OdqaError
from odqa.frozen.backbone import Architecture, Backbone, load_backbone
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.lora import Lora
from odqa.frozen.method import create_method, load_method
from odqa.frozen.peft_format import load_peft, save_peft
from tests.tiny_models import tiny_gpt2, tiny_llama, tiny_t5

MODELS: dict[str, tuple[Architecture, Callable[..., Path], dict[str, Any]]] = {
    "gpt2": ("causal", tiny_gpt2, {}),
    "llama": ("causal", tiny_llama, {}),
    "t5": ("seq2seq", tiny_t5, {"factor": 1.0}),
}
SOURCE, TARGET = [41, 42, 43, 44, 45], [71, 72, 73]
# The configuration's class in PEFT, its settings, the models that it is tried on, and what it is here.
THEIRS: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}, ("gpt2", "llama", "t5"), "prompt-tuning"),
    "p-tuning": (
        "PromptEncoderConfig",
        {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
        ("gpt2",),
        "prompt-tuning",
    ),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}, ("gpt2", "llama"), "prefix-tuning"),
    "prefix-network": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
        ("gpt2",),
        "prefix-tuning",
    ),
    "lora": ("LoraConfig", {"r": 3, "lora_alpha": 6, "init_lora_weights": False}, ("gpt2", "llama", "t5"), "lora"),
    "rslora": (
        "LoraConfig",
        {
            "r": 4,
            "lora_alpha": 6,
            "init_lora_weights": False,
            "use_rslora": True,
            "target_modules": ["q_proj", "up_proj"],
        },
        ("llama",),
        "lora",
    ),
}
CASES = [(name, model) for name, (_, _, models, _) in THEIRS.items() for model in models]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


def load(name: str, root: Path) -> Backbone:
    architecture, make, settings = MODELS[name]
    if not (root / name).exists():
        make(root / name, **settings)
    return load_backbone(str(root / name), architecture, device="cpu", dtype="float32")


def logits(model: Any, kind: Architecture) -> torch.Tensor:
    """Of the target's positions, whoever the model belongs to."""
    ids = torch.tensor([SOURCE if kind == "seq2seq" else [*SOURCE, *TARGET]])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "seq2seq":
        inputs["decoder_input_ids"] = torch.tensor([[0, *TARGET[:-1]]])
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits[:, -len(TARGET) :]
    return found


@pytest.mark.peers
@pytest.mark.parametrize(("name", "model"), CASES)
def test_what_peft_wrote_gives_the_same_logits_here_and_there_again(
    name: str, model: str, root: Path, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft", reason="parity with PEFT needs the extra peft")
    settings_class, settings, _, kind = THEIRS[name]
    backbone, theirs, again = load(model, root), load(model, root), load(model, root)
    task = "SEQ_2_SEQ_LM" if backbone.architecture == "seq2seq" else "CAUSAL_LM"
    torch.manual_seed(3)
    made = peft.get_peft_model(theirs.model, getattr(peft, settings_class)(task_type=task, **settings)).eval()
    made.save_pretrained(tmp_path / "theirs")
    expected = logits(made, backbone.architecture)
    method = load_peft(tmp_path / "theirs", backbone)
    assert method.kind == kind
    frozen = logits(backbone.model, backbone.architecture)
    assert not torch.allclose(frozen, expected, atol=1e-2)
    method.attach(backbone)
    # Linear maps in another order of sums; logits of the tiny models reach 100.
    torch.testing.assert_close(logits(backbone.model, backbone.architecture), expected, atol=1e-4, rtol=1e-5)
    save_peft(method, backbone, tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(again.model, tmp_path / "ours").eval()
    torch.testing.assert_close(logits(back, backbone.architecture), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["prompt-tuning", "lora"])
def test_a_method_of_peft_is_trained_on_and_saved_in_both_formats(kind: str, root: Path, tmp_path: Path) -> None:
    """PEFT itself raises for a prompt that is loaded to be trained."""
    backbone = load("gpt2", root)
    settings = {"length": 4} if kind == "prompt-tuning" else {"rank": 2, "alpha": 4.0}
    start = create_method(kind, backbone, **settings)
    save_peft(start, backbone, tmp_path / "start")
    method = load_peft(tmp_path / "start", backbone)
    method.attach(backbone)
    with torch.no_grad():
        before = float(backbone.loss([SOURCE], [TARGET]))
    fit(
        {"method": method},
        lambda index: index,
        lambda batch: backbone.loss([SOURCE], [TARGET]),
        FitSettings(steps=8, learning_rates={"method": 0.05}, autocast=False),
        checkpoint=tmp_path / "checkpoint.safetensors",
    )
    with torch.no_grad():
        after = float(backbone.loss([SOURCE], [TARGET]))
    assert after < before - 0.5
    save_peft(method, backbone, tmp_path / "theirs")
    method.save(tmp_path / "ours")
    method.detach()
    for loaded in (load_peft(tmp_path / "theirs", backbone), load_method(tmp_path / "ours", backbone)):
        loaded.attach(backbone)
        with torch.no_grad():
            assert float(backbone.loss([SOURCE], [TARGET])) == pytest.approx(after, abs=1e-5)
        loaded.detach()


def test_rslora_is_lora_with_a_larger_alpha(root: Path, tmp_path: Path) -> None:
    backbone = load("gpt2", root)
    save_peft(create_method("lora", backbone, rank=4, alpha=6.0), backbone, tmp_path)
    change(tmp_path, use_rslora=True)
    method = load_peft(tmp_path, backbone)
    assert isinstance(method, Lora) and method.scale == 6.0 / 4**0.5


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "IA3 is not supported; PROMPT_TUNING, P_TUNING, PREFIX_TUNING and LORA are"),
        ({"peft_type": "LOHA"}, "LOHA is not supported"),
        ({"peft_type": ...}, "None is not supported"),
        ({"r": ...}, "r is missing"),
        (
            {"init_lora_weights": "pissa"},
            "init_lora_weights is 'pissa'; LoRA is read with init_lora_weights: True only",
        ),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"rank_pattern": {"c_attn": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, "num_layers is missing"),
    ],
)
def test_what_computes_something_else_is_one_error(
    settings: dict[str, Any], message: str, root: Path, tmp_path: Path
) -> None:
    backbone = load("gpt2", root)
    save_peft(create_method("lora", backbone, rank=3, alpha=6.0), backbone, tmp_path)
    change(tmp_path, **settings)
    with pytest.raises(OdqaError, match=message) as caught:
        load_peft(tmp_path, backbone)
    assert "\n" not in str(caught.value)


def test_a_damaged_checkpoint_is_one_error(root: Path, tmp_path: Path) -> None:
    backbone = load("gpt2", root)
    save_peft(create_method("lora", backbone, rank=3, alpha=6.0), backbone, tmp_path)
    tensors = tmp_path / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="damaged checkpoint of PEFT"):
        load_peft(tmp_path, backbone)
