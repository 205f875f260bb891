"""Makes `transformers`' Auto classes know odqa-mini once `odqa` is imported, without loading `transformers` for it.

A finder waits for the module with the table of configurations and registers ours right after it was executed; if it was
loaded before, it is told at once. The configuration registers the model when one is made: every way to the model leads
over it, and by then nothing of `transformers` is half imported. Standard library only.
"""

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_TABLE = "transformers.models.auto.configuration_auto"


def install() -> None:
    """Register odqa-mini now if `transformers` is loaded, else as soon as it is."""
    if _TABLE in sys.modules:
        register_configuration()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register_configuration() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from odqa.lm.configuration import OdqaMiniConfig

    AutoConfig.register(OdqaMiniConfig.model_type, OdqaMiniConfig, exist_ok=True)


def register_model() -> None:
    from transformers import AutoModelForSeq2SeqLM

    from odqa.lm.configuration import OdqaMiniConfig
    from odqa.lm.mini import OdqaMiniForConditionalGeneration

    AutoModelForSeq2SeqLM.register(OdqaMiniConfig, OdqaMiniForConditionalGeneration, exist_ok=True)


class _Finder(MetaPathFinder):
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TABLE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Does what the module's own loader does, then registers."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        register_configuration()
