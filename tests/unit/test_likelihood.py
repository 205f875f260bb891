"""Re-ranking by the likelihood of the question on tiny random models: against a plain forward pass, and bad input."""

import logging
import math
from pathlib import Path

import pytest
import torch

from odqa import config
from odqa.errors import DataError, RecipeError
from odqa.recipes import build_reranker
from odqa.rerank.cascade import CascadeReranker
from odqa.rerank.likelihood import QuestionLikelihoodReranker, QuestionScorer
from odqa.runtime import Recent
from odqa.types import Passage, Query
from tests.tiny_models import tiny_bert2bert, tiny_gpt2, tiny_llama, tiny_odqa_mini, tiny_t5
from tests.unit.conformance_read import HITS, QUERIES, RerankerConformance, ranked

MAKERS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "t5": tiny_t5, "bert2bert": tiny_bert2bert}
MAKERS["odqa-mini"] = tiny_odqa_mini


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {name: str(make(folder / name)) for name, make in MAKERS.items()}


@pytest.fixture(params=list(MAKERS))
def model(request: pytest.FixtureRequest, folders: dict[str, str]) -> str:
    return folders[request.param]


def load(model: str, **settings: object) -> QuestionLikelihoodReranker:
    return QuestionLikelihoodReranker(model, **{"device": "cpu", "dtype": "float32", **settings})  # type: ignore[arg-type]


def scorer(reranker: QuestionLikelihoodReranker) -> QuestionScorer:
    assert isinstance(reranker.model, QuestionScorer)
    return reranker.model


class OnTinyModel(RerankerConformance):
    name = ""

    @pytest.fixture(scope="class")
    def reranker(self, folders: dict[str, str]) -> QuestionLikelihoodReranker:
        return load(folders[self.name])


class TestGpt2(OnTinyModel):
    name = "gpt2"


class TestT5(OnTinyModel):
    name = "t5"


class TestBert2Bert(OnTinyModel):
    name = "bert2bert"


class TestLlamaInSmallBatches(RerankerConformance):
    @pytest.fixture(scope="class")
    def reranker(self, folders: dict[str, str]) -> QuestionLikelihoodReranker:
        return load(folders["llama"], batch_tokens=90)


def test_a_score_is_the_mean_logprob_of_the_question_in_a_plain_forward_pass(folders: dict[str, str]) -> None:
    """Each model alone, unpadded, with the text that it reads written out by hand."""
    text = "Passage: paris paris is the capital of france, on the river seine.. Please write a question based on this "
    text += "passage."
    question = "what is the capital of france"
    passage = HITS[0][0].passage
    assert text.startswith(f"Passage: {passage.title} {passage.text}.")
    for name, folder in folders.items():
        reranker = load(folder)
        backbone = scorer(reranker).backbone
        tokenizer = backbone.tokenizer
        prompt = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            if backbone.architecture == "causal":
                whole = tokenizer(f"{text} {question}", return_tensors="pt")["input_ids"]
                wanted = whole[0, prompt.shape[1] :]
                logits = backbone.model(input_ids=whole).logits[0, prompt.shape[1] - 1 : -1]
            else:
                first = 0 if name == "t5" else 1  # [CLS] begins the decoder's text anyhow
                wanted = tokenizer(question, return_tensors="pt")["input_ids"][0, first:]
                start = torch.tensor([backbone.model.config.decoder_start_token_id])
                ahead = torch.cat([start, wanted[:-1]])[None]
                logits = backbone.model(input_ids=prompt, decoder_input_ids=ahead).logits[0]
        expected = logits.log_softmax(-1).gather(1, wanted[:, None]).mean()
        (hits,) = reranker.rerank([Query("q", question)], [ranked(passage)])
        assert hits[0].score == pytest.approx(float(expected), abs=1e-4), name
        assert hits[0].source == "likelihood"


def test_the_passages_change_the_score(model: str) -> None:
    for hits in load(model).rerank(QUERIES[:2], HITS[:2]):
        scores = [hit.score for hit in hits]
        assert max(scores) - min(scores) > 1e-3 and max(scores) <= 0


def test_only_the_first_hits_are_renewed_and_what_they_came_with_may_count(model: str) -> None:
    plain = {hit.passage.id: hit.score for hit in load(model).rerank(QUERIES[:1], HITS[:1])[0]}
    (hits,) = load(model, depth=2, retriever_weight=0.5).rerank(QUERIES[:1], HITS[:1])
    assert {hit.passage.id for hit in hits[:2]} == {"p1", "p2"}
    for hit, old in ((hit, old) for hit in hits[:2] for old in HITS[0] if old.passage is hit.passage):
        assert hit.score == pytest.approx(plain[hit.passage.id] + 0.5 * old.score, abs=1e-4)
    assert hits[2:] == HITS[0][2:]


def test_an_untitled_passage_has_no_title_and_no_gap(folders: dict[str, str]) -> None:
    model = scorer(load(folders["gpt2"]))
    rows, _ = model.encode([(QUERIES[0], Passage("p", "the {river}"))])
    text = "Passage: the {river}. Please write a question based on this passage. what is the capital of france"
    assert model.backbone.tokenizer.decode(rows[0]["input_ids"]) == text


def test_a_long_passage_loses_its_end_and_is_counted(model: str, caplog: pytest.LogCaptureFixture) -> None:
    long = ranked(Passage("p", "the river " * 500))
    reranker = load(model, max_tokens=120)
    with caplog.at_level(logging.WARNING, "odqa.rerank.pairs"):
        (cut,) = reranker.rerank([Query("q", "which river")], [long])
    assert caplog.messages == ["rerank: 1 of 1 passages were cut at 120 tokens"]
    rows, _ = scorer(reranker).encode([(Query("q", "which river"), long[0].passage)])
    is_causal = scorer(reranker).is_causal
    read = len(rows[0]["input_ids"]) - (0 if is_causal else rows[0]["question"][0])
    assert 118 <= read <= 120  # a cut may fall into a token
    assert math.isfinite(cut[0].score) and cut[0].passage == long[0].passage
    tail = "Please write a question based on this passage." + (" which river" if is_causal else "")
    shown = scorer(reranker).backbone.tokenizer.decode(rows[0]["input_ids"][:read], skip_special_tokens=True)
    squeezed = "".join(shown.split()).lower()
    assert squeezed.endswith("".join(tail.split()).lower())


def test_a_question_that_leaves_no_room_names_the_query_and_its_tokens(model: str) -> None:
    with pytest.raises(DataError, match=r"query q-long: the question takes \d+ tokens, .* reads at most (128|256)"):
        load(model).rerank([Query("q-long", "who " * 400)], [HITS[0]])


def test_a_title_that_leaves_no_room_names_query_and_passage(folders: dict[str, str]) -> None:
    with pytest.raises(DataError, match="query q-capital, passage p: its title and the question leave no room"):
        load(folders["t5"]).rerank(QUERIES[:1], [ranked(Passage("p", "text", "the " * 300))])


def test_a_score_that_is_not_a_number_names_query_and_passage(model: str) -> None:
    reranker = load(model)
    for tensor in scorer(reranker).backbone.model.parameters():
        tensor.data.fill_(math.nan)
    with pytest.raises(DataError, match=r"query q-capital, passage p1: .* score nan in float32"):
        reranker.rerank(QUERIES, HITS)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("Write a question.", "does not contain {text}"),
        ("{text} {body}", "{body} is not a field"),
        ("{text", "expected '}'"),
    ],
)
def test_a_prompt_without_text_or_with_unknown_fields_is_refused(prompt: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load("any", prompt=prompt)
    assert told in str(caught.value)


def test_settings_that_no_model_can_serve_are_refused(folders: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=r"max_tokens is 300, but .* at most 256"):
        load(folders["gpt2"], max_tokens=300)
    with pytest.raises(RecipeError, match="reranker likelihood: depth is 0"):
        load(folders["gpt2"], depth=0)
    with pytest.raises(DataError, match="'/nowhere/model' does not load"):
        load("/nowhere/model")


def test_what_is_remembered_is_not_computed_again(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Recent[tuple[str, Passage], float] = Recent(100)
    first = load(folders["gpt2"], memory=memory).rerank(QUERIES, HITS)
    again = load(folders["gpt2"], memory=memory)
    monkeypatch.setattr(QuestionScorer, "scores", lambda *_: pytest.fail("computed again"))
    assert again.rerank(QUERIES, HITS) == first


def test_a_recipe_builds_it_alone_and_in_a_cascade(folders: dict[str, str], tmp_path: Path) -> None:
    settings = config.QuestionLikelihood(
        kind="question-likelihood", model=folders["t5"], depth=3, device="cpu", dtype="float32"
    )
    built = build_reranker(settings)
    assert isinstance(built, QuestionLikelihoodReranker) and built.depth == 3
    assert built.rerank(QUERIES, HITS) == load(folders["t5"], depth=3).rerank(QUERIES, HITS)
    cheap = settings.model_copy(update={"model": folders["gpt2"], "depth": None})
    both = build_reranker(config.Cascade(kind="cascade", stages=(cheap, settings)))
    assert isinstance(both, CascadeReranker)
    (hits,) = both.rerank(QUERIES[:1], HITS[:1])
    assert len(hits) == len(HITS[0])
