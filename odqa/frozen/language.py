"""Plain text as training batches: what comes before a cut is read, what comes behind it is to be said. Knows token ids.

This is how a connector is pre-trained as part of a language model (arXiv 2204.10019, section 4.2): pass 1 and connector
read the beginning, pass 2 continues it. Where a text is cut is drawn anew each time, which is our choice.
"""

from collections.abc import Sequence

import numpy as np

from odqa.errors import DataError

Pairs = tuple[list[list[int]], list[list[int]]]  # beginnings, continuations


class CutTexts:
    """`batches(i)`: beginnings and continuations of the i-th batch; it depends on the seed and i alone.

    `examples` are the texts as token ids, cut into pieces of at most `tokens`; pieces of one token are left out, there
    is nothing to cut. Raises DataError if none is left.
    """

    def __init__(self, texts: Sequence[Sequence[int]], *, tokens: int, size: int, seed: int = 0) -> None:
        pieces = (text[at : at + tokens] for text in texts for at in range(0, len(text), tokens))
        self.examples = [list(piece) for piece in pieces if len(piece) > 1]
        if not self.examples:
            raise DataError("training: no text has two tokens.")
        self.size, self.seed = size, seed
        self.per_epoch = max(1, len(self.examples) // size)

    def __call__(self, index: int) -> Pairs:
        epoch, place = divmod(index, self.per_epoch)
        order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.examples))
        chosen = [self.examples[at] for at in order[place * self.size : (place + 1) * self.size].tolist()]
        drawn = np.random.default_rng([self.seed, 1, index])
        cuts = [int(drawn.integers(1, len(text))) for text in chosen]
        pairs = list(zip(chosen, cuts, strict=True))
        return [text[:cut] for text, cut in pairs], [text[cut:] for text, cut in pairs]
