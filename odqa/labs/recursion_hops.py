"""Two hops with a model that knows one: what reading its own output again is worth, in vectors and in text.

A small language model learns facts `e r a` (entity, relation, entity), one hop each, as running text, in which a fifth
of the sentences are mentions `e r r'` that say nothing: a text has relations in a row, too. A question `e r1 r2` asks
for two hops. Part of the questions train, the others measure. Nobody says where the bridge is or which entity it is.

    single prompt     one pass, a trained soft prompt
    single network    one pass, the very connector (same size) fed with the embeddings in the place of pass 1's states
    neural ...        two passes with a linear or MLP connector; one with a random start, with and without LM
                      pre-training on running text
    textual n         pass 1 samples n continuations of every beginning of the question; each is put in the place of
                      that beginning and read again; the pair with the highest total log-probability wins

Source of the claim: Levine et al. 2022 (arXiv 2204.10019), section 4; this world is ours.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from odqa.config.labs import RecursionHopsLab
from odqa.frozen.backbone import Backbone
from odqa.frozen.method import Method
from odqa.frozen.neural import NeuralRecursion
from odqa.frozen.prompt_tuning import PromptTuning
from odqa.labs.outcome import Outcome
from odqa.labs.recursion_model import (
    Pairs,
    SingleNetwork,
    flops_a_question,
    random_model,
    read_again_in_text,
    right,
    train_method,
    train_model,
)
from odqa.labs.runner import Desk

MEASURE = "held_out"
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class World:
    """Facts `answers` (E, R): the entity that a relation leads to. Token ids: entities from 1, then relations.

    `train`, `held_out` (n, 3): entity, first and second relation.
    """

    answers: Ids
    train: Ids
    held_out: Ids

    @classmethod
    def drawn(cls, settings: RecursionHopsLab, seed: int) -> "World":
        rng = np.random.default_rng([seed, 0])
        entities, relations = settings.entities, settings.relations
        answers = rng.integers(0, entities, (entities, relations))
        triples = np.stack(np.meshgrid(*map(np.arange, (entities, relations, relations)), indexing="ij"), -1)
        triples = rng.permutation(triples.reshape(-1, 3))
        cut = round(settings.train_share * len(triples))
        return cls(answers, triples[:cut], triples[cut:])

    def pairs(self, triples: Ids) -> Pairs:
        """Questions `e r1 r2`, and their answers."""
        bridges = self.answers[triples[:, 0], triples[:, 1]]
        ends = self.answers[bridges, triples[:, 2]]
        tokens = 1 + triples + np.array([0, len(self.answers), len(self.answers)])
        return tokens.tolist(), (1 + ends)[:, None].tolist()

    def texts(self, rng: np.random.Generator, rows: int, sentences: int, mentions: float) -> Ids:
        """Running text, (rows, 3 * sentences): facts `e r a`, and a share of mentions `e r r'`, which say nothing."""
        entities, relations = (rng.integers(0, n, (rows, sentences)) for n in self.answers.shape)
        others = 1 + len(self.answers) + rng.integers(0, self.answers.shape[1], relations.shape)
        last = np.where(rng.random(relations.shape) < mentions, others, 1 + self.answers[entities, relations])
        return np.stack([1 + entities, 1 + len(self.answers) + relations, last], -1).reshape(rows, -1)


def run(settings: RecursionHopsLab, seed: int, desk: Desk) -> Outcome:
    world = World.drawn(settings, seed)
    backbone = _learn_facts(settings, world, seed, desk)
    sources, targets = world.pairs(world.held_out)
    answers = [target[0] for target in targets]
    scores: dict[str, dict[str, list[float]]] = {}
    facts: dict[str, dict[str, float]] = {}
    curves: dict[str, list[tuple[float, float]]] = {}

    def note(arm: str, found: list[float], flops: float, trained: int, seconds: float) -> None:
        scores[arm] = {MEASURE: found}
        facts[arm] = {"trained": trained, "mflops_a_question": flops, "seconds": seconds}
        curves[arm] = [(flops, float(np.mean(found)))]
        desk.log(f"{arm}: {np.mean(found):.1f} on held-out questions, {flops:.2f} MFLOPs, {seconds:.0f} s")

    for arm, (method, language) in _methods(settings, backbone, seed).items():
        started = time.monotonic()
        rate = settings.rates.get(arm.split(",")[0], settings.rate)
        if language:
            texts = _cut_texts(settings, world, seed)
            train_method(backbone, method, texts, steps=settings.language_steps, rate=rate, seed=seed)
        questions = _questions(settings, world, seed)
        train_method(backbone, method, questions, steps=settings.steps, rate=rate, seed=seed)
        seconds = time.monotonic() - started
        found = right(backbone, sources, answers)
        note(arm, found, flops_a_question(backbone, sources[0]), method.count(backbone).trainable, seconds)
        method.detach()
    for samples in settings.samples:
        started = time.monotonic()
        found, flops = read_again_in_text(backbone, sources, answers, samples=samples, seed=seed)
        note(f"textual {samples}", found, flops, 0, time.monotonic() - started)
    return Outcome(scores, facts, {"flops": curves})


def _learn_facts(settings: RecursionHopsLab, world: World, seed: int, desk: Desk) -> Backbone:
    words = sum(world.answers.shape)
    backbone = random_model(
        words, width=settings.width, layers=settings.layers, heads=settings.heads, window=128, seed=seed
    )

    def texts_at(step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, 1, step])
        return torch.from_numpy(world.texts(rng, settings.batch, settings.sentences, settings.mentions))

    train_model(backbone, texts_at, steps=settings.fact_steps, rate=settings.fact_rate, seed=seed)
    entities, relations = (index.ravel() for index in np.indices(world.answers.shape))
    one_hop = np.stack([1 + entities, 1 + len(world.answers) + relations], -1).tolist()
    known = float(np.mean(right(backbone, one_hop, (1 + world.answers).ravel().tolist())))
    desk.log(f"one hop: {known:.1f}")
    return backbone


def _methods(settings: RecursionHopsLab, backbone: Backbone, seed: int) -> dict[str, tuple[Method, bool]]:
    """Per arm the method, and whether it is trained as a language model first."""
    sizes: dict[str, Any] = {"prompt": settings.prompt, "seed": seed}
    inner, random = settings.inner, {**sizes, "depth": 1, "width": settings.inner, "start": "random"}
    return {
        "single prompt": (PromptTuning(backbone, length=2 * settings.prompt, seed=seed), False),
        # One wider, instead of the prompts of two passes: no smaller than the connector.
        "single network": (SingleNetwork(backbone, depth=1, width=inner + 1, seed=seed), False),
        "neural linear": (NeuralRecursion(backbone, depth=0, **sizes), False),
        "neural MLP": (NeuralRecursion(backbone, depth=1, width=inner, **sizes), False),
        "neural MLP, random start": (NeuralRecursion(backbone, **random), False),
        "neural MLP, random start, LM": (NeuralRecursion(backbone, **random), True),
    }


def _questions(settings: RecursionHopsLab, world: World, seed: int) -> Callable[[int], Pairs]:
    def pairs_at(step: int) -> Pairs:
        rng = np.random.default_rng([seed, 2, step])
        return world.pairs(rng.choice(world.train, settings.batch, replace=False))

    return pairs_at


def _cut_texts(settings: RecursionHopsLab, world: World, seed: int) -> Callable[[int], Pairs]:
    """Running text, cut at a random place: pass 1 and the connector read what is before."""

    def pairs_at(step: int) -> Pairs:
        rng = np.random.default_rng([seed, 3, step])
        texts = world.texts(rng, settings.batch, settings.sentences, settings.mentions).tolist()
        cut = int(rng.integers(1, len(texts[0])))
        return [text[:cut] for text in texts], [text[cut:] for text in texts]

    return pairs_at
