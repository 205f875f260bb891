"""The benchmark of growth: its passages, and what it projects."""

import csv
import gzip
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    monkeypatch.delitem(sys.modules, "benchmarks", raising=False)
    from benchmarks import scale

    return scale


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """200 + 100 passages of 50 words whose frequencies fall as in real text."""
    rng = np.random.default_rng(0)
    for name, first, count in (("psgs", 1, 200), ("psgs_extra", 201, 100)):
        with gzip.open(tmp_path / f"{name}.tsv.gz", "wt", encoding="utf-8", newline="") as file:
            table = csv.writer(file, delimiter="\t")
            table.writerow(("id", "text", "title"))
            for number in range(first, first + count):
                table.writerow((number, " ".join(f"w{rank}" for rank in rng.zipf(1.5, 50)), f"t{number}"))
    return tmp_path


def test_the_vocabulary_of_varied_passages_grows_on_as_heaps_law_says(
    scale: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"corpus": str(corpus), "size": 3000}
    real = list(scale._real(options))
    tokens = [token for passage in real for token in passage.text.split()]
    seen = [len(set(tokens[:end])) for end in (len(tokens) // 8, len(tokens))]
    beta = np.log(seen[1] / seen[0]) / np.log(8)
    law = {"K": seen[1] / len(tokens) ** beta, "beta": beta, "tokens": len(tokens), "passages": 300}
    varied = list(scale._varied({**options, "heaps": law}))
    assert varied[:300] == real and [passage.id for passage in varied[:2]] == ["1", "2"]
    assert len(varied) == 3000 and varied[2999].id == "3000"
    words = [word for passage in varied for word in passage.text.split()]
    expected = law["K"] * len(words) ** beta
    assert len(set(words)) == pytest.approx(expected, rel=0.1)
    new = [word for word in words if word.startswith("qz")]
    assert len(new) > 1.2 * len(set(new)), "new words come again"


def test_new_words_are_all_different(scale: Any) -> None:
    assert len({scale._new_word(number) for number in range(1, 20_000)}) == 19_999


def test_growth_is_a_line_beside_costs_that_do_not_grow(scale: Any) -> None:
    found = {str(n): {"cpu_seconds": 5 + 3e-4 * n, "bytes": 2 * n, "seconds": 9} for n in (900, 100, 10_000)}
    projected = scale._projected(found)
    assert projected["cpu_seconds"]["at_wikipedia"] == round(5 + 3e-4 * 21_015_324)
    assert projected["bytes"] == {"power": 1.0, "at_wikipedia": 2 * 21_015_324}
    assert set(projected) == {"cpu_seconds", "bytes"}
    assert scale._projected(dict(islice(found.items(), 1))) == {}, "one size shows no growth"


def test_a_stage_that_was_measured_is_not_run_again(scale: Any, tmp_path: Path) -> None:
    runs: list[int] = []

    def measure() -> dict[str, Any]:
        runs.append(1)
        return {"seconds": 1.5}

    assert [scale._kept(tmp_path / "a/store.json", measure) for _ in range(2)] == [{"seconds": 1.5}] * 2
    assert runs == [1]
