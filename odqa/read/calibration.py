"""How likely a reader's answer is right: a logistic regression on a few numbers of the reading (Platt scaling).

Probabilities of a softmax over spans say which span is best, not whether any is right: with k packed passages, k - 1
of which hold no answer, the "no answer" entries of those k - 1 get mass that says nothing about the question. The
calibration turns numbers that do say something into one probability. It is fitted on tune questions, answerable and
unanswerable ones, and belongs to the one reader that it was fitted on. Standard library and numpy only.

Source: Platt 1999, "Probabilistic outputs for support vector machines" (targets of section 2.2; several features
instead of one).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from odqa.errors import ArtifactError, ArtifactMismatch

CALIBRATION = "calibration.json"
_RIDGE = 0.1  # our choice: keeps weights finite when tune answers separate perfectly, invisible otherwise
_STEPS = 100


@dataclass(frozen=True, slots=True)
class Calibration:
    """confidence = 1 / (1 + exp(-(bias + weights . values))), `values` in the order of `features`.

    `reader` is the sha256 of the trained part that it was fitted on. `provenance` says from what: files and their
    hashes, counts, settings, thresholds chosen.
    """

    features: tuple[str, ...]
    weights: tuple[float, ...]
    bias: float
    reader: str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def confidence(self, values: Mapping[str, float]) -> float:
        """The probability (0 to 1) that an answer read with these values is right."""
        named = zip(self.features, self.weights, strict=True)
        log_odds = self.bias + math.fsum(weight * values[name] for name, weight in named)
        # Both branches keep the argument of exp negative, where it cannot overflow.
        return 1 / (1 + math.exp(-log_odds)) if log_odds >= 0 else 1 - 1 / (1 + math.exp(log_odds))

    def save(self, folder: Path) -> Path:
        """Write calibration.json into a reader's folder, in one move."""
        record = {
            "features": list(self.features),
            "weights": [round(weight, 6) for weight in self.weights],
            "bias": round(self.bias, 6),
            "reader": self.reader,
            "provenance": dict(self.provenance),
        }
        temporary = folder / f".{CALIBRATION}.tmp"
        temporary.write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        return temporary.replace(folder / CALIBRATION)


def load_calibration(folder: Path, *, reader: str, known: Sequence[str]) -> Calibration | None:
    """The calibration in a reader's folder; None if there is none: the reader is then uncalibrated.

    `reader` is the sha256 of the trained part found there, `known` are the features that the reader computes. Raises
    ArtifactMismatch for a calibration of another reader, ArtifactError for a file that is none.
    """
    file = folder / CALIBRATION
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        found = Calibration(
            tuple(str(name) for name in record["features"]),
            tuple(float(weight) for weight in record["weights"]),
            float(record["bias"]),
            str(record["reader"]),
            dict(record["provenance"]),
        )
        if len(found.features) != len(found.weights) or not all(map(math.isfinite, (*found.weights, found.bias))):
            raise ValueError("one finite weight a feature is needed")
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{file}: not a calibration of a reader ({error!r}). Delete it, or calibrate again."
        ) from error
    if found.reader != reader:
        raise ArtifactMismatch(
            f"{file}: fitted on reader {found.reader[:8]}; the reader here is {reader[:8]}. Calibrate again: "
            "scripts/calibrate_reader.py."
        )
    strangers = sorted(set(found.features) - set(known))
    if strangers:
        raise ArtifactError(
            f"{file}: uses {', '.join(strangers)}; this version of odqa computes {', '.join(known)}. Calibrate again."
        )
    return found


def fit_calibration(
    values: Sequence[Mapping[str, float]],
    is_right: Sequence[bool],
    *,
    features: Sequence[str],
    reader: str,
    provenance: Mapping[str, Any] | None = None,
) -> Calibration:
    """Fit on answers read with `values`, of which `is_right` says which were right.

    Newton's method on the log-likelihood with Platt's targets, (r + 1) / (r + 2) for the r right ones and 1 / (w + 2)
    for the w wrong ones, on standardised features with a ridge of 0.1. Deterministic; the order does not matter.
    Raises ValueError unless there are right and wrong answers, and finite values.
    """
    x = np.array([[row[name] for name in features] for row in values], dtype=np.float64).reshape(len(values), -1)
    right = np.asarray(is_right, dtype=bool)
    if right.all() or not right.any():
        raise ValueError(f"a calibration needs right and wrong answers; {int(right.sum())} of {len(right)} are right")
    if not np.isfinite(x).all():
        raise ValueError("a calibration needs finite values")
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale == 0] = 1.0
    design = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    target = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
    ridge = _RIDGE * np.diag([*np.ones(len(features)), 0.0])
    solution = np.zeros(design.shape[1])
    for _ in range(_STEPS):
        p = 1 / (1 + np.exp(-np.clip(design @ solution, -30, 30)))
        gradient = design.T @ (p - target) + ridge @ solution
        step = np.linalg.solve((design.T * (p * (1 - p))) @ design + ridge + 1e-9 * np.eye(len(ridge)), gradient)
        solution -= step
        if np.abs(step).max() < 1e-10:
            break
    weights = solution[:-1] / scale
    bias = float(solution[-1] - weights @ mean)
    return Calibration(tuple(features), tuple(weights.tolist()), bias, reader, dict(provenance or {}))
