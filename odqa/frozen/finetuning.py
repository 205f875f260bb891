"""Full fine-tuning: the baseline that frozen methods are measured against, behind the same interface.

The method owns a copy of every weight that the forward pass uses, and lends it to the model while it is attached; the
frozen originals wait aside and come back, to the bit, on `detach`.
"""

from typing import ClassVar

from torch import nn

from odqa.frozen.backbone import Backbone
from odqa.frozen.method import Method


class FineTuning(Method):
    """A trainable copy of all weights but those whose name starts with one of `skip` (a pooler that nothing reads).

    Weights that the model uses in several places (tied word vectors) are one, and stay tied.
    """

    kind: ClassVar[str] = "fine-tuning"

    def __init__(self, backbone: Backbone, *, skip: list[str] | None = None) -> None:
        super().__init__(backbone, skip=skip)
        self.weights = nn.ParameterDict(
            {
                name.replace(".", "/"): nn.Parameter(tensor.detach().clone())
                for name, tensor in backbone.model.named_parameters()
                if not name.startswith(tuple(skip or []))
            }
        )
        self._originals: dict[str, nn.Parameter] = {}

    def _install(self, backbone: Backbone) -> None:
        names = _all_names(backbone.model)
        for key, weight in self.weights.items():
            original = backbone.model.get_parameter(key.replace("/", "."))
            for name in names[original]:
                self._originals[name] = original
                _place(backbone.model, name, weight)

    def _remove(self, backbone: Backbone) -> None:
        for name, original in self._originals.items():
            _place(backbone.model, name, original)
        self._originals.clear()


def _all_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Every weight with all names that it has in the model."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        names.setdefault(weight, []).append(name)
    return names


def _place(model: nn.Module, name: str, weight: nn.Parameter) -> None:
    path, _, last = name.rpartition(".")
    setattr(model.get_submodule(path), last, weight)
