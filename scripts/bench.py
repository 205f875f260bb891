"""Speed against peers, side by side in one run: prints a line per system and writes eval/results/bench-*.json.

    python scripts/bench.py dump DUMP... --wikiextractor PYTHON
    python scripts/bench.py latency PIPELINE QUESTIONS [--index INDEX_FOLDER]

`dump` measures CPU seconds (user and system, children included) of dump -> clean text on disk, one process each. PYTHON
is the interpreter of an environment of its own that holds the peer: `pip install wikiextractor==3.1.0`, which runs
unpatched on Python 3.11 (3.0.6 does not: its regexes have inline flags that are not at their start).

`latency` measures wall seconds from the shell to the answer with a built index, of `odqa --help`, and milliseconds a
question in one process; with --index also what the index's manifest says of its building.
"""

import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

_ROOT = Path(__file__).resolve().parent.parent
_RESULTS = _ROOT / "eval" / "results"


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


# What our side runs: the same job as wikiextractor's --json, a line of JSON for each article, in a file.
_OURS = """
import json, sys
from odqa.corpus.mediawiki import read_articles
with open(sys.argv[2], "w", encoding="utf-8") as out:
    for article in read_articles(sys.argv[1]):
        fields = {"id": article.id, "title": article.title, "text": article.text}
        out.write(json.dumps(fields, ensure_ascii=False) + "\\n")
"""


@app.command()
def dump(
    dumps: Annotated[list[Path], typer.Argument(help="MediaWiki dumps (.xml or .xml.bz2).", exists=True)],
    wikiextractor: Annotated[
        Path, typer.Option(help="Python interpreter of the environment that holds wikiextractor.")
    ],
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each system on each dump; the two alternate.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = _RESULTS / "bench-dump.json",
) -> None:
    """Dump to clean text: odqa against wikiextractor, CPU seconds on the same files."""
    ours: dict[Path, list[float]] = {path: [] for path in dumps}
    theirs: dict[Path, list[float]] = {path: [] for path in dumps}
    for _ in range(repeats):
        for path in dumps:
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
            "inputs": {path.name: _sha256(path) for path in dumps},
            "comparisons": [each.as_json() for each in (*comparisons, total)],
        },
    )


# ---------------------------------------------------------------- shared by all subcommands


@app.command()
def latency(
    pipeline: Annotated[str, typer.Argument(help="A pipeline recipe whose index is built.")],
    questions: Annotated[Path, typer.Argument(help="A question file; the first 60 questions are asked.")],
    index: Annotated[Path | None, typer.Option(help="An index folder, to report how long it took to build.")] = None,
    repeats: int = 5,
    out: Path = _RESULTS / "bench-latency.json",
) -> None:
    """How long a person waits: from the shell to the answer, and a question in one process."""
    from odqa import jobs
    from odqa.artifacts import load_artifact
    from odqa.corpus.io import read_questions

    asked = read_questions(questions)[:60]
    odqa = [sys.executable, "-m", "odqa.cli"]
    result: dict[str, object] = {
        "pipeline": pipeline,
        "questions": {"name": questions.name, "sha256": _sha256(questions), "n": len(asked)},
        "processor": _processor(),
        "shell_to_answer_seconds": _wall([*odqa, "ask", pipeline, asked[0].text, "--quiet"], repeats),
        "help_seconds": _wall([*odqa, "--help"], repeats),
    }
    loaded = jobs.load_pipeline(pipeline)
    loaded.ask(asked[0].text)
    milliseconds = []
    for query in asked:
        started = time.perf_counter()
        loaded.ask(query.text)
        milliseconds.append(1000 * (time.perf_counter() - started))
    milliseconds.sort()
    result["question_milliseconds"] = {
        "median": round(statistics.median(milliseconds), 1),
        "p95": round(milliseconds[int(0.95 * len(milliseconds))], 1),
    }
    if index is not None:
        artifact = load_artifact(index, "index")
        result["index"] = {"counts": artifact.manifest["counts"], "measured": artifact.manifest["measured"]}
    save_result(out, result)
    print(json.dumps(result, indent=1))


def _wall(command: list[str], repeats: int) -> dict[str, float]:
    """Wall seconds of a command after one warm-up: median, minimum and maximum."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - started)
    counted = seconds[1:]
    return {
        "median": round(statistics.median(counted), 2),
        "min": round(min(counted), 2),
        "max": round(max(counted), 2),
    }


def cpu_seconds(command: list[str]) -> float:
    """Run a command to its end and return the CPU seconds it took, user and system, with its own children's.

    Raises typer.Exit with the command's last words if it fails.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(_ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        typer.echo(f"{Path(command[0]).name} {' '.join(command[1:3])[:60]} failed:\n{done.stderr[-2000:]}", err=True)
        raise typer.Exit(2)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def save_result(path: Path, result: dict[str, object]) -> None:
    """Write a result with the machine it was measured on; file names only, no paths."""
    machine = {"python": platform.python_version(), "processor": _processor(), "cores": os.cpu_count()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "machine": machine}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.machine()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version_of(package: str, python: Path) -> str:
    code = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    app()
