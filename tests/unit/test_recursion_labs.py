"""The lab of recursion: that its world is what it says, and that arms are compared fairly. Tiny sizes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from odqa.config.labs import RecursionHopsLab
from odqa.labs import recursion_hops
from odqa.labs.recursion_model import random_model, read_again_in_text
from odqa.labs.runner import Desk
from odqa.recipes import Places

TINY = {"width": 8, "heads": 2, "batch": 4, "inner": 4, "steps": 2, "samples": (1, 2)}
HOPS = RecursionHopsLab(
    kind="lab-recursion-hops", entities=5, relations=3, fact_steps=2, language_steps=2, rates={}, **TINY
)


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return Desk(Places(tmp_path, tmp_path), lambda _line: None)


def test_questions_of_two_hops_have_the_answers_of_the_facts_and_none_is_both_trained_and_measured() -> None:
    world = recursion_hops.World.drawn(HOPS, 0)
    assert len(world.train) == 27 and len(world.held_out) == 18  # 60 % and 40 % of 5 * 3 * 3
    assert not {*map(tuple, world.train.tolist())} & {*map(tuple, world.held_out.tolist())}
    sources, targets = world.pairs(world.held_out)
    for (entity, first, second), (target,) in zip(sources, targets, strict=True):
        bridge = world.answers[entity - 1, first - 6]  # entities are 1 to 5, relations 6 to 8
        assert target == 1 + world.answers[bridge, second - 6]


def test_text_of_the_two_hop_world_states_facts_and_mentions() -> None:
    world = recursion_hops.World.drawn(HOPS, 0)
    texts = world.texts(np.random.default_rng(0), 200, 3, 0.25)
    assert texts.shape == (200, 9)
    sentences = texts.reshape(-1, 3)
    facts = sentences[sentences[:, 2] <= 5]
    assert (facts[:, 2] == 1 + world.answers[facts[:, 0] - 1, facts[:, 1] - 6]).all()
    assert 0.2 < 1 - len(facts) / len(sentences) < 0.3


def test_textual_recursion_finds_the_bridge_that_a_model_knows() -> None:
    """A made-up model: after 1 comes 2, after 2 and 3 comes 4, of all else it is unsure. The question is 1 3."""
    model = random_model(4, width=8, layers=1, heads=2, window=8, seed=0)

    class Knows(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            logits = torch.zeros(*input_ids.shape, 5)
            logits[..., 0] = -100
            last, before = input_ids[:, -1], input_ids[:, max(0, input_ids.shape[1] - 2)]
            logits[last == 1, -1, 2] = 20.0
            logits[(last == 3) & (before == 2), -1, 4] = 20.0
            return type("Output", (), {"logits": logits})()

        device = torch.device("cpu")

    model.model = Knows()  # type: ignore[assignment]
    found, _ = read_again_in_text(model, [[1, 3], [1, 3]], [4, 2], samples=1, seed=0)
    assert found == [100.0, 0.0]


def test_a_lab_measures_all_arms_on_the_same_questions_and_its_control_is_no_smaller(desk: Desk) -> None:
    outcome = recursion_hops.run(HOPS, 0, desk)
    assert outcome.scores.keys() == outcome.facts.keys() == outcome.curves["flops"].keys()
    assert len({len(scores["held_out"]) for scores in outcome.scores.values()}) == 1
    ours, theirs = outcome.facts["single network"], outcome.facts["neural MLP"]
    assert theirs["trained"] <= ours["trained"] < 1.2 * theirs["trained"]
    assert 1.0 < theirs["mflops_a_question"] / ours["mflops_a_question"] < 5
    assert outcome.facts["textual 1"]["trained"] == 0
    assert outcome.facts["textual 2"]["mflops_a_question"] > outcome.facts["textual 1"]["mflops_a_question"]
