"""A prompt in use: marks become examples, a new version has to win on marks it never saw, and can be taken back."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.frozen.backbone import load_backbone
from odqa.frozen.bank import Bank
from odqa.frozen.blackbox import SearchSettings, SoftPrompt
from odqa.frozen.engine import Prompted
from odqa.frozen.in_use import Mark, Marked, PromptInUse
from odqa.frozen.local import LocalEngine
from tests.tiny_models import WORDS, tiny_gpt2

SETTINGS = SearchSettings(dimensions=8, population=8, calls=80, tune_every=3, seed=2)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> LocalEngine:
    folder = tiny_gpt2(tmp_path_factory.mktemp("in-use") / "model")
    return LocalEngine(load_backbone(str(folder), "causal", device="cpu", dtype="float32"))


@pytest.fixture
def prompt(engine: LocalEngine, tmp_path: Path) -> Iterator[PromptInUse]:
    yield PromptInUse.create(tmp_path / "alice" / "news", engine, engine.embed([41, 42, 43]))


def mark_all(prompt: PromptInUse, count: int = 48) -> None:
    """Users want " the" everywhere, and never " of": something that a prompt can bring about."""
    for number in range(count):
        text = f"{WORDS[number]} {WORDS[-number - 1]}"
        prompt.mark(text, " the" if number % 2 else " of", is_right=bool(number % 2))


def test_a_version_that_wins_on_unseen_marks_is_used_and_can_be_taken_back(
    prompt: PromptInUse, engine: LocalEngine
) -> None:
    start = prompt.prompt.words
    mark_all(prompt)
    decision = prompt.tune(SETTINGS)
    assert decision.promoted == 2 == prompt.version and decision.version == 1
    assert decision.after < decision.before and decision.gain == pytest.approx(decision.before - decision.after)
    assert 0 < decision.low <= decision.gain and (decision.marks, decision.calls) == (48, 80)
    tuned = prompt.prompt.words
    judge = prompt.marks("judge")
    found = Marked(engine, judge, judge).of_marks([SoftPrompt(start), SoftPrompt(tuned)], judge).mean(1)
    np.testing.assert_allclose(found, [decision.before, decision.after], rtol=1e-5)
    # Opened again, the same; the bank serves it by name, and marks say which version they are about.
    again = PromptInUse(prompt.folder, engine)
    np.testing.assert_array_equal(again.prompt.words, tuned)
    again.mark("paris", " the", is_right=True)
    assert [mark.version for mark in again.marks()[-2:]] == [1, 2]
    served = LocalEngine(engine.backbone, Bank(engine.backbone, prompt.folder.parent))
    named = served.choose([Prompted("paris", method="news/current")], [41, 42])
    np.testing.assert_allclose(named, engine.choose([Prompted("paris", prompt=tuned)], [41, 42]), rtol=1e-4, atol=1e-4)
    assert again.roll_back() == 1
    np.testing.assert_array_equal(PromptInUse(prompt.folder, engine).prompt.words, start)
    np.testing.assert_array_equal(again.load(2), tuned)
    with pytest.raises(DataError, match="version 1 is the first one"):
        again.roll_back()
    assert [event["event"] for event in again.history()] == ["begun", "promoted", "rolled back"]
    # The next one goes on from what is in use, and gets a number of its own.
    later = again.tune(replace(SETTINGS, seed=3))
    assert (later.version, later.promoted) == (1, 3)


def test_a_version_that_does_not_win_is_refused(prompt: PromptInUse) -> None:
    """Marks that say nothing: the same answer of like texts is right for half of them."""
    chances = np.random.default_rng(0)
    for number in range(48):
        prompt.mark(f"{WORDS[number]} {WORDS[-number - 1]}", " the", is_right=bool(chances.integers(2)))
    start = prompt.prompt.words
    decision = prompt.tune(replace(SETTINGS, calls=16))
    assert decision.promoted is None and prompt.version == 1 and decision.low <= 0
    np.testing.assert_array_equal(prompt.prompt.words, start)
    assert prompt.history()[-1]["event"] == "refused"


def test_a_text_is_on_one_side_for_ever(prompt: PromptInUse) -> None:
    mark_all(prompt, 40)
    sides = {side: {mark.text for mark in prompt.marks(side)} for side in ("teach", "choose", "judge")}
    assert sum(map(len, sides.values())) == 40 == len(set().union(*sides.values()))
    assert len(sides["teach"]) > len(sides["judge"]) > 0
    # A user who changes their mind: the last word counts.
    first = prompt.marks()[0]
    prompt.mark(first.text, first.answer, is_right=not first.is_right)
    assert len(prompt.marks()) == 40 and prompt.marks()[-1].is_right is not first.is_right
    assert prompt.marks()[-1].side == first.side


def test_wrong_answers_cost_what_they_are_likely(engine: LocalEngine) -> None:
    source, answer = "paris is", " the of"
    (tokens,) = engine.tokens([answer])
    words = engine.embed([41])
    mean = float(np.mean(engine.score([Prompted(source, prompt=words)], [tokens])[0]))
    marks = [Mark(source, answer, True), Mark(source, answer, False)]
    found = Marked(engine, marks, marks).of_marks([SoftPrompt(words)], marks)[0]
    np.testing.assert_allclose(found, [-mean, -np.log(1 - np.exp(mean))], rtol=1e-5)


def test_bad_input_is_one_clear_error(prompt: PromptInUse, engine: LocalEngine, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"0 marks to teach by, at least 8 are needed \(0 in all\). Collect more"):
        prompt.tune(SETTINGS)
    with pytest.raises(DataError, match="deep prompts cannot be kept"):
        prompt.tune(replace(SETTINGS, deep=True))
    with pytest.raises(DataError, match="a mark needs a text and an answer"):
        prompt.mark("paris", "", is_right=True)
    with pytest.raises(DataError, match="a prompt is in use here already"):
        PromptInUse.create(prompt.folder, engine, engine.embed([41]))
    with pytest.raises(ArtifactError, match="no prompt in use here"):
        PromptInUse(tmp_path / "nowhere", engine)
    (prompt.folder / "marks.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"marks.jsonl:1: not a mark"):
        prompt.marks()
    other = load_backbone(str(tiny_gpt2(tmp_path / "other", seed=1)), "causal", device="cpu", dtype="float32")
    with pytest.raises(ArtifactMismatch, match=r"a prompt for the model .*; the engine has"):
        PromptInUse(prompt.folder, LocalEngine(other))
    (prompt.folder / "versions" / "1" / "method.safetensors").write_bytes(b"cut")
    with pytest.raises(ArtifactError, match="a damaged version"):
        PromptInUse(prompt.folder, engine)
