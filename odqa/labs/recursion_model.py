"""What a lab of recursion is made of: a small language model made from nothing, training, and the count of its work.

A word of the world is a token. The model is a Llama whose output map is its word vectors; our choice of sizes is in the
recipe.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from odqa.frozen.backbone import Backbone, Tokens, fingerprint, frozen_guard
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.flops import count_flops
from odqa.frozen.method import Method
from odqa.frozen.neural import NeuralRecursion

Pairs = tuple[list[list[int]], list[list[int]]]  # sources, targets
_PAD = 0
_EVALUATED = 512  # rows at a time


class SingleNetwork(NeuralRecursion):
    """The connector without a first pass: it is fed with the text's embeddings in the place of hidden states."""

    def _first_pass(
        self, backbone: Backbone, text: torch.Tensor, mask: torch.Tensor, call: Mapping[str, Any]
    ) -> torch.Tensor:
        return text


def random_model(words: int, *, width: int, layers: int, heads: int, window: int, seed: int) -> Backbone:
    """A Llama of random values over token ids 0 (padding) and 1 ... `words`."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {"<pad>": _PAD, **{f"w{number}": number for number in range(1, words + 1)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>")), pad_token="<pad>"
    )
    config = LlamaConfig(
        vocab_size=words + 1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=window,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=_PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).eval()
    return Backbone(f"lab-{width}x{layers}", "causal", model, tokenizer, "")


def train_model(
    backbone: Backbone, texts_at: Callable[[int], torch.Tensor], *, steps: int, rate: float, seed: int
) -> None:
    """Teach the model texts (B, T), every token of them, and freeze it."""
    model = backbone.model

    def loss(texts: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(model(input_ids=texts).logits[:, :-1].mT, texts[:, 1:])

    _fit({"model": model}, texts_at, loss, steps=steps, rate=rate, seed=seed)
    model.requires_grad_(False)
    backbone.fingerprint = fingerprint(model)


def train_method(
    backbone: Backbone, method: Method, pairs_at: Callable[[int], Pairs], *, steps: int, rate: float, seed: int
) -> None:
    """Train a method on sources and targets, and leave it attached. Raises AssertionError if the model has changed."""
    with frozen_guard(backbone):
        if not method.is_attached:
            method.attach(backbone)
        _fit({"method": method}, pairs_at, lambda pairs: backbone.loss(*pairs), steps=steps, rate=rate, seed=seed)


def _fit(
    modules: Mapping[str, torch.nn.Module],
    batch_at: Callable[[int], Any],
    loss: Callable[[Any], torch.Tensor],
    *,
    steps: int,
    rate: float,
    seed: int,
) -> None:
    settings = FitSettings(steps, dict.fromkeys(modules, rate), autocast=False, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        fit(modules, batch_at, loss, settings, checkpoint=Path(folder) / "checkpoint.safetensors")


@torch.no_grad()
def next_logprobs(backbone: Backbone, sources: Tokens) -> torch.Tensor:
    """Log-probability of every token behind each source: (B, V)."""
    rows = [sources[start : start + _EVALUATED] for start in range(0, len(sources), _EVALUATED)]
    return torch.cat([backbone.forward(part)[:, -1].log_softmax(-1) for part in rows])


def right(backbone: Backbone, sources: Tokens, answers: Sequence[int]) -> list[float]:
    """100 for each source behind which its answer is the most probable token, else 0."""
    best = next_logprobs(backbone, sources).argmax(-1)
    return (100.0 * (best == torch.tensor(answers))).tolist()


def flops_a_question(backbone: Backbone, source: Sequence[int]) -> float:
    """Operations for the first token of an answer, in millions."""
    return count_flops(lambda: backbone.forward([source])) / 1e6


@torch.no_grad()
def read_again_in_text(
    backbone: Backbone, sources: list[list[int]], answers: list[int], *, samples: int, seed: int
) -> tuple[list[float], float]:
    """Textual recursion with the model as it is: scores, and MFLOPs a question.

    Pass 1 samples continuations of every beginning of the sources (all of one length). Pass 2 reads each in the place
    of the beginning that it continues; one of the whole source is an answer already. What has the highest
    log-probability, of both passes together, is the answer.
    """
    length = len(sources[0])
    generator = torch.Generator().manual_seed(seed)
    rows = torch.tensor(sources)
    found_logprob = torch.full((len(rows),), -torch.inf)
    found = torch.zeros(len(rows), dtype=torch.long)
    for end in range(1, length + 1):
        first = next_logprobs(backbone, rows[:, :end].tolist())  # (N, V)
        sampled = torch.multinomial(first.exp(), samples, replacement=True, generator=generator)  # (N, n)
        for words in sampled.T:
            total, word = first.gather(1, words[:, None])[:, 0], words
            if end < length:  # read again, with the sample in the place of what it follows
                second, word = next_logprobs(backbone, torch.cat([words[:, None], rows[:, end:]], 1).tolist()).max(-1)
                total = total + second
            found = torch.where(total > found_logprob, word, found)
            found_logprob = torch.maximum(total, found_logprob)
    flops = flops_a_question(backbone, sources[0])  # pass 1 gives what follows every beginning
    flops += samples * sum(flops_a_question(backbone, [1] * (length + 1 - end)) for end in range(1, length))
    return (100.0 * (found == torch.tensor(answers))).tolist(), flops
