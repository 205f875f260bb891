"""Measures CPU seconds (user and system, children included) of dump -> clean text on disk, one process each. PYTHON
is the interpreter of an environment of its own that holds the peer: `pip install wikiextractor==3.1.0`, which runs
unpatched on Python 3.11 (3.0.6 does not: its regexes have inline flags that are not at their start).
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RESULTS, ROOT, save_result, sha256
from odqa.runtime import progress

# What our side runs: the same job as wikiextractor's --json, a line of JSON for each article, in a file.
_OURS = """
import json, sys
from odqa.corpus.mediawiki import read_articles
with open(sys.argv[2], "w", encoding="utf-8") as out:
    for article in read_articles(sys.argv[1]):
        fields = {"id": article.id, "title": article.title, "text": article.text}
        out.write(json.dumps(fields, ensure_ascii=False) + "\\n")
"""


@dataclass(frozen=True, slots=True)
class Timing:
    """CPU seconds of one system, a run each."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_json(self) -> dict[str, object]:
        """Say it as the result file does."""
        rounded = [round(value, 3) for value in self.seconds]
        return {"median": round(self.median, 3), "min": min(rounded), "max": max(rounded), "runs": rounded}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two systems on the same input."""

    name: str
    ours: Timing
    theirs: Timing

    @property
    def speed_ratio(self) -> float:
        """How many times faster odqa is: the peer's median over ours."""
        return self.theirs.median / self.ours.median

    def as_json(self) -> dict[str, object]:
        """Say it as the result file does."""
        ratio = round(self.speed_ratio, 2)
        return {"input": self.name, "odqa": self.ours.as_json(), "peer": self.theirs.as_json(), "speed_ratio": ratio}


def dump(
    dumps: Annotated[list[Path], typer.Argument(help="MediaWiki dumps (.xml or .xml.bz2).", exists=True)],
    wikiextractor: Annotated[
        Path, typer.Option(help="Python interpreter of the environment that holds wikiextractor.")
    ],
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each system on each dump; the two alternate.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "bench-dump.json",
) -> None:
    """Dump to clean text: odqa against wikiextractor, CPU seconds on the same files."""
    ours: dict[Path, list[float]] = {path: [] for path in dumps}
    theirs: dict[Path, list[float]] = {path: [] for path in dumps}
    with progress("bench", repeats * len(dumps), "dumps") as bar:
        for path in bar.over(dumps * repeats):
            with tempfile.TemporaryDirectory() as folder:
                ours[path].append(cpu_seconds([sys.executable, "-c", _OURS, str(path), f"{folder}/articles.jsonl"]))
                peer = [str(wikiextractor), "-m", "wikiextractor.WikiExtractor", "--no-templates", "--processes", "1"]
                theirs[path].append(cpu_seconds([*peer, "--json", "-q", "-o", f"{folder}/peer", str(path)]))
    comparisons = [Comparison(path.name, Timing(ours[path]), Timing(theirs[path])) for path in dumps]
    total = Comparison(
        "all",
        Timing([sum(run) for run in zip(*ours.values(), strict=True)]),
        Timing([sum(run) for run in zip(*theirs.values(), strict=True)]),
    )
    for each in (*comparisons, total):
        typer.echo(
            f"{each.name}: odqa {each.ours.median:.2f} s, wikiextractor {each.theirs.median:.2f} s, "
            f"{each.speed_ratio:.2f} times its speed"
        )
    save_result(
        out,
        {
            "what": "CPU seconds (user + system, children included), dump to a JSON line per article, one process",
            "repeats": repeats,
            "wikiextractor": _version_of("wikiextractor", wikiextractor),
            "inputs": {path.name: sha256(path) for path in dumps},
            "comparisons": [each.as_json() for each in (*comparisons, total)],
        },
    )


def cpu_seconds(command: list[str]) -> float:
    """Run a command to its end and return the CPU seconds it took, user and system, with its own children's.

    Raises typer.Exit with the command's last words if it fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        typer.echo(f"{Path(command[0]).name} {' '.join(command[1:3])[:60]} failed:\n{done.stderr[-2000:]}", err=True)
        raise typer.Exit(2)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def _version_of(package: str, python: Path) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False).stdout.strip()
