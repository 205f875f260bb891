"""Templates and mixtures: what is said is what was written, what is missing is named, nothing tested was trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odqa import config, training
from odqa.artifacts import load_artifact
from odqa.corpus.examples import Example
from odqa.errors import DataError, RecipeError
from odqa.frozen.backbone import Backbone, load_backbone
from odqa.frozen.method import load_method
from odqa.lm.instructions import parse_template
from odqa.lm.mixture import Exam, ItemBatches, Mixture, by_name, encoder_of, read_templates, split_articles
from odqa.lm.records import KINDS, TASKS, draw_record, kind_of
from odqa.lm.tasks import INSTRUCTIONS, Corpus
from odqa.recipes import Places, load_recipe
from odqa.types import Passage
from tests.small_world import passages, write_jsonl, write_psgs, write_yaml
from tests.tiny_models import tiny_llama, tiny_t5

PASSAGES = passages()
EXAMPLES = [
    Example(p.id, f"{asked} {p.title}", (answer,), p, (), (), "towns")
    for number, p in enumerate(PASSAGES)
    for asked, answer in (
        ("when was the bridge built in", p.text.split("built in ")[1][:4]),
        ("on which river is", p.text.split("river ")[1].split(".")[0]),
    )[number % 2 :]
]
CORPUS = Corpus(PASSAGES, EXAMPLES)


# --- the language -----------------------------------------------------------------------------------------------------


def test_fields_choices_and_braces() -> None:
    template = parse_template("Is {{it}} {word}? ||| {is_it?no|yes} {word}", "here")
    assert template.fill({"word": "gold", "is_it": 1}) == ("Is {it} gold?", "yes gold")
    assert template.fill({"word": "{x}", "is_it": 0}) == ("Is {it} {x}?", "no {x}")  # a value is no template


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{word}", r"here: \|\|\| stands 0 times in the template; it must stand once"),
        ("a ||| b ||| c", r"\|\|\| stands 2 times"),
        (" ||| {word}", r"nothing stands before \|\|\|"),
        ("{word} ||| ", r"nothing stands behind \|\|\|"),
        ("a { b ||| c", "a { stands alone in the template. Write {{ for a brace"),
        ("a {Word} ||| c", "{Word} names no field"),
        ("a {} ||| c", "{} names no field"),
    ],
)
def test_a_template_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_template(text, "here")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{passage} ||| {is_answered?no|yes}", r"here: the template has no {question} before \|\|\|. Put it in"),
        ("{passage} {question} ||| yes", r"the template has no {is_answered} behind \|\|\|"),
        ("{question} ||| yes", r"no {passage} before \|\|\| and no {is_answered} behind \|\|\|"),
        ("{passage} {question} {answer} ||| {is_answered?no|yes}", "{answer} is not a field that may stand there"),
        ("{passage} {question} {is_answered?a|b} ||| {is_answered?no|yes}", "{is_answered} is not a field that may"),
        ("{passage} {question} ||| {is_answered?no|yes|perhaps}", r"{is_answered\?...} has 3 choices; the task has 2"),
    ],
)
def test_a_template_without_the_fields_of_its_task_is_refused(text: str, message: str) -> None:
    task = TASKS["answered"]
    with pytest.raises(DataError, match=message):
        parse_template(text, "here").check(reads=task.reads, writes=task.writes, choices=task.choices)


def test_a_record_that_lacks_a_field_or_has_a_number_without_choice_is_named() -> None:
    template = parse_template("{word} ||| {is_it?no|yes}", "here")
    with pytest.raises(DataError, match=r"here: the record has no field is_it \(it has word\)"):
        template.fill({"word": "a"})
    with pytest.raises(DataError, match="here: is_it is 2; there are 2 choices"):
        template.fill({"word": "a", "is_it": 2})


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_records_are_what_their_task_says(task: str) -> None:
    rng = np.random.default_rng(0)
    records = [draw_record(task, CORPUS, rng) for _ in range(60)]
    for record in records:
        assert set(TASKS[task].reads) <= set(record)
        assert any(name in record for name in TASKS[task].writes.split(" or "))
    if task == "read":
        assert all(str(r["answer"]) in str(r["passage"]) for r in records)
    if task == "cloze":
        assert all(str(r["sentence"]).replace("[MASK]", str(r["missing"])) == r["passage"] for r in records)
    if task == "which_title":
        assert all(r[("first", "second")[int(r["second_is_right"])]] == r["title"] for r in records)
    if TASKS[task].choices:
        field = TASKS[task].writes.split(" or ")[-1]
        assert {int(r[field]) for r in records} == ({2, 4} if task == "wanted" else {0, 1}), "both are drawn"


def test_what_a_question_wants() -> None:
    asked = ["who was king", "in which city is it", "when was it", "how many are there", "why is it so"]
    assert [kind_of(question) for question in asked] == ["person", "place", "time", "number", "other"] == list(KINDS)


def test_an_empty_task_is_named() -> None:
    with pytest.raises(DataError, match=r"the task read is empty: 2,000 draws from 60 passages and 0 examples"):
        draw_record("read", Corpus(PASSAGES, []), np.random.default_rng(0))


# --- the shipped templates --------------------------------------------------------------------------------------------


def shipped() -> Any:
    settings = load_recipe(Places.from_environment().file("embedded:instructions.yaml")).settings
    assert isinstance(settings, config.Templates)
    return read_templates(settings.tasks, "instructions.yaml")


def test_every_shipped_template_says_its_task_and_tests_have_wordings_of_their_own() -> None:
    found = shipped()
    assert set(found) == set(TASKS)
    for task, wordings in found.items():
        texts = [(t.source, t.target) for part in (wordings.train, wordings.test) for t in part]
        assert len(wordings.train) >= 3 and len(texts) == len(set(texts)), task
        words = [" ".join(part for part in source if isinstance(part, str)) for source, _ in texts]
        assert not any(instruction in text for instruction in INSTRUCTIONS.values() if instruction for text in words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"red": {"cluster": "a", "train": ["x ||| y"], "test": ["x ||| y"]}}, "file: tasks.red is no task; there are"),
        (
            {"title": {"cluster": "a", "train": ["{passage} ||| {title}", "{passage} ||| t"], "test": ["x ||| y"]}},
            r"file: tasks.title.train.1: the template has no {title} behind",
        ),
    ],
)
def test_a_wrong_template_is_found_by_its_place(change: dict[str, Any], message: str) -> None:
    tasks = config.Templates(kind="templates", tasks=change).tasks
    with pytest.raises(DataError, match=message):
        read_templates(tasks, "file")


# --- mixtures ---------------------------------------------------------------------------------------------------------


def mixture(**changes: Any) -> Mixture:
    own = {name: wordings.train for name, wordings in shipped().items()}
    shares = {"read": 1.0, "title": 1.0, "order": 2.0}
    return Mixture(**{"corpus": CORPUS, "templates": own, "encode": lambda t: t.split(), "shares": shares, **changes})


def test_an_item_depends_on_seed_and_number_and_shares_are_kept() -> None:
    one, two = mixture(), mixture()
    assert [one.item(n) for n in (5, 0)] == [two.item(n) for n in (5, 0)]
    assert mixture(seed=1).item(0) != one.item(0)
    tasks = [one.item(number).task for number in range(200)]
    assert 70 < tasks.count("order") < 130 and set(tasks) == {"read", "title", "order"}
    few = mixture(examples=7)
    assert few.item(9) == few.item(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shares": {}}, "mixture: there is no task in it"),
        ({"shares": {"read": 1.0, "title": 0.0}}, "the task title is empty (its share is 0)"),
        ({"templates": {"read": ()}, "shares": {"read": 1.0}}, "the task read is empty: it has no template"),
        ({"corpus": Corpus(PASSAGES, [])}, "the task read is empty: 2,000 draws"),
    ],
)
def test_a_mixture_with_an_empty_task_is_refused(changes: dict[str, Any], message: str) -> None:
    import re

    with pytest.raises(DataError, match=re.escape(message)):
        mixture(**changes)


def test_texts_that_are_too_long_are_named_by_their_template() -> None:
    with pytest.raises(DataError, match=r"50 records in a row give more than 3 tokens"):
        mixture(longest=3).item(0)


def test_articles_to_test_on_are_apart() -> None:
    train, test = split_articles(PASSAGES, EXAMPLES, 0.25)
    assert {p.title for p in train.passages} | {p.title for p in test.passages} == {p.title for p in PASSAGES}
    assert not {p.title for p in train.passages} & {p.title for p in test.passages}
    assert {e.passage.title for e in test.examples} <= {p.title for p in test.passages} and test.examples
    again = split_articles([Passage("x", "other", test.passages[0].title)], [], 0.25)
    assert not again[0].passages, "by title alone"


def test_an_exam_has_items_of_each_task_and_scores_exact_matches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    t5 = load_backbone(str(tiny_t5(tmp_path / "t5")), "seq2seq", device="cpu", dtype="float32")
    exam = Exam.draw(mixture(encode=encoder_of(t5), longest=200), 4)
    assert by_name([item.task for item in exam.items], range(12)) == {"read": 1.5, "title": 5.5, "order": 9.5}
    yes = t5.tokenizer("yes", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(Backbone, "generate", lambda _self, rows, **_: [[*yes, 1] for _ in rows])
    scores = exam.scores(t5, batch_size=5)
    assert scores == [100.0 * (item.target == "yes") for item in exam.items] and 0 < sum(scores) < 400


def test_batches_hold_neighbours_in_length_and_end_their_targets(tmp_path: Path) -> None:
    llama = load_backbone(str(tiny_llama(tmp_path / "llama")), "causal", device="cpu", dtype="float32")
    made = mixture(encode=encoder_of(llama), longest=200)
    batches = ItemBatches(llama, made, 4)
    found = [batches(number) for number in range(8)]
    assert batches(3) == found[3] == ItemBatches(llama, made, 4)(3)
    spread = [max(map(len, sources)) - min(map(len, sources)) for sources, _ in found]
    everything = [len(source) for sources, _ in found for source in sources]
    assert sum(spread) < max(everything) - min(everything) + 1, "eight batches cut the sorted block"
    start, end = llama.tokenizer.bos_token_id, llama.tokenizer.eos_token_id
    for sources, targets in found:
        assert all(source[0] == start and source[-1] != end for source in sources)
        assert all(target[-1] == end and len(target) > 1 for target in targets)


@pytest.mark.parametrize("kind", ["fine-tuning", "id-pt"])
def test_a_method_trained_on_a_mixture_is_a_readers_method(kind: str, tmp_path: Path) -> None:
    model = tiny_t5(tmp_path / "t5", factor=1.0)
    write_psgs(tmp_path / "psgs.tsv.gz")
    rows = [
        {"id": e.id, "source": "towns", "question": e.question, "answers": list(e.answers)}
        | {"title": e.passage.title, "passage": e.passage.text, "positive_ids": [], "negative_ids": []}
        for e in EXAMPLES
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    sizes = {} if kind == "fine-tuning" else {"length": 3, "encoder_length": 2, "inner": 8}
    recipe = write_yaml(
        tmp_path / "mix.yaml",
        {
            "kind": "train-mixture",
            "model": str(model),
            "method": {"kind": kind, **sizes},
            "mixture": {
                "passages": [str(tmp_path / "psgs.tsv.gz")],
                "train": str(tmp_path / "train.jsonl"),
                "sources": ["towns"],
                "held_out": ["which_title"],
                "items": 4,
                "longest": 200,
                "test_share": 0.3,
            },
            "fit": {"steps": 4, "learning_rates": {"method": 0.01}, "evaluate_every": 2},
            "test_items": 1,
            "device": "cpu",
            "autocast": False,
        },
    )
    places = Places.from_environment(None, tmp_path / "art")
    made = training.train(recipe, places=places)
    manifest = load_artifact(made.path, "method", verify=True).manifest
    assert manifest["counts"]["items_seen"] == 16 and manifest["held_out"] == ["which_title"]
    curve = (made.path / "curve.json").read_text()
    assert "em.which_title" in curve and "em.read" in curve, "the task held out is tested, too"
    backbone = load_backbone(str(model), "seq2seq", device="cpu", dtype="float32")
    assert load_method(made.path, backbone).kind == kind
    said: list[str] = []
    training.train(recipe, places=places, log=said.append)
    assert said == [f"{made.path}: trained already"]
    with pytest.raises(RecipeError, match=r"mixture.held_out: which_titel is no task of .*instructions.yaml"):
        training.train(recipe, places=places, changes=["mixture.held_out=[which_titel]"])
