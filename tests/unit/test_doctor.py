"""odqa.doctor: what it finds here, what it says is missing, and sizes worked out by hand."""

import importlib.metadata
import sys
from pathlib import Path

import pytest

from odqa import config, doctor
from odqa.doctor import Diagnosis, Finding, estimate_index, examine, passages_in
from odqa.recipes import Places
from tests.command_line import odqa, ok, refused

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("ODQA_DATA", raising=False)


def by_name(found: Diagnosis) -> dict[str, Finding]:
    return {finding.name: finding for finding in found.findings}


def an_index(**vectors: object) -> config.IndexRecipe:
    dense = {"question_model": "m", "vectors": vectors}
    passages = {"kind": "passages", "file": "p.tsv"}
    return config.IndexRecipe.model_validate({"kind": "index", "passages": passages, "bm25": {}, "dense": dense})


# --- the machine ------------------------------------------------------------------------------------------------------


def test_a_healthy_machine_is_all_right() -> None:
    found = examine()
    names = by_name(found)
    assert found.ok and names["python"].found == sys.version.split()[0]
    assert {"torch", "faiss-cpu", "bm25s", "avx512_bf16", "amx_bf16", "disk", "memory"} <= set(names)


def test_a_core_package_that_is_missing_or_too_old_is_told_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: [("no-such-thing>=1", None), ("numpy>=999", None)])
    found = examine()
    names = by_name(found)
    assert not found.ok and "Everything" not in found.render()
    assert names["no-such-thing"].found == "not installed" and "needed is >=999" in names["numpy"].found
    assert "    pip install 'no-such-thing>=1'\n    pip install 'numpy>=999'" in found.render()


def test_an_extra_that_is_missing_is_optional_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_requirements", lambda: [("no-such-thing", "plots"), ("no-such-lint", "dev")])
    found = examine()
    assert found.ok and by_name(found)["no-such-thing"].state == "optional"
    assert "pip install 'odqa[plots]'" in found.render() and "no-such-lint" not in found.render()


def test_java_comes_with_the_extra_lucene_and_from_nowhere_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))

    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    java = doctor._java()
    assert (java.state, java.fix) == ("optional", "pip install 'odqa[lucene]'") and str(tmp_path) not in java.found


def test_a_model_behind_a_server_is_not_looked_for_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_name(examine("pipelines/embedded-api.yaml"))
    assert not any("Qwen" in name for name in found)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_an_index_is_estimated_from_its_passages_width_and_codes() -> None:
    exact = estimate_index(an_index(), 1_000_000, 768)
    # texts 507 and BM25 460 bytes a passage, vectors 768 * 2, mapped and not loaded
    assert exact.disk == 1_000_000 * (507 + 460 + 1536) == exact.building
    assert exact.serve_memory == exact.build_memory == 1_000_000_000
    flat = estimate_index(an_index(faiss="Flat"), 1_000_000, 768)
    assert flat.disk == 1_000_000 * (507 + 460 + 3072) and flat.building == flat.disk + 1_000_000 * 1536
    coded = estimate_index(an_index(faiss="IVF1024,PQ48", train_rows=100), 1_000_000, 768)
    assert coded.serve_memory == 1_000_000_000 + 1_000_000 * 56  # 48 bytes of code, 8 of the id
    assert coded.build_memory == coded.serve_memory + 100 * 768 * 4
    small = estimate_index(an_index(faiss="HNSW32,SQ8"), 1000, 384)
    assert small.serve_memory == 1_000_000_000 + 1000 * (384 + 256)  # 64 links of 4 bytes


def test_passages_are_counted_from_the_size_of_their_file(tmp_path: Path) -> None:
    for name, size, count in (
        ("p.tsv.gz", 215_000, 1000),
        ("p.tsv", 65_000, 100),
        ("d.xml.bz2", 7000, 10),
        ("p", 1, 1),
    ):
        (tmp_path / name).write_bytes(b"x" * size)
        assert passages_in(tmp_path / name) == count


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_names_what_it_lacks_and_the_exit_code_is_1(tmp_path: Path) -> None:
    outcome = odqa("doctor", "eval/nq-mini.yaml", "--artifacts", tmp_path / "none")
    assert outcome.code == 1 and outcome.err == ""
    assert "data:nq-mini/nq_dev.jsonl     missing" in outcome.out and "export ODQA_DATA=DIR" in outcome.out
    found = odqa("doctor", "eval/nq-mini.yaml", "--artifacts", tmp_path / "none", "--json").json
    assert not found["ok"] and any(item["fix"].startswith("export ODQA_DATA") for item in found["findings"])


def test_the_embedded_recipe_has_all_it_needs(tmp_path: Path) -> None:
    outcome = ok("doctor", "eval/embedded.yaml", "--artifacts", tmp_path)
    assert outcome.out.endswith("Everything that is needed is here.\n") or "To bring what is optional:" in outcome.out
    assert "not built yet: about" in outcome.out and "embedded:span-reader-3" in outcome.out


def test_all_of_wikipedia_is_counted_though_it_is_not_here(tmp_path: Path) -> None:
    found = examine("indexes/nq-open.yaml", places=Places(artifacts=tmp_path))
    # 21,015,324 times 967 bytes of text and BM25, 192 + 8 of code: 24.5 GB; and 768 * 2 of vectors while it is built.
    index = by_name(found)[str(tmp_path / "nq-open")]
    assert index.found.startswith("not built yet: 21,015,324 passages, about 24.5 GB")
    assert "about 56.8 GB needed" in by_name(found)["disk"].found
    missing = by_name(found)["facebook/dpr-ctx_encoder-single-nq-base"]
    assert missing.state == "missing" and missing.fix.startswith("hf download facebook/")


def test_too_little_disk_or_memory_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda: 500_000_000)
    found = examine("indexes/embedded.yaml", places=Places(artifacts=tmp_path))
    assert by_name(found)["memory"].state == "missing" and "0.5 GB free; about 1." in by_name(found)["memory"].found


@pytest.mark.parametrize("name", ["span-reader-3", "mini-prompt-50", "nq-open-upr", "rankings-hybrid"])
def test_trainings_and_pipelines_are_walked_through(name: str, tmp_path: Path) -> None:
    found = examine(f"pipelines/{name}.yaml", places=Places(artifacts=tmp_path))
    needs = [finding for finding in found.findings if finding.topic == f"{name}.yaml needs"]
    assert needs and not found.ok  # data that is not here, or a model of the hub


def test_a_recipe_that_is_wrong_is_bad_input() -> None:
    assert refused("doctor", "nowhere.yaml").startswith("RecipeError: nowhere.yaml: no such recipe")
