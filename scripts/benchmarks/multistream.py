"""Measures dump -> passages by one process and by several, in turn: wall and CPU seconds, and the memory of the largest
process. Every run must give the same passages, with the index and without. On a busy machine the ratio of walls says
little: it depends on what else runs. `speed-up on free cores` is worked out from CPU seconds instead: those of one
process, over the larger of what the main process needs (which no other can take over) and an even share of all. It
leaves out waiting, and cores that slow each other down. Make the dump with scripts/make_multistream.py.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, ROOT, save_result, sha256

_RUN = """
import hashlib, json, resource, sys, time
from pathlib import Path
from odqa.corpus.dump import DumpPassages, DumpSettings
path, processes, finds_index = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "index"
started, digest = time.perf_counter(), hashlib.sha256()
passages = DumpPassages(path, DumpSettings(finds_index=finds_index), processes=processes)
for passage in passages:
    digest.update(f"{passage.id}\\t{passage.title}\\t{passage.text}\\n".encode())
seconds = time.perf_counter() - started
own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({
    "wall": seconds, "main_cpu": own.ru_utime + own.ru_stime, "worker_cpu": others.ru_utime + others.ru_stime,
    "peak_mib": max(own.ru_maxrss, others.ru_maxrss) / 1024, "passages": passages.passages,
    "articles": passages.report.articles, "xml_bytes": passages.report.bytes_read, "sha256": digest.hexdigest(),
}))
"""


def multistream(
    dump: Annotated[Path, typer.Argument(help="A multistream dump.", exists=True)],
    processes: Annotated[int, typer.Option(min=2, help="How many, against one.")] = 2,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each; they alternate.")] = 2,
    out: Annotated[Path, typer.Option(help="Where the result goes; the table beside it as .md.")] = RESULTS
    / "bench-multistream.json",
) -> None:
    """Dump to passages: one process against several, with and without the index."""
    systems = {
        "1 process": (1, "index"),
        f"{processes} processes, index": (processes, "index"),
        f"{processes} processes, no index": (processes, "no index"),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in systems}
    for _ in range(repeats):
        for name, arguments in systems.items():
            runs[name].append(_run(dump, *arguments))
            typer.echo(f"{name}: {json.dumps(runs[name][-1])}")
    found = {run["sha256"] for each in runs.values() for run in each}
    if len(found) != 1:
        typer.echo(f"the passages differ: {found}", err=True)
        raise typer.Exit(1)
    one = statistics.median(_cpu(run) for run in runs["1 process"])
    one_wall = statistics.median(run["wall"] for run in runs["1 process"])
    rows = []
    for name, (count, _) in systems.items():
        each = runs[name]
        main, workers = (statistics.median(run[key] for run in each) for key in ("main_cpu", "worker_cpu"))
        wall = statistics.median(run["wall"] for run in each)
        rows.append(
            {
                "system": name,
                "wall_s": round(wall, 1),
                "main_cpu_s": round(main, 1),
                "worker_cpu_s": round(workers, 1),
                "mb_per_cpu_s": round(each[0]["xml_bytes"] / 1e6 / (main + workers), 2),
                "peak_mib": round(max(run["peak_mib"] for run in each)),
                "load": [run["load"] for run in each],
                "speed_up_wall": round(one_wall / wall, 2),
                "speed_up_free_cores": round(one / max(main, (main + workers) / count), 2),
            }
        )
    first = runs["1 process"][0]
    result: dict[str, object] = {
        "what": "dump to passages; medians; load: runnable processes of the machine before each run",
        "dump": {"name": dump.name, "sha256": sha256(dump), "bytes": dump.stat().st_size},
        **{key: first[key] for key in ("xml_bytes", "articles", "passages")},
        "passages_sha256": first["sha256"],
        "repeats": repeats,
        "systems": rows,
    }
    save_result(out, result)
    out.with_suffix(".md").write_text(_table(dump, first, repeats, rows), encoding="utf-8")


def _cpu(run: dict[str, Any]) -> float:
    return float(run["main_cpu"] + run["worker_cpu"])


def _run(dump: Path, processes: int, index: str) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    load = os.getloadavg()[0]
    command = [sys.executable, "-c", _RUN, str(dump), str(processes), index]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        raise typer.Exit(2)
    return {**json.loads(done.stdout), "load": round(load, 1)}


def _table(dump: Path, first: dict[str, Any], repeats: int, rows: list[dict[str, Any]]) -> str:
    lines = [
        f"`{dump.name}`: {first['xml_bytes'] / 1e6:.0f} MB of XML, {first['articles']:,} articles, "
        f"{first['passages']:,} passages, the same ones (sha256 {first['sha256'][:12]}) in every run. Medians of "
        f"{repeats} {'run' if repeats == 1 else 'runs'} of each, in turn. Load: runnable processes on "
        f"{os.cpu_count()} cores before each run; while there are "
        "more of them than cores, the ratio of walls is theirs, not ours (more processes get more turns).",
        "",
        "| system | wall s | main CPU s | worker CPU s | MB of XML a CPU s | largest process MiB | load |"
        " speed-up, wall | speed-up on free cores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        load = ", ".join(map(str, row["load"]))
        lines.append(
            f"| {row['system']} | {row['wall_s']} | {row['main_cpu_s']} | {row['worker_cpu_s']} | {row['mb_per_cpu_s']}"
            f" | {row['peak_mib']} | {load} | {row['speed_up_wall']} | {row['speed_up_free_cores']} |"
        )
    return "\n".join(lines) + "\n"
