"""odqa.read.calibration: a fit that finds known weights, and files that are refused when they do not belong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from odqa.errors import ArtifactError, ArtifactMismatch
from odqa.read.calibration import CALIBRATION, Calibration, fit_calibration, load_calibration

KNOWN = ("odds", "choice")


def drawn(n: int, seed: int = 0) -> tuple[list[dict[str, float]], list[bool]]:
    """Answers that are right with probability sigmoid(2 odds - choice + 0.5)."""
    generator = np.random.default_rng(seed)
    x = generator.normal(0.0, 1.5, (n, 2))
    p = 1 / (1 + np.exp(-(x @ [2.0, -1.0] + 0.5)))
    values = [dict(zip(KNOWN, row, strict=True)) for row in x.tolist()]
    return values, (generator.random(n) < p).tolist()


def test_the_fit_finds_the_weights_that_made_the_data() -> None:
    found = fit_calibration(*drawn(20_000), features=KNOWN, reader="r")
    # Standard errors at this n are about 0.04.
    assert found.weights == pytest.approx((2.0, -1.0), abs=0.12)
    assert found.bias == pytest.approx(0.5, abs=0.1)


def test_the_fit_is_that_of_scikit_learn() -> None:
    linear = pytest.importorskip("sklearn.linear_model", reason="the peer scikit-learn is not installed")
    values, is_right = drawn(3000, seed=2)
    ours = fit_calibration(values, is_right, features=KNOWN, reader="r")
    x = np.array([[row[name] for name in KNOWN] for row in values])
    theirs = linear.LogisticRegression(C=1e6).fit(x, is_right)
    # Ours has a ridge and Platt's targets, which move weights by less than 1% at this n.
    assert ours.weights == pytest.approx(tuple(theirs.coef_[0]), rel=0.01)
    assert ours.bias == pytest.approx(theirs.intercept_[0], abs=0.01)


def test_mean_confidence_is_the_share_of_right_answers() -> None:
    values, is_right = drawn(500, seed=1)
    found = fit_calibration(values, is_right, features=KNOWN, reader="r")
    mean = math.fsum(found.confidence(row) for row in values) / len(values)
    assert mean == pytest.approx(sum(is_right) / len(is_right), abs=0.003)  # Platt's targets pull by 1 / n


def test_the_order_of_answers_and_a_constant_feature_do_not_matter() -> None:
    values, is_right = drawn(200)
    first = fit_calibration(values, is_right, features=KNOWN, reader="r")
    backwards = fit_calibration(values[::-1], is_right[::-1], features=KNOWN, reader="r")
    assert backwards.weights == pytest.approx(first.weights)
    constant = fit_calibration([{**row, "one": 1.0} for row in values], is_right, features=(*KNOWN, "one"), reader="r")
    assert constant.weights == pytest.approx((*first.weights, 0.0))


def test_answers_that_separate_perfectly_get_finite_weights() -> None:
    found = fit_calibration([{"odds": -1.0}, {"odds": 1.0}], [False, True], features=("odds",), reader="r")
    assert math.isfinite(found.weights[0]) and found.confidence({"odds": 1.0}) > 0.5 > found.confidence({"odds": -1.0})


@pytest.mark.parametrize("log_odds", [-1e4, -3.0, 0.0, 3.0, 1e4])
def test_confidence_is_a_probability_at_any_distance(log_odds: float) -> None:
    calibration = Calibration(("odds",), (1.0,), 0.0, "r")
    up, down = calibration.confidence({"odds": log_odds}), calibration.confidence({"odds": -log_odds})
    assert 0 <= up <= 1 and up + down == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("values", "is_right", "message"),
    [
        ([{"odds": 1.0}] * 3, [True] * 3, "3 of 3 are right"),
        ([{"odds": 1.0}, {"odds": math.inf}], [True, False], "finite values"),
    ],
)
def test_what_cannot_be_fitted_is_refused(values: list[dict[str, float]], is_right: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_calibration(values, is_right, features=("odds",), reader="r")


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    calibration = Calibration(KNOWN, (0.25, -1.5), 0.125, "r", {"n": 3})
    calibration.save(tmp_path)
    assert load_calibration(tmp_path, reader="r", known=KNOWN) == calibration
    assert [file.name for file in tmp_path.iterdir()] == [CALIBRATION]


def test_a_folder_without_a_calibration_is_uncalibrated(tmp_path: Path) -> None:
    assert load_calibration(tmp_path, reader="r", known=KNOWN) is None


def test_a_calibration_of_another_reader_is_refused(tmp_path: Path) -> None:
    Calibration(KNOWN, (1.0, 1.0), 0.0, "0123456789").save(tmp_path)
    with pytest.raises(ArtifactMismatch, match="fitted on reader 01234567; the reader here is abcdefgh"):
        load_calibration(tmp_path, reader="abcdefghij", known=KNOWN)


def test_a_feature_that_the_reader_does_not_compute_is_refused(tmp_path: Path) -> None:
    Calibration(("odds", "mood"), (1.0, 1.0), 0.0, "r").save(tmp_path)
    with pytest.raises(ArtifactError, match="uses mood; this version of odqa computes odds, choice"):
        load_calibration(tmp_path, reader="r", known=KNOWN)


@pytest.mark.parametrize(
    "damage",
    [
        lambda record: record.pop("bias"),
        lambda record: record.update(weights=[1.0]),
        lambda record: record.update(bias=math.nan),
        lambda record: record.update(weights=["a", "b"]),
    ],
)
def test_a_damaged_calibration_is_refused(tmp_path: Path, damage: object) -> None:
    file = Calibration(KNOWN, (1.0, 1.0), 0.0, "r").save(tmp_path)
    record = json.loads(file.read_text())
    assert callable(damage)
    damage(record)
    file.write_text(json.dumps(record))
    with pytest.raises(ArtifactError, match=r"calibration.json: not a calibration of a reader"):
        load_calibration(tmp_path, reader="r", known=KNOWN)
