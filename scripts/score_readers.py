"""Score readers on their gold passages: what they can read when retrieval is perfect.

    python scripts/score_readers.py --data DIR --out eval/results/readers-gold-passage NAME=FOLDER ...
    python scripts/score_readers.py --data DIR --out eval/results/lms-gold-passage NAME=MODEL ...

FOLDER is a span reader; MODEL is odqa-mini-1 or a model like it (embedded:NAME or a folder), frozen as it is. Each
reader sees the best gold passage of each question and nothing else (greedy, a span reader may not abstain); EM and F1
with 95% bootstrap intervals on nq_dev and squad_dev, and the paired difference of every reader to the first one. Writes
OUT.json and OUT.md.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from odqa.artifacts import load_artifact, sha256_file
from odqa.corpus.io import read_gold, read_passages, read_questions
from odqa.evaluate import Interval, bootstrap_interval, paired_difference
from odqa.pack import GreedyPacker
from odqa.read.lm import LmReader, load_lm
from odqa.read.span import SpanReader, load_span_reader
from odqa.read.train import read_gold_passages
from odqa.text import exact_match, f1
from odqa.types import Answer, Gold, Hit, Passage, Query

SETS = {"nq_dev": "nq-mini/nq_dev.jsonl", "squad_dev": "nq-mini/squad_dev.jsonl"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="+", metavar="NAME=FOLDER|MODEL")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="files OUT.json and OUT.md")
    parser.add_argument("--dtype", default="auto")
    arguments = parser.parse_args()
    passages = {passage.id: passage for passage in read_passages(arguments.data / "nq-mini/psgs.tsv.gz")}
    sets = {
        name: (list(zip(read_questions(arguments.data / file), read_gold(arguments.data / file), strict=True)), file)
        for name, file in SETS.items()
    }
    records: list[dict[str, Any]] = []
    first: dict[str, list[float]] = {}
    for entry in arguments.readers:
        name, _, folder = entry.partition("=")
        reader = load(folder, arguments.dtype)
        record: dict[str, Any] = {"reader": name, **described(reader, folder)}
        for set_name, (questions, file) in sets.items():
            started = time.perf_counter()
            answers = read(reader, questions, passages)
            seconds = time.perf_counter() - started
            pairs = [(answer.text, gold.answers) for answer, (_, gold) in zip(answers, questions, strict=True)]
            em = [100.0 * exact_match(text, gold) for text, gold in pairs]
            record[set_name] = {
                "n": len(pairs),
                "sha256": sha256_file(arguments.data / file),
                "em": interval(bootstrap_interval(em)),
                "f1": interval(bootstrap_interval([100.0 * f1(text, gold) for text, gold in pairs])),
                "em_against_first": interval(paired_difference(first.setdefault(set_name, em), em)),
                "questions_per_second": round(len(pairs) / seconds, 1),
            }
        records.append(record)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_name(arguments.out.name + ".json").write_text(
        json.dumps(records, indent=1) + "\n", encoding="utf-8"
    )
    arguments.out.with_name(arguments.out.name + ".md").write_text(table(records), encoding="utf-8")
    print(table(records))


def load(name: str, dtype: str) -> SpanReader | LmReader:
    """A span reader from its folder, or else a generative model in the words of its pre-training."""
    if (Path(name) / "reader.json").is_file():
        return SpanReader(load_span_reader(Path(name), dtype=dtype))
    return LmReader(load_lm(name, dtype=dtype), "odqa-mini", max_new_tokens=24, spelling="passage", batch_size=16)


def read(
    reader: SpanReader | LmReader, questions: Sequence[tuple[Query, Gold]], passages: Mapping[str, Passage]
) -> list[Answer]:
    """Answers from the best gold passage alone."""
    if isinstance(reader, SpanReader):
        return read_gold_passages(reader, questions, passages)
    hits = [[Hit(passages[gold.passage_ids[0]], 0.0, "gold")] for _, gold in questions]
    return reader.read(GreedyPacker(reader, reader.limit).pack([query for query, _ in questions], hits))


def described(reader: SpanReader | LmReader, name: str) -> dict[str, Any]:
    """What is known of its making; of a bare folder nothing."""
    if isinstance(reader, LmReader):
        return {"model": name, "fingerprint": reader.backbone.fingerprint}
    folder = Path(name)
    if not (folder / "manifest.json").is_file():
        return {"method_sha256": sha256_file(folder / "method.safetensors")}
    manifest = load_artifact(folder).manifest
    return {
        "method_sha256": manifest["files"]["method.safetensors"]["sha256"],
        "recipe_hash": manifest["recipe_hash"],
        "method": manifest["recipe"]["method"],
        "steps": manifest["recipe"]["fit"]["steps"],
        "seed": manifest["recipe"]["fit"]["seed"],
        "trainable": manifest["counts"]["trainable"],
        "questions_seen": manifest["counts"]["questions_seen"],
        "stored_bytes": manifest["files"]["method.safetensors"]["bytes"]
        + manifest["files"]["head.safetensors"]["bytes"],
        "training_seconds": manifest["measured"].get("training_seconds"),
    }


def interval(value: Interval) -> dict[str, float]:
    return {"value": round(value.value, 2), "low": round(value.low, 2), "high": round(value.high, 2)}


def table(records: list[dict[str, Any]]) -> str:
    """One row a reader, in markdown."""
    lines = [
        "| reader | trained values | questions seen | nq_dev EM [95%] | nq_dev F1 | squad_dev EM [95%] | squad_dev F1 |",  # noqa: E501
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for record in records:
        cells = [record["reader"], f"{record.get('trainable', 0):,}", f"{record.get('questions_seen', 0):,}"]
        for name in SETS:
            em, overlap = record[name]["em"], record[name]["f1"]
            cells += [f"{em['value']:.1f} [{em['low']:.1f}, {em['high']:.1f}]", f"{overlap['value']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    sizes = ", ".join(f"{name} n={records[0][name]['n']}" for name in SETS)
    return (
        "\n".join([*lines, "", f"Gold passage given, greedy, never abstaining; {sizes}; bootstrap, 2000 resamples."])
        + "\n"
    )


if __name__ == "__main__":
    main()
