"""The documentation says what is there: generated pages are fresh, trees and links name things that exist."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


def check_docs(root: Path) -> "subprocess.CompletedProcess[str]":
    """Run the check of a repository's generated pages."""
    command = [sys.executable, "scripts/make_docs.py", "--check"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_the_generated_pages_are_fresh() -> None:
    done = check_docs(ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_stale_page_is_named_in_one_line_with_exit_code_1(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/make_docs.py", tmp_path / "scripts")
    for folder in ("docs", "indexes", "pipelines", "eval"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    page = tmp_path / "docs/cli.md"
    page.write_text(page.read_text(encoding="utf-8") + "by hand\n", encoding="utf-8")
    done = check_docs(tmp_path)
    assert done.returncode == 1
    assert done.stderr == "stale: docs/cli.md. Write them again with: make docs\n"
    assert page.read_text(encoding="utf-8").endswith("by hand\n"), "--check writes nothing"


def tree_paths() -> list[str]:
    """The paths of README's tree: two blanks of indentation a level, a purpose after two blanks or more."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.partition("## What is where")[2].partition("```text\n")[2].partition("```")[0]
    paths: list[str] = []
    folders: list[str] = []
    for line in block.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        paths.append("".join(folders))
    return paths


def test_readmes_tree_names_existing_files_and_folders() -> None:
    paths = tree_paths()
    assert len(paths) > 20
    wrong = [path for path in paths if not (ROOT / path).exists() or (ROOT / path).is_dir() != path.endswith("/")]
    assert wrong == []


def test_readmes_tree_lists_every_module_of_the_package() -> None:
    modules = {f"odqa/{file.name}" for file in (ROOT / "odqa").glob("*.py") if file.name != "__init__.py"}
    folders = {f"odqa/{file.parent.name}/" for file in (ROOT / "odqa").glob("*/__init__.py")}
    assert (modules | folders) - set(tree_paths()) == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if "://" not in target and not (file.exists() and (not anchor or anchor in anchors(file))):
            broken.append(target)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """The fragments of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["docs/concepts.md", "docs/methods.md"])
def test_files_named_in_running_text_exist(page: str) -> None:
    named = re.findall(r"`((?:odqa|scripts|tests)/[\w/]+\.py)`", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []
