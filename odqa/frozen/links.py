"""One link of two frozen models: what an anchor's states take from another model's states, by cross-attention.

    C = W_p rms(H_A)                                    W_p: (D_B, D_A), H_A: (B, T, D_A)
    q = W_q rms(H_B),  k = W_k C,  v = W_v C            (D_B, D_B) each, H_B: (B, N, D_B)
    H_B  ->  H_B + W_o softmax(rot(q) rot(k)^T / sqrt(D_B / heads)) v

Trains D_A D_B + 4 D_B^2 values. Source: Bansal et al. 2024 (arXiv 2401.02412), section 3.1, which has neither rms nor
rot. Both are ours and have no parameters: rms, a division by the root mean square, so that queries and keys are of one
size whatever the states are; rot, rotary positions (Su et al. 2021, arXiv 2104.09864), so that "the same place" can be
asked for in models whose states do not say where they are (Llama). No biases. W_o is zero at the start, so that a fresh
link changes nothing. Knows tensors only.
"""

import torch
from torch import nn

_BASE = 10_000.0  # of the rotary positions, as in their paper
_EPSILON = 1e-6  # our choice; Llama's


class Link(nn.Module):
    """W_p, W_q, W_k, W_v and W_o. All but W_o start uniform in +-1/sqrt(d_in), as torch's linear maps."""

    def __init__(
        self,
        width: int,
        anchor_width: int,
        heads: int,
        *,
        rotary: bool = True,
        normalise: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.rotary, self.normalise = heads, rotary, normalise

        def start(d_in: int) -> nn.Parameter:
            bound = d_in**-0.5
            return nn.Parameter(torch.empty(anchor_width, d_in).uniform_(-bound, bound, generator=generator))

        self.project = start(width)
        self.query, self.key, self.value = start(anchor_width), start(anchor_width), start(anchor_width)
        self.out = nn.Parameter(torch.zeros(anchor_width, anchor_width))
        self._cast: tuple[object, tuple[torch.Tensor, ...]] = (None, ())

    def keys_and_values(
        self, states: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the other model's states (B, T, D_A), whose tokens are at `positions` (B, T), in the anchor's type.

        (B, heads, T, D_B / heads) each.
        """
        project, _, key, value, _ = self._weights(dtype)
        seen = nn.functional.linear(self._scaled(states.to(dtype)), project)  # (B, T, D_B)
        keys, values = (self._by_head(nn.functional.linear(seen, weight)) for weight in (key, value))
        return (rotated(keys, positions) if self.rotary else keys), values

    def forward(
        self,
        hidden: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """What is added to the anchor's states (B, N, D_B), whose tokens are at `positions` (B, N).

        `mask` is (B, 1, N, T), true where a key is seen; None: all are.
        """
        _, query, _, _, out = self._weights(hidden.dtype)
        queries = self._by_head(nn.functional.linear(self._scaled(hidden), query))
        if self.rotary:
            queries = rotated(queries, positions)
        read = nn.functional.scaled_dot_product_attention(
            queries, keys.to(queries.dtype), values.to(queries.dtype), mask
        )
        return nn.functional.linear(read.transpose(1, 2).flatten(2).to(hidden.dtype), out)

    def _scaled(self, states: torch.Tensor) -> torch.Tensor:
        if not self.normalise:
            return states
        size = states.float().square().mean(-1, keepdim=True).add(_EPSILON).rsqrt()
        return states * size.to(states.dtype)

    def _by_head(self, states: torch.Tensor) -> torch.Tensor:
        """(B, T, D_B) -> (B, heads, T, D_B / heads)."""
        return states.view(*states.shape[:2], self.heads, -1).transpose(1, 2)

    def _weights(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The five maps in a type; while nothing is trained, cast once and not for every token."""
        own = (self.project, self.query, self.key, self.value, self.out)
        if dtype == self.out.dtype:
            return own
        if torch.is_grad_enabled():
            return tuple(weight.to(dtype) for weight in own)
        stamp = dtype, *((weight._version, weight.data_ptr()) for weight in own)
        if self._cast[0] != stamp:
            self._cast = stamp, tuple(weight.detach().to(dtype) for weight in own)
        return self._cast[1]


def rotated(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Turn pairs of values by angles that grow with the position: (B, heads, T, d), (B or 1, T) -> (B, heads, T, d).

    The product of two such vectors depends on the distance of their positions alone. Value i goes with value i + d / 2.
    """
    half = states.shape[-1] // 2
    rates = _BASE ** -(torch.arange(half, device=states.device, dtype=torch.float32) / half)
    angles = positions[:, None, :, None].float() * rates  # (B, 1, T, d / 2)
    cosine, sine = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    first, second = states[..., :half], states[..., half:]
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def causal_mask(text: torch.Tensor, queries: int, columns: int) -> torch.Tensor | None:
    """Which keys each of the last `queries` of so many `columns` sees: (B, T) -> (B, 1, N, T), None: all see all.

    `text` is true where the keys, those of the first T columns, are text. A query sees text in its own column and
    before it. One that would see nothing, a pad before the text, sees all: it needs something, and nobody reads it.
    """
    if queries == 1 and bool(text.all()):
        return None
    places = torch.arange(columns, device=text.device)
    seen = (places[: text.shape[1]] <= places[columns - queries :, None]) & text[:, None]  # (B, N, T)
    return (seen | ~seen.any(-1, keepdim=True))[:, None]
