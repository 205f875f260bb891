"""A frozen language model: weights that require no gradient and never change, and the proof of it.

Any local folder or hub name that `transformers` loads. Knows tensors and token ids, never a passage.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from odqa.errors import DataError
from odqa.models import embedded_folder, quiet_loading
from odqa.runtime import choose_device, choose_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Architecture = Literal["encoder", "causal", "seq2seq"]

# Config entries that say how a model was loaded, not what it computes.
_NOT_IDENTITY = {"transformers_version", "dtype", "torch_dtype", "name_or_path", "use_cache"}


@dataclass(slots=True)
class Backbone:
    """A frozen model with its tokenizer.

    `fingerprint` is that of the weights as stored on disk, before any cast to a compute type: the name by which method
    artifacts know their backbone. `name` is what the recipe said.
    """

    name: str
    architecture: Architecture
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def width(self) -> int:
        """Hidden width D."""
        return int(self.model.config.hidden_size)

    @property
    def layers(self) -> int:
        """Number of transformer layers L."""
        return int(self.model.config.num_hidden_layers)

    def count_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.model.parameters())


def load_backbone(
    name: str,
    architecture: Architecture,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "sdpa",
    **load_options: Any,
) -> Backbone:
    """Load and freeze a model: no gradient, evaluation mode (dropout off), cast to `dtype` after fingerprinting.

    `attention` is `transformers`' attn_implementation. `load_options` go to `from_pretrained` unchanged. Raises
    DataError for a model that is not there or does not load.
    """
    import transformers

    path = embedded_folder(name) or name
    auto = {
        "encoder": transformers.AutoModel,
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[architecture]
    try:
        with quiet_loading():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model = auto.from_pretrained(path, attn_implementation=attention, **load_options)
    except (OSError, ValueError) as error:
        raise DataError(f"model {name!r} does not load as {architecture}: {str(error).splitlines()[0]}") from error
    model.requires_grad_(False).eval()
    stored = fingerprint(model)
    if "device_map" not in load_options and "quantization_config" not in load_options:
        where = choose_device(device)
        model.to(device=where, dtype=choose_dtype(dtype, where))
    return Backbone(name, architecture, model, tokenizer, stored)


def fingerprint(model: "PreTrainedModel") -> str:
    """Hex sha256 over the config and over every parameter and buffer (name, type, shape, bytes), in order of names."""
    digest = hashlib.sha256()
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in _NOT_IDENTITY and not key.startswith("_")
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def frozen_guard(backbone: Backbone) -> Iterator[None]:
    """Assert that the block leaves the backbone as it was: the same bits, no gradient buffer, nothing trainable.

    Raises AssertionError: a backbone that moved is a defect of odqa, not of its input.
    """
    before = fingerprint(backbone.model)
    yield
    for name, tensor in backbone.model.named_parameters():
        if tensor.requires_grad or tensor.grad is not None:
            raise AssertionError(f"frozen weight {name} of {backbone.name} has been given a gradient")
    if fingerprint(backbone.model) != before:
        raise AssertionError(f"the frozen weights of {backbone.name} have changed")
