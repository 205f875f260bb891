"""Calibrate a span reader on the tune questions of nq-mini, and report on dev how well it knows when to be silent.

    python scripts/calibrate_reader.py READER --data DIR [--pipeline pipelines/nq-mini.yaml]
    python scripts/calibrate_reader.py READER --data DIR --report [--out eval/results/abstention]

The first call fits the reader's confidence on squad_tune, nq_tune and as many unanswerable questions as SQuAD 2.0 asked
of the paragraphs of squad_tune, and writes READER/calibration.json; with it the thresholds that keep 90% of the right
answers to squad_tune. The second call changes nothing: it reads the dev questions with that calibration, and writes
OUT.json, OUT.md and OUT.svg (the last needs the extra plots).

Every question is read under two conditions: "given", all passages of its gold paragraph and no other, in their order;
"end to end", what the pipeline retrieves, re-ranks and packs. An unanswerable question was written for its paragraph:
end to end some other passage may well answer it, which counts against the reader.
"""

import argparse
import gzip
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import odqa
from odqa import figures, jobs
from odqa.artifacts import sha256_file
from odqa.corpus.io import read_gold, read_questions
from odqa.evaluate import (
    Decision,
    Interval,
    bootstrap_interval,
    refused,
    risk_coverage,
    selective,
    threshold_keeping,
)
from odqa.read.calibration import CALIBRATION, Calibration, fit_calibration
from odqa.read.span import FEATURES, Reading, SpanReader, trained_part
from odqa.recipes import Places
from odqa.runtime import progress
from odqa.text import exact_match
from odqa.types import Gold, Hit, PackedContext, Passage, Query

UNANSWERABLE = "nq-mini/squad2_unanswerable.jsonl.gz"
TUNE = {"squad": "nq-mini/squad_tune.jsonl", "nq": "nq-mini/nq_tune.jsonl"}
DEV = {"squad": "nq-mini/squad_dev.jsonl", "nq": "nq-mini/nq_dev.jsonl"}
CONDITIONS = ("given", "end to end")
KEEP = 0.9  # of the right answers, as issue 3 of this project asks
Question = tuple[Query, Gold]


Readings = dict[str, dict[str, list[Reading]]]  # by condition, then by set, in the order of its questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reader", type=Path, help="the folder of a trained span reader")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--pipeline", default="pipelines/nq-mini.yaml", help="finds and packs passages end to end")
    parser.add_argument("--report", action="store_true", help="report on dev with the calibration that is there")
    parser.add_argument("--out", type=Path, default=Path("eval/results/abstention"), help="OUT.json, OUT.md, OUT.svg")
    parser.add_argument("--limit", type=int, help="about so many questions of each set, evenly spread: for a quick try")
    arguments = parser.parse_args()
    loaded = jobs.load_pipeline(
        arguments.pipeline,
        places=Places.from_environment(arguments.data),
        changes=[f"reader.model={arguments.reader}", "reader.abstain_below=0"],
        build=True,
        log=print,
    )
    sets = question_sets(arguments.data, DEV if arguments.report else TUNE, arguments.limit)
    print(", ".join(f"{name}: {len(questions)}" for name, questions in sets.items()), flush=True)
    if arguments.report:
        report(loaded, sets, arguments)
    else:
        calibrate(loaded, sets, arguments)


# --- fitting, on tune -------------------------------------------------------------------------------------------------


def calibrate(loaded: jobs.Loaded, sets: Mapping[str, Sequence[Question]], arguments: argparse.Namespace) -> None:
    """Fit on both conditions together, so that one confidence serves contexts of one passage and of five."""
    reader = span_reader(loaded)
    reader.model.calibration = None
    found = read_all(loaded, sets, arguments.data)
    pairs = [
        (reading.features, is_right(reading, gold))
        for condition in CONDITIONS
        for name, questions in sets.items()
        for reading, (_, gold) in zip(found[condition][name], questions, strict=True)
        if reading.features is not None
    ]
    values, right = [features for features, _ in pairs], [is_right for _, is_right in pairs]
    calibration = fit_calibration(values, right, features=FEATURES, reader=trained_part(arguments.reader))
    thresholds, summary = {}, {}
    for condition in CONDITIONS:
        sure = confident(found[condition], calibration)
        decisions = judge(sure, sets, "squad", "unanswerable")
        thresholds[condition] = round(threshold_keeping(decisions, KEEP), 4)
        summary[condition] = selective(decisions).to_json()
    provenance = {
        "pipeline": {"name": loaded.recipe.name, "hash": loaded.recipe.hash},
        "index": loaded.index.artifact.hash if loaded.index else None,
        "files": hashes(arguments.data, TUNE),
        "questions": {name: len(questions) for name, questions in sets.items()},
        "readings": {"n": len(right), "right": sum(right)},
        "fitted_on": list(CONDITIONS),
        "thresholds": {"keeps": f"{KEEP:.0%} of the right answers to squad_tune", **thresholds},
        "on_tune": summary,
        "limit": arguments.limit,
        "odqa": odqa.__version__,
    }
    fields = (calibration.features, calibration.weights, calibration.bias, calibration.reader)
    written = Calibration(*fields, provenance).save(arguments.reader)
    print(written.read_text(encoding="utf-8"))


def confident(readings: Mapping[str, Sequence[Reading]], calibration: Calibration) -> dict[str, list[Reading]]:
    """The same readings with a confidence: no passage is read again."""

    def confidence(reading: Reading) -> float:
        return 0.0 if reading.features is None else calibration.confidence(reading.features)

    return {
        name: [replace(one, answer=replace(one.answer, confidence=confidence(one))) for one in found]
        for name, found in readings.items()
    }


# --- reporting, on dev ------------------------------------------------------------------------------------------------


def report(loaded: jobs.Loaded, sets: Mapping[str, Sequence[Question]], arguments: argparse.Namespace) -> None:
    """Score both conditions with the thresholds of the calibration; nothing is chosen here."""
    calibration = span_reader(loaded).model.calibration
    if calibration is None:
        raise SystemExit(
            f"{arguments.reader}: uncalibrated ({CALIBRATION} is missing). Run this without --report first."
        )
    thresholds = calibration.provenance["thresholds"]
    found = read_all(loaded, sets, arguments.data)
    curves, points, records = {}, {}, {}
    for condition in CONDITIONS:
        decisions = judge(found[condition], sets, "squad", "unanswerable")
        answerable = judge(found[condition], sets, "squad", "nq")
        curve = risk_coverage(decisions)
        curves[condition] = (curve.coverage, curve.risk)
        answered = [number for number, value in enumerate(curve.thresholds) if value >= thresholds[condition]]
        if answered:
            points[condition] = (curve.coverage[answered[-1]], curve.risk[answered[-1]])
        records[condition] = {
            **selective(decisions).to_json(),
            **at_threshold(decisions, thresholds[condition]),
            "refused_at_kept_on_dev": share(refused(unanswerable(decisions), threshold_keeping(decisions, KEEP))),
            "answerable_only": selective(answerable).to_json(),
        }
    record = {
        "reader": calibration.reader,
        "calibration_sha256": sha256_file(arguments.reader / CALIBRATION),
        "pipeline": {"name": loaded.recipe.name, "hash": loaded.recipe.hash},
        "index": loaded.index.artifact.hash if loaded.index else None,
        "files": hashes(arguments.data, DEV),
        "questions": {name: len(questions) for name, questions in sets.items()},
        "keep": KEEP,
        "limit": arguments.limit,
        "interval": {"kind": "percentile bootstrap, 95%", "seed": 0, "resamples": 2000},
        "odqa": odqa.__version__,
        "conditions": records,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    text = table(records, sets)
    stem = arguments.out.name
    arguments.out.with_name(f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    arguments.out.with_name(f"{stem}.md").write_text(text, encoding="utf-8")
    print(text, flush=True)
    figures.risk_coverage(
        arguments.out.with_name(f"{stem}.svg"), curves, title="squad_dev and unanswerable (dev)", points=points
    )


def at_threshold(decisions: Sequence[Decision], threshold: float) -> dict[str, Any]:
    """What a threshold keeps and refuses, in percent with intervals."""
    right = [decision for decision in decisions if decision.is_right]
    kept = [100.0 - value for value in refused(right, threshold)]
    return {
        "threshold": threshold,
        "right_kept": share(kept),
        "refused": share(refused(unanswerable(decisions), threshold)),
    }


def unanswerable(decisions: Iterable[Decision]) -> list[Decision]:
    return [decision for decision in decisions if not decision.is_answerable]


def share(values: Sequence[float]) -> dict[str, float]:
    found: Interval = bootstrap_interval(values)
    return {"value": round(found.value, 2), "low": round(found.low, 2), "high": round(found.high, 2), "n": len(values)}


def table(records: Mapping[str, Mapping[str, Any]], sets: Mapping[str, Sequence[Question]]) -> str:
    """One row a number, one column a condition, in markdown."""

    def cell(value: Any) -> str:
        if isinstance(value, Mapping):
            return f"{value['value']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    rows = {
        "answerable (squad_dev)": "answerable",
        "right, if all are answered": "right",
        "AUROC, answerable against unanswerable": "auroc_answerable",
        "AUROC, right against wrong answers": "auroc_right",
        "area under the risk-coverage curve": "aurc",
        "expected calibration error": "calibration_error",
        "threshold, chosen on tune": "threshold",
        "right answers kept by it": "right_kept",
        "**unanswerable refused by it**": "refused",
        f"unanswerable refused where {KEEP:.0%} of right dev answers are kept": "refused_at_kept_on_dev",
    }
    lines = [f"| | {' | '.join(CONDITIONS)} |", "| --- | ---: | ---: |"]
    for label, key in rows.items():
        lines.append(f"| {label} | {' | '.join(cell(records[condition][key]) for condition in CONDITIONS)} |")
    answerable = [records[condition]["answerable_only"] for condition in CONDITIONS]
    lines.append(
        "| AUROC, right against wrong, answerable questions only | "
        f"{' | '.join(cell(found['auroc_right']) for found in answerable)} |"
    )
    lines.append(
        "| expected calibration error, answerable questions only | "
        f"{' | '.join(cell(found['calibration_error']) for found in answerable)} |"
    )
    sizes = ", ".join(f"{name} n={len(questions)}" for name, questions in sets.items())
    return (
        "\n".join(
            [
                "**Does the reader know when to be silent?** (dev)",
                "",
                *lines,
                "",
                f"{sizes}. Percent but for counts and thresholds; 95% bootstrap intervals, 2000 resamples, seed 0; "
                "calibration error over ten bins of equal mass. squad and unanswerable together, but for the last two "
                "rows: squad and nq. Given: all passages of the gold paragraph. End to end, other passages may answer "
                "a question that is unanswerable from its own paragraph.",
            ]
        )
        + "\n"
    )


# --- questions and reading --------------------------------------------------------------------------------------------


def question_sets(data: Path, files: Mapping[str, str], limit: int | None) -> dict[str, list[Question]]:
    """The answerable sets, and the unanswerable questions about the same articles as squad's."""
    sets = {name: load_questions(data / file) for name, file in files.items()}
    known = {passage_id for _, gold in sets["squad"] for passage_id in gold.passage_ids}
    splits = squad_splits(data)
    wanted = "dev" if files is DEV else "train"
    sets["unanswerable"] = [
        (query, gold)
        for query, gold in load_questions(data / UNANSWERABLE)
        # Of the train split only what was asked of squad_tune's paragraphs: readers are trained on the others.
        if splits[query.id] == wanted and (wanted == "dev" or known & set(gold.passage_ids))
    ]
    if limit is None:
        return sets
    return {name: questions[:: max(1, len(questions) // limit)][:limit] for name, questions in sets.items()}


def load_questions(path: Path) -> list[Question]:
    return list(zip(read_questions(path), read_gold(path), strict=True))


def squad_splits(data: Path) -> dict[str, str]:
    with gzip.open(data / UNANSWERABLE, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {row["id"]: row["squad_split"] for row in rows}


def paragraphs(data: Path) -> dict[str, tuple[str, ...]]:
    """Passage id -> all passages of its paragraph, in order, where an unanswerable question names them."""
    found: dict[str, tuple[str, ...]] = {}
    for _, gold in load_questions(data / UNANSWERABLE):
        for passage_id in gold.passage_ids:
            found.setdefault(passage_id, gold.passage_ids)
    return found


def read_all(loaded: jobs.Loaded, sets: Mapping[str, Sequence[Question]], data: Path) -> Readings:
    """Read every question under both conditions."""
    known = paragraphs(data)
    found: Readings = {condition: {name: [] for name in sets} for condition in CONDITIONS}
    for name, questions in sets.items():
        with progress(f"read {name}", len(questions), "questions") as bar:
            for start in range(0, len(questions), 64):
                block = questions[start : start + 64]
                found["given"][name] += read_given(loaded, block, known)
                found["end to end"][name] += read_end_to_end(loaded, block)
                bar.advance(len(block))
    return found


def read_given(
    loaded: jobs.Loaded, questions: Sequence[Question], known: Mapping[str, tuple[str, ...]]
) -> list[Reading]:
    """Without the prior of ranks, for nothing ranked these passages."""
    own = span_reader(loaded)
    reader = SpanReader(own.model, candidates=own.candidates, combine=own.combine)
    contexts = []
    for query, gold in questions:
        # Of an answerable question the file names only passages that hold the answer: take their paragraph whole.
        ids = known.get(gold.passage_ids[0], gold.passage_ids)
        hits = tuple(Hit(passage(loaded, passage_id), 0.0, "given") for passage_id in ids)
        contexts.append(PackedContext(query, "", hits, 0, 0))
    return reader.readings(contexts)


def read_end_to_end(loaded: jobs.Loaded, questions: Sequence[Question]) -> list[Reading]:
    pipeline = loaded.pipeline
    if pipeline.retriever is None:
        raise SystemExit(f"{loaded.recipe.path}: has no retriever; end to end needs one.")
    queries = [query for query, _ in questions]
    hits = pipeline.retriever.retrieve(queries, pipeline.k)
    if pipeline.reranker is not None:
        hits = pipeline.reranker.rerank(queries, hits)
    return span_reader(loaded).readings(pipeline.packer.pack(queries, hits))


def span_reader(loaded: jobs.Loaded) -> SpanReader:
    reader = loaded.pipeline.reader
    if not isinstance(reader, SpanReader):
        raise SystemExit(f"{loaded.recipe.path}: the reader is no span reader; only those are calibrated.")
    return reader


def passage(loaded: jobs.Loaded, passage_id: str) -> Passage:
    assert loaded.index is not None
    store = loaded.index.store
    return store[store.row_of(passage_id)]


def judge(
    readings: Mapping[str, Sequence[Reading]], sets: Mapping[str, Sequence[Question]], *names: str
) -> list[Decision]:
    """The confidence of each best answer to the questions of these sets, and whether the answer is right."""
    decisions = []
    for name in names:
        for reading, (_, gold) in zip(readings[name], sets[name], strict=True):
            confidence = reading.answer.confidence
            assert confidence is not None
            decisions.append(Decision(confidence, is_right(reading, gold), is_answerable=bool(gold.answers)))
    return decisions


def is_right(reading: Reading, gold: Gold) -> bool:
    """Nothing was withheld, so the answer is the best candidate; none is right for an unanswerable question."""
    return bool(gold.answers) and exact_match(reading.answer.text, gold.answers)


def hashes(data: Path, files: Mapping[str, str]) -> dict[str, str]:
    return {file: sha256_file(data / file) for file in (*files.values(), UNANSWERABLE)}


if __name__ == "__main__":
    main()
