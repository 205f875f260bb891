"""The training loop: a pure function of its settings, whatever kills it."""

from pathlib import Path

import pytest
import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.fit import FitSettings, fit, rate_factor

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
