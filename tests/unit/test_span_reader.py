"""The span reader stage and its training groups, on a tiny encoder with random weights."""

import json
from pathlib import Path

import pytest
import torch

from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.frozen.backbone import Backbone, load_backbone
from odqa.frozen.method import create_method
from odqa.frozen.spans import SpanHead
from odqa.pack import GreedyPacker
from odqa.read.span import SpanModel, SpanReader, load_span_reader, save_span_reader
from odqa.read.train import Example, GroupSettings, SpanBatches, gold_passage_scores, read_examples, token_spans
from odqa.types import Gold, PackedContext, Passage, Query
from tests.tiny_models import tiny_bert
from tests.unit.conformance_read import HITS, QUERIES, ReaderConformance


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


def load(folder: Path) -> Backbone:
    return load_backbone(str(folder), "encoder", device="cpu", dtype="float32")


def make_model(folder: Path) -> SpanModel:
    """LoRA and head with values that matter."""
    backbone = load(folder)
    model = SpanModel(backbone, create_method("lora", backbone, rank=2, alpha=4.0), SpanHead(backbone.width), 8)
    torch.manual_seed(3)
    with torch.no_grad():
        for tensor in [*model.method.parameters(), *model.head.parameters()]:
            tensor.add_(torch.randn_like(tensor) * 0.2)
    return model


@pytest.fixture(scope="module")
def model(folder: Path) -> SpanModel:
    return make_model(folder)


class TestSpanReader(ReaderConformance):
    @pytest.fixture(scope="class")
    def reader(self, model: SpanModel) -> SpanReader:
        return SpanReader(model)


def contexts(reader: SpanReader, budget: int = 150) -> list[PackedContext]:
    return GreedyPacker(reader, budget).pack(QUERIES, HITS)


def test_candidates_and_no_answer_share_one_distribution(model: SpanModel) -> None:
    """With room for every span among the candidates, probabilities add up to one."""
    reader = SpanReader(model, candidates=5000, combine="max")
    context = GreedyPacker(reader, 60).pack(QUERIES[:1], HITS[:1])[0]
    answer = reader.read([context])[0]
    everything = SpanReader(model, candidates=5000, combine="sum").read([context])[0]
    assert sum(torch.tensor(c.logprob).exp().item() for c in everything.candidates) == pytest.approx(1.0, abs=1e-4)
    assert answer.candidates[0].text == answer.text


def test_a_candidate_is_the_text_at_its_place(model: SpanModel) -> None:
    reader = SpanReader(model)
    for context, answer in zip(contexts(reader), reader.read(contexts(reader)), strict=True):
        texts = {hit.passage.id: hit.passage.text for hit in context.hits}
        for candidate in answer.candidates:
            if candidate.passage_id is not None:
                assert texts[candidate.passage_id][candidate.start : candidate.end] == candidate.text


def test_passages_are_read_the_same_in_any_batch(model: SpanModel) -> None:
    many, one = SpanReader(model, batch_tokens=8192), SpanReader(model, batch_tokens=1)
    for first, second in zip(many.read(contexts(many)), one.read(contexts(one)), strict=True):
        assert first.text == second.text
        assert first.score == pytest.approx(second.score, abs=1e-4)


def test_abstains_when_no_answer_is_likely_enough(model: SpanModel) -> None:
    never, always = SpanReader(model, abstain_above=1.0), SpanReader(model, abstain_above=0.0)
    assert all(answer.text for answer in never.read(contexts(never)))
    refused = always.read(contexts(always))
    assert all(answer.text == "" and answer.candidates[0].text == "" for answer in refused)


def test_a_rank_prior_weighs_spans_by_the_rank_of_their_passage(model: SpanModel) -> None:
    """P(span) with the prior is P(span) / rank ** w, normalised again: checked on the masses of the two passages."""
    context = GreedyPacker(SpanReader(model), 100).pack(QUERIES[:1], HITS[:1])[0]
    assert len(context.hits) >= 2
    masses = []
    for prior in (0.0, 2.0):
        answer = SpanReader(model, candidates=5000, combine="max", rank_prior=prior).read([context])[0]
        mass = dict.fromkeys((hit.passage.id for hit in context.hits), 0.0)
        for candidate in answer.candidates:
            if candidate.passage_id is not None:
                mass[candidate.passage_id] += torch.tensor(candidate.logprob).exp().item()
        masses.append(mass)
    plain, weighted = masses
    first, second = context.hits[0].passage.id, context.hits[1].passage.id
    # "max" keeps one span of equal texts, so masses are a little short; the prior pulls them apart by about 2 ** 2.
    assert weighted[first] / weighted[second] == pytest.approx(4 * plain[first] / plain[second], rel=0.3)


def test_nothing_packed_means_no_answer(model: SpanModel) -> None:
    assert SpanReader(model).read([PackedContext(QUERIES[0], "", (), 0, 100)])[0].text == ""


def test_the_price_is_the_row_that_is_read(model: SpanModel) -> None:
    reader = SpanReader(model)
    hit = HITS[0][0]
    price = reader.costs(QUERIES[0], [hit]).passages[0]
    batch = model.rows.batch([(QUERIES[0].text, hit.passage.title, hit.passage.text)], [0])
    assert batch.attention_mask.sum().item() == price


def test_a_question_longer_than_the_window_is_refused_by_id(model: SpanModel) -> None:
    with pytest.raises(DataError, match=r"question 'long' has \d+ tokens; the reader's window of 128"):
        SpanReader(model).costs(Query("long", "river " * 200), [])


def test_saved_and_loaded_reads_the_same(folder: Path, model: SpanModel, tmp_path: Path) -> None:
    save_span_reader(tmp_path, model, dtype=torch.float32)
    loaded = SpanReader(load_span_reader(tmp_path, device="cpu", dtype="float32"))
    reader = SpanReader(model)
    assert loaded.read(contexts(loaded)) == reader.read(contexts(reader))


def test_another_backbone_is_refused(model: SpanModel, tmp_path: Path) -> None:
    save_span_reader(tmp_path / "reader", model)
    with pytest.raises(ArtifactMismatch, match="trained on backbone"):
        load_span_reader(tmp_path / "reader", backbone=str(tiny_bert(tmp_path / "other", seed=5)))


def test_a_folder_without_a_reader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not a span reader \(reader.json is missing\)"):
        load_span_reader(tmp_path)


# --- training groups --------------------------------------------------------------------------------------------------

EXAMPLES = [
    Example(
        f"which river is in town {i}",
        ("the tiber",),
        Passage(f"p{i}", "old bridges cross the tiber, and the tiber is long" + " and long" * (i % 5), "rome"),
        (Passage("n", "gold, silver and iron", "metals"),),
        "a" if i % 2 else "b",
    )
    for i in range(12)
]


def test_every_occurrence_of_an_answer_is_a_right_span(model: SpanModel) -> None:
    example = EXAMPLES[0]
    offsets = model.rows.passage(example.passage.title, example.passage.text).offsets
    spans = token_spans(model.rows, example, 8)
    assert len(spans) == 2
    for first, last in spans:
        assert example.passage.text[offsets[first][0] : offsets[last][1]] == "the tiber"


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


def test_reading_examples_names_the_line_that_is_wrong(tmp_path: Path) -> None:
    row = {"id": "1", "question": "q", "answers": ["a"], "title": "t", "passage": "a", "negative_ids": [7]}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"id": "2"}) + "\n")
    examples = read_examples(tmp_path / "train.jsonl", {"7": Passage("7", "x")})
    assert next(examples).negatives == (Passage("7", "x"),)
    with pytest.raises(DataError, match=r"train.jsonl, line 2: 'question'"):
        next(examples)


def test_gold_passage_scores_are_percent(model: SpanModel) -> None:
    passage = Passage("g", "paris")
    scores = gold_passage_scores(
        SpanReader(model), [(Query("q", "city"), Gold("q", ("paris",), ("g",)))], {"g": passage}
    )
    assert scores == {"em": 100.0, "f1": 100.0}  # one word, so one span
