"""An engine that counts what passes through it: calls, requests, seconds, and the bytes they would be on a wire.

Bytes are those of the values alone, without names or framing: a token 4, a vector's entry 4 (float32, each prompt once
a call, as a server would get it), a character its UTF-8, a log-probability 4. What a protocol adds is measured there.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from odqa.frozen.engine import Ask, Engine, Facts, Prompted, Vectors, Written

T = TypeVar("T")
_VALUE = 4  # bytes of a token id, of a float32


@dataclass(slots=True)
class Use:
    """What went through: `batches` calls of the engine with `requests` in all; `seconds` that it took for them."""

    batches: int = 0
    requests: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    seconds: float = 0.0


class Metered:
    """Passes everything on to `engine`, and adds it up in `use`."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.use = engine, Use()

    @property
    def facts(self) -> Facts:
        return self.engine.facts

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        up = sum(len(text.encode()) for text in texts)
        return self._count(len(texts), up, lambda: self.engine.tokens(texts), lambda ids: _VALUE * sum(map(len, ids)))

    def embed(self, ids: Sequence[int]) -> Vectors:
        return self._count(1, _VALUE * len(ids), lambda: self.engine.embed(ids), lambda vectors: vectors.nbytes)

    def spread(self, sources: Sequence[Prompted]) -> list[float]:
        return self._count(
            len(sources), _size(sources), lambda: self.engine.spread(sources), lambda found: _VALUE * len(found)
        )

    def generate(self, asks: Sequence[Ask]) -> list[list[Written]]:
        up = _size([ask.source for ask in asks])
        return self._count(len(asks), up, lambda: self.engine.generate(asks), _size_of_texts)

    def score(self, sources: Sequence[Prompted], targets: Sequence[Sequence[int]]) -> list[list[float]]:
        up = _size(sources) + _VALUE * sum(len(target) for target in targets)
        return self._count(
            len(sources), up, lambda: self.engine.score(sources, targets), lambda found: _VALUE * sum(map(len, found))
        )

    def choose(self, sources: Sequence[Prompted], tokens: Sequence[int]) -> NDArray[np.float32]:
        up = _size(sources) + _VALUE * len(tokens)
        return self._count(len(sources), up, lambda: self.engine.choose(sources, tokens), lambda found: found.nbytes)

    def _count(self, requests: int, up: int, call: Callable[[], T], down: Callable[[T], int]) -> T:
        started = time.monotonic()
        found = call()
        use = self.use
        use.seconds += time.monotonic() - started
        use.batches += 1
        use.requests += requests
        use.bytes_up += up
        use.bytes_down += down(found)
        return found


def _size(sources: Iterable[Prompted]) -> int:
    size, seen = 0, set[int]()
    for source in sources:
        size += len((source.text or "").encode()) + _VALUE * len(source.ids or ()) + len((source.method or "").encode())
        for vectors in (source.prompt, source.deep):
            if vectors is not None and id(vectors) not in seen:
                seen.add(id(vectors))
                size += vectors.nbytes
    return size


def _size_of_texts(found: list[list[Written]]) -> int:
    texts = [text for group in found for text in group]
    return sum(len(text.text.encode()) + _VALUE * (len(text.ids) + len(text.logprobs)) for text in texts)
