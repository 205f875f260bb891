"""odqa-mini as a model of transformers: how it loads, and that every way through it gives the same logits."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from odqa.errors import ArtifactMismatch
from odqa.frozen.backbone import load_backbone
from odqa.lm.mini import PARTS, OdqaMiniForConditionalGeneration, configure, start_from_encoder
from odqa.lm.pretrain import save_tokenizer
from odqa.models import embedded_folder
from tests.tiny_models import tiny_bert

RANK = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small odqa-mini over a small BERT, saved as parts, every tensor of them drawn at random."""
    from transformers import AutoTokenizer

    encoder = tiny_bert(tmp_path_factory.mktemp("encoder") / "bert")
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    config = configure(str(encoder), tokenizer, rank=RANK, alpha=4.0, decoder_layers=2)
    generator = torch.Generator().manual_seed(0)
    weights = start_from_encoder(config, (0, 1))
    parts = {
        name: value + 0.1 * torch.randn(value.shape, generator=generator)
        for name, value in weights.items()
        if not name.startswith("encoder.")
    }
    for layer in range(config.num_hidden_layers):
        name = f"encoder/layer/{layer}/intermediate/dense"
        parts[f"update.A.{name}"] = torch.randn(RANK, config.hidden_size, generator=generator)
        parts[f"update.B.{name}"] = torch.randn(config.intermediate_size, RANK, generator=generator)
    path = tmp_path_factory.mktemp("models") / "odqa-mini"
    config.save_pretrained(path)
    save_file(parts, path / PARTS)
    save_tokenizer(tokenizer, path, config.max_position_embeddings)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


TEXTS = ["which river is in rome", "the capital of france is paris and the river is the seine", "gold"]


def inputs(tokenizer: Any, texts: list[str], side: str = "right") -> dict[str, torch.Tensor]:
    tokenizer.padding_side = side
    found = tokenizer(texts, return_tensors="pt", padding=True)
    return {name: found[name] for name in ("input_ids", "attention_mask")}


def test_the_auto_classes_know_it_once_odqa_is_imported(folder: Path) -> None:
    for imports in ("import odqa; import transformers", "import transformers.models.auto.modeling_auto; import odqa"):
        code = (
            f"{imports}; from transformers import AutoConfig, AutoModelForSeq2SeqLM; "
            f"m = AutoModelForSeq2SeqLM.from_pretrained({str(folder)!r}); print(type(m).__name__)"
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert out.stdout.strip() == "OdqaMiniForConditionalGeneration"


def test_importing_odqa_loads_no_model_library() -> None:
    code = "import odqa, sys; print([n for n in ('torch', 'transformers') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_the_low_rank_update_is_in_the_encoder(folder: Path, model: Any) -> None:
    from safetensors.torch import load_file

    parts = load_file(folder / PARTS)
    own = load_file(Path(model.config.encoder_name) / "model.safetensors")
    name = "encoder/layer/1/intermediate/dense"
    expected = (
        own["encoder.layer.1.intermediate.dense.weight"] + 2.0 * parts[f"update.B.{name}"] @ parts[f"update.A.{name}"]
    )
    torch.testing.assert_close(model.encoder.bert.encoder.layer[1].intermediate.dense.weight.detach(), expected)


def test_another_encoder_is_refused(folder: Path) -> None:
    config = AutoConfig.from_pretrained(folder)
    config.encoder_sha256 = "0" * 64
    with pytest.raises(ArtifactMismatch, match="trained with 00000000"):
        OdqaMiniForConditionalGeneration.from_pretrained(folder, config=config)


def test_saved_whole_it_loads_with_the_same_logits(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    given = inputs(tokenizer, TEXTS) | {"labels": torch.tensor([[5, 6], [7, 8], [9, -100]])}
    with torch.no_grad():
        assert torch.equal(model(**given).logits, again(**given).logits)


def test_it_is_a_backbone_with_one_fingerprint(folder: Path) -> None:
    first, second = (
        load_backbone(str(folder), "seq2seq", device="cpu", dtype=kind) for kind in ("float32", "bfloat16")
    )
    assert first.fingerprint == second.fingerprint


@torch.no_grad()
def test_padding_changes_nothing_on_either_side(model: Any, tokenizer: Any) -> None:
    labels = torch.tensor([[5, 6, 7]])
    for text in TEXTS:
        alone = model(**inputs(tokenizer, [text]), labels=labels).logits[0]
        for side in ("left", "right"):
            batch = model(**inputs(tokenizer, TEXTS, side), labels=labels.repeat(3, 1)).logits[TEXTS.index(text)]
            torch.testing.assert_close(batch, alone, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_cached_and_uncached_generation_agree(model: Any, tokenizer: Any, beams: int) -> None:
    given = inputs(tokenizer, TEXTS)
    texts = [
        model.generate(**given, max_new_tokens=8, min_new_tokens=8, num_beams=beams, do_sample=False, use_cache=cached)
        for cached in (True, False)
    ]
    assert torch.equal(*texts)


@torch.no_grad()
def test_word_vectors_do_what_their_ids_do(model: Any, tokenizer: Any) -> None:
    given = inputs(tokenizer, TEXTS)
    vectors = model.get_input_embeddings()(given["input_ids"])
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": given["attention_mask"]}
    by_ids, by_vectors = (
        model.generate(**one, **options) for one in ({"input_ids": given["input_ids"]}, {"inputs_embeds": vectors})
    )
    assert torch.equal(by_ids, by_vectors)


def test_the_pointer_sees_text_and_no_padding(model: Any, tokenizer: Any) -> None:
    given = inputs(tokenizer, TEXTS)
    out = model(**given, labels=torch.tensor([[5], [6], [7]]), output_attentions=True)
    pointed = out.cross_attentions[0]
    assert pointed.shape == (3, 1, 1, given["input_ids"].shape[1])
    torch.testing.assert_close(pointed.sum(-1), torch.ones(3, 1, 1))
    assert not pointed[:, 0, 0][given["attention_mask"] == 0].any()


def test_the_loss_is_the_mean_over_labels_and_a_call_without_targets_is_an_error(model: Any, tokenizer: Any) -> None:
    given = inputs(tokenizer, TEXTS[:1])
    out = model(**given, labels=torch.tensor([[5, 6, -100]]))
    by_hand = torch.nn.functional.cross_entropy(out.logits[0, :2], torch.tensor([5, 6]))
    torch.testing.assert_close(out.loss, by_hand)
    with pytest.raises(ValueError, match="decoder_input_ids"):
        model(**given)


def test_the_embedded_decoder_is_small_and_knows_the_words_of_a_sentence() -> None:
    folder = embedded_folder("embedded:odqa-mini-d1")
    assert folder is not None
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8e6
    backbone = load_backbone("embedded:odqa-mini-d1", "causal", device="cpu", dtype="float32")

    def nats(text: str) -> float:
        ids = backbone.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            return float(backbone.model(ids, labels=ids).loss)

    assert nats("The city is the largest in the United States.") < 4.0
    assert nats("States United the in. largest the is city The") > 5.0
