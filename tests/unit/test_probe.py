"""Probes find what a layer says, the control task finds what they only remember: on states with known answers."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.backbone import load_backbone
from odqa.frozen.probe import (
    Bilinear,
    Items,
    Linear,
    Mlp,
    Pooled,
    Pooling,
    control_task,
    layer_states,
    pad_states,
    probe,
)
from tests.tiny_models import tiny_bert, tiny_llama, tiny_odqa_mini, tiny_t5

ROWS = [[41, 42, 43, 44, 45], [51, 52], [61, 62, 63]]


@pytest.mark.parametrize(
    ("make", "architecture"), [(tiny_bert, "encoder"), (tiny_llama, "causal"), (tiny_t5, "seq2seq")]
)
def test_states_are_those_that_transformers_shows(make: object, architecture: str, tmp_path: Path) -> None:
    backbone = load_backbone(str(make(tmp_path / "model")), architecture, device="cpu", dtype="float32")  # type: ignore[operator, arg-type]
    reader = backbone.model.get_encoder() if architecture == "seq2seq" else backbone.model
    for row, found in zip(ROWS, layer_states(backbone, ROWS, batch_size=2), strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            shown = reader(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True).hidden_states
        # Llama's and T5's last entry there is behind the final normalisation.
        same = len(shown) if architecture == "encoder" else len(shown) - 1
        assert found.shape == (3, len(row), 32)
        torch.testing.assert_close(
            found[:same], torch.stack([state[0] for state in shown[:same]]), atol=1e-4, rtol=1e-5
        )


def test_an_encoder_that_shows_no_states_shows_them_here(tmp_path: Path) -> None:
    backbone = load_backbone(str(tiny_odqa_mini(tmp_path / "mini")), "seq2seq", device="cpu", dtype="float32")
    last = [states[-1] for states in layer_states(backbone, ROWS)]
    with torch.no_grad():
        encoded = backbone.encode(ROWS[:1]).states[0, :, :32]  # beside them the word vectors
    torch.testing.assert_close(last[0], encoded, atol=1e-5, rtol=1e-5)


def words(number: int, width: int, copies: int, seed: int = 0) -> tuple[torch.Tensor, list[int]]:
    """A vector a type, seen `copies` times with a little noise: features (N, D) and types."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(number, width, generator=generator)
    types = [number_ for number_ in range(number) for _ in range(copies)]
    return vectors[types] + 0.05 * torch.randn(len(types), width, generator=generator), types


def test_a_linear_probe_is_selective_where_an_mlp_remembers() -> None:
    """The finding of Hewitt & Liang. The label is readable off a vector by a plane; 200 types lie in 24 dimensions, of
    which a plane can label about twice 24 at will, an MLP with 100 hidden units all of them."""
    features, types = words(200, 24, 4)
    plane = torch.randn(24, generator=torch.Generator().manual_seed(5))
    by_type = features[::4] @ plane > 0  # the first of each type
    labels = [int(by_type[one]) for one in types]
    train = Items(features[::2], labels[::2], types[::2])
    test = Items(features[1::2], labels[1::2], types[1::2])
    linear = probe(lambda classes: Linear(24, classes), train, test)
    mlp = probe(lambda classes: Mlp(24, classes), train, test)
    assert linear.accuracy > 95 and mlp.accuracy > 95 and 40 < linear.majority < 60
    assert mlp.control > 95 > 80 > linear.control
    assert linear.selectivity > mlp.selectivity + 15


def test_a_bilinear_probe_reads_a_relation_that_is_in_neither_vector() -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = torch.randn(1200, 2, 8, generator=generator)
    labels = [int(one @ other > 0) for one, other in pairs]
    types = list(range(len(labels)))
    train, test = Items(pairs[:900], labels[:900], types[:900]), Items(pairs[900:], labels[900:], types[900:])
    bilinear = probe(lambda classes: Bilinear(8, classes), train, test)
    linear = probe(lambda classes: nn.Sequential(nn.Flatten(), Linear(16, classes)), train, test)
    assert bilinear.accuracy > 90 and linear.accuracy < 60
    # Every pair is a type of its own, so nothing can be known of the control labels of the held-out ones.
    assert 35 < bilinear.control < 65


def test_attention_finds_the_token_that_knows_and_the_mean_is_where_it_starts() -> None:
    generator = torch.Generator().manual_seed(2)
    texts, labels = [], []
    for _ in range(800):
        states = torch.randn(int(torch.randint(3, 12, (1,), generator=generator)), 8, generator=generator)
        place, label = (
            int(torch.randint(len(states), (1,), generator=generator)),
            int(torch.randint(2, (1,), generator=generator)),
        )
        states[:, 7] = 0.0
        states[place, 7], states[place, 6] = 3.0, 2.0 * label - 1.0  # the marker, and what the marked token knows
        texts.append(states)
        labels.append(label)
    features, types = pad_states(texts), list(range(800))
    train, test = Items(features[:600], labels[:600], types[:600]), Items(features[600:], labels[600:], types[600:])

    def pooled(pooling: Pooling) -> float:
        return probe(lambda classes: Pooled(Linear(8, classes), pooling, 8), train, test).accuracy

    assert pooled("attention") > 90 > pooled("mean")
    mean, attention = Pooled(nn.Identity(), "mean", 8), Pooled(nn.Identity(), "attention", 8)
    with torch.no_grad():
        expected = torch.stack([states.mean(0) for states in texts])
        for module in (mean, attention):
            torch.testing.assert_close(module(features), expected, atol=1e-6, rtol=1e-5)
        first = Pooled(nn.Identity(), "first", 8)(features)
        assert torch.equal(first, torch.stack([states[0] for states in texts]))


def test_a_control_task_gives_types_labels_as_common_as_the_tasks() -> None:
    labels = [0] * 80 + [1] * 20
    task = control_task(range(2000), labels, seed=1)
    assert task == control_task(reversed(range(2000)), labels, seed=1) != control_task(range(2000), labels, seed=2)
    # 2,000 draws: a standard deviation is 0.9 points.
    assert Counter(task.values())[1] / 2000 == pytest.approx(0.2, abs=0.04)


def test_what_does_not_go_together_is_refused() -> None:
    good = Items(torch.zeros(2, 4), [0, 1], ["a", "b"])
    for bad in (Items(torch.zeros(2, 4), [0], ["a", "b"]), Items(torch.zeros(0, 4), [], [])):
        with pytest.raises(DataError, match="probe: test has"):
            probe(lambda classes: Linear(4, classes), good, bad)
    with pytest.raises(DataError, match="pooling is 'last'"):
        Pooled(Linear(4, 2), "last", 4)  # type: ignore[arg-type]
