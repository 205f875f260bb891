"""Kills a job with SIGKILL, at random points, and starts it again until it ends by itself.

    python -m tests.killer PLAN.json

The plan: {"seeds": [0, 1], "log": FILE, "jobs": {NAME: {"argv": ["index", ..., "OUT"], "out": FOLDER}}}; OUT stands for
the folder of each seed. Every job first runs unharmed into FOLDER/whole, then for each seed into FOLDER/killed-SEED.
What happened is printed as JSON: per job and seed the kills, and whether a try took up earlier work.

Model libraries are imported once; each try is a fork that runs the command line's entry point. Parts and checkpoints
are made small and frequent, which changes no result, so that kills fall between them. A try dies at a random moment, or
right before or after a random one of its calls to fsync and rename: the points where a file becomes what it is.
"""

import functools
import json
import os
import random
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MOST_KILLS = 12  # then a job may end in peace; more than half of them die before, while what they do gets less
_RESUMED = re.compile(r"resumed at step [1-9]|[1-9]\d* of \d+ questions were answered already")


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    _import_everything()
    _make_parts_small()
    found: dict[str, list[dict[str, Any]]] = {}
    for name, job in plan["jobs"].items():
        folder = Path(job["out"])
        whole = _Job(job["argv"], folder / "whole", Path(plan["log"]))
        seconds, calls = whole.measure()
        found[name] = [
            _Job(job["argv"], folder / f"killed-{seed}", Path(plan["log"])).kill_until_done(seed, seconds, calls)
            for seed in plan["seeds"]
        ]
    sys.stdout.write(json.dumps(found))


class _Job:
    """One command into one folder."""

    def __init__(self, argv: list[str], out: Path, log: Path) -> None:
        self.argv, self.out, self.log = [str(out) if word == "OUT" else word for word in argv], out, log

    def measure(self) -> tuple[float, int]:
        """Run unharmed: wall seconds, and how many calls there are to die at."""
        started = time.monotonic()
        counter = self.log.with_name("calls")
        code = self._try(lambda: _count_calls(counter))
        if code != 0:
            raise SystemExit(f"{self.argv} ended with {code}:\n{self.log.read_text()}")
        return time.monotonic() - started, counter.stat().st_size

    def kill_until_done(self, seed: int, seconds: float, calls: int) -> dict[str, Any]:
        """Try until a try ends by itself; each one of the first `MOST_KILLS` is to die somewhere."""
        chance = random.Random(seed)
        kills: list[str] = []
        kept: set[int] = set()
        resumed = False
        while True:
            at = chance.randrange(1, calls + 1)
            before, delay = chance.random() < 0.5, chance.uniform(0, seconds)
            if len(kills) == MOST_KILLS:
                how, code = "in peace", self._try(lambda: None)
            elif chance.random() < 0.6:
                how = f"{'before' if before else 'after'} call {at} of {calls}"
                code = self._try(lambda at=at, before=before: _die_at_call(at, before=before))  # type: ignore[misc]
            else:
                how, code = f"after {delay:.3f} of {seconds:.3f} s", self._try(lambda: None, delay)
            resumed |= bool(_RESUMED.search(self.log.read_text(encoding="utf-8")))
            if code == 0:
                files = {file.stat().st_ino for file in self.out.rglob("*") if file.is_file()}
                return {"kills": kills, "resumed": resumed, "kept": len(kept & files)}
            if code != -signal.SIGKILL:
                raise SystemExit(f"{self.argv} ended with {code} after {kills}:\n{self.log.read_text()}")
            kills.append(how)
            partial = self.out.with_name(f".{self.out.name}.partial")
            finished = [file for file in partial.rglob("*") if file.is_file() and not file.name.endswith(".tmp")]
            kept |= {file.stat().st_ino for file in finished}

    def _try(self, prepare: Callable[[], None], delay: float | None = None) -> int:
        """Fork, run, and kill after `delay` seconds. Returns the exit code, negative for a signal."""
        child = os.fork()
        if child == 0:
            self._run_and_exit(prepare)
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def _run_and_exit(self, prepare: Callable[[], None]) -> None:
        from odqa.cli import main

        code = 99
        try:
            sys.stdout = sys.stderr = self.log.open("w", encoding="utf-8", buffering=1)
            sys.argv = ["odqa", *self.argv]
            prepare()
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)


def _import_everything() -> None:
    import faiss  # noqa: F401
    import transformers

    import odqa.jobs
    import odqa.read.lm
    import odqa.read.train
    import odqa.rerank.cross
    import odqa.retrieve.index  # noqa: F401

    for name in ("AutoTokenizer", "AutoModel", "AutoModelForCausalLM", "BertModel", "LlamaForCausalLM"):
        getattr(transformers, name)


def _make_parts_small() -> None:
    """Parts of a few passages, a checkpoint after every step."""
    from odqa.frozen import fit
    from odqa.retrieve import bm25, dense, index

    index.build_index = functools.partial(index.build_index, part_rows=11)
    index.__dict__["save_passage_vectors"] = functools.partial(dense.save_passage_vectors, part_rows=13)
    bm25._PART_ROWS = 17
    fit.FitSettings = functools.partial(fit.FitSettings, checkpoint_seconds=0.0)  # type: ignore[misc, assignment]


def _count_calls(counter: Path) -> None:
    """One byte into a file at every call that matters."""
    log = os.open(counter, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)

    def note(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **keywords: Any) -> Any:
            os.write(log, b".")
            return call(*arguments, **keywords)

        return noted

    _wrap(note)


def _die_at_call(number: int, *, before: bool) -> None:
    """SIGKILL to this very process at its n-th call."""
    calls = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*arguments, **keywords)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return counted

    _wrap(deadly)


def _wrap(wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """The calls by which a file becomes durable or gets its name: fsync, rename, replace (pathlib's go through os)."""
    for name in ("fsync", "rename", "replace"):
        setattr(os, name, wrapper(getattr(os, name)))


if __name__ == "__main__":
    main()
