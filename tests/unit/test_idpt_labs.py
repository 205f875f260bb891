"""The labs of ID-PT and of probes: their worlds are what they say, and a tiny run of each goes all the way."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from odqa import config
from odqa.corpus.examples import Example
from odqa.frozen.backbone import load_backbone
from odqa.frozen.before_text import Given
from odqa.frozen.idpt import InputPrompt
from odqa.frozen.probe import Items, Linear, layer_states, probe
from odqa.labs import idpt, probes, tasks
from odqa.labs.runner import Desk, run_lab
from odqa.lm.tasks import Corpus
from odqa.recipes import Places
from odqa.types import Passage
from tests.small_world import write_jsonl, write_psgs
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_odqa_mini
from tests.unit.test_instructions import EXAMPLES, PASSAGES

TINY = config.IdptLab(
    kind="lab-idpt",
    width=16,
    layers=1,
    encoder_width=16,
    model_steps=10,
    encoder_steps=10,
    inner=8,
    steps=30,
    batch=8,
    test=5,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def desk(places: Places | None = None) -> Desk:
    return Desk(places or Places.from_environment(), lambda line: None)


# --- tasks named by cues ----------------------------------------------------------------------------------------------


def test_a_quarter_of_the_cue_pairs_is_new_and_a_pair_says_its_task() -> None:
    world = idpt.World(3)
    seen, new = ({tuple(sorted(pair)) for task in world.pairs for pair in task[which]} for which in (0, 1))
    assert len(seen) == 3 * 21 and len(new) == 3 * 7 and not seen & new
    cues = [{cue for pair in [*task[0], *task[1]] for cue in pair} for task in world.pairs]
    assert all(len(own) == 8 for own in cues) and not cues[0] & cues[1]
    rng = np.random.default_rng(0)
    for which, allowed in ((idpt.SEEN, seen), (idpt.NEW, new)):
        texts = [world.asks(which)(rng)[0] for _ in range(200)]
        assert {tuple(sorted(text[:2])) for text in texts} <= allowed


def test_the_answer_is_that_of_most_things() -> None:
    world, rng = idpt.World(0), np.random.default_rng(0)
    first = int(world.ids["thing"][0])
    for task in range(3):
        for _ in range(50):
            text, answer = world.asks(idpt.SEEN, task)(rng)
            have = sum((thing - first) >> task & 1 for thing in text[2:-1])
            assert (world.words[answer] == "yes") == (have >= 4) and len(text) == 2 + 7 + 1
    named, _ = world.named(rng, 7)
    assert sum(word in world.ids["task"] for word in named) == 1 and not set(named) & set(world.ids["cue"].tolist())


def test_the_blind_generator_has_as_many_values_and_one_prompt_for_all(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_gpt2(tmp_path / "gpt2")), "causal", device="cpu", dtype="float32")
    blind = idpt.Blind(backbone, length=4, inner=8, encoder_length=2)
    seeing = InputPrompt(backbone, length=4, inner=8, encoder_length=2)
    assert blind.count(backbone) == seeing.count(backbone)
    prompts = []
    for method in (blind, seeing):
        with torch.no_grad():
            method.out.weight.normal_(generator=torch.Generator().manual_seed(0))
            method.attach(backbone)
            ids = torch.tensor([[41, 42, 43], [51, 52, 53]])
            prompts.append(method._of_text(Given(ids, torch.ones_like(ids))))
            method.detach()
    assert torch.equal(prompts[0][0], prompts[0][1]) and not torch.allclose(prompts[1][0], prompts[1][1])


def test_the_lab_of_cues_runs_and_gives_the_same_again() -> None:
    one, two = (idpt.run(TINY, 1, desk()) for _ in range(2))
    assert one.scores == two.scores
    arms = ("shared prompt", "blind generator", "id-pt", "id-pt, own layers", "oracle prompts", "frozen model alone")
    assert tuple(one.scores) == arms and all(len(s[idpt.MEASURE]) == 15 for s in one.scores.values())
    # 4 x 16 + 5 x 8 + 2 x 8 x 16 + 16 x 8 + 5 x 16 values.
    assert one.facts["id-pt"]["trained values"] == one.facts["blind generator"]["trained values"] == 568
    assert one.facts["oracle prompts"]["trained values"] == 3 * 5 * 16
    assert [x for x, _ in one.curves["learning"]["id-pt"]] == [24.0 * n for n in range(1, 11)]


@pytest.mark.labs
def test_a_prompt_of_the_text_beats_one_for_all(tmp_path: Path) -> None:
    places = Places.from_environment(None, tmp_path)
    assert run_lab("eval/lab-idpt.yaml", places=places, changes=["seeds=[0]"]).ok


# --- tasks of a real model --------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    write_psgs(tmp_path / "psgs.tsv.gz")
    rows = [
        {"id": e.id, "source": "towns", "question": e.question, "answers": list(e.answers)}
        | {"title": e.passage.title, "passage": e.passage.text, "positive_ids": [], "negative_ids": []}
        for e in EXAMPLES
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    return {"passages": [str(tmp_path / "psgs.tsv.gz")], "train": str(tmp_path / "train.jsonl"), "sources": ["towns"]}


def test_the_lab_of_tasks_runs_all_arms_on_tasks_and_articles_kept_apart(files: dict[str, Any], tmp_path: Path) -> None:
    settings = config.TasksLab.model_validate(
        {
            "kind": "lab-tasks",
            "model": str(tiny_odqa_mini(tmp_path / "mini", window=512)),
            "encoder": None,
            "mixture": {**files, "held_out": ["which_title"], "items": 2, "longest": 200, "test_share": 0.3},
            "length": 2,
            "encoder_length": 2,
            "inner": 8,
            "steps": 8,
            "test_items": 1,
            "curve_items": 1,
            "curve_points": 2,
        }
    )
    outcome = tasks.run(settings, 0, desk())
    assert tuple(outcome.scores) == ("frozen model", "static prompt", "id-pt", "prompt per task", "fine-tuning")
    clusters = {"reading": 2, "gaps": 1, "articles": 2, "sentences": 2, "questions": 1}
    for arm, scores in outcome.scores.items():
        assert len(scores[tasks.ALL]) == 8 and {name: len(scores[name]) for name in clusters} == clusters
        assert (tasks.NEW in scores) == (arm != tasks.ORACLE), "nobody has a prompt for a task that is new"
    assert outcome.facts["prompt per task"]["trained values"] == 8 * outcome.facts["static prompt"]["trained values"]
    assert [x for x, _ in outcome.curves["learning"]["id-pt"]] == [8.0, 16.0]


# --- probes -----------------------------------------------------------------------------------------------------------


def test_features_are_those_of_the_words_named(tmp_path: Path) -> None:
    bert = load_backbone(str(tiny_bert(tmp_path / "bert")), "encoder", device="cpu", dtype="float32")
    text = "the river of paris"
    whole, span, pair = (
        probes.features(bert, [probes.Case(text, 0, "t", spans)]) for spans in ((), ((4, 9),), ((4, 9), (13, 18)))
    )
    ids = bert.tokenizer(text)["input_ids"]
    (states,) = list(layer_states(bert, [ids]))  # [CLS] the river of paris [SEP]
    torch.testing.assert_close(whole[:, 0], states.mean(1))
    torch.testing.assert_close(span[:, 0], states[:, 2])
    torch.testing.assert_close(pair[:, 0], states[:, [2, 4]])
    second = probes.features(bert, [probes.Case("river", 0, "t", (), "paris")])
    both = bert.tokenizer("river", "paris")["input_ids"]
    torch.testing.assert_close(second[:, 0], next(iter(layer_states(bert, [both]))).mean(1))


def test_cases_are_what_they_say() -> None:
    rng = np.random.default_rng(0)
    texts = {
        "who": "long ago the king Otto lived in a tower .",
        "where is": "then he went to the town Ulm with all his men .",
        "when": "it was in the year 1066 that he died there .",
        "how many": "there were about 40 ships on the water .",
    }
    answers = {"who": "Otto", "where is": "Ulm", "when": "1066", "how many": "40"}
    examples = [
        Example(f"{q}{n}", f"{q} it", (answers[q],), Passage(q, text, f"t{n}"), (), (), "s")
        for n in range(3)
        for q, text in texts.items()
    ]
    cases = probes.entity_types(Corpus([], examples), 8, rng)
    assert sorted(case.label for case in cases) == [0, 0, 1, 1, 2, 2, 3, 3]
    for case in cases:
        ((start, end),) = case.spans
        assert case.text[start:end].lower() == case.type == ("otto", "ulm", "1066", "40")[case.label]
    swapped = probes.word_orders(Corpus(PASSAGES, []), 40, rng)
    assert 8 < sum(case.label for case in swapped) < 32
    for case in swapped:
        assert tuple(sorted(case.text[a:b].lower() for a, b in case.spans)) == case.type
        in_text = any(case.text in passage.text for passage in PASSAGES)
        assert in_text == (case.label == 0)


def test_the_lab_of_probes_scores_every_layer(files: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(probes.MEASURES, "entity type", probes.word_orders)  # towns are of two kinds only
    settings = config.ProbesLab.model_validate(
        {
            "kind": "lab-probes",
            "models": [str(tiny_bert(tmp_path / "bert", window=512))],
            "train": files["train"],
            "sources": files["sources"],
            "probes": ["linear"],
            "steps": 5,
            "train_items": 24,
            "test_items": 12,
        }
    )
    outcome = probes.run(settings, 0, desk())
    assert len(outcome.scores) == 3, "a row for what goes into the layers and for each of two"
    for measures in outcome.scores.values():
        for name in probes.MEASURES:
            gain = np.array(measures[name + probes.SELECTIVITY])
            assert set(measures[name]) <= {0.0, 100.0} and set(gain.tolist()) <= {-100.0, 0.0, 100.0}
    assert {len(points) for lines in outcome.curves.values() for points in lines.values()} == {3}


def test_what_was_right_is_said_item_by_item() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60).tolist()
    states = torch.tensor([[label - 0.5, 1.0] for label in labels]) + 0.4 * torch.tensor(rng.standard_normal((60, 2)))
    items = [Items(states[part].float(), labels[part], list(range(60))[part]) for part in (slice(40), slice(40, 60))]
    found = probe(lambda classes: Linear(2, classes), *items)
    assert 100 * sum(found.right) / 20 == pytest.approx(found.accuracy, abs=1e-4) and 0 < sum(found.right) < 20
    assert 100 * sum(found.control_right) / 20 == pytest.approx(found.control, abs=1e-4)
