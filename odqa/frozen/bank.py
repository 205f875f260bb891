"""The prompt bank: one frozen model, many users, each row of a batch with its own user's method.

    bank = Bank(backbone, Path("users"))             # users/anna/method.json, users/law/ben/method.json, ...
    bank.generate([Row(ids, "anna"), Row(ids, "law/ben"), Row(ids)], max_new_tokens=16)

A user's method is a folder as `Method.save` or PEFT writes it, of any kind that `odqa.frozen.mixture` knows. Thousands
may lie on disk; in memory are those used last, up to a number of bytes. What a row gets does not depend on its
neighbours, their order or the padding: greedily, with beams, or sampled with a generator of its own. Li & Liang 2021
(arXiv 2101.00190, section 8) name this use; how rows are kept apart: `odqa.frozen.mixture`.

It knows token ids and names. It does not order, split or wait for rows: what is given is one batch.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from odqa.errors import ArtifactError, DataError, OdqaError
from odqa.frozen import method as saved
from odqa.frozen import peft_format as peft
from odqa.frozen.backbone import Backbone
from odqa.frozen.method import Method, read_method
from odqa.frozen.mixture import NOTHING, Mixture, Parts, Workshop

_NAMED = 8  # our choice: how many known names an error shows

Stamp = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Row:
    """A text to go on from, and the name of the method that it is read with; None: by the frozen model as it is."""

    ids: Sequence[int]
    method: str | None = None


@dataclass(frozen=True, slots=True)
class _Kept:
    parts: Parts
    stamp: Stamp


class Bank:
    """Methods by name, for rows of one batch.

    `folder` holds one folder a name, at any depth; files that have changed are read again. `keep_bytes` bounds what is
    kept in memory besides the rows being computed (1 GiB, our choice); methods that are `add`ed do not count.
    """

    def __init__(self, backbone: Backbone, folder: Path | None = None, *, keep_bytes: int = 1 << 30) -> None:
        if folder is not None and not folder.is_dir():
            raise DataError(f"bank {folder}: no such folder.")
        self.backbone, self.folder, self.keep_bytes = backbone, folder, keep_bytes
        self.workshop = Workshop(backbone)
        self._added: dict[str, Parts] = {}
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the one used last at the end
        self.kept_bytes = 0

    def add(self, name: str, method: Method) -> None:
        """Let `name` stand for a method as it is now; goes before a folder of that name. Raises as `parts` does."""
        method._check_backbone(self.backbone)
        self._added[name] = self._of_method(method, name)

    def names(self) -> list[str]:
        """All known names in order; walks through the folder."""
        found = set(self._added)
        if self.folder is not None:
            for file in (saved.DESCRIPTION, peft.CONFIG):
                found |= {path.parent.relative_to(self.folder).as_posix() for path in self.folder.rglob(file)}
        return sorted(found - {"."})

    @property
    def kept(self) -> list[str]:
        """Names of the methods of the folder that are in memory, the one used last at the end."""
        return list(self._kept)

    def parts(self, name: str | None) -> Parts:
        """What a name puts into a row, from memory or disk.

        Raises ArtifactError for a name that is not known, a damaged folder or a kind that cannot be mixed,
        ArtifactMismatch for a method of another backbone.
        """
        if name is None:
            return NOTHING
        if name in self._added:
            return self._added[name]
        folder = self._find(name)
        stamp = _stamp(folder)
        known = self._kept.pop(name, None)
        if known is not None:
            self.kept_bytes -= known.parts.bytes
        parts = known.parts if known is not None and known.stamp == stamp else self._load(folder)
        self._keep(name, _Kept(parts, stamp))
        return parts

    def mix(self, names: Sequence[str | None]) -> Mixture:
        """The rows of a batch, to compute with as often as they stay the same; see `Mixture.attached`.

        Raises as `parts` does, with the number of the row.
        """
        return Mixture(self.workshop, [self._row(number, name) for number, name in enumerate(names)])

    @contextmanager
    def attached(self, names: Sequence[str | None]) -> Iterator[None]:
        """Inside the block row r of each batch that the backbone computes has the method names[r]."""
        with self.mix(names).attached():
            yield

    def generate(
        self,
        rows: Sequence[Row],
        *,
        max_new_tokens: int,
        generators: Sequence[torch.Generator] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        on_error: Literal["raise", "return"] = "raise",
        **options: Any,
    ) -> list[list[int] | OdqaError]:
        """New tokens of each row, its end token included where it came.

        Greedy; with `generators`, one a row, sampled from the softmax of the logits, after `temperature`, `top_k` and
        `top_p` (0 and 1.0 switch the latter two off); a generator moves on as far as if its row were alone. `options`
        go to the model's `generate` (num_beams, length_penalty, use_cache, ...).

        A row that cannot be computed (an unknown name, a method of another backbone, no room in the window for its
        prompt, its text and `max_new_tokens`) raises an error that names it, or with `on_error` "return" stands as that
        error in the result, while the others are computed. Raises ValueError for options that contradict each other.
        """
        _check_options(rows, generators, options)
        found = self._fit(rows, max_new_tokens, is_patient=on_error == "return")
        going = [number for number, parts in enumerate(found) if isinstance(parts, Parts)]
        results: list[list[int] | OdqaError] = [one if isinstance(one, OdqaError) else [] for one in found]
        if not going:
            return results
        if generators is not None:
            ends = self.backbone.end_tokens(options.get("eos_token_id"))
            noise = _RowNoise([generators[number] for number in going], ends)
            options["logits_processor"] = LogitsProcessorList([*_warpers(temperature, top_k, top_p), noise])
        with Mixture(self.workshop, [parts for parts in found if isinstance(parts, Parts)]).attached():
            written = self.backbone.generate(
                [rows[number].ids for number in going], max_new_tokens=max_new_tokens, do_sample=False, **options
            )
        for number, tokens in zip(going, written, strict=True):
            results[number] = tokens
        return results

    def _fit(self, rows: Sequence[Row], new: int, *, is_patient: bool) -> list[Parts | OdqaError]:
        """The parts of each row, or with `is_patient` its error."""
        found: list[Parts | OdqaError] = []
        for number, row in enumerate(rows):
            try:
                parts = self._row(number, row.method)
                self._check_room(number, row, parts, new)
                found.append(parts)
            except OdqaError as error:
                if not is_patient:
                    raise
                found.append(error)
        return found

    def _row(self, number: int, name: str | None) -> Parts:
        try:
            return self.parts(name)
        except OdqaError as error:
            raise type(error)(f"row {number}: {error}") from error

    def _check_room(self, number: int, row: Row, parts: Parts, new: int) -> None:
        window, is_causal = self.backbone.window, self.backbone.architecture == "causal"
        who = f"row {number}" + (f" ({row.method})" if row.method else "")
        if not len(row.ids):
            raise DataError(f"{who}: its text has no tokens.")
        needs = {"text": len(row.ids), **({"prompt": parts.moved, "new": new} if is_causal else {})}
        if window is not None and sum(needs.values()) > window:
            raise DataError(
                f"{who} needs {sum(needs.values())} tokens ({', '.join(f'{of} {n}' for of, n in needs.items())}); "
                f"{self.backbone.name} has a window of {window}. Shorten one of them."
            )

    def _find(self, name: str) -> Path:
        path = PurePosixPath(name)
        if self.folder is not None and path.parts and not path.is_absolute() and ".." not in path.parts:
            folder = self.folder / path
            if (folder / saved.DESCRIPTION).is_file() or (folder / peft.CONFIG).is_file():
                return folder
        known = self.names()
        shown = ", ".join(known[:_NAMED]) + (f" and {len(known) - _NAMED} more" if len(known) > _NAMED else "")
        raise ArtifactError(f"the bank knows no {name!r}; it has {shown or 'no methods'}.")

    def _load(self, folder: Path) -> Parts:
        if not (folder / saved.DESCRIPTION).is_file():
            return self._of_method(peft.load_peft(folder, self.backbone), str(folder))
        description, tensors = read_method(folder, self.backbone)
        return self.workshop.make(description["kind"], description["settings"], tensors, str(folder))

    def _of_method(self, method: Method, where: str) -> Parts:
        return self.workshop.make(method.kind, method.saved_settings(), method.saved_tensors(), where)

    def _keep(self, name: str, kept: _Kept) -> None:
        self._kept[name] = kept
        self.kept_bytes += kept.parts.bytes
        while self.kept_bytes > self.keep_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.kept_bytes -= oldest.parts.bytes


def _stamp(folder: Path) -> Stamp:
    """Time and size of a method's files: another one where they were written anew."""
    names = (saved.DESCRIPTION, saved.TENSORS, peft.CONFIG, peft.TENSORS)
    stats = [file.stat() for name in names if (file := folder / name).is_file()]
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)


def _check_options(rows: Sequence[Row], generators: Sequence[torch.Generator] | None, options: dict[str, Any]) -> None:
    if options.get("do_sample") or "num_return_sequences" in options:
        raise ValueError("generate: give generators to sample, and a row several times for several texts")
    if generators is not None and (len(generators) != len(rows) or options.get("num_beams", 1) > 1):
        raise ValueError("generate: sampling needs a generator for each row, and has no beams")


def _warpers(temperature: float, top_k: int, top_p: float) -> list[LogitsProcessor]:
    warpers: list[LogitsProcessor] = [] if temperature == 1.0 else [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    return [*warpers, TopPLogitsWarper(top_p)] if top_p < 1.0 else warpers


class _RowNoise(LogitsProcessor):  # type: ignore[misc]
    """Adds Gumbel noise to each row's logits from its own generator: the largest sum is a sample of the softmax.

    A row that has ended draws nothing more. Source: Maddison et al. 2014 (arXiv 1411.0030), section 2.
    """

    def __init__(self, generators: Sequence[torch.Generator], ends: frozenset[int]) -> None:
        self._generators, self._ends = generators, ends
        self._start: int | None = None
        self._going = [True] * len(generators)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._start is None:
            self._start = input_ids.shape[1]
        elif self._ends:
            last = input_ids[:, -1].tolist()
            self._going = [on and token not in self._ends for on, token in zip(self._going, last, strict=True)]
        noisy = scores.clone()
        for row, (generator, is_going) in enumerate(zip(self._generators, self._going, strict=True)):
            if is_going:
                drawn = torch.empty(scores.shape[-1], device=generator.device).exponential_(generator=generator)
                noisy[row] -= drawn.log().to(scores)
        return noisy
