"""Composes a general language model with a small one that knows a collection, beside what else one could do.

    python scripts/compose_domain.py --anchor embedded:odqa-mini-d1 --out artifacts/domain [--data DIR]

The collection is the embedded one, which the general model (the anchor) was not trained on. A small causal model m_A,
with the anchor's tokenizer, learns it: its sentences, and the embedded questions with their answers. Links are trained
on a fifth of the articles. Questions about the others are held out from the links and from "LoRA, a fifth", not from
m_A, which is the part that knows, nor from "LoRA, the collection".

| arm | what is learned |
| --- | --- |
| anchor | nothing |
| m_A | the collection; it cannot read, so closed-book only |
| composed | links, from a fifth of the articles and some reading |
| LoRA, a fifth | as many values on the anchor, from the same examples |
| LoRA, the collection | as many values on the anchor, from the whole collection and some reading; twice the steps |

Each answers the held-out questions closed-book and from retrieved passages, and questions of SQuAD's dev part from the
right passage: what it has unlearned. What is trained is kept in --out; a killed run goes on with the next. Writes
eval/results/compose-domain.json and .md.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from odqa.frozen.backbone import Backbone
    from odqa.frozen.method import Method
    from odqa.read.lm import LmReader
    from odqa.types import Answer, Gold, Hit, PackedContext, Passage, Query

ROOT = Path(__file__).resolve().parents[1]
# Our choice, all of them, made before any score was seen; steps by what time there was.
MODEL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
KNOW_STEPS, KNOW_RATE = 900, 2e-3
LINK_STEPS, LORA_STEPS, LINK_RATE, LORA_RATE = 200, 400, 1e-3, 1e-3
BATCH = 12
SHARE = 0.2  # of the articles, for the links
READING = 0.25  # share of reading in what anchors learn
SQUAD = 150  # questions that are read from the right passage
BUDGET = 160  # tokens of a context: the anchors learned to read one passage

Row = tuple[list[int], list[int]]  # token ids of a prompt, and of what is written behind it
Scored = dict[str, float]


def main(
    anchor: Annotated[str, typer.Option(help="The general model: a folder or an embedded name.")],
    out: Annotated[Path, typer.Option(help="Where trained models go.")],
    data: Annotated[Path | None, typer.Option(help="The data folder (or ODQA_DATA).")] = None,
    save: Annotated[Path, typer.Option(help="The result, without its ending.")] = ROOT / "eval/results/compose-domain",
    seed: Annotated[int, typer.Option(help="Of the split, the models and the batches.")] = 0,
) -> None:
    """Train what is missing, measure every arm, write the result."""
    from odqa.read.lm import load_lm
    from odqa.recipes import Places

    out.mkdir(parents=True, exist_ok=True)
    backbone = load_lm(anchor, device="cpu", dtype="float32")
    world = World(backbone, Places.from_environment(data), seed)
    m_a = knowing_model(world, out / "m_A")
    makers: dict[str, Callable[[], Method | None]] = {
        "anchor": lambda: None,
        "composed": lambda: composed(world, m_a, out / "links"),
        "LoRA, a fifth": lambda: lora(world, m_a, out / "lora-fifth", linked_only=True),
        "LoRA, the collection": lambda: lora(world, m_a, out / "lora-collection", linked_only=False),
    }
    rows: dict[str, dict[str, Any]] = {"m_A": {"closed_book": world.closed_book(m_a)}}
    for arm, make in makers.items():
        method = make()
        if method is not None:
            method.attach(backbone)
        rows[arm] = {
            "trained_values": 0 if method is None else method.count(backbone).trainable,
            "closed_book": world.closed_book(backbone),
            "open_book": world.open_book(),
            "squad_right_passage": world.squad(),
        }
        if method is not None:
            method.detach()
        typer.echo(json.dumps({arm: rows[arm]}))
    write(save, rows, {"anchor": anchor, "seed": seed, "held_out_questions": len(world.held_out), "m_A": m_a})


class World:
    """The collection, its questions, and how they are put to a model."""

    def __init__(self, anchor: "Backbone", places: Any, seed: int) -> None:
        import numpy as np

        self.anchor, self.seed, self.places = anchor, seed, places
        self.style = "odqa-mini-d" if anchor.architecture == "causal" else "odqa-mini"
        self.passages = _passages()
        asked = _questions()
        articles = sorted({article for _, _, article in asked})
        rng = np.random.default_rng([seed, 0])
        linked = set(rng.permutation(articles)[: round(SHARE * len(articles))].tolist())
        self.linked = [(query, gold) for query, gold, article in asked if article in linked]
        self.held_out = [(query, gold) for query, gold, article in asked if article not in linked]
        self.linked_passages = [passage for passage in self.passages if passage.title in linked]
        self.examples = _reading_examples(places)
        self._readers: dict[tuple[str, int], LmReader] = {}
        self._hits: Sequence[Sequence[Hit]] = ()

    def row(self, rng: "np.random.Generator", *, linked_only: bool, reading: float) -> Row:
        """A question with its answer, or a sentence to continue, of a fifth of the collection or of all; or reading."""
        from odqa.lm.tasks import Corpus, make

        kind = rng.random()
        if kind < reading:
            question, passage, answer = self.examples[int(rng.integers(len(self.examples)))]
            return self._row(self.style, self._packed(question, passage), answer)
        if kind < reading + (1 - reading) / 2:
            pairs = self.linked if linked_only else [*self.linked, *self.held_out]
            query, gold = pairs[int(rng.integers(len(pairs)))]
            return self._row("recall", self._bare("recall", query), gold.answers[0])
        item = make("complete", Corpus(self.linked_passages if linked_only else self.passages, ()), rng)
        return self._row("complete", self._bare("complete", _query(item.parts[1])), item.target)

    def _row(self, task: str, context: "PackedContext", target: str) -> Row:
        reader = self.reader(task)
        return reader.encode(context)[0], reader.encode_answer(target)

    def reader(self, task: str, backbone: "Backbone | None" = None) -> "LmReader":
        """A reader with the prompt of a task, as the anchors were pre-trained on it (odqa.lm.tasks)."""
        from odqa.lm.tasks import INSTRUCTIONS
        from odqa.read.lm import LmReader
        from odqa.read.prompts import find_template

        backbone = backbone or self.anchor
        key = task, id(backbone)
        if key not in self._readers:
            changes: dict[str, Any] = {}
            if task != self.style:
                changes = {"instruction": INSTRUCTIONS[task], "passage": None, "untitled": None}
            if task == "complete":
                changes["question"] = "{question}"
            template = find_template(self.style, changes)
            self._readers[key] = LmReader(backbone, template, max_new_tokens=24, spelling="passage", batch_size=16)
        return self._readers[key]

    def closed_book(self, backbone: "Backbone") -> Scored:
        """The held-out questions without passages."""
        contexts = [self._bare("recall", query) for query, _ in self.held_out]
        return _scores(self.reader("recall", backbone).read(contexts), [gold for _, gold in self.held_out])

    def open_book(self) -> Scored:
        """The held-out questions from what the embedded pipeline finds and re-ranks."""
        from odqa.jobs import load_ranker

        queries = [query for query, _ in self.held_out]
        if not self._hits:
            self._hits = load_ranker("pipelines/embedded.yaml", places=self.places, build=True).rank(queries)
        contexts = self._packer().pack(queries, self._hits)
        return _scores(self.reader(self.style).read(contexts), [gold for _, gold in self.held_out])

    def squad(self) -> Scored:
        """Questions of SQuAD's dev part from their own passage."""
        from odqa.corpus.io import read_gold, read_passages, read_questions

        file = self.places.file("data:nq-mini/squad_dev.jsonl")
        pairs = list(zip(read_questions(file), read_gold(file), strict=True))[:: len(list(read_gold(file))) // SQUAD][
            :SQUAD
        ]
        wanted = {gold.passage_ids[0] for _, gold in pairs}
        every = read_passages(self.places.file("data:nq-mini/psgs.tsv.gz"))
        passages = {passage.id: passage for passage in every if passage.id in wanted}
        contexts = [self._packed(query.text, passages[gold.passage_ids[0]], query.id) for query, gold in pairs]
        return _scores(self.reader(self.style).read(contexts), [gold for _, gold in pairs])

    def _packer(self) -> Any:
        from odqa.pack import GreedyPacker
        from odqa.pack.trim import SentenceTrimmer

        return GreedyPacker(self.reader(self.style), BUDGET, trim=SentenceTrimmer(3))

    def _packed(self, question: str, passage: "Passage", name: str = "") -> "PackedContext":
        from odqa.types import Hit, Query

        context: PackedContext = self._packer().pack([Query(name, question)], [[Hit(passage, 0.0, "given")]])[0]
        return context

    def _bare(self, task: str, query: "Query") -> "PackedContext":
        from odqa.types import PackedContext

        tokens = self.reader(task).costs(query, []).fixed
        return PackedContext(query, "", (), tokens, tokens)


# --- what is trained --------------------------------------------------------------------------------------------------


def knowing_model(world: World, folder: Path) -> "Backbone":
    """m_A: a small Llama that learned the collection, with the anchor's tokenizer; loaded if it is there."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from odqa.frozen.backbone import Backbone, load_backbone

    if not (folder / "config.json").is_file():
        tokenizer = world.anchor.tokenizer
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(world.seed)
            model = LlamaForCausalLM(
                LlamaConfig(
                    **MODEL,
                    vocab_size=len(tokenizer),
                    max_position_embeddings=512,
                    tie_word_embeddings=True,
                    pad_token_id=tokenizer.pad_token_id,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=min(world.anchor.end_tokens()),
                )
            )
        _train(
            world,
            Backbone("m_A", "causal", model, tokenizer, ""),
            model,
            lambda rng: world.row(rng, linked_only=False, reading=0.0),
            (KNOW_STEPS, KNOW_RATE),
            folder.with_suffix(".checkpoint"),
        )
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return load_backbone(str(folder), "causal", device="cpu", dtype="float32")


def composed(world: World, m_a: "Backbone", folder: Path) -> "Method":
    """The links from m_A to the anchor."""
    from odqa.frozen.calm import Calm

    method = Calm(world.anchor, models=[{"model": m_a, "links": _links(world, m_a)}], seed=world.seed)
    return _trained(world, method, folder, (LINK_STEPS, LINK_RATE), linked_only=True)


def _links(world: World, m_a: "Backbone") -> list[tuple[int, int]]:
    """m_A's last layer, which knows what comes next, to four places of the anchor, its last layer among them."""
    from odqa.frozen.backbone import layer_list

    layers = len(layer_list(world.anchor))
    return [(m_a.layers, place) for place in sorted({layers * part // 4 for part in range(1, 5)})]


def lora(world: World, m_a: "Backbone", folder: Path, *, linked_only: bool) -> "Method":
    """LoRA on the anchor with as many values as the links, on their examples or on the whole collection."""
    from odqa.frozen.calm import Calm
    from odqa.frozen.lora import Lora, map_shape, target_linears

    links = Calm(world.anchor, models=[{"model": m_a, "links": _links(world, m_a)}]).count(world.anchor).trainable
    rank = max(1, round(links / sum(sum(map_shape(linear)) for linear in target_linears(world.anchor, None).values())))
    method = Lora(world.anchor, rank=rank, alpha=2.0 * rank, seed=world.seed)
    steps = LINK_STEPS if linked_only else LORA_STEPS
    return _trained(world, method, folder, (steps, LORA_RATE), linked_only=linked_only)


def _trained(world: World, method: "Method", folder: Path, how: tuple[int, float], *, linked_only: bool) -> "Method":
    from odqa.frozen.backbone import frozen_guard
    from odqa.frozen.method import TENSORS, load_method

    if (folder / TENSORS).is_file():
        return load_method(folder, world.anchor)
    with frozen_guard(world.anchor):
        method.attach(world.anchor)
        draw = lambda rng: world.row(rng, linked_only=linked_only, reading=READING)  # noqa: E731
        _train(world, world.anchor, method, draw, how, folder.with_suffix(".checkpoint"))
        method.detach()
    method.save(folder)
    return method


def _train(
    world: World,
    backbone: "Backbone",
    module: "nn.Module",
    draw: "Callable[[np.random.Generator], Row]",
    how: tuple[int, float],
    checkpoint: Path,
) -> None:
    """By the one loop: (steps, learning rate)."""
    import numpy as np

    from odqa.frozen.fit import FitSettings, fit

    def batch_at(index: int) -> tuple[list[list[int]], list[list[int]]]:
        rng = np.random.default_rng([world.seed, 1, index])
        rows = [draw(rng) for _ in range(BATCH)]
        return [source for source, _ in rows], [target for _, target in rows]

    steps, rate = how
    settings = FitSettings(steps, {"method": rate}, autocast=False, seed=world.seed, log_every=50)
    fit(
        {"method": module},
        batch_at,
        lambda batch: backbone.loss(*batch),
        settings,
        checkpoint=checkpoint,
        log=lambda line: typer.echo(f"{checkpoint.stem}: {line}", err=True),
    )


# --- files and numbers ------------------------------------------------------------------------------------------------


def _passages() -> "list[Passage]":
    from odqa.corpus.mediawiki import read_articles
    from odqa.corpus.split import split_article
    from odqa.types import Passage

    articles = read_articles(ROOT / "odqa/assets/collection.xml.bz2")
    return [Passage("", text, article.title) for article in articles for text in split_article(article.text)]


def _questions() -> "list[tuple[Query, Gold, str]]":
    """Query, gold answers and article of the embedded questions that have an answer."""
    from odqa.types import Gold, Query

    lines = (ROOT / "odqa/assets/questions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if row["answers"]]
    return [(Query(r["id"], r["question"]), Gold(r["id"], tuple(r["answers"])), r["article"]) for r in rows]


def _reading_examples(places: Any) -> "list[tuple[str, Passage, str]]":
    """Question, passage and answer of 2,000 of SQuAD's training questions: what the anchors learned to read with."""
    import gzip

    from odqa.types import Passage

    found = []
    with gzip.open(places.file("data:reader_train.jsonl.gz"), "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            if row["source"] == "squad11-train" and row["answers"]:
                found.append((row["question"], Passage("", row["passage"], row["title"]), row["answers"][0]))
    return found[:: len(found) // 2000][:2000]


def _query(text: str) -> "Query":
    from odqa.types import Query

    return Query("", text)


def _scores(answers: "Sequence[Answer]", gold: "Sequence[Gold]") -> Scored:
    """EM and F1 with the 95% interval of EM over questions."""
    import numpy as np

    from odqa.text import exact_match, f1

    exact = np.array([100.0 * exact_match(a.text, g.answers) for a, g in zip(answers, gold, strict=True)])
    drawn = np.random.default_rng(0).integers(len(exact), size=(2000, len(exact)))
    low, high = np.percentile(exact[drawn].mean(1), (2.5, 97.5))
    overlap = float(np.mean([100.0 * f1(a.text, g.answers) for a, g in zip(answers, gold, strict=True)]))
    return {
        "em": round(float(exact.mean()), 1),
        "em_low": round(float(low), 1),
        "em_high": round(float(high), 1),
        "f1": round(overlap, 1),
        "n": len(exact),
    }


def write(save: Path, rows: dict[str, dict[str, Any]], about: dict[str, Any]) -> None:
    """SAVE.json and SAVE.md."""
    m_a = about.pop("m_A")
    about["m_A"] = {"values": m_a.count_parameters(), **MODEL}
    save.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "arms": rows}, indent=1) + "\n"
    save.with_suffix(".json").write_text(text, encoding="utf-8")
    names = ("closed_book", "open_book", "squad_right_passage")
    lines = [
        f"Exact match (F1) with 95% intervals; {about['held_out_questions']} held-out questions, seed {about['seed']}."
    ]
    lines += ["", f"| arm | trained values | {' | '.join(names)} |", "| --- | ---: | ---: | ---: | ---: |"]
    for arm, row in rows.items():
        cells = [
            f"{s['em']} [{s['em_low']}, {s['em_high']}] ({s['f1']})" if (s := row.get(name)) else "" for name in names
        ]
        lines.append(f"| {arm} | {row.get('trained_values', m_a.count_parameters()):,} | {' | '.join(cells)} |")
    save.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
