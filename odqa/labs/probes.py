"""Which layer of a frozen model knows what? Probes on every layer of an encoder, with control tasks.

| measure | what is classified | its features at a layer | types of the control task |
| --- | --- | --- | --- |
| entity type | an answer in its sentence: person, place, time or number | mean of its tokens' states | the words |
| word order | two neighbouring words of a sentence: exchanged? | states of their first tokens | the pair |
| holds the answer | a question and a sentence: is it answered there? | mean of all states | two words of the question |

Layer 0 is what the first layer is given: word vectors and positions. Selectivity is accuracy less that of the same
probe on a control task, whose labels are drawn once for each type (Hewitt & Liang 2019, arXiv 1909.03368). The kind
of an answer is what its question asks for (`odqa.lm.records.kind_of`), so labels are as right as that rule is. Probes
are trained on some articles and tested on others. The three questions are the project's; the rest is ours.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from odqa.config.labs import ProbesLab
from odqa.corpus.examples import Example, read_solved
from odqa.frozen.backbone import Backbone, load_backbone
from odqa.frozen.probe import SETTINGS, Found, Items, Linear, Mlp, layer_states, probe
from odqa.labs.outcome import Outcome
from odqa.labs.runner import Desk
from odqa.lm.mixture import split_articles
from odqa.lm.records import KINDS, draw_record, kind_of
from odqa.lm.tasks import Corpus
from odqa.models import is_encoder_decoder
from odqa.sentences import sentence_spans

SELECTIVITY = " (selectivity)"
_LONGEST = 40  # our choice: words of a sentence


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to classify: the texts before and behind [SEP] (or one text), where in the first it is, label, type."""

    text: str
    label: int
    type: Hashable
    spans: tuple[tuple[int, int], ...] = ()
    second: str | None = None


def run(settings: ProbesLab, seed: int, desk: Desk) -> Outcome:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    examples = list(read_solved(desk.places.file(settings.train), sources=settings.sources))
    parts = split_articles([example.passage for example in examples], examples, 0.25)
    counts = (settings.train_items, settings.test_items)
    cases = {
        name: [
            make(corpus, count, np.random.default_rng([seed, place]))
            for place, (corpus, count) in enumerate(zip(parts, counts, strict=True))
        ]
        for name, make in MEASURES.items()
    }
    scores: dict[str, dict[str, list[float]]] = {}
    facts: dict[str, dict[str, float]] = {}
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {"accuracy": {}, "selectivity": {}}
    for model in settings.models:
        backbone = load_backbone(model, "seq2seq" if is_encoder_decoder(model) else "encoder")
        short = model.removeprefix("embedded:")
        for measure, (train, test) in cases.items():
            known, asked = features(backbone, train), features(backbone, test)  # (L + 1, N, ...)
            for layer in range(len(known)):
                for kind in settings.probes:
                    items = Items(known[layer], *_answers(train)), Items(asked[layer], *_answers(test))
                    found = _probe(kind, *items, settings.steps, seed)
                    arm = scores.setdefault(f"{short}, layer {layer}, {kind}", {})
                    right, control = (np.array(values) for values in (found.right, found.control_right))
                    arm[measure], arm[measure + SELECTIVITY] = (
                        list(100.0 * right),
                        list(100.0 * right - 100.0 * control),
                    )
                    facts.setdefault("most common label", {})[measure] = found.majority
                    if kind == settings.probes[0]:
                        line = f"{short}: {measure}"
                        curves["accuracy"].setdefault(line, []).append((float(layer), found.accuracy))
                        curves["selectivity"].setdefault(line, []).append((float(layer), found.selectivity))
            desk.log(f"{short}: {measure} {[round(y, 1) for _, y in curves['accuracy'][f'{short}: {measure}']]}")
    return Outcome(scores, facts, curves)


def _answers(cases: Sequence[Case]) -> tuple[list[int], list[Hashable]]:
    return [case.label for case in cases], [case.type for case in cases]


def _probe(kind: str, train: Items, test: Items, steps: int, seed: int) -> Found:
    pairs, width = train.features.ndim == 3, train.features.shape[-1]
    flat = [Items(items.features.flatten(1), items.labels, items.types) for items in (train, test)]
    makers: dict[str, Callable[[int], torch.nn.Module]] = {
        "linear": lambda classes: Linear(width * (2 if pairs else 1), classes),
        "mlp": lambda classes: Mlp(width * (2 if pairs else 1), classes, seed=seed),
    }
    return probe(makers[kind], *flat, settings=replace(SETTINGS, steps=steps, log_every=steps), seed=seed)


# --- features ---------------------------------------------------------------------------------------------------------


def features(backbone: Backbone, cases: Sequence[Case]) -> torch.Tensor:
    """Of every layer the mean state of all tokens or of each span's: (L + 1, N, D), of pairs (L + 1, N, 2, D)."""
    rows, places = [], []
    for case in cases:
        encoded = backbone.tokenizer(case.text, case.second, return_offsets_mapping=True, verbose=False)
        first = [number == 0 for number in encoded.sequence_ids()]
        spans = [
            [
                at
                for at, ((a, b), own) in enumerate(zip(encoded["offset_mapping"], first, strict=True))
                if own and a < end and b > start
            ]
            for start, end in case.spans
        ]
        rows.append(list(encoded["input_ids"]))
        places.append([span[:1] if len(spans) > 1 else span for span in spans] or [list(range(len(rows[-1])))])
    order = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    found: list[Any] = [None] * len(rows)
    for at, states in zip(order, layer_states(backbone, [rows[at] for at in order]), strict=True):
        found[at] = torch.stack([states[:, tokens].mean(1) for tokens in places[at]], dim=1)  # (L + 1, spans, D)
    return torch.stack(found, dim=1).squeeze(2)


# --- what is classified -----------------------------------------------------------------------------------------------


def _sentence(text: str, at: int) -> tuple[str, int] | None:
    """The sentence around a place, and where it begins, unless it is long."""
    start, end = next(span for span in reversed(sentence_spans(text)) if span[0] <= at)
    sentence = text[start:end]
    return (sentence, start) if 5 <= len(sentence.split()) <= _LONGEST else None


def entity_types(corpus: Corpus, count: int, rng: np.random.Generator) -> list[Case]:
    """Answers to who, where, when and how many, all four as often."""
    named = [kind for kind in KINDS if kind != "other"]
    wanted = {kind: -(-count // len(named)) for kind in named}
    found: list[Case] = []
    for number in rng.permutation(len(corpus.examples)).tolist():
        example: Example = corpus.examples[number]
        kind, answer = kind_of(example.question), example.answers[0]
        at = example.passage.text.find(answer)
        if wanted.get(kind, 0) < 1 or at < 0 or (sentence := _sentence(example.passage.text, at)) is None:
            continue
        start = at - sentence[1]
        if start + len(answer) > len(sentence[0]):
            continue
        wanted[kind] -= 1
        found.append(Case(sentence[0], named.index(kind), answer.lower(), ((start, start + len(answer)),)))
    return [found[number] for number in rng.permutation(len(found)).tolist()][:count]


def word_orders(corpus: Corpus, count: int, rng: np.random.Generator) -> list[Case]:
    """Two neighbouring words of a sentence, exchanged in half of the cases. The first of the pair is the left one."""
    found: list[Case] = []
    while len(found) < count:
        text = corpus.passages[int(rng.integers(len(corpus.passages)))].text
        if (sentence := _sentence(text, int(rng.integers(max(1, len(text)))))) is None:
            continue
        words, is_exchanged = sentence[0].split(), int(rng.integers(2))
        at = int(rng.integers(1, len(words) - 2))  # neither the first word nor the last one with its full stop
        if words[at].lower() == words[at + 1].lower():
            continue
        if is_exchanged:
            words[at], words[at + 1] = words[at + 1], words[at]
        starts = [len(" ".join(words[:number])) + 1 for number in (at, at + 1)]
        spans = tuple((start, start + len(words[at + k])) for k, start in enumerate(starts))
        found.append(Case(" ".join(words), is_exchanged, tuple(sorted(w.lower() for w in words[at : at + 2])), spans))
    return found


def holding_answers(corpus: Corpus, count: int, rng: np.random.Generator) -> list[Case]:
    """Questions, each with a sentence of its passage: that of the answer, or another one."""
    records = [draw_record("answered", corpus, rng) for _ in range(count)]
    return [
        Case(
            str(r["question"]),
            int(r["is_answered"]),
            tuple(str(r["question"]).lower().split()[:2]),
            (),
            str(r["passage"]),
        )
        for r in records
    ]


MEASURES: dict[str, Callable[[Corpus, int, np.random.Generator], list[Case]]] = {
    "entity type": entity_types,
    "word order": word_orders,
    "holds the answer": holding_answers,
}
