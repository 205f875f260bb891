"""Measures what a soft prompt costs: seconds to generate answers of equal length from contexts of equal length, by
the frozen model as it is and with a prompt, in turn; a causal model also with the prompt's keys and values kept.
"""

import json
import statistics
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.common import RESULTS, dtype_name, interleaved, save_result

if TYPE_CHECKING:
    from odqa.frozen.backbone import Backbone
    from odqa.frozen.method import Method


def prompt(
    data: Annotated[Path | None, typer.Option(help="The data folder, with nq-mini in it (or ODQA_DATA).")] = None,
    models: Annotated[
        list[str] | None, typer.Option("--model", help="Generative LMs; by default the embedded.")
    ] = None,
    length: Annotated[int, typer.Option(min=1, help="Vectors of the soft prompt.")] = 50,
    tokens: Annotated[int, typer.Option(min=8, help="Tokens of a context, question and all.")] = 512,
    written: Annotated[int, typer.Option(min=1, help="Tokens that are generated from each.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Contexts that are read at once.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each every system does every batch.")] = 9,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "bench-prompt.json",
) -> None:
    """What a soft prompt makes generation cost, beside the same frozen model without one."""
    import torch

    from odqa.corpus.io import read_passages
    from odqa.frozen.method import create_method
    from odqa.frozen.prefix import prefix_of_prompt
    from odqa.frozen.prompt_tuning import PromptTuning
    from odqa.read.lm import load_lm
    from odqa.recipes import Places

    file = Places.from_environment(data).file("data:nq-mini/psgs.tsv.gz")
    texts = [passage.text for passage, _ in zip(read_passages(file), range(12 * batch), strict=False)]
    found = []
    for model in models or ["embedded:odqa-mini-1", "embedded:odqa-mini-d1"]:
        backbone = load_lm(model, device="cpu")
        ids = backbone.tokenizer(" ".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
        sources = [ids[start : start + tokens] for start in range(0, tokens * batch, tokens)]
        soft = create_method("prompt-tuning", backbone, length=length)
        assert isinstance(soft, PromptTuning)
        methods: dict[str, Method | None] = {"frozen": None, "soft prompt": soft}
        if backbone.architecture == "causal":
            methods["soft prompt, keys and values kept"] = prefix_of_prompt(backbone, soft)

        systems: dict[str, Callable[[int], object]] = {
            name: partial(_generate, backbone, sources, written, method) for name, method in methods.items()
        }
        seconds = {name: [sum(each) for each in rounds] for name, rounds in interleaved(systems, 1, repeats).items()}
        for name, ours in seconds.items():
            ratios = [one / plain for one, plain in zip(ours, seconds["frozen"], strict=True)]
            spread = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
            found.append(
                {
                    "model": model,
                    "system": name,
                    "dtype": dtype_name(backbone.model.dtype),
                    "seconds_a_batch": round(statistics.median(ours), 3),
                    "cost_ratio": {at: round(ratio, 3) for at, ratio in spread.items()},
                }
            )
            typer.echo(json.dumps(found[-1]))
    save_result(
        out,
        {
            "what": "generation, wall seconds, systems in turn",
            "prompt_vectors": length,
            "context_tokens": tokens,
            "generated_tokens": written,
            "batch": batch,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("transformers", "torch")},
            "systems": found,
        },
    )


def _generate(
    backbone: "Backbone", sources: list[list[int]], tokens: int, method: "Method | None", _batch: int
) -> None:
    """Exactly so many tokens behind each source, with the method attached meanwhile."""
    if method is not None:
        method.attach(backbone)
    backbone.generate(sources, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    if method is not None:
        method.detach()
