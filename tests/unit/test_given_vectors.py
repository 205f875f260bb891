"""Vectors and FAISS indexes made elsewhere: the hits are those of our own index, and what does not fit is refused."""

import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odqa import jobs
from odqa.artifacts import load_artifact, sha256_json
from odqa.config import Vectors
from odqa.errors import OdqaError, RecipeError
from odqa.recipes import Places, load_recipe
from odqa.retrieve.dense import Encoder, EncoderSettings
from odqa.retrieve.dpr_embeddings import save_embeddings
from odqa.retrieve.given import GivenVectors
from odqa.retrieve.index import Index
from tests.small_world import passages, questions, write_jsonl, write_yaml
from tests.tiny_models import tiny_bert

TEXTS = [row["question"] for row in questions()]
PASSAGES = passages()
Build = Callable[..., Index]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("given") / "ctx-encoder", window=512)


@pytest.fixture(scope="module")
def vectors(bert: Path) -> np.ndarray:
    """float32 (60, D): what the encoder makes of the passages, of different lengths."""
    settings = EncoderSettings(str(bert), dtype="float32", titles="pair", normalize=False)
    return Encoder(settings, device="cpu").encode_passages(PASSAGES)


@pytest.fixture
def build(tmp_path: Path, bert: Path) -> Build:
    """An index over the passages whose recipe names vectors made elsewhere, or none."""
    rows = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES]
    source = {"kind": "passages", "file": str(write_jsonl(tmp_path / "passages.jsonl", rows))}

    def build(sidecar: dict[str, Any] | None, *, out: str = "built", how: Any = None, **dense: Any) -> Index:
        how = dict(how or {})
        if sidecar is not None:
            told = {"kind": "vectors", "encoder": "elsewhere/ctx-encoder", "normalized": False} | sidecar
            how["given"] = str(write_yaml(tmp_path / "sidecar.yaml", told))
        settings = {"question_model": str(bert), "dtype": "float32", "titles": "pair", "store_dtype": "float32"}
        recipe = {"kind": "index", "passages": source, "dense": settings | dense | {"vectors": how}}
        path = write_yaml(tmp_path / "recipe.yaml", recipe)
        return jobs.build_index(path, out=tmp_path / out, places=Places(tmp_path, tmp_path / "artifacts"))

    return build


def hits(index: Index, k: int = 10) -> list[list[int]]:
    return index.dense.search(TEXTS, k).rows.tolist()


def expected(index: Index, vectors: np.ndarray, k: int = 10) -> list[list[int]]:
    """The rows of the largest inner products, by numpy."""
    scores = index.dense.encoder.encode_questions(TEXTS) @ vectors.T
    return np.argsort(-scores, axis=1, kind="stable")[:, :k].tolist()


def shards(folder: Path, vectors: np.ndarray, prefix: str = "") -> None:
    """DPR's embedding files: two shards, ids in no order."""
    pairs = [(prefix + passage.id, vector) for passage, vector in zip(PASSAGES, vectors, strict=True)]
    random.Random(0).shuffle(pairs)
    save_embeddings(folder / "wikipedia_passages_0", pairs[:25])
    save_embeddings(folder / "wikipedia_passages_1", pairs[25:])


def save_index(path: Path, vectors: np.ndarray, factory: str = "Flat", metric: str = "inner-product") -> Path:
    import faiss

    number = {"inner-product": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}[metric]
    index = faiss.index_factory(vectors.shape[1], factory, number)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(path))
    return path


# --- embeddings


@pytest.mark.parametrize("how", [{}, {"faiss": "HNSW16", "search": {"efSearch": 200}}], ids=["exact", "HNSW"])
def test_dprs_embedding_files_are_searched_like_vectors_of_our_own(
    tmp_path: Path, build: Build, vectors: np.ndarray, how: dict[str, Any]
) -> None:
    shards(tmp_path, vectors, "wiki:")
    index = build({"embeddings": ["wikipedia_passages_*"], "id_prefix": "wiki:"}, how=how)
    assert hits(index) == expected(index, vectors) == hits(build(None, out="own", how=how))
    files = index.artifact.manifest["inputs"]["vectors"]["files"]
    assert [file["name"] for file in files] == ["wikipedia_passages_0", "wikipedia_passages_1"]


def test_what_dpr_searches_with_is_what_an_index_exports(tmp_path: Path, build: Build, vectors: np.ndarray) -> None:
    from odqa.foreign import export

    index = build(None)
    assert export(str(index.path), tmp_path / "out_0", "dpr-embeddings") == 60
    pairs = pickle.loads((tmp_path / "out_0").read_bytes())
    assert [passage_id for passage_id, _ in pairs] == [passage.id for passage in PASSAGES]
    assert np.allclose([vector for _, vector in pairs], vectors, atol=1e-5)


def test_an_index_is_built_again_when_its_vectors_changed(tmp_path: Path, build: Build, vectors: np.ndarray) -> None:
    shards(tmp_path, vectors)
    first = build({"embeddings": ["wikipedia_passages_*"]}).artifact
    assert build({"embeddings": ["wikipedia_passages_*"]}).artifact.manifest == first.manifest
    shards(tmp_path, vectors * np.float32(2))
    assert build({"embeddings": ["wikipedia_passages_*"]}).artifact.hash != first.hash


# --- FAISS indexes


@pytest.mark.parametrize("factory", ["Flat", "HNSW16", "IVF4,Flat", "SQ8"])
def test_a_faiss_index_in_the_collections_order_is_searched_as_it_is(
    tmp_path: Path, build: Build, vectors: np.ndarray, factory: str
) -> None:
    save_index(tmp_path / "wiki.index", vectors, factory)
    knobs = {"HNSW16": {"efSearch": 200}, "IVF4,Flat": {"nprobe": 4}}.get(factory, {})
    index = build({"faiss": "wiki.index"}, how={"search": knobs})
    if factory == "SQ8":
        assert np.mean([len(set(a) & set(b)) for a, b in zip(hits(index), expected(index, vectors), strict=True)]) > 8
    else:
        assert hits(index) == expected(index, vectors)
    assert load_artifact(index.path, verify=True)


@pytest.mark.parametrize("form", ["docid", "index_meta.dpr"])
def test_ids_say_which_passage_each_vector_is_of(tmp_path: Path, build: Build, vectors: np.ndarray, form: str) -> None:
    order = np.random.default_rng(0).permutation(len(vectors))
    save_index(tmp_path / "index", vectors[order])
    ids = [f"wiki:{PASSAGES[row].id}" for row in order]
    content = pickle.dumps(ids) if form.endswith(".dpr") else "".join(f"{found}\n" for found in ids).encode()
    (tmp_path / form).write_bytes(content)
    index = build({"faiss": "index", "ids": form, "id_prefix": "wiki:"})
    assert hits(index) == expected(index, vectors)


def test_an_l2_index_of_unit_vectors_ranks_by_cosine_nearest_first(
    tmp_path: Path, build: Build, vectors: np.ndarray
) -> None:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    save_index(tmp_path / "index", unit, metric="l2")
    index = build({"faiss": "index", "metric": "l2", "normalized": True}, normalize=True)
    assert hits(index) == expected(index, unit)
    found = index.dense.search(TEXTS, 3).scores
    assert (found <= 0).all() and (np.diff(found, axis=1) <= 0).all()  # minus squared distances


def test_dprs_hnsw_ranks_by_inner_product_through_its_extra_dimension(
    tmp_path: Path, build: Build, vectors: np.ndarray
) -> None:
    # dpr/indexer/faiss_indexers.py: sqrt(phi - norm) behind each passage, 0 behind each question.
    norms = (vectors**2).sum(axis=1)
    extended = np.hstack([vectors, np.sqrt(norms.max() - norms)[:, None]]).astype(np.float32)
    save_index(tmp_path / "index.dpr", extended, "HNSW32", metric="l2")
    index = build({"faiss": "index.dpr", "metric": "dpr-hnsw"}, how={"search": {"efSearch": 200}})
    assert hits(index) == expected(index, vectors)


# --- what does not fit


def refused(build: Build, sidecar: dict[str, Any], **more: Any) -> str:
    with pytest.raises(OdqaError) as error:
        build(sidecar, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_embeddings_that_do_not_fit_are_refused_in_one_line(tmp_path: Path, build: Build, vectors: np.ndarray) -> None:
    named = {"embeddings": ["wikipedia_passages_*"]}
    assert "no file" in refused(build, named)
    shards(tmp_path, vectors, "wiki:")
    assert "here. Is 'wiki:' an id_prefix?" in refused(build, named)
    named["id_prefix"] = "wiki:"
    told = refused(build, named | {"embeddings": ["wikipedia_passages_0"]})
    assert "no vectors for 35 of 60 passages (first: " in told
    twice = named | {"embeddings": ["wikipedia_passages_0", "wikipedia_passages_*"]}
    assert "wikipedia_passages_0: a second vector of passage 'wiki:" in refused(build, twice)
    told = refused(build, named | {"encoder": "facebook/another"})
    assert "made by facebook/another, but the recipe encodes with" in told
    assert "normalized is True, but the recipe's encoder has normalize: False" in refused(
        build, named | {"normalized": True}
    )
    assert "has a vector of length" in refused(build, named | {"normalized": True}, normalize=True)
    shards(tmp_path, vectors[:, :8], "wiki:")
    assert "vectors of width 8; elsewhere/ctx-encoder makes 32" in refused(build, named)
    shards(tmp_path, np.random.default_rng(0).standard_normal(vectors.shape).astype(np.float32), "wiki:")
    assert "is not what elsewhere/ctx-encoder makes of it (cosine" in refused(build, named)
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize("name", ["hub/all-MiniLM-L6-v2", "embedded:all-MiniLM-L6-v2", "/models/all-MiniLM-L6-v2/"])
def test_a_folder_a_hub_name_and_an_embedded_model_may_be_the_same(name: str) -> None:
    encoder = Encoder(EncoderSettings("embedded:all-MiniLM-L6-v2"))
    GivenVectors("sidecar", name, is_normalized=True).check(encoder)


def test_ids_in_another_order_are_found_out(tmp_path: Path, build: Build, vectors: np.ndarray) -> None:
    shards(tmp_path, np.roll(vectors, 1, axis=0))
    assert "Other ids, another encoder, or other titles" in refused(build, {"embeddings": ["wikipedia_passages_*"]})
    save_index(tmp_path / "index", np.roll(vectors, 1, axis=0))
    assert "Other ids, another encoder, or other titles" in refused(build, {"faiss": "index"})


def test_a_faiss_index_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, build: Build, vectors: np.ndarray
) -> None:
    save_index(tmp_path / "index", vectors)
    named = {"faiss": "index"}
    told = refused(build, named | {"metric": "l2"})
    assert told.endswith("index: this index has the metric inner-product; the sidecar says l2.")
    (tmp_path / "docid").write_text("".join(f"{passage.id}\n" for passage in PASSAGES[:-1]))
    assert "docid: 59 ids for the 60 vectors of" in refused(build, named | {"ids": "docid"})
    (tmp_path / "docid").write_text("".join(f"{passage.id}\n" for passage in [*PASSAGES[:-1], PASSAGES[0]]))
    assert "docid: the id of passage '1' stands twice" in refused(build, named | {"ids": "docid"})
    (tmp_path / "docid").write_text("".join(f"{number}\n" for number in range(60)))
    assert "docid: record 1: no passage with the id '0' here." in refused(build, named | {"ids": "docid"})
    save_index(tmp_path / "index", vectors[:50])
    assert "index: 50 vectors for 60 passages" in refused(build, named)
    save_index(tmp_path / "index", vectors[:, :16].copy())
    assert "vectors of width 16; elsewhere/ctx-encoder makes 32" in refused(build, named)
    (tmp_path / "index").write_bytes(b"not FAISS at all")
    assert "FAISS cannot read it" in refused(build, named)
    assert not (tmp_path / "built").exists()


@pytest.mark.parametrize(
    ("sidecar", "how", "message"),
    [
        ({}, {}, "name either embeddings or faiss"),
        ({"faiss": "i", "embeddings": ["e"]}, {}, "name either embeddings or faiss"),
        ({"embeddings": ["e"], "metric": "l2"}, {}, "metric and ids are those of a FAISS index"),
        ({"faiss": "i", "metrik": "l2"}, {}, "metrik is not a setting of vectors .*Did you mean metric"),
        ({"faiss": "i"}, {"faiss": "Flat"}, "brings a FAISS index of its own. Remove dense.vectors.faiss"),
    ],
)
def test_a_sidecar_that_says_nonsense_is_refused(
    build: Build, sidecar: dict[str, Any], how: dict[str, Any], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        build(sidecar, how=how)


def test_recipes_without_vectors_from_elsewhere_keep_their_hash() -> None:
    assert "given" not in Vectors().model_dump() and Vectors(given="x").model_dump()["given"] == "x"
    resolved = load_recipe("indexes/nq-mini.yaml").resolved
    assert "given" not in resolved["dense"]["vectors"] and len(sha256_json(resolved)) == 64


def test_faiss_ids_that_are_no_rows_are_refused(tmp_path: Path, build: Build, vectors: np.ndarray) -> None:
    import faiss

    index = faiss.IndexIDMap2(faiss.IndexFlatIP(vectors.shape[1]))
    index.add_with_ids(vectors, np.arange(60, dtype=np.int64) + 1000)
    faiss.write_index(index, str(tmp_path / "index"))
    assert "ids of their own (1000 to 1059), not the numbers of rows from 0" in refused(build, {"faiss": "index"})


# --- the vectors of another index


@pytest.mark.parametrize(
    "how", [{}, {"faiss": "Flat"}, {"faiss": "Flat", "refine": "int8"}, {"faiss": "HNSW16", "keep": True}], ids=str
)
def test_vectors_of_another_index_are_taken_over_without_encoding(
    tmp_path: Path, build: Build, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build(None, out="first", how=how)
    expected = hits(first)
    monkeypatch.setattr(Encoder, "encode_passages", None)  # whoever calls it fails
    second = build(None, out="second", how=how | {"given": str(first.path)})
    assert hits(second) == expected
    assert second.artifact.manifest["inputs"]["vectors"] == {"index": first.artifact.hash}
    assert np.array_equal(second.dense.vectors.take(np.arange(60)), first.dense.vectors.take(np.arange(60)))


def test_an_index_that_does_not_fit_is_refused(tmp_path: Path, build: Build, bert: Path) -> None:
    first = build(None, out="first", how={"faiss": "Flat"})
    given = {"given": str(first.path)}
    with pytest.raises(OdqaError, match="encoded with another titles than this recipe's"):
        build(None, out="titles", how=given | {"faiss": "Flat"}, titles="space")
    other = tiny_bert(tmp_path / "ctx-encoder", window=512, seed=1)
    with pytest.raises(OdqaError, match="encoded with another passage_model"):
        build(None, out="model", how=given | {"faiss": "Flat"}, passage_model=str(other), pooling="mean")
    with pytest.raises(OdqaError, match=r"searched by FAISS \(Flat, refine None\), and its vectors are not kept"):
        build(None, out="exact", how=given)
    with pytest.raises(OdqaError, match=r"searched by FAISS \(Flat, refine None\), and its vectors are not kept"):
        build(None, out="refined", how=given | {"faiss": "Flat", "refine": "int8"})
    with pytest.raises(OdqaError, match="no finished artifact here"):
        build(None, out="nothing", how={"given": str(tmp_path)})
    shorter = [{"id": p.id, "title": p.title, "text": p.text} for p in PASSAGES[:-1]]
    rows = write_jsonl(tmp_path / "shorter.jsonl", shorter)
    recipe = load_recipe(tmp_path / "recipe.yaml", "index", settings={"passages.file": str(rows)})
    recipe = load_recipe(
        write_yaml(tmp_path / "other.yaml", recipe.resolved), "index", settings={"dense.vectors": given}
    )
    with pytest.raises(OdqaError, match="an index of other passages than this recipe's"):
        jobs.build_index(recipe, out=tmp_path / "passages", places=Places(tmp_path, tmp_path / "artifacts"))


def test_a_recipe_without_a_method_is_what_it_was_before_there_were_methods() -> None:
    plain = load_recipe("indexes/nq-mini.yaml").resolved["dense"]
    tuned = load_recipe("indexes/nq-mini-tuned.yaml").resolved["dense"]
    assert "method" not in plain and tuned["method"] == "artifacts/minilm-questions"
    assert {key: value for key, value in tuned.items() if key not in ("method", "vectors")} == {
        key: value for key, value in plain.items() if key != "vectors"
    }
