"""Houlsby adapters: two small bottlenecks a layer, behind the attention and behind the feed-forward part.

    h  ->  h + W_up gelu(W_down h + b_down) + b_up        W_down: (rank, D), W_up: (D, rank)

h is what the last linear map of attention or feed-forward part gives, before it is added to the layer's input. Trains
2 * (2 * D * rank + D + rank) values a layer, and with `norms` the scale (and shift) of every normalisation in it, which
the paper trains too. Source: Houlsby et al. 2019 (arXiv 1902.00751), section 2.1 and figure 2; gelu is that of the
authors' code (google-research/adapter-bert, modeling.py).

An encoder-decoder's decoder has no adapter behind its attention to the source (the paper has encoders only) unless
`cross` asks for one: then it has three a layer.
"""

import copy
import re
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.backbone import Backbone
from odqa.frozen.lora import map_shape, target_linears
from odqa.frozen.method import Method, as_key, as_name

# What the last linear map of a part is called behind its layer's number, in the models of transformers.
_ATTENTION = (
    *("attention.output.dense", "attn.c_proj", "attn.out_proj", "self_attn.o_proj", "self_attn.out_proj"),
    *("attention.dense", "attention.out_lin", "self_attention.dense", "SelfAttention.o"),
)
_FEED_FORWARD = (
    *("output.dense", "mlp.c_proj", "mlp.down_proj", "mlp.fc2", "mlp.fc_out", "mlp.dense_4h_to_h"),
    *("fc2", "ffn.lin2", "DenseReluDense.wo"),
)
_CROSS = ("crossattention.output.dense", "crossattention.c_proj", "encoder_attn.out_proj", "EncDecAttention.o")
_STD = 0.01  # Houlsby et al. 2019, section 2.1; their code has 0.001


class Adapter(Method):
    """Bottlenecks of inner width `rank` behind every attention and feed-forward part.

    `targets` are endings of the names of the linear maps that they stand behind; None: those that the model's layers
    are known to end their parts with. Weights start from a normal distribution of standard deviation 0.01, cut at two
    of them, biases at zero: close to doing nothing. Raises DataError for a model whose layers are not known, or a
    normalisation that is no scale (and shift).
    """

    kind: ClassVar[str] = "adapter"

    def __init__(
        self,
        backbone: Backbone,
        *,
        rank: int,
        norms: bool = False,
        cross: bool = False,
        targets: list[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, rank=rank, norms=norms, cross=cross, targets=targets, seed=seed)
        if rank < 1:
            raise DataError(f"adapter: rank is {rank}; it must be at least 1.")
        generator = torch.Generator().manual_seed(seed)

        def near_zero(*shape: int) -> nn.Parameter:
            start = torch.empty(shape)
            return nn.Parameter(nn.init.trunc_normal_(start, std=_STD, a=-2 * _STD, b=2 * _STD, generator=generator))

        self.down, self.down_bias = nn.ParameterDict(), nn.ParameterDict()
        self.up, self.up_bias = nn.ParameterDict(), nn.ParameterDict()
        for name, linear in adapted_maps(backbone, targets, cross=cross).items():
            key, width = as_key(name), map_shape(linear)[0]
            self.down[key], self.down_bias[key] = near_zero(rank, width), nn.Parameter(torch.zeros(rank))
            self.up[key], self.up_bias[key] = near_zero(width, rank), nn.Parameter(torch.zeros(width))
        self.norms = nn.ModuleDict(
            {as_key(name): norm for name, norm in layer_norms(backbone).items()} if norms else {}
        )
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _install(self, backbone: Backbone) -> None:
        for key in self.down:
            self._handles.append(
                backbone.model.get_submodule(as_name(key)).register_forward_hook(self._bottleneck(key))
            )
        for key, norm in self.norms.items():
            self._handles.append(backbone.model.get_submodule(as_name(key)).register_forward_hook(_instead(norm)))

    def _bottleneck(self, key: str) -> Callable[..., torch.Tensor]:
        parts = self.down[key], self.down_bias[key], self.up[key], self.up_bias[key]

        def add_bottleneck(_module: nn.Module, _args: Any, h: torch.Tensor) -> torch.Tensor:
            down, down_bias, up, up_bias = (part.to(h.dtype) for part in parts)
            inner = nn.functional.gelu(nn.functional.linear(h, down, down_bias))  # (..., rank)
            return h + nn.functional.linear(inner, up, up_bias)

        return add_bottleneck

    def _remove(self, backbone: Backbone) -> None:
        while self._handles:
            self._handles.pop().remove()


def adapted_maps(backbone: Backbone, targets: list[str] | None, *, cross: bool) -> dict[str, Any]:
    """The linear maps that adapters stand behind, by module name.

    Raises DataError for a model whose layers do not end their parts with maps of known names, or for a target that
    matches none.
    """
    if targets is not None:
        return target_linears(backbone, targets, kind=Adapter.kind)
    maps = target_linears(backbone, None)
    parts = [[name for name in maps if _behind_number(name) in known] for known in (_ATTENTION, _FEED_FORWARD, _CROSS)]
    attention, feed_forward, crossing = parts
    if not attention or len(attention) != len(feed_forward):
        raise DataError(
            f"adapter: {backbone.name} has layers of an unknown kind ({len(attention)} attentions and "
            f"{len(feed_forward)} feed-forward parts found). Name the last linear maps of both under targets; there "
            f"are {', '.join(sorted({_behind_number(name) for name in maps})[:12])}."
        )
    chosen = {*attention, *feed_forward, *(crossing if cross else [])}
    return {name: linear for name, linear in maps.items() if name in chosen}


def _behind_number(name: str) -> str:
    """ "mlp.c_proj" of "transformer.h.11.mlp.c_proj"."""
    return re.sub(r"^.*\.\d+\.", "", name)


def layer_norms(backbone: Backbone) -> dict[str, nn.Module]:
    """Trainable float32 copies of the normalisations inside the backbone's stacks of layers, by module name.

    Those are modules with a scale of the backbone's width, perhaps a shift, and nothing else. A copy has no hooks.
    Raises DataError for one that computes anything but scale * normalised x + shift.
    """
    shape, found = (backbone.width,), {}
    for name, module in backbone.model.named_modules():
        own = {key: tuple(tensor.shape) for key, tensor in module.named_parameters()}
        if re.search(r"(^|\.)\d+\.", name) and own in ({"weight": shape}, {"weight": shape, "bias": shape}):
            norm = copy.deepcopy(module).float().requires_grad_(True)
            norm._forward_hooks.clear()
            norm._forward_pre_hooks.clear()
            _check_norm(name, norm)
            found[name] = norm
    return found


def normalised(norm: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """What one of `layer_norms` gives without its scale and shift."""
    plain = {key: states.new_full(tensor.shape, float(key == "weight")) for key, tensor in norm.named_parameters()}
    result: torch.Tensor = torch.func.functional_call(norm, plain, (states,))
    return result


@torch.no_grad()
def _check_norm(name: str, norm: nn.Module) -> None:
    weight, bias = norm.get_parameter("weight"), dict(norm.named_parameters()).get("bias", 0.0)
    sample = torch.linspace(-1.0, 2.0, len(weight), device=weight.device)[None]
    if not torch.allclose(normalised(norm, sample) * weight + bias, norm(sample), atol=1e-4):
        raise DataError(f"adapter: {name} ({type(norm).__name__}) is no scale and shift. Set norms: false.")


def _instead(norm: nn.Module) -> Callable[..., torch.Tensor]:
    def compute(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        own = {key: tensor.to(output.dtype) for key, tensor in norm.named_parameters()}
        result: torch.Tensor = torch.func.functional_call(norm, own, args)
        return result

    return compute
