"""README and guides do what they say: their commands and the Python example run, in order, in a folder of their own.

Commands on the data folder run on a small stand-in with the same file names, filled from the embedded collection.
What takes hours (training, all of Wikipedia) is checked as far as its recipe.
"""

import contextlib
import csv
import gzip
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from odqa.corpus.mediawiki import read_articles
from odqa.corpus.split import split_article
from tests.command_line import Outcome, odqa

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "odqa" / "assets"
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = [file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs/guides").glob("*.md"))]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", "\n".join([README, *GUIDES]), flags=re.MULTILINE | re.DOTALL)
QUESTIONS = 6  # a set; enough to go through every stage
TOO_LONG = ("odqa train", "odqa mine", "nq-open.yaml")


class Shell:
    """Runs lines of a shell session in `folder`; `export` holds for the lines that follow.

    odqa's own commands run in this process, which saves each of them the seconds that importing torch takes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"ODQA_DATA": "", "ODQA_ARTIFACTS": ""}

    def run(self, line: str) -> Outcome:
        words = shlex.split(line)
        with contextlib.chdir(self.folder), patch.dict(os.environ, self.environment):
            if words[0] == "export":
                name, _, value = words[1].partition("=")
                self.environment[name] = value
                return Outcome(0, "", "")
            if words[0] == "odqa":
                paths = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in words[1:]]
                return odqa(*itertools.chain.from_iterable(paths))
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
            return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A shell in a folder that has what the README's reader has: a dump, a data folder, a trained reader."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(ASSETS / "collection.xml.bz2", folder / "FILE.xml.bz2")
    shutil.copytree(ASSETS / "span-reader-1", folder / "my-reader")
    shutil.copytree(ASSETS / "reranker-2", folder / "my-reranker")
    data = folder / "data" / "nq-mini"
    data.mkdir(parents=True)
    articles = read_articles(folder / "FILE.xml.bz2")
    passages = [(text, article.title) for article in articles for text in split_article(article.text)]
    with gzip.open(data / "psgs.tsv.gz", "wt", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(("id", "text", "title"))
        writer.writerows((number, *passage) for number, passage in enumerate(passages[:60], 1))
    rows = [json.loads(line) for line in (ASSETS / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    few = "".join(json.dumps(row) + "\n" for row in rows[:QUESTIONS])
    for name in ("nq_dev.jsonl", "squad_dev.jsonl", "../nq_open_test.jsonl"):
        (data / name).write_text(few, encoding="utf-8")
    # The embedded evaluation with fewer questions: a recipe here comes before the shipped one of that name.
    recipe = yaml.safe_load((ROOT / "eval/embedded.yaml").read_text(encoding="utf-8"))
    recipe["questions"] = [{"name": "embedded", "file": "data/nq-mini/nq_dev.jsonl", "split": "dev"}]
    (folder / "eval").mkdir()
    (folder / "eval/embedded.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return Shell(folder)


def commands() -> list[str]:
    return [line for kind, text in BLOCKS if kind == "sh" for line in text.splitlines() if line.strip()]


def test_every_command_runs_in_the_order_of_the_readme(shell: Shell) -> None:
    assert len(commands()) > 12
    outputs = {}
    for line in commands():
        if any(part in line for part in TOO_LONG):
            recipe = next(word for word in line.split() if word.endswith(".yaml"))
            line = f"odqa check {recipe}"
        done = shell.run(line)
        # On the stand-in numbers are other ones: an evaluation that misses the expected ones (1) has run.
        allowed = (0, 1) if line.startswith("odqa eval") else (0,)
        assert done.code in allowed, f"{line}\n{done.err}"
        outputs[line] = done.out
    # The answer alone is on stdout; other settings may give another one.
    asked = {line: text for line, text in outputs.items() if line.startswith("odqa ask") and "--json" not in line}
    assert len(asked) >= 4 and all(text.strip() and text.count("\n") == 1 for text in asked.values())
    plain = [text for line, text in asked.items() if "--set retriever" not in line and "recursion=" not in line]
    assert set(plain) == {"Roger Ascham\n"}
    assert [json.loads(text)["text"] for line, text in outputs.items() if "--json" in line] == ["Roger Ascham"]
    # The run folder holds the files of the README's table, and the report is where --save puts it.
    table = README.partition("| file | holds |")[2].partition("\n\n")[0]
    promised = sorted(re.findall(r"^\| `([\w.]+)`", table, flags=re.MULTILINE))
    (run,) = shell.folder.glob("runs/nq-mini/nq-mini-*/nq")
    assert sorted(file.name for file in run.iterdir()) == promised
    assert (shell.folder / "results/nq-mini.md").is_file()
    assert (shell.folder / "results/nq-mini.json").is_file()


def test_the_python_examples_run_and_have_at_most_ten_lines(shell: Shell) -> None:
    examples = [text for kind, text in BLOCKS if kind == "python"]
    if not (shell.folder / "questions.jsonl").is_file():  # the test runs alone
        shell.run(next(line for line in commands() if line.startswith("echo")))
    printed = []
    for example in examples:
        lines = [line for line in example.splitlines() if line.strip()]
        assert len([line for line in lines if "import" not in line.split()]) <= 10
        done = subprocess.run(
            [sys.executable, "-c", example], cwd=shell.folder, env={**os.environ, **shell.environment},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "roger ascham" in done.stdout.lower()
        printed.append(done.stdout)
    assert "Elizabeth I" in printed[0] and "recall_in_context" in printed[0]
    assert printed[1].splitlines() == ["roger ascham"] * 2  # with the prompt, and without


def test_make_commands_are_targets() -> None:
    named = re.findall(r"(?:^    |`)make (\w[\w-]*)", README, flags=re.MULTILINE)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_installing_without_make_takes_the_makefiles_torch() -> None:
    pins = re.findall(r"pip install .*(torch==\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert re.findall(r"pip install .*(torch==\S+)", README) == pins
    assert (ROOT / "constraints.txt").is_file()


def test_counts_in_the_documentation_are_those_of_the_embedded_backbone() -> None:
    from odqa.frozen.backbone import load_backbone
    from odqa.frozen.method import create_method
    from odqa.frozen.spans import SpanHead
    from odqa.models import MINILM

    backbone = load_backbone(MINILM, "encoder")
    methods = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
    lora = create_method("lora", backbone, rank=32, alpha=64.0).count(backbone)
    deep = create_method("deep-prompt", backbone, length=64).count(backbone)
    full = create_method("fine-tuning", backbone, skip=["pooler"]).count(backbone)
    head = sum(tensor.numel() for tensor in SpanHead(backbone.width).parameters())
    for trained in (lora.trainable, deep.trainable, full.trainable, head):
        assert f"| {trained:,} | {100 * trained / lora.frozen:.{1 if trained > head else 3}f} % |" in methods
    sizes = f"{lora.trainable / 1e6:.1f} million trained values beside {lora.frozen / 1e6:.1f} million frozen ones"
    assert sizes in " ".join(README.split())
