"""The cross-encoder re-ranker on tiny random models: against sentence-transformers, and the artifacts of training."""

import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from odqa import config
from odqa.artifacts import building
from odqa.errors import ArtifactError, ArtifactMismatch, DataError, RecipeError
from odqa.frozen.backbone import load_backbone
from odqa.frozen.method import create_method
from odqa.frozen.pairs import PairHead
from odqa.recipes import build_packer, build_reranker
from odqa.rerank.cascade import CascadeReranker
from odqa.rerank.cross import CrossEncoderReranker
from odqa.rerank.models import HubModel, TrainedModel, export_classifier
from odqa.rerank.train import PairModel, rank_candidates, save_reranker
from odqa.runtime import Recent
from odqa.sentences import split_sentences
from odqa.types import Hit, Passage, Query
from tests.tiny_models import tiny_bert, tiny_cross_encoder
from tests.unit.conformance_read import HITS, QUERIES, RerankerConformance, ranked
from tests.unit.test_pack import WordReader


@pytest.fixture(scope="module")
def one_label(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "one", 1))


@pytest.fixture(scope="module")
def two_labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_cross_encoder(tmp_path_factory.mktemp("cross") / "two", 2))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_bert(tmp_path_factory.mktemp("bert") / "bert"))


METHODS = {"lora": {"rank": 4, "alpha": 8.0}, "deep-prompt": {"length": 3}, "fine-tuning": {"skip": ["pooler"]}}


def pair_model(bert: str, kind: str = "lora") -> PairModel:
    """A re-ranker as training has it, the method attached and every trained value moved."""
    backbone = load_backbone(bert, "encoder", device="cpu", dtype="float32")
    model = PairModel(backbone, create_method(kind, backbone, **METHODS[kind]), PairHead(backbone.width))
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.method.parameters(), *model.head.parameters()):
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


def save_artifact(folder: Path, model: PairModel) -> str:
    with building(folder, "reranker", recipe={}, inputs={}) as draft:
        save_reranker(draft.path, model, dtype=torch.float32)
    return str(folder)


@pytest.fixture(scope="module")
def artifact(bert: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_artifact(tmp_path_factory.mktemp("artifacts") / "reranker", pair_model(bert))


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


class TestTrainedArtifact(RerankerConformance):
    @pytest.fixture(scope="class")
    def reranker(self, artifact: str) -> CrossEncoderReranker:
        return load(artifact)


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
    with caplog.at_level(logging.WARNING, "odqa.rerank.pairs"):
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
    assert isinstance(reranker.model, HubModel)
    reranker.model.model.classifier.bias.data.fill_(math.nan)
    with pytest.raises(DataError, match=r"query q-capital, passage p1: .* score nan in float32"):
        reranker.rerank(QUERIES, HITS)


def test_bfloat16_keeps_the_last_layer_in_float32(one_label: str) -> None:
    reranker = load(one_label, dtype="bfloat16")
    assert isinstance(reranker.model, HubModel)
    assert reranker.model.dtype == torch.bfloat16
    assert reranker.model.model.classifier.weight.dtype == torch.float32
    assert reranker.model.model.bert.encoder.layer[0].output.dense.weight.dtype == torch.bfloat16
    exact = {hit.passage.id: hit.score for hit in load(one_label).rerank(QUERIES[:1], HITS[:1])[0]}
    for hit in reranker.rerank(QUERIES[:1], HITS[:1])[0]:
        # Activations of 8 significant bits through two layers: within a few percent of the scores' range (about 4).
        assert hit.score == pytest.approx(exact[hit.passage.id], abs=0.3)
        assert hit.score != float(torch.tensor(hit.score).bfloat16())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0}, "depth"),
        ({"positive_label": 2}, "positive_label"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"max_tokens": 4096}, "at most 128"),
        ({"retriever_weight": -0.5}, "retriever_weight"),
        ({"retriever_weight": math.nan}, "retriever_weight"),
    ],
)
def test_settings_out_of_range_are_refused(one_label: str, settings: dict[str, int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(one_label, **settings)


# --- the scores that hits come with -----------------------------------------------------------------------------------


def test_the_retriever_weight_adds_its_share_of_the_incoming_score(one_label: str) -> None:
    plain = {hit.passage.id: hit.score for hit in load(one_label).rerank(QUERIES[:1], HITS[:1])[0]}
    incoming = {hit.passage.id: hit.score for hit in HITS[0]}
    (mixed,) = load(one_label, retriever_weight=0.5).rerank(QUERIES[:1], HITS[:1])
    assert {hit.passage.id: hit.score for hit in mixed} == pytest.approx(
        {name: plain[name] + 0.5 * incoming[name] for name in plain}, abs=1e-5
    )
    assert [hit.score for hit in mixed] == sorted((hit.score for hit in mixed), reverse=True)
    (overruled,) = load(one_label, retriever_weight=1e6).rerank(QUERIES[:1], HITS[:1])
    assert [hit.passage.id for hit in overruled] == [hit.passage.id for hit in HITS[0]]


def test_a_pair_by_itself_has_the_models_score_alone(one_label: str) -> None:
    (ranking,) = load(one_label).rerank(QUERIES[:1], HITS[:1])
    other = load(one_label, depth=1, retriever_weight=5)
    scores = other.score_pairs([(QUERIES[0], hit.passage) for hit in HITS[0]])
    names = [hit.passage.id for hit in HITS[0]]
    assert dict(zip(names, scores, strict=True)) == {hit.passage.id: hit.score for hit in ranking}
    assert other.score_pairs([]) == []


def test_a_packer_that_trims_by_the_reranker_keeps_the_sentence_that_it_scores_highest(one_label: str) -> None:
    reranker = load(one_label)
    settings = config.PackerSettings(budget=20, trim=config.TrimSettings(sentences=1, by="reranker"))
    whole = Passage("p", "the river is long. paris is old. the king was born in france.", "rome")
    sentences = [replace(whole, text=text) for text in split_sentences(whole.text)]
    scores = reranker.score_pairs([(QUERIES[2], sentence) for sentence in sentences])
    best = sentences[scores.index(max(scores))]
    for given in (reranker, CascadeReranker([load(one_label, depth=5), reranker])):
        (context,) = build_packer(settings, WordReader(), given).pack(QUERIES[2:], [ranked(whole)])
        assert [hit.passage for hit in context.hits] == [best]


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_an_incoming_score_that_is_not_finite_counts_only_at_weight_zero(one_label: str, score: float) -> None:
    hits = [HITS[0][0], Hit(HITS[0][1].passage, score, "elsewhere")]
    with pytest.raises(DataError, match=r"query q-capital, passage p2: it comes from 'elsewhere' with the score"):
        load(one_label, retriever_weight=0.1).rerank(QUERIES[:1], [hits])
    assert all(math.isfinite(hit.score) for hit in load(one_label).rerank(QUERIES[:1], [hits])[0])


# --- what odqa train made ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_an_artifact_scores_as_its_model_did_in_training(bert: str, kind: str, tmp_path: Path) -> None:
    model = pair_model(bert, kind)
    loaded = load(save_artifact(tmp_path / "artifact", model))
    for query, hits, ranking in zip(QUERIES, HITS, loaded.rerank(QUERIES, HITS), strict=True):
        expected = rank_candidates(model, query, hits)  # LoRA attached, and all tokens in all layers
        assert [hit.passage for hit in ranking] == [hit.passage for hit in expected]
        # Merging sums W and B A before the product and not after: float32 rounds elsewhere.
        assert [hit.score for hit in ranking] == pytest.approx([hit.score for hit in expected], abs=1e-4)


def test_lora_is_merged_and_only_the_first_token_leaves_the_last_layer(artifact: str) -> None:
    model = load(artifact).model
    assert isinstance(model, TrainedModel)
    hooks = [module for module in model.backbone.model.modules() if module._forward_hooks]
    assert hooks == []
    ids = torch.arange(10, 30).reshape(2, 10)
    states = model.backbone.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert states.shape == (2, 1, 32)


def test_an_artifact_computes_in_bfloat16_and_scores_in_float32(artifact: str) -> None:
    exact = {hit.passage.id: hit.score for hit in load(artifact).rerank(QUERIES[:1], HITS[:1])[0]}
    reranker = load(artifact, dtype="bfloat16")
    assert reranker.model.dtype == torch.bfloat16
    for hit in reranker.rerank(QUERIES[:1], HITS[:1])[0]:
        # Activations of 8 significant bits through two layers, against a range of the scores of about 5.
        assert hit.score == pytest.approx(exact[hit.passage.id], abs=0.4)
        assert hit.score != float(torch.tensor(hit.score).bfloat16())


def test_the_recipe_kind_takes_an_artifact_by_its_folder(artifact: str) -> None:
    settings = config.CrossEncoder(kind="cross-encoder", model=artifact, device="cpu", dtype="float32")
    reranker = build_reranker(settings)
    assert reranker is not None
    assert reranker.rerank(QUERIES, HITS) == load(artifact).rerank(QUERIES, HITS)


def test_an_embedded_name_that_is_not_there_says_where_it_was_looked_for() -> None:
    with pytest.raises(DataError, match=r"embedded:no-such-reranker: no such file \(.*assets/no-such-reranker\)"):
        build_reranker(config.CrossEncoder(kind="cross-encoder", model="embedded:no-such-reranker"))


def test_an_artifact_cuts_the_end_of_a_long_passage_and_counts_it(
    artifact: str, caplog: pytest.LogCaptureFixture
) -> None:
    # The question has 6 tokens, [CLS] and three [SEP] are 4, the title 1: of 20 they leave 9 words of the text.
    query = Query("q", "what is the capital of france")
    long = Passage("p", "the river " * 50, "rome")
    with caplog.at_level(logging.WARNING, "odqa.rerank.pairs"):
        (cut,) = load(artifact, max_tokens=20).rerank([query], [ranked(long)])
    assert caplog.messages == ["rerank: 1 of 1 passages were cut at 20 tokens"]
    (whole,) = load(artifact).rerank([query], [ranked(Passage("p", " ".join(["the river"] * 4 + ["the"]), "rome"))])
    assert cut[0].score == pytest.approx(whole[0].score, abs=1e-5)
    assert cut[0].passage == long


def test_an_artifact_refuses_a_question_that_leaves_no_room(artifact: str) -> None:
    with pytest.raises(DataError, match=r"query q-long: the question takes 200 tokens, .* at most 128"):
        load(artifact).rerank([Query("q-long", "who " * 200)], [HITS[0]])
    # 16 words and 4 special tokens fill 20; 15 leave one for the passage.
    with pytest.raises(DataError, match="the question takes 16 tokens"):
        load(artifact, max_tokens=20).rerank([Query("q", "who " * 16)], [HITS[0]])
    assert len(load(artifact, max_tokens=20).rerank([Query("q", "who " * 15)], [HITS[0]])[0]) == len(HITS[0])


def test_an_artifact_whose_scores_are_not_numbers_names_query_and_passage(artifact: str) -> None:
    reranker = load(artifact)
    assert isinstance(reranker.model, TrainedModel)
    reranker.model.head.bias.data.fill_(math.nan)
    with pytest.raises(DataError, match=r"query q-capital, passage p1: .* score nan in float32"):
        reranker.rerank(QUERIES, HITS)


def test_a_folder_that_is_no_model_at_all_says_what_is_expected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(DataError, match=r"neither a model for transformers \(config.json\) nor a trained") as caught:
        load(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_artifact_of_another_kind_is_refused(tmp_path: Path) -> None:
    with building(tmp_path / "index", "index", recipe={}, inputs={}) as draft:
        draft.write_json("some.json", {})
    with pytest.raises(ArtifactMismatch, match="an artifact of kind 'index'; 'reranker' is needed"):
        load(str(tmp_path / "index"))


def test_an_artifact_of_another_backbone_is_refused(bert: str, tmp_path: Path) -> None:
    model = pair_model(bert)
    model.backbone.name = str(tiny_bert(tmp_path / "other", seed=7))
    folder = save_artifact(tmp_path / "artifact", model)
    with pytest.raises(ArtifactMismatch, match=r"lora was trained on backbone .* Use that backbone or train"):
        load(folder)


def test_a_head_of_another_width_is_refused(bert: str, tmp_path: Path) -> None:
    with building(tmp_path / "artifact", "reranker", recipe={}, inputs={}) as draft:
        save_reranker(draft.path, pair_model(bert))
        save_file({"weight": torch.zeros(7), "bias": torch.zeros(1)}, draft.path / "head.safetensors")
    with pytest.raises(ArtifactError, match=r"head.safetensors: weight has shape \(7,\), expected \(32,\)"):
        load(str(tmp_path / "artifact"))


def test_a_damaged_artifact_is_refused(artifact: str, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for file in Path(artifact).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "head.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"head.safetensors is missing"):
        load(str(folder))


def test_an_exported_artifact_gives_sentence_transformers_the_same_scores(artifact: str, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    export_classifier(Path(artifact), tmp_path / "exported")
    peer = CrossEncoder(str(tmp_path / "exported"), device="cpu")
    for query, hits in zip(QUERIES, load(artifact).rerank(QUERIES, HITS), strict=True):
        pairs = [(query.text, f"{hit.passage.title} [SEP] {hit.passage.text}") for hit in hits]
        expected = peer.predict(pairs, activation_fn=torch.nn.Identity())
        # tanh bends states of up to 3 by 3e-6; scores are up to 5.
        assert [hit.score for hit in hits] == pytest.approx(expected.tolist(), abs=1e-4)


def test_only_lora_on_a_bert_is_exported(bert: str, tmp_path: Path) -> None:
    artifact = save_artifact(tmp_path / "artifact", pair_model(bert, "deep-prompt"))
    with pytest.raises(DataError, match=r"deep-prompt on .* cannot be exported"):
        export_classifier(Path(artifact), tmp_path / "exported")


def test_an_artifact_takes_no_options_of_another_loader(artifact: str) -> None:
    with pytest.raises(RecipeError, match="is a trained re-ranker; it takes no device_map"):
        load(artifact, device_map="auto")


def test_a_remembered_pair_is_not_scored_again(one_label: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Recent[tuple[str, Passage], float] = Recent(100)
    first = load(one_label, memory=memory).rerank(QUERIES, HITS)
    assert first == load(one_label).rerank(QUERIES, HITS) and memory
    second = load(one_label, memory=memory, depth=1)
    monkeypatch.setattr(type(second.model), "scores", lambda *_: pytest.fail("a pair was scored again"))
    scores = {(query.id, hit.passage.id): hit.score for query, hits in zip(QUERIES, first, strict=True) for hit in hits}
    for query, hits in zip(QUERIES, second.rerank(QUERIES, HITS), strict=True):
        assert [scores[query.id, hit.passage.id] for hit in hits[:1]] == [hit.score for hit in hits[:1]]
