"""Table A: one frozen odqa-mini and every way to specialise it, through the whole pipeline. --shift makes table D.

    python scripts/table_a.py --data DIR --sweep
    python scripts/table_a.py --data DIR --rows prompt-50 fine-tuning --limit 100
    python scripts/table_a.py --data DIR --shift

A row is trained by the base recipe with another method, learning rate and seed, into artifacts/table-a/ROW. Table D's
are swept, trained and tuned on SQuAD's questions alone, into artifacts/table-d/ROW. With --sweep five learning rates of
each kind of method are compared first (`odqa train --sweep`); the best one is taken, now and in later calls, and
without a sweep the one in ROWS. What is swept, trained or answered is not done again: a killed lab goes on. Rows of
several seeds are means over them; intervals are over questions.

What is forgotten: the mean loss of the language model on items of its pre-training tasks that it was not trained on
(its passages, drawn by another seed), as it is and with each method attached. Written are OUT.json and OUT.md.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import odqa
from odqa import config, jobs, training
from odqa.artifacts import Artifact, building, load_artifact, sha256_file, sha256_json
from odqa.corpus.examples import read_examples
from odqa.corpus.io import read_passages, read_questions
from odqa.errors import ArtifactError
from odqa.evaluate import RESAMPLES, Evaluation, Interval, bootstrap_interval, paired_difference
from odqa.frozen.backbone import Backbone, Tokens
from odqa.frozen.fit import rates_around
from odqa.frozen.method import load_method
from odqa.lm.pretrain import IGNORED, Mix, MixSettings, TokenBatch
from odqa.lm.tasks import Corpus
from odqa.models import MINILM, embedded_folder
from odqa.read.lm import LmReader
from odqa.recipes import Places, Recipe, build_reader, load_recipe
from odqa.report import Table
from odqa.sentences import sentence_spans
from odqa.text import has_answer

SETS = {"nq_dev": "nq-mini/nq_dev.jsonl", "squad_dev": "nq-mini/squad_dev.jsonl"}
TASKS = ("cloze", "denoise", "complete", "title")
SEED = 20_000_003  # of the held-out items; pre-training has 0
BATCHES = 16  # our choice: of 16 items each, a task
LONGEST = 30  # our choice: words of the sentence that a demonstration shows
DEMONSTRATION = 80  # our choice: tokens that a prompt may be longer for each, so that passages keep their room
SQUAD = {"squad11-train": 1.0, "squad11-dev": 0.0, "qed-nq": 0.0, "nq-mini-train": 0.0}  # the questions of table D


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: the method (None: nothing is trained), and the learning rate that a sweep has in its middle.

    `demonstrations` are shown in the prompt; with `is_random` the backbone has random weights.
    """

    name: str
    method: Mapping[str, Any] | None = None
    rate: float = 0.0
    seeds: tuple[int, ...] = (0,)
    demonstrations: int = 0
    is_random: bool = False

    @property
    def kind(self) -> str:
        return "" if self.method is None else str(self.method["kind"])


def prompt(length: int) -> dict[str, Any]:
    return {"kind": "prompt-tuning", "length": length}


THREE = (0, 1, 2)
# Rates: our choice, near the presets; a prompt's is a hundredth of Lester's, because MiniLM's word vectors are small
# (0.05) and pass a layer norm, which turns a large step into another word (docs/LOG.md).
ROWS = (
    Row("none"),
    Row("in-context", seeds=THREE, demonstrations=1),
    Row("prompt-10", prompt(10), 0.003, THREE),
    Row("prompt-50", prompt(50), 0.003, THREE),
    Row("prompt-100", prompt(100), 0.003, THREE),
    Row("deep-prompt", {"kind": "deep-prompt", "length": 50}, 7e-3),
    Row("prefix-tuning", {"kind": "prefix-tuning", "length": 50}, 3e-4),
    Row("lora", {"kind": "lora", "rank": 16, "alpha": 32}, 1e-3),
    Row("adapter", {"kind": "adapter", "rank": 16}, 1e-3),
    Row("id-pt", {"kind": "id-pt", "length": 50, "encoder": MINILM}, 3e-3),
    Row("fine-tuning", {"kind": "fine-tuning"}, 1e-4),
    Row("random-prompt-50", prompt(50), 0.003, is_random=True),
)
SWEPT = ("prompt-50", "deep-prompt", "prefix-tuning", "lora", "adapter", "id-pt", "fine-tuning")  # one row of each kind
TABLES = {
    "table-a": tuple(row.name for row in ROWS),
    "table-d": ("none", "prompt-50", "deep-prompt", "lora", "fine-tuning"),
}


@dataclass(frozen=True, slots=True)
class Run:
    """A row with one of its seeds."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        return self.row.name if len(self.row.seeds) == 1 else f"{self.row.name}-seed{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the data folder [env: ODQA_DATA]")
    parser.add_argument("--artifacts", type=Path, help="[env: ODQA_ARTIFACTS; ./artifacts]")
    parser.add_argument("--runs", type=Path, default=jobs.RUNS)
    parser.add_argument("--base", default="pipelines/mini-prompt-50.yaml", help="the training recipe of all rows")
    parser.add_argument(
        "--rows", nargs="+", choices=[row.name for row in ROWS], help="some rows only; none is always in"
    )
    parser.add_argument("--limit", type=int, help="the first questions of each set only")
    parser.add_argument("--sweep", action="store_true", help="compare learning rates first")
    parser.add_argument("--shift", action="store_true", help="table D: trained on SQuAD's questions only")
    parser.add_argument("--out", type=Path, help="OUT.json and OUT.md [eval/results/table-a, or table-d]")
    arguments = parser.parse_args()
    table = "table-d" if arguments.shift else "table-a"
    wanted = {"none", *(arguments.rows or TABLES[table])}
    if strangers := wanted.difference(TABLES[table]):
        parser.error(f"{table} has no row {', '.join(sorted(strangers))}; it has {', '.join(TABLES[table])}")
    lab = Lab(Places.from_environment(arguments.data, arguments.artifacts), arguments.base, table)
    runs = [Run(row, seed) for row in ROWS if row.name in wanted for seed in row.seeds]
    swept = [row for row in ROWS if row.name in SWEPT and row.kind in {run.row.kind for run in runs}]
    if arguments.sweep:
        for row in swept:
            lab.sweep(row)
    trained = {run.name: lab.train(run) for run in runs if run.row.method is not None}
    sets = {name: first(lab.places.file(f"data:{file}"), arguments.limit, lab.folder) for name, file in SETS.items()}
    evaluations = lab.evaluate(runs, sets, arguments.runs)
    record = {
        "table": table,
        "command": command(arguments),
        "odqa": odqa.__version__,
        "base": {"recipe": lab.base.name, "hash": lab.base.hash, "settings": lab.base.resolved},
        "pipeline": {"recipe": lab.pipeline.name, "hash": lab.pipeline.hash, "settings": lab.pipeline.resolved},
        "backbone": {"fingerprint": lab.backbone.fingerprint, "values": lab.backbone.count_parameters()},
        "questions": {
            name: {"n": len(read_questions(path)), "sha256": sha256_file(path)} for name, path in sets.items()
        },
        "interval": {"kind": "percentile bootstrap over questions, 95%", "seed": 0, "resamples": RESAMPLES},
        "held_out": {"tasks": TASKS, "items": 16 * BATCHES, "seed": SEED, "unit": "nats a token"},
        "sweeps": {row.kind: found for row in swept if (found := lab.swept(row))},
        "rows": [row_record(row, runs, trained, evaluations, lab) for row in ROWS if row.name in wanted],
    }
    save(record, arguments.out or Path("eval/results") / table)


def command(arguments: argparse.Namespace) -> str:
    """What was typed, without the places of this machine."""
    parts = ["python scripts/table_a.py --data DIR", *(f"--{n}" for n in ("sweep", "shift") if getattr(arguments, n))]
    parts += ["--rows", *arguments.rows] if arguments.rows else []
    parts += [f"--limit {arguments.limit}"] if arguments.limit else []
    return " ".join(parts)


def first(path: Path, limit: int | None, folder: Path) -> Path:
    """A question file, or one with its first questions."""
    if limit is None:
        return path
    few = folder / f"{path.stem}-first-{limit}.jsonl"
    few.parent.mkdir(parents=True, exist_ok=True)
    few.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:limit]), encoding="utf-8")
    return few


def log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# --- making the rows --------------------------------------------------------------------------------------------------


class Lab:
    """What all rows share: the base recipe, its pipeline, the frozen model, and the folder of what is made."""

    def __init__(self, places: Places, base: str, table: str) -> None:
        self.places, self.is_shift = places, table == "table-d"
        self.base = load_recipe(base, "train-lm-reader")
        settings = self.base.settings
        assert isinstance(settings, config.LmReaderTraining)
        self.settings = settings
        self.pipeline = load_recipe(settings.pipeline, "pipeline")
        self.folder = places.artifacts / table
        pipeline = self.pipeline.settings
        assert isinstance(pipeline, config.PipelineRecipe) and isinstance(pipeline.reader, config.LmReaderSettings)
        self.model, self.budget = pipeline.reader.model, pipeline.packer.budget
        reader = build_reader(pipeline.reader.model_copy(update={"dtype": "float32"}), places)
        assert isinstance(reader, LmReader)
        self.backbone: Backbone = reader.backbone
        self.passages = {p.id: p for name in settings.passages for p in read_passages(places.file(name))}
        self._items: dict[str, list[tuple[Tokens, Tokens]]] = {}

    def recipe(self, run: Run, rate: float) -> Recipe:
        """The base recipe with the row's method, learning rate and seed."""
        method = dict(run.row.method or {})
        if run.row.kind != "fine-tuning":
            method["seed"] = run.seed
        changes: dict[str, Any] = {
            "pipeline": str(self.pipeline_of(run.row)),
            "method": method,
            "fit.learning_rates": {"method": rate},
            "fit.seed": run.seed,
            "contexts.seed": run.seed,
        }
        if self.is_shift:
            changes["contexts.source_weights"] = SQUAD
            changes["tune"] = [t.model_dump() for t in self.settings.tune if t.name.startswith("squad")]
        return load_recipe(self.base.path, settings=changes)

    def pipeline_of(self, row: Row) -> str | Path:
        """The pipeline that a row reads with: that of the base recipe, of a control one with random weights."""
        if not row.is_random:
            return self.settings.pipeline
        model = random_backbone(self.model, self.backbone.architecture, self.folder / "random-backbone")
        resolved = load_recipe(self.settings.pipeline, settings={"reader.model": str(model)}).resolved
        file = self.folder / "random-pipeline.yaml"
        file.write_text(yaml.safe_dump(resolved, sort_keys=False), encoding="utf-8")
        return file

    def sweep(self, row: Row) -> None:
        """Compare learning rates for the row's kind of method, on the table's own tune questions."""
        recipe, out = self.recipe(Run(row, 0), row.rate), self.folder / f"{row.kind}-sweep"
        training.sweep(recipe, rates_around(row.rate), places=self.places, out=out, log=log)

    def swept(self, row: Row) -> dict[str, Any] | None:
        """What a sweep found for the row's kind of method; None without one."""
        file = self.folder / f"{row.kind}-sweep" / "sweep.json"
        found: dict[str, Any] | None = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        return found

    def train(self, run: Run) -> Artifact:
        found = self.swept(run.row)
        rate = run.row.rate if found is None else found["best"]
        log(f"{run.name}: learning rate {rate:g}{'' if found else ', not swept'}")
        return training.train(self.recipe(run, rate), places=self.places, out=self.folder / run.name, log=log)

    def evaluate(self, runs: Sequence[Run], sets: Mapping[str, Path], out: Path) -> dict[tuple[str, str], Evaluation]:
        """By run and question set; the ranking is made once and replayed."""
        variants: list[dict[str, Any]] = []
        for run in runs:
            changes: dict[str, Any] = {}
            if run.row.method is not None:
                changes["reader.method"] = str(self.folder / run.name)
            if run.row.demonstrations:
                changes["reader.demonstrations"] = self.demonstrations(run.row.demonstrations, run.seed)
                changes["packer.budget"] = self.budget + DEMONSTRATION * run.row.demonstrations
            name = f"squad-{run.name}" if self.is_shift and run.row.method is not None else run.name
            variants.append({"recipe": str(self.pipeline_of(run.row)), "name": name, "set": changes})
        questions = [{"name": path.stem, "file": str(path), "split": "dev"} for path in sets.values()]
        settings = {"kind": "eval", "pipelines": variants, "questions": questions, "recall_at": [1, 20]}
        recipe = Recipe(Path("table-a"), config.EvalRecipe.model_validate(settings))
        result = jobs.run_evaluation(recipe, places=self.places, out=out, log=log)
        found = {(s.pipeline.name, s.evaluation.question_set): s.evaluation for s in result.systems}
        return {
            (run.name, name): found[variant["name"], path.stem]
            for run, variant in zip(runs, variants, strict=True)
            for name, path in sets.items()
        }

    def demonstrations(self, number: int, seed: int) -> list[dict[str, str]]:
        """Training questions at random, each with the sentence of its passage that has the answer, if that is short."""
        examples = list(read_examples(self.places.file(self.settings.train), self.passages))
        shown: list[dict[str, str]] = []
        for place in np.random.default_rng([SEED, seed]).permutation(len(examples)).tolist():
            example = examples[place]
            text, answer = example.passage.text, example.answers[0]
            for start, end in sentence_spans(text):
                sentence = text[start:end].strip()
                if has_answer(sentence, (answer,)) and len(sentence.split()) <= LONGEST:
                    title = example.passage.title
                    shown.append({"question": example.question, "answer": answer, "title": title, "text": sentence})
                    break
            if len(shown) == number:
                break
        return shown

    def losses(self, artifact: Artifact | None) -> dict[str, float]:
        """Mean loss in nats a token on the held-out items of each task, with a method or (None) as the model is."""
        file = self.folder / "losses.json"
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        items = self.items()
        key = sha256_json([self.backbone.fingerprint, None if artifact is None else artifact.hash, items])
        if key not in known:
            method = None if artifact is None else load_method(artifact.path, self.backbone)
            if method is not None:
                method.attach(self.backbone)
            known[key] = {task: round(mean_loss(self.backbone, batches), 4) for task, batches in items.items()}
            if method is not None:
                method.detach()
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        found: dict[str, float] = known[key]
        return found

    def items(self) -> dict[str, list[tuple[Tokens, Tokens]]]:
        """Batches of sources and targets of each task, made as those of pre-training are."""
        if not self._items:
            is_causal = self.backbone.architecture == "causal"
            corpus = Corpus(list(self.passages.values()), ())
            for task in TASKS:
                settings = MixSettings({task: 1.0}, items=16, seed=SEED)
                mix = Mix(corpus, self.backbone.tokenizer, settings, decoder_only=is_causal)
                self._items[task] = [rows_of_batch(mix(n), is_causal=is_causal) for n in range(BATCHES)]
        return self._items


def random_backbone(model: str, architecture: str, folder: Path) -> Path:
    """The same model with weights drawn at random (seed 0), made once."""
    import transformers

    try:
        return load_artifact(folder, training.LANGUAGE_MODEL).path
    except ArtifactError:
        pass
    path = embedded_folder(model) or model
    auto = transformers.AutoModelForSeq2SeqLM if architecture == "seq2seq" else transformers.AutoModelForCausalLM
    with building(folder, training.LANGUAGE_MODEL, recipe={"random weights of": model, "seed": 0}, inputs={}) as draft:
        torch.manual_seed(0)
        auto.from_config(transformers.AutoConfig.from_pretrained(path)).save_pretrained(draft.path)
        transformers.AutoTokenizer.from_pretrained(path).save_pretrained(draft.path)
    return folder


def rows_of_batch(batch: TokenBatch, *, is_causal: bool) -> tuple[Tokens, Tokens]:
    """Sources and targets of a pre-training batch without their padding."""
    sources, targets = [], []
    for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
        is_source = mask.bool() & (labels == IGNORED) if is_causal else mask.bool()
        sources.append(ids[is_source].tolist())
        targets.append(labels[labels != IGNORED].tolist())
    return sources, targets


@torch.inference_mode()
def mean_loss(backbone: Backbone, batches: Sequence[tuple[Tokens, Tokens]]) -> float:
    """Nats a target token."""
    total = sum(float(backbone.token_losses(sources, targets).sum()) for sources, targets in batches)
    return total / sum(len(target) for _, targets in batches for target in targets)


# --- what the table says ----------------------------------------------------------------------------------------------


def row_record(
    row: Row,
    runs: Sequence[Run],
    trained: Mapping[str, Artifact],
    evaluations: Mapping[tuple[str, str], Evaluation],
    lab: Lab,
) -> dict[str, Any]:
    """A row as the result file has it."""
    own = [run for run in runs if run.row is row]
    artifacts = [trained[run.name] for run in own if run.name in trained]
    record: dict[str, Any] = {"row": row.name, "seeds": [run.seed for run in own], "method": row.method}
    record |= {"demonstrations": row.demonstrations, "trained": 0, "share": 0.0, "bytes": 0, "minutes": 0.0}
    if artifacts:
        manifests = [artifact.manifest for artifact in artifacts]
        record["trained"] = manifests[0]["counts"]["trainable"]
        record["share"] = round(record["trained"] / lab.backbone.count_parameters(), 5)
        record["bytes"] = manifests[0]["files"]["method.safetensors"]["bytes"]
        record["minutes"] = round(mean([m["measured"]["training_seconds"] / 60 for m in manifests]), 1)
        record["trainings"] = [
            {
                "seed": run.seed,
                "recipe_hash": m["recipe_hash"],
                "learning_rate": m["recipe"]["fit"]["learning_rates"]["method"],
                "warnings": m["warnings"],
            }
            for run, m in zip(own, manifests, strict=True)
        ]
    for name in SETS:
        record[name] = scores(own, runs, evaluations, name)
    if not row.is_random:
        losses = [lab.losses(artifact) for artifact in artifacts] or [lab.losses(None)]
        record["loss"] = {task: round(mean([found[task] for found in losses]), 4) for task in TASKS}
        record["loss"]["mean"] = round(mean([record["loss"][task] for task in TASKS]), 4)
    return record


def scores(
    own: Sequence[Run], runs: Sequence[Run], evaluations: Mapping[tuple[str, str], Evaluation], name: str
) -> dict[str, Any]:
    """EM and F1 on a question set, what they are above the untuned model and fine-tuning, and the time of reading."""

    def by_question(chosen: Sequence[Run], metric: str) -> list[float]:
        """Means over the seeds, 0 to 100."""
        found = [evaluations[run.name, name].questions for run in chosen]
        values = [[100.0 * float(getattr(question, metric) or 0.0) for question in questions] for questions in found]
        return [mean(column) for column in zip(*values, strict=True)]

    record: dict[str, Any] = {}
    for metric in ("em", "f1"):
        values = by_question(own, metric)
        record[metric] = interval(bootstrap_interval(values))
        for other in ("none", "fine-tuning"):
            others = [run for run in runs if run.row.name == other]
            if others and own[0].row.name != other:
                record[f"{metric}_above_{other}"] = interval(paired_difference(by_question(others, metric), values))
    record["em_by_seed"] = [round(evaluations[run.name, name].score("em").value, 2) for run in own]
    stages = [evaluations[run.name, name].measured["stages"] for run in own]
    seconds = [
        sum(found[stage]["seconds"] / found[stage]["questions"] for stage in ("pack", "read")) for found in stages
    ]
    return record | {"seconds_a_question": round(mean(seconds), 4)}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def interval(value: Interval) -> dict[str, float]:
    return {"value": round(value.value, 2), "low": round(value.low, 2), "high": round(value.high, 2)}


def verdicts(record: Mapping[str, Any]) -> list[str]:
    """What the table was made to decide; empty if rows are missing."""
    rows = {row["row"]: row for row in record["rows"]}
    frozen = [row for row in rows.values() if row["trained"] and row["share"] <= 0.05 and "loss" in row]
    lines = []
    for name in SETS:
        if "fine-tuning" in rows:
            lines.append(f"{name}: fine-tuning is {told(rows['fine-tuning'][name]['em_above_none'])} EM above none.")
        if "fine-tuning" in rows and frozen:
            best = max(frozen, key=lambda row: row[name]["em"]["value"])
            above = told(best[name]["em_above_fine-tuning"])
            lines.append(
                f"{name}: {best['row']}, the best with at most 5 % of the values, is {above} above fine-tuning."
            )
        if "random-prompt-50" in rows:
            lines.append(
                f"{name}: random weights with a prompt have {rows['random-prompt-50'][name]['em']['value']} EM."
            )
    return lines


def told(value: Mapping[str, float], sign: str = "+") -> str:
    return f"{value['value']:{sign}.1f} [{value['low']:{sign}.1f}, {value['high']:{sign}.1f}]"


def save(record: Mapping[str, Any], out: Path) -> None:
    """OUT.json and OUT.md; the latter is printed too."""
    columns = ["row", "seeds", "trained", "%", "bytes", "minutes"]
    columns += [f"{name} {what}" for name in SETS for what in ("EM", "above none", "F1", "s/question")]
    cells = []
    for row in record["rows"]:
        line = [row["row"], str(len(row["seeds"])), f"{row['trained']:,}", f"{100 * row['share']:.2f}"]
        line += [f"{row['bytes']:,}", f"{row['minutes']:.1f}"]
        for name in SETS:
            found = row[name]
            above = found.get("em_above_none")
            line += [told(found["em"], ""), "" if above is None else told(above), f"{found['f1']['value']:.1f}"]
            line.append(f"{found['seconds_a_question']:.3f}")
        cells.append((*line, f"{row['loss']['mean']:.3f}" if "loss" in row else ""))
    notes = [f"{name}: n = {found['n']}." for name, found in record["questions"].items()]
    notes += [
        f"EM and F1 in %, 95% intervals by bootstrap over questions ({RESAMPLES} resamples, seed 0), of rows "
        "with several seeds over their mean; above none: paired.",
        "Seconds are those of packing and reading; the ranking is the same for all rows and made once.",
        f"Loss: nats a token on {record['held_out']['items']} held-out items of each pre-training task "
        f"({', '.join(TASKS)}), mean of the tasks.",
        f"Trained by {record['base']['recipe']} ({record['base']['hash'][:8]}), read by {record['pipeline']['recipe']} "
        f"({record['pipeline']['hash'][:8]}), backbone {record['backbone']['fingerprint'][:8]}.",
        *verdicts(record),
        f"Made by: {record['command']}",
    ]
    title = f"{record['table']}: the frozen language model specialised"
    table = Table(title, (*columns, "loss"), tuple(cells), notes=tuple(notes))
    out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, ensure_ascii=False, indent=1) + "\n"
    out.with_name(f"{out.name}.json").write_text(text, encoding="utf-8")
    out.with_name(f"{out.name}.md").write_text(table.markdown() + "\n", encoding="utf-8")
    print(table.text())


if __name__ == "__main__":
    main()
