"""Does a prompt made from the input do what no single prompt can? Tasks that only unknown words name.

A small language model learned to say whether most of seven things have a property; a word among fillers names which
of four properties. It is then frozen. Texts to be specialised on have no such word: they begin with two cue words that
the model never saw, and the pair says the task (pairs are of one family of cues, a family a task). A frozen encoder saw
such texts too, unlabelled. A quarter of the pairs is in no training of anything: all scores are on texts with these.

| arm | what is learned |
| --- | --- |
| shared prompt | one soft prompt for all texts (Lester et al. 2021) |
| blind generator | ID-PT whose encoder is shown a blank: the same number of values |
| id-pt | ID-PT (Levine et al. 2022, arXiv 2204.10019) |
| id-pt, own layers | ID-PT that reads with the language model itself, to which the cues are new |
| oracle prompts | a soft prompt a task, and somebody who says which task a text is |

The world, its sizes and rates are ours; the claim is that of the paper's section 2: a prompt may depend on the text
although model and encoder are frozen. All arms see as many texts, each of the oracle's prompts too.
"""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from odqa.config.labs import IdptLab
from odqa.frozen.backbone import Backbone, fingerprint, frozen_guard
from odqa.frozen.before_text import Given
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.idpt import InputPrompt
from odqa.frozen.method import Method
from odqa.frozen.prompt_tuning import PromptTuning
from odqa.labs.outcome import Outcome
from odqa.labs.runner import Desk
from odqa.models import quiet_loading

TASKS, PROPERTIES, THINGS, CUES, FILLERS = 3, 4, 7, 8, 8  # cues: of each family, 28 pairs
HELD_OUT = 7  # pairs of each family
MEASURE = "unseen_cues"
NAMED = 2  # cues before a text
SPECIAL = ("[PAD]", "[UNK]", "[MASK]")
SEEN, NEW = 0, 1  # which pairs of cues


Draw = Callable[[np.random.Generator], tuple[list[int], int]]


class World:
    """The words, and texts made of them. What a cue means is drawn by `seed`."""

    def __init__(self, seed: int) -> None:
        groups = {"yes": 1, "no": 1, "=": 1, "task": PROPERTIES, "filler": FILLERS}
        groups |= {"thing": 2**PROPERTIES, "cue": TASKS * CUES}
        self.words: list[str] = list(SPECIAL)
        self.ids: dict[str, np.ndarray[Any, np.dtype[np.int64]]] = {}
        for name, count in groups.items():
            self.ids[name] = np.arange(len(self.words), len(self.words) + count)
            self.words += [name if count == 1 else f"{name}{number}" for number in range(count)]
        rng = np.random.default_rng([seed, 0])
        families = rng.permutation(self.ids["cue"]).reshape(TASKS, CUES)
        self.pairs: list[list[list[tuple[int, int]]]] = []  # [task][SEEN or NEW]
        for cues in families.tolist():
            pairs = [(cues[i], cues[j]) for i in range(CUES) for j in range(i)]
            order = rng.permutation(len(pairs)).tolist()
            shuffled = [pairs[number] for number in order]
            self.pairs.append([shuffled[HELD_OUT:], shuffled[:HELD_OUT]])

    def tokenizer(self) -> Any:
        """A word is a token."""
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(self.words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]"
        )

    def things(self, rng: np.random.Generator, task: int) -> tuple[list[int], int]:
        """Seven things, and the answer: do most of them have property `task`?"""
        chosen = rng.integers(0, 2**PROPERTIES, THINGS)
        is_most = int((chosen >> task & 1).sum()) * 2 > THINGS
        return self.ids["thing"][chosen].tolist(), int(self.ids["yes" if is_most else "no"][0])

    def named(self, rng: np.random.Generator, length: int) -> tuple[list[int], int]:
        """A text of the pre-training: `length` words, one of which names the task, and the things."""
        task = int(rng.integers(PROPERTIES))
        before = rng.choice(self.ids["filler"], length)
        before[rng.integers(length)] = self.ids["task"][task]
        things, answer = self.things(rng, task)
        return [*before.tolist(), *things, *self.ids["="].tolist()], answer

    def asks(self, which: int, task: int | None = None) -> Draw:
        """Texts of the mixture, of all tasks or of this one; `which` pairs: SEEN or NEW."""

        def draw(rng: np.random.Generator) -> tuple[list[int], int]:
            chosen = int(rng.integers(TASKS)) if task is None else task
            pairs = self.pairs[chosen][which]
            pair = list(pairs[int(rng.integers(len(pairs)))])
            if rng.random() < 0.5:
                pair.reverse()
            things, answer = self.things(rng, chosen)
            return [*pair, *things, *self.ids["="].tolist()], answer

        return draw


Texts = tuple[list[list[int]], list[int]]


def drawn(draw: Draw, count: int, key: Sequence[int]) -> Texts:
    """`count` texts and their answers; `key` seeds them."""
    rng = np.random.default_rng(list(key))
    pairs = [draw(rng) for _ in range(count)]
    return [text for text, _ in pairs], [answer for _, answer in pairs]


class Blind(InputPrompt):
    """ID-PT that is shown a blank in place of every text."""

    def rows(self, given: Given) -> list[list[int]]:
        return [[0] for _ in given.mask]


def run(settings: IdptLab, seed: int, desk: Desk) -> Outcome:
    world = World(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = Trainer(folder, settings, seed)
        backbone = language_model(world, trainer)
        encoder = str(save_encoder(world, trainer))
        desk.log(f"lab-idpt: the models are trained, {backbone.count_parameters():,} values")
        test = [drawn(world.asks(NEW, task), settings.test, (seed, 9, task)) for task in range(TASKS)]
        exam = Exam(backbone, ([x for texts, _ in test for x in texts], [y for _, answers in test for y in answers]))
        common: dict[str, Any] = {"length": settings.length, "seed": seed}
        shape: dict[str, Any] = {**common, "encoder_length": settings.encoder_length, "inner": settings.inner}
        makers: dict[str, Callable[[], Method]] = {
            "shared prompt": lambda: PromptTuning(backbone, **common),
            "blind generator": lambda: Blind(backbone, encoder=encoder, **shape),
            "id-pt": lambda: InputPrompt(backbone, encoder=encoder, **shape),
            "id-pt, own layers": lambda: InputPrompt(backbone, **shape),
        }
        scores, facts, curves = {}, {}, {}
        with frozen_guard(backbone):
            for arm, make in makers.items():
                rate = settings.prompt_rate if arm == "shared prompt" else settings.rate
                method, spent, curve = trainer.specialise(
                    backbone, make(), world.asks(SEEN), settings.steps, rate, exam
                )
                scores[arm], curves[arm] = {MEASURE: exam.scores(method)}, curve
                facts[arm] = {"trained values": method.count(backbone).trainable, "seconds": spent}
            scores["oracle prompts"], facts["oracle prompts"] = oracle(world, backbone, trainer, test)
            scores["frozen model alone"] = {MEASURE: exam.scores(None)}
    desk.log("lab-idpt: " + ", ".join(f"{arm} {np.mean(s[MEASURE]):.1f}" for arm, s in scores.items()))
    return Outcome(scores, facts, {"learning": curves})


def oracle(
    world: World, backbone: Backbone, trainer: "Trainer", test: Sequence[Texts]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """A prompt for each task, and its score on that task's texts. Each sees as many texts as a prompt for all."""
    settings, found, values, seconds = trainer.settings, list[float](), 0, 0.0
    for task, texts in enumerate(test):
        prompt = PromptTuning(backbone, length=settings.length, seed=trainer.seed)
        prompt, spent, _ = trainer.specialise(  # type: ignore[assignment]
            backbone,
            prompt,
            world.asks(SEEN, task),
            settings.steps,
            settings.prompt_rate,
            None,
        )
        found += Exam(backbone, texts).scores(prompt)
        values, seconds = values + prompt.count(backbone).trainable, seconds + spent
    return {MEASURE: found}, {"trained values": values, "seconds": seconds}


@dataclass(frozen=True, slots=True)
class Exam:
    """Texts with unseen cues: is the most probable word of all, behind the text, the answer?"""

    backbone: Backbone
    texts: Texts

    def scores(self, method: Method | None) -> list[float]:
        """100 or 0 a text."""
        if method is not None and not method.is_attached:
            method.attach(self.backbone)
        sources, answers = self.texts
        with torch.no_grad():
            said = self.backbone.forward(sources)[:, -1].argmax(-1).tolist()
        if method is not None:
            method.detach()
        return [100.0 * (word == answer) for word, answer in zip(said, answers, strict=True)]


class Trainer:
    """All trainings of a seed, by the one loop; files of it lie in `folder`."""

    def __init__(self, folder: Path, settings: IdptLab, seed: int) -> None:
        self.folder, self.settings, self.seed = folder, settings, seed
        self._runs = 0

    def fit(
        self,
        module: nn.Module,
        draw: Draw,
        loss: Callable[[list[list[int]], list[int]], torch.Tensor],
        steps: int,
        rate: float,
        evaluate: Callable[[], dict[str, float]] | None = None,
    ) -> list[dict[str, Any]]:
        """Train a module; batch i depends on the seed, the run's number and i."""
        self._runs += 1
        run = self._runs

        def batch(index: int) -> Texts:
            return drawn(draw, self.settings.batch, (self.seed, run, index))

        settings = FitSettings(
            steps=steps,
            learning_rates={"module": rate},
            autocast=False,
            seed=self.seed,
            log_every=steps // 10,
            evaluate_every=steps // 10 if evaluate else 0,
            checkpoint_seconds=1e9,
        )
        file = self.folder / f"run-{run}.safetensors"
        return fit({"module": module}, batch, lambda b: loss(*b), settings, checkpoint=file, evaluate=evaluate).curve

    def specialise(
        self, backbone: Backbone, method: Method, draw: Draw, steps: int, rate: float, exam: Exam | None
    ) -> tuple[Method, float, list[tuple[float, float]]]:
        """Train a method; with the seconds that it took, and, if there is an exam, its curve over texts seen."""
        method.attach(backbone)

        def loss(sources: list[list[int]], answers: list[int]) -> torch.Tensor:
            return backbone.loss(sources, [[answer] for answer in answers])

        examined = [0.0]

        def evaluate() -> dict[str, float]:
            assert exam is not None
            start = time.monotonic()
            found = exam.scores(method)
            method.attach(backbone)
            examined[0] += time.monotonic() - start
            return {MEASURE: float(np.mean(found))}

        curve = self.fit(method, draw, loss, steps, rate, evaluate if exam else None)
        method.detach()
        points = [(float(e["step"] * self.settings.batch), e[MEASURE]) for e in curve if MEASURE in e]
        return method, curve[-1]["seconds"] - examined[0], points


def language_model(world: World, trainer: Trainer) -> Backbone:
    """A Llama that answers where the task is named, frozen."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = trainer.settings
    config = LlamaConfig(
        vocab_size=len(world.words),
        hidden_size=settings.width,
        intermediate_size=2 * settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.seed)
        model = LlamaForCausalLM(config)
    backbone = Backbone("lab-idpt", "causal", model, world.tokenizer(), "")

    def loss(sources: list[list[int]], answers: list[int]) -> torch.Tensor:
        return backbone.loss(sources, [[answer] for answer in answers])

    def draw(rng: np.random.Generator) -> tuple[list[int], int]:
        return world.named(rng, settings.length + NAMED)

    trainer.fit(model, draw, loss, settings.model_steps, settings.model_rate)
    model.requires_grad_(False).eval()
    backbone.fingerprint = fingerprint(model)
    return backbone


def save_encoder(world: World, trainer: Trainer) -> Path:
    """A BERT that restores masked words in texts with cues (of seen pairs), saved as a model folder."""
    from transformers import BertConfig, BertForMaskedLM, BertModel

    settings = trainer.settings
    config = BertConfig(
        vocab_size=len(world.words),
        hidden_size=settings.encoder_width,
        intermediate_size=2 * settings.encoder_width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trainer.seed)
        model = BertForMaskedLM(config)
    blank = SPECIAL.index("[MASK]")

    def loss(sources: list[list[int]], _answers: list[int]) -> torch.Tensor:
        ids = torch.tensor(sources)
        hidden = torch.rand(ids.shape) < settings.masked  # `fit` seeds torch by the step
        logits = model(input_ids=ids.masked_fill(hidden, blank)).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids.masked_fill(~hidden, -100).flatten())

    trainer.fit(model, world.asks(SEEN), loss, settings.encoder_steps, settings.model_rate)
    whole = BertModel(config)  # with the pooler that such folders have; its values stand nowhere
    whole.load_state_dict(
        {**{k: torch.zeros_like(v) for k, v in whole.state_dict().items()}, **model.bert.state_dict()}
    )
    folder = trainer.folder / "encoder"
    with quiet_loading():
        whole.save_pretrained(folder)
    world.tokenizer().save_pretrained(folder)
    return folder
