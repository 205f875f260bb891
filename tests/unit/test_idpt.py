"""ID-PT: the prompt is made from the text, from nothing behind it, and by a frozen encoder. See test_methods.py too."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from odqa.config import InputPromptSettings
from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.frozen.backbone import Backbone, fingerprint, frozen_guard, load_backbone
from odqa.frozen.before_text import Given
from odqa.frozen.idpt import InputPrompt
from odqa.frozen.method import load_method
from odqa.frozen.mixture import Workshop
from odqa.frozen.prompt_tuning import PromptTuning
from odqa.read.lm import LmReader
from odqa.types import Hit, PackedContext, Passage, Query
from tests.tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_odqa_mini, tiny_t5

SIZES: dict[str, Any] = {"length": 4, "encoder_length": 3, "inner": 8, "heads": 2}
TEXT = "the king was born in paris"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_gpt2(root / "gpt2")
    tiny_t5(root / "t5", factor=1.0)
    tiny_bert(root / "bert", window=32)
    tiny_bert(root / "other", window=32, seed=1)
    tiny_odqa_mini(root / "mini")
    return root


@pytest.fixture
def gpt2(folder: Path) -> Backbone:
    return load_backbone(str(folder / "gpt2"), "causal", device="cpu", dtype="float32")


@pytest.fixture
def t5(folder: Path) -> Backbone:
    return load_backbone(str(folder / "t5"), "seq2seq", device="cpu", dtype="float32")


def moved(method: InputPrompt) -> InputPrompt:
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in method.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.3)
    return method


def ids_of(backbone: Backbone, text: str) -> list[int]:
    ids: list[int] = backbone.tokenizer(text)["input_ids"]
    return ids


@torch.no_grad()
def prompts(method: InputPrompt, rows: list[list[int]]) -> torch.Tensor:
    """(B, P, D) of rows of equal length; the method is attached."""
    ids = torch.tensor(rows)
    return method._of_text(Given(ids, torch.ones_like(ids)))


def test_a_fresh_one_is_prompt_tuning_from_random_words(folder: Path, t5: Backbone) -> None:
    sources, targets = [[41, 42, 43], [51]], [[71], [72, 73]]
    found = []
    for method in (
        PromptTuning(t5, length=4, seed=5),
        InputPrompt(t5, encoder=str(folder / "bert"), **SIZES, seed=5),
        InputPrompt(t5, **SIZES, seed=5),
    ):
        method.attach(t5)
        with torch.no_grad():
            found.append(t5.token_losses(sources, targets))
        method.detach()
    assert torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])


def test_each_text_has_a_prompt_of_its_own_and_of_the_same_length(t5: Backbone) -> None:
    method = moved(InputPrompt(t5, **SIZES))
    method.attach(t5)
    texts = [[41, 42, 43, 44, 45], [41, 42, 43, 44, 46], [41, 42, 43, 44, 45]]
    found = prompts(method, texts)
    assert found.shape == (3, 4, 32) and prompts(method, [[41] * 20]).shape == (1, 4, 32)
    torch.testing.assert_close(found[0], found[2], atol=1e-6, rtol=1e-5)
    assert (found[0] - found[1]).abs().amax(-1).min() > 1e-3, "each of the four vectors sees the last word"


@pytest.mark.parametrize("own", [True, False], ids=["own layers", "a BERT"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_causal_models_prompt_knows_nothing_of_the_target(own: bool, side: Any, gpt2: Backbone, folder: Path) -> None:
    method = moved(InputPrompt(gpt2, encoder=None if own else str(folder / "bert"), **SIZES))
    method.attach(gpt2)
    sources = [ids_of(gpt2, TEXT), ids_of(gpt2, "the river")]
    with torch.no_grad():
        one = gpt2.token_losses(sources, [[71, 72, 73], [74, 75, 76]], padding=side)
        two = gpt2.token_losses(sources, [[71, 72, 99], [74, 75, 98]], padding=side)
        alone = gpt2.forward(sources, padding=side)
        together = gpt2.forward(sources, [[71], [72]], padding=side)
    torch.testing.assert_close(one[:, :2], two[:, :2], atol=1e-6, rtol=1e-6)
    assert (one[:, 2] - two[:, 2]).abs().min() > 1e-3
    place = slice(-1, None) if side == "left" else slice(0, 2)  # the last words of the sources, their first two
    behind = slice(-2, -1) if side == "left" else slice(0, 2)
    torch.testing.assert_close(alone[:, place], together[:, behind], atol=1e-5, rtol=1e-5)


def test_another_tokenizer_is_given_the_text(folder: Path, gpt2: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    method = InputPrompt(gpt2, encoder=str(folder / "bert"), **SIZES)
    read: list[Any] = []
    bert = method._reader[0].backbone
    embed = Backbone.embed

    def watched(self: Backbone, ids: torch.Tensor) -> torch.Tensor:
        if self is bert:
            read.append(ids.tolist())
        return embed(self, ids)

    monkeypatch.setattr(Backbone, "embed", watched)
    method.attach(gpt2)
    gpt2.forward([ids_of(gpt2, TEXT)])
    assert read == [[ids_of(bert, TEXT)]], "with [CLS] and [SEP], all of the text"


def test_the_same_vocabulary_is_given_the_same_ids(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mini = load_backbone(str(folder / "mini"), "seq2seq", device="cpu", dtype="float32")
    method = InputPrompt(mini, encoder=str(folder / "bert"), **SIZES)
    monkeypatch.setattr(type(mini.tokenizer), "batch_decode", lambda *_a, **_k: pytest.fail("decoded"))
    method.attach(mini)
    mini.encode([ids_of(mini, TEXT)])


def test_an_encoder_decoder_can_be_the_encoder(folder: Path, gpt2: Backbone) -> None:
    method = InputPrompt(gpt2, encoder=str(folder / "t5"), **SIZES)
    assert method._reader[0].backbone.architecture == "seq2seq" and method.key.in_features == 32


def test_training_moves_neither_model_nor_encoder(folder: Path, gpt2: Backbone) -> None:
    method = moved(InputPrompt(gpt2, encoder=str(folder / "bert"), **SIZES))
    encoder = method._reader[0].backbone
    method.attach(gpt2)
    with frozen_guard(gpt2), frozen_guard(encoder):
        optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
        gpt2.loss([ids_of(gpt2, TEXT)], [[71, 72]]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    count = method.count(gpt2)
    assert count.frozen == gpt2.count_parameters() + encoder.count_parameters()
    assert count.trainable == 3 * 32 + 4 * 8 + 2 * 8 * 32 + 32 * 8 + 4 * 32


def test_another_encoder_is_refused(folder: Path, gpt2: Backbone, tmp_path: Path) -> None:
    method = InputPrompt(gpt2, encoder=str(folder / "bert"), **SIZES)
    method.save(tmp_path)
    description = json.loads((tmp_path / "method.json").read_text())
    bert = load_backbone(str(folder / "bert"), "encoder", device="cpu", dtype="float32")
    assert description["settings"]["encoder_fingerprint"] == fingerprint(bert.model) == bert.fingerprint
    description["settings"]["encoder"] = str(folder / "other")
    (tmp_path / "method.json").write_text(json.dumps(description))
    with pytest.raises(ArtifactMismatch, match=f"trained with an encoder {bert.fingerprint[:8]}; .*other is "):
        load_method(tmp_path, gpt2)


def test_a_text_that_does_not_fit_the_encoder_is_named_unless_it_reads_the_beginning_only(
    folder: Path, gpt2: Backbone
) -> None:
    long, short = ids_of(gpt2, " ".join(["river"] * 31)), ids_of(gpt2, "river")
    method = InputPrompt(gpt2, encoder=str(folder / "bert"), **SIZES)
    method.attach(gpt2)
    with pytest.raises(
        DataError, match=r"row 1 of the batch has 33 tokens .*bert, whose window is 32\. Set read to 32"
    ):
        gpt2.forward([short, long])
    method.detach()
    begins = moved(InputPrompt(gpt2, encoder=str(folder / "bert"), read=5, **SIZES))
    begins.attach(gpt2)
    found = prompts(begins, [long, [*long[:-1], long[0]]])
    assert torch.equal(found[0], found[1]), "the last word is not read"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 256}, "id-pt: a prompt of 256 vectors leaves no room for text in the window of 256"),
        ({"encoder_length": 256}, "id-pt: its encoder: a prompt of 256 vectors leaves no room"),
        ({"length": 0}, "id-pt: length is 0"),
        ({"encoder_length": 0}, "id-pt: encoder_length is 0"),
        ({"inner": 7}, "id-pt: inner 7 is no multiple of heads 2"),
        ({"read": 0}, "id-pt: read is 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str, gpt2: Backbone) -> None:
    with pytest.raises(DataError, match=message):
        InputPrompt(gpt2, **{**SIZES, **settings})


def test_prompt_and_text_share_a_causal_models_window(gpt2: Backbone) -> None:
    method = InputPrompt(gpt2, **{**SIZES, "length": 250})
    assert method.virtual_tokens(gpt2) == 250
    method.attach(gpt2)
    with pytest.raises(DataError, match="250 vectors and a text of 10 tokens do not fit the window of 256"):
        gpt2.token_losses([[41] * 9], [[42]])


def test_word_vectors_are_no_text(gpt2: Backbone) -> None:
    InputPrompt(gpt2, **SIZES).attach(gpt2)
    with pytest.raises(DataError, match="the model is given word vectors; it reads token ids only"):
        gpt2.model(inputs_embeds=torch.zeros(1, 3, 32))


def test_a_bank_says_that_rows_cannot_have_one_each(gpt2: Backbone) -> None:
    with pytest.raises(ArtifactError, match="anna: id-pt cannot be one row's own"):
        Workshop(gpt2).make("id-pt", SIZES, {}, "anna")


def test_a_recipe_says_all_that_it_takes() -> None:
    taken = set(inspect.signature(InputPrompt.__init__).parameters) - {"self", "backbone", "encoder_fingerprint"}
    assert set(InputPromptSettings.model_fields) - {"kind"} == taken


@pytest.mark.parametrize("options", [{}, {"candidates": 2, "beams": 2}, {"candidates": 2, "sample": True}])
def test_a_reader_answers_with_a_prompt_for_each_context(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """Together as alone, whatever the batch: the prompt is that of the question, not of the batch."""
    llama = tiny_llama(tmp_path / "llama")
    contexts = [
        PackedContext(Query(name, asked), "", hits, 0, 200, ())
        for name, asked, hits in (
            ("q1", "who was born in paris", (Hit(Passage("1", TEXT, "king"), 1.0, "t"),)),
            ("q2", "which river", (Hit(Passage("2", "the seine is a river", ""), 1.0, "t"),)),
        )
    ]
    backbone = load_backbone(str(llama), "causal", device="cpu", dtype="float32")
    plain = LmReader(backbone, max_new_tokens=5, **options)
    priced = [_priced(plain, context) for context in contexts]
    without = plain.read(priced)
    method = moved(InputPrompt(backbone, encoder=str(folder / "bert"), read=32, **SIZES))
    reader = LmReader(backbone, method=method, max_new_tokens=5, **options)
    assert reader.limit == plain.limit - 4
    together = reader.read(priced)
    assert [reader.read([one])[0].text for one in priced] == [answer.text for answer in together]
    assert [answer.text for answer in together] != [answer.text for answer in without]
    method.detach()
    assert fingerprint(backbone.model) == backbone.fingerprint


def _priced(reader: LmReader, context: PackedContext) -> PackedContext:
    costs = reader.costs(context.query, context.hits)
    tokens = costs.fixed + sum(price for price in costs.passages if price is not None)
    return PackedContext(context.query, context.text, context.hits, tokens, context.budget, ())
