"""Rows of token ids for a frozen encoder: [CLS] question [SEP] title [SEP] text [SEP], from pieces tokenised apart.

Pieces make prices add up exactly: what was priced and packed is what is read, to the token. Readers and re-rankers
share the format, so that one may start from what the other learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer

from odqa.errors import DataError
from odqa.frozen.spans import SpanBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class TokenisedPassage:
    """Token ids of title and text; `offsets[i]` are the characters of the text that its token i covers."""

    title: tuple[int, ...]
    text: tuple[int, ...]
    offsets: tuple[tuple[int, int], ...]


class Rows:
    """Assembles rows from pieces. Pieces are cached: a passage that is priced, packed and read is tokenised once."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", window: int) -> None:
        special = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        if None in special:
            raise DataError("the backbone's tokenizer lacks a [CLS], [SEP] or [PAD] token. Use an encoder.")
        self.cls, self.sep, self.pad = special
        self.window = window
        # A copy without the truncation (MiniLM: 128 tokens) and padding that a tokenizer file may switch on.
        pieces = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        pieces.no_truncation()
        pieces.no_padding()
        encode = pieces.encode

        @lru_cache(maxsize=16384)
        def ids(text: str) -> tuple[int, ...]:
            return tuple(encode(text, add_special_tokens=False).ids)

        @lru_cache(maxsize=16384)
        def passage(title: str, text: str) -> TokenisedPassage:
            encoded = encode(text, add_special_tokens=False)
            return TokenisedPassage(ids(title), tuple(encoded.ids), tuple(encoded.offsets))

        self.question, self.passage = ids, passage

    def length(self, question: str, title: str, text: str) -> int:
        """Tokens of the whole row."""
        passage = self.passage(title, text)
        return 4 + len(self.question(question)) + len(passage.title) + len(passage.text)

    def text_start(self, question: str, title: str) -> int:
        """Index in the row of the text's first token."""
        return 3 + len(self.question(question)) + len(self.question(title))

    def inputs(self, pairs: Sequence[tuple[str, str, str]]) -> "RowInputs":
        """Rows for (question, title, text) triples, padded to a multiple of 16: many shapes make memory grow."""
        width = -(-max(self.length(*pair) for pair in pairs) // 16) * 16
        ids = torch.full((len(pairs), width), self.pad)
        mask, types = torch.zeros_like(ids), torch.zeros_like(ids)
        for r, (asked, title, text) in enumerate(pairs):
            q, p = self.question(asked), self.passage(title, text)
            row = [self.cls, *q, self.sep, *p.title, self.sep, *p.text, self.sep]
            ids[r, : len(row)] = torch.tensor(row)
            mask[r, : len(row)] = 1
            types[r, 2 + len(q) : len(row)] = 1
        return RowInputs(ids, mask, types)

    def batch(
        self, pairs: Sequence[tuple[str, str, str]], question: Sequence[int], gold: Sequence[tuple[int, int, int]] = ()
    ) -> SpanBatch:
        """`inputs` with what a span head needs: where the texts are, whose rows they are, which spans are right."""
        inputs = self.inputs(pairs)
        in_text = torch.zeros_like(inputs.input_ids, dtype=torch.bool)
        for r, (asked, title, text) in enumerate(pairs):
            start = self.text_start(asked, title)
            in_text[r, start : start + len(self.passage(title, text).text)] = True
        where = torch.tensor(question), torch.tensor(gold, dtype=torch.long).reshape(-1, 3)
        return SpanBatch(inputs.input_ids, inputs.attention_mask, inputs.token_type_ids, in_text, *where)


@dataclass(slots=True)
class RowInputs:
    """What a BERT-like encoder takes: `input_ids`, `attention_mask`, `token_type_ids`, (R, T) each."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor

    def to(self, device: torch.device) -> "RowInputs":
        return RowInputs(*(getattr(self, name).to(device) for name in self.__slots__))


def split_by_length(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Row numbers in at most `parts` parts of about equal size, rows of similar length together: less padding."""
    order = sorted(range(len(lengths)), key=lambda row: (lengths[row], row))
    size = -(-len(order) // parts)
    return [order[start : start + size] for start in range(0, len(order), size)]
