"""One frozen model, many tasks that only their wording tells apart: one prompt, one a text, one a task, or all weights?

Small tasks made from passages and questions (`odqa.lm.records`), each worded by several templates; no word names the
task, and the model was pre-trained on three of them only, under other instructions. Tests are worded by templates and
made from articles that no training sees; one task is held out whole. An answer is right if it is an exact match.

| arm | what is learned |
| --- | --- |
| frozen model | nothing |
| static prompt | one soft prompt (Lester et al. 2021) |
| id-pt | a prompt made from each text by a frozen encoder and a small network (Levine et al. 2022, arXiv 2204.10019) |
| prompt per task | a soft prompt a task, and somebody who says which task a text is: not to be had, an upper bound |
| fine-tuning | all weights: instruction tuning, the multitask baseline |

All arms see as many items in all. The claim, section 2 and figure 3 of Levine et al.: ID-PT is near fine-tuning on
many tasks, and needs half of the examples. They have it at 7 billion weights and on T0's mixture; does it hold for a
model of 36 million? The answer says something only where a prompt per task beats one for all clearly.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from odqa.config.labs import TasksLab
from odqa.frozen.finetuning import FineTuning
from odqa.frozen.fit import FitSettings
from odqa.frozen.idpt import InputPrompt
from odqa.frozen.method import Method
from odqa.frozen.prompt_tuning import PromptTuning
from odqa.labs.outcome import Outcome
from odqa.labs.runner import Desk
from odqa.lm.mixture import Exam, ItemBatches, encoder_of, train_on_mixture
from odqa.read.lm import load_lm
from odqa.runtime import has_fast_bf16
from odqa.training import MixtureSetup

ALL, NEW = "trained tasks", "new task"
ORACLE = "prompt per task"
EXAM, CURVE = 1_000_003, 2_000_003  # seeds of test items: not of the trainings'


def run(settings: TasksLab, seed: int, desk: Desk) -> Outcome:
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        return _Lab(settings, seed, desk, Path(folder)).outcome()


class _Lab:
    """What all arms share."""

    def __init__(self, settings: TasksLab, seed: int, desk: Desk, folder: Path) -> None:
        self.settings, self.seed, self.desk, self.folder = settings, seed, desk, folder
        self.setup = MixtureSetup(settings.mixture, desk.places)
        # Eager attention: its backward pass is faster than the fused one on processors (docs/LOG.md).
        self.backbone = load_lm(settings.model, dtype="float32", attention="eager")
        self.encode = encoder_of(self.backbone)
        self.exam = Exam.draw(self.setup.mixture(self.encode, testing=True, seed=EXAM), settings.test_items)
        short = self.setup.mixture(self.encode, testing=True, tasks=self.setup.trained, seed=CURVE)
        self.curve_exam = Exam.draw(short, settings.curve_items)
        self.autocast = has_fast_bf16()

    def outcome(self) -> Outcome:
        settings, backbone = self.settings, self.backbone
        prompt: dict[str, Any] = {"length": settings.length, "seed": self.seed}
        arms: dict[str, tuple[Callable[[], Method], float]] = {
            "static prompt": (lambda: PromptTuning(backbone, **prompt), settings.prompt_rate),
            "id-pt": (
                lambda: InputPrompt(
                    backbone,
                    encoder=settings.encoder,
                    encoder_length=settings.encoder_length,
                    inner=settings.inner,
                    **prompt,
                ),
                settings.rate,
            ),
            "fine-tuning": (lambda: FineTuning(backbone), settings.tuning_rate),
        }
        scores = {"frozen model": self._by_measure(self.exam.scores(backbone))}
        facts: dict[str, dict[str, float]] = {}
        curves = {}
        for arm, (make, rate) in arms.items():
            method = make()
            curves[arm], seconds = self._train(arm, method, rate, settings.steps, None)
            scores[arm] = self._by_measure(self._scores(method))
            facts[arm] = {"trained values": method.count(backbone).trainable, "seconds": seconds}
            self._say(arm, scores[arm])
        scores[ORACLE], facts[ORACLE] = self._oracle(lambda: PromptTuning(backbone, **prompt))
        self._say(ORACLE, scores[ORACLE])
        order = ("frozen model", "static prompt", "id-pt", ORACLE, "fine-tuning")
        return Outcome({arm: scores[arm] for arm in order}, facts, {"learning": curves})

    def _train(
        self, arm: str, method: Method, rate: float, steps: int, task: str | None
    ) -> tuple[list[tuple[float, float]], float]:
        """Train on the mixture, or on one task of it; the learning curve over items, and seconds, tests included."""
        mixture = self.setup.mixture(self.encode, tasks=None if task is None else [task], seed=self.seed)
        size = self.settings.mixture.items

        def evaluate() -> dict[str, float]:
            with torch.autocast(self.backbone.device.type, torch.bfloat16, enabled=self.autocast):
                return {"em": float(np.mean(self.curve_exam.scores(self.backbone, method)))}

        fit = FitSettings(
            steps=steps,
            learning_rates={"method": rate},
            schedule="constant",  # so that the curve says what fewer items would have given
            autocast=self.autocast,
            seed=self.seed,
            evaluate_every=steps // self.settings.curve_points if task is None else 0,
            log_every=max(1, steps // self.settings.curve_points),
            checkpoint_seconds=1e9,
        )
        result = train_on_mixture(
            self.backbone,
            method,
            ItemBatches(self.backbone, mixture, size),
            fit,
            checkpoint=self.folder / f"{arm}.{task}.safetensors",
            evaluate=evaluate if task is None else None,
        )
        self.desk.log(f"{arm} {task or ''}: loss {result.curve[0]['loss']} -> {result.curve[-1]['loss']}")
        points = [(float(entry["step"] * size), entry["em"]) for entry in result.curve if "em" in entry]
        return points, result.seconds

    def _oracle(self, make: Callable[[], Method]) -> tuple[dict[str, list[float]], dict[str, float]]:
        """A prompt for each trained task, on the items of that task alone."""
        found, values, seconds = [float("nan")] * len(self.exam.items), 0, 0.0
        for task in self.setup.trained:
            method = make()
            steps = self.settings.steps // len(self.setup.trained)
            seconds += self._train(ORACLE, method, self.settings.prompt_rate, steps, task)[1]
            places = [at for at, item in enumerate(self.exam.items) if item.task == task]
            own = Exam([self.exam.items[at] for at in places])
            for at, score in zip(places, self._scores(method, own), strict=True):
                found[at] = score
            values += method.count(self.backbone).trainable
        return self._by_measure(found), {"trained values": values, "seconds": seconds}

    def _scores(self, method: Method, exam: Exam | None = None) -> list[float]:
        with torch.autocast(self.backbone.device.type, torch.bfloat16, enabled=self.autocast):
            return (exam or self.exam).scores(self.backbone, method)

    def _by_measure(self, scores: list[float]) -> dict[str, list[float]]:
        """Scores of the items by measure: trained tasks, each of their clusters, and the task held out."""
        held_out, found = self.settings.mixture.held_out, dict[str, list[float]]()
        for item, score in zip(self.exam.items, scores, strict=True):
            names = [NEW] if item.task in held_out else [ALL, self.setup.templates[item.task].cluster]
            for name in names:
                found.setdefault(name, []).append(score)
        return {name: values for name, values in found.items() if not np.isnan(values).any()}

    def _say(self, arm: str, scores: dict[str, list[float]]) -> None:
        self.desk.log(f"{arm}: " + ", ".join(f"{name} {np.mean(values):.1f}" for name, values in scores.items()))
