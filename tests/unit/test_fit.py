"""The training loop: a pure function of its settings, whatever kills it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from odqa.errors import DataError
from odqa.frozen.fit import PRESETS, FitResult, FitSettings, fit, rate_factor, rates_around, sweep_rates, warnings_of

SETTINGS = FitSettings(steps=12, learning_rates={"map": 0.05}, autocast=False, checkpoint_seconds=0.0, log_every=4)
TRUTH = torch.tensor([[1.0, -2.0, 0.5]])


def batch_at(index: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(index))
    return x, x @ TRUTH.T


def train(folder: Path, settings: FitSettings = SETTINGS, killed_at: int | None = None) -> nn.Linear:
    """A linear map fitted to TRUTH, with dropout so that random state matters; `killed_at` raises in that batch."""
    torch.manual_seed(0)
    linear = nn.Linear(3, 1)

    def get(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == killed_at:
            raise KeyboardInterrupt
        return batch_at(index)

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        x, y = batch
        return (linear(nn.functional.dropout(x, 0.2)) - y).square().mean()

    fit({"map": linear}, get, loss, settings, checkpoint=folder / "checkpoint.safetensors")
    return linear


@pytest.mark.parametrize("killed_at", [0, 1, 5, 11])
def test_killed_and_resumed_ends_with_the_same_bytes(tmp_path: Path, killed_at: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected = train(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", killed_at=killed_at)
    resumed = train(tmp_path / "b")
    assert torch.equal(resumed.weight, expected.weight) and torch.equal(resumed.bias, expected.bias)


def test_learns(tmp_path: Path) -> None:
    longer = FitSettings(steps=600, learning_rates={"map": 0.02}, autocast=False)
    linear = train(tmp_path, longer)
    # Dropout of rate p on independent unit inputs is a ridge: the best weights are (1 - p) times the true ones.
    torch.testing.assert_close(linear.weight.detach(), 0.8 * TRUTH, atol=0.2, rtol=0)


def test_accumulated_micro_batches_are_one_batch(tmp_path: Path) -> None:
    """Two micro-batches of 8 give the gradient of one batch of 16 (a mean loss, no dropout)."""
    results = []
    for name, accumulate in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        torch.manual_seed(0)
        linear = nn.Linear(3, 1)

        def get(index: int, whole: bool = accumulate == 1) -> tuple[torch.Tensor, torch.Tensor]:
            if not whole:
                return batch_at(index)
            pairs = [batch_at(2 * index), batch_at(2 * index + 1)]
            return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])

        def loss(batch: tuple[torch.Tensor, torch.Tensor], model: nn.Linear = linear) -> torch.Tensor:
            return (model(batch[0]) - batch[1]).square().mean()

        settings = FitSettings(steps=3, learning_rates={"map": 0.05}, accumulate=accumulate, autocast=False)
        fit({"map": linear}, get, loss, settings, checkpoint=tmp_path / name / "c.safetensors")
        results.append(linear.weight.detach())
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=0)


def test_a_loss_that_is_not_finite_stops_with_one_line_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    linear = nn.Linear(3, 1)

    def loss(batch: int) -> torch.Tensor:
        value = linear(torch.ones(1, 3)).sum()
        return value * float("nan") if batch == 3 else value

    with pytest.raises(DataError, match=r"loss is nan at step 3.*learning rates"):
        fit({"map": linear}, lambda index: index, loss, SETTINGS, checkpoint=tmp_path / "c.safetensors")
    assert (tmp_path / "c.safetensors").exists()


def test_rates_warm_up_and_come_down() -> None:
    settings = FitSettings(steps=100, learning_rates={}, warmup=0.1)
    assert rate_factor(0, settings) == 0.1  # the first of 10 warm-up steps
    assert rate_factor(9, settings) == 1.0
    assert rate_factor(55, settings) == pytest.approx(0.5)  # half of the 90 steps after warm-up are left
    assert rate_factor(99, settings) == pytest.approx(1 / 90)


# --- keeping the best, warnings, sweeps -------------------------------------------------------------------------------

SCORES = {2: 10.0, 4: 30.0, 6: 20.0, 8: 30.0, 10: 25.0, 12: 40.0}  # by step; the last comes too late for patience 3


def train_and_keep(folder: Path, *, killed_at: int | None = None, **changes: Any) -> tuple[nn.Linear, FitResult]:
    torch.manual_seed(0)
    linear, steps = nn.Linear(3, 1), 0

    def get(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal steps
        if index == killed_at:
            raise KeyboardInterrupt
        steps = index + 1
        return batch_at(index)

    settings = replace(SETTINGS, **{"evaluate_every": 2, "keep_best": "em", "patience": 3, **changes})
    result = fit(
        {"map": linear},
        get,
        lambda batch: (linear(batch[0]) - batch[1]).square().mean(),
        settings,
        checkpoint=folder / "checkpoint.safetensors",
        evaluate=lambda: {"em": SCORES[steps]},
    )
    return linear, result


def test_the_best_values_are_kept_and_patience_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    linear, result = train_and_keep(tmp_path / "a", schedule="constant", warmup=0.0)
    # Best at step 4; 6, 8 (equal is not better) and 10 bring nothing.
    assert result.best is not None and (result.best["step"], result.best["em"]) == (4, 30.0)
    assert result.curve[-1]["step"] == 10
    until_then, _ = train_and_keep(tmp_path / "b", steps=4, schedule="constant", warmup=0.0, keep_best=None)
    assert torch.equal(linear.weight, until_then.weight)


@pytest.mark.parametrize("killed_at", [5, 9])
def test_a_killed_run_knows_its_best_values_again(tmp_path: Path, killed_at: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected, whole = train_and_keep(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        train_and_keep(tmp_path / "b", killed_at=killed_at)
    resumed, result = train_and_keep(tmp_path / "b")
    assert torch.equal(resumed.weight, expected.weight) and result.best is not None and whole.best is not None
    assert result.best["step"] == whole.best["step"]
    again, _ = train_and_keep(tmp_path / "b")  # after its end: nothing is trained, the best values come back
    assert torch.equal(again.weight, expected.weight)


def test_a_lower_loss_can_be_the_better_one(tmp_path: Path) -> None:
    _, result = train_and_keep(tmp_path, lower_is_better=True)
    assert result.best is not None and result.best["step"] == 2


def test_a_metric_that_is_not_measured_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="keep_best is f1, but the evaluation gives em"):
        train_and_keep(tmp_path, keep_best="f1")
    with pytest.raises(DataError, match="nothing is evaluated"):
        train_and_keep(tmp_path, evaluate_every=0)


def test_without_keep_best_a_checkpoint_is_what_it_was(tmp_path: Path) -> None:
    train(tmp_path)
    with safe_open(tmp_path / "checkpoint.safetensors", framework="pt") as file:
        names = {name.split(".")[0] for name in file.keys()}  # noqa: SIM118
        assert names == {"value", "exp_avg", "exp_avg_sq"}
        assert list(json.loads(file.metadata()["state"])) == ["step", "seconds", "curve", "losses"]


def entries(losses: list[float], **scores: float) -> list[dict[str, float]]:
    return [{"step": i, "loss": loss, "rate": 1.0, "seconds": 0.0, **scores} for i, loss in enumerate(losses)]


def test_a_plateau_is_told() -> None:
    falling = [3.0 - 0.1 * step for step in range(12)]
    assert warnings_of(entries(falling)) == []
    assert warnings_of(entries(falling[:3], em=1.5)) == [
        "em has not moved in three evaluations; the learning rate is probably too low."
    ]
    assert warnings_of([*entries(falling[:2], em=1.5), *entries([2.0], em=1.6)]) == []
    assert "the loss has not fallen since the start" in warnings_of(entries([2.0] * 10))[0]


def test_a_sweep_takes_the_best_rate_and_survives_one_that_diverges() -> None:
    def score(rate: float) -> float:
        if rate > 1:
            raise DataError("the loss is nan")
        return {0.1: 20.0, 0.3: 30.0, 0.9: 30.0}[rate]

    sweep = sweep_rates(score, [2.7, 0.9, 0.3, 0.1])
    assert sweep.best == 0.3 and sweep.scores == {0.1: 20.0, 0.3: 30.0, 0.9: 30.0, 2.7: None}
    assert sweep_rates(score, [0.1, 0.3], lower_is_better=True).best == 0.1
    with pytest.raises(DataError, match=r"every learning rate of \[2\.7, 8\.1\] diverged"):
        sweep_rates(score, [8.1, 2.7])


def test_rates_around_a_preset() -> None:
    assert rates_around(0.3, 3) == (0.1, 0.3, 0.9)
    assert rates_around(2e-4, 5) == (2.22e-5, 6.67e-5, 2e-4, 6e-4, 1.8e-3)
    soft = {"prompt-tuning", "deep-prompt", "prefix-tuning"}
    assert set(PRESETS) == soft | {"lora", "adapter", "id-pt", "neural-recursion", "calm", "fine-tuning"}
