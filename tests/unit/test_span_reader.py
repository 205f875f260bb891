"""The span reader stage and its training groups, on a tiny encoder with random weights."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from odqa.errors import ArtifactError, ArtifactMismatch, DataError, RecipeError
from odqa.frozen.backbone import Backbone, load_backbone
from odqa.frozen.method import create_method
from odqa.frozen.spans import SpanHead
from odqa.pack import GreedyPacker
from odqa.read.calibration import Calibration
from odqa.read.span import FEATURES, SpanModel, SpanReader, load_span_reader, save_span_reader, trained_part
from odqa.runtime import Recent
from odqa.types import Answer, Candidate, Hit, PackedContext, Query
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


def calibrated(model: SpanModel, calibration: Calibration | None) -> SpanModel:
    """The same model with another calibration; the method stays attached to the one backbone."""
    twin = copy.copy(model)
    twin.calibration = calibration
    return twin


HALF = Calibration(FEATURES, (0.0,) * len(FEATURES), 0.0, "r")  # confidence 0.5 whatever is read


def test_abstains_below_the_confidence_asked_for_and_keeps_what_it_would_have_said(model: SpanModel) -> None:
    sure = calibrated(model, HALF)
    given, withheld = SpanReader(sure, abstain_below=0.5), SpanReader(sure, abstain_below=0.51)
    for answer, refused in zip(given.read(contexts(given)), withheld.read(contexts(withheld)), strict=True):
        assert answer.text and not refused.text and refused.confidence == answer.confidence == 0.5
        assert refused.candidates[0] == Candidate("", refused.score)
        assert sorted(refused.candidates, key=str) == sorted(answer.candidates, key=str)
        best = next(candidate for candidate in refused.candidates if candidate.text)
        assert best.text == answer.text


def test_a_reader_without_a_calibration_has_no_confidence_and_cannot_abstain_by_it(model: SpanModel) -> None:
    reader = SpanReader(model)
    assert all(answer.text and answer.confidence is None for answer in reader.read(contexts(reader)))
    with pytest.raises(RecipeError, match=r"abstain_below is 0.3, and this reader is uncalibrated"):
        SpanReader(model, abstain_below=0.3)


def test_confidence_is_computed_from_the_features_of_the_reading(model: SpanModel) -> None:
    reader = SpanReader(calibrated(model, Calibration(("choice",), (2.0,), 1.0, "r")))
    for reading in reader.readings(contexts(reader)):
        assert reading.features is not None and reading.answer.confidence is not None
        odds = math.log(reading.answer.confidence / (1 - reading.answer.confidence))
        assert odds == pytest.approx(2 * reading.features["choice"] + 1, abs=1e-3)


@pytest.mark.parametrize("no_answer", ["shared", "row"])
@pytest.mark.parametrize("rank_prior", [0.0, 2.0])
def test_features_are_what_their_names_say(model: SpanModel, no_answer: str, rank_prior: float) -> None:
    """Worked out again from the scores of all spans, passage by passage; the prior of ranks leaves odds alone."""
    twin = copy.copy(model)
    twin.no_answer = no_answer
    reader = SpanReader(twin, candidates=5000, combine="max", rank_prior=rank_prior)
    context = GreedyPacker(reader, 100).pack(QUERIES[:1], HITS[:1])[0]
    assert len(context.hits) >= 2
    reading = reader.readings([context])[0]
    odds = []
    for hit in context.hits:
        batch = model.rows.batch([(context.query.text, hit.passage.title, hit.passage.text)], [0])
        with torch.inference_mode():
            spans = model.spans(batch).flatten().sort(descending=True).values
            none = model.spans(batch)[0, 0, 0]
        answers = spans[spans != none]
        odds.append((answers.logsumexp(0) - none).item())
    chosen, *others = reading.answer.candidates
    log_none = next(c.logprob for c in others if not c.text)
    assert reading.features is not None and reading.features.keys() == set(FEATURES)
    assert reading.features["answer_odds"] == pytest.approx(max(odds), abs=1e-3)
    expected = chosen.logprob - math.log(1 - math.exp(log_none))
    assert reading.features["choice"] == pytest.approx(expected, abs=1e-3)


def test_no_answer_of_a_row_is_judged_within_the_row(model: SpanModel) -> None:
    """P(no answer) is 1 - sigmoid(the highest odds of a passage), and all spans share the rest."""
    twin = copy.copy(model)
    twin.no_answer = "row"
    reader = SpanReader(twin, candidates=5000)
    context = GreedyPacker(reader, 100).pack(QUERIES[:1], HITS[:1])[0]
    reading = reader.readings([context])[0]
    probability = {c.text: math.exp(c.logprob) for c in reading.answer.candidates}
    assert reading.features is not None
    assert probability[""] == pytest.approx(1 / (1 + math.exp(reading.features["answer_odds"])), abs=1e-4)
    assert sum(probability.values()) == pytest.approx(1.0, abs=1e-4)


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
    nothing = PackedContext(QUERIES[0], "", (), 0, 100)
    assert SpanReader(model).read([nothing])[0] == Answer(QUERIES[0].id, "", 0.0)
    assert SpanReader(calibrated(model, HALF)).read([nothing])[0].confidence == 0.0  # no candidate can be right


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


def test_a_calibration_is_loaded_with_its_reader_and_goes_when_the_reader_is_saved_anew(
    model: SpanModel, folder: Path, tmp_path: Path
) -> None:
    save_span_reader(tmp_path, model)
    replace(HALF, reader=trained_part(tmp_path)).save(tmp_path)
    assert SpanReader(load_span_reader(tmp_path, device="cpu"), abstain_below=0.4).model.calibration is not None
    save_span_reader(tmp_path, model)
    assert load_span_reader(tmp_path, device="cpu").calibration is None
    HALF.save(tmp_path)
    with pytest.raises(ArtifactMismatch, match="fitted on reader r; the reader here is"):
        load_span_reader(tmp_path, device="cpu")


def test_another_backbone_is_refused(model: SpanModel, tmp_path: Path) -> None:
    save_span_reader(tmp_path / "reader", model)
    with pytest.raises(ArtifactMismatch, match="trained on backbone"):
        load_span_reader(tmp_path / "reader", backbone=str(tiny_bert(tmp_path / "other", seed=5)))


def test_a_folder_without_a_reader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"not a span reader \(reader.json is missing\)"):
        load_span_reader(tmp_path)


def test_a_remembered_row_is_not_read_again_and_says_the_same(
    model: SpanModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory: Recent[tuple[str, str, str], Any] = Recent(100)
    first = SpanReader(model, memory=memory)
    plain = SpanReader(model).read(contexts(first))
    assert first.read(contexts(first)) == plain and memory
    monkeypatch.setattr(SpanModel, "spans", lambda *_: pytest.fail("a row was read again"))
    second = SpanReader(model, memory=memory)
    assert second.read(contexts(second)) == plain


def test_a_score_prior_prefers_the_passage_with_the_higher_score(model: SpanModel) -> None:
    hits = tuple(Hit(hit.passage, score, "cross") for hit, score in zip(HITS[0][:2], (0.0, 1000.0), strict=True))
    context = PackedContext(QUERIES[0], "", hits, 0, 0)
    (answer,) = SpanReader(model, score_prior=1.0).read([context])
    assert answer.candidates[0].passage_id == hits[1].passage.id
    other = PackedContext(QUERIES[0], "", (replace(hits[0], source="bm25"), hits[1]), 0, 0)  # scores do not compare
    assert SpanReader(model, score_prior=1.0).read([other]) == SpanReader(model).read([other])
