"""How rows of tokens lie in a padded batch, and how vectors get in between padding and text. Knows tensors only.

The invariant: what is put in stands directly before a row's first token, wherever the padding is. Pads never come
between the two, so models that look at distances (T5) and pads of any number give the same.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch

Side = Literal["left", "right"]

_source_ends: ContextVar[tuple[int, ...] | None] = ContextVar("source_ends", default=None)


def pad_rows(rows: Sequence[Sequence[int]], padding: int, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, (B, longest) each: 1 where there is text. `side` is where the pads are."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[number, place] = torch.tensor(row, dtype=ids.dtype)
        mask[number, place] = 1
    return ids, mask


def text_start(mask: torch.Tensor) -> torch.Tensor:
    """(B, T) mask -> (B,) index of each row's first token; 0 for a row that has none."""
    return mask.long().argmax(dim=1)


def text_positions(mask: torch.Tensor) -> torch.Tensor:
    """(B, T) mask -> (B, T) positions that count text only: 0 for the first token, and for pads before it."""
    return (mask.long().cumsum(dim=1) - 1).clamp_min(0)


def insert(values: torch.Tensor, start: torch.Tensor, block: torch.Tensor) -> torch.Tensor:
    """Put `block` into each row before place `start`: (B, T, ...), (B,), (B, P, ...) -> (B, P + T, ...)."""
    joined = torch.cat([block, values], dim=1)
    if not start.any():
        return joined
    length = block.shape[1]
    place = torch.arange(joined.shape[1], device=joined.device).expand(len(joined), -1)
    first = start[:, None]
    source = torch.where(place < first, place + length, torch.where(place < first + length, place - first, place))
    return joined[torch.arange(len(joined), device=joined.device)[:, None], source]


def remove(values: torch.Tensor, start: torch.Tensor, length: int) -> torch.Tensor:
    """Undo `insert`: take `length` entries out of each row at place `start`: (B, P + T, ...) -> (B, T, ...)."""
    if not start.any():
        return values[:, length:]
    place = torch.arange(values.shape[1] - length, device=values.device).expand(len(values), -1)
    source = torch.where(place < start[:, None], place, place + length)
    return values[torch.arange(len(values), device=values.device)[:, None], source]


@contextmanager
def source_ends(lengths: Sequence[int]) -> Iterator[None]:
    """Say of the rows that a causal model computes inside of the block how many of their tokens are source.

    What follows is written, or was: methods may treat it otherwise. A batch may have each row several times in a row.
    """
    token = _source_ends.set(tuple(lengths))
    try:
        yield
    finally:
        _source_ends.reset(token)


def told_source_ends() -> tuple[int, ...] | None:
    """What `source_ends` said; None outside of it."""
    return _source_ends.get()
