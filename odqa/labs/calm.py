"""Can two frozen models, composed, do what neither can? Arithmetic with keys whose numbers only one of them knows.

Every key stands for a digit. m_A learned to write the digits of an expression's keys (KV-substitution, all keys); m_B
learned to calculate with digits (numeric arithmetic) and never saw a key. To calculate with keys (KV-arithmetic) takes
both. The links are trained on expressions over a fifth of the keys, and measured on expressions over the others.

| arm | what is learned |
| --- | --- |
| m_A, m_B | nothing more: the parts |
| composed | links from m_A to m_B, see `odqa.frozen.calm` |
| half of the links | the same with fewer of them |
| links of the paper | the same without rotary positions and normalisation |
| random m_A | the same links to an m_A that was never trained |
| m_A as encoder | the same links to an m_A that reads the expression, and not what is being written |
| LoRA | as many values on m_B as the links have |
| fine-tuned m_B | all of m_B |

Task and arms are those of Bansal et al. 2024 (arXiv 2401.02412), sections 4.1 and 5, table 1 and 5; there keys are
strings, values up to 25,000 and expressions have 3 to 6 keys. The sizes are ours. All arms see the same examples: keyed
arithmetic and substitution over the fifth, and numeric arithmetic, without which every arm unlearns it.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from odqa.config.labs import CalmLab
from odqa.frozen.backbone import Backbone, fingerprint, frozen_guard
from odqa.frozen.calm import Calm
from odqa.frozen.finetuning import FineTuning
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.lora import Lora, map_shape, target_linears
from odqa.frozen.method import Method
from odqa.labs.outcome import Outcome
from odqa.labs.runner import Desk

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DIGITS = 10  # values of keys are 0 to 9, results -9 to 18
PAD, END, SIGNS, CALCULATE, WRITE = "<pad>", "<end>", ("+", "-"), "=", ":"
SUBSTITUTION, NUMERIC, KEYED, KNOWN = "kv_substitution", "numeric_arithmetic", "kv_arithmetic", "kv_arithmetic_seen"
ALL, SEEN, NEW = "all", "seen", "new"  # which keys
FIGURE = "held-out"
ARMS = (
    *("composed", "half of the links", "links of the paper", "random m_A", "m_A as encoder"),
    *("LoRA", "fine-tuned m_B"),
)

Row = tuple[list[int], list[int]]  # what is asked, and what is to be written
Draw = Callable[[np.random.Generator], Row]


class World:
    """Keys, their values, and expressions; which key has which value is drawn by `seed`."""

    def __init__(self, settings: CalmLab, seed: int) -> None:
        numbers = [str(number) for number in range(1 - DIGITS, 2 * DIGITS - 1)]
        names = [f"key{number}" for number in range(settings.keys)]
        self.words = [PAD, END, *SIGNS, CALCULATE, WRITE, *numbers, *names]
        self.ids = {word: number for number, word in enumerate(self.words)}
        rng = np.random.default_rng([seed, 0])
        self.values = rng.integers(DIGITS, size=settings.keys)
        order = rng.permutation(settings.keys)
        count = round(settings.seen * settings.keys)
        self.keys = {ALL: order, SEEN: order[:count], NEW: order[count:]}

    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """A word is a token."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.WordLevel(dict(self.ids), unk_token=PAD))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=PAD)

    def substitution(self, rng: np.random.Generator, which: str) -> Row:
        """`key3 + key8 :` -> `4 + 1`."""
        first, second = rng.choice(self.keys[which], 2)
        sign = SIGNS[rng.integers(2)]
        return self._row([f"key{first}", sign, f"key{second}", WRITE], [self.values[first], sign, self.values[second]])

    def numeric(self, rng: np.random.Generator) -> Row:
        """`4 + 1 =` -> `5`."""
        first, second = rng.integers(DIGITS, size=2).tolist()
        return self.sum(first, second, SIGNS[rng.integers(2)])

    def sum(self, first: int, second: int, sign: str) -> Row:
        return self._row([first, sign, second, CALCULATE], [_result(first, second, sign)])

    def keyed(self, rng: np.random.Generator, which: str) -> Row:
        """`key3 + key8 =` -> `5`."""
        first, second = rng.choice(self.keys[which], 2)
        sign = SIGNS[rng.integers(2)]
        result = _result(int(self.values[first]), int(self.values[second]), sign)
        return self._row([f"key{first}", sign, f"key{second}", CALCULATE], [result])

    def _row(self, asked: Sequence[object], written: Sequence[object]) -> Row:
        return [self.ids[str(word)] for word in asked], [self.ids[str(word)] for word in (*written, END)]


def _result(first: int, second: int, sign: str) -> int:
    return first + second if sign == "+" else first - second


def run(settings: CalmLab, seed: int, desk: Desk) -> Outcome:
    world = World(settings, seed)
    trainer = Trainer(settings, seed)
    m_a = trainer.backbone("m_A", world, settings.width_a, settings.layers_a, lambda rng: world.substitution(rng, ALL))
    m_b = trainer.backbone("m_B", world, settings.width_b, settings.layers_b, world.numeric)
    untrained = trainer.backbone("random m_A", world, settings.width_a, settings.layers_a, None)
    exam = Exam(world, settings.test, seed)
    desk.log(f"lab-calm: trained m_A ({m_a.count_parameters():,} values) and m_B ({m_b.count_parameters():,})")
    scores = {"m_A": exam.scores(m_a), "m_B": exam.scores(m_b)}
    facts: dict[str, dict[str, float]] = {}
    curves: dict[str, list[tuple[float, float]]] = {}
    known = arms(settings, seed, m_a, m_b, untrained)
    for arm in settings.arms or known:
        make, rate = known[arm]
        with frozen_guard(m_a), frozen_guard(m_b), frozen_guard(untrained):
            method = make()
            started = time.monotonic()
            method.attach(m_b)
            curves[arm] = trainer.specialise(m_b, method, lambda rng: mixed(world, settings, rng), rate, exam)
            facts[arm] = {"trained values": method.count(m_b).trainable, "seconds": time.monotonic() - started}
            scores[arm] = exam.scores(m_b)
            method.detach()
        desk.log(
            f"lab-calm: {arm}: " + ", ".join(f"{name} {np.mean(found):.1f}" for name, found in scores[arm].items())
        )
    return Outcome(scores, facts, {FIGURE: curves})


def arms(
    settings: CalmLab, seed: int, m_a: Backbone, m_b: Backbone, untrained: Backbone
) -> Mapping[str, tuple[Callable[[], Method], float]]:
    """What makes each arm's method, and its learning rate."""

    def links(model: Backbone, pairs: Sequence[tuple[int, int]] = settings.links, **options: Any) -> Calm:
        reads = options.pop("reads", None)
        return Calm(m_b, models=[{"model": model, "links": pairs, "reads": reads}], seed=seed, **options)

    def lora() -> Lora:
        values = sum(sum(map_shape(linear)) for linear in target_linears(m_b, None).values())
        rank = max(1, round(links(m_a).count(m_b).trainable / values))
        return Lora(m_b, rank=rank, alpha=2.0 * rank, seed=seed)

    rate = settings.rate
    return {
        "composed": (lambda: links(m_a), rate),
        "half of the links": (lambda: links(m_a, settings.links[::-2][::-1]), rate),
        "links of the paper": (lambda: links(m_a, rotary=False, normalise=False), rate),
        "random m_A": (lambda: links(untrained), rate),
        "m_A as encoder": (lambda: links(m_a, reads="source"), rate),
        "LoRA": (lora, settings.lora_rate),
        "fine-tuned m_B": (lambda: FineTuning(m_b), settings.tuning_rate),
    }


def mixed(world: World, settings: CalmLab, rng: np.random.Generator) -> Row:
    """An example of the training of every arm: over the keys that are seen, or numeric."""
    task = rng.random()
    if task < settings.numeric_share:
        return world.numeric(rng)
    if task < settings.numeric_share + settings.substitution_share:
        return world.substitution(rng, SEEN)
    return world.keyed(rng, SEEN)


@dataclass(frozen=True, slots=True)
class Trainer:
    """Trains models and methods, by the one loop."""

    settings: CalmLab
    seed: int

    def backbone(self, name: str, world: World, width: int, layers: int, draw: Draw | None) -> Backbone:
        """A GPT-2 trained on what `draw` gives, frozen; None: as it begins, from another seed than all others."""
        from transformers import GPT2Config, GPT2LMHeadModel

        pad, end = world.ids[PAD], world.ids[END]
        config = GPT2Config(
            vocab_size=len(world.words),
            n_positions=16,
            n_embd=width,
            n_layer=layers,
            n_head=self.settings.heads,
            pad_token_id=pad,
            bos_token_id=end,
            eos_token_id=end,
            activation_function="relu",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1000 * self.seed + (500 if draw is None else width))
            model: PreTrainedModel = GPT2LMHeadModel(config)
        backbone = Backbone(name, "causal", model, world.tokenizer(), "")
        if draw is not None:
            self._fit(model, backbone, draw, self.settings.model_steps, self.settings.model_rate)
        model.requires_grad_(False).eval()
        backbone.fingerprint = fingerprint(model)
        return backbone

    def specialise(
        self, backbone: Backbone, method: Method, draw: Draw, rate: float, exam: "Exam"
    ) -> list[tuple[float, float]]:
        """Train an attached method; (step, accuracy on a part of the held-out KV-arithmetic) while it learns."""
        curve = self._fit(method, backbone, draw, self.settings.steps, rate, exam)
        return [(0.0, 0.0), *((float(entry["step"]), float(entry[KEYED])) for entry in curve if KEYED in entry)]

    def _fit(
        self,
        module: torch.nn.Module,
        backbone: Backbone,
        draw: Draw,
        steps: int,
        rate: float,
        exam: "Exam | None" = None,
    ) -> list[dict[str, Any]]:
        def batch_at(index: int) -> tuple[list[list[int]], list[list[int]]]:
            rng = np.random.default_rng([self.seed, 1, index])
            rows = [draw(rng) for _ in range(self.settings.batch)]
            return [asked for asked, _ in rows], [written for _, written in rows]

        loop = FitSettings(
            steps=steps,
            learning_rates={"method": rate},
            autocast=False,
            seed=self.seed,
            evaluate_every=max(1, steps // self.settings.points),
            checkpoint_seconds=3600.0,
        )
        with tempfile.TemporaryDirectory() as folder:
            result = fit(
                {"method": module},
                batch_at,
                lambda batch: backbone.loss(*batch),
                loop,
                checkpoint=Path(folder) / "checkpoint.safetensors",
                evaluate=None if exam is None else lambda: {KEYED: exam.glance(backbone)},
            )
        return result.curve


class Exam:
    """The same test rows for every arm: `count` a measure, all sums of two digits for numeric arithmetic."""

    def __init__(self, world: World, count: int, seed: int) -> None:
        def rows(draw: Draw, key: int) -> list[Row]:
            rng = np.random.default_rng([seed, 2, key])
            return [draw(rng) for _ in range(count)]

        digits = range(DIGITS)
        self.rows: dict[str, list[Row]] = {
            SUBSTITUTION: rows(lambda rng: world.substitution(rng, NEW), 0),
            NUMERIC: [world.sum(first, second, sign) for first in digits for second in digits for sign in SIGNS],
            KEYED: rows(lambda rng: world.keyed(rng, NEW), 1),
            KNOWN: rows(lambda rng: world.keyed(rng, SEEN), 2),
        }

    def scores(self, backbone: Backbone) -> dict[str, list[float]]:
        """By measure: of each row 100 if exactly the right tokens are written, else 0."""
        return {measure: _scores(backbone, rows) for measure, rows in self.rows.items()}

    def glance(self, backbone: Backbone) -> float:
        """Accuracy on the first 200 rows of held-out KV-arithmetic."""
        return float(np.mean(_scores(backbone, self.rows[KEYED][:200])))


def _scores(backbone: Backbone, rows: Sequence[Row]) -> list[float]:
    longest = max(len(written) for _, written in rows)
    found = []
    for start in range(0, len(rows), 250):
        batch = rows[start : start + 250]
        texts = backbone.generate([asked for asked, _ in batch], max_new_tokens=longest)
        found += [100.0 * (text == written) for text, (_, written) in zip(texts, batch, strict=True)]
    return found
