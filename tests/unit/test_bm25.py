"""BM25: formulas, parity with bm25s, the two scorers, parts, the analyser."""

import json
import math
import sys
import tracemalloc
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from odqa.artifacts import Draft, sha256_file
from odqa.corpus.store import PassageStore, save_store
from odqa.errors import ArtifactError, ArtifactMismatch, DataError, MissingExtra
from odqa.retrieve import bm25
from odqa.retrieve.bm25 import Analyzer, Bm25Searcher, Bm25Settings, ReferenceSearcher, build_bm25, load_bm25
from odqa.types import Passage

RIVERS = [
    Passage("1", "The Seine flows through Paris.", "Seine"),
    Passage("2", "Paris, Paris, Paris!", ""),
    Passage("3", "the of and", "a"),
    Passage("4", "Rome lies on the Tiber. Rome is old; the Tiber is older.", "Rome"),
    Passage("5", "Rome lies on the Tiber. Rome is old; the Tiber is older.", "Rome"),
    Passage("6", "Ænima Ünïcode 北京 東京 naïve", "x"),
]


def random_passages(count: int, seed: int = 0) -> list[Passage]:
    """Passages of words whose frequencies fall as in real text (Zipf), many of them alike, so that scores tie."""
    rng = np.random.default_rng(seed)
    words = [f"w{number}" for number in range(200)] + ["the", "of", "and"]
    texts = [
        " ".join(words[int(rank) % len(words)] for rank in rng.zipf(1.3, rng.integers(0, 30))) for _ in range(count)
    ]
    return [Passage(str(number), text, f"t{number % 7}") for number, text in enumerate(texts, 1)]


def build(tmp_path: Path, passages: list[Passage], settings: Bm25Settings | None = None) -> Bm25Searcher:
    draft = Draft(tmp_path)
    save_store(passages, draft, part_rows=max(len(passages) // 3, 1))
    store = PassageStore.open(tmp_path / "passages")
    build_bm25(store, settings or Bm25Settings(), draft)
    searcher = load_bm25(tmp_path / "bm25", store)
    assert isinstance(searcher, Bm25Searcher)
    return searcher


def test_the_score_is_lucenes_formula(tmp_path: Path) -> None:
    searcher = build(tmp_path, RIVERS, Bm25Settings(k1=0.9, b=0.4))
    # Lengths without stop words: "seine seine flows through paris" 5, "paris paris paris" 3, passage 3: 0, passages 4
    # and 5: "rome rome lies tiber rome old tiber older" 8, passage 6: 5 (x is too short); mean 29 / 6.
    # "paris" is in 2 of 6 passages: idf = ln(1 + (6 - 2 + 0.5) / (2 + 0.5)) = ln 2.8
    idf, mean = math.log(2.8), 29 / 6
    expected = [3 / (3 + 0.9 * (0.6 + 0.4 * 3 / mean)) * idf, 1 / (1 + 0.9 * (0.6 + 0.4 * 5 / mean)) * idf]
    found = searcher.search(["Paris"], 10)
    assert found.rows[0, :3].tolist() == [1, 0, -1]
    assert found.scores[0, :2] == pytest.approx(expected, rel=1e-6)


def test_a_repeated_query_term_counts_each_time(tmp_path: Path) -> None:
    searcher = build(tmp_path, RIVERS)
    once, twice = searcher.search(["paris", "paris paris"], 2).scores
    assert twice == pytest.approx(2 * once)


def test_equal_scores_are_in_row_order(tmp_path: Path) -> None:
    found = build(tmp_path, RIVERS).search(["old tiber"], 5)
    assert found.rows[0].tolist() == [3, 4, -1, -1, -1]
    assert found.scores[0, 0] == found.scores[0, 1]


@pytest.mark.parametrize("text", ["", "the of", "unknownword", "?!", "q"])
def test_a_query_without_a_known_term_has_no_hits(tmp_path: Path, text: str) -> None:
    found = build(tmp_path, RIVERS).search([text, "paris"], 3)
    assert found.rows[0].tolist() == [-1, -1, -1]
    assert found.rows[1, 0] == 1


def test_titles_are_a_setting(tmp_path: Path) -> None:
    passages = [Passage("1", "a book", "Dune"), Passage("2", "a film", "")]
    assert build(tmp_path / "with", passages).search(["dune"], 2).rows[0].tolist() == [0, -1]
    assert build(tmp_path / "without", passages, Bm25Settings(titles=False)).search(["dune"], 2).rows[0, 0] == -1


def test_k_below_one_is_a_value_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="k is 0"):
        build(tmp_path, RIVERS).search(["paris"], 0)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts and several bands even for a few hundred passages."""
    monkeypatch.setattr(bm25, "_PART_ROWS", 70)
    monkeypatch.setattr(bm25, "_BAND_POSTINGS", 500)


QUERIES = ["w1 w2 w3", "w5 w5 the w9", "w150", "t3 w1", "nothing", "w1 " * 40, "w2 w77 t1 t2 t3 of"]


@pytest.mark.peers
@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.5, 0.75), (0.0, 1.0)])
def test_postings_are_bm25s_bit_by_bit(tmp_path: Path, small_parts: None, k1: float, b: float) -> None:
    import bm25s

    passages = random_passages(300)
    searcher = build(tmp_path, passages, Bm25Settings(k1=k1, b=b))
    texts = [f"{passage.title} {passage.text}" for passage in passages]
    peer = bm25s.BM25(k1=k1, b=b, method="lucene")
    peer.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    for text in QUERIES:
        expected = peer.get_scores(searcher.settings.analyzer.terms(text)) if text != "nothing" else np.zeros(300)
        found = searcher.search([text], 300)
        hits = found.rows[0] >= 0
        assert (found.scores[0, hits] == expected[found.rows[0, hits]]).all()
        assert set(found.rows[0, hits].tolist()) == set(np.flatnonzero(expected).tolist())


@pytest.mark.peers
def test_bm25s_opens_the_index_as_its_own(tmp_path: Path, small_parts: None) -> None:
    import bm25s

    searcher = build(tmp_path, random_passages(300))
    peer = bm25s.BM25.load(tmp_path / "bm25/postings", mmap=True)
    tokens = [searcher.settings.analyzer.terms(text) for text in QUERIES if text != "nothing"]
    rows, scores = peer.retrieve(tokens, k=20, show_progress=False)
    found = searcher.search([text for text in QUERIES if text != "nothing"], 20)
    assert (np.where(found.rows >= 0, found.scores, 0) == scores).all()
    assert rows.shape == found.rows.shape


@pytest.mark.peers
def test_the_stop_words_are_those_bm25s_calls_english() -> None:
    from bm25s.stopwords import STOPWORDS_EN

    assert set(bm25.ENGLISH_STOP_WORDS) == set(STOPWORDS_EN)


@pytest.mark.parametrize("k", [1, 7, 50, 300])
def test_both_scorers_give_the_same_bits(tmp_path: Path, k: int) -> None:
    pytest.importorskip("numba", reason="bm25s' scorer needs numba")
    plain = build(tmp_path, random_passages(300))
    compiled = Bm25Searcher(tmp_path / "bm25/postings", plain.settings, 300, compile=True)
    one, other = plain.search(QUERIES, k), compiled.search(QUERIES, k)
    assert (one.rows == other.rows).all()
    assert (one.scores == other.scores).all()


def test_only_batches_that_touch_many_postings_are_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    monkeypatch.setattr(bm25, "COMPILE_FROM", 3)  # "paris" is in two passages: one query touches 2 postings, two 4
    monkeypatch.setattr(bm25, "_score_batch", lambda *_: used.append("plain"))
    monkeypatch.setattr(bm25, "_compiled_scorer", lambda: lambda *_: used.append("compiled"))
    searcher = build(tmp_path, RIVERS)
    searcher.search(["paris"], 1)
    searcher.search(["paris"] * 2, 1)
    assert used == ["plain", "compiled"]


def test_parts_and_bands_do_not_change_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = random_passages(300)
    build(tmp_path / "whole", passages)
    monkeypatch.setattr(bm25, "_PART_ROWS", 41)
    monkeypatch.setattr(bm25, "_BAND_POSTINGS", 97)
    build(tmp_path / "parts", passages)
    assert hashes(tmp_path / "whole/bm25") == hashes(tmp_path / "parts/bm25")


def test_a_collection_of_stop_words_can_be_indexed_and_finds_nothing(tmp_path: Path) -> None:
    searcher = build(tmp_path, [Passage("1", "the of"), Passage("2", "")])
    assert searcher.search(["the", "paris"], 5).rows.tolist() == [[-1, -1], [-1, -1]]


def test_the_index_keeps_its_analyser(tmp_path: Path) -> None:
    settings = Bm25Settings(analyzer=Analyzer(lowercase=False, stop_words=("Paris",), token_pattern=r"\w+"))
    searcher = build(tmp_path, RIVERS, settings)
    assert searcher.settings == settings
    assert searcher.search(["Paris"], 3).rows[0, 0] == -1
    assert searcher.search(["Rome"], 3).rows[0].tolist() == [3, 4, -1]
    assert searcher.search(["rome"], 3).rows[0, 0] == -1
    assert json.loads((tmp_path / "bm25/settings.json").read_text())["analyzer"]["stop_words"] == ["Paris"]


@pytest.mark.parametrize("pattern", ["(", "(a)b"])
def test_a_token_pattern_that_cannot_work_is_a_data_error(pattern: str) -> None:
    with pytest.raises(DataError, match="token_pattern"):
        Analyzer(token_pattern=pattern)


@pytest.mark.parametrize("setting", [{"k1": -1.0}, {"b": 1.5}, {"k1": float("nan")}, {"engine": "elastic"}])
def test_settings_out_of_range_are_a_data_error(setting: dict) -> None:
    with pytest.raises(DataError, match="bm25"):
        Bm25Settings(**setting)


def test_a_stemmer_joins_forms_on_both_sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stemmer(monkeypatch)
    passages = [Passage("1", "older rivers"), Passage("2", "the river ran"), Passage("3", "sea")]
    searcher = build(tmp_path, passages, Bm25Settings(analyzer=Analyzer(stemmer="plural")))
    assert sorted(searcher.search(["river"], 3).rows[0].tolist()) == [-1, 0, 1]
    assert sorted(searcher.search(["rivers"], 3).rows[0].tolist()) == [-1, 0, 1]
    counts = searcher.search(["rivers"], 3).scores[0]
    assert counts[0] == counts[1]  # one term in passages of two terms each


def test_a_missing_stemmer_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    bm25._stemmer.cache_clear()
    monkeypatch.setitem(sys.modules, "Stemmer", None)
    with pytest.raises(MissingExtra, match=r"PyStemmer.*odqa\[stemmer\]"):
        Analyzer(stemmer="english")


def test_an_unknown_stemmer_is_a_data_error(monkeypatch: pytest.MonkeyPatch) -> None:
    use_stemmer(monkeypatch)
    with pytest.raises(DataError, match="'klingon' is not one of plural"):
        Analyzer(stemmer="klingon")


def test_rank_bm25_ranks_with_okapi(tmp_path: Path) -> None:
    okapi = pytest.importorskip("rank_bm25", reason="the peer needs the extra reference")
    draft = Draft(tmp_path)
    passages = random_passages(50)
    save_store(passages, draft)
    store = PassageStore.open(tmp_path / "passages")
    settings = Bm25Settings(engine="rank-bm25")
    build_bm25(store, settings, draft)
    searcher = load_bm25(tmp_path / "bm25", store)
    assert isinstance(searcher, ReferenceSearcher)
    found = searcher.search(["w3 w9", "unknown"], 60)
    terms = [settings.analyzer.terms(settings.text(passage)) for passage in passages]
    expected = okapi.BM25Okapi(terms, k1=0.9, b=0.4).get_scores(["w3", "w9"])
    hits = found.rows[0] >= 0
    assert found.scores[0, hits] == pytest.approx(expected[found.rows[0, hits]], rel=1e-6)
    assert hits.sum() == np.count_nonzero(expected)
    assert (found.rows[1] == -1).all()


def test_rank_bm25_refuses_a_large_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bm25, "REFERENCE_LIMIT", 5)
    with pytest.raises(DataError, match=r"at most 5 passages, this collection has 6\. Use engine: bm25s"):
        build(tmp_path, RIVERS, Bm25Settings(engine="rank-bm25"))


def test_settings_survive_json() -> None:
    settings = Bm25Settings(k1=1.2, analyzer=Analyzer(stop_words=("x",)))
    assert Bm25Settings.from_json(json.loads(json.dumps(asdict(settings)))) == settings


def test_a_folder_without_an_index_is_an_artifact_error(tmp_path: Path) -> None:
    save_store(RIVERS, Draft(tmp_path))
    with pytest.raises(ArtifactError, match="not a BM25 index"):
        load_bm25(tmp_path / "bm25", PassageStore.open(tmp_path / "passages"))


def use_stemmer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a stemmer in PyStemmer's place that knows one algorithm: it drops a final s."""

    class PluralStemmer:
        def __init__(self, name: str) -> None:
            if name != "plural":
                raise KeyError(name)

        def stemWords(self, words: list[str]) -> list[str]:  # noqa: N802
            return [word.removesuffix("s") for word in words]

    module = ModuleType("Stemmer")
    module.Stemmer = PluralStemmer  # type: ignore[attr-defined]
    module.algorithms = lambda: ["plural"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "Stemmer", module)
    bm25._stemmer.cache_clear()


def hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256_file(file) for file in folder.rglob("*") if file.is_file()}


# --- bounded memory


def test_a_small_memory_gives_the_same_bytes_from_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = random_passages(300)
    build(tmp_path / "whole", passages)
    monkeypatch.setattr(bm25, "_BATCH_TERMS", 50)  # vocab.arrow in several batches, the same in both builds
    expected = build(tmp_path / "batches", passages)
    store = PassageStore.open(tmp_path / "batches/passages")
    bands: list[int] = []
    empty = bm25._Band.empty
    monkeypatch.setattr(bm25._Band, "empty", lambda indptr: bands.append(int(indptr[-1] - indptr[0])) or empty(indptr))
    draft = Draft(tmp_path / "small")
    memory = 60 * 1000  # 1000 bytes of text a part, 468 postings a band
    build_bm25(store, expected.settings, draft, memory=memory)
    parts = sorted((tmp_path / "small/bm25.parts").iterdir())
    texts = [len(f"{passage.title}{passage.text}".encode()) for passage in passages]
    assert len(parts) > 10
    assert all(sum(texts[slice(*map(int, part.name.split("-")))]) <= 1000 for part in parts)
    assert len(bands) > 5 and max(bands) <= memory // 128
    assert hashes(tmp_path / "small/bm25") == hashes(tmp_path / "batches/bm25")
    whole = load_bm25(tmp_path / "whole/bm25", store).search(QUERIES, 50)
    found = load_bm25(tmp_path / "small/bm25", store).search(QUERIES, 50)
    assert (found.rows == whole.rows).all() and (found.scores == whole.scores).all()


@pytest.mark.parametrize("block", [1, 2, 7, 1000])
def test_vocabularies_are_merged_in_blocks_of_any_size(tmp_path: Path, block: int) -> None:
    own = [["a", "c", "e", "é"], [], ["b", "c", "z"], ["aa"], ["z"]]
    parts, places = [], []
    for number, terms in enumerate(own):
        (tmp_path / f"{number}").mkdir()
        bm25._save_terms(tmp_path / f"{number}/vocab.arrow", pa.array(terms, pa.large_string()))
        np.save(tmp_path / f"{number}/indptr.npy", np.arange(len(terms) + 1) * 2)  # two postings of each
        parts.append(tmp_path / f"{number}")
        places.append(tmp_path / f"places-{number}")
    bm25._merge_vocabularies(parts, places, tmp_path, block)
    merged = bm25._load_terms(tmp_path / "vocab.arrow").to_pylist()
    assert merged == ["a", "aa", "b", "c", "e", "z", "é"]
    # a, aa, b, e and é are in one part, c and z in two: 2 or 4 postings each.
    assert np.load(tmp_path / "indptr.csc.index.npy").tolist() == [0, 2, 4, 6, 10, 12, 16, 18]
    for terms, place in zip(own, places, strict=True):
        numbers = np.fromfile(place, np.int64) if place.exists() else np.empty(0, np.int64)
        assert [merged[number] for number in numbers] == terms


def test_a_term_in_every_passage_is_written_part_by_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passages = [Passage(str(number), "everywhere " * (1 + number % 3)) for number in range(1, 101)]
    expected = build(tmp_path / "whole", passages).search(["everywhere"], 100)
    monkeypatch.setattr(bm25, "_PART_ROWS", 9)
    monkeypatch.setattr(bm25, "_BAND_POSTINGS", 10)
    pieces: list[int] = []
    saturation = bm25.bm25_saturation
    monkeypatch.setattr(
        bm25, "bm25_saturation", lambda count, *rest: pieces.append(len(count)) or saturation(count, *rest)
    )
    found = build(tmp_path / "parts", passages).search(["everywhere"], 100)
    assert (found.rows == expected.rows).all() and (found.scores == expected.scores).all()
    assert max(pieces) <= 10 and sum(pieces) == 100


def test_opening_reads_no_vocabulary(tmp_path: Path) -> None:
    """2 million terms: their text would be 30 MB; what opening and a look-up allocate is a thousandth of it."""
    folder = tmp_path / "postings"
    folder.mkdir()
    with bm25._TermWriter(folder / "vocab.arrow") as writer:
        for start in range(0, 2_000_000, 100_000):
            numbers = pa.array(np.arange(start, start + 100_000)).cast(pa.large_string())
            writer.append(pc.utf8_lpad(numbers, 15, "0"))
    np.lib.format.open_memmap(folder / "indptr.csc.index.npy", "w+", np.int64, (2_000_001,))
    for array, dtype in (("data", np.float32), ("indices", np.int32)):
        np.save(folder / f"{array}.csc.index.npy", np.empty(0, dtype))
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    searcher = Bm25Searcher(folder, Bm25Settings(), 1)
    assert searcher._term_id("000000001234567") == 1_234_567
    assert searcher._term_id("12") == -1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200_000 and pa.total_allocated_bytes() - before < 200_000


def test_postings_of_another_collection_are_refused(tmp_path: Path) -> None:
    build(tmp_path, RIVERS)
    save_store(RIVERS[:4], Draft(tmp_path / "other"))
    with pytest.raises(ArtifactMismatch, match=r"postings of 6 passages, but .* has 4"):
        load_bm25(tmp_path / "bm25", PassageStore.open(tmp_path / "other/passages"))


@pytest.mark.parametrize(
    "text", ["北京", "東京 北京", "ÆNIMA", "naïve", "\u200f", "\x00 \ud83d", "🦋🦋", "नदी", "a" * 100_000]
)
def test_queries_in_any_script_find_their_terms_or_nothing(tmp_path: Path, text: str) -> None:
    found = build(tmp_path, RIVERS).search([text], 3)
    expected = [5] if any(term in text.lower() for term in ("北京", "東京", "ænima", "naïve")) else []
    assert [row for row in found.rows[0].tolist() if row >= 0] == expected


def test_empty_and_million_character_passages_are_indexed_like_others(tmp_path: Path) -> None:
    giant = "tiber " + "word " * 200_000
    searcher = build(tmp_path, [Passage("1", ""), Passage("2", giant), Passage("3", "x" * 1_000_000), RIVERS[3]])
    found = searcher.search(["tiber", "x" * 1_000_000], 5)
    assert found.rows[0].tolist() == [3, 1, -1, -1], "the shorter passage first"
    assert found.rows[1].tolist() == [2, -1, -1, -1]
