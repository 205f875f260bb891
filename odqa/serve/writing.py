"""One text that is being written: which token comes next, where it ends, what of it may be shown already.

Log-probabilities are the model's own, before `temperature` and `top_p`, in nats. A stop string ends a text and is not
part of it. What is shown while the text grows is never taken back: the end of a text waits while it may be the start of
a stop string, half a character, or a word piece that the next one draws closer ("'" before "s").
"""

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from odqa.frozen.local import row_generator

if TYPE_CHECKING:
    from odqa.frozen.backbone import Backbone

Finish = Literal["stop", "length"]
LOWEST = -9999.0
"""What is told for a log-probability of minus infinity, which JSON cannot hold (vLLM's number)."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How a text is to go on. `temperature` 0: greedy.

    Text `copy` of a request depends on its `seed` and this number alone; None: on chance. `top`: None for no
    log-probabilities, else how many likeliest tokens are told at each place; `tokens` are told besides. `of_prompt`:
    those of the prompt's tokens, too. `is_shown`: pieces are reported while it is written.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    copy: int = 0
    stop: tuple[str, ...] = ()
    top: int | None = None
    tokens: tuple[int, ...] = ()
    of_prompt: bool = False
    ignores_end: bool = False
    is_shown: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A token, its log-probability (None: nothing stands before it), and others that might have stood there."""

    token: int
    logprob: float | None
    others: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of a text, and the places of its tokens."""

    text: str
    places: tuple[Place, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """A text at its end, and the piece of it that was not shown yet. `ids` has the end token or stop string, too."""

    text: str
    ids: tuple[int, ...]
    finish: Finish
    places: tuple[Place, ...]
    prompt_places: tuple[Place, ...]
    last: Piece


class Tokens:
    """What tokens are as text, for one model."""

    def __init__(self, backbone: "Backbone") -> None:
        self._tokenizer = backbone.tokenizer
        self.ends = backbone.end_tokens()
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        decoder = type(getattr(backend, "decoder", None)).__name__
        self.draws_closer = decoder == "WordPiece"
        """Whether a token may change the text of the one before it."""

    def text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def name(self, token: int) -> str:
        """A token by itself; control tokens by their names."""
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))


@dataclass(slots=True)
class Writer:
    """A text from its first token to its last. `take` is given the logits of what follows, once a token."""

    wish: Wish
    tokens: Tokens
    ids: list[int] = field(default_factory=list)
    _places: list[Place] = field(default_factory=list)
    _prompt_places: tuple[Place, ...] = ()
    _noise: torch.Generator | None = None
    _shown: int = 0  # characters
    _told: int = 0  # places

    def __post_init__(self) -> None:
        if self.wish.temperature > 0:
            seed = secrets.randbits(62) if self.wish.seed is None else self.wish.seed
            self._noise = row_generator(seed, self.wish.copy)

    def read(self, ids: Sequence[int], before: torch.Tensor) -> None:
        """Note the prompt's log-probabilities; `before` (T, V), the logits before each of its tokens, or (T - 1, V):
        before all but the first, which has nothing before it."""
        scores = before.log_softmax(-1)
        first = len(ids) - len(scores)
        places = [Place(token, None) for token in ids[:first]]
        places += [self._place(token, of_place) for token, of_place in zip(ids[first:], scores, strict=True)]
        self._prompt_places = tuple(places)

    def take(self, logits: torch.Tensor, likeliest: int | None = None) -> Piece | Written | None:
        """Choose a token from float32 logits (V,); a new piece if some is to be shown, the whole text at its end.

        `likeliest` is the largest logit's place if it is known. Raises ValueError for logits that are not numbers.
        """
        if self.wish.max_tokens == 0:
            return self._finish("length", self.tokens.text([]))
        token = self._choose(logits, likeliest)
        self.ids.append(token)
        if self.wish.top is not None:
            self._places.append(self._place(token, logits.log_softmax(-1)))
        is_end = token in self.tokens.ends and not self.wish.ignores_end
        is_last = is_end or len(self.ids) == self.wish.max_tokens
        if not (is_last or self.wish.is_shown or self.wish.stop):
            return None
        text = self.tokens.text(self.ids[:-1] if is_end else self.ids)
        found = min((place for stop in self.wish.stop if (place := text.find(stop)) >= 0), default=None)
        if found is not None:
            return self._finish("stop", text[:found])
        if is_last:
            return self._finish("stop" if is_end else "length", text)
        return self._show(text) if self.wish.is_shown else None

    def _choose(self, logits: torch.Tensor, likeliest: int | None) -> int:
        best = int(logits.argmax()) if likeliest is None else likeliest
        if not math.isfinite(float(logits[best])):  # argmax finds a NaN where there is one
            raise ValueError("the model's numbers overflow with this prompt; send vectors of the size of word vectors")
        if self._noise is None:
            return best
        own = logits / self.wish.temperature
        if self.wish.top_p < 1:
            ordered, order = own.sort(descending=True)
            shares = ordered.softmax(-1)
            # A token stays if those before it have less than the share: the likeliest one always does.
            own[order[(shares.cumsum(-1) - shares) >= self.wish.top_p]] = -torch.inf
        # Gumbel noise: the largest sum is a sample of the softmax (Maddison et al. 2014, arXiv 1411.0030, section 2).
        drawn = torch.empty(len(own)).exponential_(generator=self._noise)
        return int((own.cpu() - drawn.log()).argmax())

    def _place(self, token: int, scores: torch.Tensor) -> Place:
        others: dict[int, float] = {}
        if self.wish.top:
            values, which = scores.topk(min(self.wish.top, len(scores)))
            others = dict(zip(which.tolist(), values.tolist(), strict=True))
        if self.wish.tokens:
            others |= dict(zip(self.wish.tokens, scores[list(self.wish.tokens)].tolist(), strict=True))
        return Place(token, _told(float(scores[token])), tuple((one, _told(score)) for one, score in others.items()))

    def _show(self, text: str) -> Piece | None:
        """What may be shown of the text so far."""
        end = len(text)
        while end and text[end - 1] == "\ufffd":  # half a character, so far
            end -= 1
        if self.tokens.draws_closer:
            end = min(end, _shared(text, self.tokens.text(self.ids[:-1])))
        end = min(end, _before_stops(text, self.wish.stop))
        if end <= self._shown:
            return None
        piece = Piece(text[self._shown : end], tuple(self._places[self._told :]))
        self._shown, self._told = end, len(self._places)
        return piece

    def _finish(self, finish: Finish, text: str) -> Written:
        last = Piece(text[self._shown :], tuple(self._places[self._told :]))
        return Written(text, tuple(self.ids), finish, tuple(self._places), self._prompt_places, last)


def _told(score: float) -> float:
    return score if score > LOWEST else LOWEST


def _shared(text: str, other: str) -> int:
    """Characters that two texts have in common from their beginning."""
    return next(
        (place for place, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other))
    )


def _before_stops(text: str, stops: Sequence[str]) -> int:
    """Where the longest end of a text begins that is also the start of a stop string; the text's length if none is."""
    found = len(text)
    for stop in stops:
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if stop.startswith(text[-size:]):
                found = min(found, len(text) - size)
                break
    return found


Report = Callable[[int, "Piece | Written | Exception"], None]
"""Called with the number of a text in its request, and what is new of it: a piece, its end, or why there is none."""
