"""A small world to go the whole way in: passages about invented towns, questions about them, tiny models, recipes.

Everything is made by rule, so the same arguments give the same bytes. Retrieval works (names are rare words), the
answers of tiny readers are noise.
"""

import csv
import gzip
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from odqa.types import Passage
from tests.tiny_models import tiny_bert, tiny_llama

_SYLLABLES = ("bar", "dol", "fen", "gar", "hul", "kor", "lim", "mor")
TOWNS = ["".join(parts).capitalize() for parts in itertools.product(_SYLLABLES, repeat=2)][:60]
_RIVERS = ("Arn", "Bly", "Cam", "Dee", "Esk", "Fal", "Gyl")


def passages(count: int = 60) -> list[Passage]:
    """One passage a town, ids "1", "2", ... as in DPR's psgs_w100."""
    return [
        Passage(
            str(number),
            f"{town} is a town on the river {_RIVERS[number % 7]}. Its stone bridge was built in {1400 + 7 * number}, "
            f"and the tower beside it is {20 + number} metres high.",
            town,
        )
        for number, town in enumerate(TOWNS[:count], 1)
    ]


def questions(count: int = 12) -> list[dict[str, Any]]:
    """Every fifth town is asked about; the answer stands in its passage."""
    rows = []
    for number in range(count):
        town = 1 + 5 * number % 60
        answer = {0: str(1400 + 7 * town), 1: f"{20 + town} metres"}[number % 2]
        asked = {0: "when was the bridge of {} built", 1: "how high is the tower of {}"}[number % 2]
        rows.append(
            {
                "id": f"q{number}",
                "question": asked.format(TOWNS[town - 1].lower()),
                "answers": [answer],
                "positive_ids": [str(town)],
            }
        )
    return rows


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_yaml(path: Path, recipe: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    return path


def write_psgs(path: Path, count: int = 60) -> Path:
    """DPR's psgs_w100.tsv.gz: header `id text title`, texts quoted as csv."""
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(["id", "text", "title"])
        table.writerows(
            [passage.id, f'{passage.text} It is called "{passage.title}".', passage.title]
            for passage in passages(count)
        )
    return path


def write_qa_csv(path: Path, count: int = 12) -> Path:
    """DPR's nq-test.csv: question, tab, Python list of answers; no header, no ids."""
    lines = [f"{row['question']}\t{row['answers']!r}\n" for row in questions(count)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def tiny_dpr(folder: Path, *, window: int = 256) -> tuple[Path, Path]:
    """DPR's two encoders in the layout of the hub: folders `question` and `context` with random weights."""
    import torch
    from transformers import AutoTokenizer, DPRConfig, DPRContextEncoder, DPRQuestionEncoder

    bert = tiny_bert(folder / "bert", window=window)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    settings = json.loads((bert / "config.json").read_text(encoding="utf-8"))
    sizes = {
        key: settings[key] for key in settings if key.endswith("_size") or key.startswith(("num_", "max_", "init"))
    }
    config = DPRConfig(**sizes, projection_dim=16)
    for number, (name, model) in enumerate({"question": DPRQuestionEncoder, "context": DPRContextEncoder}.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            model(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "question", folder / "context"


def span_reader(folder: Path, backbone: Path) -> Path:
    """A span reader with an untrained LoRA and head on the encoder `backbone`."""
    import torch

    from odqa.frozen.backbone import load_backbone
    from odqa.frozen.method import create_method
    from odqa.frozen.spans import SpanHead
    from odqa.read.span import SpanModel, save_span_reader

    frozen = load_backbone(str(backbone), "encoder", device="cpu", dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = SpanModel(frozen, create_method("lora", frozen, rank=2, alpha=4.0), SpanHead(frozen.width), 8)
        with torch.no_grad():
            for tensor in [*model.method.parameters(), *model.head.parameters()]:
                tensor.add_(torch.randn_like(tensor) * 0.2)
    folder.mkdir(parents=True)
    save_span_reader(folder, model)
    return folder


@dataclass(frozen=True, slots=True)
class World:
    """The files of a small world. Recipes name everything by absolute paths; `artifacts` is where indexes go."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "World":
        """60 passages, 12 questions, an encoder, a span reader, a causal LM, and recipes that use them."""
        world = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        rows = [{"id": p.id, "title": p.title, "text": p.text} for p in passages()]
        write_jsonl(world.passages, rows)
        write_jsonl(world.questions, questions())
        tiny_bert(world.encoder, window=512)
        tiny_llama(world.lm, window=1024, chat=True)
        span_reader(world.reader, world.encoder)
        source = {"kind": "passages", "file": str(world.passages)}
        dense = {"question_model": str(world.encoder), "dtype": "float32", "titles": "pair"}
        index = {"kind": "index", "passages": source, "bm25": {}, "dense": dense}
        write_yaml(world.index, index)
        span = {"kind": "span", "model": str(world.reader), "device": "cpu", "dtype": "float32"}
        # BM25 decides, the vectors of a random encoder break ties.
        hybrid = {"kind": "hybrid", "normalise": "min-max", "weights": [1.0, 0.5]}
        write_yaml(world.pipeline("span"), world.pipeline_recipe(hybrid, span))
        write_yaml(world.pipeline("bm25"), world.pipeline_recipe({"kind": "bm25"}, span))
        write_yaml(world.pipeline("dense"), world.pipeline_recipe({"kind": "dense"}, span))
        lm = {"kind": "lm", "model": str(world.lm), "max_new_tokens": 4, "device": "cpu", "dtype": "float32"}
        write_yaml(world.pipeline("lm"), world.pipeline_recipe({"kind": "bm25"}, lm) | {"packer": {"budget": 1000}})
        closed = {"kind": "pipeline", "packer": {"budget": 200}, "reader": lm | {"prompt": "closed-book"}}
        write_yaml(world.pipeline("closed"), closed)
        asked = {"name": "towns", "file": str(world.questions), "split": "dev"}
        pipelines = [str(world.pipeline("span")), str(world.pipeline("dense"))]
        write_yaml(world.eval, {"kind": "eval", "pipelines": pipelines, "questions": [asked], "recall_at": [1, 5, 20]})
        return world

    def pipeline_recipe(self, retriever: dict[str, Any], reader: dict[str, Any]) -> dict[str, Any]:
        return {
            "kind": "pipeline",
            "index": str(self.index),
            "retriever": retriever,
            "k": 20,
            "packer": {"budget": 400},
            "reader": reader,
        }

    def pipeline(self, name: str) -> Path:
        """span (hybrid), bm25, dense: three retrievers, one reader; lm (BM25, generative), closed (no retrieval)."""
        return self.folder / f"{name}.yaml"

    @property
    def index(self) -> Path:
        return self.folder / "towns.yaml"

    @property
    def eval(self) -> Path:
        return self.folder / "eval-towns.yaml"

    @property
    def passages(self) -> Path:
        return self.folder / "passages.jsonl"

    @property
    def questions(self) -> Path:
        return self.folder / "questions.jsonl"

    @property
    def encoder(self) -> Path:
        return self.folder / "models/encoder"

    @property
    def reader(self) -> Path:
        return self.folder / "models/reader"

    @property
    def lm(self) -> Path:
        return self.folder / "models/lm"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"
