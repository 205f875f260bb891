"""Rows that come and go write what they write alone: another way to compute what `Bank.generate` is tested for."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from odqa.errors import DataError
from odqa.frozen.backbone import load_backbone
from odqa.frozen.bank import Bank
from odqa.frozen.steps import Steps, Text, make_steps
from tests.tiny_models import tiny_bert
from tests.unit.test_bank import NAMES, ORDER, TEXTS, WRITERS, World, world_of

NEW = 6
# In which turn a row comes; a turn is a step, or a join where nobody is there.
ARRIVALS = [0, 0, 0, 1, 1, 3, 4, 4, 5, 9]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


@pytest.fixture(params=WRITERS)
def world(request: pytest.FixtureRequest, root: Path) -> World:
    return world_of(str(request.param), root)


def write_all(steps: Steps, texts: Sequence[Text], arrivals: Sequence[int], ends: frozenset[int]) -> list[list[int]]:
    """Greedy texts of at most NEW tokens; each row joins in its turn, or as soon as the engine takes it after that."""
    written: list[list[int]] = [[] for _ in texts]
    there: list[int] = []
    waiting = list(range(len(texts)))
    for turn in range(1000):
        coming = [row for row in waiting if arrivals[row] <= turn]
        logits: list[torch.Tensor] = []
        if there:
            logits = list(steps.step([written[row][-1] for row in there]))
        if coming and steps.can_join:
            logits += [of_row[-1] for of_row in steps.join([texts[row] for row in coming])]
            there, waiting = [*there, *coming], [row for row in waiting if row not in coming]
        for row, of_row in zip(there, logits, strict=True):
            written[row].append(int(of_row.argmax()))
        going = [place for place, row in enumerate(there) if len(written[row]) < NEW and written[row][-1] not in ends]
        if len(going) < len(there):
            steps.keep(going)
            there = [there[place] for place in going]
        if not there and not waiting:
            return written
    raise AssertionError("the rows never end")


def test_rows_that_come_and_go_write_what_they_write_alone(world: World) -> None:
    backbone, bank = world.backbone, Bank(world.backbone, world.folder)
    alone = [world.written(name, text) for name, text in zip(NAMES, TEXTS, strict=True)]
    if backbone.architecture == "causal":  # T5 with weights this wide repeats one token; its logits are compared below
        assert len({tuple(text) for text in alone}) >= len(alone) - 3, "rows differ, or the test says little"
    texts = [Text(TEXTS[row], parts=bank.parts(NAMES[row])) for row in ORDER]
    steps = make_steps(backbone)
    for _ in range(2):  # an engine that is empty again begins anew
        assert write_all(steps, texts, ARRIVALS, backbone.end_tokens()) == [alone[row] for row in ORDER]


def test_word_vectors_are_read_as_their_tokens_are(world: World) -> None:
    backbone, bank = world.backbone, Bank(world.backbone, world.folder)
    vectors = [backbone.embed(torch.tensor(text)) for text in TEXTS]
    mixed = [
        Text(TEXTS[row], vectors[row] if row % 2 else None, parts=bank.parts(NAMES[row])) for row in range(len(TEXTS))
    ]
    alone = [world.written(name, text) for name, text in zip(NAMES, TEXTS, strict=True)]
    assert write_all(make_steps(backbone), mixed, ARRIVALS, backbone.end_tokens()) == alone


def causal_worlds(root: Path) -> Iterator[World]:
    yield from (world_of(name, root) for name in ("gpt2", "llama"))


def test_logits_of_all_places_are_those_of_one_forward_pass(root: Path) -> None:
    for world in causal_worlds(root):
        backbone, bank = world.backbone, Bank(world.backbone, world.folder)
        texts = [
            Text(text, parts=bank.parts(name), wants_all=row % 2 == 0)
            for row, (text, name) in enumerate(zip(TEXTS, NAMES, strict=True))
        ]
        for name, text, found in zip(NAMES, texts, make_steps(backbone).join(texts), strict=True):
            whole = world.alone(name, lambda text=text, model=backbone: model.forward([text.ids])[0])
            expected = whole if text.wants_all else whole[-1:]
            torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)  # float32, logits up to 100


def test_logits_of_an_encoder_decoder_are_those_of_one_forward_pass(root: Path) -> None:
    for world in (world_of(name, root) for name in ("t5", "bert2bert", "odqa-mini")):
        backbone, bank = world.backbone, Bank(world.backbone, world.folder)
        steps, going = make_steps(backbone), [8, 2, 5]
        texts = [Text(text, parts=bank.parts(name)) for name, text in zip(NAMES, TEXTS, strict=True)]
        first = steps.join(texts)
        steps.keep(going)
        second = steps.step([40 + row for row in going])
        start = [
            world.alone(n, lambda t=t, m=backbone: m.forward([t], [[9]])[0]) for n, t in zip(NAMES, TEXTS, strict=True)
        ]
        for found, expected in zip(first, start, strict=True):
            torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)
        assert len({float(of_row.sum()) for of_row in first}) == len(first), "rows differ, or the test says little"
        for row, found in zip(going, second, strict=True):
            target = [40 + row, 9]
            whole = world.alone(NAMES[row], lambda t=TEXTS[row], u=target, m=backbone: m.forward([t], [u])[0])
            torch.testing.assert_close(found, whole[1].float(), atol=1e-4, rtol=1e-4)


def test_a_row_keeps_no_memory_of_longer_rows_that_have_left(root: Path) -> None:
    for world in causal_worlds(root):
        steps = make_steps(world.backbone)
        steps.join([Text([41] * 60), Text([42] * 3)])
        steps.step([50, 51])
        steps.keep([1])
        assert steps.width == 4  # type: ignore[attr-defined]


def test_numbers_that_are_none_do_not_reach_the_rows_that_follow(root: Path) -> None:
    """Masked or not: 0 times NaN is NaN. GPT-2, whose norms overflow."""
    world = world_of("gpt2", root)
    steps = make_steps(world.backbone)
    (alone,) = make_steps(world.backbone).join([Text([41, 42])])
    huge = torch.tensor([1e38, -3e38] * 16).expand(9, 32)
    wrong, _ = steps.join([Text(vectors=huge), Text([50] * 12)])
    assert not torch.isfinite(wrong).all()
    steps.step([50, 51])
    steps.keep([1])
    (right,) = steps.join([Text([41, 42])])
    torch.testing.assert_close(right, alone)
    assert torch.isfinite(steps.step([50, 51])).all()


def test_what_cannot_be_computed_is_refused(root: Path, tmp_path: Path) -> None:
    encoder = load_backbone(str(tiny_bert(tmp_path / "bert")), "encoder", device="cpu")
    with pytest.raises(DataError, match="is an encoder and writes no text"):
        make_steps(encoder)
    for world in (world_of("llama", root), world_of("t5", root)):
        with pytest.raises(ValueError, match="text 1 has no tokens"):
            make_steps(world.backbone).join([Text([41]), Text([])])
    steps = make_steps(world_of("t5", root).backbone)
    with pytest.raises(ValueError, match="no logits for places of its source"):
        steps.join([Text([41], wants_all=True)])
    steps.join([Text([41])])
    with pytest.raises(ValueError, match="start together"):
        steps.join([Text([42])])
