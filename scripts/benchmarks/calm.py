"""Measures what a composition costs: seconds to write tokens by m_A alone, by m_B alone and by m_B that reads m_A, in
turn. The bar: composed at most 1.25 times the other two together. Models are random and of several sizes: what they
write does not matter.
"""

import json
import statistics
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
    from odqa.frozen.calm import Calm

BAR = 1.25
# Kind, and width and layers of m_A and of m_B. Heads have 64 values.
PAIRS = (
    ("llama", (384, 6), (384, 6)),
    ("gpt2", (384, 6), (768, 12)),
    ("llama", (384, 6), (768, 12)),
)


def calm(
    text: Annotated[int, typer.Option(min=1, help="Tokens of each text that is gone on from.")] = 64,
    written: Annotated[int, typer.Option(min=1, help="Tokens that are written behind each.")] = 24,
    batches: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Texts at once; 1 if none is given.")
    ] = None,
    dtypes: Annotated[list[str] | None, typer.Option("--dtype", help="float32 if none is given.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each every system writes once.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "bench-calm.json",
) -> None:
    """What a composition costs, beside its two models."""
    import torch

    from odqa.frozen.calm import Calm

    found = []
    for dtype in dtypes or ["float32"]:
        for kind, small, large in PAIRS:
            m_a, m_b = (random_model(kind, *size, dtype=dtype, window=text + written) for size in (small, large))
            composed = Calm(m_b, models=[{"model": m_a}])
            for batch in batches or [1]:
                ids = torch.randint(1000, 20_000, (batch, text), generator=torch.Generator().manual_seed(0)).tolist()
                systems: dict[str, Callable[[int], object]] = {
                    "m_A": partial(_write, m_a, ids, written, None),
                    "m_B": partial(_write, m_b, ids, written, None),
                    "composed": partial(_write, m_b, ids, written, composed),
                }
                seconds = {
                    name: [1000 * sum(each) / written for each in rounds]
                    for name, rounds in interleaved(systems, 1, repeats, time.process_time).items()
                }
                found.append(
                    {
                        "models": f"{kind} {small[0]} wide, {small[1]} layers + {large[0]} wide, {large[1]} layers",
                        "links": len(composed.settings["models"][0]["links"]),
                        "dtype": dtype_name(m_b.model.dtype),
                        "batch": batch,
                        "milliseconds_a_token": {
                            name: round(statistics.median(each), 2) for name, each in seconds.items()
                        },
                        "composed_over_both": cost_ratio(seconds),
                    }
                )
                typer.echo(json.dumps(found[-1]))
    save_result(
        out,
        {
            "what": "milliseconds of the processor a written step, systems in turn; composed over m_A + m_B",
            "bar": BAR,
            "text_tokens": text,
            "written_tokens": written,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("transformers", "torch")},
            "pairs": found,
        },
    )


def cost_ratio(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Composed over the sum of both models, round by round: median, lowest, highest."""
    rounds = zip(seconds["composed"], seconds["m_A"], seconds["m_B"], strict=True)
    ratios = [composed / (first + second) for composed, first, second in rounds]
    return {"median": round(statistics.median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3)}


def random_model(kind: str, width: int, layers: int, *, dtype: str, window: int) -> "Backbone":
    """A frozen causal model of random weights, with MiniLM's vocabulary of 30,522 word pieces."""
    import torch
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    from odqa.frozen.backbone import Backbone, fingerprint
    from odqa.models import embedded_folder

    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("embedded:all-MiniLM-L6-v2"))
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": None,
    }
    heads = width // 64
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        model = (
            GPT2LMHeadModel(GPT2Config(n_positions=window, n_embd=width, n_layer=layers, n_head=heads, **common))
            if kind == "gpt2"
            else LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=width,
                    intermediate_size=8 * width // 3,
                    num_hidden_layers=layers,
                    num_attention_heads=heads,
                    max_position_embeddings=window,
                    **common,
                )
            )
        )
    model.requires_grad_(False).eval().to(getattr(torch, dtype))
    return Backbone(f"{kind}-{width}", "causal", model, tokenizer, fingerprint(model))


def _write(backbone: "Backbone", texts: list[list[int]], tokens: int, method: "Calm | None", _round: int) -> None:
    """Exactly so many tokens behind each text, with the links attached meanwhile."""
    if method is not None:
        method.attach(backbone)
    backbone.generate(texts, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    if method is not None:
        method.detach()
