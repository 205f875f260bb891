"""A frozen language model behind an interface that shows values only: texts, token ids and vectors in, texts and
log-probabilities out.

    engine.score([Prompted("where is the seine", prompt=vectors)], [engine.tokens(["paris"])[0]])

Whoever tunes a prompt with it (`odqa.frozen.blackbox`) cannot tell a model in the same process
(`odqa.frozen.local.LocalEngine`) from a server: there is no tensor of torch in here, no gradient, no module. Requests
of one call may differ in everything (prompt, method, lengths, sampling), and are meant to be computed together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Vectors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Prompted:
    """A text to go on from, as `text` or as token `ids` (one of them), and what stands before it.

    `text` gets the special tokens that the model's tokenizer puts around a text that goes on; `ids` are taken as they
    are. `prompt` (P, D): word vectors directly before it, positions as in `odqa.frozen.prompt_tuning`. `deep`
    (L, P, D): what is added to the states of these P places where they enter layer l. `method`: the name of a saved
    method instead of a prompt. A causal model goes on from a prompt alone, too (neither text nor ids).
    """

    text: str | None = None
    ids: Sequence[int] | None = None
    prompt: Vectors | None = None
    deep: Vectors | None = None
    method: str | None = None


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a text goes on: `n` texts of at most `max_tokens` tokens.

    `temperature` 0: greedy, and then the n texts are equal; above 0: samples of the softmax of logits / temperature,
    among the likeliest tokens that have `top_p` of it together. Text i depends on `seed` and i alone (None: on chance).
    `stop`: strings that end a text, and are not part of it. `top`: so many likeliest tokens are reported a place.
    """

    max_tokens: int = 16
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top: int = 0


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to write."""

    source: Prompted
    sampling: Sampling = Sampling()


@dataclass(frozen=True, slots=True)
class Written:
    """A text: `ids` its tokens, with the end token if it came, and those of the string that stopped it.

    `logprobs`: of each token, in nats, by the model itself (before temperature and top_p). `top`: a place's likeliest
    tokens with theirs, empty unless asked for. `finish`: at an end token or a stop string, or at `max_tokens`.
    """

    text: str
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]
    top: tuple[Mapping[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """What a provider says about its model. None: it does not say.

    `width` D of word vectors, `layers` L, `vocabulary` the number of tokens, `window` the longest text in tokens,
    `embedding_spread` the standard deviation of the entries of all word vectors. `fingerprint` as of a backbone.
    """

    model: str
    fingerprint: str | None
    width: int | None
    layers: int | None
    vocabulary: int | None
    window: int | None
    embedding_spread: float | None
    has_logprobs: bool = True
    takes_prompts: bool = True
    takes_deep: bool = False


class Engine(Protocol):
    """A model as a service. Every call raises DataError for a request that cannot be computed, naming its number."""

    @property
    def facts(self) -> Facts: ...

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        ...

    def embed(self, ids: Sequence[int]) -> Vectors:
        """The word vectors of tokens: (n, D). What a prompt may start from."""
        ...

    def spread(self, sources: Sequence[Prompted]) -> list[float]:
        """Standard deviation of the states that enter each layer (L,), over all tokens of these requests.

        After five rounds that leave out what is three deviations from the mean (Sun et al. 2022b, deepbbt.py).
        """
        ...

    def generate(self, asks: Sequence[Ask]) -> list[list[Written]]:
        """The n texts of each request."""
        ...

    def score(self, sources: Sequence[Prompted], targets: Sequence[Sequence[int]]) -> list[list[float]]:
        """log P(target token | source, target tokens before it) in nats, one target a source."""
        ...

    def choose(self, sources: Sequence[Prompted], tokens: Sequence[int]) -> NDArray[np.float32]:
        """log P(token | source) of these tokens, of all as the next one: (sources, tokens), in nats."""
        ...
