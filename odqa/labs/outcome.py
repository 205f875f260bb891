"""What one seed of a lab gave, as values that JSON keeps."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Scores, facts and curves of one seed.

    `scores[arm][measure]`: a score from 0 to 100 per held-out item; all arms of a measure have the same items in the
    same order, so that arms can be compared in pairs. `facts[arm][name]`: one number (trained values, seconds, calls,
    bytes, FLOPs). `curves[figure][curve]`: (x, y) points.
    """

    scores: Mapping[str, Mapping[str, Sequence[float]]]
    facts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curves: Mapping[str, Mapping[str, Points]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        items: dict[str, tuple[str, int]] = {}
        for arm, measures in self.scores.items():
            for measure, scores in measures.items():
                first, count = items.setdefault(measure, (arm, len(scores)))
                if not scores or len(scores) != count:
                    raise ValueError(f"{measure}: {arm} has {len(scores)} items and {first} {count}; all need the same")

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Outcome":
        curves = {
            figure: {name: [(float(x), float(y)) for x, y in points] for name, points in lines.items()}
            for figure, lines in record["curves"].items()
        }
        return cls(record["scores"], record["facts"], curves)
