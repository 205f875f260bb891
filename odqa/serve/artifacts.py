"""Registered artifacts on disk: soft prompts and saved methods, each user's in a folder that is theirs alone.

    artifacts/USER/NAME/VERSION/method.json, method.safetensors      as the prompt bank reads them
    artifacts/USER/NAME/current                                      the version that the name means

A version is written aside, synced and renamed; then `current` is replaced, which is one rename. So whenever the process
is killed, each name has its old or its new content, whole. What a killed process left aside goes at the next start.

A name is looked up among its user's own, so that nobody can name another's: whose a name is never comes from a request.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odqa.artifacts import save_file
from odqa.errors import ArtifactError
from odqa.frozen.method import DESCRIPTION, TENSORS
from odqa.serve.keys import NAME

if TYPE_CHECKING:
    import torch

FOLDER = "artifacts"
_CURRENT = "current"


@dataclass(frozen=True, slots=True)
class Registered:
    """One name of one user. `place` is its name in the prompt bank, `vectors` how much of the window it takes."""

    user: str
    name: str
    version: str
    kind: str
    vectors: int
    bytes: int
    made: int

    @property
    def place(self) -> str:
        return f"{self.user}/{self.name}/{self.version}"

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        del record["user"]
        return record


class Artifacts:
    """The artifacts below a server's folder. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], Registered] = {}
        for file in sorted(self.folder.glob(f"*/*/{_CURRENT}")):
            user, name = file.parts[-3:-1]
            self._known[user, name] = self._load(file)
            self._clear(self._known[user, name])

    def of(self, user: str) -> list[Registered]:
        """A user's own, by name."""
        with self._lock:
            return [self._known[key] for key in sorted(self._known) if key[0] == user]

    def find(self, user: str, name: str) -> Registered | None:
        with self._lock:
            return self._known.get((user, name))

    def save(
        self, user: str, name: str, description: dict[str, Any], tensors: "dict[str, torch.Tensor]", *, vectors: int
    ) -> Registered:
        """Register a method under a user's name, in the place of what had the name before. It is checked already."""
        from safetensors.torch import save

        assert NAME.fullmatch(user) and NAME.fullmatch(name)
        stored = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        said = json.dumps(description, indent=1, sort_keys=True) + "\n"
        version = hashlib.sha256(said.encode() + stored).hexdigest()[:16]
        made = Registered(user, name, version, str(description["kind"]), vectors, len(stored), int(time.time()))
        home = self.folder / user / name
        with self._lock:
            home.mkdir(parents=True, exist_ok=True)
            if not (home / version).is_dir():
                aside = home / f".{version}.partial"
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                _write(aside / TENSORS, stored)
                _write(aside / DESCRIPTION, said.encode())
                aside.rename(home / version)
            save_file(home / _CURRENT, json.dumps(made.to_json()) + "\n")
            for folder in (home, home.parent, self.folder):
                _sync_folder(folder)
            # A request that waits may still mean what the name meant until now.
            before = self._known.get((user, name), made)
            self._known[user, name] = made
            self._clear(made, before)
        return made

    def delete(self, user: str, name: str) -> bool:
        """Forget a name; False if the user has none such."""
        with self._lock:
            if self._known.pop((user, name), None) is None:
                return False
            home = self.folder / user / name
            (home / _CURRENT).unlink()
            _sync_folder(home)
            shutil.rmtree(home)
            return True

    def _clear(self, *kept: Registered) -> None:
        """Remove all other versions of a name; rows that are computed with one have it in memory."""
        versions = {registered.version for registered in kept}
        for path in (self.folder / kept[0].user / kept[0].name).iterdir():
            if path.is_dir() and path.name not in versions:
                shutil.rmtree(path)

    def _load(self, file: Path) -> Registered:
        user, name = file.parts[-3:-1]
        try:
            registered = Registered(user=user, **json.loads(file.read_text(encoding="utf-8")))
            if registered.name == name and (file.parent / registered.version / DESCRIPTION).is_file():
                return registered
        except (ValueError, TypeError):
            pass
        raise ArtifactError(
            f"{file}: expected the record of a registered artifact. Delete {file.parent}, or restore it."
        )


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
