"""Texts that a generative reader wrote, and how those of several windows become one answer.

Shared by the reader that runs a model itself (`odqa.read.lm`) and the one that asks a server (`odqa.read.api`). Knows
neither models nor servers.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from odqa.text import as_written, normalize_answer
from odqa.types import Answer, Candidate, Hit, PackedContext


@dataclass(frozen=True, slots=True)
class Generation:
    """One text that the model wrote: as it came (`raw`), cleaned (`text`), and what ended it (`stop`).

    `stop` is the stop string, "end of text", or "max_new_tokens" for a text that was cut off. `tokens` counts the
    generated tokens with the one that ended the text. `logprob` is their log-probability in nats under the model as it
    is (no temperature, no top-k or top-p).
    """

    text: str
    raw: str
    stop: str
    tokens: int
    logprob: float

    @property
    def mean_logprob(self) -> float:
        """Nats a token."""
        return self.logprob / self.tokens


def join_windows(
    context: PackedContext,
    windows: Sequence[Sequence[Generation]],
    *,
    read: Sequence[Sequence[Hit]],
    spelling: Literal["model", "passage"] = "model",
    score: Literal["sum", "mean"] = "sum",
) -> Answer:
    """One answer from what was written in each window, best first; `read` has the passages of each.

    P(answer) is the mean over the windows of P(answer | window), so that equal answers add up (after SQuAD
    normalisation); a window that abstains has no say in which answer is best. See `odqa.read.lm.LmReader`.
    """
    is_answered = any(window[0].text for window in windows)
    said: dict[str, list[Generation]] = {}
    for window, hits in zip(windows, read, strict=True):
        if is_answered and not window[0].text:
            continue
        own: dict[str, Generation] = {}  # equal answers of one window count once
        for generation in window:
            text = as_written(generation.text, _written_in(hits)) if spelling == "passage" else generation.text
            own.setdefault(normalize_answer(text) or text, replace(generation, text=text))
        for key, generation in own.items():
            said.setdefault(key, []).append(generation)
    total = {key: log_sum(one.logprob for one in same) - math.log(len(windows)) for key, same in said.items()}
    best = {key: max(same, key=lambda generation: generation.logprob) for key, same in said.items()}
    # Of one window the order is that of decoding, which may weigh lengths.
    ranked = list(said) if len(windows) == 1 else sorted(said, key=lambda key: -total[key])
    chosen = ranked[0] if is_answered else ""
    return Answer(
        context.query.id,
        best[chosen].text,
        total[chosen] if score == "sum" else total[chosen] / best[chosen].tokens,
        tuple(Candidate(best[key].text, total[key]) for key in ranked if key),
    )


def log_sum(logprobs: Iterable[float]) -> float:
    """log of the sum of exp, in nats; of one number that number."""
    values = list(logprobs)
    most = max(values)
    return most + math.log(sum(math.exp(value - most) for value in values))


def _written_in(hits: Sequence[Hit]) -> list[str]:
    """What an answer may be copied from: the texts of the passages, then their titles."""
    return [*(hit.passage.text for hit in hits), *(hit.passage.title for hit in hits)]
