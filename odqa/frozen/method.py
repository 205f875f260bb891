"""What every way of specialising a frozen backbone has in common.

A `Method` owns every trainable tensor. `attach` installs it, `detach` leaves the backbone bit-identical. A saved method
is `method.safetensors` plus `method.json`, and is refused by any backbone but the one it was trained on.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from odqa.errors import ArtifactError, ArtifactMismatch
from odqa.frozen.backbone import Backbone

TENSORS = "method.safetensors"
DESCRIPTION = "method.json"


@dataclass(frozen=True, slots=True)
class Count:
    """Sizes of a method: numbers of values trained and frozen, and the bytes the trained ones take when saved."""

    trainable: int
    frozen: int
    stored_bytes: int


class Method(nn.Module):
    """A trainable module that specialises a frozen backbone. Its parameters are exactly what is trained.

    While it is attached, the backbone's model computes with it, whoever calls the model or its `generate`; whatever it
    adds to the text inside, logits and states keep their shapes.
    """

    kind: ClassVar[str]

    def __init__(self, backbone: Backbone, **settings: Any) -> None:
        super().__init__()
        self.settings = settings
        self.backbone_fingerprint = backbone.fingerprint
        self._backbone: list[Backbone] = []  # in a list, so that torch does not take its weights for ours

    @abstractmethod
    def _install(self, backbone: Backbone) -> None:
        """Put the method into the backbone's forward pass."""

    @abstractmethod
    def _remove(self, backbone: Backbone) -> None:
        """Undo `_install` exactly."""

    @property
    def is_attached(self) -> bool:
        return bool(self._backbone)

    def attach(self, backbone: Backbone) -> None:
        """Make the backbone compute with this method. Raises ArtifactMismatch for a backbone it was not made for."""
        if self._backbone:
            raise RuntimeError(f"{self.kind} is attached already; detach it first")
        self._check_backbone(backbone)
        self.to(backbone.device)
        self._install(backbone)
        self._backbone.append(backbone)

    def _check_backbone(self, backbone: Backbone) -> None:
        if backbone.fingerprint != self.backbone_fingerprint:
            raise ArtifactMismatch(
                f"{self.kind} was trained on backbone {self.backbone_fingerprint[:8]}; {backbone.name} is "
                f"{backbone.fingerprint[:8]}. Use that backbone or train the method again."
            )

    def detach(self) -> None:
        """Give the backbone back as it was before `attach`, to the bit."""
        self._remove(self._backbone.pop())

    def tensors(self) -> dict[str, nn.Parameter]:
        """Everything that is trained, by its saved name."""
        return dict(self.named_parameters())

    def saved_tensors(self) -> dict[str, torch.Tensor]:
        """What is saved, by name: the trained tensors, or what they were folded into."""
        return dict(self.tensors())

    def saved_settings(self) -> dict[str, Any]:
        """The settings that make the method that `saved_tensors` belong to."""
        return self.settings

    @property
    def longest_text(self) -> int | None:
        """The longest text in tokens that the method itself can read; None: any."""
        return None

    @property
    def reads_source(self) -> bool:
        """Whether what the method does depends on the whole source, so that it must come in one call."""
        return False

    def virtual_tokens(self, backbone: Backbone) -> int:
        """Tokens of the backbone's window that the method takes from the text."""
        return 0

    def count(self, backbone: Backbone) -> Count:
        """How much is trained, how much is frozen, how much is stored in float32."""
        trained = sum(tensor.numel() for tensor in self.parameters())
        stored = sum(tensor.numel() * 4 for tensor in self.saved_tensors().values())
        return Count(trained, backbone.count_parameters(), stored)

    def save(self, folder: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Write tensors and description into `folder`. `dtype` is the type on disk (float16 halves the size)."""
        folder.mkdir(parents=True, exist_ok=True)
        saved = self.saved_tensors().items()
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in saved}
        save_file(tensors, folder / TENSORS)
        description = {"kind": self.kind, "settings": self.saved_settings(), "backbone": self.backbone_fingerprint}
        (folder / DESCRIPTION).write_text(json.dumps(description, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    save_pretrained = save  # the name that it has on the hub's side

    @classmethod
    def from_pretrained(cls, name: str, backbone: Backbone, **options: Any) -> Self:
        """A method of this kind (of any, if called on `Method`) from a folder or the hub; see `odqa.frozen.hub`."""
        from odqa.frozen.hub import load_pretrained

        method = load_pretrained(name, backbone, **options)
        if not isinstance(method, cls):
            raise ArtifactError(f"{name}: holds {method.kind}, not {cls.kind}.")
        return method

    def push_to_hub(self, repo_id: str, backbone: Backbone, **options: Any) -> str:
        """Upload the method and a card; returns the address. See `odqa.frozen.hub`."""
        from odqa.frozen.hub import push_to_hub

        return push_to_hub(self, repo_id, backbone, **options)


def create_method(kind: str, backbone: Backbone, **settings: Any) -> Method:
    """A fresh method of one of the known kinds. Raises ArtifactError naming the kinds for an unknown one."""
    from odqa.frozen.adapter import Adapter
    from odqa.frozen.calm import Calm
    from odqa.frozen.finetuning import FineTuning
    from odqa.frozen.idpt import InputPrompt
    from odqa.frozen.lora import Lora
    from odqa.frozen.neural import NeuralRecursion
    from odqa.frozen.prefix import PrefixTuning
    from odqa.frozen.prompt import DeepPrompt
    from odqa.frozen.prompt_tuning import PromptTuning

    known = (PromptTuning, DeepPrompt, PrefixTuning, Lora, Adapter, InputPrompt, NeuralRecursion, Calm, FineTuning)
    kinds: dict[str, type[Method]] = {cls.kind: cls for cls in known}
    if kind not in kinds:
        raise ArtifactError(f"method kind {kind!r} is not known; known are {', '.join(sorted(kinds))}.")
    return kinds[kind](backbone, **settings)


def load_method(folder: Path, backbone: Backbone) -> Method:
    """Read a saved method for this backbone; compute happens in float32 whatever type it was stored in.

    Raises ArtifactMismatch if it was trained on another backbone, ArtifactError if files are missing or their tensors
    are not those of the method.
    """
    description, tensors = read_method(folder, backbone)
    method = create_method(description["kind"], backbone, **description["settings"])
    load_tensors(method, tensors, str(folder / TENSORS))
    return method


def read_method(folder: Path, backbone: Backbone) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Description (kind, settings, backbone) and tensors of a saved method for this backbone; see `load_method`."""
    description_file, tensor_file = folder / DESCRIPTION, folder / TENSORS
    for file in (description_file, tensor_file):
        if not file.is_file():
            raise ArtifactError(f"{folder}: not a saved method ({file.name} is missing).")
    try:
        description: dict[str, Any] = json.loads(description_file.read_text(encoding="utf-8"))
        tensors = load_file(tensor_file)
    except (ValueError, SafetensorError) as error:
        raise ArtifactError(f"{folder}: a damaged method ({str(error).splitlines()[0]}).") from error
    if missing := {"kind", "settings", "backbone"}.difference(description):
        raise ArtifactError(f"{description_file}: {sorted(missing)[0]} is missing.")
    if description["backbone"] != backbone.fingerprint:
        raise ArtifactMismatch(
            f"{folder}: this {description['kind']} was trained on backbone {description['backbone'][:8]}; "
            f"{backbone.name} is {backbone.fingerprint[:8]}. Use that backbone or train the method again."
        )
    return description, tensors


def load_tensors(module: nn.Module, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Copy saved tensors into a module's parameters; the sets of names and the shapes must be equal."""
    own = dict(module.named_parameters())
    check_shapes({name: tuple(tensor.shape) for name, tensor in own.items()}, tensors, where)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def check_shapes(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises ArtifactError unless the tensors have exactly these names and shapes."""
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise ArtifactError(
            f"{where}: {wrong[0]} has shape {found.get(wrong[0])}, expected {expected.get(wrong[0])} "
            f"({len(wrong)} tensors differ in all)."
        )


def as_key(name: str) -> str:
    """A module's name as a parameter's: torch forbids dots in those."""
    return name.replace(".", "/")


def as_name(key: str) -> str:
    """Undo `as_key`."""
    return key.replace("/", ".")
