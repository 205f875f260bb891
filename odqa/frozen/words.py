"""What soft prompts start from, random words or those of a text, and whether they fit a window. Knows token ids."""

from typing import TYPE_CHECKING

import torch

from odqa.errors import DataError

if TYPE_CHECKING:
    from odqa.frozen.backbone import Backbone


def random_words(backbone: "Backbone", length: int, seed: int) -> torch.Tensor:
    """(length,) ids, drawn evenly and with replacement from the vocabulary without its special tokens."""
    generator = torch.Generator().manual_seed(seed)
    special = set(backbone.tokenizer.all_special_ids)
    words = torch.tensor([token for token in range(len(backbone.tokenizer)) if token not in special])
    return words[torch.randint(len(words), (1, length), generator=generator)][0]


def words_of(backbone: "Backbone", text: str, length: int) -> torch.Tensor:
    """(length,) ids of a text without special tokens, cut at the end, or repeated until it is long enough (as PEFT).

    Raises DataError for a text without tokens.
    """
    ids = backbone.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(f"a soft prompt cannot start from the text {text!r}: it has no tokens.")
    return torch.tensor((ids * -(-length // len(ids)))[:length])


def check_room(backbone: "Backbone", kind: str, length: int, width: int) -> None:
    """Raises DataError for a text of `width` tokens that does not fit the window together with a prompt."""
    if backbone.window is not None and length + width > backbone.window:
        raise DataError(
            f"{kind}: a prompt of {length} vectors and a text of {width} tokens do not fit the window of "
            f"{backbone.window} tokens of {backbone.name}. Shorten one of them."
        )


def check_length(backbone: "Backbone", kind: str, length: int) -> None:
    """Raises DataError for a prompt without vectors, or one that leaves no room in the backbone's window."""
    if length < 1:
        raise DataError(f"{kind}: length is {length}; it must be at least 1.")
    if backbone.window is not None and length >= backbone.window:
        raise DataError(
            f"{kind}: a prompt of {length} vectors leaves no room for text in the window of {backbone.window} tokens "
            f"of {backbone.name}. Use a shorter one."
        )
