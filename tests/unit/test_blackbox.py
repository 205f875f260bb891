"""Black-box tuning: what it searches, what it costs, that it goes on after a kill, and what it refuses."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.backbone import load_backbone
from odqa.frozen.blackbox import (
    Classification,
    Continuation,
    Labelled,
    Quality,
    SearchSettings,
    SoftPrompt,
    cross_entropy,
    hinge,
    search,
)
from odqa.frozen.engine import Engine, Prompted, Vectors
from odqa.frozen.local import LocalEngine
from odqa.frozen.metered import Metered
from tests.tiny_models import tiny_gpt2

SETTINGS = SearchSettings(dimensions=6, population=8, calls=160, tune_every=5, seed=3)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    folder = tiny_gpt2(tmp_path_factory.mktemp("blackbox") / "model")
    return LocalEngine(load_backbone(str(folder), "causal", device="cpu", dtype="float32"))


class Valley:
    """The squared distance of the prompt's words from a point that A z can reach; on tune the same. No model."""

    rows = 1

    def __init__(self, target: Vectors, deep: Vectors | None = None) -> None:
        self.target, self.deep, self.asked = target, deep, 0

    def losses(self, prompts: Sequence[SoftPrompt], generation: int) -> Any:
        self.asked += 1
        return np.array([self._distance(prompt) for prompt in prompts])

    def qualities(self, prompts: Sequence[SoftPrompt]) -> list[Quality]:
        return [(-self._distance(prompt),) for prompt in prompts]

    def sources(self) -> Sequence[Prompted]:
        return [Prompted("paris is the capital of france")]

    def _distance(self, prompt: SoftPrompt) -> float:
        found = float(((prompt.words - self.target) ** 2).sum())
        if self.deep is not None and prompt.deep is not None:
            found += float(((prompt.deep - self.deep) ** 2).sum())
        return found


def start(engine: Engine) -> Vectors:
    return engine.embed([41, 42, 43])


def labelled(count: int = 6) -> list[Labelled]:
    texts = ["paris is the capital", "the sea is great", "who wrote the song", "rome", "the king was born", "a bridge"]
    return [Labelled(Prompted(text), number % 2) for number, text in enumerate(texts[:count])]


def classification(engine: Engine, **options: Any) -> Classification:
    return Classification(engine, [" the", " of"], labelled(), labelled(4), **options)


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_search_goes_downhill_and_keeps_the_best_on_tune(engine: LocalEngine) -> None:
    valley = Valley(start(engine))
    away = valley.target + np.float32(1.0) * (engine.facts.embedding_spread or 0)
    result = search(engine, valley, away.astype(np.float32), SETTINGS)
    first, last = result.curve[0]["tune"], result.curve[-1]["tune"]
    assert last > first and result.quality == (last,)
    assert [entry["tune"] for entry in result.curve] == sorted(entry["tune"] for entry in result.curve)
    assert valley.qualities([result.best]) == [result.quality]
    # 160 calls are 20 generations; each fifth is tried on tune with two prompts, and the start with one.
    assert (result.calls, result.tune_calls, valley.asked) == (160, 9, 20)
    assert [entry["calls"] for entry in result.curve] == [0, 40, 80, 120, 160]


def test_the_start_comes_back_where_nothing_is_better(engine: LocalEngine) -> None:
    valley = Valley(start(engine))
    result = search(engine, valley, start(engine), SETTINGS)
    np.testing.assert_array_equal(result.best.words, start(engine))
    assert result.quality == (0.0,)


@pytest.mark.parametrize("projection", ["normal", "uniform"])
def test_what_is_added_at_first_is_as_wide_as_word_vectors(engine: LocalEngine, projection: Any) -> None:
    """A z of a standard normal z times sigma has the deviation alpha * spread: the law of A's entries says so."""
    seen: list[Vectors] = []

    class Watched(Valley):
        def losses(self, prompts: Sequence[SoftPrompt], generation: int) -> Any:
            seen.extend(prompt.words for prompt in prompts)
            return super().losses(prompts, generation)

    settings = SearchSettings(
        dimensions=200, population=30, calls=30, sigma=0.5, scale=2.0, projection=projection, bound=None
    )
    search(engine, Watched(np.zeros((20, 32), np.float32)), 20, settings)
    spread = engine.facts.embedding_spread or 0
    # 30 * 20 * 32 entries, 200 numbers behind each prompt: the deviation is known to a few percent.
    assert np.std(seen) == pytest.approx(2.0 * spread, rel=0.08)


def test_the_same_seed_gives_the_same_prompt_and_another_one_another(engine: LocalEngine) -> None:
    task, short = classification(engine), replace(SETTINGS, calls=40)
    np.random.seed(5)
    first = search(engine, task, start(engine), short)
    state = np.random.get_state()[1].tolist()  # type: ignore[union-attr,index]
    np.random.seed(6)
    again = search(engine, task, start(engine), short)
    np.testing.assert_array_equal(first.best.words, again.best.words)
    assert first.curve == again.curve
    other = search(engine, task, start(engine), replace(short, seed=4))
    assert abs(other.best.words - first.best.words).max() > 0
    np.random.seed(5)
    assert np.random.get_state()[1].tolist() == state, "numpy's global generator is left alone"  # type: ignore[union-attr,index]


def test_a_killed_search_goes_on_and_ends_the_same(engine: LocalEngine, tmp_path: Path) -> None:
    short = replace(SETTINGS, calls=80, tune_every=3)
    whole = search(engine, classification(engine), start(engine), short, journal=tmp_path / "whole")
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    for kept in (1, 2, 9, len(lines) - 1):
        journal = tmp_path / f"cut-{kept}"
        journal.write_text("".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        metered = Metered(engine)
        resumed = search(metered, classification(metered), start(engine), short, journal=journal)
        np.testing.assert_array_equal(resumed.best.words, whole.best.words)
        assert resumed.curve == whole.curve and journal.read_text() == "".join(lines)
        # What the journal has is not asked for again: one batched request a missing line, one for the verbalisers.
        assert metered.use.batches == len(lines) - kept + 1
    with pytest.raises(DataError, match=r"the journal of another search \(other settings\)"):
        search(engine, classification(engine), start(engine), replace(short, sigma=0.5), journal=tmp_path / "whole")


def test_one_generation_is_one_batched_request(engine: LocalEngine) -> None:
    metered = Metered(engine)
    task = classification(metered)
    search(metered, task, start(engine), replace(SETTINGS, calls=24, tune_every=100))
    # One for the verbalisers, three generations, tune at the start and at the end.
    assert metered.use.batches == 1 + 3 + 2
    assert metered.use.requests == 2 + 3 * 8 * 6 + (1 + 2) * 4
    # Up: the verbalisers' letters; per row its text and per call the two tokens; per prompt 3 vectors of 32 float32.
    letters = sum(len(str(one.source.text)) for one in task.train)
    tuned = sum(len(str(one.source.text)) for one in task.tune)
    up = len(" the of") + 24 * (letters + 3 * 32 * 4) + 3 * (tuned + 3 * 32 * 4) + 5 * 2 * 4
    assert metered.use.bytes_up == up
    # Down: the verbalisers' tokens, and two log-probabilities a row.
    assert metered.use.bytes_down == 2 * 4 + (24 * 6 + 3 * 4) * 2 * 4


def test_bbtv2_adds_to_each_layer_in_turn(engine: LocalEngine) -> None:
    """What the first layer gets are the words; the second one has an addition of its own."""
    target = start(engine)
    deep = np.zeros((2, *target.shape), dtype=np.float32)
    seen: list[SoftPrompt] = []

    class Watched(Valley):
        def losses(self, prompts: Sequence[SoftPrompt], generation: int) -> Any:
            seen.extend(prompts)
            return super().losses(prompts, generation)

    settings = replace(SETTINGS, deep=True, calls=48, sigma=0.2, scale=0.2)
    result = search(engine, Watched(target, deep), target, settings)
    assert len(seen) == 48 and result.calls == 48
    for number, prompt in enumerate(seen):
        turn = number // 8
        assert prompt.deep is not None and not prompt.deep[0].any()
        generation = seen[turn * 8 : turn * 8 + 8]
        words = {prompt.words.tobytes() for prompt in generation}
        added = {prompt.deep[1].tobytes() for prompt in generation if prompt.deep is not None}
        assert (len(words), len(added)) == ((8, 1) if turn % 2 == 0 else (1, 8))
    assert search(engine, Watched(target, deep), target, replace(settings, calls=47)).calls == 32, "whole rounds"


# --- losses -----------------------------------------------------------------------------------------------------------


def test_losses_are_those_of_torch() -> None:
    scores = np.random.default_rng(0).standard_normal((2, 5, 3)) * 3
    labels = np.array([0, 2, 1, 1, 0])
    for number in range(2):
        logits, wanted = torch.tensor(scores[number]), torch.tensor(labels)
        expected = nn.functional.cross_entropy(logits, wanted, reduction="none")
        np.testing.assert_allclose(cross_entropy(scores, labels)[number], expected)
        # torch's is the mean over classes, not the sum over the wrong ones.
        margin = nn.functional.multi_margin_loss(logits, wanted, margin=2.0, reduction="none") * 3
        np.testing.assert_allclose(hinge(scores, labels, 2.0)[number], margin)


@torch.no_grad()
def test_a_classification_asks_for_the_verbalisers_behind_each_prompt(engine: LocalEngine) -> None:
    task = classification(engine)
    prompts = [SoftPrompt(start(engine)), SoftPrompt(start(engine) * 2)]
    losses, qualities = task.losses(prompts, 0), task.qualities(prompts)
    logits = engine.choose([prompts[1].before(one.source) for one in task.train], task.tokens)
    labels = torch.tensor([one.label for one in task.train])
    assert losses[1] == pytest.approx(float(nn.functional.cross_entropy(torch.tensor(logits), labels)), abs=1e-5)
    right = (logits[:4].argmax(-1) == labels[:4].numpy()).mean()
    assert qualities[1][0] == pytest.approx(right) and len(qualities[1]) == 2
    assert task.predict(prompts[1], task.sources()) == logits.argmax(-1).tolist()
    margin = classification(engine, loss="hinge", margin=1.0).losses(prompts, 0)
    assert margin[1] == pytest.approx(hinge(logits.astype(float), labels.numpy(), 1.0).mean(), abs=1e-5)


@torch.no_grad()
def test_a_continuation_is_scored_by_its_tokens(engine: LocalEngine) -> None:
    pairs = [(Prompted("paris is"), [41, 42]), (Prompted("the sea"), [43])]
    task = Continuation(engine, pairs, pairs[:1])
    prompts = [SoftPrompt(start(engine)), SoftPrompt(start(engine) * 2)]
    scores = engine.score([prompts[1].before(source) for source, _ in pairs], [target for _, target in pairs])
    assert task.losses(prompts, 0)[1] == pytest.approx(-sum(map(sum, scores)) / 3, abs=1e-5)
    assert task.qualities(prompts)[1] == (pytest.approx(sum(scores[0]) / 2, abs=1e-5),)


def test_a_search_lowers_the_loss_of_a_frozen_model(engine: LocalEngine) -> None:
    task = classification(engine)
    before = task.losses([SoftPrompt(start(engine))], 0)[0]
    result = search(engine, task, start(engine), replace(SETTINGS, calls=240))
    assert result.curve[-1]["loss"] < before - 0.1
    assert not any(parameter.requires_grad for parameter in engine.backbone.model.parameters())


# --- bad input --------------------------------------------------------------------------------------------------------


class Limited:
    """An engine whose facts are changed."""

    def __init__(self, engine: LocalEngine, **changes: Any) -> None:
        self.engine, self.facts = engine, replace(engine.facts, **changes)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def test_an_api_that_lacks_something_is_one_clear_error(engine: LocalEngine) -> None:
    with pytest.raises(DataError, match=r"gives no log-probabilities.* Search over texts instead"):
        classification(Limited(engine, has_logprobs=False))
    with pytest.raises(DataError, match=r"takes no prompts as vectors.* Search over texts instead"):
        Continuation(Limited(engine, takes_prompts=False), [(Prompted("a"), [41])], [(Prompted("a"), [41])])
    task = classification(engine)
    with pytest.raises(DataError, match=r"takes no deep prompts. Set deep: false"):
        search(Limited(engine, takes_deep=False), task, start(engine), replace(SETTINGS, deep=True))
    with pytest.raises(DataError, match=r"does not say how wide its word vectors are"):
        search(Limited(engine, embedding_spread=None), task, start(engine), SETTINGS)


def test_verbalisers_of_several_tokens_are_one_clear_error(engine: LocalEngine) -> None:
    with pytest.raises(DataError, match=r"verbaliser ' extraordinary' is \d+ tokens of .*; one is needed"):
        Classification(engine, [" the", " extraordinary"], labelled(), labelled())
    with pytest.raises(DataError, match="at least two that differ"):
        Classification(engine, [" the", " the"], labelled(), labelled())
    with pytest.raises(DataError, match="there are no tune examples"):
        Classification(engine, [" the", " of"], labelled(), [])
    with pytest.raises(DataError, match="a train example has class 5 of 2"):
        Classification(engine, [" the", " of"], [Labelled(Prompted("a"), 5)], labelled())


def test_a_budget_smaller_than_a_generation_is_one_clear_error(engine: LocalEngine) -> None:
    task = classification(engine)
    for settings, message in {
        replace(SETTINGS, calls=7): r"budget of 7 calls is smaller than one generation \(8: 8\)",
        replace(SETTINGS, calls=15, deep=True): r"smaller than one generation \(8 a layer, 2 layers: 16\)",
        replace(SETTINGS, seed=0): "seed is 0; it must be at least 1",
        replace(SETTINGS, population=1): "population is 1",
    }.items():
        with pytest.raises(DataError, match=message):
            search(engine, task, start(engine), settings)
    with pytest.raises(DataError, match=r"p0 has shape \(3, 5\); it must be finite and \(P, 32\)"):
        search(engine, task, start(engine)[:, :5], SETTINGS)


def test_a_loss_that_is_no_number_is_one_clear_error(engine: LocalEngine, tmp_path: Path) -> None:
    class Broken(Valley):
        def losses(self, prompts: Sequence[SoftPrompt], generation: int) -> Any:
            found = super().losses(prompts, generation)
            found[3] = math.nan if self.asked == 2 else found[3]
            return found

    journal = tmp_path / "journal"
    with pytest.raises(DataError, match=r"prompt 3 of generation 2 has a loss of nan. Lower sigma"):
        search(engine, Broken(start(engine)), start(engine), SETTINGS, journal=journal)
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line.get("entry") for line in entries[1:]] == [0, 1], "what was found before is kept"
