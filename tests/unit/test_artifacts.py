"""Artifacts: finished or not there, resumed part by part, and never in the place of something else."""

import json
from pathlib import Path

import pytest

from odqa import artifacts
from odqa.artifacts import (
    MANIFEST,
    Draft,
    building,
    load_artifact,
    partial_path,
    sha256_file,
    sha256_json,
)
from odqa.errors import ArtifactError, ArtifactMismatch

RECIPE, INPUTS = {"kind": "toy", "k": 1}, {"source": "00ff"}


def build(
    path: Path, *parts: str, text: str = "text", recipe: dict[str, object] = RECIPE, die: bool = False
) -> list[str]:
    """Make the artifact with one file a part; returns the parts that were really written by this call."""
    written: list[str] = []

    def write(file: Path) -> None:
        written.append(file.name)
        file.write_text(text)

    with building(path, "toy", recipe=recipe, inputs=INPUTS, scratch=("work",)) as draft:
        draft.part("work/state", write)
        for part in parts:
            draft.part(part, write)
        draft.counts["parts"] = len(parts)
        draft.extra["note"] = "kept"
        draft.measured["peak_memory_bytes"] = 7
        if die:
            raise KeyboardInterrupt
    return written


# --- finished ---------------------------------------------------------------------------------------------------------


def test_the_manifest_says_what_was_made_from_what(tmp_path: Path) -> None:
    build(tmp_path / "toy", "a", "deep/er/b")
    manifest = json.loads((tmp_path / "toy" / MANIFEST).read_text())
    # sha256 of "text"
    digest = "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    assert manifest["files"] == {name: {"bytes": 4, "sha256": digest} for name in ("a", "deep/er/b")}
    assert (manifest["kind"], manifest["recipe"], manifest["inputs"]) == ("toy", RECIPE, INPUTS)
    assert manifest["recipe_hash"] == sha256_json(RECIPE)
    assert (manifest["counts"], manifest["note"]) == ({"parts": 2}, "kept")
    assert manifest["measured"]["peak_memory_bytes"] == 7 and manifest["measured"]["seconds"] >= 0


def test_a_finished_artifact_leaves_no_working_state(tmp_path: Path) -> None:
    build(tmp_path / "toy", "a")
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert sorted(path.name for path in (tmp_path / "toy").iterdir()) == ["a", MANIFEST]


def test_the_hash_of_an_artifact_is_of_its_content_and_not_of_what_was_measured(tmp_path: Path) -> None:
    for name, text in (("one", "text"), ("two", "text"), ("other", "texd")):
        build(tmp_path / name, "a", text=text)
    one, two, other = (load_artifact(tmp_path / name) for name in ("one", "two", "other"))
    assert one.hash == two.hash != other.hash


def test_the_hash_of_a_value_does_not_depend_on_the_order_of_its_keys() -> None:
    assert sha256_json({"a": 1, "b": [1, "é"]}) == sha256_json({"b": [1, "é"], "a": 1}) != sha256_json({"a": 1})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("a is missing", "a is missing, the manifest says 4 bytes. Build the artifact again."),
        ("a is longer", "a has 5 bytes, the manifest says 4 bytes."),
        ("no manifest", "no finished artifact here"),
        ("not JSON", "not a manifest of odqa"),
        ("a list", "not a manifest of odqa"),
    ],
)
def test_a_damaged_artifact_is_not_opened(tmp_path: Path, damage: str, told: str) -> None:
    path = tmp_path / "toy"
    build(path, "a")
    match damage:
        case "a is missing":
            (path / "a").unlink()
        case "a is longer":
            (path / "a").write_text("text!")
        case "no manifest":
            (path / MANIFEST).unlink()
        case "not JSON":
            (path / MANIFEST).write_text('{"kind":')
        case "a list":
            (path / MANIFEST).write_text("[]")
    with pytest.raises(ArtifactError) as caught:
        load_artifact(path)
    assert told in str(caught.value)


def test_a_changed_byte_is_found_when_hashes_are_verified(tmp_path: Path) -> None:
    build(tmp_path / "toy", "a")
    assert load_artifact(tmp_path / "toy", "toy", verify=True).kind == "toy"
    (tmp_path / "toy/a").write_text("texd")
    assert load_artifact(tmp_path / "toy")
    with pytest.raises(ArtifactError, match="a is damaged"):
        load_artifact(tmp_path / "toy", verify=True)


def test_an_artifact_of_another_kind_is_a_mismatch(tmp_path: Path) -> None:
    build(tmp_path / "toy", "a")
    with pytest.raises(ArtifactMismatch, match="kind 'toy'; 'index' is needed here"):
        load_artifact(tmp_path / "toy", "index")


# --- unfinished -------------------------------------------------------------------------------------------------------


def test_an_unfinished_artifact_never_bears_its_name(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "toy", "a", die=True)
    assert not (tmp_path / "toy").exists() and partial_path(tmp_path / "toy").is_dir()
    with pytest.raises(ArtifactError, match="A partial one is beside it: run the same command again to finish it"):
        load_artifact(tmp_path / "toy")


def test_a_second_try_skips_the_parts_that_are_there(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "toy", "a", die=True)
    assert build(tmp_path / "toy", "a", "b") == [".b.tmp"]
    build(tmp_path / "fresh", "a", "b")
    assert load_artifact(tmp_path / "toy").hash == load_artifact(tmp_path / "fresh").hash


def test_seconds_of_all_tries_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 10.0, 13.0])  # the first try takes 2 s, the second one 3 s
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "toy", "a", die=True)
    build(tmp_path / "toy", "a")
    assert load_artifact(tmp_path / "toy").manifest["measured"]["seconds"] == 5.0


def test_a_try_with_another_recipe_starts_afresh(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "toy", "a", text="old", die=True)
    assert build(tmp_path / "toy", "a", recipe=RECIPE | {"k": 2}) == [".state.tmp", ".a.tmp"]
    assert (tmp_path / "toy/a").read_text() == "text"


@pytest.mark.parametrize("state", ["", "{", '{"identity": "x"}'])
def test_a_partial_folder_of_unknown_origin_is_thrown_away(tmp_path: Path, state: str) -> None:
    partial = partial_path(tmp_path / "toy")
    partial.mkdir()
    (partial / "a").write_text("whose?")
    (partial / "partial.json").write_text(state)
    build(tmp_path / "toy", "a")
    assert (tmp_path / "toy/a").read_text() == "text"


def test_half_written_files_of_a_killed_try_are_not_in_the_artifact(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "toy", "a", die=True)
    partial = partial_path(tmp_path / "toy")
    (partial / ".c.tmp").mkdir()  # of a part that this version does not make any more
    (partial / ".c.tmp/x").write_text("half")
    (partial / ".partial.json.tmp").write_text("half")
    build(tmp_path / "toy", "a")
    assert sorted(path.name for path in (tmp_path / "toy").iterdir()) == ["a", MANIFEST]


def test_a_try_killed_while_it_hashes_keeps_its_working_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashing an index of 21M passages takes minutes; to redo the work before it would take hours."""

    def killed(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(artifacts, "sha256_file", killed)
        build(tmp_path / "toy", "a")
    assert build(tmp_path / "toy", "a") == []


def test_a_part_is_written_under_another_name_first(tmp_path: Path) -> None:
    seen: list[bool] = []

    def write(path: Path) -> None:
        seen.append((tmp_path / "x").exists())
        path.mkdir()
        (path / "inner").write_text("text")

    draft = Draft(tmp_path)
    assert not draft.has("x")
    assert draft.part("x", write) == tmp_path / "x"
    assert seen == [False] and draft.has("x") and (tmp_path / "x/inner").read_text() == "text"
    draft.write_json("y.json", {"b": "é", "a": 1})
    assert (tmp_path / "y.json").read_text(encoding="utf-8") == '{\n "a": 1,\n "b": "é"\n}\n'


# --- what lies there already ------------------------------------------------------------------------------------------


def test_an_older_artifact_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    build(tmp_path / "toy", "a", text="old")
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "toy", "a", recipe=RECIPE | {"k": 2}, die=True)
    assert (tmp_path / "toy/a").read_text() == "old"
    build(tmp_path / "toy", "b", recipe=RECIPE | {"k": 2})
    assert load_artifact(tmp_path / "toy", verify=True).manifest["recipe"]["k"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_a_damaged_artifact_is_built_again(tmp_path: Path) -> None:
    build(tmp_path / "toy", "a")
    (tmp_path / "toy/a").unlink()
    build(tmp_path / "toy", "a")
    (tmp_path / "toy" / MANIFEST).write_text("{")
    build(tmp_path / "toy", "a")
    assert load_artifact(tmp_path / "toy", verify=True)


@pytest.mark.parametrize("what", ["a file", "a folder that odqa did not make", "an artifact of kind 'index'"])
def test_what_is_not_ours_is_refused_before_any_work_and_kept(tmp_path: Path, what: str) -> None:
    path = tmp_path / "toy"
    match what:
        case "a file":
            path.write_text("mine")
        case "a folder that odqa did not make":
            path.mkdir()
            (path / "thesis.txt").write_text("mine")
        case _:
            path.mkdir()
            (path / MANIFEST).write_text('{"kind": "index"}')
    before = {file: sha256_file(file) for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(ArtifactError, match=f"{what} is in the way of the toy to be made here. Choose another --out."):
        build(path, "a")
    assert {file: sha256_file(file) for file in tmp_path.rglob("*") if file.is_file()} == before


def test_an_empty_folder_is_a_place_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "toy").mkdir()
    build(tmp_path / "toy", "a")
    assert load_artifact(tmp_path / "toy")
