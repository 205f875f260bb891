"""The index artifact (kind "index"): a collection's texts with its BM25 postings, its vectors, or both.

    passages/        the text store (odqa.corpus.store)
    bm25/            settings with the analyser, and postings (odqa.retrieve.bm25)
    dense/           encoder.json: the encoder, its settings and fingerprints
    dense/method/    the trained method that it computes with, if there is one (odqa.retrieve.tuned)
    dense/vectors/   passage vectors in parts, unless FAISS has replaced them
    dense/search/    how they are searched (odqa.retrieve.vectors)

The index owns its analyser and its encoder: a retriever takes an index and has no way to disagree with it.
What a pipeline does not use is not loaded: BM25 alone imports neither torch nor transformers nor faiss.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from odqa.artifacts import Artifact, Draft, building, load_artifact, sha256_json
from odqa.corpus.store import PART_ROWS, PassageStore, save_store
from odqa.errors import ArtifactError, ArtifactMismatch
from odqa.retrieve.bm25 import Bm25Searcher, Bm25Settings, ReferenceSearcher, build_bm25, check_engine, load_bm25
from odqa.retrieve.dense import Encoder, EncoderSettings, fingerprint, save_passage_vectors, tokenizer_fingerprint
from odqa.retrieve.faiss_build import check_build
from odqa.retrieve.fuse import Normalise, alpha_fusion, reciprocal_rank_fusion, weighted_fusion
from odqa.retrieve.given import GivenVectors, IndexVectors, place_embeddings, place_index
from odqa.retrieve.rankings import Rankings, Searcher, check_depth
from odqa.retrieve.tuned import FILES as METHOD_FILES
from odqa.retrieve.vectors import VectorSearcher, VectorSettings, build_vectors, load_vectors
from odqa.runtime import peak_memory_bytes
from odqa.types import Hit, Passage, Query

if TYPE_CHECKING:
    from odqa.retrieve.lucene import LuceneSearcher

KIND = "index"
MEMORY_BUDGET = 4_000_000_000  # bytes: what the smallest machine that we build for can spare


def build_index(
    path: Path,
    passages: Iterable[Passage],
    *,
    source: Mapping[str, Any],
    bm25: Bm25Settings | None = None,
    encoder: EncoderSettings | None = None,
    vectors: VectorSettings | None = None,
    given: GivenVectors | IndexVectors | None = None,
    method: Path | None = None,
    recipe: Mapping[str, Any] | None = None,
    device: str = "auto",
    part_rows: int = PART_ROWS,
    memory_budget: int = MEMORY_BUDGET,
) -> "Index":
    """Build the index `path` from a stream of passages, and open it.

    `source` says what the passages are (path and sha256 of the file) and goes into the manifest; `bm25` and `encoder`
    are what to build, `vectors` how the encoder's vectors are searched (default: exactly), `given` vectors that need
    not be made (DataError if they are not the encoder's). `method` is the folder of a trained bi-encoder that the
    encoder computes with; the index keeps a copy. `recipe` is the resolved recipe for the manifest (default: the
    settings). A killed build continues when it is called again with the same
    arguments and a stream of the same passages; the stream is not touched if the store was finished.

    `memory_budget`: bytes that the process may take, however many passages come; three quarters of it are for what they
    are made into, the rest for programs and the encoder. It is no property of the index: postings and FAISS indexes
    are the same bytes under any. DataError before a passage is encoded if a FAISS type needs more.
    """
    memory = memory_budget * 3 // 4
    dense = Encoder(encoder, device=device, method=method) if encoder else None
    vectors = vectors or VectorSettings()
    settings: dict[str, Any] = {"part_rows": part_rows}
    inputs: dict[str, Any] = {"passages": dict(source)}
    if bm25:
        check_engine(bm25)
        settings["bm25"] = bm25.to_json()
    if dense:
        settings["encoder"], settings["vectors"] = asdict(dense.resolved), asdict(vectors)
        inputs["encoder"] = encoder_weights(dense)
        if dense.tuned is not None:
            inputs["method"] = dense.tuned.hash
        if given is not None:
            given.check(dense)
            inputs["vectors"] = given.identity
    inputs["settings"] = sha256_json(settings)
    scratch: tuple[str, ...] = ("passages.marks", "bm25.parts", "dense/search/index.faiss.shards")
    if not vectors.keeps_vectors:
        scratch += ("dense/vectors",)
    with building(path, KIND, recipe=recipe or settings, inputs=inputs, scratch=scratch) as draft:
        save_store(passages, draft, part_rows=part_rows, memory=memory)
        store = PassageStore.open(draft.path / "passages")
        draft.counts["passages"] = len(store)
        makes_vectors = dense is not None and not draft.has("dense/search/search.json")
        if dense and makes_vectors and vectors.faiss is not None and not _comes_searchable(given):
            rows, width = len(store), dense.width
            check_build(vectors.faiss, width, rows=rows, train_rows=vectors.train_rows, memory=memory)
        if bm25:
            build_bm25(store, bm25, draft, memory=memory)
        if dense:
            for name in METHOD_FILES if method is not None else ():
                draft.part(f"dense/method/{name}", partial(shutil.copyfile, Path(str(method)) / name))
            if makes_vectors:
                _make_vectors(dense, store, vectors, given, draft, memory)
            draft.write_json(
                "dense/encoder.json",
                {
                    "settings": asdict(dense.resolved),
                    "weights": inputs["encoder"],
                    "tokenizer": tokenizer_fingerprint(dense.question_folder),
                },
            )
        if recipe is not None:
            draft.extra["settings"] = settings
        draft.measured |= {"peak_memory_bytes": peak_memory_bytes(), "memory_budget": memory_budget}
    return load_index(path, device=device)


def _comes_searchable(given: GivenVectors | IndexVectors | None) -> bool:
    """Whether a FAISS index is taken over, so that none has to be built."""
    if isinstance(given, IndexVectors):
        return not given.has_vectors
    return given is not None and given.faiss is not None


def _make_vectors(
    encoder: Encoder,
    store: PassageStore,
    settings: VectorSettings,
    given: GivenVectors | IndexVectors | None,
    draft: Draft,
    memory: int,
) -> None:
    """Make or take over the passage vectors, and make them searchable."""
    if isinstance(given, IndexVectors):
        if given.place(encoder, settings, draft):
            return
    elif given is not None and given.faiss is not None:
        place_index(given, encoder, store, draft, "dense/search", settings.search)
        return
    if isinstance(given, GivenVectors):
        place_embeddings(given, encoder, store, draft, "dense/vectors")
    elif given is None:
        save_passage_vectors(encoder, store, draft, "dense/vectors")
    build_vectors(draft.path / "dense/vectors", settings, draft, "dense/search", memory=memory)


def load_index(
    path: Path,
    *,
    encoder: str | None = None,
    device: str = "auto",
    search: Mapping[str, float] | None = None,
    verify: bool = False,
) -> "Index":
    """Open a finished index; nothing but manifests is read before it is used.

    `encoder` is where the question encoder lies now (default: the name the index was built with); one with other
    weights is refused when `dense` is asked for. `search` replaces stored FAISS knobs. `verify` compares all hashes.
    `device`: where questions are encoded; one that is named also searches there (auto: the processor does).
    """
    return Index(load_artifact(Path(path), KIND, verify=verify), encoder=encoder, device=device, search=search)


class Index:
    """A finished index: `store`, and the searchers it holds, each opened when first asked for."""

    def __init__(
        self, artifact: Artifact, *, encoder: str | None, device: str, search: Mapping[str, float] | None
    ) -> None:
        self.artifact = artifact
        self._encoder, self._device, self._search = encoder, device, search

    @property
    def path(self) -> Path:
        return self.artifact.path

    @property
    def has_bm25(self) -> bool:
        return (self.path / "bm25").is_dir()

    @property
    def has_dense(self) -> bool:
        return (self.path / "dense").is_dir()

    @cached_property
    def store(self) -> PassageStore:
        """The passages of the collection."""
        return PassageStore.open(self.path / "passages")

    @cached_property
    def bm25(self) -> "Bm25Searcher | ReferenceSearcher | LuceneSearcher":
        """The BM25 searcher. Raises ArtifactError if the index has none."""
        if not self.has_bm25:
            raise ArtifactError(f"{self.path}: this index has no BM25 part. Build one with bm25 in its recipe.")
        return load_bm25(self.path / "bm25", self.store)

    @cached_property
    def dense(self) -> "DenseSearcher":
        """The dense searcher. Raises ArtifactError without one, ArtifactMismatch for another encoder."""
        if not self.has_dense:
            raise ArtifactError(f"{self.path}: this index has no vectors. Build one with an encoder in its recipe.")
        built = json.loads((self.path / "dense/encoder.json").read_text(encoding="utf-8"))
        settings = EncoderSettings(**{"prompts": False, **built["settings"]})  # older ones were built without prompts
        if self._encoder is not None:
            settings = replace(settings, question_model=self._encoder, passage_model=None)
        method = self.path / "dense/method"
        encoder = Encoder(settings, device=self._device, method=method if method.is_dir() else None)
        found, expected = fingerprint(encoder.question_folder), built["weights"]["question"]
        if found != expected:
            raise ArtifactMismatch(
                f"{self.path}: built with {built['settings']['question_model']} of weights {expected[:8]}, but"
                f" {settings.question_model} has weights {found[:8]}. Use that encoder or build the index again."
            )
        if "tokenizer" in built and tokenizer_fingerprint(encoder.question_folder) != built["tokenizer"]:
            raise ArtifactMismatch(
                f"{self.path}: built with another tokenizer than that of {settings.question_model}, though the weights"
                " are the same. Use the tokenizer files of that time or build the index again."
            )
        vectors = load_vectors(
            self.path / "dense/search",
            self.path / "dense/vectors",
            search=self._search,
            passages=self.artifact.manifest["counts"]["passages"],
            device="cpu" if self._device == "auto" else self._device,
        )
        return DenseSearcher(encoder, vectors)


@dataclass(frozen=True, slots=True)
class DenseSearcher:
    """Encodes texts as questions and searches with their vectors."""

    encoder: Encoder
    vectors: VectorSearcher

    def search(self, texts: Sequence[str], k: int) -> Rankings:
        """At most k rows a text. Raises ValueError for k < 1."""
        check_depth(k)
        return self.vectors.search(self.encoder.encode_questions(texts), k)


class _SearchRetriever:
    """A Retriever over one searcher of an index."""

    def __init__(self, index: Index, searcher: Searcher) -> None:
        self.index = index
        self._searcher = searcher

    def rank(self, texts: Sequence[str], k: int) -> Rankings:
        """The ranking as arrays, for evaluation and fusion at scale."""
        check_depth(k)
        return self._searcher.search(texts, k)

    def retrieve(self, queries: Sequence[Query], k: int) -> list[list[Hit]]:
        """At most k hits a query, best first; see `odqa.stages.Retriever`."""
        check_depth(k)
        return self.rank([query.text for query in queries], k).hits(self.index.store) if queries else []


class Bm25Retriever(_SearchRetriever):
    """Passages that share terms with the question."""

    def __init__(self, index: Index) -> None:
        super().__init__(index, index.bm25)


class DenseRetriever(_SearchRetriever):
    """Passages whose vectors lie in the direction of the question's. An encoder that does not fit is refused here."""

    def __init__(self, index: Index) -> None:
        super().__init__(index, index.dense)


class HybridRetriever(_SearchRetriever):
    """Both, fused. `depth` is what each gives to the fusion, at least k.

    `fusion` "weighted" sums scores, normalised per question, with `weights` (BM25, dense); "rrf" sums 1 / (c + rank)
    and ignores weights and normalisation. The defaults were chosen on nq-mini's tune questions by
    scripts/tune_fusion.py. They weigh raw scores: a BM25 score of 10 counts as a cosine of 0.34. BM25 scores grow with
    the logarithm of the collection, so for a much larger one choose anew, or take "z-score" with (0.45, 0.55).
    """

    def __init__(
        self,
        index: Index,
        *,
        depth: int = 100,
        fusion: Literal["weighted", "rrf"] = "weighted",
        weights: tuple[float, float] = (0.0325, 0.9675),
        normalise: Normalise = "none",
        c: float = 60.0,
    ) -> None:
        fuse = partial(weighted_fusion, weights=weights, normalise=normalise)
        if fusion == "rrf":
            fuse = partial(reciprocal_rank_fusion, c=c)
        super().__init__(index, _HybridSearcher(index.bm25, index.dense, depth, fuse))


class AlphaHybridRetriever(_SearchRetriever):
    """Dense + alpha * BM25 as published; see `odqa.retrieve.fuse.alpha_fusion`. `depth` of each list, at least k.

    The papers take 1,000 of each. Alpha depends on the encoder's scale, so it has no default: choose it on tune
    questions (scripts/tune_fusion.py).
    """

    def __init__(self, index: Index, *, alpha: float, depth: int = 1000, normalise: bool = False) -> None:
        def fuse(runs: Sequence[Rankings], *, k: int) -> Rankings:
            sparse, dense = runs
            return alpha_fusion(sparse, dense, k, alpha=alpha, normalise=normalise)

        super().__init__(index, _HybridSearcher(index.bm25, index.dense, depth, fuse))


@dataclass(frozen=True, slots=True)
class _HybridSearcher:
    bm25: Searcher
    dense: Searcher
    depth: int
    fuse: Callable[..., Rankings]  # of the two runs, and k by its name

    def search(self, texts: Sequence[str], k: int) -> Rankings:
        runs = [searcher.search(texts, max(k, self.depth)) for searcher in (self.bm25, self.dense)]
        return self.fuse(runs, k=k)


def encoder_weights(encoder: Encoder) -> dict[str, str]:
    """Fingerprints of an encoder's two models, as the manifest of an index has them."""
    question = fingerprint(encoder.question_folder)
    same = encoder.passage_folder == encoder.question_folder
    return {"question": question, "passage": question if same else fingerprint(encoder.passage_folder)}


if TYPE_CHECKING:
    from odqa.stages import Retriever

    def _is_retriever(
        bm25: Bm25Retriever, dense: DenseRetriever, hybrid: HybridRetriever, alpha: AlphaHybridRetriever
    ) -> tuple[Retriever, ...]:
        return bm25, dense, hybrid, alpha
