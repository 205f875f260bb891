"""The one gradient loop, for every method: it knows tensors, batches and a loss, and nothing about the task.

A run is a pure function of its settings: batch and random state of a step depend on the seed and the step alone, so a
killed run that is started again continues at its last checkpoint and ends with the same bytes as one never killed.
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from odqa.errors import DataError
from odqa.runtime import Progress

Batch = TypeVar("Batch")
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How long and how fast to train.

    `learning_rates` has one entry a group of modules given to `fit`. `warmup` is a share of `steps`. Gradients are
    clipped to the norm `clip`. `autocast` runs the forward pass in bfloat16. Evaluation and checkpoints cost time only:
    they change no result.
    """

    steps: int
    learning_rates: Mapping[str, float]
    warmup: float = 0.05
    schedule: Schedule = "linear"
    weight_decay: float = 0.0
    clip: float = 1.0
    accumulate: int = 1
    autocast: bool = True
    seed: int = 0
    evaluate_every: int = 0
    checkpoint_seconds: float = 120.0
    log_every: int = 20


@dataclass(slots=True)
class FitResult:
    """What happened: `curve` has one entry every `log_every` steps (step, mean loss in nats, rate, seconds, scores)."""

    curve: list[dict[str, Any]]
    seconds: float


def fit(
    modules: Mapping[str, nn.Module],
    batch_at: Callable[[int], Batch],
    loss_of: Callable[[Batch], torch.Tensor],
    settings: FitSettings,
    *,
    checkpoint: Path,
    evaluate: Callable[[], dict[str, float]] | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> FitResult:
    """Train the parameters of `modules` with AdamW; returns when `settings.steps` are done.

    `batch_at(i)` makes the i-th batch of the run (i counts micro-batches when gradients are accumulated) and must not
    depend on anything else. `checkpoint` is a file: continued if it is there. Raises DataError when the loss is no
    longer finite; the last checkpoint is kept.
    """
    trained = {f"{group}.{name}": p for group, module in modules.items() for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": list(module.parameters()), "lr": settings.learning_rates[g], "name": g}
            for g, module in modules.items()
        ],
        weight_decay=settings.weight_decay,
    )
    device = next(iter(trained.values())).device
    step, spent, curve, losses = _load_checkpoint(checkpoint, trained, optimizer)
    if step:
        log(f"resumed at step {step} of {settings.steps}")
    started = saved_at = time.monotonic()
    bar = Progress("train", settings.steps, "steps")
    bar.advance(step)
    while step < settings.steps:
        torch.manual_seed(settings.seed * 1_000_003 + step)
        factor = rate_factor(step, settings)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rates[group["name"]] * factor
        loss = 0.0
        for micro in range(settings.accumulate):
            batch = batch_at(step * settings.accumulate + micro)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
                value = loss_of(batch) / settings.accumulate
            value.backward()  # type: ignore[no-untyped-call]
            loss += value.item()
        if not math.isfinite(loss):
            raise DataError(
                f"training: the loss is {loss} at step {step}. Lower the learning rates (now "
                f"{dict(settings.learning_rates)}) and start again; the last checkpoint, {checkpoint}, is from before."
            )
        nn.utils.clip_grad_norm_(list(trained.values()), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        losses.append(loss)
        bar.advance()
        seconds = spent + time.monotonic() - started
        due = evaluate is not None and settings.evaluate_every > 0 and step % settings.evaluate_every == 0
        if step % settings.log_every == 0 or step == settings.steps or due:
            entry = {
                "step": step,
                "loss": round(sum(losses) / len(losses), 4),
                "rate": factor,
                "seconds": round(seconds, 1),
            }
            if evaluate is not None and (due or step == settings.steps):
                entry |= evaluate()
            curve.append(entry)
            log(" ".join(f"{key} {value:.4g}" for key, value in entry.items()))
            losses = []
        if time.monotonic() - saved_at > settings.checkpoint_seconds or step == settings.steps:
            _save_checkpoint(checkpoint, trained, optimizer, step, spent + time.monotonic() - started, curve, losses)
            saved_at = time.monotonic()
    bar.close()
    return FitResult(curve, spent + time.monotonic() - started)


def rate_factor(step: int, settings: FitSettings) -> float:
    """The share of the full learning rate at a step: linear warm-up, then linear or cosine to zero, or constant."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    left = (settings.steps - step) / max(1, settings.steps - warmup)
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[settings.schedule]


def _save_checkpoint(
    path: Path,
    trained: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    curve: list[dict[str, Any]],
    losses: list[float],
) -> None:
    """One safetensors file: values and both AdamW moments of every parameter; step, curve, losses in its metadata.

    `losses` are those since the last entry of the curve.
    """
    tensors = {}
    for name, parameter in trained.items():
        tensors[f"value.{name}"] = parameter.detach().cpu().contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    state = {"step": step, "seconds": seconds, "curve": curve, "losses": losses}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"state": json.dumps(state)})
    temporary.replace(path)


def _load_checkpoint(
    path: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, float, list[dict[str, Any]], list[float]]:
    """Step, seconds, curve and losses of the checkpoint, whose tensors are put in place; zeros if there is none."""
    if not path.exists():
        return 0, 0.0, [], []
    with safe_open(path, framework="pt") as file:
        state = json.loads(file.metadata()["state"])
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(file.get_tensor(f"value.{name}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(state["step"])),
                    "exp_avg": file.get_tensor(f"exp_avg.{name}").to(parameter.device),
                    "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}").to(parameter.device),
                }
    return state["step"], state["seconds"], state["curve"], state["losses"]
