"""Who may import whom (DESIGN, section 3), read from the syntax tree of every module; and what a start may load."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "odqa"

VALUES = {"types", "errors"}
GROUND = {"text", "sentences", "corpus", "artifacts", "runtime", "models"}
STAGES = {"retrieve", "rerank", "pack", "read", "recurse"}
STAGE = VALUES | GROUND | {"stages"}
MODELS = {"retrieve", "rerank", "read", "recurse"}  # stages whose models can have a method

# Part of the package: the parts that it may import, besides itself and `odqa` (the version).
ALLOWED = {
    "types": set[str](),
    "errors": set[str](),
    "stages": {"types"},
    **dict.fromkeys(GROUND, VALUES | GROUND),
    **dict.fromkeys(STAGES, STAGE),
    **dict.fromkeys(MODELS, STAGE | {"frozen"}),
    "frozen": {"errors", "artifacts", "runtime", "models"},
    "lm": VALUES | GROUND | {"frozen"},
    "pipeline": {"types", "stages"},
    "runs": VALUES | {"artifacts", "runtime"},
    "interchange": VALUES | {"text", "corpus"},
    "replay": VALUES | {"artifacts", "corpus", "runs"},
    "evaluate": VALUES | {"text"},
    "report": VALUES | {"text", "evaluate"},
    "config": {"errors", "evaluate"},
    "figures": {"errors", "evaluate"},
}
HEAVY = {"torch", "transformers", "faiss", "sentence_transformers", "datasets", "numba", "bm25s", "peft", "safetensors"}
HEAVY |= {"matplotlib"}
FREE = {
    "recipes",
    "jobs",
    "doctor",
    "training",
    "foreign",
    "cli",
    "labs",
    "serve",
    "__init__",
}  # they put the parts together
MODULES = sorted(PACKAGE.rglob("*.py"))


def part_of(module: Path) -> str:
    """The first name below odqa: "read" for odqa/read/span.py, "types" for odqa/types.py."""
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(module: Path, *, at_start: bool = False) -> Iterator[str]:
    """Full names of all that a module imports, type-checking and lazy imports included.

    `at_start`: only what runs when the module itself is imported.
    """
    tree = ast.parse(module.read_text(encoding="utf-8"))
    nodes = _at_start(tree) if at_start else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _at_start(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from _at_start(child)


def own_parts(module: Path) -> set[str]:
    """The parts of odqa that a module imports."""
    return {name.split(".")[1] for name in imports(module) if name.startswith("odqa.")} - {"__version__"}


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_module_imports_only_what_its_part_may_know(module: Path) -> None:
    part = part_of(module)
    if part in FREE:
        return
    assert part in ALLOWED, f"{part} is a new part: say here what it may import"
    assert own_parts(module) <= ALLOWED[part] | {part}


def test_no_part_below_knows_recipes_jobs_or_the_command_line() -> None:
    for module in MODULES:
        if part_of(module) not in FREE:
            assert not own_parts(module) & FREE, module


def test_sibling_stages_do_not_import_each_other() -> None:
    for module in MODULES:
        if part_of(module) in STAGES:
            assert own_parts(module) & STAGES <= {part_of(module)}, module


def test_frozen_knows_no_passage() -> None:
    for module in (PACKAGE / "frozen").glob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(module.read_text())) if isinstance(node, ast.Name)}
        assert not names & {"Passage", "Query", "Gold", "Hit", "PackedContext"}, module
        assert not own_parts(module) & {"types", "retrieve", "read", "corpus"}, module


def test_stages_and_pipelines_know_no_gold_answer() -> None:
    """Training does, in odqa.*.train and odqa.read.adapt, and evaluation: both are outside of a pipeline's way."""
    for module in MODULES:
        if part_of(module) in STAGES | {"pipeline", "stages"} and module.stem not in ("train", "adapt"):
            assert not {"odqa.types.Gold", "odqa.evaluate"} & set(imports(module)), module


def test_values_need_the_standard_library_only() -> None:
    for name in ("types", "errors", "stages"):
        outside = {found.split(".")[0] for found in imports(PACKAGE / f"{name}.py")} - {"odqa"}
        assert outside <= sys.stdlib_module_names


def test_evaluation_and_report_import_no_model_library() -> None:
    light = [PACKAGE / f"{name}.py" for name in ("runs", "text", "pipeline")]
    folders = (module for name in ("evaluate", "report", "config") for module in (PACKAGE / name).glob("*.py"))
    for module in (*light, *folders):
        assert not {found.split(".")[0] for found in imports(module)} & HEAVY, module


@pytest.mark.parametrize(
    "name", ["recipes", "jobs", "doctor", "foreign", "cli", "runtime", "artifacts", "figures", "pack/greedy"]
)
def test_what_every_command_loads_imports_model_libraries_late(name: str) -> None:
    module = PACKAGE / f"{name}.py"
    found = set(imports(module, at_start=True))
    assert not {item.split(".")[0] for item in found} & HEAVY
    parts = {item.split(".")[1] for item in found if item.startswith("odqa.")} - {part_of(module)}
    assert not parts & (STAGES | {"frozen"})


def test_nothing_in_the_package_imports_scripts_or_tests() -> None:
    for module in MODULES:
        assert not {name.split(".")[0] for name in imports(module)} & {"scripts", "tests"}, module


# --- what a start loads -----------------------------------------------------------------------------------------------

_CHECK = """
import contextlib, io, sys
sys.argv = {argv!r}
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    import odqa
    if len(sys.argv) > 1:
        from odqa.cli import main
        main()
heavy = {heavy!r}
sys.exit(", ".join(sorted(name for name in heavy if name in sys.modules)) or 0)
"""


@pytest.mark.parametrize(
    "argv",
    [[], ["--help"], ["check", "pipelines/nq-mini.yaml"], ["check", "eval/embedded.yaml", "--json"], ["ask", "--help"]],
    ids=lambda argv: " ".join(argv) or "import odqa",
)
def test_a_light_command_loads_no_model_library(argv: list[str]) -> None:
    code = _CHECK.format(argv=["odqa", *argv], heavy=sorted(HEAVY))
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_bm25_alone_loads_neither_torch_nor_faiss() -> None:
    code = _CHECK.format(argv=["odqa"], heavy=["torch", "transformers", "faiss"])
    code = code.replace("import odqa\n", "import odqa.retrieve.index, odqa.corpus.mediawiki, odqa.jobs\n", 1)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
