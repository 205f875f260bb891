"""The runner of labs: seeds are kept, intervals and claims are right, every lab recipe has its module."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest

from odqa import config
from odqa.errors import DataError, RecipeError
from odqa.labs import Outcome
from odqa.labs.runner import Desk, run_lab, seeds_interval
from odqa.recipes import Places


class CoinLab(config.Lab):
    kind: Literal["lab-coin"]
    weight: float = 0.9


RECIPE = """
kind: lab-coin
seeds: [0, 1]
claims:
  - {arm: loaded, measure: heads, at_least: 80}
  - {arm: loaded, measure: heads, over: [fair, broken], at_least: 20, surely: true}
  - {arm: loaded, measure: heads, over: [broken], times: 5}
  - {arm: broken, measure: heads, at_most: 5}
figures:
  throws: {x_label: throws, y_label: "heads, %"}
"""


@pytest.fixture
def coin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """A lab that throws coins; the list says which seeds ran."""
    ran: list[int] = []

    def run(settings: CoinLab, seed: int, desk: Desk) -> Outcome:
        if seed == 7:
            raise RuntimeError("killed")
        ran.append(seed)
        rng = np.random.default_rng(seed)
        heads = [100.0 * (rng.random(200) < chance) for chance in (settings.weight, 0.5)]
        scores = {"loaded": list(heads[0]), "fair": list(heads[1]), "broken": [0.0] * 200}
        curve = {"loaded": [(1.0, float(seed)), (2.0, float(seed + 2))]}
        return Outcome({arm: {"heads": s} for arm, s in scores.items()}, {"loaded": {"grams": 5.0}}, {"throws": curve})

    module = ModuleType("odqa.labs.coin")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "odqa.labs.coin", module)
    monkeypatch.setitem(config.RECIPES, "lab-coin", CoinLab)
    (tmp_path / "coin.yaml").write_text(RECIPE)
    return ran


def lab(tmp_path: Path, *changes: str) -> Any:
    return run_lab(tmp_path / "coin.yaml", places=Places.from_environment(None, tmp_path / "art"), changes=changes)


def test_claims_are_judged_by_the_best_of_the_other_arms(coin: list[int], tmp_path: Path) -> None:
    result = lab(tmp_path)

    assert [verdict.over for verdict in result.verdicts] == ["", "fair", "broken", ""]
    assert all(verdict.holds for verdict in result.verdicts) and result.ok
    means = [float(np.mean(result.scores("loaded", "heads")[seed])) for seed in (0, 1)]
    assert result.verdicts[0].found.value == pytest.approx(np.mean(means))
    assert "does not hold" not in result.render()


def test_a_claim_that_does_not_hold_is_said(coin: list[int], tmp_path: Path) -> None:
    result = lab(tmp_path, "weight=0.5")

    assert [verdict.holds for verdict in result.verdicts] == [False, False, True, True]
    assert not result.ok and result.render().count("does not hold") == 2


def test_five_times_nothing_is_not_reached_by_less_than_five_times(coin: list[int], tmp_path: Path) -> None:
    result = lab(tmp_path, "claims=[{arm: loaded, measure: heads, over: [fair], times: 5}]")

    assert not result.ok


def test_finished_seeds_are_kept_after_a_kill(coin: list[int], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="killed"):
        lab(tmp_path, "seeds=[0, 7]")
    assert coin == [0]
    with pytest.raises(RuntimeError, match="killed"):
        lab(tmp_path, "seeds=[0, 7]")
    assert coin == [0]


def test_new_claims_need_no_new_run_and_new_settings_do(coin: list[int], tmp_path: Path) -> None:
    first = lab(tmp_path)
    assert not lab(tmp_path, "claims=[{arm: fair, measure: heads, at_least: 99}]").ok
    assert coin == [0, 1]
    assert lab(tmp_path).render() == first.render()
    lab(tmp_path, "weight=0.8")
    assert coin == [0, 1, 0, 1]


def test_the_saved_files_hold_scores_claims_and_mean_curves(coin: list[int], tmp_path: Path) -> None:
    lab(tmp_path).save(tmp_path / "results" / "coin")

    saved = json.loads((tmp_path / "results" / "coin.json").read_text())
    assert saved["curves"] == {"throws": {"loaded": [[1.0, 0.5], [2.0, 2.5]]}}
    assert saved["scores"]["broken"]["heads"] == {"mean": 0.0, "interval": [0.0, 0.0], "seeds": [0.0, 0.0], "n": 200}
    assert [claim["holds"] for claim in saved["claims"]] == [True] * 4
    assert "**coin: claims**" in (tmp_path / "results" / "coin.md").read_text()
    assert (tmp_path / "results" / "coin.svg").stat().st_size > 1000


def test_a_claim_about_nobody_is_one_line(coin: list[int], tmp_path: Path) -> None:
    result = lab(tmp_path, "claims=[{arm: nobody, measure: heads, at_least: 1}]")

    with pytest.raises(DataError, match="no heads of the arm nobody; arms are loaded, fair, broken"):
        result.render()


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ("{arm: loaded, measure: heads}", "says nothing"),
        ("{arm: loaded, measure: heads, times: 5}", "needs arms to compare with"),
    ],
)
def test_an_idle_claim_is_refused(coin: list[int], tmp_path: Path, claim: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        lab(tmp_path, f"claims=[{claim}]")


def test_the_interval_sees_seeds_that_differ() -> None:
    rng = np.random.default_rng(3)
    same = [rng.normal(50, 1, size=400) for _ in range(3)]
    apart = [items + shift for items, shift in zip(same, (-10, 0, 10), strict=True)]

    narrow, wide = seeds_interval(same), seeds_interval(apart)

    assert narrow.value == pytest.approx(wide.value, abs=1e-9)
    assert narrow.high - narrow.low < 0.5
    assert wide.high - wide.low > 10


def test_arms_with_other_items_are_refused() -> None:
    with pytest.raises(ValueError, match="b has 2 items and a 1"):
        Outcome({"a": {"m": [1.0]}, "b": {"m": [1.0, 2.0]}})


@pytest.mark.parametrize("kind", [kind for kind in config.RECIPES if kind.startswith("lab-")])
def test_every_kind_of_lab_has_its_module(kind: str) -> None:
    name = kind.removeprefix("lab-").replace("-", "_")
    assert callable(importlib.import_module(f"odqa.labs.{name}").run)
    assert issubclass(config.RECIPES[kind], config.Lab)
