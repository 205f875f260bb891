"""Packing: which of the ranked passages the reader sees, and how much of each. The stage is `odqa.pack.greedy`."""

from odqa.pack.greedy import PRICED_AT_ONCE, GreedyPacker, ShowsContext, show_passages

__all__ = ["PRICED_AT_ONCE", "GreedyPacker", "ShowsContext", "show_passages"]
