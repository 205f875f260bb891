"""What a model is, by content: folders, artifacts, and the hub's cache, without loading one."""

from pathlib import Path

import pytest

from odqa import models
from odqa.artifacts import building, load_artifact
from odqa.errors import ArtifactError, DataError
from odqa.models import identify_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, text in {"model.safetensors": "weights", "config.json": "{}", **files}.items():
        (path / name).write_text(text)
    return path


def test_equal_files_are_the_same_model_wherever_they_lie(tmp_path: Path) -> None:
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two", **{"README.md": "not read by transformers"})
    assert identify_model("one", one) == identify_model("two", two)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "vocab.txt"])
def test_weights_configuration_and_tokenizer_decide_what_a_model_is(tmp_path: Path, name: str) -> None:
    one, two = folder(tmp_path / "one"), folder(tmp_path / "two", **{name: "other"})
    assert identify_model("m", one) != identify_model("m", two)


def test_an_artifact_of_odqa_is_known_by_its_hash_and_a_damaged_one_refused(tmp_path: Path) -> None:
    with building(tmp_path / "reranker", "reranker", recipe={}, inputs={"backbone": "b"}) as draft:
        draft.write_json("method.json", {"rank": 2})
    assert identify_model("m", tmp_path / "reranker") == load_artifact(tmp_path / "reranker").hash
    (tmp_path / "reranker/method.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"method\.json has 2 bytes"):
        identify_model("m", tmp_path / "reranker")


def test_a_folder_without_weights_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"no weights here \(expected a file of .bin or .safetensors\)"):
        identify_model("m", tmp_path)


def test_a_hub_name_is_known_by_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached = tmp_path / "models--owner--name"
    folder(cached / "snapshots" / COMMIT)
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(COMMIT)
    import transformers.utils.hub

    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True)
    assert identify_model("owner/name", None) == f"owner/name@{COMMIT}"
    with pytest.raises(DataError, match="'owner/other': no such folder here, and the hub"):
        identify_model("owner/other", None)


def test_an_embedded_model_that_is_not_shipped_names_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models._EMBEDDED, "embedded:none-1", ("odqa", "assets/none-1"))
    with pytest.raises(DataError, match=r"odqa train pipelines/none-1\.yaml"):
        models.embedded_folder("embedded:none-1")
