"""A prompt in use: its versions, what users mark right or wrong, and a tuning that goes on meanwhile.

    prompt = PromptInUse.create(Path("users/alice/news"), engine, engine.embed(ids))
    prompt.mark("the question as it was asked", " its answer", is_right=True)
    prompt.tune(settings)        # a new version is in use only if it wins on marks that it never saw
    prompt.roll_back()           # and the one before is in use again

The folder has `versions/N` (each a saved method of kind prompt-tuning, which the bank can serve by name), `current` (a
link to one of them, changed in one step), `marks.jsonl` and `history.jsonl`. Versions are never changed or removed.

A mark belongs to one of three sides for ever, by the hash of its text: half teach, a quarter chooses among the prompts
of a search, a quarter judges the chosen one against the one in use. One process changes a folder at a time.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.frozen.blackbox import Floats, Quality, SearchSettings, SoftPrompt, check_engine, search
from odqa.frozen.engine import Engine, Prompted, Vectors

Side = Literal["teach", "choose", "judge"]
_SIDES: tuple[Side, ...] = ("teach", "teach", "choose", "judge")
_LEAST = 8  # marks of each side; our choice
_RESAMPLES = 2000
_ALMOST_SURE = 1 - 1e-6  # a wrong answer as likely as this costs 14 nats, and no more


@dataclass(frozen=True, slots=True)
class Mark:
    """A text as the model got it, an answer as it follows it, what a user says of it, and the version that wrote it."""

    text: str
    answer: str
    is_right: bool
    version: int = 0

    @property
    def side(self) -> Side:
        return _SIDES[hashlib.sha256(self.text.encode()).digest()[0] % len(_SIDES)]


@dataclass(frozen=True, slots=True)
class Decision:
    """What a tuning ended with. `promoted`: the new version's number, or None, and then the old one is in use.

    `before` and `after`: mean losses in nats on the judging marks; `gain` their paired difference, at least `low` with
    95% certainty (bootstrap over marks).
    """

    version: int
    promoted: int | None
    before: float
    after: float
    gain: float
    low: float
    marks: int
    calls: int


class Marked:
    """What users said of answers, as an objective: right ones are to be likely, wrong ones unlikely.

    Loss of a right answer: -m, of a wrong one: -log(1 - exp(m)), m being its mean log-probability a token. Source of
    the second: Welleck et al. 2019 (arXiv 1908.04319), eq. 4, by token there, by answer here (our choice).
    """

    def __init__(self, engine: Engine, teach: Sequence[Mark], choose: Sequence[Mark]) -> None:
        check_engine(engine)
        self.engine, self.teach, self.choose, self.rows = engine, teach, choose, len(teach)

    def losses(self, prompts: Sequence[SoftPrompt], generation: int) -> Floats:
        return np.array(self.of_marks(prompts, self.teach).mean(1))

    def qualities(self, prompts: Sequence[SoftPrompt]) -> list[Quality]:
        return [(-float(loss),) for loss in self.of_marks(prompts, self.choose).mean(1)]

    def sources(self) -> Sequence[Prompted]:
        return [Prompted(mark.text) for mark in self.teach]

    def of_marks(self, prompts: Sequence[SoftPrompt], marks: Sequence[Mark]) -> Floats:
        """(prompts, marks) losses in nats."""
        rows = [prompt.before(Prompted(mark.text)) for prompt in prompts for mark in marks]
        targets = self.engine.tokens([mark.answer for mark in marks])
        scores = self.engine.score(rows, targets * len(prompts))
        means = np.array([np.mean(values) for values in scores], dtype=np.float64).reshape(len(prompts), len(marks))
        is_right = np.array([mark.is_right for mark in marks])
        return np.where(is_right, -means, -np.log1p(-np.minimum(np.exp(means), _ALMOST_SURE)))


class PromptInUse:
    """The prompt in `folder`. Raises ArtifactError for a folder that holds none, ArtifactMismatch for the prompt of
    another model than the engine's."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        if not (folder / "current").is_dir():
            raise ArtifactError(f"{folder}: no prompt in use here. Begin one with PromptInUse.create.")
        self.folder, self.engine = folder, engine
        self.load(self.version)

    @classmethod
    def create(cls, folder: Path, engine: Engine, start: Vectors) -> "PromptInUse":
        """Begin with a prompt (P, D), such as a provider's own. Raises DataError if the folder holds one already."""
        if (folder / "current").exists():
            raise DataError(f"{folder}: a prompt is in use here already. Open it, or choose another folder.")
        (folder / "versions").mkdir(parents=True, exist_ok=True)
        _save(folder / "versions" / "1", start, engine)
        _point(folder, 1)
        prompt = cls(folder, engine)
        prompt._note({"event": "begun", "version": 1})
        return prompt

    @property
    def version(self) -> int:
        """The number of the version in use."""
        return int((self.folder / "current").resolve().name)

    @property
    def prompt(self) -> SoftPrompt:
        return SoftPrompt(self.load(self.version))

    def load(self, version: int) -> Vectors:
        """The vectors (P, D) of a version."""
        folder = self.folder / "versions" / str(version)
        try:
            description = json.loads((folder / "method.json").read_text(encoding="utf-8"))
            vectors: Vectors = load_file(folder / "method.safetensors")["prompt"].astype(np.float32)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ArtifactError(f"{folder}: a damaged version ({error}).") from error
        if description.get("backbone") != _model(self.engine):
            raise ArtifactMismatch(
                f"{folder}: a prompt for the model {str(description.get('backbone'))[:8]}; the engine has "
                f"{_model(self.engine)[:8]}. Use that model or begin a new prompt."
            )
        return vectors

    # --- what users say ---

    def mark(self, text: str, answer: str, *, is_right: bool) -> None:
        """Note what a user says of an answer of the version in use. Raises DataError for an answer without tokens."""
        if not text or not self.engine.tokens([answer])[0]:
            raise DataError(f"{self.folder}: a mark needs a text and an answer (found: {text!r}, {answer!r}).")
        _append(self.folder / "marks.jsonl", asdict(Mark(text, answer, is_right, self.version)))

    def marks(self, side: Side | None = None) -> list[Mark]:
        """All marks, or those of a side, in the order in which they came; of equal ones the last."""
        path = self.folder / "marks.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        found: dict[tuple[str, str], Mark] = {}
        for number, line in enumerate(lines, start=1):
            try:
                one = Mark(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise DataError(f"{path}:{number}: not a mark ({error}). Remove the line.") from error
            found.pop((one.text, one.answer), None)
            found[one.text, one.answer] = one
        return [one for one in found.values() if side in (None, one.side)]

    # --- versions ---

    def tune(self, settings: SearchSettings) -> Decision:
        """Search on from the version in use, and use what is found if it wins on the judging marks.

        It wins if the 95% interval of the paired difference is above 0. A killed tuning goes on if no mark came since.
        Raises DataError where one side has fewer than eight marks.
        """
        if settings.deep:
            raise DataError(f"{self.folder}: deep prompts cannot be kept as versions. Set deep: false.")
        sides = {side: self.marks(side) for side in ("teach", "choose", "judge")}
        for side, marks in sides.items():
            if len(marks) < _LEAST:
                raise DataError(
                    f"{self.folder}: {len(marks)} marks to {side} by, at least {_LEAST} are needed "
                    f"({sum(map(len, sides.values()))} in all). Collect more."
                )
        version, count = self.version, sum(map(len, sides.values()))
        task = Marked(self.engine, sides["teach"], sides["choose"])
        journal = self.folder / f"tuning-{version}-{count}-{settings.seed}.jsonl"
        result = search(self.engine, task, self.load(version), settings, journal=journal)
        before, after = task.of_marks([self.prompt, result.best], sides["judge"])
        gain, low = float((before - after).mean()), _lowest_gain(before - after)
        promoted = self._promote(result.best.words, version) if low > 0 else None
        decision = Decision(
            version, promoted, float(before.mean()), float(after.mean()), gain, low, count, result.calls
        )
        self._note({"event": "promoted" if promoted else "refused", **asdict(decision)})
        journal.unlink(missing_ok=True)
        return decision

    def roll_back(self) -> int:
        """Use the version again that the one in use was tuned from; returns its number. DataError at the first one."""
        version = self.version
        parent = next((event["version"] for event in self.history() if event.get("promoted") == version), None)
        if parent is None:
            raise DataError(f"{self.folder}: version {version} is the first one; there is none before it.")
        _point(self.folder, int(parent))
        self._note({"event": "rolled back", "version": version, "to": parent})
        return int(parent)

    def history(self) -> list[dict[str, Any]]:
        """All that happened: begun, promoted, refused, rolled back, with its numbers and time (seconds since 1970)."""
        lines = (self.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def _promote(self, vectors: Vectors, parent: int) -> int:
        known = [int(folder.name) for folder in (self.folder / "versions").iterdir() if folder.name.isdigit()]
        number = max([*known, parent]) + 1
        _save(self.folder / "versions" / str(number), vectors, self.engine)
        _point(self.folder, number)
        return number

    def _note(self, event: dict[str, Any]) -> None:
        _append(self.folder / "history.jsonl", {**event, "time": round(time.time(), 3)})


def _save(folder: Path, vectors: Vectors, engine: Engine) -> None:
    """As `Method.save` writes a prompt of prompt tuning; under a hidden name until it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(exist_ok=True)
    save_file({"prompt": np.ascontiguousarray(vectors, dtype=np.float32)}, partial / "method.safetensors")
    settings = {"length": len(vectors), "start": "vocabulary", "text": None, "seed": 0}
    description = {"kind": "prompt-tuning", "settings": settings, "backbone": _model(engine)}
    (partial / "method.json").write_text(json.dumps(description, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    partial.rename(folder)


def _point(folder: Path, version: int) -> None:
    """Let `current` be that version, in one step."""
    link = folder / ".current"
    link.unlink(missing_ok=True)
    link.symlink_to(Path("versions") / str(version), target_is_directory=True)
    link.replace(folder / "current")


def _model(engine: Engine) -> str:
    return engine.facts.fingerprint or engine.facts.model


def _append(path: Path, record: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _lowest_gain(gains: Floats) -> float:
    """The 2.5th percentile of the bootstrap means of paired gains."""
    drawn = np.random.default_rng(0).integers(len(gains), size=(_RESAMPLES, len(gains)))
    return float(np.percentile(gains[drawn].mean(1), 2.5))
