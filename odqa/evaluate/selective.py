"""Answering or not: what a reader's confidence is worth, judged on questions with and without an answer."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from odqa.evaluate.intervals import RESAMPLES, Interval

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Decision:
    """A question on which a reader may abstain: its best answer's confidence (0 to 1, or any score that rises with it).

    `is_right` is about that answer, given or withheld; the best answer to an unanswerable question is wrong.
    """

    confidence: float
    is_right: bool
    is_answerable: bool = True


@dataclass(frozen=True, slots=True)
class RiskCoverage:
    """What answering only above a threshold costs (El-Yaniv & Wiener 2010): one point a distinct confidence, falling.

    `coverage` is the share of questions answered with at least this confidence, `risk` the share of wrong ones among
    them, both 0 to 1. `area` is AURC, the mean over all questions of the risk at their own confidence (Geifman &
    El-Yaniv 2017): lower is better, 0 only if nothing is wrong.
    """

    thresholds: tuple[float, ...]
    coverage: tuple[float, ...]
    risk: tuple[float, ...]
    area: float


@dataclass(frozen=True, slots=True)
class Selective:
    """Confidence judged on n questions. Rates, areas and their intervals are in percent, like all scores.

    `auroc_right` tells right answers from wrong ones, `auroc_answerable` answerable from unanswerable questions; None
    where one of the two kinds is missing. `calibration_error` is `calibration_error` below, with its bins.
    """

    n: int
    answerable: int
    right: int
    auroc_right: Interval | None
    auroc_answerable: Interval | None
    aurc: float
    calibration_error: float

    def to_json(self) -> dict[str, Any]:
        def interval(value: Interval | None) -> dict[str, float] | None:
            if value is None:
                return None
            return {name: round(getattr(value, name), 4) for name in ("value", "low", "high")}

        return {
            "n": self.n,
            "answerable": self.answerable,
            "right": self.right,
            "auroc_right": interval(self.auroc_right),
            "auroc_answerable": interval(self.auroc_answerable),
            "aurc": round(self.aurc, 4),
            "calibration_error": round(self.calibration_error, 4),
        }


def selective(decisions: Sequence[Decision], *, seed: int = 0, resamples: int = RESAMPLES) -> Selective:
    """All selective metrics that need no threshold. Raises ValueError without decisions."""

    def separation(of: Callable[[Decision], bool]) -> Interval | None:
        positive = [decision.confidence for decision in decisions if of(decision)]
        negative = [decision.confidence for decision in decisions if not of(decision)]
        if not positive or not negative:
            return None
        return auroc_interval(positive, negative, seed=seed, resamples=resamples)

    return Selective(
        n=len(decisions),
        answerable=sum(decision.is_answerable for decision in decisions),
        right=sum(decision.is_right for decision in decisions),
        auroc_right=separation(lambda decision: decision.is_right),
        auroc_answerable=separation(lambda decision: decision.is_answerable),
        aurc=100.0 * risk_coverage(decisions).area,
        calibration_error=100.0 * calibration_error(decisions),
    )


def risk_coverage(decisions: Sequence[Decision]) -> RiskCoverage:
    """The risk-coverage curve. Questions of equal confidence come in together, for no threshold tells them apart.

    Raises ValueError without decisions.
    """
    import numpy as np

    if not decisions:
        raise ValueError("a risk-coverage curve needs at least one decision")
    confidence = np.array([decision.confidence for decision in decisions])
    wrong = np.array([not decision.is_right for decision in decisions])
    order = np.argsort(-confidence, kind="stable")
    confidence, wrong = confidence[order], wrong[order]
    ends = np.flatnonzero(np.append(confidence[1:] != confidence[:-1], True)) + 1  # questions answered at each point
    risk = np.cumsum(wrong)[ends - 1] / ends
    area = float((risk * np.diff(ends, prepend=0)).sum() / len(decisions))
    coverage = ends / len(decisions)
    return RiskCoverage(tuple(confidence[ends - 1].tolist()), tuple(coverage.tolist()), tuple(risk.tolist()), area)


def auroc(
    positive: "Sequence[float] | NDArray[np.float64]", negative: "Sequence[float] | NDArray[np.float64]"
) -> float:
    """P(a positive scores above a negative), ties counting half: the area under the ROC curve (Hanley & McNeil 1982).

    0 to 1. Raises ValueError if one side is empty.
    """
    import numpy as np

    if not len(positive) or not len(negative):
        raise ValueError("an AUROC needs at least one positive and one negative")
    below = np.sort(np.asarray(negative, dtype=np.float64))
    sides: tuple[Literal["left", "right"], ...] = ("left", "right")
    places = [np.searchsorted(below, positive, side=side) for side in sides]
    return float(np.mean(places) / len(below))


def auroc_interval(
    positive: Sequence[float], negative: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """AUROC in percent with its percentile bootstrap interval; positives and negatives are resampled apart."""
    import numpy as np

    generator = np.random.default_rng(seed)
    above, below = (np.asarray(side, dtype=np.float64) for side in (positive, negative))
    value = auroc(above, below)
    again = [auroc(generator.choice(above, len(above)), generator.choice(below, len(below))) for _ in range(resamples)]
    low, high = np.percentile(again, (2.5, 97.5))
    return Interval(100.0 * value, 100.0 * float(low), 100.0 * float(high))


def calibration_error(decisions: Sequence[Decision], *, bins: int = 10) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 5) over bins of equal mass, not of equal width.

    Sorted by confidence and cut into `bins` parts of equal size (our choice: 10; fewer if there are fewer decisions);
    the mean over decisions of |mean confidence - share right| of their bin. 0 to 1.

    Raises ValueError without decisions.
    """
    import numpy as np

    if not decisions:
        raise ValueError("a calibration error needs at least one decision")
    ordered = sorted(decisions, key=lambda decision: (decision.confidence, decision.is_right))
    confidence = np.array([decision.confidence for decision in ordered])
    right = np.array([float(decision.is_right) for decision in ordered])
    parts = np.array_split(np.arange(len(ordered)), min(bins, len(ordered)))
    gaps = [abs(confidence[part].mean() - right[part].mean()) * len(part) for part in parts]
    return float(sum(gaps) / len(ordered))


def threshold_keeping(decisions: Sequence[Decision], share: float = 0.9) -> float:
    """The highest confidence that can be asked for while at least `share` (0 to 1) of the right answers are given.

    Answers with exactly this confidence are given. Raises ValueError if no answer is right.
    """
    right = sorted((decision.confidence for decision in decisions if decision.is_right), reverse=True)
    if not right:
        raise ValueError("no answer is right; there is nothing to keep")
    return right[max(1, math.ceil(round(share * len(right), 9))) - 1]


def refused(decisions: Iterable[Decision], threshold: float) -> list[float]:
    """100.0 for each decision below the threshold, else 0.0: the values of a share with its interval."""
    return [100.0 * (decision.confidence < threshold) for decision in decisions]
