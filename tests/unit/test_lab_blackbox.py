"""The black-box lab, in seconds: a world that is what it says, all arms on the same texts, the same seed the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odqa import config
from odqa.labs import blackbox as lab
from odqa.labs.runner import Desk
from odqa.recipes import Places, load_recipe

TINY: dict[str, Any] = {"tasks": 2, "pretraining_steps": 4, "items": 20, "shots": 4, "width": 16, "words": 12}
TINY |= {"calls": 40, "population": 4, "dimensions": 4, "gradient_steps": 6, "text_calls": 8, "length": 3}
ARMS = {"uninformative", "best written", "in-context", "text search", "feature MLP", "gradient prompt", "LoRA"}
ARMS |= {"fine-tuning", "BBT", "BBT, uniform A", "BBTv2", "formal name"}


def settings(**changes: Any) -> config.BlackboxLab:
    return config.BlackboxLab(kind="lab-blackbox", **{**TINY, **changes})


def test_sequences_are_what_the_world_says() -> None:
    world = lab.make_world(settings(tasks=4), np.random.default_rng(0))
    assert (world.properties.sum(0) == 6).all(), "half of the words have each property"
    ids, at = lab.sequences(world, np.random.default_rng(1), 4000, 3, 3)
    names = {number: name for name, number in world.names.items()}
    slots = [[names[int(token)] for token in row] for row in ids[:, : lab.SLOT]]
    said = [next(name for name in row if not name.startswith("so")) for row in slots]
    assert all(sum(not name.startswith("so") for name in row) == 1 for row in slots)
    named = [name.startswith("task") for name in said]
    assert np.mean(named) == pytest.approx(0.5, abs=0.03)
    # Answers are the majority of the task's property: where the formal name stands, exactly.
    for row, name, is_named in zip(ids, said, named, strict=True):
        words = row[lab.SLOT :].reshape(3, 5)
        answers = [world.answers(words[:, :3], task) for task in range(4)]
        given = words[:, 4] - world.names["no"]
        assert (words[:, 3] == world.names[":"]).all() and names[int(row[at[0]])] in lab.ANSWERS
        if is_named:
            np.testing.assert_array_equal(given, answers[int(name[4:])])
    # Of sequences with everyday words 4 in 7 mean the word's own task; a mistaken one has the same answers 1 time in 8.
    vague = [(row, int(name[3])) for row, name, is_named in zip(ids, said, named, strict=True) if not is_named]
    same = [
        (world.answers(row[lab.SLOT :].reshape(3, 5)[:, :3], task) == row[at] - world.names["no"]).all()
        for row, task in vague
    ]
    assert np.mean(same) == pytest.approx(4 / 7 + 3 / 7 / 8, abs=0.05)


def test_every_arm_answers_the_same_texts_and_a_seed_says_it_all(tmp_path: Path) -> None:
    desk = Desk(Places(artifacts=tmp_path), lambda line: None)
    outcome = lab.run(settings(), 3, desk)
    assert set(outcome.scores) == ARMS
    assert {len(scores["accuracy"]) for scores in outcome.scores.values()} == {2 * 20}
    assert {score for scores in outcome.scores.values() for score in scores["accuracy"]} <= {0.0, 100.0}
    again = lab.run(settings(), 3, desk)
    assert again.scores == outcome.scores and again.curves == outcome.curves
    facts = outcome.facts["BBT"]
    # A generation has 4 prompts: 40 calls are 10 of them. Five vectors of 16 numbers go up for each prompt.
    assert (facts["parameters"], facts["calls"]) == (4, 40) and outcome.facts["BBTv2"]["parameters"] == 8
    assert facts["up kB"] * 1000 > 40 * 5 * 16 * 4 and facts["down kB"] * 1000 > 40 * 8 * 2 * 4
    assert outcome.facts["gradient prompt"] == outcome.facts["gradient prompt"] | {"parameters": 5 * 16, "calls": 18}
    assert set(outcome.curves["calls"]) == {"gradient prompt", "LoRA", "fine-tuning", "BBT", "BBT, uniform A", "BBTv2"}
    assert [calls for calls, _ in outcome.curves["calls"]["BBT"]] == [0.0, *(4.0 * step for step in range(1, 11))]


def test_the_recipe_names_arms_that_there_are() -> None:
    recipe = load_recipe("eval/lab-blackbox.yaml", "lab").settings
    assert isinstance(recipe, config.BlackboxLab)
    assert {name for claim in recipe.claims for name in (claim.arm, *claim.over)} <= ARMS
    with pytest.raises(ValueError, match="length is 4; it must be odd"):
        settings(length=4)
