"""Prompt tuning: learned word vectors directly before the text, and nothing else.

    e(x)  ->  [P; e(x)]        P: (P, D)

Trains P * D values. Source: Lester et al. 2021 (arXiv 2104.08691), section 2; an encoder-decoder has the prompt on its
encoder's side, and the decoder attends to the prompt's states as it does to the text's. A prompt is not zero at the
start: the attached model differs from the frozen one before any training.

Positions. In a causal model the prompt has positions 0 to P - 1 and the text goes on at P, as any text would; both
share the window. In an encoder that takes positions (BERT) the prompt has the last P of them, and the text keeps those
that it has without a prompt (our choice): no prompt moves text out of the window, and a model that learned where its
text begins still finds it there. An encoder that takes none counts by itself: by distance (T5), or from the first
vector on (BART).
"""

from typing import ClassVar, Literal

import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.backbone import Backbone
from odqa.frozen.before_text import BeforeText, Words
from odqa.frozen.method import Method
from odqa.frozen.words import check_length, random_words, words_of

Start = Literal["vocabulary", "text", "uniform"]


class PromptTuning(Method):
    """`length` word vectors before the text.

    `start`: "vocabulary", random words; "text", the words of `text`, cut or repeated to the length; "uniform", random
    in -0.5 ... 0.5. Source: section 3.2 of the paper, whose third start, the names of the classes, is a text too. It
    draws words from the 5,000 most common ones, we from all, because few tokenizers know which are common.
    """

    kind: ClassVar[str] = "prompt-tuning"

    def __init__(
        self, backbone: Backbone, *, length: int, start: Start = "vocabulary", text: str | None = None, seed: int = 0
    ) -> None:
        super().__init__(backbone, length=length, start=start, text=text, seed=seed)
        check_length(backbone, self.kind, length)
        self.prompt = nn.Parameter(_first_vectors(backbone, length, start, text, seed))  # (P, D), float32
        self._before: list[BeforeText] = []

    @property
    def length(self) -> int:
        """P."""
        return len(self.prompt)

    def virtual_tokens(self, backbone: Backbone) -> int:
        return self.length if backbone.architecture == "causal" else 0

    def words(self, batch: int) -> Words:
        """The prompt of each row."""
        shown = torch.ones(batch, self.length, dtype=torch.long, device=self.prompt.device)
        return Words(self.prompt.expand(batch, -1, -1), shown)

    def _install(self, backbone: Backbone) -> None:
        self._before.append(BeforeText(backbone, self.kind, self.length, self.words))

    def _remove(self, backbone: Backbone) -> None:
        self._before.pop().remove()


@torch.no_grad()
def _first_vectors(backbone: Backbone, length: int, start: str, text: str | None, seed: int) -> torch.Tensor:
    """(P, D), float32, on the processor."""
    if (start == "text") != (text is not None):
        raise DataError(f"prompt-tuning: start is {start!r} and text is {text!r}; start: text goes with a text.")
    if start not in ("vocabulary", "text", "uniform"):
        raise DataError(f"prompt-tuning: start is {start!r}; it must be vocabulary, text or uniform.")
    ids = random_words(backbone, length, seed) if text is None else words_of(backbone, text, length)
    vectors = backbone.embed(ids[None].to(backbone.device))[0].float().cpu()
    if start == "uniform":
        return torch.empty_like(vectors).uniform_(-0.5, 0.5, generator=torch.Generator().manual_seed(seed))
    return vectors.clone()
