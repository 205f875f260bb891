"""Bad input ends with exit code 2, nothing on stdout, and one line that says what was found, where, and what to do."""

import bz2
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from tests.command_line import odqa, ok, refused
from tests.small_world import World, questions, write_jsonl, write_yaml

Write = Callable[[str, bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return write


@pytest.fixture
def recipe(world: World, tmp_path: Path) -> Callable[..., Path]:
    """An index recipe over BM25 alone, with another source."""

    def recipe(file: Path | str, kind: str = "passages") -> Path:
        source = {"kind": kind, "file": str(file)}
        return write_yaml(tmp_path / "other.yaml", {"kind": "index", "passages": source, "bm25": {}})

    return recipe


# --- passages and dumps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.tsv", b"id\tbody\ttitle\n1\tx\ty\n", "p.tsv:1: no column text in the header (found: id, body, title)."),
        ("p.tsv", b"", "p.tsv: the file is empty."),
        ("p.tsv", b"id\ttext\ttitle\n", "p.tsv: the file has no passages."),
        ("p.tsv", b"id\ttext\ttitle\n1\tx\n", "p.tsv:2: 2 columns, the header has 3."),
        ("p.tsv", b"id\ttext\ttitle\n1\tx\ty\n1\tz\ty\n", "p.tsv:3: the id '1' stands twice"),
        ("p.jsonl", b'{"id": "1", "text": "x"}\n{"id": "2", "txt": "y"}\n', "p.jsonl:2: neither 'text' nor 'contents'"),
        ("p.jsonl", b'{"id": "1", "text": "x"}\nnonsense\n', "p.jsonl:2: not JSON"),
        ("p.jsonl", b'{"text": "x"}\n', "p.jsonl:1: no id"),
        ("p.tsv", b"id\ttext\ttitle\n1\t\xff\ty\n", "p.tsv: not UTF-8"),
        ("p.tsv.gz", gzip.compress(b"id\ttext\ttitle\n" + b"1\tx\ty\n" * 99)[:-20], "damaged gzip file"),
        ("p.docx", b"PK", "unknown kind of file '.docx' (expected .tsv, .jsonl"),
    ],
)
def test_a_passage_file_that_is_none(
    write: Write, recipe: Callable[..., Path], tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    line = refused("index", recipe(write(name, content)), "--out", tmp_path / "index")
    assert line.startswith("DataError: ") and told in line and str(tmp_path) in line
    assert not (tmp_path / "index").exists()


def test_a_passage_file_that_is_not_there_or_a_folder(recipe: Callable[..., Path], tmp_path: Path) -> None:
    assert "no-such.tsv: no such file" in refused("index", recipe("no-such.tsv"), "--out", tmp_path / "i")
    assert "a folder; a file is needed here" in refused("index", recipe(tmp_path), "--out", tmp_path / "i")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.xml", b""),
        ("empty.xml.bz2", bz2.compress(b"")),
        ("html.xml", b"<html><body>not a dump</body></html>"),
        ("text.xml", b"plain text, no markup at all"),
        ("zip.xml.bz2", b"PK\x03\x04 this is not bzip2"),
        ("no-pages.xml", b'<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/"></mediawiki>'),
    ],
)
def test_a_dump_that_is_none_or_empty(
    world: World, write: Write, recipe: Callable[..., Path], tmp_path: Path, name: str, content: bytes
) -> None:
    dump = write(name, content)
    for arguments in (("index", world.index, "--dump", dump), ("index", recipe(dump, "dump"))):
        line = refused(*arguments, "--out", tmp_path / "index")
        assert line.startswith("DataError: ") and len(line) > 30
        assert not (tmp_path / "index").exists()


def test_a_dump_that_is_not_there(world: World, tmp_path: Path) -> None:
    line = refused("index", world.index, "--dump", "nowhere.xml.bz2", "--out", tmp_path / "index")
    assert line.startswith("DataError: nowhere.xml.bz2: no such file")


def test_a_data_folder_that_is_not_known_or_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ODQA_DATA", raising=False)
    arguments = ("eval", "eval/nq-mini.yaml", "--artifacts", tmp_path)
    assert refused(*arguments).endswith(
        "lies in the data folder, which is not known. Give --data DIR or set ODQA_DATA."
    )
    assert refused(*arguments, "--data", tmp_path / "no").endswith("check --data and ODQA_DATA.")


# --- questions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("q.jsonl", b"", "q.jsonl: the file has no questions."),
        (
            "q.jsonl",
            b'{"id": "a", "question": "x"}\n{"id": "a", "question": "y"}\n',
            "q.jsonl:2: the id 'a' stands twice",
        ),
        (
            "q.jsonl",
            b'{"id": "a", "query": "x"}\n',
            "q.jsonl:1: no string under the key 'question' (found: id, query).",
        ),
        ("q.jsonl", b'{"id": "a", "question": "  "}\n', "q.jsonl:1: the question is empty."),
        ("q.jsonl", b"[1]\n", "q.jsonl:1: expected a JSON object, found list."),
        ("q.csv", b"who?\n", "q.csv:1: expected question<TAB>list of answers, found 1 columns."),
        ("q.csv", b"who?\tme\n", "q.csv:1: the answers are not a Python list literal: 'me'."),
        ("q.csv", b"who?\t__import__('os')\n", "q.csv:1: the answers are not a Python list literal"),
        ("q.parquet", b"PAR1", "unknown kind of file '.parquet'"),
    ],
)
def test_a_question_file_that_is_none(
    world: World, write: Write, tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    file = write(name, content)
    line = refused("run", world.pipeline("bm25"), file, "--out", tmp_path / "run", "--artifacts", world.artifacts)
    assert line.startswith(f"DataError: {tmp_path}") and told in line
    assert not (tmp_path / "run").exists()


def test_questions_without_answers_are_run_but_not_evaluated(world: World, write: Write, tmp_path: Path) -> None:
    file = write("q.jsonl", b'{"id": "a", "question": "who is korbar"}\n')
    ok("run", world.pipeline("bm25"), file, "--out", tmp_path / "run", "--artifacts", world.artifacts)
    line = refused("eval", world.eval, "--set", f"questions.0.file={file}", "--artifacts", world.artifacts)
    assert line == f"DataError: {file}:1: no answers (expected a key 'answers'); gold needs them."


@pytest.mark.parametrize("name", ["span", "lm"])
def test_a_question_longer_than_the_window(world: World, write: Write, tmp_path: Path, name: str) -> None:
    long = "why " * 3000
    common = ("--artifacts", world.artifacts)
    line = refused("ask", world.pipeline(name), long, *common)
    assert line.startswith("DataError: ") and "question" in line and "Shorten the question" in line
    file = write_jsonl(tmp_path / "q.jsonl", [{"id": "short", "question": "why"}, {"id": "long", "question": long}])
    line = refused("run", world.pipeline(name), file, "--out", tmp_path / "run", *common)
    assert "long" in line and "Shorten the question" in line


def test_a_question_that_alone_exceeds_the_budget(world: World) -> None:
    arguments = ("--artifacts", world.artifacts, "--set", "packer.budget=5")
    line = refused("ask", world.pipeline("lm"), "where is korbar", *arguments)
    assert "the budget is 5. Raise packer.budget or shorten the question." in line


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["index", "ask", "run", "eval", "train"])
def test_a_recipe_of_the_wrong_kind(world: World, command: str) -> None:
    path = world.eval if command == "index" else world.index
    more = {"ask": ["who"], "run": [str(world.questions)]}.get(command, [])
    line = refused(command, path, *more)
    assert line.startswith(f"RecipeError: {path}: this is a recipe of kind") and line.endswith("is needed here.")


@pytest.mark.parametrize("command", ["check", "index", "ask", "run", "eval", "train"])
def test_a_recipe_that_is_not_there(command: str) -> None:
    more = {"ask": ["who"], "run": ["q.jsonl"]}.get(command, [])
    line = refused(command, "pipelines/embeded.yaml", *more)
    assert line.startswith("RecipeError: pipelines/embeded.yaml: no such recipe")
    assert line.endswith("Did you mean pipelines/embedded.yaml?")


def test_an_unknown_key_a_key_given_twice_and_a_set_of_nonsense(world: World, write: Write) -> None:
    common = ("who", "--artifacts", world.artifacts)
    line = refused("ask", world.pipeline("bm25"), *common, "--set", "reader.modell=x")
    assert "reader.modell is not a setting of span (" in line and line.endswith("Did you mean model?")
    twice = write("twice.yaml", world.pipeline("bm25").read_bytes() + b"k: 3\n")
    assert refused("ask", twice, *common).endswith("key 'k' is given twice. Remove one.")
    nonsense = refused("ask", world.pipeline("bm25"), *common, "--set", "k")
    assert nonsense == "RecipeError: --set k: expected KEY=VALUE or KEY.KEY=VALUE."


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("reader.model=nowhere", "nowhere: no such file"),
        ("reader.model=embedded:nothing", "embedded:nothing: no such file"),
        ("reader={kind: lm, model: nowhere/at/all}", "model 'nowhere/at/all' does not load"),
        ("reader={kind: lm, model: nobody/nothing}", "model 'nobody/nothing' does not load"),
        ("reader.device=gpu", "device 'gpu' is not a device that torch knows"),
        ("reader.device=cuda:99", "device 'cuda:99' is not here"),
        ("reader.dtype=int4", "dtype 'int4' is not one of auto, float32, bfloat16, float16."),
        ("reader={kind: lm, model: m, prompt: clsed-book}", "'clsed-book' is not one of"),
        ("index=nowhere", "nowhere: neither an index folder nor an index recipe (.yaml)."),
        ("reranker={kind: cross-encoder, model: nobody/nothing}", "nobody/nothing"),
    ],
)
def test_a_setting_that_names_what_is_not_there(world: World, change: str, told: str) -> None:
    if "prompt" in change:
        change = change.replace("model: m", f"model: {world.lm}")
    assert told in refused("ask", world.pipeline("bm25"), "who", "--artifacts", world.artifacts, "--set", change)


def test_a_reader_folder_that_is_no_reader_or_a_damaged_one(world: World, tmp_path: Path) -> None:
    ask = ("ask", world.pipeline("bm25"), "who", "--artifacts", world.artifacts, "--set")
    assert "not a span reader (reader.json is missing)" in refused(*ask, f"reader.model={tmp_path}")
    shutil.copytree(world.reader, tmp_path / "reader")
    tensors = load_file(tmp_path / "reader/method.safetensors")
    save_file({name: tensor[:1] for name, tensor in tensors.items()}, tmp_path / "reader/method.safetensors")
    line = refused(*ask, f"reader.model={tmp_path / 'reader'}")
    assert line.startswith("ArtifactError: ") and "has shape" in line and "expected" in line
    (tmp_path / "reader/method.safetensors").unlink()
    assert "not a saved method (method.safetensors is missing)" in refused(*ask, f"reader.model={tmp_path / 'reader'}")


def test_a_reader_that_was_trained_on_another_backbone(world: World, tmp_path: Path) -> None:
    other = _other_weights(world.encoder, tmp_path / "other")
    change = ("--set", f"reader.backbone={other}")
    line = refused("ask", world.pipeline("bm25"), "who", "--artifacts", world.artifacts, *change)
    assert line.startswith("ArtifactMismatch: ") and "was trained on backbone" in line
    assert line.endswith("Use that backbone or train the method again.")


# --- indexes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["ask", "run"])
def test_an_index_that_is_not_built_yet(world: World, tmp_path: Path, command: str) -> None:
    more = ["who"] if command == "ask" else [world.questions, "--out", tmp_path / "run"]
    line = refused(command, world.pipeline("span"), *more, "--artifacts", tmp_path)
    assert (
        line
        == f"ArtifactError: {tmp_path / 'towns'}: the index is not built yet. Build it with: odqa index {world.index}"
    )


def test_an_index_whose_recipe_has_changed_since(world: World, tmp_path: Path) -> None:
    recipe = yaml.safe_load(world.index.read_text()) | {"bm25": {"k1": 1.5}}
    changed = write_yaml(tmp_path / "towns.yaml", recipe)
    change = ("--set", f"index={changed}")
    line = refused("ask", world.pipeline("bm25"), "who", "--artifacts", world.artifacts, *change)
    assert "built with other settings of bm25 than" in line and line.endswith(f"odqa index {changed}")


def test_an_index_that_was_built_with_another_encoder(world: World, tmp_path: Path) -> None:
    """The same folder with other weights: refused when asked, and built anew by the command that the line names."""
    encoder = tmp_path / "encoder"
    shutil.copytree(world.encoder, encoder)
    recipe = yaml.safe_load(world.index.read_text())
    recipe["dense"]["question_model"] = str(encoder)
    index = write_yaml(tmp_path / "own.yaml", recipe)
    ask = ("ask", world.pipeline("span"), "where", "--artifacts", tmp_path, "--set", f"index={index}")
    ok("index", index, "--artifacts", tmp_path)
    ok(*ask)
    _other_weights(world.encoder, encoder)
    line = refused(*ask)
    assert line.startswith(f"ArtifactMismatch: {tmp_path / 'own'}: built with") and "build the index again" in line
    again = ok("index", index, "--artifacts", tmp_path)
    assert "built already" not in again.err
    ok(*ask)


def test_an_index_that_lacks_what_the_retriever_needs(
    recipe: Callable[..., Path], world: World, tmp_path: Path
) -> None:
    ok("index", recipe(world.passages), "--out", tmp_path / "bare")
    change = ("--set", f"index={tmp_path / 'bare'}")
    assert "this index has no vectors. Build one with" in refused("ask", world.pipeline("dense"), "who", *change)
    ok("ask", world.pipeline("bm25"), "who", *change)


def test_a_damaged_index_is_told_and_built_again_by_the_same_command(
    recipe: Callable[..., Path], world: World, tmp_path: Path
) -> None:
    index = ("index", recipe(world.passages), "--out", tmp_path / "index")
    ok(*index)
    (tmp_path / "index/passages/part-00000.arrow").unlink()
    line = refused("ask", world.pipeline("bm25"), "who", "--set", f"index={tmp_path / 'index'}")
    assert "passages/part-00000.arrow is missing" in line and line.endswith("Build the artifact again.")
    assert "Doing so now." in ok(*index).err
    ok("ask", world.pipeline("bm25"), "who", "--set", f"index={tmp_path / 'index'}")


@pytest.mark.parametrize("place", ["a file", "a folder", "a run"])
def test_an_index_is_not_put_where_something_else_lies(world: World, tmp_path: Path, place: str) -> None:
    out = tmp_path / "out"
    match place:
        case "a file":
            out.write_text("mine")
        case "a folder":
            out.mkdir()
            (out / "thesis.txt").write_text("mine")
        case _:
            ok("run", world.pipeline("closed"), world.questions, "--out", out)
    before = {file.name: file.read_bytes() for file in [out, *out.rglob("*")] if file.is_file()}
    line = refused("index", world.index, "--out", out)
    assert str(out) in line
    assert {file.name: file.read_bytes() for file in [out, *out.rglob("*")] if file.is_file()} == before


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(world: World, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Scored runs of two question sets, and one that is not scored."""
    folder = tmp_path_factory.mktemp("runs")
    half = write_jsonl(folder / "half.jsonl", questions()[:6])
    common = ("eval", world.eval, "--artifacts", world.artifacts, "--set", f"pipelines=[{world.pipeline('bm25')}]")
    ok(*common, "--out", folder / "all")
    ok(*common, "--out", folder / "half", "--set", f"questions.0.file={half}")
    ok("run", world.pipeline("closed"), half, "--out", folder / "unscored")
    found = {name: next((folder / name).rglob("scores.json")).parent for name in ("all", "half")}
    return found | {"unscored": folder / "unscored", "half.jsonl": half}


def test_runs_of_different_question_sets_are_not_compared(runs: dict[str, Path]) -> None:
    line = refused("diff", runs["all"], runs["half"])
    assert line.endswith("cannot be paired: 6 questions are only in the first, 0 only in the second.")


def test_a_run_folder_of_another_pipeline_or_question_file_is_not_overwritten(
    world: World, runs: dict[str, Path]
) -> None:
    before = (runs["unscored"] / "answers.jsonl").read_bytes()
    common = ("--out", runs["unscored"], "--artifacts", world.artifacts)
    for pipeline, file in (("bm25", runs["half.jsonl"]), ("closed", world.questions)):
        line = refused("run", world.pipeline(pipeline), file, *common)
        assert line.startswith("ArtifactMismatch: ") and "differs from this one in" in line
        assert line.endswith("Choose another --out, or delete it.")
    assert (runs["unscored"] / "answers.jsonl").read_bytes() == before


def test_an_unfinished_run_of_another_pipeline_is_not_continued(world: World, tmp_path: Path) -> None:
    bad = write_jsonl(tmp_path / "q.jsonl", [*questions()[:3], {"id": "long", "question": "why " * 3000}])
    common = ("--out", tmp_path / "run", "--artifacts", world.artifacts, "--set", "batch=1")
    assert odqa("run", world.pipeline("bm25"), bad, *common).code == 2  # three are answered, the fourth is too long
    line = refused("run", world.pipeline("lm"), bad, *common)
    assert "the unfinished run here differs from this one in" in line


def test_an_evaluation_does_not_take_over_the_run_of_another_question_set(
    world: World, runs: dict[str, Path], tmp_path: Path
) -> None:
    """The same place, the same pipeline, other questions: the run that lies there belongs to another file."""
    out = tmp_path / "out"
    common = ("eval", world.eval, "--artifacts", world.artifacts, "--set", f"pipelines=[{world.pipeline('bm25')}]")
    ok(*common, "--out", out)
    line = refused(*common, "--out", out, "--set", f"questions.0.file={runs['half.jsonl']}")
    assert line.startswith("ArtifactMismatch: ") and "differs from this one in" in line and "questions" in line


def test_an_expected_number_that_was_not_measured(world: World, tmp_path: Path) -> None:
    arguments = ("--artifacts", world.artifacts, "--out", tmp_path)
    change = ("--set", "questions.0.expected={span: {recall@7: {value: 1}}}")
    line = refused("eval", world.eval, *arguments, *change)
    assert line.startswith("DataError: recall@7 was not measured on towns dev (measured: em, f1, recall@1,")


def test_what_is_no_run_is_not_explained(world: World, runs: dict[str, Path], tmp_path: Path) -> None:
    assert "no finished artifact here (manifest.json is missing)" in refused("explain", tmp_path)
    assert "no finished artifact here" in refused("explain", tmp_path / "nowhere")
    assert "kind 'index'; 'run' is needed here" in refused("explain", world.artifacts / "towns")
    assert "no question 'nobody' in this run (it has 12)" in refused("explain", runs["all"], "--id", "nobody")
    assert "has not been scored" in refused("diff", runs["all"], runs["unscored"])


@pytest.mark.parametrize("damage", ["answers.jsonl", "traces.jsonl", "scores.json", "manifest.json", "timings.jsonl"])
def test_a_damaged_run_is_told_in_one_line(runs: dict[str, Path], tmp_path: Path, damage: str) -> None:
    shutil.copytree(runs["all"], tmp_path / "run")
    file = tmp_path / "run" / damage
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    line = refused("explain", tmp_path / "run", "--id", "q11")
    assert str(tmp_path / "run") in line


def test_scores_of_another_version_are_told(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["all"], tmp_path / "run")
    (tmp_path / "run/scores.json").write_text('{"em": 12}')
    assert "not scores of this version of odqa" in refused("explain", tmp_path / "run")


# --- training ---------------------------------------------------------------------------------------------------------


def _training(world: World, folder: Path, **changes: object) -> Path:
    row = {
        "id": "t",
        "question": "who",
        "answers": ["Arn"],
        "title": "x",
        "passage": "the river Arn",
        "negative_ids": [],
    }
    write_jsonl(folder / "train.jsonl", [row])
    recipe: dict[str, object] = {
        "kind": "train-span-reader",
        "backbone": str(world.encoder),
        "method": {"kind": "lora", "rank": 2, "alpha": 4},
        "train": str(folder / "train.jsonl"),
        "passages": [str(world.passages)],
        "groups": {"groups": 1},
        "fit": {"steps": 1, "learning_rates": {"method": 0.01, "head": 0.01}},
        "device": "cpu",
    }
    return write_yaml(folder / "training.yaml", recipe | changes)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"question": "who"}, "train.jsonl, line 1: 'answers' is neither a field of the row nor a known passage."),
        ({"answers": ["nowhere"]}, "no example has its answer in its passage"),
        ({"negative_ids": ["999"]}, "'999' is neither a field of the row nor a known passage."),
        (None, "train.jsonl, line 1: not JSON"),
    ],
)
def test_a_training_file_that_is_none(world: World, tmp_path: Path, row: dict[str, object] | None, told: str) -> None:
    recipe = _training(world, tmp_path)
    file = tmp_path / "train.jsonl"
    whole = json.loads(file.read_text())
    if row is None:
        file.write_text("{")
    else:
        write_jsonl(file, [row | {"id": "t", "title": "x", "passage": "y"} if "question" in row else whole | row])
    line = refused("train", recipe, "--out", tmp_path / "reader")
    assert told in line and not (tmp_path / "reader").exists()


def test_tune_questions_without_a_known_gold_passage(world: World, tmp_path: Path) -> None:
    for ids in ([], ["999"]):
        tune = write_jsonl(tmp_path / "tune.jsonl", [questions()[0] | {"positive_ids": ids}])
        recipe = _training(world, tmp_path, tune=[{"name": "t", "file": str(tune)}])
        line = refused("train", recipe, "--out", tmp_path / "reader")
        assert "the gold passage of question 'q0' is not known. Give positive_ids" in line


def test_a_backbone_that_is_not_there(world: World, tmp_path: Path) -> None:
    line = refused("train", _training(world, tmp_path, backbone="nowhere/at/all"), "--out", tmp_path / "reader")
    assert line.startswith("DataError: model 'nowhere/at/all' does not load as encoder")


def _other_weights(source: Path, target: Path) -> Path:
    """A copy of a model folder with one weight changed."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / "model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target
