"""The cross-encoder re-ranker on tiny random models, against sentence-transformers."""

import logging
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from odqa.errors import DataError, RecipeError
from odqa.rerank.cross import CrossEncoderReranker, _batches
from odqa.types import Passage, Query
from tests.tiny_models import tiny_bert, tiny_cross_encoder
from tests.unit.conformance_read import HITS, QUERIES, RerankerConformance, ranked


@pytest.fixture(scope="module")
def one_label(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "one", 1))


@pytest.fixture(scope="module")
def two_labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "two", 2))


def load(model: str, **settings: object) -> CrossEncoderReranker:
    return CrossEncoderReranker(model, **{"device": "cpu", "dtype": "float32", **settings})  # type: ignore[arg-type]


class TestOneLabel(RerankerConformance):
    @pytest.fixture(scope="class")
    def reranker(self, one_label: str) -> CrossEncoderReranker:
        return load(one_label)


class TestTwoLabelsInSmallBatches(RerankerConformance):
    @pytest.fixture(scope="class")
    def reranker(self, two_labels: str) -> CrossEncoderReranker:
        return load(two_labels, batch_tokens=70)


def test_scores_equal_those_of_sentence_transformers(one_label: str) -> None:
    from sentence_transformers import CrossEncoder

    peer = CrossEncoder(one_label, device="cpu")
    ours = load(one_label).rerank(QUERIES, HITS)
    for query, hits in zip(QUERIES, ours, strict=True):
        pairs = [(query.text, f"{hit.passage.title} {hit.passage.text}".strip()) for hit in hits]
        expected = peer.predict(pairs, activation_fn=torch.nn.Identity())
        assert [hit.score for hit in hits] == pytest.approx(expected.tolist(), abs=1e-5)


def test_two_labels_order_by_the_probability_of_the_positive_one(two_labels: str) -> None:
    from sentence_transformers import CrossEncoder

    peer = CrossEncoder(two_labels, device="cpu")
    (hits,) = load(two_labels).rerank(QUERIES[:1], HITS[:1])
    pairs = [(QUERIES[0].text, f"{hit.passage.title} {hit.passage.text}".strip()) for hit in hits]
    expected = peer.predict(pairs, apply_softmax=True)[:, 1]
    # log-odds to probability: 1 / (1 + exp(-x))
    assert [1 / (1 + math.exp(-hit.score)) for hit in hits] == pytest.approx(expected.tolist(), abs=1e-5)
    (other,) = load(two_labels, positive_label=0).rerank(QUERIES[:1], HITS[:1])
    assert [hit.score for hit in other] == pytest.approx([-hit.score for hit in reversed(hits)], abs=1e-5)


def test_three_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="has 3 labels"):
        load(str(tiny_cross_encoder(tmp_path / "three", 3)))


def test_a_model_without_a_trained_head_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no trained classification head \(classifier.bias"):
        load(str(tiny_bert(tmp_path / "bert")))


def test_a_model_that_is_not_there_is_one_line() -> None:
    with pytest.raises(DataError, match="'/nowhere/model' does not load") as caught:
        load("/nowhere/model")
    assert "\n" not in str(caught.value)


def test_only_the_first_hits_are_renewed_and_the_rest_follow_in_their_order(one_label: str) -> None:
    (hits,) = load(one_label, depth=2).rerank(QUERIES[:1], HITS[:1])
    assert {hit.passage.id for hit in hits[:2]} == {"p1", "p2"}
    assert {hit.source for hit in hits[:2]} == {"cross"}
    assert hits[2:] == HITS[0][2:]


def test_titles_are_joined_only_if_asked_for(one_label: str) -> None:
    titled = ranked(Passage("p", "it has many bridges", "rome"))
    joined = ranked(Passage("p", "rome it has many bridges"))
    bare = ranked(Passage("p", "it has many bridges"))
    score = {}
    for name, separator in (("joined", " "), ("bare", None)):
        (hits,) = load(one_label, title_separator=separator).rerank(QUERIES[:1], [titled])
        score[name] = hits[0].score
    assert score["joined"] == pytest.approx(load(one_label).rerank(QUERIES[:1], [joined])[0][0].score, abs=1e-5)
    assert score["bare"] == pytest.approx(load(one_label).rerank(QUERIES[:1], [bare])[0][0].score, abs=1e-5)
    assert score["joined"] != pytest.approx(score["bare"], abs=1e-3)


def test_a_long_passage_loses_its_end_and_is_counted(one_label: str, caplog: pytest.LogCaptureFixture) -> None:
    # The question has 6 tokens, [CLS] and two [SEP] are 3: of 20 they leave 11 words of the passage.
    question = "what is the capital of france"
    tokenizer = AutoTokenizer.from_pretrained(one_label)
    assert len(tokenizer(question, "the")["input_ids"]) == 6 + 3 + 1
    long, shortened = Passage("p", "the river " * 50), Passage("p", " ".join(["the river"] * 5 + ["the"]))
    with caplog.at_level(logging.WARNING, "odqa.rerank.cross"):
        (cut,) = load(one_label, max_tokens=20).rerank([Query("q", question)], [ranked(long)])
    assert caplog.messages == ["rerank: 1 of 1 passages were cut at 20 tokens"]
    (whole,) = load(one_label).rerank([Query("q", question)], [ranked(shortened)])
    assert cut[0].score == pytest.approx(whole[0].score, abs=1e-5)
    assert cut[0].passage == long


def test_a_question_longer_than_its_passage_keeps_all_its_words(one_label: str) -> None:
    # 30 words of question and 3 special tokens leave 7 of 40 for the passage, though the question is the longer part.
    question = Query("q", "what is the capital of france " * 5)
    (cut,) = load(one_label, max_tokens=40).rerank([question], [ranked(Passage("p", "the river " * 10))])
    (whole,) = load(one_label).rerank([question], [ranked(Passage("p", "the river " * 3 + "the"))])
    assert cut[0].score == pytest.approx(whole[0].score, abs=1e-5)


def test_a_question_that_leaves_no_room_names_the_query_and_its_tokens(one_label: str) -> None:
    with pytest.raises(DataError, match=r"query q-long: the question takes 200 tokens, .* at most 128"):
        load(one_label).rerank([Query("q-long", "who " * 200)], [HITS[0]])


def test_a_pair_of_the_whole_window_is_scored(tmp_path: Path) -> None:
    # 30 positions are no multiple of 16: rounding the row up must not read behind the last position.
    model = str(tiny_cross_encoder(tmp_path / "short", 1, window=30))
    (hits,) = load(model).rerank(QUERIES[:1], [ranked(Passage("p", "the river " * 50))])
    assert math.isfinite(hits[0].score)


def test_a_score_that_is_not_a_number_names_query_and_passage(one_label: str) -> None:
    reranker = load(one_label)
    reranker.model.classifier.bias.data.fill_(math.nan)
    with pytest.raises(DataError, match=r"query q-capital, passage p1: .* score nan in float32"):
        reranker.rerank(QUERIES, HITS)


def test_bfloat16_keeps_the_last_layer_in_float32(one_label: str) -> None:
    reranker = load(one_label, dtype="bfloat16")
    assert reranker.model.dtype == torch.bfloat16
    assert reranker.model.classifier.weight.dtype == torch.float32
    exact = {hit.passage.id: hit.score for hit in load(one_label).rerank(QUERIES[:1], HITS[:1])[0]}
    for hit in reranker.rerank(QUERIES[:1], HITS[:1])[0]:
        # Activations of 8 significant bits through two layers: within a few percent of the scores' range (about 4).
        assert hit.score == pytest.approx(exact[hit.passage.id], abs=0.3)
        assert hit.score != float(torch.tensor(hit.score).bfloat16())


def test_batches_hold_rows_of_similar_length_within_the_budget_of_tokens() -> None:
    # Padded to multiples of 16: 16, 48, 32, 16, 80; longest first, at most 64 tokens a batch or a single row.
    assert list(_batches([5, 40, 17, 16, 70], 64)) == [[4], [1], [2, 3], [0]]
    assert list(_batches([], 64)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"positive_label": 2}, "positive_label"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"max_tokens": 4096}, "at most 128"),
    ],
)
def test_settings_out_of_range_are_refused(one_label: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(one_label, **settings)
