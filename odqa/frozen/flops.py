"""What a computation costs, counted while it runs: operations of matrix products, a multiplication and an addition as
two. Nothing else is counted (norms, activations, look-ups)."""

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode


@torch.no_grad()
def count_flops(call: Callable[[], object]) -> int:
    """Floating point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
