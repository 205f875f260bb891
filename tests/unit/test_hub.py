"""Methods from folders and from the hub. The hub is a folder of this test: fakes stand where the network would be."""

import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.frozen.backbone import Backbone, load_backbone
from odqa.frozen.hub import FILES
from odqa.frozen.lora import Lora
from odqa.frozen.method import Method, create_method
from odqa.frozen.peft_format import save_peft
from odqa.frozen.prompt_tuning import PromptTuning
from tests.tiny_models import tiny_gpt2


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(str(tiny_gpt2(tmp_path_factory.mktemp("models") / "gpt2")), "causal", device="cpu")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What lies on the hub, a folder a repository; it gives and takes what the real one is asked to."""
    root = tmp_path / "hub"

    class FakeHfApi:
        def __init__(self, token: object = None) -> None:
            self.token = token

        def create_repo(self, repo_id: str, *, private: bool | None, exist_ok: bool) -> Any:
            if self.token == "wrong":
                raise PermissionError("401: who are you?\nmore")
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, *, repo_id: str, folder_path: Path, revision: str | None, commit_message: str) -> Any:
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def fake_download(repo_id: str, *, revision: str | None, token: object, allow_patterns: Sequence[str]) -> str:
        if not (root / repo_id).is_dir():
            raise FileNotFoundError(f"404: no {repo_id}")
        folder = tmp_path / "cache" / repo_id
        folder.mkdir(parents=True, exist_ok=True)
        for file in (root / repo_id).iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, folder)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.HfApi", FakeHfApi)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    return root


def equal(one: Method, other: Method) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_pushed_and_fetched_is_the_same_method(backbone: Backbone, hub: Path) -> None:
    method = create_method("prompt-tuning", backbone, length=3)
    assert method.push_to_hub("anna/prompt", backbone) == "https://hub/anna/prompt/commit/1"
    assert sorted(file.name for file in (hub / "anna/prompt").iterdir()) == [
        "README.md",
        "method.json",
        "method.safetensors",
    ]
    found = Method.from_pretrained("anna/prompt", backbone)
    assert isinstance(found, PromptTuning) and equal(found, method)
    assert equal(PromptTuning.from_pretrained("anna/prompt", backbone), method)
    card = (hub / "anna/prompt/README.md").read_text()
    assert "library_name: odqa" in card and "- prompt-tuning" in card and "96 trained values" in card
    assert backbone.fingerprint in card
    assert str(Path(backbone.name).parent) not in card, "a place of this machine is nobody's business"


def test_pefts_files_go_along_where_asked_for(backbone: Backbone, hub: Path) -> None:
    lora = create_method("lora", backbone, rank=2, alpha=4.0)
    lora.push_to_hub("anna/lora", backbone, with_peft=True)
    assert {file.name for file in (hub / "anna/lora").iterdir()} == {*FILES, "README.md"}
    for name in ("method.json", "method.safetensors"):
        (hub / "anna/lora" / name).unlink()
    found = Lora.from_pretrained("anna/lora", backbone)  # now what any PEFT user would have pushed
    assert all(torch.equal(found.A[key], tensor) for key, tensor in lora.A.items())  # type: ignore[attr-defined]
    with pytest.raises(ArtifactError, match="PEFT has no adapter"):
        create_method("adapter", backbone, rank=2).push_to_hub("anna/adapter", backbone, with_peft=True)
    assert not (hub / "anna/adapter").exists()


def test_a_folder_of_either_format_is_taken(backbone: Backbone, tmp_path: Path) -> None:
    method = create_method("prompt-tuning", backbone, length=3)
    method.save_pretrained(tmp_path / "ours")
    save_peft(method, backbone, tmp_path / "theirs")
    for name in ("ours", "theirs"):
        assert equal(Method.from_pretrained(str(tmp_path / name), backbone), method)


def test_what_is_not_there_or_not_it_is_one_line(
    backbone: Backbone, hub: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    method = create_method("prompt-tuning", backbone, length=3)
    method.push_to_hub("anna/prompt", backbone)
    with pytest.raises(DataError, match=r"method 'anna/no': no such folder here, .* \(404: no anna/no\)\.$"):
        Method.from_pretrained("anna/no", backbone)
    with pytest.raises(ArtifactError, match="holds prompt-tuning, not lora"):
        Lora.from_pretrained("anna/prompt", backbone)
    (hub / "anna/model").mkdir()
    with pytest.raises(ArtifactError, match="anna/model: no method here"):
        Method.from_pretrained("anna/model", backbone)
    with pytest.raises(DataError, match=r"anna/new: the hub does not take it \(401: who are you\?\)\.$"):
        method.push_to_hub("anna/new", backbone, token="wrong")
    other = load_backbone(str(tiny_gpt2(tmp_path / "other", seed=7)), "causal", device="cpu")
    with pytest.raises(ArtifactMismatch):
        Method.from_pretrained("anna/prompt", other)


def test_without_a_network_a_name_is_one_line_too(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real client, told to be offline."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="no such folder here, and the hub does not give it"):
        Method.from_pretrained("odqa/there-is-no-such-method", backbone)
    with pytest.raises(DataError, match="no such folder here, and the hub does not give it"):
        Method.from_pretrained("not a name", backbone)
