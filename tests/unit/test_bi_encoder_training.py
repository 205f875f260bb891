"""Training batches of a bi-encoder, what is left out of them, and a training that learns, on a tiny encoder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from odqa.artifacts import building, load_artifact
from odqa.corpus.examples import Example
from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.frozen.fit import FitSettings
from odqa.frozen.method import create_method
from odqa.retrieve.dense import Encoder, EncoderSettings
from odqa.retrieve.index import Index, build_index
from odqa.retrieve.train import (
    CHECKPOINT,
    Asked,
    BatchSettings,
    BiEncoder,
    ContrastBatches,
    KnownVectors,
    left_out,
    recall_scores,
    train_bi_encoder,
)
from odqa.retrieve.tuned import DESCRIPTION, KIND, Sides, TunedMethod
from odqa.text import has_answer
from odqa.types import Gold, Passage, Query
from tests.small_world import passages, tiny_dpr
from tests.tiny_models import tiny_bert

RIGHT = passages(40)
FIT = FitSettings(4, {"method": 0.01}, autocast=False, log_every=2, checkpoint_seconds=0.0)


def example(number: int, **changes: object) -> Example:
    """A question about a town; the passages of the next towns do not answer it."""
    own = RIGHT[number]
    wrong = tuple(RIGHT[(number + step) % 40] for step in range(1, 6))
    question = f"when was the bridge of {own.title.lower()} built"
    made = Example(str(number), question, (str(1400 + 7 * int(own.id)),), own, (own,), wrong, "towns")
    return replace(made, **changes)  # type: ignore[arg-type]


EXAMPLES = [example(number) for number in range(40)]
ASKED = [Asked(Query(e.id, e.question), Gold(e.id, e.answers), (*e.negatives, e.passage)) for e in EXAMPLES[:20]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EncoderSettings:
    folder = tiny_bert(tmp_path_factory.mktemp("models") / "bert", window=128)
    return EncoderSettings(str(folder), normalize=True, dtype="float32", store_dtype="float32")


@pytest.fixture(scope="module")
def index(settings: EncoderSettings, tmp_path_factory: pytest.TempPathFactory) -> Index:
    return build_index(
        tmp_path_factory.mktemp("index") / "towns", RIGHT, source={}, encoder=settings, device="cpu", part_rows=7
    )


@pytest.fixture(scope="module")
def known(index: Index) -> KnownVectors:
    return KnownVectors(index.store, index.dense.vectors)


def make_model(settings: EncoderSettings, side: Sides = "questions", seed: int = 0) -> BiEncoder:
    encoder = Encoder(settings, device="cpu")
    return BiEncoder(encoder, side, lambda backbone: create_method("lora", backbone, rank=4, alpha=8.0, seed=seed))


@pytest.fixture(scope="module")
def model(settings: EncoderSettings) -> BiEncoder:
    return make_model(settings)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_each_passage_once_and_knows_the_right_ones(model: BiEncoder, known: KnownVectors) -> None:
    batches = ContrastBatches(EXAMPLES, model, BatchSettings(questions=4, hard=2, pool=3), known)
    for number in (0, 11, 4):
        batch = batches(number)
        assert isinstance(batch.passages, torch.Tensor) and batch.own.shape == (4,)
        distinct = np.unique(batch.passages.numpy(), axis=0)
        assert 4 < len(distinct) == len(batch.passages) <= 12
        assert batch.left_out.shape == (4, len(batch.passages))
        assert not batch.left_out[torch.arange(4), batch.own].any()


def test_batches_depend_on_seed_and_number_alone(model: BiEncoder, known: KnownVectors) -> None:
    one, two = (ContrastBatches(EXAMPLES, model, BatchSettings(questions=4, seed=3), known) for _ in range(2))
    _ = two(25)  # a visit to another epoch changes nothing
    for number in (9, 0):
        assert torch.equal(one(number).passages, two(number).passages)  # type: ignore[arg-type]
        assert torch.equal(one(number).own, two(number).own)


def test_a_source_can_count_more_often(model: BiEncoder, known: KnownVectors) -> None:
    mixed = [replace(e, source="rare" if number < 4 else "towns") for number, e in enumerate(EXAMPLES)]
    batches = ContrastBatches(mixed, model, BatchSettings(questions=4, source_weights={"rare": 10}), known)
    assert batches.epochs.per_epoch == (36 + 4 * 10) // 4


def test_examples_whose_passage_the_index_lacks_are_left_out(model: BiEncoder, known: KnownVectors) -> None:
    strange = Passage("nowhere", "A passage of another collection.", "")
    batches = ContrastBatches([example(0, passage=strange), example(1)], model, BatchSettings(questions=2), known)
    assert (batches.left_out, batches.epochs.size) == (1, 1)
    with pytest.raises(DataError, match="no example has an answer and a passage that the index has"):
        ContrastBatches([example(0, passage=strange)], model, BatchSettings(), known)


def test_a_passage_that_is_another_text_in_the_index_is_an_error(model: BiEncoder, known: KnownVectors) -> None:
    other = KnownVectors(known.store, known.searcher)
    with pytest.raises(DataError, match="passage '1' of the training files is another text in the index"):
        ContrastBatches([example(0, passage=Passage("1", "Another text.", ""))], model, BatchSettings(), other)


# --- false negatives --------------------------------------------------------------------------------------------------


def test_what_holds_an_answer_or_is_the_same_passage_is_no_negative() -> None:
    own = Passage("1", "The tower was built in 1887.", "Tower")
    copy = Passage("2", own.text, "Another title")
    right = Passage("3", "No year in here, and yet it is known to be right.", "")
    holder = Passage("4", "In 1887, or so they say.", "")
    inside = Passage("5", "There are 18870 of them.", "")  # the digits, but not the token
    words = Passage("6", "Eiffel built the Gustave tower.", "")  # the words, not side by side
    asked = example(0, passage=own, positives=(own, right), answers=("1887", "Gustave  EIFFEL", " "))
    other = example(1, passage=inside, positives=(inside,), answers=("18870",))
    listed = [own, copy, right, holder, inside, words]
    assert left_out([asked, other], listed).tolist() == [[False, True, True, True, False, False], [False] * 6]


def test_answers_are_found_as_has_answer_finds_them() -> None:
    answers = ["the", "of the", "Déjà vu", "town on the river", "1407", "20 metres high", "metres high.", "x", "  "]
    listed = [*RIGHT, Passage("d", "A déjà vu, of THE-town on the river!", ""), Passage("e", "", "")]
    asked = [example(0, answers=(answer,), positives=(RIGHT[0],)) for answer in answers]
    found = left_out(asked, listed)
    for row, answer in enumerate(answers):
        expected = [has_answer(passage.text, (answer,)) for passage in listed]
        assert found[row, 1:].tolist() == expected[1:]


# --- training ---------------------------------------------------------------------------------------------------------


def run(
    folder: Path,
    model: BiEncoder,
    known: KnownVectors | None,
    *,
    fit: FitSettings = FIT,
    batches: BatchSettings = BatchSettings(questions=8, hard=2),  # noqa: B008
    log: Callable[[str], None] = lambda line: None,
) -> Path:
    with building(folder, KIND, recipe={}, inputs={}, scratch=(CHECKPOINT,)) as draft:
        train_bi_encoder(
            model,
            EXAMPLES,
            {"towns": ASKED},
            draft,
            batches=batches,
            temperature=0.1,
            fit_settings=fit,
            known=known,
            stored=torch.float32,
            log=log,
        )
    return folder


@pytest.mark.parametrize(("side", "points"), [("questions", 20.0), ("passages", 10.0), ("both", 30.0)])
def test_training_lifts_the_right_passage(
    settings: EncoderSettings, known: KnownVectors, tmp_path: Path, side: Sides, points: float
) -> None:
    """By 25, 15 and more than 30 points of recall@1 in 60 steps; a draw among a question's six candidates has 17."""
    model = make_model(settings, side)
    searched = known if side == "questions" else None
    before = recall_scores(model, ASKED, searched)["recall@1"]
    fit = replace(FIT, steps=60, log_every=30, checkpoint_seconds=60.0)
    folder = run(tmp_path / "made", model, searched, fit=fit)
    after = recall_scores(model, ASKED, searched)["recall@1"]
    assert after >= before + points
    made = load_artifact(folder, KIND, verify=True)
    assert set(made.manifest["files"]) == {DESCRIPTION, "curve.json", "method.json", "method.safetensors"}
    entry = json.loads((folder / "curve.json").read_text())[-1]
    assert entry["towns.recall@1"] == entry["tune.recall@1"] == pytest.approx(after, abs=0.05)
    # What was trained is what an encoder computes with, merged into its weights, on the sides that were trained.
    tuned = Encoder(settings, device="cpu", method=folder)
    texts = [one.query.text for one in ASKED]
    np.testing.assert_allclose(tuned.encode_questions(texts), model.encode_questions(texts), atol=1e-5)
    np.testing.assert_allclose(tuned.encode_passages(RIGHT), model.encode_passages(RIGHT), atol=1e-5)
    frozen = Encoder(settings, device="cpu")
    assert np.array_equal(tuned.encode_questions(texts), frozen.encode_questions(texts)) == (side == "passages")
    assert np.array_equal(tuned.encode_passages(RIGHT), frozen.encode_passages(RIGHT)) == (side == "questions")


def test_the_cache_changes_no_gradient(settings: EncoderSettings, tmp_path: Path) -> None:
    """Both sides trained, parts of one text or two against the whole batch at once, three steps."""
    trained = []
    for cache, part_tokens in ((False, 100_000), (True, 64)):
        model = make_model(settings, "both")
        batches = BatchSettings(questions=6, hard=2, cache=cache, part_tokens=part_tokens)
        run(tmp_path / str(cache), model, None, batches=batches, fit=replace(FIT, steps=3))
        trained.append([tensor.detach() for tensor in model.method.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5)  # AdamW divides by gradients near zero


def test_killed_and_resumed_ends_with_the_same_bytes(
    settings: EncoderSettings, known: KnownVectors, tmp_path: Path
) -> None:
    whole = run(tmp_path / "whole", make_model(settings), known)

    def kill(line: str) -> None:
        if line.startswith("step 2 "):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", make_model(settings), known, log=kill)
    lines: list[str] = []
    killed = run(tmp_path / "killed", make_model(settings), known, log=lines.append)
    assert any(line.startswith("resumed at step 1") for line in lines)
    for name in ("method.safetensors", "curve.json", DESCRIPTION):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_two_models_have_no_method_in_common(tmp_path: Path) -> None:
    question, context = tiny_dpr(tmp_path)
    settings = EncoderSettings(str(question), str(context), pooling="pooler", titles="pair", dtype="float32")
    with pytest.raises(DataError, match="a method is for one model"):
        make_model(settings, "both")
    model = make_model(settings, "passages")  # a tower of DPR's classes
    batch = ContrastBatches(EXAMPLES, model, BatchSettings(questions=3), None)(0)
    assert isinstance(batch.questions, torch.Tensor) and not batch.questions.requires_grad
    assert model.vectors(batch.passages, cache=True).requires_grad


# --- the artifact -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(settings: EncoderSettings, known: KnownVectors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("made") / "questions", make_model(settings), known)


def test_a_method_of_another_model_or_of_other_settings_is_refused(
    settings: EncoderSettings, made: Path, tmp_path: Path
) -> None:
    other = tiny_bert(tmp_path / "other", window=128, seed=1)
    with pytest.raises(ArtifactMismatch, match="trained on an encoder of questions with weights"):
        Encoder(replace(settings, question_model=str(other)), device="cpu", method=made).encode_questions(["a"])
    with pytest.raises(ArtifactMismatch, match="pooling 'cls' instead of 'mean'"):
        Encoder(replace(settings, pooling="cls"), device="cpu", method=made).encode_questions(["a"])
    with pytest.raises(ArtifactError, match=r"not a trained bi-encoder \(bi-encoder.json is missing\)"):
        TunedMethod.load(tmp_path)


def test_no_method_is_trained_on_top_of_another(settings: EncoderSettings, made: Path) -> None:
    with pytest.raises(DataError, match="the encoder has a method already"):
        BiEncoder(Encoder(settings, device="cpu", method=made), "questions", lambda backbone: None)  # type: ignore[arg-type, return-value]


def test_an_index_keeps_the_method_that_its_questions_need(
    settings: EncoderSettings, index: Index, made: Path, tmp_path: Path
) -> None:
    tuned = build_index(tmp_path / "tuned", RIGHT, source={}, encoder=settings, method=made, device="cpu")
    assert tuned.artifact.manifest["inputs"]["method"] == TunedMethod.load(made).hash
    texts = [one.query.text for one in ASKED]
    expected = Encoder(settings, device="cpu", method=made).encode_questions(texts)
    assert np.array_equal(tuned.dense.encoder.encode_questions(texts), expected)
    rows = np.arange(40)
    assert np.array_equal(tuned.dense.vectors.take(rows), index.dense.vectors.take(rows))  # passages are frozen
    (tuned.path / "dense/method/method.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"method.safetensors is missing"):
        load_artifact(tuned.path)
