"""Measures milliseconds a question with 100 candidates, on the same weights, cores and pairs: the re-ranking stage
against `sentence_transformers.CrossEncoder.predict` with its defaults, question by question in turn. On more
questions it compares the ranking in the fast number format with that in float32: the top 20, and recall.
"""

import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.common import RESULTS, dtype_name, interleaved, save_result, sha256

if TYPE_CHECKING:
    from odqa.rerank.cross import CrossEncoderReranker
    from odqa.types import Hit, Query

_RERANKER = "embedded:reranker-2"
_PEER = "sentence-transformers"
_FLAGS = {"avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8"}  # those that decide the speed


@dataclass(frozen=True, slots=True)
class Candidates:
    """Questions of one file with the passages to re-rank, and the answers."""

    name: str
    queries: list["Query"]
    answers: list[tuple[str, ...]]
    hits: list[list["Hit"]]


def rerank(
    data: Annotated[Path | None, typer.Option(help="The data folder, with nq-mini in it (or ODQA_DATA).")] = None,
    reranker: Annotated[str, typer.Option(help="A trained re-ranker: embedded:NAME or its folder.")] = _RERANKER,
    index: Annotated[Path, typer.Option(help="The built index of nq-mini.")] = Path("artifacts/nq-mini"),
    timed: Annotated[int, typer.Option(min=1, help="Questions of each set that are timed.")] = 10,
    compared: Annotated[int, typer.Option(min=1, help="Questions of each set whose rankings are compared.")] = 400,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; in each every system does every timed question.")] = 5,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "bench-rerank.json",
) -> None:
    """Re-ranking 100 candidates a question: odqa against sentence-transformers, and its fast format against float32."""
    import torch
    from sentence_transformers import CrossEncoder

    from odqa.recipes import Places
    from odqa.rerank.cross import CrossEncoderReranker
    from odqa.rerank.models import export_classifier
    from odqa.runtime import processor_flags

    places = Places.from_environment(data)
    artifact = places.file(reranker)
    sets = [_candidates(places.file(f"data:nq-mini/{name}.jsonl"), index, compared) for name in ("nq_dev", "squad_dev")]
    asked = [one for each in sets for one in list(zip(each.queries, each.hits, strict=True))[:timed]]
    with tempfile.TemporaryDirectory() as folder:
        export_classifier(artifact, Path(folder))
        peer = CrossEncoder(folder, device="cpu")
        stages = {
            "odqa": CrossEncoderReranker(str(artifact), device="cpu"),
            "odqa, folder of the peer": _same_rows(folder, "auto"),
            "odqa, folder of the peer, float32": _same_rows(folder, "float32"),
        }
    pairs = [[(query.text, f"{hit.passage.title} [SEP] {hit.passage.text}") for hit in hits] for query, hits in asked]

    # 1. Speed: every system does every question, in turn.
    systems: dict[str, Callable[[int], object]] = {_PEER: lambda number: peer.predict(pairs[number])}
    for name, stage in stages.items():
        systems[name] = lambda number, stage=stage: stage.rerank([asked[number][0]], [asked[number][1]])  # type: ignore[misc]
    seconds = interleaved(systems, len(asked), repeats)
    lengths = [_lengths(stages["odqa"], query, hits) for query, hits in asked]
    tokens = [length for each in lengths for length in each]
    speeds = []
    for name, rounds in seconds.items():
        dtype = stages[name].model.dtype if name in stages else peer.dtype
        speeds.append({"system": name, "dtype": dtype_name(dtype), **_speed(rounds, seconds[_PEER], tokens)})
        typer.echo(json.dumps(speeds[-1]))

    # 2. The peer computes the same scores: in float32, before its activation.
    theirs = peer.predict(pairs[0], activation_fn=torch.nn.Identity()).tolist()
    ours = {hit.passage.id: hit.score for hit in stages["odqa, folder of the peer, float32"].rerank(*_one(asked[0]))[0]}
    difference = max(abs(ours[hit.passage.id] - score) for hit, score in zip(asked[0][1], theirs, strict=True))

    # 3. The fast number format ranks as float32 does.
    exact = CrossEncoderReranker(str(artifact), device="cpu", dtype="float32")
    agreements = [_agreement(each, exact, stages["odqa"]) for each in sets]
    for agreement in agreements:
        typer.echo(json.dumps(agreement))

    save_result(
        out,
        {
            "what": "re-ranking the hybrid top 100, wall seconds, one question after the other, systems in turn",
            "reranker": {"name": reranker, "method_sha256": sha256(artifact / "method.safetensors")},
            "versions": {name: version(name) for name in ("sentence-transformers", "transformers", "torch")},
            "threads": torch.get_num_threads(),
            "flags": sorted(processor_flags() & _FLAGS),
            "timed": {
                "questions": len(asked),
                "pairs": len(tokens),
                "tokens_a_pair": round(statistics.mean(tokens), 1),
            },
            "repeats": repeats,
            "systems": speeds,
            "largest_difference_to_the_peer": difference,
            "fast_format_against_float32": agreements,
        },
    )


def _candidates(path: Path, index: Path, limit: int) -> Candidates:
    """The first `limit` questions of a file with their hybrid top 100."""
    from odqa.corpus.io import read_gold, read_questions
    from odqa.retrieve.index import HybridRetriever, load_index

    queries = read_questions(path)[:limit]
    answers = [gold.answers for gold in read_gold(path)[:limit]]
    return Candidates(path.stem, queries, answers, HybridRetriever(load_index(index)).retrieve(queries, 100))


def _same_rows(folder: str, dtype: str) -> "CrossEncoderReranker":
    """The stage on the folder that the peer reads, with the peer's rows."""
    from odqa.rerank.cross import CrossEncoderReranker

    return CrossEncoderReranker(folder, title_separator=" [SEP] ", device="cpu", dtype=dtype)


def _one(asked: "tuple[Query, list[Hit]]") -> "tuple[list[Query], list[list[Hit]]]":
    """One question as a batch."""
    return [asked[0]], [asked[1]]


def _lengths(stage: "CrossEncoderReranker", query: "Query", hits: "list[Hit]") -> list[int]:
    """Tokens of each pair."""
    rows, _ = stage.model.encode([(query, hit.passage) for hit in hits])
    return [len(row["input_ids"]) for row in rows]


def _speed(rounds: list[list[float]], of_peer: list[list[float]], tokens: list[int]) -> dict[str, object]:
    """Rates and the ratio to the peer, from wall seconds by round and question; the ratio is taken round by round."""
    totals = [sum(each) for each in rounds]
    ratios = [sum(theirs) / ours for theirs, ours in zip(of_peer, totals, strict=True)]
    return {
        "pairs_per_second": round(len(tokens) / statistics.median(totals), 1),
        "tokens_per_second": round(sum(tokens) / statistics.median(totals)),
        "milliseconds_a_question": round(1000 * statistics.median([second for each in rounds for second in each])),
        "speed_ratio": {
            "median": round(statistics.median(ratios), 2),
            "min": round(min(ratios), 2),
            "max": round(max(ratios), 2),
        },
    }


def _agreement(
    candidates: Candidates, exact: "CrossEncoderReranker", fast: "CrossEncoderReranker"
) -> dict[str, object]:
    """Mean overlap of the top 20 of two number formats, and recall (0 to 100) with each."""
    rankings = {
        name: stage.rerank(candidates.queries, candidates.hits) for name, stage in (("float32", exact), ("fast", fast))
    }
    tops = [[{hit.passage.id for hit in hits[:20]} for hits in found] for found in rankings.values()]
    overlaps = [len(one & other) / len(one) for one, other in zip(*tops, strict=True)]
    return {
        "questions": candidates.name,
        "n": len(candidates.queries),
        "dtype": dtype_name(fast.model.dtype),
        "top_20_overlap": round(statistics.mean(overlaps), 4),
        **{name: _recall(found, candidates.answers) for name, found in rankings.items()},
    }


def _recall(rankings: "list[list[Hit]]", answers: list[tuple[str, ...]]) -> dict[str, float]:
    """Share (0 to 100) of questions with an answer in the first k passages."""
    from odqa.text import has_answer

    found = {1: 0, 3: 0, 10: 0}
    for hits, right in zip(rankings, answers, strict=True):
        holds = [has_answer(hit.passage.text, right) for hit in hits[:10]]
        for k in found:
            found[k] += any(holds[:k])
    return {f"recall@{k}": round(100 * count / len(rankings), 2) for k, count in found.items()}
