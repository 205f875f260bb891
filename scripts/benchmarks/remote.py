"""Measures black-box tuning through a server beside the same in process: is it the same prompt, and what does the wire
cost? One seed, one budget, one frozen model; the search knows an engine and nothing else.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import RESULTS, ROOT, save_result
from benchmarks.serve import running

VERBALISERS = (" he", " it")  # of "who" and "what"; any two tokens would do, a search finds the prompt for them


def remote(
    model: Annotated[str, typer.Option(help="The model that is served, a causal one.")] = "embedded:odqa-mini-d1",
    calls: Annotated[int, typer.Option(min=20, help="The budget: forward passes of the training set.")] = 240,
    population: Annotated[int, typer.Option(min=2, help="Prompts of a generation.")] = 12,
    length: Annotated[int, typer.Option(min=1, help="Vectors of the prompt.")] = 10,
    dimensions: Annotated[int, typer.Option(min=2, help="Of z.")] = 50,
    threads: Annotated[int, typer.Option(min=1, help="Threads of an operation, in process and in the server.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "bench-remote.json",
) -> None:
    """Black-box tuning through `odqa serve` and in process."""
    import torch

    from odqa.frozen.blackbox import SearchSettings
    from odqa.frozen.local import LocalEngine
    from odqa.read.endpoint import Endpoint
    from odqa.read.lm import load_lm
    from odqa.serve.client import HttpEngine

    torch.set_num_threads(threads)
    settings = SearchSettings(dimensions=dimensions, population=population, calls=calls)
    local = LocalEngine(load_lm(model, device="cpu", dtype="float32"))
    with (
        tempfile.TemporaryDirectory() as folder,
        running(model, Path(folder) / "server", rows=64, threads=threads) as server,
    ):
        http = HttpEngine(Endpoint(f"{server.url}/v1", timeout=120), Path(model.removeprefix("embedded:")).name)
        engines = {"in process": local, "over HTTP": http}
        found = {label: tune(engine, length, settings) for label, engine in engines.items()}
        spent = http.spent()
    first, second = found.values()
    difference = float(abs(first["prompt"] - second["prompt"]).max())
    losses = [abs(one - other) for one, other in zip(first["losses"], second["losses"], strict=True)]
    result = {
        "what": "one search for a soft prompt, twice; wall seconds on a busy machine, one after the other",
        "model": Path(model.removeprefix("embedded:")).name,
        "settings": {"calls": calls, "population": population, "dimensions": dimensions, "length": length},
        "largest_entry_of_the_prompt": float(abs(first["prompt"]).max()),
        "largest_difference_of_the_prompts": difference,
        "largest_difference_of_the_training_losses": max(losses),
        "arms": {label: {key: value for key, value in arm.items() if key != "prompt"} for label, arm in found.items()},
        "over_http": {
            "requests": spent["requests"],
            "bytes_up_a_call": round(spent["bytes_up"] / (second["calls"] + second["tune_calls"])),
            "bytes_down_a_call": round(spent["bytes_down"] / (second["calls"] + second["tune_calls"])),
            "bytes_up": spent["bytes_up"],
            "bytes_down": spent["bytes_down"],
        },
    }
    save_result(out, result)
    typer.echo(json.dumps(result, indent=1))


def tune(engine: Any, length: int, settings: Any) -> dict[str, Any]:
    """Search for a prompt that tells who- from what-questions: 16 training and 16 tune examples a class."""
    from odqa.frozen.blackbox import Classification, Labelled, search
    from odqa.frozen.engine import Prompted

    lines = (ROOT / "odqa/assets/questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [str(json.loads(line)["question"]) for line in lines]
    of_class = [[text for text in questions if text.startswith(word)] for word in ("who ", "what ")]
    examples = [[Labelled(Prompted(text), label) for text in texts[:32]] for label, texts in enumerate(of_class)]
    train, tuned = ([one for of in examples for one in of[part::2]] for part in (0, 1))
    started = time.perf_counter()
    best = search(engine, Classification(engine, VERBALISERS, train, tuned), length, settings)
    assert best.best.words is not None
    return {
        "accuracy_on_tune": best.quality[0],
        "loss_on_tune": -best.quality[1],
        "examples": [len(train), len(tuned)],
        "calls": best.calls,
        "tune_calls": best.tune_calls,
        "losses": [entry["loss"] for entry in best.curve if "loss" in entry],
        "seconds": round(time.perf_counter() - started, 1),
        "prompt": best.best.words,
    }
