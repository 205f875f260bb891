"""Probes: small classifiers on the frozen states of any layer, and how much of their success is their own memory.

    linear     W h + b                          bilinear   h_i^T W_c h_j + b_c, for pairs
    MLP        W2 relu(W1 h + b1) + b2          pooling    first token, mean, or attention: sum_t softmax_t(q . h_t) h_t
    selectivity = accuracy(task) - accuracy(control task)

A control task gives each type (a word, say) a label drawn at random once, so that only a probe that remembers types can
do it. Source: Hewitt & Liang 2019 (arXiv 1909.03368), sections 2 and 3. Probes are trained by `odqa.frozen.fit`.
Knows tensors and labels; what a type or a label is, its caller says.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.backbone import Backbone, Tokens
from odqa.frozen.fit import FitSettings, fit

Pooling = Literal["first", "mean", "attention"]


@torch.no_grad()
def layer_states(backbone: Backbone, rows: Tokens, *, batch_size: int = 32) -> Iterator[torch.Tensor]:
    """States of every layer of each row, in order: (L + 1, T, D) float32, on the processor.

    Entry 0 is what the first layer is given, entry l what layer l gives; a normalisation behind the last layer (GPT-2,
    Llama, T5) is not in. Of an encoder-decoder they are the encoder's. With a method attached they are computed with
    it, but a soft prompt is not supported: its rows are longer than their text.
    """
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        with _watched(backbone) as seen:
            if backbone.architecture == "seq2seq":
                backbone.encode(batch)
            else:
                backbone.forward(batch, padding="right")
        states = torch.stack(seen, dim=1).float().cpu()  # (B, L + 1, T, D)
        for row, found in zip(batch, states, strict=True):
            yield found[:, : len(row)]


@contextmanager
def _watched(backbone: Backbone) -> Iterator[list[torch.Tensor]]:
    """What goes into the stack of layers, and what comes out of each of them, while the block runs."""
    reader = backbone.model.get_encoder() if backbone.architecture == "seq2seq" else backbone.model
    layers = next((module for module in reader.modules() if isinstance(module, nn.ModuleList)), None)
    if layers is None:
        raise DataError(f"{backbone.name}: {type(backbone.model).__name__} has no list of layers to look into.")
    seen: list[torch.Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    def behind(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handles = [layers[0].register_forward_pre_hook(before, with_kwargs=True)]
    handles += [layer.register_forward_hook(behind) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# --- probes -----------------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """(N, D) -> (N, classes). Starts at zero."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(classes, width)), nn.Parameter(torch.zeros(classes))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(states, self.weight, self.bias)


class Bilinear(nn.Module):
    """(N, 2, D) pairs -> (N, classes): D * D + 1 values a class. Starts at zero."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(classes, width, width)), nn.Parameter(torch.zeros(classes))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        first, second = states.unbind(1)
        return torch.einsum("nd,cde,ne->nc", first, self.weight, second) + self.bias


class Mlp(nn.Module):
    """One hidden layer: (N, D), or (N, 2, D) pairs one behind the other (`pairs`), -> (N, classes)."""

    def __init__(self, width: int, classes: int, *, inner: int = 100, pairs: bool = False, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.hidden, self.out = nn.Linear(width * (2 if pairs else 1), inner), nn.Linear(inner, classes)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.out(self.hidden(states.flatten(1)).relu())
        return logits


class Pooled(nn.Module):
    """A probe of whole texts: (N, T, D) states padded with NaN (see `pad_states`) -> (N, classes).

    "first" takes the first token ([CLS]), "mean" the mean over tokens, "attention" a mean weighted by how well a token
    fits a learned vector q (D more values; zero at the start, which is the mean).
    """

    def __init__(self, probe: nn.Module, pooling: Pooling, width: int) -> None:
        super().__init__()
        if pooling not in ("first", "mean", "attention"):
            raise DataError(f"probe: pooling is {pooling!r}; it must be first, mean or attention.")
        self.probe, self.pooling = probe, pooling
        self.query = nn.Parameter(torch.zeros(width)) if pooling == "attention" else None

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        is_pad = states[..., 0].isnan()  # (N, T)
        known = states.nan_to_num()
        scores = known.new_zeros(is_pad.shape) if self.query is None else known @ self.query
        weights = scores.masked_fill(is_pad, float("-inf")).softmax(1)  # (N, T)
        pooled = known[:, 0] if self.pooling == "first" else torch.einsum("nt,ntd->nd", weights, known)
        logits: torch.Tensor = self.probe(pooled)
        return logits


def pad_states(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """(T_n, D) each -> (N, longest, D), NaN behind the shorter ones."""
    return nn.utils.rnn.pad_sequence(list(states), batch_first=True, padding_value=float("nan"))


# --- what a probe shows -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Items:
    """N things to classify: features (N, ...), labels 0 ... C - 1, and the type of each, for the control task."""

    features: torch.Tensor
    labels: Sequence[int]
    types: Sequence[Hashable]


@dataclass(frozen=True, slots=True)
class Found:
    """Accuracies on held-out items in %; `majority` is that of the most common label in training.

    `right` and `control_right` say of each item whether it was classified rightly, on the task and its control task.
    """

    accuracy: float
    control: float
    majority: float
    right: tuple[bool, ...] = ()
    control_right: tuple[bool, ...] = ()

    @property
    def selectivity(self) -> float:
        return self.accuracy - self.control


# Our choice. Weight decay is AdamW's; Hewitt & Liang find that it makes probes more selective.
SETTINGS = FitSettings(steps=300, learning_rates={"probe": 0.01}, autocast=False, log_every=300)


def probe(
    make: Callable[[int], nn.Module],
    train: Items,
    test: Items,
    *,
    batch: int = 256,
    settings: FitSettings = SETTINGS,
    seed: int = 0,
) -> Found:
    """Train `make(classes)` on the task, and another one on its control task, and try both on `test`.

    The control task's labels are drawn from the distribution of the training labels. Types that only `test` has say
    nothing there, and cost the control accuracy. Raises DataError for items that do not go together.
    """
    for name, items in (("train", train), ("test", test)):
        if not len(items.features) == len(items.labels) == len(items.types) > 0:
            raise DataError(
                f"probe: {name} has {len(items.features)} features, {len(items.labels)} labels and {len(items.types)} "
                "types; one of each is needed for every item."
            )
    classes = max(*train.labels, *test.labels) + 1
    by_type = control_task([*train.types, *test.types], train.labels, seed)
    accuracies, rights = [], []
    for of_train, of_test in (
        (train.labels, test.labels),
        ([by_type[one] for one in train.types], [by_type[one] for one in test.types]),
    ):
        module = _trained(make(classes), train.features, torch.tensor(of_train), batch, settings)
        with torch.no_grad():
            right = module(test.features).argmax(1) == torch.tensor(of_test)
        accuracies.append(100 * float(right.float().mean()))
        rights.append(tuple(right.tolist()))
    common = Counter(train.labels).most_common(1)[0][0]
    majority = 100 * sum(label == common for label in test.labels) / len(test.labels)
    return Found(accuracies[0], accuracies[1], majority, *rights)


def control_task(types: Sequence[Hashable], labels: Sequence[int], seed: int = 0) -> dict[Hashable, int]:
    """A label for each type, drawn from the distribution of `labels`; the same for the same types and seed."""
    chances = np.random.default_rng(seed)
    return {one: int(chances.choice(labels)) for one in sorted(set(types), key=repr)}


def _trained(
    module: nn.Module, features: torch.Tensor, labels: torch.Tensor, batch: int, settings: FitSettings
) -> nn.Module:
    def chosen(step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        return torch.randint(len(labels), (batch,), generator=generator)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(module(features[rows]), labels[rows])

    with tempfile.TemporaryDirectory() as folder:
        fit({"probe": module}, chosen, loss, settings, checkpoint=Path(folder) / "checkpoint.safetensors")
    return module
