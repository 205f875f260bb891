"""LoRA: low-rank updates beside frozen linear maps.

    W x  ->  W x + (alpha / rank) B A x        A: (rank, d_in) random, B: (d_out, rank) zero at the start

Trains rank * (d_in + d_out) values a matrix. Source: Hu et al. 2021 (arXiv 2106.09685), section 4.1. The update is
added by forward hooks, so the frozen weight is never written to; parity with PEFT's LoRA is tested. Where speed counts
and nothing else will use the model, `merge` writes it into a private copy.
"""

import re
from typing import Any, ClassVar

import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.backbone import Backbone, fingerprint
from odqa.frozen.method import Method, as_key


class Lora(Method):
    """LoRA on every linear map of the backbone's layers whose name ends in one of `targets` (None: on all of them)."""

    kind: ClassVar[str] = "lora"

    def __init__(
        self, backbone: Backbone, *, rank: int, alpha: float, targets: list[str] | None = None, seed: int = 0
    ) -> None:
        super().__init__(backbone, rank=rank, alpha=alpha, targets=targets, seed=seed)
        self.scale = alpha / rank
        generator = torch.Generator().manual_seed(seed)
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for name, linear in target_linears(backbone, targets).items():
            # Kaiming-uniform with a = sqrt(5), as the authors' code initialises A: uniform in +-1/sqrt(d_in).
            d_out, d_in = map_shape(linear)
            start = torch.empty(rank, d_in).uniform_(-(d_in**-0.5), d_in**-0.5, generator=generator)
            self.A[as_key(name)] = nn.Parameter(start)
            self.B[as_key(name)] = nn.Parameter(torch.zeros(d_out, rank))
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _install(self, backbone: Backbone) -> None:
        for name, linear in target_linears(backbone, self.settings["targets"]).items():
            a, b = self.A[as_key(name)], self.B[as_key(name)]

            def add_update(
                _module: nn.Module,
                args: tuple[torch.Tensor, ...],
                output: torch.Tensor,
                a: nn.Parameter = a,
                b: nn.Parameter = b,
            ) -> torch.Tensor:
                x = args[0]  # (..., d_in)
                return output + (x @ a.to(x.dtype).T) @ (b * self.scale).to(x.dtype).T

            self._handles.append(linear.register_forward_hook(add_update))

    def _remove(self, backbone: Backbone) -> None:
        while self._handles:
            self._handles.pop().remove()

    @torch.no_grad()
    def merge(self, backbone: Backbone) -> None:
        """Write the update into the backbone's own weights: W <- W + (alpha / rank) B A.

        The sum is taken in float32 and then cast to the type of W; in float32 the backbone computes the same as with
        the method attached, up to rounding, and without the cost of two more products a map (section 4.1 of the paper:
        no latency). This cannot be undone, so give it a backbone that nobody else uses, best in float32 and cast
        afterwards. What comes out is another model, and its fingerprint says so: no method made for the frozen one
        attaches to it. Raises ArtifactMismatch, like `attach`, for a backbone that the method was not made for.
        """
        self._check_backbone(backbone)
        for name, linear in target_linears(backbone, self.settings["targets"]).items():
            a, b = (tensor[as_key(name)].to(linear.weight.device, torch.float32) for tensor in (self.A, self.B))
            update = self.scale * (b @ a)
            linear.weight.copy_(linear.weight.float() + (update if isinstance(linear, nn.Linear) else update.T))
        backbone.fingerprint = fingerprint(backbone.model)


def target_linears(backbone: Backbone, targets: list[str] | None, *, kind: str = "lora") -> dict[str, Any]:
    """The linear maps inside the backbone's stacks of layers, by module name, in module order.

    `nn.Linear`, and the `Conv1D` of GPT-2, which is a linear map with a transposed weight. Raises DataError if a target
    matches none of them, in the name of the method's `kind`.
    """
    from transformers.pytorch_utils import Conv1D

    found = {
        name: module
        for name, module in backbone.model.named_modules()
        # A layer is an item of a list, so it has a number: no pooler, no output head.
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"(^|\.)\d+\.", name)
    }
    for target in targets or []:
        if not any(name.endswith(target) for name in found):
            raise DataError(
                f"{kind}: no linear map of {backbone.name} ends in {target!r}; there are {sorted(found)[:6]} ..."
            )
    if targets is None:
        return found
    return {name: module for name, module in found.items() if name.endswith(tuple(targets))}


def map_shape(linear: Any) -> tuple[int, int]:
    """d_out and d_in of a linear map."""
    rows, columns = linear.weight.shape
    return (rows, columns) if isinstance(linear, nn.Linear) else (columns, rows)
