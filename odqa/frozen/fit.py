"""The one gradient loop, for every method: it knows tensors, batches and a loss, and nothing about the task.

A run is a pure function of its settings: batch and random state of a step depend on the seed and the step alone, so a
killed run that is started again continues at its last checkpoint and ends with the same bytes as one never killed. That
holds with early stopping too: the best values so far are part of the checkpoint.

Learning rates differ between methods by factors of a thousand: `PRESETS` says where to start, `sweep_rates` compares.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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
    clipped to the norm `clip`. `autocast` runs the forward pass in bfloat16. Checkpoints cost time only, and so do
    evaluations unless `keep_best` names one of their metrics: then the values that were best by it remain, the earlier
    of two equals, and with `patience` > 0 the run ends after so many evaluations in a row without a better one.
    `lower_is_better` says so of that metric (a loss).
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
    keep_best: str | None = None
    lower_is_better: bool = False
    patience: int = 0


@dataclass(frozen=True, slots=True)
class Preset:
    """Where to start with a method: the peak learning rate for AdamW, the schedule, and who says so."""

    learning_rate: float
    schedule: Schedule
    source: str


PRESETS: Mapping[str, Preset] = {
    "prompt-tuning": Preset(
        0.3, "constant", "Lester et al. 2021, section 3: constant, with Adafactor on T5, whose word vectors are large"
    ),
    "deep-prompt": Preset(7e-3, "linear", "scripts of THUDM/P-tuning-v2: 5e-3 to 1e-2"),
    "prefix-tuning": Preset(
        5e-5, "linear", "train_e2e.py of XiangLi1999/PrefixTuning, with the network; without one as for deep-prompt"
    ),
    "lora": Preset(2e-4, "linear", "Hu et al. 2021, appendix D: GPT-2"),
    "adapter": Preset(3e-4, "linear", "Houlsby et al. 2019, section 3.2: the middle one of 3e-5, 3e-4, 3e-3"),
    "id-pt": Preset(3e-3, "linear", "ours; the paper names none, bnitsan/GPT-IDPT has 4e-4"),
    "neural-recursion": Preset(
        3e-3, "linear", "our labs (eval/lab-recursion-hops.yaml); the paper's rate is not known"
    ),
    "calm": Preset(3e-3, "linear", "ours, from eval/lab-calm.yaml; the paper does not say"),
    "fine-tuning": Preset(5e-5, "linear", "Devlin et al. 2019, section A.3: the largest of 2e-5, 3e-5, 5e-5"),
}


@dataclass(slots=True)
class FitResult:
    """What happened: `curve` has one entry every `log_every` steps (step, mean loss in nats, rate, seconds, scores).

    `best` is the entry of the kept values, None without `keep_best`. `warnings` says what looks wrong with the run.
    """

    curve: list[dict[str, Any]]
    seconds: float
    best: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _State:
    """Where a run is: `losses` are those since the last entry of `curve`; `values` are those of the `best` entry;
    `waited` counts evaluations since then."""

    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    best: dict[str, Any] | None = None
    waited: int = 0
    values: dict[str, torch.Tensor] = field(default_factory=dict)


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
    """Train the parameters of `modules` with AdamW; returns when `settings.steps` are done, or patience is at its end.

    `batch_at(i)` makes the i-th batch of the run (i counts micro-batches when gradients are accumulated) and must not
    depend on anything else. `checkpoint` is a file: continued if it is there. Raises DataError when the loss is no
    longer finite (the last checkpoint is kept), or when `evaluate` does not give the metric to keep the best by.
    """
    if settings.keep_best is not None and (evaluate is None or settings.evaluate_every < 1):
        raise DataError(f"training: keep_best is {settings.keep_best}, but nothing is evaluated. Set evaluate_every.")
    trained = {f"{group}.{name}": p for group, module in modules.items() for name, p in module.named_parameters()}
    optimizer = torch.optim.AdamW(
        [
            {"params": list(module.parameters()), "lr": settings.learning_rates[g], "name": g}
            for g, module in modules.items()
        ],
        weight_decay=settings.weight_decay,
    )
    device = next(iter(trained.values())).device
    state = _load_checkpoint(checkpoint, trained, optimizer)
    if state.step:
        log(f"resumed at step {state.step} of {settings.steps}")
    spent, warned = state.seconds, warnings_of(state.curve)
    started = saved_at = time.monotonic()
    bar = Progress("train", settings.steps, "steps")
    bar.advance(state.step)
    while state.step < settings.steps and not _is_out_of_patience(state, settings):
        torch.manual_seed(settings.seed * 1_000_003 + state.step)
        factor = rate_factor(state.step, settings)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rates[group["name"]] * factor
        loss = 0.0
        for micro in range(settings.accumulate):
            batch = batch_at(state.step * settings.accumulate + micro)
            with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
                value = loss_of(batch) / settings.accumulate
            value.backward()  # type: ignore[no-untyped-call]
            loss += value.item()
        if not math.isfinite(loss):
            raise DataError(
                f"training: the loss is {loss} at step {state.step}. Lower the learning rates (now "
                f"{dict(settings.learning_rates)}) and start again; the last checkpoint, {checkpoint}, is from before."
            )
        nn.utils.clip_grad_norm_(list(trained.values()), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state.step += 1
        state.losses.append(loss)
        bar.advance()
        state.seconds = spent + time.monotonic() - started
        is_last = state.step == settings.steps
        due = evaluate is not None and settings.evaluate_every > 0 and state.step % settings.evaluate_every == 0
        if state.step % settings.log_every == 0 or is_last or due:
            entry = {
                "step": state.step,
                "loss": round(sum(state.losses) / len(state.losses), 4),
                "rate": factor,
                "seconds": round(state.seconds, 1),
            }
            if evaluate is not None and (due or is_last):
                entry |= evaluate()
                _keep_best(state, entry, trained, settings)
            state.curve.append(entry)
            log(" ".join(f"{key} {value:.4g}" for key, value in entry.items()))
            for line in warnings_of(state.curve):
                if line not in warned:
                    warned.append(line)
                    log(f"warning: {line}")
            state.losses = []
        is_last = is_last or _is_out_of_patience(state, settings)
        if time.monotonic() - saved_at > settings.checkpoint_seconds or is_last:
            state.seconds = spent + time.monotonic() - started
            _save_checkpoint(checkpoint, trained, optimizer, state)
            saved_at = time.monotonic()
    bar.close()
    if state.best is not None and settings.keep_best is not None:
        log(f"keeping step {state.best['step']}: {settings.keep_best} {state.best[settings.keep_best]:.4g}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(state.values[name])
    return FitResult(state.curve, spent + time.monotonic() - started, state.best, warned)


def warnings_of(curve: Sequence[Mapping[str, Any]]) -> list[str]:
    """What looks wrong with a training so far, in sentences; none for a healthy one.

    A score that is the same to the last digit in three evaluations in a row, and a loss that after at least ten entries
    is not lower than at first: the mean of the last three entries against the first three. The numbers are our choice.
    """
    found = []
    evaluated = [entry for entry in curve if len(entry) > len(_LOGGED)][-3:]
    if len(evaluated) == 3:
        for name in evaluated[-1].keys() - _LOGGED:
            if len({entry.get(name) for entry in evaluated}) == 1:
                found.append(f"{name} has not moved in three evaluations; the learning rate is probably too low.")
    losses = [float(entry["loss"]) for entry in curve]
    if len(losses) >= 10 and sum(losses[-3:]) >= sum(losses[:3]):
        found.append("the loss has not fallen since the start; try other learning rates (sweep_rates).")
    return sorted(found)


_LOGGED = {"step", "loss", "rate", "seconds"}


@dataclass(frozen=True, slots=True)
class Sweep:
    """Scores by learning rate, None for one that diverged, and the `best` rate (the lower of two equals)."""

    scores: Mapping[float, float | None]
    best: float


def rates_around(rate: float, count: int = 5, factor: float = 3.0) -> tuple[float, ...]:
    """`count` learning rates, each `factor` times the one before, `rate` in the middle: 0.1 0.3 0.9. Our choice."""
    return tuple(float(f"{rate * factor ** (place - count // 2):.3g}") for place in range(count))


def sweep_rates(
    train: Callable[[float], float],
    rates: Sequence[float],
    *,
    lower_is_better: bool = False,
    log: Callable[[str], None] = lambda line: None,
) -> Sweep:
    """Train once with each rate and compare: `train(rate)` starts afresh and gives the score on tune questions.

    A rate that diverges (DataError, such as a loss that is not finite) is out; raises DataError if all are.
    """
    scores: dict[float, float | None] = {}
    for rate in sorted(rates):
        try:
            scores[rate] = train(rate)
            log(f"learning rate {rate:g}: {scores[rate]:.4g}")
        except DataError as error:
            scores[rate] = None
            log(f"learning rate {rate:g}: {error}")
    known = {rate: score for rate, score in scores.items() if score is not None and math.isfinite(score)}
    if not known:
        raise DataError(f"training: every learning rate of {sorted(rates)} diverged. Try lower ones.")
    return Sweep(scores, (min if lower_is_better else max)(known, key=lambda rate: known[rate]))


def _keep_best(
    state: _State, entry: dict[str, Any], trained: Mapping[str, nn.Parameter], settings: FitSettings
) -> None:
    name = settings.keep_best
    if name is None:
        return
    if name not in entry:
        raise DataError(
            f"training: keep_best is {name}, but the evaluation gives {', '.join(sorted(entry.keys() - _LOGGED))}."
        )
    sign = -1.0 if settings.lower_is_better else 1.0
    if state.best is None or sign * entry[name] > sign * state.best[name]:
        state.best, state.waited = dict(entry), 0
        state.values = {key: parameter.detach().cpu().clone() for key, parameter in trained.items()}
    else:
        state.waited += 1


def _is_out_of_patience(state: _State, settings: FitSettings) -> bool:
    return settings.keep_best is not None and 0 < settings.patience <= state.waited


def rate_factor(step: int, settings: FitSettings) -> float:
    """The share of the full learning rate at a step: linear warm-up, then linear or cosine to zero, or constant."""
    warmup = max(1, round(settings.warmup * settings.steps))
    if step < warmup:
        return (step + 1) / warmup
    left = (settings.steps - step) / max(1, settings.steps - warmup)
    return {"linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left), "constant": 1.0}[settings.schedule]


def _save_checkpoint(
    path: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, state: _State
) -> None:
    """One safetensors file: values and both AdamW moments of every parameter, and the best values where they are kept.

    Step, seconds, curve, losses and the best entry are in its metadata.
    """
    tensors = {f"best.{name}": tensor for name, tensor in state.values.items()}
    for name, parameter in trained.items():
        tensors[f"value.{name}"] = parameter.detach().cpu().contiguous()
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment].cpu().contiguous()
    described: dict[str, Any] = {name: getattr(state, name) for name in ("step", "seconds", "curve", "losses")}
    if state.best is not None:
        described |= {"best": state.best, "waited": state.waited}
    temporary = path.with_name(f".{path.name}.tmp")
    save_file(tensors, temporary, metadata={"state": json.dumps(described)})
    temporary.replace(path)


def _load_checkpoint(path: Path, trained: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> _State:
    """The state of the checkpoint, whose tensors are put in place; that of a beginning if there is none."""
    if not path.exists():
        return _State()
    with safe_open(path, framework="pt") as file:
        state = _State(**json.loads(file.metadata()["state"]))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(file.get_tensor(f"value.{name}"))
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(state.step)),
                    "exp_avg": file.get_tensor(f"exp_avg.{name}").to(parameter.device),
                    "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}").to(parameter.device),
                }
        if state.best is not None:
            state.values = {name: file.get_tensor(f"best.{name}") for name in trained}
    return state
