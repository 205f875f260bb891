"""Artifacts: folders that are either finished and described by their manifest, or not there.

Work happens in a hidden sibling folder (`.NAME.partial`); files are fsynced, hashed into `manifest.json`, which is
written last, and the folder is renamed. A killed job leaves its partial folder; the next run with the same recipe and
inputs continues in it and skips every file that is marked done. After a kill and a resume every data file has the same
sha256 as without; the manifest differs in `measured` only.

Formats: safetensors, Arrow, npy without pickle, JSON. This module knows none of them: it moves bytes and hashes.
"""

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import odqa
from odqa.errors import ArtifactError, ArtifactMismatch

MANIFEST = "manifest.json"
_STATE = "partial.json"  # in a partial folder: the identity of the job, and seconds spent in earlier tries


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes, read in blocks of 1 MiB."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: object) -> str:
    """Hex sha256 of a JSON value in canonical form (sorted keys, no blanks): the hash of recipes and identities."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact: its folder and its manifest."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def hash(self) -> str:
        """Identity of the content: sha256 over kind, recipe, inputs and the files' hashes (not `measured`)."""
        return sha256_json({key: self.manifest[key] for key in ("kind", "recipe", "inputs", "files")})


def load_artifact(path: Path, kind: str | None = None, *, verify: bool = False) -> Artifact:
    """Open a finished artifact and check that its files are there with the sizes the manifest gives.

    `verify` also compares every sha256 (reads all bytes). Raises ArtifactError for a folder that is missing, unfinished
    or damaged, ArtifactMismatch for one of another kind.
    """
    path = Path(path)
    manifest_file = path / MANIFEST
    if not manifest_file.is_file():
        hint = (
            " A partial one is beside it: run the same command again to finish it."
            if partial_path(path).is_dir()
            else ""
        )
        raise ArtifactError(f"{path}: no finished artifact here ({MANIFEST} is missing).{hint}")
    try:
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        found = manifest["kind"]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{manifest_file}: not a manifest of odqa ({error!r}). Build the artifact again."
        ) from error
    if kind is not None and found != kind:
        raise ArtifactMismatch(f"{path}: this is an artifact of kind {found!r}; {kind!r} is needed here.")
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file() or file.stat().st_size != size:
            state = f"has {file.stat().st_size} bytes" if file.is_file() else "is missing"
            raise ArtifactError(f"{path}: {name} {state}, the manifest says {size} bytes. Build the artifact again.")
        if verify and sha256_file(file) != digest:
            raise ArtifactError(
                f"{path}: {name} is damaged (its sha256 is not the manifest's). Build the artifact again."
            )
    return Artifact(path, manifest)


@dataclass(slots=True)
class Draft:
    """An artifact under construction. Write files through `part`, so that a resumed job skips the finished ones."""

    path: Path
    counts: dict[str, int] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """`counts`, `measured` (may differ between runs) and `extra` (must not) go into the manifest."""

    def has(self, name: str) -> bool:
        """Whether the file `name` was finished by this or an earlier try."""
        return (self.path / name).exists()

    def part(self, name: str, write: Callable[[Path], None]) -> Path:
        """Make the file or folder `name` once: `write` gets a temporary path, synced and renamed afterwards."""
        target = self.path / name
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.tmp")
        _remove(temporary)
        write(temporary)
        _sync(temporary)
        temporary.rename(target)
        _sync_folder(target.parent)
        return target

    def write_json(self, name: str, value: object) -> Path:
        """`part` for a small JSON value."""
        text = json.dumps(value, ensure_ascii=False, indent=1, sort_keys=True) + "\n"
        return self.part(name, lambda path: _write_text(path, text))


@contextlib.contextmanager
def building(
    path: Path,
    kind: str,
    *,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, Any],
    scratch: tuple[str, ...] = (),
    unlisted: tuple[str, ...] = (),
) -> Iterator[Draft]:
    """Build the artifact `path`: yields a Draft, and finishes it when the block ends without an error.

    `recipe` is the resolved recipe; `inputs` identifies what was read (names and sha256). A partial folder of the same
    kind, recipe and inputs is continued, one of any other identity is thrown away. Names in `scratch` (files or folders
    inside the draft) are working state and are removed once the manifest is written; those in `unlisted` stay, but the
    manifest does not list them, because they may differ between equal artifacts. A finished artifact of this kind
    that already bears the name is replaced only when the new one is complete; anything else there is refused at once.
    """
    path = Path(path)
    _check_place(path, kind)
    identity = sha256_json({"kind": kind, "recipe": recipe, "inputs": inputs, "odqa": odqa.__version__})
    partial = partial_path(path)
    spent = _enter_partial(partial, identity)
    started = time.monotonic()
    draft = Draft(partial)
    try:
        yield draft
    except BaseException:
        _save_state(partial, identity, spent + time.monotonic() - started)
        raise
    for leftover in [*partial.rglob(".*.tmp")]:  # half-written files of a try that was killed
        _remove(leftover)
    hidden = (*scratch, *unlisted, _STATE, MANIFEST)
    files = {
        name: {"bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for file in sorted(partial.rglob("*"))
        if file.is_file() and not _is_below(name := file.relative_to(partial).as_posix(), hidden)
    }
    manifest = {
        "kind": kind,
        "odqa": odqa.__version__,
        "recipe": recipe,
        "recipe_hash": sha256_json(recipe),
        "inputs": inputs,
        "files": files,
        "counts": draft.counts,
        **draft.extra,
        "measured": {"seconds": round(spent + time.monotonic() - started, 3), **draft.measured},
    }
    _sync(partial)
    _write_text(partial / MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1) + "\n")
    _sync(partial / MANIFEST)
    # Only now: a try that is killed while it hashes gigabytes still has its working state.
    for name in (*scratch, _STATE):
        _remove(partial / name)
    _replace(partial, path)


def partial_path(path: Path) -> Path:
    """Where an unfinished artifact lies: a hidden folder beside its final name."""
    return path.parent / f".{path.name}.partial"


def _enter_partial(partial: Path, identity: str) -> float:
    """Make or continue the partial folder; returns the seconds that earlier tries of the same job spent."""
    state_file = partial / _STATE
    if state_file.is_file():
        with contextlib.suppress(json.JSONDecodeError):
            state = json.loads(state_file.read_text(encoding="utf-8"))
            if state.get("identity") == identity:
                return float(state.get("seconds", 0.0))
    _remove(partial)
    partial.mkdir(parents=True)
    _save_state(partial, identity, 0.0)
    return 0.0


def _save_state(partial: Path, identity: str, seconds: float) -> None:
    temporary = partial / f".{_STATE}.tmp"
    _write_text(temporary, json.dumps({"identity": identity, "seconds": seconds}))
    _sync(temporary)
    temporary.rename(partial / _STATE)


def _check_place(path: Path, kind: str) -> None:
    """Refuse to put an artifact where something else lies: a file, a folder of another kind or of no kind."""
    what = "a file"
    if path.is_dir():
        what = "a folder that odqa did not make" if any(path.iterdir()) else ""
    if (path / MANIFEST).is_file():
        what = ""
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged artifact is built again
            found = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["kind"]
            what = f"an artifact of kind {found!r}" if found != kind else ""
    if what and path.exists():
        raise ArtifactError(f"{path}: {what} is in the way of the {kind} to be made here. Choose another --out.")


def _is_below(name: str, folders: tuple[str, ...]) -> bool:
    return any(name == folder or name.startswith(f"{folder}/") for folder in folders)


def _replace(partial: Path, path: Path) -> None:
    """Put the finished folder in place; an older artifact of that name makes room only now."""
    if path.exists():
        outgoing = path.parent / f".{path.name}.old"
        _remove(outgoing)
        path.rename(outgoing)
        partial.rename(path)
        _remove(outgoing)
    else:
        partial.rename(path)
    _sync_folder(path.parent)


def save_file(file: Path, text: str) -> None:
    """Write a small file outside of an artifact so that it is there whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    _write_text(temporary, text)
    _sync(temporary)
    temporary.replace(file)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """fsync a file, or every file below a folder."""
    for file in [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
