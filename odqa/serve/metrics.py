"""Counters and distributions in Prometheus' text format (version 0.0.4). Labels name routes and reasons, never users.

Source of the format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import bisect
import threading
from collections.abc import Callable

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
ROWS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

_HELP = {
    "odqa_requests_total": ("counter", "Requests by route and status."),
    "odqa_prompt_tokens_total": ("counter", "Tokens and vectors read, those of methods not counted."),
    "odqa_completion_tokens_total": ("counter", "Tokens written."),
    "odqa_rows_total": ("counter", "Texts by how they ended: stop, length, cancelled, timeout, refused, failed."),
    "odqa_rows_running": ("gauge", "Texts that are being written."),
    "odqa_rows_waiting": ("gauge", "Texts that wait for a place."),
    "odqa_step_rows": ("histogram", "Texts in a decoding step."),
    "odqa_step_seconds": ("histogram", "A decoding step, the reading of texts that join before it not counted."),
    "odqa_waiting_seconds": ("histogram", "From a text's arrival until it is read."),
    "odqa_asks_total": (
        "counter",
        "Questions: answered, abstained, cancelled, timeout, refused, failed.",
    ),
    "odqa_asks_waiting": ("gauge", "Questions that wait for their turn."),
    "odqa_ask_seconds": ("histogram", "Questions, from their arrival to their end."),
    "odqa_request_seconds": ("histogram", "Requests to write, from their arrival to their end."),
}
_BOUNDS = {"odqa_step_rows": ROWS}


class Metrics:
    """Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, dict[str, float]] = {}
        self._buckets: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}
        self.gauges: dict[str, Callable[[], float]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = ",".join(f'{label}="{_escaped(value)}"' for label, value in labels.items())
        with self._lock:
            of_name = self._counts.setdefault(name, {})
            of_name[key] = of_name.get(key, 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Add a value to a distribution."""
        bounds = _BOUNDS.get(name, SECONDS)
        with self._lock:
            buckets = self._buckets.setdefault(name, [0] * (len(bounds) + 1))
            buckets[bisect.bisect_left(bounds, value)] += 1
            self._sums[name] = self._sums.get(name, 0.0) + value

    def total(self, name: str) -> float:
        """A counter's value over all labels."""
        with self._lock:
            return sum(self._counts.get(name, {}).values())

    def render(self) -> str:
        lines = []
        with self._lock:
            for name, (kind, words) in _HELP.items():
                lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
                if kind == "gauge":
                    lines.append(f"{name} {_number(self.gauges[name]())}" if name in self.gauges else f"{name} 0")
                elif kind == "histogram":
                    lines += self._histogram(name)
                else:
                    found = self._counts.get(name, {})
                    lines += [_sample(name, key, value) for key, value in found.items()]
        return "\n".join(lines) + "\n"

    def _histogram(self, name: str) -> list[str]:
        bounds = _BOUNDS.get(name, SECONDS)
        buckets = self._buckets.get(name, [0] * (len(bounds) + 1))
        lines, below = [], 0
        for bound, count in zip((*map(str, bounds), "+Inf"), buckets, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {_number(self._sums.get(name, 0.0))}", f"{name}_count {below}"]


def _sample(name: str, labels: str, value: float) -> str:
    return f"{name}{{{labels}}} {_number(value)}" if labels else f"{name} {_number(value)}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
