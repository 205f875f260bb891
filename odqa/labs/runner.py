"""Runs the seeds of a lab and says what they show: means, paired gains, claims, figures.

A finished seed is kept in the lab's artifact folder, so a killed lab goes on with the next one. Claims and figures are
no part of a run's identity: they are looked at afterwards.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

import odqa
from odqa.artifacts import MANIFEST, Artifact, building, load_artifact, save_file, sha256_json
from odqa.config.labs import Claim, Lab
from odqa.errors import DataError, MissingExtra
from odqa.evaluate import Interval
from odqa.labs.outcome import Outcome
from odqa.recipes import Places, Recipe, load_recipe
from odqa.report import Style, Table, join

KIND = "lab"
_RESAMPLES = 2000  # as `odqa.evaluate.intervals`

Scores = Sequence[NDArray[np.float64]]  # per seed: a score per item


@dataclass(frozen=True, slots=True)
class Desk:
    """What a lab finds around it: where files lie, and `log` for lines about what it is doing."""

    places: Places
    log: Callable[[str], None]


class LabModule(Protocol):
    """A module of `odqa.labs`."""

    def run(self, settings: Any, seed: int, desk: Desk) -> Outcome:
        """One seed, from nothing: the same seed gives the same scores."""
        ...


def run_lab(
    recipe: str | Path,
    *,
    places: Places | None = None,
    out: Path | None = None,
    changes: Sequence[str] = (),
    log: Callable[[str], None] = lambda _line: None,
) -> "LabResult":
    """Run what is missing of a lab's seeds, into `out` or ARTIFACTS/RECIPE. Raises RecipeError for another recipe."""
    places = places or Places.from_environment()
    loaded = load_recipe(recipe, "lab", changes=changes)
    settings = cast(Lab, loaded.settings)
    module = _module(loaded)
    world = loaded.settings.model_dump(mode="json", exclude={"claims", "figures"})
    folder = out or places.artifacts / loaded.name
    found = _finished(folder, world)
    if found is None:
        with building(folder, KIND, recipe=world, inputs={}) as draft:
            for seed in settings.seeds:
                name = _file(seed)
                if not draft.has(name):
                    log(f"{loaded.name}: seed {seed}")
                    outcome = module.run(settings, seed, Desk(places, log))
                    draft.part(name, partial(save_file, text=json.dumps(outcome.to_json(), ensure_ascii=False)))
        found = load_artifact(folder, KIND)
    outcomes = [json.loads((found.path / _file(seed)).read_text(encoding="utf-8")) for seed in settings.seeds]
    return LabResult(loaded, found, [Outcome.from_json(record) for record in outcomes])


@dataclass(frozen=True, slots=True)
class Verdict:
    """A claim, the interval that it was judged by, and whether it holds. `over` is the arm compared with, or ""."""

    claim: Claim
    over: str
    found: Interval
    holds: bool


@dataclass(frozen=True)
class LabResult:
    """All seeds of a lab. Intervals are 95%, from a bootstrap over seeds and, within each, over items; our choice."""

    recipe: Recipe
    artifact: Artifact
    outcomes: Sequence[Outcome]

    @property
    def ok(self) -> bool:
        return all(verdict.holds for verdict in self.verdicts)

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(arm for outcome in self.outcomes for arm in (*outcome.scores, *outcome.facts)))

    @property
    def measures(self) -> list[str]:
        return _in_order(measure for outcome in self.outcomes for arm in outcome.scores.values() for measure in arm)

    def scores(self, arm: str, measure: str) -> Scores | None:
        """Per seed the scores of the items; None if the arm was not measured so."""
        found = [outcome.scores.get(arm, {}).get(measure) for outcome in self.outcomes]
        known = [np.asarray(scores, dtype=np.float64) for scores in found if scores is not None]
        return known if len(known) == len(self.outcomes) else None

    def mean(self, arm: str, measure: str) -> Interval:
        """Raises DataError if the arm was not measured so."""
        return seeds_interval(self._known(arm, measure))

    def gain(self, arm: str, over: str, measure: str) -> Interval:
        """What `arm` has more than `over`, item by item. Raises DataError if one was not measured so."""
        pairs = zip(self._known(arm, measure), self._known(over, measure), strict=True)
        return seeds_interval([first - second for first, second in pairs])

    @cached_property
    def verdicts(self) -> list[Verdict]:
        return [self._judge(claim) for claim in cast(Lab, self.recipe.settings).claims]

    def _judge(self, claim: Claim) -> Verdict:
        if not claim.over:
            found = self.mean(claim.arm, claim.measure)
            return Verdict(claim, "", found, _within(found.value, claim))
        over = max(claim.over, key=lambda arm: self.mean(arm, claim.measure).value)
        found = self.gain(claim.arm, over, claim.measure)
        holds = _within(found.value, claim) and (found.low > 0 or not claim.surely)
        if claim.times is not None:
            base = self.mean(over, claim.measure).value
            holds = holds and self.mean(claim.arm, claim.measure).value >= claim.times * base
        return Verdict(claim, over, found, holds)

    def _known(self, arm: str, measure: str) -> Scores:
        scores = self.scores(arm, measure)
        if scores is None:
            raise DataError(
                f"{self.recipe.path}: no {measure} of the arm {arm}; arms are {', '.join(self.arms)}, measures "
                f"{', '.join(self.measures)}. Correct the recipe's claims."
            )
        return scores

    # --- the report ---

    def render(self, style: Style = "text") -> str:
        """Scores, facts and claims as tables."""
        return join([self._scores(), *self._facts(), *self._claims()], style=style)

    def _scores(self) -> Table:
        rows = []
        for arm in self.arms:
            cells = []
            for measure in self.measures:
                scores = self.scores(arm, measure)
                cells.append("" if scores is None else _cell(scores))
            if any(cells):
                rows.append((arm, *cells))
        items = {m: len(s[0]) for m in self.measures for a in self.arms if (s := self.scores(a, m)) is not None}
        count = ", ".join(f"{measure} {n:,}" for measure, n in items.items())
        notes = (
            f"mean of {len(self.outcomes)} seeds [95% interval: bootstrap over seeds, items] (lowest to highest seed)",
            f"items a seed: {count}",
        )
        return Table(self.recipe.name, ("arm", *self.measures), tuple(rows), notes=notes)

    def _facts(self) -> list[Table]:
        names = _in_order(name for outcome in self.outcomes for facts in outcome.facts.values() for name in facts)
        if not names:
            return []
        rows = []
        for arm in self.arms:
            cells = []
            for name in names:
                known = [o.facts[arm][name] for o in self.outcomes if name in o.facts.get(arm, {})]
                cells.append(_number(sum(known) / len(known)) if known else "")
            if any(cells):
                rows.append((arm, *cells))
        return [Table(f"{self.recipe.name}: facts, means of the seeds", ("arm", *names), tuple(rows))]

    def _claims(self) -> list[Table]:
        rows = []
        for verdict in self.verdicts:
            claim, found = verdict.claim, verdict.found
            what = f"{claim.arm}: {claim.measure}" + (f" over {verdict.over}" if verdict.over else "")
            asked = [
                *([f"at least {claim.at_least:g}"] if claim.at_least is not None else []),
                *([f"at most {claim.at_most:g}"] if claim.at_most is not None else []),
                *([f"{claim.times:g} times as much"] if claim.times is not None else []),
                *(["interval above 0"] if claim.surely else []),
            ]
            sign = "+" if verdict.over else ""
            shown = f"{found.value:{sign}.1f} [{found.low:{sign}.1f}, {found.high:{sign}.1f}]"
            rows.append((what, ", ".join(asked), shown, "holds" if verdict.holds else "does not hold"))
        title = f"{self.recipe.name}: claims"
        columns = ("claim", "asked", "found", "verdict")
        return [Table(title, columns, tuple(rows), left=frozenset(columns))] if rows else []

    def to_json(self) -> dict[str, Any]:
        """The result file: recipe, per arm means and facts, claims, curves; without the items."""
        measured = {
            arm: {m: _interval(s) for m in self.measures if (s := self.scores(arm, m)) is not None} for arm in self.arms
        }
        return {
            "lab": self.recipe.name,
            "recipe": self.recipe.resolved,
            "recipe_hash": self.recipe.hash,
            "odqa": odqa.__version__,
            "ok": self.ok,
            "scores": {arm: found for arm, found in measured.items() if found},
            "facts": [dict(outcome.facts) for outcome in self.outcomes],
            "claims": [
                {
                    **verdict.claim.model_dump(mode="json", exclude_defaults=True),
                    "compared_with": verdict.over,
                    "found": [verdict.found.value, verdict.found.low, verdict.found.high],
                    "holds": verdict.holds,
                }
                for verdict in self.verdicts
            ],
            "curves": self._curves(),
        }

    def save(self, stem: Path, log: Callable[[str], None] = lambda _line: None) -> None:
        """Write STEM.md, STEM.json and STEM.svg (of several figures STEM-FIGURE.svg). Without matplotlib there are no
        figures but a warning: the numbers must not be lost."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        stem.with_name(stem.name + ".md").write_text(self.render("markdown"), encoding="utf-8")
        record = json.dumps(self.to_json(), ensure_ascii=False, indent=1) + "\n"
        stem.with_name(stem.name + ".json").write_text(record, encoding="utf-8")
        try:
            self._draw(stem)
        except MissingExtra as error:
            log(f"warning: the figures are missing. {error}")

    def _draw(self, stem: Path) -> None:
        from odqa.figures import lines

        curves = self._curves()
        figures = cast(Lab, self.recipe.settings).figures
        for name, figure in figures.items():
            panels = {}
            for part, label in (figure.panels or {name: figure.y_label}).items():
                if part not in curves:
                    raise DataError(f"{self.recipe.path}: no figure {part}; the lab has {', '.join(curves) or 'none'}.")
                panels[label] = {line: tuple(zip(*points, strict=True)) for line, points in curves[part].items()}
            path = stem.with_name(f"{stem.name}.svg" if len(figures) == 1 else f"{stem.name}-{name}.svg")
            lines(path, cast(Any, panels), x_label=figure.x_label, x_scale=figure.x_scale)

    def _curves(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """Curves whose points are means over the seeds."""
        found: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for figure in _in_order(name for outcome in self.outcomes for name in outcome.curves):
            labels = _in_order(label for outcome in self.outcomes for label in outcome.curves.get(figure, {}))
            for label in labels:
                known = [o.curves[figure][label] for o in self.outcomes if label in o.curves.get(figure, {})]
                means = np.asarray(known, dtype=np.float64).mean(axis=0)  # a lab has the same places in all seeds
                found.setdefault(figure, {})[label] = [(float(x), float(y)) for x, y in means]
        return found


def seeds_interval(scores: Scores, *, seed: int = 0, resamples: int = _RESAMPLES) -> Interval:
    """The mean of the seeds' means, with the 2.5th and 97.5th percentile of a bootstrap over seeds and their items.

    Seeds are drawn with replacement, then the items of each drawn seed. Raises ValueError without a seed or items.
    """
    if not scores or not all(len(items) for items in scores):
        raise ValueError("an interval needs at least one seed, and items in each")
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(scores), size=(resamples, len(scores)))
    means = np.empty(drawn.shape)
    for number, items in enumerate(scores):
        places = np.argwhere(drawn == number)
        for block in np.array_split(places, max(1, len(places) * len(items) // 4_000_000)):  # at most 32 MB of indices
            picked = rng.integers(0, len(items), size=(len(block), len(items)))
            means[block[:, 0], block[:, 1]] = items[picked].mean(axis=1)
    low, high = np.percentile(means.mean(axis=1), (2.5, 97.5))
    return Interval(float(np.mean([items.mean() for items in scores])), float(low), float(high))


def _module(recipe: Recipe) -> LabModule:
    kind = recipe.resolved["kind"]
    name = kind.removeprefix("lab-").replace("-", "_")
    return cast(LabModule, importlib.import_module(f"odqa.labs.{name}"))


def _finished(folder: Path, world: Mapping[str, Any]) -> Artifact | None:
    """The finished lab in `folder`; None if there is none, or one with other settings, which a new run replaces."""
    if not (folder / MANIFEST).is_file():
        return None
    found = load_artifact(folder, KIND)
    return found if sha256_json(found.manifest["recipe"]) == sha256_json(world) else None


def _file(seed: int) -> str:
    return f"seed-{seed}.json"


def _within(value: float, claim: Claim) -> bool:
    above = claim.at_least is None or value >= claim.at_least
    return above and (claim.at_most is None or value <= claim.at_most)


def _cell(scores: Scores) -> str:
    found = seeds_interval(scores)
    means = sorted(float(items.mean()) for items in scores)
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}] ({means[0]:.1f} to {means[-1]:.1f})"


def _interval(scores: Scores) -> dict[str, Any]:
    found = seeds_interval(scores)
    seeds = [round(float(items.mean()), 4) for items in scores]
    return {"mean": found.value, "interval": [found.low, found.high], "seeds": seeds, "n": len(scores[0])}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _in_order(names: Any) -> list[str]:
    return list(dict.fromkeys(names))
