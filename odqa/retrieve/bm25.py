"""BM25 with scores computed when indexing (BM25S, Lù 2024, arXiv 2407.03618), in bm25s's own file layout.

An index folder:

    settings.json            k1, b and the analyser: the query side has nothing else to go by
    postings/                for engine bm25s, and as bm25s's own `load` wants it:
    vocab.arrow              the terms in code-point order, memory-mapped; a term's id is its place
    data.csc.index.npy       float32 (P,), the score that a term gives to a passage   } the P postings,
    indices.csc.index.npy    int32 (P,), the row of that passage                      } by term id, then by row
    indptr.csc.index.npy     int64 (V + 1,), where each term's postings begin
    vocab.index.json, params.index.json    read by bm25s alone

bm25s itself holds a whole collection's tokens while it builds and pads its answers with hits of score 0; this module
counts in parts and merges them on disk, a band of terms at a time (the peak is `memory`, whatever the number and the
length of the passages; parts and bands do not change a byte of the index), memory-maps, and drops what does not match.
Scores are bit-identical to bm25s's (tested). A passage's score is the float32 sum over the query's terms in query
order, a repeated term counting each time; order: higher score, then lower row. A query without a known term has no
hits.
"""

import json
import math
import re
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from odqa.artifacts import Draft
from odqa.corpus.arrays import NpyWriter
from odqa.corpus.store import MEMORY, PassageStore
from odqa.errors import ArtifactError, ArtifactMismatch, DataError, MissingExtra
from odqa.retrieve.rankings import Rankings, check_depth, no_hits, rank_entries
from odqa.runtime import progress
from odqa.types import Passage

if TYPE_CHECKING:
    from odqa.retrieve.lucene import LuceneSearcher

# The list of Lucene's EnglishAnalyzer, which bm25s calls English. Each index keeps the list it was made with.
ENGLISH_STOP_WORDS = tuple(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they"  # noqa: SIM905
    " this to was will with".split()
)
REFERENCE_LIMIT = 100_000  # passages that rank-bm25 may index: it scores every one of them for every query, in Python
# Measured: numba saves 16 ns a posting and costs 0.4 s to load, the first time 4 s to compile. A batch that touches
# fewer postings than this is scored without it: on nq-mini some 5,000 questions, on 21M passages ten.
COMPILE_FROM = 50_000_000
_REMEMBERED_TERMS = 100_000  # query terms whose ids are kept; a server may be asked anything
_PART_ROWS = 100_000  # passages whose postings are counted at once, about 0.5 GB
_BAND_POSTINGS = 8_000_000  # postings that are merged at once, about 0.4 GB
_BATCH_TERMS = 1 << 18  # terms that vocab.arrow keeps together; fixed, so that its bytes depend on the terms alone
# Bytes of memory that are reckoned with: for a byte of text that is counted (measured 25 for English, 53 for random
# tokens that never repeat), for a posting that is merged (ours: the arrays of a band), and for a term of a part that is
# merged (measured 96).
_TEXT_MEMORY = 60
_POSTING_MEMORY = 128
_TERM_MEMORY = 160


# What `token_pattern: characters` of a recipe stands for: Thai, Lao, Myanmar, Khmer, Kana, Bopomofo and Han by the
# character (their vowel signs and tones too), and words of one letter or more of all others.
_BY_CHARACTER = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3105-\u312f\u31f0-\u31ff"
_BY_CHARACTER += "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
CHARACTERS = rf"[{_BY_CHARACTER}]|[^\W{_BY_CHARACTER}]+"


@dataclass(frozen=True, slots=True)
class Analyzer:
    """How a text becomes terms, the same for passages and queries: case, pattern, stop words, then stems."""

    lowercase: bool = True
    stop_words: tuple[str, ...] = ENGLISH_STOP_WORDS
    stemmer: str | None = None
    """A Snowball algorithm of PyStemmer such as "english" or "porter"."""
    token_pattern: str = r"(?u)\b\w\w+\b"
    """A regular expression without groups; each match is a token."""

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.token_pattern).groups
        except re.error as error:
            raise DataError(f"token_pattern {self.token_pattern!r} is not a regular expression: {error}.") from error
        if groups:
            raise DataError(f"token_pattern {self.token_pattern!r} has a group; write (?:...) for one.")
        if self.stemmer is not None:
            _stemmer(self.stemmer)

    def terms(self, text: str) -> list[str]:
        """The terms of a text in order, repeated ones included."""
        stop_words = _as_set(self.stop_words)
        terms = [token for token in self.tokens(text) if token not in stop_words]
        return terms if self.stemmer is None else _stemmer(self.stemmer)(terms)

    def tokens(self, text: str) -> list[str]:
        """The first half of `terms`: case and pattern."""
        return _find_all(self.token_pattern)(text.lower() if self.lowercase else text)

    def stop_mask(self, tokens: Sequence[str]) -> np.ndarray:
        """The second half on distinct tokens: bool (N,), whether each is a stop word."""
        stop_words = _as_set(self.stop_words)
        return np.array([token in stop_words for token in tokens], bool)

    def stems(self, tokens: Sequence[str]) -> list[str]:
        """The last step on distinct tokens: the term of each."""
        return list(tokens) if self.stemmer is None else _stemmer(self.stemmer)(list(tokens))


@dataclass(frozen=True, slots=True)
class LuceneAnalyzer:
    """Lucene's own English analyser, as Anserini sets it up: words by UAX 29, without 's, in lower case, then stems.

    `stop_words` leaves out its list of 33. The stem comes last, as in `Analyzer`.
    """

    stemmer: Literal["porter", "krovetz", "none"] = "porter"
    stop_words: bool = True

    def __post_init__(self) -> None:
        if self.stemmer not in ("porter", "krovetz", "none"):
            raise DataError(f"bm25: Lucene's stemmer {self.stemmer!r} is not one of porter, krovetz, none.")


@dataclass(frozen=True, slots=True)
class Bm25Settings:
    """What a BM25 index is made with.

    `titles`: whether the title is put before the text ("title text"). `engine` rank-bm25 is the plain reference
    implementation (Okapi's idf; at most 100,000 passages), lucene is `odqa.retrieve.lucene`. Of it alone are `lucene`,
    an analyser in place of `analyzer`, and `prebuilt`, the name of an index that Pyserini offers; such a one was built
    with Lucene's analyser. k1 = 0.9 and b = 0.4 are Anserini's, tuned for passages.
    """

    k1: float = 0.9
    b: float = 0.4
    titles: bool = True
    engine: Literal["bm25s", "rank-bm25", "lucene"] = "bm25s"
    analyzer: Analyzer = field(default_factory=Analyzer)
    lucene: LuceneAnalyzer | None = None
    prebuilt: str | None = None

    def __post_init__(self) -> None:
        if not self.k1 >= 0 or not 0 <= self.b <= 1:
            raise DataError(f"bm25: k1 = {self.k1} and b = {self.b}; expected k1 >= 0 and 0 <= b <= 1.")
        if self.engine not in ("bm25s", "rank-bm25", "lucene"):
            raise DataError(f"bm25: engine {self.engine!r} is not one of bm25s, rank-bm25, lucene.")
        if self.engine != "lucene" and (self.lucene or self.prebuilt):
            raise DataError(f"bm25: lucene and prebuilt are settings of engine lucene, not of {self.engine}.")
        if self.prebuilt and not self.lucene:
            raise DataError(f"bm25: prebuilt {self.prebuilt!r} was made with Lucene's analyser; say how it stems.")

    def text(self, passage: Passage) -> str:
        """What of a passage is indexed."""
        return f"{passage.title} {passage.text}" if self.titles and passage.title else passage.text

    def to_json(self) -> dict[str, Any]:
        """All settings; those of Lucene alone only where they are used, so that other indexes keep their hashes."""
        value = asdict(self)
        return {key: value[key] for key in value if key not in ("lucene", "prebuilt") or value[key] is not None}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Bm25Settings":
        """The inverse of `to_json`, after JSON made lists of tuples."""
        analyzer = {**value["analyzer"], "stop_words": tuple(value["analyzer"]["stop_words"])}
        lucene = value.get("lucene")
        lucene = LuceneAnalyzer(**lucene) if lucene else None
        return cls(**{**value, "analyzer": Analyzer(**analyzer), "lucene": lucene})


def check_engine(settings: Bm25Settings) -> None:
    """Raises MissingExtra if a package of the engine is missing; a build asks before it reads any passage."""
    if settings.engine == "rank-bm25":
        _check_reference(0)
    elif settings.engine == "lucene":
        from odqa.retrieve.lucene import check_lucene

        check_lucene(settings)


def build_bm25(
    store: PassageStore, settings: Bm25Settings, draft: Draft, name: str = "bm25", *, memory: int = MEMORY
) -> None:
    """Index a store into the folder `name` of `draft`, in parts that a resumed job skips, within `memory` bytes.

    Working parts lie in `NAME.parts`; declare that name as scratch of the artifact.
    """
    if settings.engine == "rank-bm25":
        _check_reference(len(store))
    elif settings.engine == "lucene":
        from odqa.retrieve.lucene import build_lucene

        build_lucene(store, settings, draft, f"{name}/lucene")
    elif not draft.has(f"{name}/postings"):
        parts = []
        with progress("bm25", len(store), "passages") as bar:
            for rows in store.ranges(rows=_PART_ROWS, size=memory // _TEXT_MEMORY):
                part = f"{name}.parts/{rows.start:010d}-{rows.stop:010d}"
                _count_part(store, settings, draft, part, rows)
                parts.append(draft.path / part)
                bar.advance(len(rows))
        draft.part(f"{name}/postings", lambda path: _merge_parts(parts, settings, path, memory))
    draft.write_json(f"{name}/settings.json", settings.to_json())


def load_bm25(path: Path, store: PassageStore) -> "Bm25Searcher | ReferenceSearcher | LuceneSearcher":
    """Open the index folder `path` of `store`.

    Raises ArtifactError if it is none, ArtifactMismatch if of another store, MissingExtra for its engine.
    """
    try:
        settings = Bm25Settings.from_json(json.loads((path / "settings.json").read_text(encoding="utf-8")))
        has_postings = settings.engine == "bm25s"
        counted = path / "postings/params.index.json"
        passages = json.loads(counted.read_text(encoding="utf-8"))["num_docs"] if has_postings else len(store)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: not a BM25 index ({error}). Build the index again.") from error
    if settings.engine == "rank-bm25":
        return ReferenceSearcher(store, settings)
    if settings.engine == "lucene":
        from odqa.retrieve.lucene import LuceneSearcher

        return LuceneSearcher(path / "lucene", settings, store)
    if passages != len(store):
        raise ArtifactMismatch(
            f"{path}: postings of {passages:,} passages, but {store.path} has {len(store):,}. Build the index again."
        )
    return Bm25Searcher(path / "postings", settings, len(store))


class Bm25Searcher:
    """Searches the postings of a folder that `build_bm25` made; opening maps it and reads nothing.

    `compile`: None compiles the scoring with numba for batches that touch `COMPILE_FROM` postings, if numba is there;
    True always, False never. The rankings are the same, bit by bit.
    """

    source = "bm25"

    def __init__(self, path: Path, settings: Bm25Settings, passages: int, *, compile: bool | None = None) -> None:
        self.settings = settings
        self._passages = passages
        self._compile = compile
        self._terms = _load_terms(path / "vocab.arrow")
        self._data, self._indices, self._indptr = (
            np.load(path / f"{array}.csc.index.npy", mmap_mode="r", allow_pickle=False)
            for array in ("data", "indices", "indptr")
        )
        self._ids: dict[str, int] = {}

    def search(self, texts: Sequence[str], k: int) -> Rankings:
        """At most k passages a text that share a term with it. Raises ValueError for k < 1."""
        check_depth(k)
        queries = [self._term_ids(text) for text in texts]
        pointers = np.cumsum([0, *map(len, queries)])
        flat = np.array([term for query in queries for term in query], np.int64)
        score = _compiled_scorer() if self._compiles(flat) else _score_batch
        rows = np.full((len(texts), min(k, self._passages)), -1, np.int64)
        scores = np.full(rows.shape, -np.inf, np.float32)
        score(flat, pointers, self._data, self._indices, self._indptr, self._passages, rows, scores)
        return Rankings(rows, scores, self.source)

    def _compiles(self, terms: np.ndarray) -> bool:
        if self._compile is not None:
            return self._compile
        postings = int((self._indptr[terms + 1] - self._indptr[terms]).sum())
        return postings >= COMPILE_FROM and find_spec("numba") is not None

    def _term_ids(self, text: str) -> list[int]:
        """Ids of the text's terms in order; terms that no passage has are left out."""
        ids = (self._term_id(term) for term in self.settings.analyzer.terms(text))
        return [term_id for term_id in ids if term_id >= 0]

    def _term_id(self, term: str) -> int:
        """The id of a term, -1 for one that no passage has; by binary search, remembered."""
        known = self._ids.get(term)
        if known is None:
            place = bisect_left(range(len(self._terms)), term, key=lambda at: self._terms[at].as_py())
            is_there = place < len(self._terms) and self._terms[place].as_py() == term
            if len(self._ids) >= _REMEMBERED_TERMS:
                self._ids.clear()
            known = self._ids[term] = place if is_there else -1
        return known


class ReferenceSearcher:
    """rank-bm25's BM25Okapi over a store of at most 100,000 passages: plain, slow, there to compare with.

    Its idf can be negative (floored at a quarter of the mean idf), so scores differ from `Bm25Searcher`'s.
    Passages without any of the query's terms are no hits here either.
    """

    source = "bm25"

    def __init__(self, store: PassageStore, settings: Bm25Settings) -> None:
        _check_reference(len(store))
        self.settings = settings
        self._store = store

    @cached_property
    def _okapi(self) -> Any:
        from rank_bm25 import BM25Okapi

        terms = [self.settings.analyzer.terms(self.settings.text(passage)) for passage in self._store]
        return BM25Okapi(terms, k1=self.settings.k1, b=self.settings.b)

    def search(self, texts: Sequence[str], k: int) -> Rankings:
        """At most k passages a text that share a term with it. Raises ValueError for k < 1."""
        found = no_hits(len(texts), k, self.source)
        for query, text in enumerate(texts):
            scores = self._okapi.get_scores(self.settings.analyzer.terms(text)).astype(np.float32)
            rows = np.flatnonzero(scores)
            top = rank_entries(np.zeros(len(rows), np.int64), rows, scores[rows], count=1, k=k, source=self.source)
            found.rows[query], found.scores[query] = top.rows[0], top.scores[0]
        return found


# ---------------------------------------------------------------------------------------------------- scoring


def bm25_idf(passages: int, with_term: int) -> float:
    """Lucene's inverse document frequency, always positive: ln(1 + (N - n + 0.5) / (n + 0.5)).

    Source: Kamphuis et al. 2020, "Which BM25 do you mean?", table 1, Lucene (accurate).
    """
    return math.log(1 + (passages - with_term + 0.5) / (with_term + 0.5))


def bm25_saturation(count: np.ndarray, length: np.ndarray, mean_length: float, k1: float, b: float) -> np.ndarray:
    """The share of its idf that a term reaches in a passage: tf / (tf + k1 (1 - b + b length / mean length))."""
    share: np.ndarray = count / (k1 * ((1 - b) + b * length / mean_length) + count)
    return share


def _score_batch(
    terms: np.ndarray,
    pointers: np.ndarray,
    data: np.ndarray,
    indices: np.ndarray,
    indptr: np.ndarray,
    passages: int,
    rows: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Rank the passages for queries `terms[pointers[q] : pointers[q + 1]]` into rows (Q, k) and scores (Q, k).

    Sums go into one float32 (passages,) buffer of which a query touches, and clears, only the rows in its postings.
    `_score_batch_loops` is the same for numba.
    """
    total = np.zeros(passages, np.float32)
    k = rows.shape[1]
    for query in range(len(rows)):
        touched = []
        for term in terms[pointers[query] : pointers[query + 1]]:
            where = slice(indptr[term], indptr[term + 1])
            found = indices[where]
            before = total[found]
            touched.append(found[before == 0])  # all scores are positive, so 0 means: not yet a candidate
            total[found] = before + data[where]
        if not touched:
            continue
        candidates = np.concatenate(touched)
        reached = total[candidates]
        total[candidates] = 0
        if len(candidates) > k:
            is_near = reached >= np.partition(reached, len(reached) - k)[-k]  # may keep more than k where scores tie
            candidates, reached = candidates[is_near], reached[is_near]
        best = np.lexsort((candidates, -reached))[:k]
        rows[query, : len(best)] = candidates[best]
        scores[query, : len(best)] = reached[best]


def _score_batch_loops(
    terms: np.ndarray,
    pointers: np.ndarray,
    data: np.ndarray,
    indices: np.ndarray,
    indptr: np.ndarray,
    passages: int,
    rows: np.ndarray,
    scores: np.ndarray,
) -> None:
    """`_score_batch` in loops that numba compiles; a heap in `rows` and `scores` keeps the k best, its worst on top."""
    total = np.zeros(passages, np.float32)
    touched = np.empty(passages, np.int32)
    k = rows.shape[1]
    for query in range(rows.shape[0]):
        count = 0
        for term in terms[pointers[query] : pointers[query + 1]]:
            for at in range(indptr[term], indptr[term + 1]):
                row = indices[at]
                if total[row] == 0:
                    touched[count] = row
                    count += 1
                total[row] += data[at]
        heap_rows, heap_scores = rows[query], scores[query]
        size = 0
        for at in range(count):
            row = touched[at]
            score = total[row]
            total[row] = 0
            if size == k and (score < heap_scores[0] or (score == heap_scores[0] and row > heap_rows[0])):
                continue
            if size < k:  # let the newcomer rise from the end ...
                place = size
                size += 1
                while place > 0:
                    parent = (place - 1) // 2
                    if score < heap_scores[parent] or (score == heap_scores[parent] and row > heap_rows[parent]):
                        heap_scores[place], heap_rows[place] = heap_scores[parent], heap_rows[parent]
                        place = parent
                    else:
                        break
            else:  # ... or sink from the top, whose entry is thrown out
                place = 0
                while 2 * place + 1 < k:
                    child = 2 * place + 1
                    right = child + 1
                    if right < k and (
                        heap_scores[right] < heap_scores[child]
                        or (heap_scores[right] == heap_scores[child] and heap_rows[right] > heap_rows[child])
                    ):
                        child = right
                    if heap_scores[child] < score or (heap_scores[child] == score and heap_rows[child] > row):
                        heap_scores[place], heap_rows[place] = heap_scores[child], heap_rows[child]
                        place = child
                    else:
                        break
            heap_scores[place], heap_rows[place] = score, row
        by_row = np.argsort(heap_rows[:size])
        order = by_row[np.argsort(-heap_scores[:size][by_row], kind="mergesort")]
        heap_rows[:size] = heap_rows[:size][order]
        heap_scores[:size] = heap_scores[:size][order]


@cache
def _compiled_scorer() -> Callable[..., None]:
    import numba

    try:
        return numba.njit(nogil=True, cache=True)(_score_batch_loops)  # type: ignore[no-any-return]
    except RuntimeError:  # no folder to cache in that may be written
        return numba.njit(nogil=True)(_score_batch_loops)  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------------- building


def _count_part(store: PassageStore, settings: Bm25Settings, draft: Draft, name: str, rows: range) -> None:
    """Count the terms of some rows into a working folder: terms in order, and postings by term, then by row.

    vocab.arrow (v terms); indptr int64 (v + 1,); rows int32 (p,); counts int32 (p,); lengths int32 (rows,), in terms.
    """

    def write(path: Path) -> None:
        terms, postings = _postings(store, settings, rows)
        path.mkdir()
        _save_terms(path / "vocab.arrow", terms)
        for array, values in postings.items():
            np.save(path / f"{array}.npy", values, allow_pickle=False)

    draft.part(name, write)


def _postings(store: PassageStore, settings: Bm25Settings, rows: range) -> tuple[Any, dict[str, np.ndarray]]:
    # 1. Tokenise passage by passage, and number the distinct tokens in C++.
    tokens: list[Any] = []  # of pyarrow.DictionaryArray
    lengths: list[int] = []
    for start in range(rows.start, rows.stop, 10_000):
        passages = store.slice(start, min(start + 10_000, rows.stop))
        lists = [settings.analyzer.tokens(settings.text(passage)) for passage in passages]
        lengths += map(len, lists)
        flat = [token for passage_tokens in lists for token in passage_tokens]
        tokens.append(pa.array(flat, pa.large_string()).dictionary_encode())
    chunks: Any = pa.chunked_array(tokens).unify_dictionaries().combine_chunks()
    # 2. Stop words and stems are decided once for each distinct token; terms are numbered in code-point order.
    distinct = chunks.dictionary.to_pylist()
    is_stop = settings.analyzer.stop_mask(distinct)
    stems = pa.array(settings.analyzer.stems(distinct), pa.large_string())
    kept_terms = pc.unique(stems.filter(pa.array(~is_stop)))
    terms = kept_terms.take(pc.sort_indices(kept_terms))
    term_of_token = np.where(is_stop, -1, pc.index_in(stems, terms).fill_null(-1).to_numpy(zero_copy_only=False))
    # 3. One number per token occurrence, term * rows + row, sorted: runs of equal numbers are the postings.
    term_ids = term_of_token[chunks.indices.to_numpy(zero_copy_only=False)]
    row_ids = np.repeat(np.arange(len(rows)), lengths)
    row_ids, term_ids = row_ids[term_ids >= 0], term_ids[term_ids >= 0].astype(np.int64)
    occurrences = np.sort(term_ids * len(rows) + row_ids)
    first = np.flatnonzero(np.diff(occurrences, prepend=-1))
    posting_terms, posting_rows = np.divmod(occurrences[first], len(rows))
    return terms, {
        "indptr": np.searchsorted(posting_terms, np.arange(len(terms) + 1)),
        "rows": (posting_rows + rows.start).astype(np.int32),
        "counts": np.diff(first, append=len(occurrences)).astype(np.int32),
        "lengths": np.bincount(row_ids, minlength=len(rows)).astype(np.int32),
    }


def _merge_parts(parts: Sequence[Path], settings: Bm25Settings, path: Path, memory: int) -> None:
    """Turn the counted parts into one scored index, a band of terms after the other; what grows with them is on disk.

    Working files: of each part (v terms) places, int64 (v,), the number of each of its terms in the whole; and lengths,
    int32 (N,), the passages' lengths.
    """
    scratch = path / "merge"
    scratch.mkdir(parents=True)
    places = [scratch / f"places-{number:06d}" for number in range(len(parts))]
    # 1. One vocabulary, the number of passages with each term as indptr, and every part's place in both.
    _merge_vocabularies(parts, places, path, memory // (_TERM_MEMORY * len(parts)))
    indptr = np.load(path / "indptr.csc.index.npy", mmap_mode="r", allow_pickle=False)
    # 2. What else BM25 needs to know of the whole collection.
    passages, total = 0, 0
    with NpyWriter(scratch / "lengths.npy", np.int32) as writer:
        for part in parts:
            of_part = np.load(part / "lengths.npy", allow_pickle=False)
            writer.append(of_part)
            passages, total = passages + len(of_part), total + int(of_part.sum(dtype=np.int64))
    lengths = np.load(scratch / "lengths.npy", mmap_mode="r", allow_pickle=False)
    # 3. Postings, written band by band: within a term the parts follow each other, so rows ascend.
    data = NpyWriter(path / "data.csc.index.npy", np.float32)
    indices = NpyWriter(path / "indices.csc.index.npy", np.int32)
    with data, indices:
        for low, high in _bands(indptr, min(_BAND_POSTINGS, memory // _POSTING_MEMORY)):
            with_term = np.diff(indptr[low : high + 1])
            idf = _idf(passages, with_term)
            for terms, rows, counts in _band_postings(parts, places, indptr[low : high + 1], low):
                share = bm25_saturation(counts, lengths[rows], total / passages, settings.k1, settings.b)
                data.append((idf[terms] * share).astype(np.float32))
                indices.append(rows)
    # 4. What bm25s wants to read.
    shutil.rmtree(scratch)
    _save_for_bm25s(path, settings, passages)


def _merge_vocabularies(parts: Sequence[Path], places: Sequence[Path], path: Path, block: int) -> None:
    """Write vocab.arrow and indptr of the whole, and the places of the parts, from `block` terms of each at a time.

    All vocabularies are in code-point order. What is merged in a step ends with the term that ends the first block to
    end, so that no later block has a term before it. Files are open one at a time: a process may hold a thousand.
    """
    block = max(block, 1)
    sizes = [len(_load_terms(part / "vocab.arrow")) for part in parts]
    heads = [0] * len(parts)  # of each part, where its next block begins
    found, postings = 0, 0
    with NpyWriter(path / "indptr.csc.index.npy", np.int64) as indptr, _TermWriter(path / "vocab.arrow") as terms:
        indptr.append(np.zeros(1))
        while heads != sizes:
            # 1. The next terms of every part, up to the same one.
            unended = [number for number, head in enumerate(heads) if head + block < sizes[number]]
            ends = [_load_terms(parts[number] / "vocab.arrow")[heads[number] + block - 1].as_py() for number in unended]
            slices = [
                _terms_up_to(part, head, block, min(ends, default=None))
                for part, head in zip(parts, heads, strict=True)
            ]
            # 2. Their numbers in the whole.
            coded = pa.concat_arrays(slices).dictionary_encode()
            order = pc.sort_indices(coded.dictionary)
            rank = np.empty(len(order), np.int64)
            rank[order.to_numpy()] = np.arange(len(order))
            numbers = np.split(rank[coded.indices.to_numpy()], np.cumsum([len(own) for own in slices])[:-1])
            # 3. How many passages have each, and what the parts want to know later.
            with_term = np.zeros(len(order), np.int64)
            for number, (part, own) in enumerate(zip(parts, numbers, strict=True)):
                pointers = np.load(part / "indptr.npy", mmap_mode="r", allow_pickle=False)
                with_term[own] += np.diff(pointers[heads[number] : heads[number] + len(own) + 1])
                with places[number].open("ab") as file:
                    (own + found).tofile(file)
                heads[number] += len(own)
            indptr.append(postings + np.cumsum(with_term))
            terms.append(coded.dictionary.take(order))
            found, postings = found + len(order), postings + int(with_term.sum())


def _terms_up_to(part: Path, head: int, block: int, last: str | None) -> Any:
    """A copy of at most `block` terms of a part from `head` on, none behind `last` (None: all of them)."""
    vocabulary = _load_terms(part / "vocab.arrow")
    stop = min(head + block, len(vocabulary))
    if last is not None:
        stop = bisect_right(range(stop), last, lo=head, key=lambda at: vocabulary[at].as_py())
    return pc.take(vocabulary.slice(head, stop - head), pa.array(range(stop - head), pa.int64())).combine_chunks()


def _idf(passages: int, with_term: np.ndarray) -> np.ndarray:
    """float32 (n,): the idf of n terms, computed once for each number of passages that a term may be in."""
    distinct, which = np.unique(with_term, return_inverse=True)
    return np.array([bm25_idf(passages, count) for count in distinct.tolist()], np.float32)[which]


def _band_postings(
    parts: Sequence[Path], places: Sequence[Path], indptr: np.ndarray, low: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The postings of the terms from `low` on whose pointers are `indptr`, in order: term (from 0), row, count.

    One term alone comes part by part: it may be in every passage.
    """
    high = low + len(indptr) - 1
    if high - low > 1:
        band = _Band.empty(indptr)
        for part, place in zip(parts, places, strict=True):
            band.add(part, place, range(low, high))
        yield np.repeat(np.arange(high - low), np.diff(indptr)), band.rows, band.counts
        return
    for part, place in zip(parts, places, strict=True):
        first, last = _terms_within(part, place, low, high)[1][[0, -1]]
        rows, counts = (
            np.load(part / f"{array}.npy", mmap_mode="r", allow_pickle=False)[first:last]
            for array in ("rows", "counts")
        )
        yield np.zeros(len(rows), np.int64), rows, counts.astype(np.float32)


def _terms_within(part: Path, place: Path, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """The numbers in the whole of a part's terms between `low` and `high`, and the pointers to their postings there."""
    numbers = np.memmap(place, np.int64, "r") if place.stat().st_size else np.empty(0, np.int64)
    pointers = np.load(part / "indptr.npy", mmap_mode="r", allow_pickle=False)
    start, stop = np.searchsorted(numbers, [low, high])
    return np.asarray(numbers[start:stop]), np.asarray(pointers[start : stop + 1])


@dataclass(slots=True)
class _Band:
    """The postings of a band of terms, filled part by part. `heads`: where each term's next posting goes."""

    rows: np.ndarray
    counts: np.ndarray
    heads: np.ndarray

    @classmethod
    def empty(cls, indptr: np.ndarray) -> "_Band":
        size = int(indptr[-1] - indptr[0])
        return cls(np.empty(size, np.int32), np.empty(size, np.float32), indptr[:-1] - indptr[0])

    def add(self, part: Path, place: Path, band: range) -> None:
        """Put a part's postings of the band's terms behind what is there."""
        numbers, pointers = _terms_within(part, place, band.start, band.stop)
        counts, terms = np.diff(pointers), numbers - band.start
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        target = np.repeat(self.heads[terms], counts) + within
        for array, values in (("rows", self.rows), ("counts", self.counts)):
            source = np.load(part / f"{array}.npy", mmap_mode="r", allow_pickle=False)
            values[target] = source[pointers[0] : pointers[-1]]
        self.heads[terms] += counts


def _bands(indptr: np.ndarray, postings: int) -> Iterator[tuple[int, int]]:
    """Cut the terms into bands of at most `postings` postings, one term at least."""
    low, last = 0, len(indptr) - 1
    while low < last:
        high = max(int(np.searchsorted(indptr, indptr[low] + postings, "right")) - 1, low + 1)
        yield low, high
        low = high


def _save_for_bm25s(path: Path, settings: Bm25Settings, passages: int) -> None:
    terms = _load_terms(path / "vocab.arrow")
    with (path / "vocab.index.json").open("w", encoding="utf-8") as file:
        file.write("{")
        for start in range(0, len(terms), 10_000):
            names = terms.slice(start, 10_000).to_pylist()
            ids = dict(zip(names, range(start, start + len(names)), strict=True))
            file.write((", " if start else "") + json.dumps(ids, ensure_ascii=False)[1:-1])
        file.write("}")
    params = {"k1": settings.k1, "b": settings.b, "delta": 0.5, "method": "lucene", "idf_method": "lucene"}
    params |= {"dtype": "float32", "int_dtype": "int32", "num_docs": passages, "backend": "numpy"}
    (path / "params.index.json").write_text(json.dumps(params, indent=4), encoding="utf-8")


class _TermWriter:
    """Writes terms as an Arrow file, to be mapped by `_load_terms`, in batches that do not depend on how they come."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._schema = pa.schema([("term", pa.large_string())])
        self._file = pa.ipc.new_file(self._sink, self._schema)
        self._waiting: Any = pa.chunked_array([], pa.large_string())
        self._is_empty = True

    def append(self, terms: Any) -> None:
        self._waiting = pa.chunked_array([*self._waiting.chunks, terms], pa.large_string())
        while len(self._waiting) >= _BATCH_TERMS:
            self._write(self._waiting.slice(0, _BATCH_TERMS))
            self._waiting = self._waiting.slice(_BATCH_TERMS)

    def _write(self, terms: Any) -> None:
        joined = pa.concat_arrays(terms.chunks) if terms.num_chunks else pa.array([], pa.large_string())
        self._file.write_batch(pa.record_batch([joined], schema=self._schema))
        self._is_empty = False

    def __enter__(self) -> "_TermWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if len(self._waiting) or self._is_empty:
            self._write(self._waiting)
        self._file.close()
        self._sink.close()


def _save_terms(path: Path, terms: Any) -> None:
    with _TermWriter(path) as writer:
        writer.append(terms)


def _load_terms(path: Path) -> Any:
    """The terms as a pyarrow.ChunkedArray over the mapped file."""
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    return pa.chunked_array([file.get_batch(number).column(0) for number in range(file.num_record_batches)])


def _check_reference(passages: int) -> None:
    if passages > REFERENCE_LIMIT:
        raise DataError(
            f"bm25: engine rank-bm25 scores in plain Python and takes at most {REFERENCE_LIMIT:,} passages, this"
            f" collection has {passages:,}. Use engine: bm25s."
        )
    if find_spec("rank_bm25") is None:
        raise MissingExtra("engine rank-bm25", "rank-bm25", "reference")


@cache
def _find_all(pattern: str) -> Callable[[str], list[str]]:
    return re.compile(pattern).findall


@cache
def _as_set(words: tuple[str, ...]) -> frozenset[str]:
    return frozenset(words)


@cache
def _stemmer(name: str) -> Callable[[list[str]], list[str]]:
    """PyStemmer's function for an algorithm. Raises MissingExtra without PyStemmer, DataError for a wrong name."""
    try:
        import Stemmer
    except ImportError as error:
        raise MissingExtra(f"stemmer {name!r}", "PyStemmer", "stemmer") from error
    try:
        return Stemmer.Stemmer(name).stemWords  # type: ignore[no-any-return]
    except KeyError as error:
        raise DataError(f"stemmer {name!r} is not one of {', '.join(Stemmer.algorithms())}.") from error
