"""Recursion: what happens after a pass. A frozen model reads again, with its own answers or with new passages.

`CandidateRecursion` shows the model its own candidate answers beside the question and the same passages (textual
recursion: arXiv 2204.10019, section 4, there closed-book). `RetrievalRecursion` goes back to retrieval with the
question and the first answer (Iter-RetGen: arXiv 2305.15294), or with the passage that a model says is missing. Both
ask again only where a `Gate` says so, and so does `VectorRecursion`, the way through vectors (`odqa.frozen.neural`).

It knows readers by protocol alone, and nothing between calls: the same passes give the same decision.
"""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from odqa.errors import RecipeError
from odqa.stages import DrawsSamples, GivesVectors, Next, Packer, Reader, ReadsCandidates
from odqa.text import normalize_answer
from odqa.types import Answer, Candidate, Hit, PackedContext, Query, Sample

MOST_CANDIDATES = 32
"""Samples a question at most; our choice."""
MOST_PASSES = 8
"""Passes at most: a bound on what a recipe may cost by mistake; our choice."""

FREQUENT, BEST_MEAN = "most frequent sample", "best mean log-probability"
"""Two ways to choose among samples without reading again: what a re-pass is to be compared with."""

Passes = Sequence[tuple[PackedContext, Answer]]
Decided = tuple[Next, Mapping[str, object]]


def confidence_of(answer: Answer) -> float:
    """How sure the reader is, 0 to 1: its calibrated confidence, else the probability of the text it wrote.

    NaN for a reader that says neither (a server without log-probabilities).
    """
    if answer.confidence is not None:
        return answer.confidence
    return math.exp(min(answer.score, 0.0))


@dataclass(frozen=True, slots=True)
class Gate:
    """Who is asked again: whoever is less sure than `below` (None: everybody), until the answer repeats.

    One whose confidence is not known is asked again. The threshold is chosen on tune: scripts/tune_recursion.py.
    """

    below: float | None = None

    def stops(self, passes: Passes) -> Mapping[str, object] | None:
        """Why a question is left as it is; None if it is asked again."""
        last = passes[-1][1]
        if len(passes) > 1 and _key(last.text) == _key(passes[-2][1].text):
            return {"why": "the answer repeats"}
        sure = confidence_of(last)
        if self.below is not None and sure >= self.below:
            return {"why": "sure enough", "confidence": sure, "below": self.below}
        return None

    def opens(self, passes: Passes) -> Mapping[str, object]:
        """Notes on a question that is asked again."""
        sure = confidence_of(passes[-1][1])
        known = {} if math.isnan(sure) else {"confidence": sure}
        return known if self.below is None else {**known, "below": self.below}


def surer(before: Answer, after: Answer) -> Answer:
    """The answer that its reader is surer of, the later one if that is not known or equal.

    Our choice: a second reading is another opinion, not a correction. Of two readers that are not calibrated the
    probabilities of their texts are compared.
    """
    return before if confidence_of(after) < confidence_of(before) else after


@dataclass(frozen=True, slots=True)
class Distinct:
    """Equal samples as one candidate: its likeliest wording, log P of that, and how many samples said so.

    `mean_logprob` is that of the likeliest wording by this measure, in nats a token.
    """

    text: str
    logprob: float
    mean_logprob: float
    count: int

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text, "logprob": self.logprob, "mean_logprob": self.mean_logprob, "count": self.count}


def distinct(samples: Sequence[Sample]) -> list[Distinct]:
    """The samples that differ after SQuAD normalisation, the likeliest first; empty ones (abstentions) are left out."""
    said: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.text.strip():
            said.setdefault(_key(sample.text), []).append(sample)
    found = []
    for same in said.values():
        best = max(same, key=lambda sample: sample.logprob)
        mean = max(sample.mean_logprob for sample in same)
        found.append(Distinct(best.text, best.logprob, mean, len(same)))
    return sorted(found, key=lambda one: (-one.logprob, one.text))


def most_frequent(found: Sequence[Distinct]) -> str:
    """The candidate that most samples said, of equally frequent ones the likelier; empty without candidates.

    Self-consistency without a chain of thought: Wang et al. 2023 (arXiv 2203.11171).
    """
    return max(found, key=lambda one: (one.count, one.logprob)).text if found else ""


def best_mean(found: Sequence[Distinct]) -> str:
    """The candidate with the highest mean log-probability of a token; empty without candidates."""
    return max(found, key=lambda one: (one.mean_logprob, one.logprob)).text if found else ""


@dataclass(frozen=True, slots=True)
class Samples:
    """How candidates are drawn: `count` samples a question."""

    count: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.count <= MOST_CANDIDATES:
            raise RecipeError(f"recursion: {self.count} samples; it must be 1 to {MOST_CANDIDATES}.")

    def draw(self, reader: DrawsSamples, contexts: Sequence[PackedContext], pass_no: int = 2) -> list[list[Sample]]:
        """The samples shown in pass `pass_no`; each pass has its own."""
        seed = self.seed * MOST_PASSES + pass_no - 2
        return reader.draw(contexts, self.count, temperature=self.temperature, top_p=self.top_p, seed=seed)


class _Explaining(abc.ABC):
    """A recursion that says why: `again` is `decide` without its reasons, of the last pass alone."""

    @abc.abstractmethod
    def decide(self, passes: Sequence[Passes], pass_no: int) -> list[Decided]:
        """See `odqa.stages.SaysWhy`."""

    def again(self, contexts: Sequence[PackedContext], answers: Sequence[Answer], pass_no: int) -> list[Next]:
        """See `odqa.stages.Recursion`."""
        passes = [[one] for one in zip(contexts, answers, strict=True)]
        return [found for found, _ in self.decide(passes, pass_no)]


class CandidateRecursion(_Explaining):
    """Shows `reader` the question, its first passages and candidates, the answer of the pass before as the first.

    Candidates are `samples` of `sampler` (None: the ones that the reader listed with its answer, such as a span
    reader's best spans, at most `listed`). The answer itself is always among them (our choice: a re-pass may then
    confirm it). Without any candidate that has a text there is nothing to show, and the question is left as it is.
    """

    def __init__(
        self,
        reader: ReadsCandidates,
        sampler: DrawsSamples | None = None,
        *,
        samples: Samples | None = None,
        listed: int = MOST_CANDIDATES,
        gate: Gate | None = None,
    ) -> None:
        if (sampler is None) != (samples is None):
            raise ValueError("recursion: a sampler and how to draw from it go together")
        self.reader, self.sampler, self.samples, self.listed = reader, sampler, samples, listed
        self.gate = gate or Gate()

    def decide(self, passes: Sequence[Passes], pass_no: int) -> list[Decided]:
        """See `odqa.stages.SaysWhy`; the notes have the candidates as they were drawn."""
        decided: list[Decided] = [(None, self.gate.stops(past) or {}) for past in passes]
        asked = [number for number, (_, why) in enumerate(decided) if not why]
        for number, found in zip(asked, self._candidates([passes[n] for n in asked], pass_no), strict=True):
            context, answer = passes[number][0][0], passes[number][-1][1]
            texts = _texts(answer, found)
            if not texts:
                decided[number] = None, {"why": "no candidates"}
                continue
            notes = {**self.gate.opens(passes[number]), "candidates": [one.to_json() for one in found]}
            if self.samples is not None:
                notes["picks"] = {FREQUENT: most_frequent(found), BEST_MEAN: best_mean(found)}
            decided[number] = self.reader.show_candidates(context, texts), notes
        return decided

    def _candidates(self, passes: Sequence[Passes], pass_no: int) -> list[list[Distinct]]:
        """Those of each question; drawn from its first context, so that later passes hear more than their own echo."""
        if self.sampler is None or self.samples is None:
            return [[_listed(one) for one in past[-1][1].candidates if one.text][: self.listed] for past in passes]
        if not passes:
            return []
        drawn = self.samples.draw(self.sampler, [past[0][0] for past in passes], pass_no)
        return [distinct(samples) for samples in drawn]


class VectorRecursion(_Explaining):
    """Has `reader` read its own last hidden states again, through a trained connector (neural recursion).

    What the first pass wrote plays no part in it: the vectors are those of the question and the packed passages.
    """

    def __init__(self, reader: GivesVectors, *, gate: Gate | None = None) -> None:
        self.reader, self.gate = reader, gate or Gate()
        reader.latent([])  # one without a connector is refused at once

    def decide(self, passes: Sequence[Passes], pass_no: int) -> list[Decided]:
        """See `odqa.stages.SaysWhy`."""
        decided: list[Decided] = [(None, self.gate.stops(past) or {}) for past in passes]
        asked = [number for number, (_, why) in enumerate(decided) if not why]
        latent = self.reader.latent([passes[number][-1][0] for number in asked])
        for number, found in zip(asked, latent, strict=True):
            decided[number] = found, self.gate.opens(passes[number])
        return decided


class RetrievalRecursion(_Explaining):
    """Retrieves again with a new query: `query` filled in, or what `asker` writes about the passages it was shown.

    `query` has the fields {question} and {answer}; where the answer is empty its best candidate stands. With an `asker`
    its answer to question and packed passages, packed anew by `packer` at its own prices, is searched for beside the
    question. A query that says nothing new (the question alone, an empty text) stops.
    """

    def __init__(
        self,
        query: str = "{question} {answer}",
        *,
        asker: Reader | None = None,
        packer: Packer | None = None,
        gate: Gate | None = None,
    ) -> None:
        _check_query(query)
        if (asker is None) != (packer is None):
            raise ValueError("recursion: who asks for the missing passage needs a packer with its prices")
        self.query, self.asker, self.packer = query, asker, packer
        self.gate = gate or Gate()

    def decide(self, passes: Sequence[Passes], pass_no: int) -> list[Decided]:
        """See `odqa.stages.SaysWhy`."""
        decided: list[Decided] = [(None, self.gate.stops(past) or {}) for past in passes]
        asked = [number for number, (_, why) in enumerate(decided) if not why]
        missing = self._missing([passes[number][-1][0] for number in asked])
        for number, wanted in zip(asked, missing, strict=True):
            context, answer = passes[number][-1]
            said = wanted if self.asker is not None else _said(answer)
            if not said or _key(said) == _key(context.query.text):
                decided[number] = None, {"why": "nothing new to search for"}
                continue
            text = _fill(self.query, question=context.query.text, answer=said)
            decided[number] = Query(context.query.id, text), self.gate.opens(passes[number])
        return decided

    def _missing(self, contexts: Sequence[PackedContext]) -> list[str]:
        """What the asker says is missing from each context; empty texts without one."""
        if self.asker is None or self.packer is None or not contexts:
            return [""] * len(contexts)
        repacked = self.packer.pack([one.query for one in contexts], [_by_rank(one) for one in contexts])
        return [" ".join(answer.text.split()) for answer in self.asker.read(repacked)]


def read_again(
    reader: Reader, recursion: CandidateRecursion
) -> Callable[[Sequence[PackedContext]], list[PackedContext | None]]:
    """What the second pass reads after `reader` has read contexts: what a second prompt is trained on."""

    def again(contexts: Sequence[PackedContext]) -> list[PackedContext | None]:
        found = recursion.again(contexts, reader.read(contexts), 2)
        return [one if isinstance(one, PackedContext) else None for one in found]

    return again


def _check_query(query: str) -> None:
    rest = query.replace("{question}", "").replace("{answer}", "")
    if "{answer}" not in query or "{" in rest or "}" in rest:
        raise RecipeError(
            f"recursion: query is {query!r}; it must have {{answer}}, and may have {{question}}, no other."
        )


def _fill(query: str, *, question: str, answer: str) -> str:
    """Values are pasted, never parsed: an answer with braces is an answer with braces."""
    parts = [part.replace("{question}", question) for part in query.split("{answer}")]
    return answer.join(parts)


def _said(answer: Answer) -> str:
    """The answer, or of one that was withheld its best candidate; on one line."""
    texts = [answer.text, *(candidate.text for candidate in answer.candidates)]
    return " ".join(next((text for text in texts if text.strip()), "").split())


def _texts(answer: Answer, found: Sequence[Distinct]) -> list[str]:
    """The answer, then the candidates that differ from it."""
    texts: dict[str, str] = {}
    for text in [answer.text, *(one.text for one in found)]:
        if text.strip():
            texts.setdefault(_key(text), text)
    return list(texts.values())


def _listed(candidate: Candidate) -> Distinct:
    return Distinct(candidate.text, candidate.logprob, candidate.logprob, 1)


def _by_rank(context: PackedContext) -> list[Hit]:
    """The packed passages, best first."""
    if not context.ranks:
        return list(context.hits)
    return [hit for _, hit in sorted(zip(context.ranks, context.hits, strict=True), key=lambda pair: pair[0])]


def _key(text: str) -> str:
    """What makes two answers the same: SQuAD's normalisation, or the text where nothing is left of it."""
    return normalize_answer(text) or text.strip()
