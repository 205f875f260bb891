"""Deep prompts (P-tuning v2): learned key and value vectors in front of the text in every layer.

    K_l <- [P^k_l; K_l],  V_l <- [P^v_l; V_l]        P: (2, L, heads, P, D / heads), trained directly

Trains 2 * L * P * D values a side (D: width of all key heads together). Source: Liu et al. 2021 (arXiv 2110.07602),
whose models are encoders; here an encoder-decoder has two sides, its encoder and its decoder's self-attention (our
choice). Positions: see `odqa.frozen.key_values`.
"""

from typing import ClassVar

import torch

from odqa.frozen.backbone import Backbone
from odqa.frozen.key_values import KeyValueMethod, of_side, parameters_by_side, vectors_of_words
from odqa.frozen.words import check_length, random_words


class DeepPrompt(KeyValueMethod):
    """`length` virtual positions a layer.

    They start as the keys and values that the frozen backbone itself computes for `length` random rows of its
    vocabulary: a start on the scale of real text (our choice; the paper starts at random).
    """

    kind: ClassVar[str] = "deep-prompt"

    def __init__(self, backbone: Backbone, *, length: int, seed: int = 0) -> None:
        super().__init__(backbone, length=length, seed=seed)
        check_length(backbone, self.kind, length)
        self._choose_sides(backbone, ("self", "encoder", "decoder"))
        words = random_words(backbone, length, seed)
        self.prompt = parameters_by_side(vectors_of_words(backbone, self.sites, words))

    def layer_vectors(self, side: str, layer: int) -> torch.Tensor:
        return of_side(self.prompt, side)[:, layer]
