"""The index artifact: what it holds, who may open it, what a kill leaves, and the three retrievers on it."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from odqa.artifacts import Draft, load_artifact
from odqa.corpus.store import PassageStore
from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.retrieve import dense
from odqa.retrieve import index as module
from odqa.retrieve.bm25 import Analyzer, Bm25Settings
from odqa.retrieve.dense import Encoder, EncoderSettings
from odqa.retrieve.index import (
    AlphaHybridRetriever,
    Bm25Retriever,
    DenseRetriever,
    HybridRetriever,
    Index,
    build_index,
    load_index,
)
from odqa.retrieve.vectors import DeviceVectors, ExactVectors, VectorSettings
from odqa.types import Passage, Query
from tests.tiny_models import tiny_bert
from tests.unit.conformance import COLLECTION, RetrieverConformance, ids

SOURCE = {"name": "collection", "sha256": "0" * 64}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def encoder(bert: Path) -> EncoderSettings:
    return EncoderSettings(str(bert), dtype="float32", store_dtype="float32", normalize=True)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory, encoder: EncoderSettings) -> Index:
    path = tmp_path_factory.mktemp("index") / "both"
    return build_index(path, COLLECTION, source=SOURCE, bm25=Bm25Settings(), encoder=encoder, part_rows=3)


# --- retrievers


class TestBm25Retriever(RetrieverConformance):
    @pytest.fixture(scope="class")
    def retriever(self, index: Index) -> Bm25Retriever:
        return Bm25Retriever(index)

    def test_finds_by_terms(self, retriever: Bm25Retriever) -> None:
        assert ids(retriever.retrieve([Query("q", "tiber")], 5)) == [["a2"]]

    def test_a_query_without_known_terms_has_no_hits(self, retriever: Bm25Retriever) -> None:
        assert retriever.retrieve([Query("q", "the xylophone")], 5) == [[]]


class TestRankBm25Retriever(RetrieverConformance):
    @pytest.fixture(scope="class")
    def retriever(self, tmp_path_factory: pytest.TempPathFactory) -> Bm25Retriever:
        pytest.importorskip("rank_bm25", reason="the peer needs the extra reference")
        path = tmp_path_factory.mktemp("reference") / "index"
        return Bm25Retriever(build_index(path, COLLECTION, source=SOURCE, bm25=Bm25Settings(engine="rank-bm25")))


class TestDenseRetriever(RetrieverConformance):
    @pytest.fixture(scope="class")
    def retriever(self, index: Index) -> DenseRetriever:
        return DenseRetriever(index)

    def test_a_passages_own_words_find_it(self, retriever: DenseRetriever) -> None:
        texts = [f"{passage.title} {passage.text}" for passage in COLLECTION[:5]]
        hits = retriever.retrieve([Query(str(number), text) for number, text in enumerate(texts)], 1)
        assert ids(hits) == [["a1"], ["a2"], ["a3"], ["a4"], ["a5"]]
        assert [hit[0].score for hit in hits] == pytest.approx([1.0] * 5, abs=1e-3)


class TestFaissRetriever(RetrieverConformance):
    @pytest.fixture(scope="class")
    def retriever(self, tmp_path_factory: pytest.TempPathFactory, encoder: EncoderSettings) -> DenseRetriever:
        path = tmp_path_factory.mktemp("faiss") / "index"
        vectors = VectorSettings(faiss="Flat")
        return DenseRetriever(build_index(path, COLLECTION, source=SOURCE, encoder=encoder, vectors=vectors))


@pytest.mark.parametrize("fusion", ["weighted", "rrf"])
class TestHybridRetriever(RetrieverConformance):
    @pytest.fixture
    def retriever(self, index: Index, fusion: str) -> HybridRetriever:
        return HybridRetriever(index, depth=len(COLLECTION), fusion=fusion)  # type: ignore[arg-type]

    def test_holds_what_either_finds(self, retriever: HybridRetriever, index: Index) -> None:
        query = [Query("q", "tiber")]
        expected = {*ids(Bm25Retriever(index).retrieve(query, 7))[0], *ids(DenseRetriever(index).retrieve(query, 7))[0]}
        assert set(ids(retriever.retrieve(query, 7))[0]) == expected


@pytest.mark.parametrize("normalise", [False, True])
class TestAlphaHybridRetriever(RetrieverConformance):
    @pytest.fixture
    def retriever(self, index: Index, normalise: bool) -> AlphaHybridRetriever:
        return AlphaHybridRetriever(index, alpha=0.5, depth=len(COLLECTION), normalise=normalise)

    def test_without_alpha_it_has_the_order_of_the_vectors(self, index: Index, normalise: bool) -> None:
        queries = [Query("q", "what is the capital of france")]
        hits = AlphaHybridRetriever(index, alpha=0, normalise=normalise).retrieve(queries, 7)
        assert ids(hits) == ids(DenseRetriever(index).retrieve(queries, 7))

    def test_a_large_alpha_puts_what_bm25_finds_first(self, index: Index, normalise: bool) -> None:
        queries = [Query("q", "tiber capital italy")]
        (sparse,) = ids(Bm25Retriever(index).retrieve(queries, 7))
        assert len(sparse) > 1
        (hits,) = ids(AlphaHybridRetriever(index, alpha=1e4, normalise=normalise).retrieve(queries, 7))
        assert hits[0] == sparse[0]

    def test_a_list_of_a_single_hit_decides_nothing(self, index: Index, normalise: bool) -> None:
        """By the published rule all others get the lowest score of the list, which is that of its only hit."""
        queries = [Query("q", "tiber")]
        assert ids(Bm25Retriever(index).retrieve(queries, 7)) == [["a2"]]
        hits = AlphaHybridRetriever(index, alpha=1e4, normalise=normalise).retrieve(queries, 7)
        assert ids(hits) == ids(DenseRetriever(index).retrieve(queries, 7))


def test_the_depth_of_a_hybrid_grows_with_k(index: Index) -> None:
    (hits,) = HybridRetriever(index, depth=1).retrieve([Query("q", "tiber")], len(COLLECTION))
    assert len(hits) == len(COLLECTION)


# --- the artifact


def test_the_manifest_says_how_it_was_made(index: Index, bert: Path) -> None:
    manifest = index.artifact.manifest
    assert manifest["kind"] == "index"
    assert manifest["counts"] == {"passages": 7}
    assert manifest["inputs"]["passages"] == SOURCE
    assert manifest["inputs"]["encoder"]["question"] == manifest["inputs"]["encoder"]["passage"]
    assert manifest["recipe"]["bm25"]["analyzer"]["token_pattern"] == r"(?u)\b\w\w+\b"
    assert manifest["recipe"]["encoder"]["pooling"] == "mean"  # the folder's choice, resolved
    assert manifest["recipe"]["encoder"]["query_max_tokens"] == 128
    load_artifact(index.path, "index", verify=True)


def test_the_callers_recipe_goes_into_the_manifest_and_the_settings_beside_it(tmp_path: Path) -> None:
    index = build_index(
        tmp_path / "index", COLLECTION, source=SOURCE, bm25=Bm25Settings(k1=1.2), recipe={"kind": "index"}
    )
    assert index.artifact.manifest["recipe"] == {"kind": "index"}
    assert index.artifact.manifest["settings"]["bm25"]["k1"] == 1.2


def test_opening_again_gives_the_same_hits(index: Index) -> None:
    queries = [Query("q", "what is the capital of france")]
    again = load_index(index.path)
    for kind in (Bm25Retriever, DenseRetriever, HybridRetriever):
        assert kind(again).retrieve(queries, 5) == kind(index).retrieve(queries, 5)


def test_a_part_that_was_not_built_is_a_clear_error(tmp_path: Path) -> None:
    index = build_index(tmp_path / "index", COLLECTION, source=SOURCE, bm25=Bm25Settings())
    assert (index.has_bm25, index.has_dense) == (True, False)
    with pytest.raises(ArtifactError, match=r"this index has no vectors. Build one with an encoder"):
        DenseRetriever(index)
    index = build_index(tmp_path / "texts", COLLECTION, source=SOURCE)
    with pytest.raises(ArtifactError, match="this index has no BM25 part"):
        Bm25Retriever(index)
    assert len(index.store) == 7


def test_an_encoder_with_other_weights_is_refused_in_one_line(index: Index, tmp_path: Path) -> None:
    other = tiny_bert(tmp_path / "other", seed=1)
    with pytest.raises(
        ArtifactMismatch, match=r"of weights [0-9a-f]{8}, but .*other has weights [0-9a-f]{8}\."
    ) as error:
        DenseRetriever(load_index(index.path, encoder=str(other)))
    assert "\n" not in str(error.value)


def test_the_query_side_takes_what_the_index_was_built_with(tmp_path: Path) -> None:
    """Prefixes, pooling and lengths are in the index: a folder whose files say otherwise later changes no vector."""
    folder = tiny_bert(tmp_path / "encoder")
    settings = EncoderSettings(str(folder), pooling="cls", query_prefix="query: ", query_max_tokens=6, dtype="float32")
    index = build_index(tmp_path / "index", COLLECTION, source=SOURCE, encoder=settings)
    before = index.dense.encoder.encode_questions(["who was king"])
    names = {"prompts": {"query": "other: ", "document": "other: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(names))
    (folder / "modules.json").write_text("not even JSON")
    opened = load_index(index.path).dense.encoder
    assert (opened.encode_questions(["who was king"]) == before).all()
    assert opened.resolved == index.dense.encoder.resolved


def test_an_index_older_than_prompts_is_asked_without_them(index: Index, tmp_path: Path) -> None:
    shutil.copytree(index.path, tmp_path / "older")
    file = tmp_path / "older/dense/encoder.json"
    built = json.loads(file.read_text())
    del built["settings"]["prompts"], built["settings"]["segments"], built["tokenizer"]
    file.write_text(json.dumps(built))
    manifest = json.loads((tmp_path / "older/manifest.json").read_text())
    manifest["files"]["dense/encoder.json"]["bytes"] = file.stat().st_size
    (tmp_path / "older/manifest.json").write_text(json.dumps(manifest))
    assert load_index(tmp_path / "older").dense.encoder.settings == index.dense.encoder.settings


def test_a_tokenizer_of_other_rules_is_refused_in_one_line(index: Index, tmp_path: Path) -> None:
    """The same weights with other token ids give vectors of other texts."""
    other = tiny_bert(tmp_path / "other")
    file = other / "tokenizer.json"
    rules = json.loads(file.read_text())
    padding = {"strategy": {"Fixed": 8}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"}
    file.write_text(json.dumps(rules | {"padding": padding | {"pad_to_multiple_of": None}}))  # and without indentation
    assert load_index(index.path, encoder=str(other)).dense
    rules["normalizer"]["lowercase"] = False
    file.write_text(json.dumps(rules))
    with pytest.raises(
        ArtifactMismatch, match=r"another tokenizer than that of .*other, .*build the index again"
    ) as error:
        DenseRetriever(load_index(index.path, encoder=str(other)))
    assert "\n" not in str(error.value)


def test_an_encoder_that_moved_is_found_by_its_new_name(index: Index, tmp_path: Path) -> None:
    moved = tiny_bert(tmp_path / "moved")
    queries = [Query("q", "who was king")]
    found = DenseRetriever(load_index(index.path, encoder=str(moved))).retrieve(queries, 5)
    assert found == DenseRetriever(index).retrieve(queries, 5)


def test_the_analyser_is_the_indexs_own(tmp_path: Path) -> None:
    settings = Bm25Settings(analyzer=Analyzer(stop_words=("tiber",)))
    index = build_index(tmp_path / "index", COLLECTION, source=SOURCE, bm25=settings)
    assert load_index(index.path).bm25.settings == settings
    assert Bm25Retriever(load_index(index.path)).retrieve([Query("q", "tiber")], 5) == [[]]


def test_faiss_replaces_the_vectors_unless_they_are_kept(tmp_path: Path, encoder: EncoderSettings) -> None:
    for keep in (False, True):
        vectors = VectorSettings(faiss="Flat", keep=keep)
        path = build_index(tmp_path / f"{keep}", COLLECTION, source=SOURCE, encoder=encoder, vectors=vectors).path
        assert (path / "dense/vectors").exists() is keep


def test_bad_passages_leave_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="stands twice"):
        build_index(tmp_path / "index", [*COLLECTION, COLLECTION[0]], source=SOURCE, bm25=Bm25Settings())
    assert not (tmp_path / "index").exists()


# --- resuming


class Killed(BaseException):
    """What a killed process leaves behind, without killing the tests."""


def killed_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `Draft.part` finish `steps` files and die while it writes the next one."""
    part = Draft.part
    done = 0

    def dying(self: Draft, name: str, write: object) -> Path:
        nonlocal done
        if (self.path / name).exists():
            return self.path / name
        if done == steps:
            (self.path / f".{Path(name).name}.tmp").write_bytes(b"half a file")
            raise Killed
        done += 1
        return part(self, name, write)  # type: ignore[arg-type]

    monkeypatch.setattr(Draft, "part", dying)


@pytest.mark.parametrize("vectors", [VectorSettings(), VectorSettings(faiss="Flat")], ids=["exact", "faiss"])
def test_after_a_kill_at_any_point_the_files_are_the_same(
    tmp_path: Path, encoder: EncoderSettings, monkeypatch: pytest.MonkeyPatch, vectors: VectorSettings
) -> None:
    settings = {"source": SOURCE, "bm25": Bm25Settings(), "encoder": encoder, "vectors": vectors, "part_rows": 3}
    whole = build_index(tmp_path / "whole", COLLECTION, **settings)  # type: ignore[arg-type]
    kills = 0
    while True:
        path = tmp_path / f"killed-{kills}"
        with monkeypatch.context() as patch:
            killed_after(kills, patch)
            try:
                build_index(path, COLLECTION, **settings)  # type: ignore[arg-type]
                break
            except Killed:
                assert not path.exists()
        resumed = build_index(path, COLLECTION, **settings)  # type: ignore[arg-type]
        assert resumed.artifact.manifest["files"] == whole.artifact.manifest["files"]
        assert resumed.artifact.hash == whole.artifact.hash
        assert {**resumed.artifact.manifest, "measured": 0} == {**whole.artifact.manifest, "measured": 0}
        kills += 1
    assert kills >= 10  # three store parts and store.json, BM25's part, postings and settings, vectors, search, encoder


def test_a_finished_store_is_not_drawn_from_the_source_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(4, patch)  # one store part, two files for its ids, and store.json
        with pytest.raises(Killed):
            build_index(tmp_path / "index", COLLECTION, source=SOURCE, bm25=Bm25Settings())

    def untouchable() -> Iterator[Passage]:
        raise AssertionError("the source was read")
        yield

    index = build_index(tmp_path / "index", untouchable(), source=SOURCE, bm25=Bm25Settings())
    assert list(index.store) == list(COLLECTION)


def test_another_source_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            build_index(tmp_path / "index", COLLECTION, source=SOURCE, bm25=Bm25Settings())
    other = {**SOURCE, "sha256": "1" * 64}
    index = build_index(tmp_path / "index", COLLECTION[:2], source=other, bm25=Bm25Settings())
    assert isinstance(index.store, PassageStore) and len(index.store) == 2


# --- what is loaded


def test_a_bm25_pipeline_loads_neither_torch_nor_transformers_nor_faiss_nor_numba(index: Index) -> None:
    code = (
        "import sys; from pathlib import Path; from odqa.types import Query;"
        "from odqa.retrieve.index import Bm25Retriever, load_index;"
        f"hits = Bm25Retriever(load_index(Path({str(index.path)!r}))).retrieve([Query('q', 'tiber')], 5);"
        "heavy = ('torch', 'transformers', 'faiss', 'numba', 'bm25s', 'scipy', 'sentence_transformers');"
        "print(hits[0][0].passage.id, [name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "a2 []\n"


def test_a_dense_query_loads_neither_sentence_transformers_nor_the_collections_texts(index: Index) -> None:
    code = (
        "import sys; from pathlib import Path; from odqa.retrieve.index import load_index;"
        f"index = load_index(Path({str(index.path)!r})); print(index.dense.search(['tiber'], 5).rows.shape,"
        "'sentence_transformers' in sys.modules, index.__dict__.get('store'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(1, 5) False None\n"


def test_the_encoder_file_names_encoder_and_weights(index: Index, bert: Path) -> None:
    built = json.loads((index.path / "dense/encoder.json").read_text())
    assert built["settings"]["question_model"] == str(bert)
    assert len(built["weights"]["question"]) == 64


# --- bounded memory


def test_a_budget_changes_no_file_of_the_index_but_the_stores_parts(tmp_path: Path, encoder: EncoderSettings) -> None:
    vectors = VectorSettings(faiss="IVF2,SQ8", train_rows=5)
    settings = {"source": SOURCE, "bm25": Bm25Settings(), "encoder": encoder, "vectors": vectors}
    whole = build_index(tmp_path / "whole", COLLECTION, **settings)  # type: ignore[arg-type]
    small = build_index(tmp_path / "small", COLLECTION, memory_budget=2500, **settings)  # type: ignore[arg-type]
    assert len(small.store.part_rows) > len(whole.store.part_rows) == 1
    assert list(small.store) == list(whole.store)
    files = [
        {name: entry for name, entry in index.artifact.manifest["files"].items() if not name.startswith("passages/")}
        for index in (whole, small)
    ]
    assert files[0] == files[1] and len(files[0]) > 5
    assert small.artifact.manifest["measured"]["memory_budget"] == 2500
    assert not [*small.path.rglob("*.shards"), *small.path.rglob("*.parts")]


def test_an_index_type_that_needs_more_is_refused_before_a_passage_is_encoded(
    tmp_path: Path, encoder: EncoderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "save_passage_vectors", lambda *_: pytest.fail("a passage was encoded"))
    monkeypatch.setattr(module, "build_bm25", lambda *_, **__: pytest.fail("a passage was counted"))
    with pytest.raises(DataError, match=r"'HNSW32' is built in one piece: .* set memory_budget"):
        build_index(
            tmp_path / "index",
            COLLECTION,
            source=SOURCE,
            bm25=Bm25Settings(),
            encoder=encoder,
            vectors=VectorSettings(faiss="HNSW32"),
            memory_budget=2000,
        )
    assert not (tmp_path / "index").exists()


def test_refinement_from_disk_keeps_what_it_needs(tmp_path: Path, encoder: EncoderSettings) -> None:
    exact = build_index(tmp_path / "exact", COLLECTION, source=SOURCE, encoder=encoder)
    expected = DenseRetriever(exact).retrieve([Query("q", "tiber")], 3)[0]
    for refine, kept in (("vectors", True), ("int8", False)):
        vectors = VectorSettings(faiss="PQ2x2", train_rows=9, refine=refine, refine_factor=9)  # type: ignore[arg-type]
        index = build_index(tmp_path / refine, COLLECTION, source=SOURCE, encoder=encoder, vectors=vectors)
        assert (index.path / "dense/vectors").exists() is kept
        found = DenseRetriever(load_index(index.path)).retrieve([Query("q", "tiber")], 3)[0]
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=0.02)


def test_a_device_that_is_named_searches_there_with_the_same_hits(tmp_path: Path, encoder: EncoderSettings) -> None:
    path = build_index(tmp_path / "index", COLLECTION, source=SOURCE, encoder=encoder).path
    on_processor, named = load_index(path), load_index(path, device="cpu:0")
    assert isinstance(named.dense.vectors, DeviceVectors) and isinstance(on_processor.dense.vectors, ExactVectors)
    for text in ("tiber", "北京", ""):
        found, expected = named.dense.search([text], 5), on_processor.dense.search([text], 5)
        assert (found.rows == expected.rows).all() and (found.scores == expected.scores).all()


# --- an index that was changed


def test_passages_that_were_exchanged_are_refused(tmp_path: Path) -> None:
    ours = build_index(tmp_path / "ours", COLLECTION, source=SOURCE, bm25=Bm25Settings())
    fewer = build_index(tmp_path / "fewer", COLLECTION[:3], source=SOURCE, bm25=Bm25Settings())
    shutil.rmtree(ours.path / "passages")
    shutil.copytree(fewer.path / "passages", ours.path / "passages")
    with pytest.raises(ArtifactError, match="the manifest says"):
        load_index(ours.path)


def test_a_passage_that_was_changed_in_place_is_found_by_verifying(tmp_path: Path) -> None:
    index = build_index(tmp_path / "index", COLLECTION, source=SOURCE, bm25=Bm25Settings())
    file = index.path / "passages/part-00000.arrow"
    data = file.read_bytes()
    word = COLLECTION[0].text.split()[1].encode()
    file.write_bytes(data.replace(word, b"x" * len(word)))  # as many bytes: only the hash tells
    with pytest.raises(ArtifactError, match="damaged"):
        load_index(index.path, verify=True)


def test_long_and_empty_passages_are_encoded_a_few_at_a_time(
    tmp_path: Path, encoder: EncoderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["", "tiber " * 20_000, "seine", "rome " * 20_000, ""]
    passages = [Passage(str(number), text) for number, text in enumerate(texts, 1)]
    whole = build_index(tmp_path / "whole", passages, source=SOURCE, encoder=encoder)
    seen: list[int] = []
    encode = Encoder.encode_passages
    monkeypatch.setattr(Encoder, "encode_passages", lambda self, some: seen.append(len(some)) or encode(self, some))
    monkeypatch.setattr(dense, "_TEXT_BYTES", 130_000)
    pieces = build_index(tmp_path / "pieces", passages, source=SOURCE, encoder=encoder)
    assert seen == [3, 2]
    rows = [index.dense.search(["tiber"], 5).rows.tolist() for index in (whole, pieces)]
    assert rows[0] == rows[1]
