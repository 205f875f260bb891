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

from typing import Any, ClassVar, Literal

import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.backbone import Backbone, takes
from odqa.frozen.layout import insert, remove, text_positions, text_start
from odqa.frozen.method import Method
from odqa.frozen.words import check_length, check_room, random_words, words_of

Start = Literal["vocabulary", "text", "uniform"]
Call = tuple[tuple[Any, ...], dict[str, Any]]


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
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def length(self) -> int:
        """P."""
        return len(self.prompt)

    def virtual_tokens(self, backbone: Backbone) -> int:
        return self.length if backbone.architecture == "causal" else 0

    def rows(self, batch: int) -> torch.Tensor:
        """The prompt of each row: (B, P, D)."""
        return self.prompt.expand(batch, -1, -1)

    def _install(self, backbone: Backbone) -> None:
        model = backbone.model
        reader = model.get_encoder() if backbone.architecture == "seq2seq" else model
        gives_positions, is_causal = takes(reader, "position_ids"), backbone.architecture == "causal"
        first = 0 if is_causal else max((backbone.window or self.length) - self.length, 0)

        def add_prompt(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            kwargs = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
            if _has_text(kwargs.get("past_key_values")):
                return (), self._go_on(kwargs)
            vectors = kwargs.get("inputs_embeds")
            vectors = backbone.embed(kwargs.pop("input_ids")) if vectors is None else vectors  # (B, T, D)
            batch, width = vectors.shape[:2]
            if is_causal:
                check_room(backbone, self.kind, self.length, width)
            mask = kwargs.get("attention_mask")
            text = vectors.new_ones(batch, width, dtype=torch.long) if mask is None else mask
            start = text_start(text)
            if text.shape[1] == width + self.length:  # widened by `widen_mask`
                text = remove(text, start, self.length)
            elif mask is not None:
                kwargs["attention_mask"] = self._widen(mask)
            kwargs["inputs_embeds"] = insert(vectors, start, self.rows(batch).to(vectors.dtype))
            if gives_positions:
                given = kwargs.get("position_ids")
                places = text_positions(text) if given is None else given.expand(batch, -1)
                own = torch.arange(first, first + self.length, device=places.device)
                kwargs["position_ids"] = insert(places + self.length * is_causal, start, own.expand(batch, -1))
            if (types := kwargs.get("token_type_ids")) is not None:
                kwargs["token_type_ids"] = insert(types, start, types.new_zeros(batch, self.length))
            return (), kwargs

        def hide_prompt(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            vectors, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
            for name in ("logits", "last_hidden_state"):
                values = output.get(name)
                if values is not None and vectors is not None and values.shape[1] == vectors.shape[1]:
                    start = text_start(vectors.new_ones(vectors.shape[:2]) if mask is None else mask)
                    output[name] = remove(values, start, self.length)
            return output

        def widen_mask(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            mask, encoded = kwargs.get("attention_mask"), kwargs.get("encoder_outputs")
            if mask is not None and (encoded is None or encoded[0].shape[1] != mask.shape[1]):
                kwargs = {**kwargs, "attention_mask": self._widen(mask)}
            return args, kwargs

        self._handles.append(reader.register_forward_pre_hook(add_prompt, with_kwargs=True))
        if backbone.architecture == "seq2seq":
            self._handles.append(model.register_forward_pre_hook(widen_mask, with_kwargs=True))
        else:
            self._handles.append(model.register_forward_hook(hide_prompt, with_kwargs=True))

    def _remove(self, backbone: Backbone) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _go_on(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A later step of generation: the cache has the prompt, mask and positions do not know of it yet."""
        changed = dict(kwargs)
        if (mask := kwargs.get("attention_mask")) is not None:
            changed["attention_mask"] = self._widen(mask)
        if (positions := kwargs.get("position_ids")) is not None:
            changed["position_ids"] = positions + self.length
        return changed

    def _widen(self, mask: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, P + T), ones where the prompt is."""
        return insert(mask, text_start(mask), mask.new_ones(len(mask), self.length))


def _has_text(cache: Any) -> bool:
    return cache is not None and int(cache.get_seq_length()) > 0


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
