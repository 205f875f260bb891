"""What odqa-mini is pre-trained on, and that a pre-training gives a model that loads, the same one each time."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from odqa.corpus.examples import Example
from odqa.errors import ArtifactError
from odqa.frozen.fit import FitSettings
from odqa.lm import pretrain
from odqa.lm.pretrain import IGNORED, Mix, MixSettings, pad, pointing_loss
from odqa.lm.tasks import GAP, INSTRUCTIONS, TASKS, Corpus, make
from odqa.types import Passage
from tests.tiny_models import tiny_bert

TEXT = (
    "The Tiber is the third longest river of Italy and runs through Rome. Its source is on Mount Fumaiolo, at a height "
    "of 1268 metres above the sea. Beyond Rome the river runs west and reaches the sea near Ostia, as it did in 1557."
)
PASSAGES = [Passage(f"p{i}", TEXT, "Tiber") for i in range(3)]
EXAMPLES = [
    Example(f"e{i}", "Where does the Tiber begin?", ("the moon", "Mount Fumaiolo"), PASSAGES[0], (), (), "squad")
    for i in range(3)
]
CORPUS = Corpus(PASSAGES, EXAMPLES)
CPU = torch.device("cpu")


@pytest.mark.parametrize("task", TASKS)
def test_every_task_makes_items_under_its_instruction(task: str) -> None:
    for seed in range(20):
        item = make(task, CORPUS, np.random.default_rng(seed))
        assert item.source.startswith(INSTRUCTIONS[task]) and item.target and item.task == task
        assert item == make(task, CORPUS, np.random.default_rng(seed))


def test_reading_takes_the_first_answer_that_stands_in_the_passage() -> None:
    item = make("read", CORPUS, np.random.default_rng(0))
    assert item.source == (
        f"Answer the question from the passage. Question: Where does the Tiber begin? Passage: Tiber. {TEXT}"
    )
    assert item.target == "Mount Fumaiolo"


def test_what_is_missing_fills_the_gaps() -> None:
    for seed in range(20):
        cloze = make("cloze", CORPUS, np.random.default_rng(seed))
        sentence = cloze.source.removeprefix(f"{INSTRUCTIONS['cloze']} Sentence: ").partition(" Passage: ")[0]
        assert sentence.replace(GAP, cloze.target) in TEXT
        denoise = make("denoise", CORPUS, np.random.default_rng(seed))
        restored = denoise.source.removeprefix(f"{INSTRUCTIONS['denoise']} Tiber. ")
        for missing in denoise.target.split(" | "):
            restored = restored.replace(GAP, missing, 1)
        assert restored in TEXT


def test_a_long_passage_is_the_passage_among_others_of_its_article() -> None:
    article = [Passage(f"p{i}", f"Part {i} " + "and so on " * 25, "Tiber") for i in range(6)]  # 77 words each
    elsewhere = Passage("q", "Something else " * 10, "Po")
    corpus = Corpus([*article, elsewhere], [replace(EXAMPLES[0], passage=replace(article[2], text=TEXT))], 1.0)
    for seed in range(20):
        source = make("read", corpus, np.random.default_rng(seed)).source
        shown = source.partition("Passage: Tiber. ")[2]
        assert TEXT in shown and "Something else" not in shown
        # 43 words of its own, then as many parts of 77 as stay below 270
        assert shown.count("Part ") == 2


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("encoder") / "bert", window=512)


def test_batches_depend_on_seed_and_number_alone_and_hold_the_shares(encoder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    settings = MixSettings({"read": 1.0, "recall": 0.0}, items=4)
    mix = Mix(CORPUS, tokenizer, settings, decoder_only=False)
    first, other = mix(0), mix(17)
    again = Mix(CORPUS, tokenizer, settings, decoder_only=False)
    assert torch.equal(again(17).input_ids, other.input_ids) and torch.equal(again(0).labels, first.labels)
    assert first.input_ids.shape[1] % 16 == 0 and len(first.input_ids) == 4
    target = tokenizer("Mount Fumaiolo", add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id]
    assert [label for label in first.labels[0].tolist() if label != IGNORED] == target


def test_a_decoder_is_trained_on_targets_and_on_plain_texts(tmp_path: Path) -> None:
    tokenizer = pretrain.train_tokenizer([TEXT], 300, tmp_path, 512)
    for task in ("plain", "recall"):
        batch = Mix(CORPUS, tokenizer, MixSettings({task: 1.0}, items=2), decoder_only=True)(0)
        kept = [label for label in batch.labels[0].tolist() if label != IGNORED]
        text = tokenizer.decode(kept, skip_special_tokens=True)
        assert text == (" the moon" if task == "recall" else f"Tiber. {TEXT}")
        assert kept[-1] == tokenizer.eos_token_id


def test_pointing_at_the_label_costs_nothing_and_labels_outside_of_the_source_do_not_count() -> None:
    source, labels = torch.tensor([[4, 5, 6]]), torch.tensor([[5, 9, IGNORED]])
    pointed = torch.tensor([[[0.25, 0.5, 0.25], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]])
    torch.testing.assert_close(pointing_loss(pointed, source, labels), torch.tensor(2.0).log())
    assert float(pointing_loss(pointed, source, torch.full((1, 3), IGNORED))) == 0.0


def test_rows_are_padded_to_a_few_widths() -> None:
    ids, mask = pad([[1, 2], [3]], 0, step=4)
    assert ids.tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]] and mask.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


FIT = FitSettings(
    steps=4, learning_rates={"update": 1e-3, "decoder": 1e-3, "model": 1e-3}, autocast=False, checkpoint_seconds=0.0
)


def pretrained(kind: str, folder: Path, encoder: Path, fit: FitSettings) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    mix = MixSettings({"read": 0.5, "cloze": 0.5}, items=4, longest=96)
    common: dict[str, Any] = {"checkpoint": folder / pretrain.CHECKPOINT, "device": CPU}
    if kind == "encoder-decoder":
        sizes = SimpleNamespace(encoder=str(encoder), layers=(0, 1), rank=2, alpha=4.0)
        tune = {"tune": EXAMPLES[:1]}
        curve, _ = pretrain.pretrain_encoder_decoder(folder, sizes, CORPUS, mix, tune, fit, **common)
    else:
        sizes = SimpleNamespace(vocabulary=300, width=16, layers=2, heads=2, inner=32, window=512)
        curve, _ = pretrain.pretrain_decoder(folder, sizes, CORPUS, mix, fit, **common)
    return curve


@pytest.mark.parametrize("kind", ["encoder-decoder", "decoder"])
def test_a_pretraining_that_was_stopped_ends_with_the_same_bytes(kind: str, encoder: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    curve = pretrained(kind, whole, encoder, FIT)
    assert ("tune.em" in curve[-1]) == (kind == "encoder-decoder")

    class Stopped(Exception):
        pass

    calls, batch = iter(range(2)), Mix.__call__

    def limited(self: Mix, index: int) -> Any:
        if next(calls, None) is None:
            raise Stopped
        return batch(self, index)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(Mix, "__call__", limited)
        pretrained(kind, parts, encoder, FIT)
    pretrained(kind, parts, encoder, replace(FIT, log_every=1))
    weights = "parts.safetensors" if kind == "encoder-decoder" else "model.safetensors"
    assert (whole / weights).read_bytes() == (parts / weights).read_bytes()
    auto = AutoModelForSeq2SeqLM if kind == "encoder-decoder" else AutoModelForCausalLM
    model, tokenizer = auto.from_pretrained(parts), AutoTokenizer.from_pretrained(parts)
    out = model.generate(**tokenizer("Where does the Tiber begin?", return_tensors="pt", return_token_type_ids=False))
    assert out.shape[0] == 1


def test_a_later_edition_begins_with_what_an_earlier_one_saved(encoder: Path, tmp_path: Path) -> None:
    def train(name: str, start: Path | None, fit: FitSettings) -> dict[str, torch.Tensor]:
        folder = tmp_path / name
        folder.mkdir()
        sizes = SimpleNamespace(encoder=str(encoder), layers=(0, 1), rank=2, alpha=4.0)
        mix = MixSettings({"read": 1.0}, items=4, longest=96)
        common: dict[str, Any] = {"checkpoint": folder / pretrain.CHECKPOINT, "device": CPU, "start": start}
        pretrain.pretrain_encoder_decoder(folder, sizes, CORPUS, mix, {}, fit, **common)
        return load_file(folder / "parts.safetensors")

    still = replace(FIT, steps=1, learning_rates={"update": 0.0, "decoder": 0.0})
    first = train("first", None, replace(FIT, steps=8))
    second = train("second", tmp_path / "first", still)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    (tmp_path / "first" / "parts.safetensors").unlink()
    save_file({**first, "output.mean": torch.zeros(3)}, tmp_path / "first" / "parts.safetensors")
    with pytest.raises(ArtifactError, match=r"output\.mean has shape"):
        train("third", tmp_path / "first", still)


def test_the_curve_is_written_without_seconds(tmp_path: Path) -> None:
    pretrain.write_curve(tmp_path, [{"step": 1, "loss": 2.0, "seconds": 9.0}])
    assert json.loads((tmp_path / "curve.json").read_text()) == [{"step": 1, "loss": 2.0}]
