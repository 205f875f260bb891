"""Deep prompts (P-tuning v2): learned key and value vectors in front of the text in every layer.

    K_l <- [P^k_l; K_l],  V_l <- [P^v_l; V_l]        P: (2, L, P, D), trained directly

Trains 2 * L * P * D values (D: width of all key heads together). Source: Liu et al. 2021 (arXiv 2110.07602); the
vectors reach the model through its key-value cache, as in THUDM/P-tuning-v2. Text keeps the positions that
it has without a prompt.
"""

from typing import Any, ClassVar

import torch
from torch import nn

from odqa.frozen.backbone import Backbone
from odqa.frozen.method import Method


class DeepPrompt(Method):
    """`length` virtual positions a layer.

    They start as the keys and values that the frozen backbone itself computes for `length` random rows of its
    vocabulary: a start on the scale of real text (our choice; the paper starts at random).
    """

    kind: ClassVar[str] = "deep-prompt"

    def __init__(self, backbone: Backbone, *, length: int, seed: int = 0) -> None:
        super().__init__(backbone, length=length, seed=seed)
        self.prompt = nn.Parameter(
            _keys_and_values_of_random_tokens(backbone, length, seed)
        )  # (2, L, heads, P, D/heads)
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def _install(self, backbone: Backbone) -> None:
        from transformers import DynamicCache

        def add_prompt(
            model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            ids, mask = kwargs["input_ids"], kwargs["attention_mask"]  # (B, T) each
            batch, width = ids.shape
            cache = DynamicCache()
            for layer in range(backbone.layers):
                key, value = self.prompt[:, layer].to(backbone.model.dtype).unsqueeze(1).expand(-1, batch, -1, -1, -1)
                cache.update(key, value, layer)
            return args, {
                **kwargs,
                "past_key_values": cache,
                "attention_mask": torch.cat([mask.new_ones(batch, self.prompt.shape[3]), mask], dim=1),
                # Without this, positions would be counted from the end of the cache.
                "position_ids": torch.arange(width, device=ids.device).expand(batch, -1),
            }

        self._handles.append(backbone.model.register_forward_pre_hook(add_prompt, with_kwargs=True))

    def _remove(self, backbone: Backbone) -> None:
        while self._handles:
            self._handles.pop().remove()


@torch.no_grad()
def _keys_and_values_of_random_tokens(backbone: Backbone, length: int, seed: int) -> torch.Tensor:
    """What each layer's key and value maps give for `length` random tokens: (2, L, heads, length, D/heads), float32."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = torch.arange(len(backbone.tokenizer)).tolist()
    special = set(backbone.tokenizer.all_special_ids)
    words = torch.tensor([token for token in vocabulary if token not in special])
    ids = words[torch.randint(len(words), (1, length), generator=generator)].to(backbone.device)
    caught: dict[str, list[torch.Tensor]] = {"key": [], "value": []}
    handles = [
        module.register_forward_hook(lambda _module, _args, out, kind=kind: caught[kind].append(out))
        for name, module in backbone.model.named_modules()
        if (kind := name.rpartition(".")[2]) in caught
    ]
    backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    heads = int(backbone.model.config.num_attention_heads)
    stacked = torch.stack([torch.cat(caught["key"]), torch.cat(caught["value"])]).float().cpu()  # (2, L, P, D)
    layers, width = stacked.shape[1], stacked.shape[-1]
    return stacked.view(2, layers, length, heads, width // heads).transpose(2, 3).contiguous()
