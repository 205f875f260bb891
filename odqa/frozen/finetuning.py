"""Full fine-tuning: the baseline that frozen methods are measured against, behind the same interface.

The method owns a copy of every weight that the forward pass uses, and lends it to the model while it is attached; the
frozen originals wait aside and come back, to the bit, on `detach`.
"""

from typing import ClassVar

from torch import nn

from odqa.frozen.backbone import Backbone
from odqa.frozen.method import Method


class FineTuning(Method):
    """A trainable copy of all weights but those whose name starts with one of `skip` (a pooler that nothing reads)."""

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
        for key, weight in self.weights.items():
            module, name = _owner(backbone.model, key)
            self._originals[key] = getattr(module, name)
            setattr(module, name, weight)

    def _remove(self, backbone: Backbone) -> None:
        for key, original in self._originals.items():
            module, name = _owner(backbone.model, key)
            setattr(module, name, original)
        self._originals.clear()


def _owner(model: nn.Module, key: str) -> tuple[nn.Module, str]:
    path, _, name = key.rpartition("/")
    return model.get_submodule(path.replace("/", ".")), name
