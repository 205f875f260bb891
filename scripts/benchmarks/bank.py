"""Measures what it costs that each row of a batch has a method of its own: processor seconds to generate texts of equal
length, beside the same rows with one shared prompt, in turn; then time and memory against the users of a batch.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.common import RESULTS, dtype_name, interleaved, save_result

if TYPE_CHECKING:
    from odqa.frozen.backbone import Backbone
    from odqa.frozen.bank import Bank
    from odqa.frozen.method import Method

SHARED = "one shared prompt"
KINDS = ("prompt-tuning", "deep-prompt", "lora", "adapter")


def bank(
    length: Annotated[int, typer.Option(min=10, help="Vectors of the shared prompt, and of the longest own one.")] = 50,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of a text.")] = 128,
    written: Annotated[int, typer.Option(min=1, help="Tokens that are generated from each.")] = 16,
    batch: Annotated[int, typer.Option(min=2, help="Rows of the batch that systems are compared on.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each every system does the batch.")] = 7,
    users: Annotated[list[int] | None, typer.Option(help="Users of the many rows; by default 1 to 200.")] = None,
    many: Annotated[int, typer.Option(min=1, help="Rows of the batch that many users share.")] = 200,
    few_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a text there, and a quarter of it written.")] = 32,
    many_repeats: Annotated[int, typer.Option(min=1, help="Rounds there.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the result goes, and a figure beside it.")] = RESULTS
    / "bench-bank.json",
) -> None:
    """What it costs that each row of a batch has a method of its own."""
    import torch

    from odqa.figures import lines

    systems, curve = [], []
    with tempfile.TemporaryDirectory() as folder:
        for backbone in models():
            place = Path(folder) / backbone.name
            systems += compare(backbone, place, length, tokens, written, batch, repeats)
            curve += many_users(
                backbone, place, length, few_tokens, users or [1, 2, 5, 10, 20, 50, 100, 200], many, many_repeats
            )
    versions = {name: version(name) for name in ("transformers", "torch")}
    result = {
        "what": "generation with a method a row, processor seconds, systems in turn; ratios are to one shared prompt",
        "prompt_vectors": length,
        "batch": {"rows": batch, "tokens": tokens, "written": written, "repeats": repeats},
        "many": {"rows": many, "tokens": few_tokens, "written": few_tokens // 4, "repeats": many_repeats},
        "threads": torch.get_num_threads(),
        "versions": versions,
        "systems": systems,
        "users": curve,
    }
    save_result(out, result)
    lines(out.with_suffix(".svg"), panels(curve), x_label="users", x_scale="log", logarithmic=[MEMORY])


def models() -> list["Backbone"]:
    """The embedded encoder-decoder, and a causal model with random weights: what it says is not looked at."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from odqa.frozen.backbone import Backbone, fingerprint
    from odqa.read.lm import load_lm

    mini = load_lm("embedded:odqa-mini-1", device="cpu")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(mini.tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).requires_grad_(False).eval()
    stored = fingerprint(model)
    small = Backbone("random-llama", "causal", model.to(mini.model.dtype), mini.tokenizer, stored)
    mini.name = "odqa-mini-1"
    return [mini, small]


def compare(
    backbone: "Backbone", folder: Path, length: int, tokens: int, written: int, batch: int, repeats: int
) -> list[dict[str, Any]]:
    """One batch with a shared prompt, and with methods of its rows: of one length, of random ones, of all kinds."""
    from odqa.frozen.bank import Bank

    lengths = [10 + (37 * row) % (length - 9) for row in range(batch)]
    settings = {
        "own prompts of one length": [("prompt-tuning", {"length": length})] * batch,
        f"own prompts of {min(lengths)} to {max(lengths)}": [("prompt-tuning", {"length": n}) for n in lengths],
        "own methods of four kinds": [of_kind(KINDS[row % len(KINDS)], lengths[row]) for row in range(batch)],
    }
    texts = [[2000 + (31 * row + place) % 9000 for place in range(tokens)] for row in range(batch)]
    systems: dict[str, Callable[[int], object]] = {
        SHARED: partial(generate_shared, backbone, shared(backbone, length), texts, written)
    }
    kind, of_it = of_kind("lora", length)
    systems["one shared LoRA"] = partial(generate_shared, backbone, create(backbone, kind, **of_it), texts, written)
    for number, (name, kinds) in enumerate(settings.items()):
        for row, (kind, of_it) in enumerate(kinds):
            create(backbone, kind, seed=row, **of_it).save(folder / f"{number}" / f"{row}")
        own = Bank(backbone, folder / f"{number}")
        systems[name] = partial(generate_own, own, [str(row) for row in range(batch)], texts, written)
    seconds = {
        name: [sum(each) for each in rounds]
        for name, rounds in interleaved(systems, 1, repeats, time.process_time).items()
    }
    found = []
    for name, ours in seconds.items():
        found.append(
            {
                "model": backbone.name,
                "system": name,
                "dtype": dtype_name(backbone.model.dtype),
                "seconds_a_batch": round(statistics.median(ours), 3),
                "cost_ratio": spread(ours, seconds[SHARED]),
            }
        )
        typer.echo(json.dumps(found[-1]))
    return found


def many_users(
    backbone: "Backbone", folder: Path, length: int, tokens: int, users: list[int], rows: int, repeats: int
) -> list[dict[str, Any]]:
    """The same rows shared out among more and more users, whose prompts have random lengths."""
    from odqa.frozen.bank import Bank

    texts = [[2000 + (31 * row + place) % 9000 for place in range(tokens)] for row in range(rows)]
    place = folder / "users"
    for user in range(max(users)):
        create(backbone, "prompt-tuning", seed=user, length=1 + (37 * user) % length).save(place / f"{user}")
    one = shared(backbone, length)
    found = []
    for number in users:
        own = Bank(backbone, place)
        names = [str(row % number) for row in range(rows)]
        started = time.process_time()
        for user in range(number):
            own.parts(str(user))
        loading = (time.process_time() - started) / number
        systems: dict[str, Callable[[int], object]] = {
            SHARED: partial(generate_shared, backbone, one, texts, tokens // 4),
            "own": partial(generate_own, own, names, texts, tokens // 4),
        }
        seconds = {
            name: [sum(each) for each in rounds]
            for name, rounds in interleaved(systems, 1, repeats, time.process_time).items()
        }
        found.append(
            {
                "model": backbone.name,
                "users": number,
                "seconds_a_batch": round(statistics.median(seconds["own"]), 3),
                "cost_ratio": spread(seconds["own"], seconds[SHARED]),
                "milliseconds_to_load_one": round(1000 * loading, 2),
                "bytes_kept": own.kept_bytes,
                "bytes_of_the_batch": own.mix(names).bytes,
                "bytes_on_disk": sum(
                    file.stat().st_size for user in range(number) for file in (place / f"{user}").iterdir()
                ),
                "bytes_of_a_model_each": number
                * sum(t.numel() * t.element_size() for t in backbone.model.parameters()),
            }
        )
        typer.echo(json.dumps(found[-1]))
    return found


def of_kind(kind: str, length: int) -> tuple[str, dict[str, Any]]:
    sizes: dict[str, dict[str, Any]] = {"lora": {"rank": 8, "alpha": 16.0}, "adapter": {"rank": 16}}
    return kind, sizes.get(kind, {"length": length})


def create(backbone: "Backbone", kind: str, **settings: Any) -> "Method":
    from odqa.frozen.method import create_method

    return create_method(kind, backbone, **settings)


def shared(backbone: "Backbone", length: int) -> "Method":
    """A soft prompt as a reader attaches it: of a causal model its keys and values."""
    from odqa.frozen.prefix import prefix_of_prompt
    from odqa.frozen.prompt_tuning import PromptTuning

    prompt = create(backbone, "prompt-tuning", length=length)
    assert isinstance(prompt, PromptTuning)
    return prefix_of_prompt(backbone, prompt) if backbone.architecture == "causal" else prompt


def generate_shared(backbone: "Backbone", method: "Method", texts: list[list[int]], new: int, _batch: int) -> None:
    method.attach(backbone)
    backbone.generate(texts, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    method.detach()


def generate_own(own: "Bank", names: list[str], texts: list[list[int]], new: int, _batch: int) -> None:
    from odqa.frozen.bank import Row

    rows = [Row(ids, name) for ids, name in zip(texts, names, strict=True)]
    own.generate(rows, max_new_tokens=new, min_new_tokens=new)


def spread(ours: list[float], theirs: list[float]) -> dict[str, float]:
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    found = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {name: round(ratio, 3) for name, ratio in found.items()}


MEMORY = "bytes"


def panels(curve: list[dict[str, Any]]) -> dict[str, dict[str, tuple[list[float], list[float]]]]:
    """For the figure: the cost ratio and the memory against the number of users, a line a model."""
    ratios, memory = {}, {}
    for name in dict.fromkeys(entry["model"] for entry in curve):
        own = [entry for entry in curve if entry["model"] == name]
        users = [float(entry["users"]) for entry in own]
        ratios[f"{name}, time"] = (users, [entry["cost_ratio"]["median"] for entry in own])
        memory[f"{name}, kept methods"] = (users, [float(entry["bytes_kept"]) for entry in own])
        memory[f"{name}, a model each"] = (users, [float(entry["bytes_of_a_model_each"]) for entry in own])
    return {"processor seconds, multiple of one shared prompt": ratios, MEMORY: memory}
