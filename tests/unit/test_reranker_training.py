"""Training groups of the re-ranker, and a training that learns, on a tiny encoder."""

from pathlib import Path

import pytest
import torch

from odqa.artifacts import building, load_artifact
from odqa.corpus.examples import Example
from odqa.errors import DataError
from odqa.frozen.backbone import load_backbone
from odqa.frozen.fit import FitSettings
from odqa.frozen.method import create_method
from odqa.frozen.pairs import PairHead
from odqa.rerank.train import (
    CHECKPOINT,
    KIND,
    GroupSettings,
    LossSettings,
    PairBatches,
    PairModel,
    rank_candidates,
    recall_scores,
    train_reranker,
)
from odqa.types import Gold, Hit, Passage, Query
from tests.small_world import passages
from tests.tiny_models import tiny_bert

RIGHT = passages(40)


def example(number: int, **changes: object) -> Example:
    """A question about a town; the passages of the next towns do not answer it."""
    own = RIGHT[number]
    wrong = tuple(RIGHT[(number + step) % 40] for step in range(1, 6))
    question = f"when was the bridge of {own.title.lower()} built"
    fields: dict[str, object] = {
        "ranking": (wrong[0], own, *wrong[1:]),
        "scores": (6.0, 5.0, 4.0, 3.0, 2.0, 1.0),
        "holds": (False, True, *[False] * 4),
    }
    return Example(str(number), question, ("1",), own, (own,), wrong, "towns", **{**fields, **changes})  # type: ignore[arg-type]


EXAMPLES = [example(number) for number in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert", window=128)


def make_model(folder: Path) -> PairModel:
    backbone = load_backbone(str(folder), "encoder", device="cpu", dtype="float32")
    return PairModel(backbone, create_method("lora", backbone, rank=4, alpha=8.0), PairHead(backbone.width))


@pytest.fixture(scope="module")
def model(folder: Path) -> PairModel:
    return make_model(folder)


def test_a_batch_holds_positives_and_the_hardest_negatives(model: PairModel) -> None:
    batches = PairBatches(EXAMPLES, model.rows, GroupSettings(groups=4, negatives=2, pool=3, parts=2))
    for index in (0, 11, 4):
        batch = batches(index)
        assert batch.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        assert batch.positive.tolist() == [True, False, False] * 4
        assert set(batch.teacher[batch.positive].tolist()) == {5.0}
        assert set(batch.teacher[~batch.positive].tolist()) <= {6.0, 4.0, 3.0}  # the three hardest
        assert sorted(torch.cat(batch.rows).tolist()) == list(range(12))


def test_batches_depend_on_seed_and_number_alone(model: PairModel) -> None:
    settings = GroupSettings(groups=4, seed=3)
    one, two = (PairBatches(EXAMPLES, model.rows, settings) for _ in range(2))
    _ = two(25)  # a visit to another epoch changes nothing
    for index in (9, 0):
        assert torch.equal(one(index).teacher, two(index).teacher)
        assert all(
            torch.equal(a.input_ids, b.input_ids) for a, b in zip(one(index).parts, two(index).parts, strict=True)
        )


def test_scores_come_back_in_the_order_of_the_rows(model: PairModel) -> None:
    batch = PairBatches(EXAMPLES, model.rows, GroupSettings(groups=3, parts=4))(1)
    scores = model.batch_scores(batch)
    for part, rows in zip(batch.parts, batch.rows, strict=True):
        assert torch.allclose(scores[rows], model.scores(part))


def test_several_positives_are_kept_up_to_the_setting(model: PairModel) -> None:
    own = RIGHT[0]
    several = Example("0", "q", ("1",), own, (own, RIGHT[20], RIGHT[30]), EXAMPLES[0].negatives, "towns")
    batch = PairBatches([several], model.rows, GroupSettings(groups=1, positives=2, negatives=1))(0)
    assert batch.positive.tolist() == [True, True, False] and batch.teacher.isnan().all()


def test_examples_without_negatives_are_left_out(model: PairModel) -> None:
    bare = Example("x", "q", ("1",), RIGHT[0], (RIGHT[0],), (), "towns")
    assert PairBatches([bare, EXAMPLES[0]], model.rows, GroupSettings(groups=1)).left_out == 1
    with pytest.raises(DataError, match="no example has a passage that answers and one that does not"):
        PairBatches([bare], model.rows, GroupSettings())


def test_passages_over_the_window_are_not_trained_on(model: PairModel) -> None:
    long = Passage("long", "word " * 200, "t")
    own = RIGHT[0]
    mixed = Example("0", "q", ("1",), own, (own, long), (long, RIGHT[1]), "towns")
    batch = PairBatches([mixed], model.rows, GroupSettings(groups=1))(0)
    assert batch.positive.tolist() == [True, False]


@pytest.mark.parametrize("loss", [LossSettings("listwise"), LossSettings("pointwise")], ids=lambda loss: loss.kind)
def test_training_lifts_the_right_passage(folder: Path, tmp_path: Path, loss: LossSettings) -> None:
    model = make_model(folder)
    hits = [[Hit(p, 0.0, "x") for p in e.ranking] for e in EXAMPLES[:20]]
    tune = [
        (Query(e.id, e.question), Gold(e.id, (e.passage.text.split()[14].rstrip(","),)), found)
        for e, found in zip(EXAMPLES[:20], hits, strict=True)
    ]
    before = recall_scores(model, tune)["recall@1"]
    fit = FitSettings(80, {"method": 0.01, "head": 0.01}, autocast=False, log_every=40)
    with building(tmp_path / "reranker", KIND, recipe={}, inputs={}, scratch=(CHECKPOINT,)) as draft:
        train_reranker(
            model, EXAMPLES, {"towns": tune}, draft, groups=GroupSettings(groups=8), loss=loss, fit_settings=fit
        )
    after = recall_scores(model, tune)["recall@1"]
    assert after >= 80.0 > before + 20.0
    made = load_artifact(tmp_path / "reranker", KIND, verify=True)
    assert set(made.manifest["files"]) == {
        "curve.json", "head.safetensors", "method.json", "method.safetensors", "reranker.json",
    }  # fmt: skip
    ranked = rank_candidates(model, tune[0][0], tune[0][2])
    assert {hit.passage.id for hit in ranked} == {hit.passage.id for hit in hits[0]}
    assert [hit.score for hit in ranked] == sorted((hit.score for hit in ranked), reverse=True)


def test_distillation_follows_the_teacher_where_labels_say_nothing(folder: Path, tmp_path: Path) -> None:
    """The teacher's order of the negatives is learned; labels alone do not give it."""
    model = make_model(folder)
    fit = FitSettings(60, {"method": 0.01, "head": 0.01}, autocast=False, log_every=30)
    groups, loss = GroupSettings(groups=4), LossSettings("listwise", distillation=5.0)
    one = [EXAMPLES[0]]
    with building(tmp_path / "reranker", KIND, recipe={}, inputs={}, scratch=(CHECKPOINT,)) as draft:
        train_reranker(model, one, {}, draft, groups=groups, loss=loss, fit_settings=fit)
    ranked = rank_candidates(model, Query("0", one[0].question), [Hit(p, 0.0, "x") for p in one[0].ranking])
    order = [hit.passage.id for hit in ranked]
    assert order[:2] == [
        p.id for p in one[0].ranking[:2]
    ]  # the teacher's first, which is no positive, and the positive
