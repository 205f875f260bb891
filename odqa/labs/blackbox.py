"""Lab: a frozen model's prompt, improved through its API alone, from 16 examples a class.

The world. Words have hidden yes-no properties; a task asks whether most words of a text have one of them. A small
Llama is pre-trained on sequences "instruction text : answer text : answer ...". A task is told by its formal name,
which no user knows, or by a word of everyday language, which is vague: it means its own task more often than any other
one, but not always. So the model knows the tasks, a written instruction asks for them vaguely, and demonstrations help.
That words are vague is our decision, and so is how vague; an instruction with the formal name is the ceiling.

Every arm sees the same examples, 16 a class to learn from and 16 to choose by, as in Sun et al. 2022 (arXiv 2201.03514,
section 5.1), and is measured on the same fresh texts. All but gradients and features go through an engine that is asked
for log-probabilities or texts only.
"""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from odqa import config
from odqa.frozen.backbone import Backbone, fingerprint, frozen_guard
from odqa.frozen.blackbox import Classification, Labelled, SearchSettings, SoftPrompt, search
from odqa.frozen.engine import Prompted
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.local import LocalEngine
from odqa.frozen.metered import Metered
from odqa.frozen.method import create_method
from odqa.frozen.textsearch import Example, TextTask, answer_all, search_texts
from odqa.labs.outcome import Outcome
from odqa.labs.runner import Desk

ANSWERS = ("no", "yes")
SLOT = 5  # words of an instruction, and vectors of a prompt
_INSTRUCTIONS, _FILLERS = 5, 40  # everyday words of a task, each in an instruction; words that say nothing
_BATCH = 64
_DEVIATION, _PRETRAINING_RATE = 0.14, 3e-3  # weights this wide learn the tasks in a third of the steps of 0.02
_DEMONSTRATIONS = 3  # a pre-training sequence has at most one text more
_SINGLE = 8  # texts of one word in a pre-training sequence
_NAMED = 0.5  # of the pre-training sequences have the formal name
_RATIO = 4.0  # an everyday word means its own task so many times as often as each other one
_BACKWARD = 2  # a backward pass costs so many forward passes: a step of a gradient method is 1 + 2 calls
_TRIALS = 15  # points of a curve
# Learning rates of AdamW; our choice. On seed 7, which is no seed of the recipe, three times as much gives a prompt the
# same, LoRA (0.02) and fine-tuning a point more or less (docs/LOG.md).
_RATES = {"prompt-tuning": 0.03, "lora": 0.005, "fine-tuning": 0.001, "features": 0.01}

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class World:
    """`properties` (words, tasks) of 0 and 1. Token ids: words first, then what `names` says."""

    properties: Ints
    length: int
    names: Mapping[str, int]

    @property
    def words(self) -> int:
        return len(self.properties)

    @property
    def tasks(self) -> int:
        return int(self.properties.shape[1])

    def formal(self, task: int) -> int:
        return self.names[f"task{task}"]

    def hint(self, task: int, number: int) -> int:
        return self.names[f"say{task}{chr(97 + number)}"]

    def filler(self, number: int) -> int:
        return self.names[f"so{number}"]

    def texts(self, chances: np.random.Generator, count: int, length: int | None = None) -> Ints:
        """(count, length) words."""
        found: Ints = chances.integers(self.words, size=(count, length or self.length))
        return found

    def answers(self, texts: Ints, task: int | Ints) -> Ints:
        """(count,) 1 where most words have the task's property; lengths are odd."""
        has = self.properties[texts]  # (count, length, tasks)
        of_task = has[np.arange(len(texts)), :, task]
        found: Ints = (2 * of_task.sum(1) > texts.shape[1]).astype(np.int64)
        return found

    def spell(self, ids: Sequence[int]) -> str:
        known = {number: name for name, number in self.names.items()}
        return " ".join(known[token] for token in ids)


def make_world(settings: config.BlackboxLab, chances: np.random.Generator) -> World:
    names = [f"w{number}" for number in range(settings.words)]
    names += [f"task{task}" for task in range(settings.tasks)]
    names += [f"say{task}{chr(97 + number)}" for task in range(settings.tasks) for number in range(_INSTRUCTIONS)]
    names += [f"so{number}" for number in range(_FILLERS)]
    names += [":", *ANSWERS, "<pad>", "<end>", "<unk>"]
    halves = np.arange(settings.words) % 2
    properties = np.stack([chances.permutation(halves) for _ in range(settings.tasks)], axis=1)
    return World(properties, settings.length, {name: number for number, name in enumerate(names)})


def sequences(world: World, chances: np.random.Generator, count: int, texts: int, length: int) -> tuple[Ints, Ints]:
    """Pre-training sequences (count, T) of so many texts of one length, and where in them answers stand (texts,)."""
    tasks = chances.integers(world.tasks, size=count)
    slots = world.filler(0) + chances.integers(_FILLERS, size=(count, SLOT))
    place = chances.integers(SLOT, size=count)
    named = chances.random(count) < _NAMED
    # An everyday word of the task itself with odds of `_RATIO` against each other task.
    meant = np.where(
        chances.random(count) < _RATIO / (_RATIO + world.tasks - 1),
        tasks,
        (tasks + 1 + chances.integers(world.tasks - 1, size=count)) % world.tasks,
    )
    hints = world.hint(0, 0) + meant * _INSTRUCTIONS + chances.integers(_INSTRUCTIONS, size=count)
    slots[np.arange(count), place] = np.where(named, world.formal(0) + tasks, hints)
    parts = [slots]
    for _ in range(texts):
        words = world.texts(chances, count, length)
        answers = world.names[ANSWERS[0]] + world.answers(words, tasks)
        parts += [words, np.full((count, 1), world.names[":"]), answers[:, None]]
    at = SLOT + (length + 2) * np.arange(1, texts + 1) - 1
    return np.concatenate(parts, axis=1), at


def pretrain(world: World, settings: config.BlackboxLab, seed: int, log: Callable[[str], None]) -> Backbone:
    """The frozen model of the lab, with a tokenizer that splits at blanks."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    names = dict(world.names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(names),
                hidden_size=settings.width,
                intermediate_size=2 * settings.width,
                num_hidden_layers=settings.layers,
                num_attention_heads=4,
                max_position_embeddings=128,
                initializer_range=_DEVIATION,
                pad_token_id=names["<pad>"],
                bos_token_id=None,
                eos_token_id=names["<end>"],
            )
        )

    def batch_at(index: int) -> tuple[torch.Tensor, torch.Tensor]:
        chances = np.random.default_rng([seed, 1, index])
        # Every other batch has texts of one word, many of them: what a word has is learned there, counting here.
        texts, length = (_SINGLE, 1) if index % 2 else (1 + index // 2 % (_DEMONSTRATIONS + 1), world.length)
        found, at = sequences(world, chances, _BATCH, texts, length)
        return torch.from_numpy(found), torch.from_numpy(at)

    def loss(batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        ids, at = batch
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits[:, at - 1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, at].flatten())

    rates = FitSettings(
        settings.pretraining_steps,
        {"model": _PRETRAINING_RATE},
        schedule="cosine",
        autocast=False,
        seed=seed,
        log_every=200,
    )
    with tempfile.TemporaryDirectory() as folder:
        fit({"model": model}, batch_at, loss, rates, checkpoint=Path(folder) / "model", log=log)
    model.requires_grad_(False).eval()
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>"
    )
    return Backbone("lab-blackbox", "causal", model, wrapped, fingerprint(model))


# --- what every arm is given ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Texts:
    """Texts (n, length) and their answers (n,), 0 or 1."""

    words: Ints
    answers: Ints

    @property
    def count(self) -> int:
        return len(self.words)


@dataclass(frozen=True, slots=True)
class Task:
    """One task as a user has it: few examples, words that say nothing, five instructions; `test` is for the lab."""

    number: int
    seed: int
    train: Texts
    tune: Texts
    test: Texts
    fillers: list[int]
    instructions: list[list[int]]


@dataclass(slots=True)
class Result:
    """What an arm gave for a task: per test text 100 or 0, facts, and (calls, test accuracy) on the way."""

    scores: list[float]
    facts: dict[str, float] = field(default_factory=dict)
    curve: list[tuple[float, float]] = field(default_factory=list)


def make_task(world: World, number: int, settings: config.BlackboxLab, seed: int) -> Task:
    chances = np.random.default_rng([seed, 2, number])

    def shots() -> Texts:
        pool = world.texts(chances, 40 * settings.shots)
        answers = world.answers(pool, number)
        chosen = np.concatenate([np.flatnonzero(answers == label)[: settings.shots] for label in (0, 1)])
        return Texts(pool[chosen], answers[chosen])

    train, tune = shots(), shots()
    test = world.texts(chances, settings.items)
    fillers = [world.filler(int(one)) for one in chances.choice(_FILLERS, SLOT, replace=False)]
    instructions = []
    for word in range(_INSTRUCTIONS):
        written = [world.filler(int(one)) for one in chances.choice(_FILLERS, SLOT, replace=False)]
        written[int(chances.integers(SLOT))] = world.hint(number, word)
        instructions.append(written)
    return Task(number, seed, train, tune, Texts(test, world.answers(test, number)), fillers, instructions)


class Bench:
    """Where the arms of one task are run."""

    def __init__(self, world: World, backbone: Backbone, task: Task, settings: config.BlackboxLab) -> None:
        self.world, self.backbone, self.task, self.settings = world, backbone, task, settings
        self.colon = world.names[":"]
        self.engine = Metered(LocalEngine(backbone))
        self.asked = LocalEngine(backbone)  # for the lab's own measurements, which cost the arm nothing
        self.verbalisers = [world.names[answer] for answer in ANSWERS]

    # --- arms without training ---

    def prompt(self, slot: Sequence[int], demonstrations: Sequence[int] = ()) -> Result:
        """The model as it is, with words before the text, and training texts with their answers."""
        return Result(self._right(self._choose(slot, self.task.test, demonstrations), self.task.test))

    def best_instruction(self) -> Result:
        """Of five: the best one on all examples, those to learn from too, since nothing is learned."""
        found = [self._known_share(slot, both=True) for slot in self.task.instructions]
        result = self.prompt(self.task.instructions[int(np.argmax(found))])
        result.facts = {"calls": len(found)}
        return result

    def in_context(self) -> Result:
        """As many demonstrations as the model was pre-trained with: of five draws the best one on tune."""
        chances = np.random.default_rng([self.task.seed, 3, self.task.number])
        draws = [chances.choice(self.task.train.count, _DEMONSTRATIONS, replace=False).tolist() for _ in range(5)]
        found = [self._known_share(self.task.fillers, draw) for draw in draws]
        result = self.prompt(self.task.fillers, draws[int(np.argmax(found))])
        result.facts = {"calls": len(draws)}
        return result

    def text_search(self) -> Result:
        """Instructions, demonstrations and their order by `search_texts`: the API writes text, nothing else."""
        spell = self.world.spell
        texts = {
            name: [
                Example(spell(words), ANSWERS[label]) for words, label in zip(t.words.tolist(), t.answers, strict=True)
            ]
            for name, t in (("train", self.task.train), ("tune", self.task.tune), ("test", self.task.test))
        }
        task = TextTask(texts["train"], texts["tune"], _render, _is_same, max_tokens=1)
        slots = [spell(slot) for slot in [self.task.fillers, *self.task.instructions]]
        started = time.monotonic()
        found = search_texts(
            self.engine,
            task,
            slots,
            calls=self.settings.text_calls,
            demonstrations=_DEMONSTRATIONS,
            seed=self.task.seed + 1,
        )
        facts = self._facts(0, found.calls, found.tune_calls, time.monotonic() - started)
        written = answer_all(self.asked, task, found.best, [one.text for one in texts["test"]])
        scores = [100.0 * _is_same(text, one.answer) for text, one in zip(written, texts["test"], strict=True)]
        return Result(scores, facts)

    # --- black-box tuning ---

    def black_box(self, projection: Literal["normal", "uniform"] = "normal", *, deep: bool = False) -> Result:
        wide = self.settings
        search_settings = SearchSettings(
            dimensions=wide.dimensions,
            population=wide.population,
            calls=wide.calls,
            sigma=wide.deep_sigma if deep else wide.sigma,
            scale=wide.deep_scale if deep else 1.0,
            projection=projection,
            deep=deep,
            tune_every=max(1, wide.calls // wide.population // _TRIALS),
            seed=self.task.seed + 1,
        )
        task = Classification(self.engine, ANSWERS, self._labelled(self.task.train), self._labelled(self.task.tune))
        before = asdict(self.engine.use)
        spent = [0.0]

        def evaluate(prompt: SoftPrompt) -> dict[str, float]:
            began = time.monotonic()
            accuracy = float(np.mean(self._right(self._soft(prompt), self.task.test)))
            spent[0] += time.monotonic() - began
            return {"test": accuracy}

        started = time.monotonic()
        with frozen_guard(self.backbone):
            found = search(self.engine, task, self.engine.embed(self.task.fillers), search_settings, evaluate=evaluate)
        seconds = time.monotonic() - started - spent[0]
        trained = wide.dimensions * (len(found.best.deep) if found.best.deep is not None else 1)
        facts = self._facts(trained, found.calls, found.tune_calls, seconds, before)
        curve = [(float(entry["calls"]), entry["test"]) for entry in found.curve]
        return Result(self._right(self._soft(found.best), self.task.test), facts, curve)

    # --- arms that need the weights ---

    def gradients(self, kind: str, **own: Any) -> Result:
        """A method by gradients, the best values on tune kept. A prompt starts from the words that say nothing; other
        methods have them before the text."""
        is_prompt = kind == "prompt-tuning"
        if is_prompt:
            own = {"length": SLOT, "start": "text", "text": self.world.spell(self.task.fillers)}
        method = create_method(kind, self.backbone, **own)
        slot = [] if is_prompt else self.task.fillers
        started = time.monotonic()
        with frozen_guard(self.backbone):
            method.attach(self.backbone)
            try:
                curve = self._fit(kind, method, lambda texts: self._logits(slot, texts))
                seconds = time.monotonic() - started
                with torch.no_grad():
                    right = self._right(self._logits(slot, self.task.test).numpy(), self.task.test)
            finally:
                method.detach()
        trained = sum(tensor.numel() for tensor in method.parameters())
        return Result(right, self._gradient_facts(trained, seconds), curve)

    def features(self) -> Result:
        """A small network on the frozen model's states, averaged over the text (Peters et al. 2019)."""
        states = {id(texts): self._states(texts) for texts in (self.task.train, self.task.tune, self.task.test)}
        mean, deviation = states[id(self.task.train)].mean(0), states[id(self.task.train)].std(0) + 1e-6
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.task.seed)
            network = nn.Sequential(nn.Linear(self.backbone.width, 32), nn.ReLU(), nn.Linear(32, len(ANSWERS)))

        def logits(texts: Texts) -> torch.Tensor:
            found: torch.Tensor = network((states[id(texts)] - mean) / deviation)
            return found

        started = time.monotonic()
        self._fit("features", network, logits)
        seconds = time.monotonic() - started
        with torch.no_grad():
            right = self._right(logits(self.task.test).numpy(), self.task.test)
        facts = self._gradient_facts(sum(tensor.numel() for tensor in network.parameters()), seconds)
        return Result(right, facts | {"calls": 1.0})  # one pass over the examples: their states

    def _fit(self, kind: str, module: nn.Module, logits: Callable[[Texts], torch.Tensor]) -> list[tuple[float, float]]:
        """Train on all training texts at once; returns (calls, accuracy on test with what is best on tune so far)."""
        steps = self.settings.gradient_steps
        rates = FitSettings(
            steps,
            {"method": _RATES[kind]},
            autocast=False,
            seed=self.task.seed,
            evaluate_every=max(1, steps // _TRIALS),
            keep_best="tune",
        )

        def loss_of(texts: Texts) -> torch.Tensor:
            return nn.functional.cross_entropy(logits(texts), torch.from_numpy(texts.answers))

        @torch.no_grad()
        def evaluate() -> dict[str, float]:
            found = {name: logits(texts) for name, texts in (("tune", self.task.tune), ("test", self.task.test))}
            right = {
                name: 100 * float((values.argmax(-1).numpy() == getattr(self.task, name).answers).mean())
                for name, values in found.items()
            }
            # Of two equal accuracies the one with the lower loss, as in the black-box search.
            loss = float(nn.functional.cross_entropy(found["tune"], torch.from_numpy(self.task.tune.answers)))
            return {"tune": right["tune"] - 1e-3 * min(loss, 100.0), "test": right["test"]}

        with tempfile.TemporaryDirectory() as folder:
            found = fit(
                {"method": module},
                lambda _step: self.task.train,
                loss_of,
                rates,
                checkpoint=Path(folder) / "checkpoint",
                evaluate=evaluate,
            )
        curve, best = [], (-1e9, 0.0)
        for entry in found.curve:
            if "tune" in entry:
                best = max(best, (entry["tune"], entry["test"]), key=lambda pair: pair[0])
                curve.append((float(entry["step"] * (1 + _BACKWARD)), best[1]))
        return curve

    # --- helpers ---

    def _ids(self, slot: Sequence[int], texts: Texts, demonstrations: Sequence[int] = ()) -> list[list[int]]:
        """Token ids: slot, demonstrations, text, colon. A demonstration is left out where it is the text itself."""
        shown = [
            (
                number,
                [
                    *self.task.train.words[number].tolist(),
                    self.colon,
                    self.verbalisers[self.task.train.answers[number]],
                ],
            )
            for number in demonstrations
        ]
        is_train = texts is self.task.train
        return [
            [*slot, *(t for number, one in shown if not is_train or number != row for t in one), *words, self.colon]
            for row, words in enumerate(texts.words.tolist())
        ]

    def _choose(self, slot: Sequence[int], texts: Texts, demonstrations: Sequence[int] = ()) -> NDArray[np.float32]:
        """(n, 2) log-probabilities of the answers, by the lab's own engine."""
        rows = [Prompted(ids=ids) for ids in self._ids(slot, texts, demonstrations)]
        return self.asked.choose(rows, self.verbalisers)

    def _known_share(self, slot: Sequence[int], demonstrations: Sequence[int] = (), *, both: bool = False) -> float:
        sets = [self.task.tune, *([self.task.train] if both else [])]
        return float(
            np.mean([np.mean(self._right(self._choose(slot, texts, demonstrations), texts)) for texts in sets])
        )

    def _soft(self, prompt: SoftPrompt) -> NDArray[np.float32]:
        rows = [prompt.before(Prompted(ids=ids)) for ids in self._ids([], self.task.test)]
        return self.asked.choose(rows, self.verbalisers)

    def _labelled(self, texts: Texts) -> list[Labelled]:
        pairs = zip(self._ids([], texts), texts.answers.tolist(), strict=True)
        return [Labelled(Prompted(ids=ids), label) for ids, label in pairs]

    def _logits(self, slot: Sequence[int], texts: Texts) -> torch.Tensor:
        """(n, 2) logits of the answers, with whatever is attached."""
        logits = self.backbone.forward(self._ids(slot, texts))[:, -1]
        return logits[:, self.verbalisers].float()

    @torch.no_grad()
    def _states(self, texts: Texts) -> torch.Tensor:
        ids = torch.tensor(self._ids(self.task.fillers, texts))
        states: torch.Tensor = self.backbone.model.model(input_ids=ids).last_hidden_state[:, SLOT:-1].mean(1)
        return states

    def _right(self, scores: NDArray[np.float32], texts: Texts) -> list[float]:
        return [100.0 * bool(right) for right in scores.argmax(-1) == texts.answers]

    def _facts(
        self, trained: int, calls: int, tune_calls: int, seconds: float, before: Mapping[str, Any] | None = None
    ) -> dict[str, float]:
        """Of an arm that went through the engine; `before`: what had gone through it earlier."""
        use = {name: value - (before or {}).get(name, 0) for name, value in asdict(self.engine.use).items()}
        return {
            "parameters": trained,
            "calls": calls,
            "tune calls": tune_calls,
            "user s": seconds - use["seconds"],
            "server s": use["seconds"],
            "up kB": use["bytes_up"] / 1000,
            "down kB": use["bytes_down"] / 1000,
        }

    def _gradient_facts(self, trained: int, seconds: float) -> dict[str, float]:
        """All of it is the server's work: the weights are there."""
        calls = self.settings.gradient_steps * (1 + _BACKWARD)
        return {"parameters": trained, "calls": calls, "server s": seconds}


def _render(instruction: str, shown: Sequence[Example], text: str) -> str:
    return " ".join([instruction, *(f"{one.text} : {one.answer}" for one in shown), f"{text} :"])


def _is_same(written: str, answer: str) -> bool:
    return written.strip() == answer


# --- the lab ----------------------------------------------------------------------------------------------------------


def run(settings: config.BlackboxLab, seed: int, desk: Desk) -> Outcome:
    """One seed: a world, a model, all arms on all tasks. Scores of an arm: the test texts of all tasks in a row."""
    world = make_world(settings, np.random.default_rng([seed, 0]))
    backbone = pretrain(world, settings, seed, desk.log)
    found: dict[str, list[Result]] = {}
    for number in range(settings.tasks):
        task = make_task(world, number, settings, seed)
        for name, arm in _arms(Bench(world, backbone, task, settings), world, task).items():
            result = arm()
            found.setdefault(name, []).append(result)
            desk.log(f"task {number}: {name} {np.mean(result.scores):.1f}")
    return Outcome(
        scores={
            name: {"accuracy": [score for one in results for score in one.scores]} for name, results in found.items()
        },
        facts={
            name: {fact: sum(one.facts[fact] for one in results) / len(results) for fact in results[0].facts}
            for name, results in found.items()
            if results[0].facts
        },
        curves={
            "calls": {
                name: [
                    (x, float(np.mean([one.curve[at][1] for one in results])))
                    for at, (x, _) in enumerate(results[0].curve)
                ]
                for name, results in found.items()
                if results[0].curve
            }
        },
    )


def _arms(bench: Bench, world: World, task: Task) -> dict[str, Callable[[], Result]]:
    formal = list(task.fillers)
    formal[SLOT // 2] = world.formal(task.number)
    return {
        "uninformative": lambda: bench.prompt(task.fillers),
        "best written": bench.best_instruction,
        "in-context": bench.in_context,
        "text search": bench.text_search,
        "feature MLP": bench.features,
        "gradient prompt": lambda: bench.gradients("prompt-tuning"),
        "LoRA": lambda: bench.gradients("lora", rank=4, alpha=8.0),
        "fine-tuning": lambda: bench.gradients("fine-tuning"),
        "BBT": bench.black_box,
        "BBT, uniform A": lambda: bench.black_box("uniform"),
        "BBTv2": lambda: bench.black_box(deep=True),
        "formal name": lambda: bench.prompt(formal),
    }
