"""Training groups of the span reader: pairs, and contexts as a pipeline packs them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from odqa.corpus.examples import Example
from odqa.errors import DataError
from odqa.frozen.backbone import load_backbone
from odqa.frozen.method import create_method
from odqa.frozen.spans import SpanHead
from odqa.read.span import SpanModel, SpanReader
from odqa.read.train import GroupSettings, PackedBatches, SpanBatches, gold_passage_scores, token_spans
from odqa.types import Gold, Passage, Query
from tests.tiny_models import tiny_bert

METALS, STONES = Passage("n", "gold, silver and iron", "metals"), Passage("m", "marble and granite", "stones")


def example(i: int) -> Example:
    """Its passage holds the answer twice; the ranking has it second, and another that holds it third."""
    own = Passage(f"p{i}", "old bridges cross the tiber, and the tiber is long" + " and long" * (i % 5), "rome")
    other = Passage(f"o{i}", "a boat on the tiber", "boats")
    return Example(
        f"e{i}", f"which river is in town {i}", ("the tiber",), own, (own,), (METALS, STONES), "a" if i % 2 else "b",
        (METALS, own, other, STONES), (4.0, 3.0, 2.0, 1.0), (False, True, True, False),
    )  # fmt: skip


EXAMPLES = [example(i) for i in range(12)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    folder: Path = tiny_bert(tmp_path_factory.mktemp("models") / "bert")
    backbone = load_backbone(str(folder), "encoder", device="cpu", dtype="float32")
    method = create_method("lora", backbone, rank=2, alpha=4.0)
    return SpanModel(backbone, method, SpanHead(backbone.width), 8, "row")


def test_every_occurrence_of_an_answer_is_a_right_span(model: SpanModel) -> None:
    passage = EXAMPLES[0].passage
    offsets = model.rows.passage(passage.title, passage.text).offsets
    spans = token_spans(model.rows, passage, EXAMPLES[0].answers, 8)
    assert len(spans) == 2
    for first, last in spans:
        assert passage.text[offsets[first][0] : offsets[last][1]] == "the tiber"


def test_batches_depend_on_seed_and_number_alone(model: SpanModel) -> None:
    settings = GroupSettings(groups=4, seed=1)
    first, second = (SpanBatches(EXAMPLES, model.rows, 8, settings) for _ in range(2))
    for index in (5, 0, 3):  # in any order, over epochs of three batches
        ours, theirs = first(index), second(index)
        assert torch.equal(ours.input_ids, theirs.input_ids) and torch.equal(ours.gold, theirs.gold)
        _ = second(7)  # a visit to another epoch changes nothing


def test_every_question_has_a_right_span_or_no_answer(model: SpanModel) -> None:
    batches = SpanBatches(EXAMPLES, model.rows, 8, GroupSettings(groups=4, negative_share=0.5, unanswerable_share=0.5))
    kinds = set()
    for index in range(12):
        batch = batches(index)
        assert set(batch.question.tolist()) == {0, 1, 2, 3}
        assert set(batch.question[batch.gold[:, 0]].tolist()) == {0, 1, 2, 3}
        for row, first, last in batch.gold.tolist():
            kinds.add("none" if first == 0 else "span")
            assert first == 0 or (batch.in_text[row, first] and batch.in_text[row, last])
    assert kinds == {"none", "span"}


def test_source_weights_repeat_rows(model: SpanModel) -> None:
    batches = SpanBatches(EXAMPLES, model.rows, 8, GroupSettings(groups=1, source_weights={"a": 3}))
    assert batches.per_epoch == 6 * 3 + 6


def packed(model: SpanModel, **settings: object) -> PackedBatches:
    return PackedBatches(EXAMPLES, model.rows, 8, GroupSettings(groups=4, **{"packed": 3, **settings}))  # type: ignore[arg-type]


def test_packed_contexts_are_the_beginning_of_the_ranking(model: SpanModel) -> None:
    batches = packed(model, unanswerable_share=0.0, restore_share=0.0, parts=2)
    sizes = set()
    for index in range(6):
        batch = batches.group(index)
        assert sum(len(part.input_ids) for part in batch.parts) == len(batch.question)
        held = torch.zeros(4, dtype=torch.bool)
        at = 0
        for part in batch.parts:
            rows = part.gold[:, 0]
            held[batch.question[at + rows]] = True
            for row, first, last in part.gold.tolist():
                assert part.in_text[row, first : last + 1].all()
            at += len(part.input_ids)
        counts = torch.bincount(batch.question, minlength=4)
        sizes |= set(counts.tolist())
        assert (held == (counts > 1)).all()  # the answer stands in the second of the ranking
    assert sizes == {1, 2, 3}


def test_a_missing_right_passage_is_put_back(model: SpanModel) -> None:
    batch = packed(model, packed=1, unanswerable_share=0.0, restore_share=1.0).group(0)
    assert sorted({int(row) for row in batch.parts[0].gold[:, 0]}) == [0, 1, 2, 3]


def test_passages_with_the_answer_are_taken_away_for_a_share(model: SpanModel) -> None:
    batches = packed(model, unanswerable_share=1.0, restore_share=1.0)
    assert all(len(part.gold) == 0 for index in range(3) for part in batches.group(index).parts)


def test_a_share_of_questions_is_changed_so_that_their_passage_answers_none(model: SpanModel) -> None:
    own = Passage("p", "The Tiber is 406 km long and the Arno is 241 km long.", "Rivers")
    asked = Example("e", "How long is the Tiber?", ("406 km",), own, (own,), (METALS,), "a", (own,), (1.0,), (True,))
    settings = GroupSettings(groups=2, packed=2, corrupted_share=1.0)
    batch = PackedBatches([asked] * 4, model.rows, model.longest, settings).group(0)
    assert [len(part.gold) for part in batch.parts] == [0]
    words = model.backbone.tokenizer.convert_ids_to_tokens(batch.parts[0].input_ids[0])
    assert batch.parts[0].input_ids.shape[0] == 2, words  # its own passage and no other


def test_without_a_ranking_a_context_is_passage_and_negatives(model: SpanModel) -> None:
    ranked, plain = example(0), replace(example(1), ranking=(), scores=(), holds=())
    settings = GroupSettings(groups=1, packed=3, unanswerable_share=0.0)
    batches = PackedBatches([ranked, plain], model.rows, model.longest, settings)
    contexts = [batches._context(plain, np.random.default_rng(seed)) for seed in range(20)]
    assert {tuple(p.id for p in context) for context in contexts} == {("p1",), ("p1", "n"), ("p1", "n", "m")}


def test_parts_save_padding_and_change_nothing_else(model: SpanModel) -> None:
    one, three = packed(model, parts=1).group(2), packed(model, parts=3).group(2)
    rows = [
        sorted((int(q), ids[ids != model.rows.pad].tolist()) for q, ids in zip(questions, all_ids, strict=True))
        for questions, all_ids in (
            (one.question, [ids for part in one.parts for ids in part.input_ids]),
            (three.question, [ids for part in three.parts for ids in part.input_ids]),
        )
    ]
    assert rows[0] == rows[1]


def test_a_question_without_answers_brings_its_own_passages(model: SpanModel) -> None:
    bare = Example("u", "q", (), METALS, (), (METALS, STONES), "unanswerable", (METALS, STONES), (0, 0), (False, False))
    batch = PackedBatches([EXAMPLES[0], bare], model.rows, 8, GroupSettings(groups=2, packed=2, unanswerable_share=0.0))
    for index in range(4):
        found = batch.group(index)
        (part,) = found.parts
        asked = set(found.question[part.gold[:, 0]].tolist())
        lengths = torch.bincount(found.question)
        assert len(asked) <= 1 and 2 in lengths.tolist()  # never a right span for the bare one


def test_packed_contexts_need_rankings(model: SpanModel) -> None:
    bare = Example("e", "q", ("the tiber",), EXAMPLES[0].passage, (EXAMPLES[0].passage,), (), "a")
    with pytest.raises(DataError, match="packed contexts need mined rankings"):
        PackedBatches([bare], model.rows, 8, GroupSettings(packed=2))


def test_gold_passage_scores_are_percent(model: SpanModel) -> None:
    passage = Passage("g", "paris")
    scores = gold_passage_scores(
        SpanReader(model), [(Query("q", "city"), Gold("q", ("paris",), ("g",)))], {"g": passage}
    )
    assert scores == {"em": 100.0, "f1": 100.0}  # one word, so one span
