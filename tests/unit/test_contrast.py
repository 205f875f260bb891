"""The in-batch loss, and the gradient cache: the same gradients with the memory of one part."""

import math

import pytest
import torch
from torch import nn

from odqa.frozen.contrast import Inputs, Texts, encode_texts, in_batch_loss


def vectors(rows: int, seed: int) -> torch.Tensor:
    drawn = torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))
    return nn.functional.normalize(drawn, dim=1)


def test_the_loss_is_a_softmax_over_all_passages_of_the_batch() -> None:
    """Two questions, three passages, t = 0.5. Scores / t: (2, 0, 1) with own 0, and (0, 1, 0) with own 2."""
    questions = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    passages = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.5, 0.0]])
    loss = in_batch_loss(
        questions, passages, torch.tensor([0, 2]), torch.zeros(2, 3, dtype=torch.bool), temperature=0.5
    )
    first = -math.log(math.exp(2) / (math.exp(2) + 1 + math.exp(1)))
    second = -math.log(1 / (1 + math.exp(1) + 1))
    assert loss.item() == pytest.approx((first + second) / 2, abs=1e-6)


def test_a_passage_that_is_left_out_is_as_if_it_were_not_there() -> None:
    questions, passages, own = vectors(3, 0), vectors(5, 1), torch.tensor([0, 1, 2])
    out = torch.zeros(3, 5, dtype=torch.bool)
    out[:, 3] = True
    without = in_batch_loss(questions, passages[[0, 1, 2, 4]], own, out[:, [0, 1, 2, 4]], temperature=0.05)
    passages.requires_grad_(True)
    loss = in_batch_loss(questions, passages, own, out, temperature=0.05)
    assert loss.item() == pytest.approx(without.item(), abs=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert passages.grad is not None and not passages.grad[3].any() and passages.grad[4].any()


def test_the_loss_equals_that_of_sentence_transformers() -> None:
    """MultipleNegativesRankingLoss with one hard negative a question; its scale is 1 / temperature."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.sentence_transformer.modules import BoW

    theirs = MultipleNegativesRankingLoss(SentenceTransformer(modules=[BoW(["word"])]), scale=20.0)
    questions, right, wrong = vectors(6, 0), vectors(6, 1), vectors(6, 2)
    expected = theirs.compute_loss_from_embeddings([questions, right, wrong], torch.empty(0))
    none = torch.zeros(6, 12, dtype=torch.bool)
    found = in_batch_loss(questions, torch.cat([right, wrong]), torch.arange(6), none, temperature=0.05)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_is_computed_in_float32_under_autocast() -> None:
    questions, passages, own = vectors(4, 0), vectors(4, 1), torch.arange(4)
    none = torch.zeros(4, 4, dtype=torch.bool)
    expected = in_batch_loss(questions, passages, own, none, temperature=0.01)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(in_batch_loss(questions, passages, own, none, temperature=0.01), expected)


# --- the gradient cache -----------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Tokens to unit vectors, with dropout, so that the second pass must repeat the random choices of the first."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.inner, self.outer = nn.Linear(16, 32), nn.Linear(32, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Inputs) -> torch.Tensor:
        states = self.dropout(torch.tanh(self.inner(self.words(inputs["ids"]).mean(dim=1))))
        return nn.functional.normalize(self.outer(states), dim=1)


def texts(count: int, part: int) -> Texts:
    ids = torch.randint(50, (count, 7), generator=torch.Generator().manual_seed(3))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(4))
    rows = list(order.split(part))
    return Texts([{"ids": ids[chosen]} for chosen in rows], rows)


def step(*, part: int, cache: bool, dropout: float = 0.0, autocast: bool = False) -> tuple[float, list[torch.Tensor]]:
    """Loss and gradients of one step over 12 questions and 24 passages, encoded `part` at a time."""
    torch.manual_seed(0)
    encoder = Encoder(dropout).train()
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        questions = encode_texts(encoder, texts(12, part), cache=cache)
        passages = encode_texts(encoder, texts(24, part), cache=cache)
        loss = in_batch_loss(
            questions, passages, torch.arange(12), torch.zeros(12, 24, dtype=torch.bool), temperature=0.05
        )
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), [tensor.grad for tensor in encoder.parameters() if tensor.grad is not None]


@pytest.mark.parametrize("part", [1, 5, 24])
def test_gradients_with_the_cache_equal_those_of_one_pass_over_the_whole_batch(part: int) -> None:
    whole, expected = step(part=24, cache=False)
    loss, found = step(part=part, cache=True)
    assert loss == pytest.approx(whole, rel=1e-6) and len(found) == len(expected) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # sums of another order


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_the_second_pass_repeats_dropout_and_number_format_of_the_first(autocast: bool) -> None:
    whole, expected = step(part=5, cache=False, dropout=0.3, autocast=autocast)
    loss, found = step(part=5, cache=True, dropout=0.3, autocast=autocast)
    assert loss == whole
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def held_bytes(count: int, *, cache: bool) -> int:
    """Bytes that autograd holds between the forward and the backward pass for `count` texts, four at a time."""
    held: list[int] = []

    def hold(tensor: torch.Tensor) -> torch.Tensor:
        held.append(tensor.nbytes)
        return tensor

    # The hooks of a checkpoint are inside of these: what it keeps from being held does not get here.
    with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
        encode_texts(Encoder(0.0), texts(count, 4), cache=cache)
    return sum(held)


def test_with_the_cache_only_vectors_are_held() -> None:
    """Of 64 texts: 16 numbers of their words, 32 inside, the vector of 8. With it the vector, and the text's number."""
    assert held_bytes(64, cache=False) > 64 * (16 + 32 + 8) * 4
    assert held_bytes(64, cache=True) <= 64 * (8 * 4 + 8)


def test_a_part_is_encoded_again_only_when_the_one_before_is_done() -> None:
    encoder, log = Encoder(0.0), []

    def encode(inputs: Inputs) -> torch.Tensor:
        number = int(inputs["number"])
        log.append(f"encode {number}")
        vectors = encoder(inputs)
        vectors.register_hook(lambda grad: log.append(f"gradient {number}"))
        return vectors  # type: ignore[no-any-return]

    whole = texts(12, 4)
    parts = [{**part, "number": torch.tensor(number)} for number, part in enumerate(whole.parts)]
    encode_texts(encode, Texts(parts, whole.rows), cache=True).square().sum().backward()  # type: ignore[no-untyped-call]
    assert log[:3] == ["encode 0", "encode 1", "encode 2"]
    again = [entry for entry in log[3:] if entry.startswith("encode")]
    assert sorted(again) == log[:3]
    for entry in again:  # its gradient comes right before or right behind
        number, at = entry.split()[1], log.index(entry, 3)
        assert f"gradient {number}" in log[at - 1 : at + 2]
