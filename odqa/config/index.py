"""Recipes of an index: passages in, BM25 and vectors out."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from odqa.config.base import GrownSettings, Settings

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def _bytes(value: Any) -> Any:
    """Bytes of "4 GB", "512 MB" or a whole number."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?B)?\s*", value, re.ASCII | re.IGNORECASE)
    if found is None:
        raise ValueError(f"{value!r} is no size; expected such as 4 GB, 512 MB or a number of bytes.")
    return int(float(found[1]) * _UNITS[(found[2] or "B").upper()])


class SentenceWindow(Settings):
    """Windows of sentences instead of blocks of words: 6 and 3, or 8 and 4, are those of Tamber et al. 2023."""

    sentences: int = Field(6, ge=1, description="sentences a passage")
    stride: int = Field(3, ge=1, description="sentences from the beginning of one passage to that of the next")

    @model_validator(mode="after")
    def _check_stride(self) -> Self:
        if self.stride > self.sentences:
            raise ValueError(f"stride {self.stride} leaves out sentences between windows of {self.sentences}.")
        return self


class DumpPassages(GrownSettings):
    """Passages cut from a MediaWiki dump (.xml or .xml.bz2). `processes` and `index` change the speed only."""

    LATER = frozenset({"window", "headings", "infoboxes"})

    kind: Literal["dump"] = "dump"
    file: str
    words: int = Field(100, ge=1, description="words a passage, as DPR")
    window: SentenceWindow | None = Field(None, description="windows of sentences instead of blocks of words")
    headings: bool = Field(False, description='section titles are text ("Early life."), where text follows them')
    infoboxes: bool = Field(False, description='facts of infoboxes are text, a line each ("Born: 12 March 1950.")')
    skip_disambiguation: bool = True
    strict: bool = Field(False, description="a damaged dump is an error, not a partial collection")
    processes: int | None = Field(
        None, ge=1, exclude=True, description="how many read the dump; null: one a core. No part of the recipe's hash"
    )
    index: str | None = Field(
        None,
        exclude=True,
        description="where the streams of a multistream dump begin (*-multistream-index.txt.bz2); null: the file beside"
        " the dump, if there is one; none: they are looked for. No part of the recipe's hash",
    )

    @model_validator(mode="after")
    def _check_cut(self) -> Self:
        if self.window is not None and self.words != 100:
            raise ValueError("passages are cut by words or by window. Remove one of them.")
        return self


class FilePassages(Settings):
    """Ready passages: DPR tsv (.gz) or jsonl with {id, contents} or {id, title, text}."""

    kind: Literal["passages"] = "passages"
    file: str


class AnalyzerSettings(Settings):
    """How texts become terms. `stop_words` is "english" (Lucene's list of 33), "none", or a list."""

    lowercase: bool = True
    stop_words: Literal["english", "none"] | tuple[str, ...] = "english"
    stemmer: str | None = Field(None, description="a Snowball algorithm such as english (extra: stemmer)")
    token_pattern: str = Field(
        r"(?u)\b\w\w+\b",
        description="a regular expression without groups, or the word characters: words where there are blanks, and"
        " each character of Chinese, Japanese, Thai and other scripts without",
    )


class LuceneAnalyzerSettings(Settings):
    """Lucene's own English analyser in place of `analyzer`, as Anserini sets it up."""

    stemmer: Literal["porter", "krovetz", "none"] = "porter"
    stop_words: bool = Field(True, description="leave out Lucene's list of 33")


class Bm25(GrownSettings):
    """A BM25 index. The defaults of k1 and b are Anserini's for passages."""

    LATER = frozenset({"lucene", "prebuilt"})

    k1: float = Field(0.9, ge=0)
    b: float = Field(0.4, ge=0, le=1)
    titles: bool = Field(True, description="index the title together with the text")
    engine: Literal["bm25s", "rank-bm25", "lucene"] = Field("bm25s", description="extras: reference, lucene")
    analyzer: AnalyzerSettings = AnalyzerSettings()
    lucene: LuceneAnalyzerSettings | None = Field(
        None, description="for engine lucene: its own analyser; null: the terms that the other engines have"
    )
    prebuilt: str | None = Field(
        None, description="for engine lucene: an index of Pyserini's by name, such as wikipedia-dpr-100w"
    )

    @model_validator(mode="after")
    def _check_engine(self) -> Self:
        if self.engine != "lucene" and (self.lucene is not None or self.prebuilt is not None):
            raise ValueError(f"lucene and prebuilt go with engine: lucene, not with {self.engine}.")
        if self.prebuilt is not None and self.lucene is None:
            raise ValueError(
                "a prebuilt index was made with Lucene's analyser. Write lucene: {} for Pyserini's default."
            )
        return self


class Vectors(GrownSettings):
    """How vectors are searched: exactly, or by a FAISS index-factory string with its search-time parameters."""

    LATER = frozenset({"given", "refine", "refine_factor"})

    faiss: str | None = Field(None, description="such as IVF1024,PQ48 or HNSW32,SQ8 (inner product); None: exact")
    search: dict[str, float] = Field({}, description="FAISS search parameters, such as {nprobe: 16}")
    train_rows: int = Field(200_000, ge=1, description="the most vectors that quantisers are trained on")
    keep: bool = Field(False, description="keep the vectors beside a FAISS index")
    given: str | None = Field(
        None,
        description="passage vectors that need not be made: a recipe of kind vectors (made elsewhere), or an index "
        "(recipe or folder) of the same passages and passage encoder",
    )
    refine: Literal["vectors", "int8"] | None = Field(
        None,
        description="score what FAISS finds again, from disk: with the stored vectors, or with a byte a dimension",
    )
    refine_factor: int = Field(4, ge=1, description="candidates that are scored again for each hit")

    @model_validator(mode="after")
    def _check_refine(self) -> Self:
        if self.refine is not None and self.faiss is None:
            raise ValueError("refine is for a FAISS index; the exact search has nothing to refine. Remove it.")
        return self


class Dense(GrownSettings):
    """A bi-encoder and the vectors it makes. `auto` and null take what the model's own files say."""

    LATER = frozenset({"method"})

    question_model: str
    passage_model: str | None = Field(None, description="another model for passages (DPR); null: the same")
    pooling: Literal["auto", "mean", "cls", "pooler"] = "auto"
    normalize: bool | None = None
    query_prefix: str = Field("", description='such as "query: " (E5)')
    passage_prefix: str = Field("", description='such as "passage: " (E5); it stands before the title')
    prompts: bool = Field(True, description="where no prefix is named, those that a sentence-transformers folder names")
    query_max_tokens: int | None = Field(None, ge=4)
    passage_max_tokens: int | None = Field(None, ge=4)
    titles: Literal["space", "newline", "pair", "none"] = "space"
    segments: Literal["tokenizer", "zero"] = Field(
        "tokenizer",
        description="token types of a pair: the tokenizer's (0 and 1), or all 0 as DPR and Spider do",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    store_dtype: Literal["float16", "float32"] = "float16"
    device: str = Field(
        "auto",
        exclude=True,
        description="where to encode: auto, cpu, cuda, cuda:N; one that is named also searches there. Not in the hash",
    )
    method: str | None = Field(
        None, description="what a recipe of kind train-bi-encoder made: it says for which side the method is"
    )
    vectors: Vectors = Vectors()


class IndexRecipe(Settings):
    """Passages in, BM25 and vectors out."""

    kind: Literal["index"]
    passages: Annotated[DumpPassages | FilePassages, Field(discriminator="kind")]
    bm25: Bm25 | None = None
    dense: Dense | None = None
    memory_budget: Annotated[int, BeforeValidator(_bytes)] = Field(
        4_000_000_000,
        ge=10**9,
        exclude=True,
        description="bytes that a build may take, such as 8 GB, however many passages come; not in the hash, as the "
        "index is the same under any",
    )


class GivenVectors(Settings):
    """The sidecar of vectors or of a FAISS index made elsewhere: how they were made. Files lie beside it, or in data:.

    What it says is held against the files and against the encoder of the index recipe that names it.
    """

    kind: Literal["vectors"]
    encoder: str = Field(description="the passage encoder that made them: the recipe's, by hub name or folder name")
    normalized: bool = Field(description="whether the vectors have unit length")
    embeddings: tuple[str, ...] = Field((), description="DPR embedding files (pickles of id, vector); * as in a shell")
    faiss: str | None = Field(None, description="a FAISS index, taken as it is")
    metric: Literal["inner-product", "l2", "dpr-hnsw"] = Field(
        "inner-product", description="of the FAISS index; dpr-hnsw: L2 over one more dimension, as DPR's HNSW has it"
    )
    ids: str = Field(
        "rows",
        description="of the FAISS index: rows (the collection's order), or a file of passage ids in its order: one a "
        "line (Pyserini's docid), or DPR's index_meta.dpr",
    )
    id_prefix: str = Field("", description="what the ids have in front of the collection's, such as wiki:")

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if bool(self.embeddings) == (self.faiss is not None):
            raise ValueError("name either embeddings or faiss.")
        if self.embeddings and (self.metric != "inner-product" or self.ids != "rows"):
            raise ValueError("metric and ids are those of a FAISS index; embeddings bring their ids. Remove both.")
        return self
