"""Trainings as jobs: the weighted mean of trained models."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from odqa import training
from odqa.artifacts import building, load_artifact
from odqa.errors import ArtifactMismatch, RecipeError
from odqa.frozen.backbone import load_backbone
from odqa.frozen.method import create_method
from odqa.frozen.pairs import PairHead
from odqa.frozen.spans import SpanHead
from odqa.read.span import KIND, SpanModel, load_span_reader, save_span_reader
from odqa.rerank.train import PairModel, save_reranker
from tests.small_world import write_yaml
from tests.tiny_models import tiny_bert


def reader(folder: Path, backbone: Path, seed: int, rank: int = 2) -> Path:
    """A finished artifact with random values."""
    frozen = load_backbone(str(backbone), "encoder", device="cpu", dtype="float32")
    model = SpanModel(frozen, create_method("lora", frozen, rank=rank, alpha=4.0), SpanHead(frozen.width), 8, "row")
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.method.parameters(), *model.head.parameters()]:
            tensor.copy_(torch.randn_like(tensor))
    with building(folder, KIND, recipe={"seed": seed}, inputs={}) as draft:
        save_span_reader(draft.path, model)
        draft.extra["backbone"] = {"name": str(backbone), "fingerprint": frozen.fingerprint}
    return folder


def reranker(folder: Path, backbone: Path, seed: int) -> Path:
    """A finished artifact with random values."""
    frozen = load_backbone(str(backbone), "encoder", device="cpu", dtype="float32")
    model = PairModel(frozen, create_method("lora", frozen, rank=2, alpha=4.0), PairHead(frozen.width))
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.method.parameters(), *model.head.parameters()]:
            tensor.copy_(torch.randn_like(tensor))
    with building(folder, "reranker", recipe={"seed": seed}, inputs={}) as draft:
        save_reranker(draft.path, model)
        draft.extra["backbone"] = {"name": str(backbone), "fingerprint": frozen.fingerprint}
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("models") / "bert")


def recipe(folder: Path, one: Path, two: Path, *, second: float = 0.75) -> Path:
    parts = [{"model": str(one), "method": 0.25, "head": 1.0}, {"model": str(two), "method": second}]
    return write_yaml(folder / "mean.yaml", {"kind": "train-average", "parts": parts, "like": 1})


def test_a_mean_of_readers_is_a_reader(backbone: Path, tmp_path: Path) -> None:
    one, two = reader(tmp_path / "one", backbone, 1), reader(tmp_path / "two", backbone, 2)
    made = training.train(recipe(tmp_path, one, two), out=tmp_path / "mean")
    first, second, mean = (load_file(folder / "method.safetensors") for folder in (one, two, made.path))
    for name, tensor in mean.items():
        assert torch.allclose(tensor.float(), 0.25 * first[name].float() + 0.75 * second[name].float(), atol=2e-3)
    heads = [load_file(folder / "head.safetensors") for folder in (one, made.path)]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in heads[0])
    assert load_span_reader(made.path, device="cpu", dtype="float32").no_answer == "row"
    said: list[str] = []
    training.train(recipe(tmp_path, one, two), out=tmp_path / "mean", log=said.append)
    assert said == [f"{tmp_path / 'mean'}: made already"]


def test_a_mean_of_rerankers_is_a_reranker_and_one_of_anything_else_is_refused(backbone: Path, tmp_path: Path) -> None:
    folders = [reranker(tmp_path / str(seed), backbone, seed) for seed in (1, 2)]
    parts = [{"model": str(folder), "method": 0.5, "head": 0.5} for folder in folders]
    made = training.train(
        write_yaml(tmp_path / "mean.yaml", {"kind": "train-average", "parts": parts}), out=tmp_path / "mean"
    )
    assert made.kind == "reranker" and (made.path / "reranker.json").is_file()
    first, second, mean = (load_file(folder / "head.safetensors") for folder in (*folders, made.path))
    assert all(torch.allclose(mean[name], (first[name] + second[name]) / 2) for name in mean)
    with building(tmp_path / "index", "index", recipe={}, inputs={}):
        pass
    parts[0]["model"] = str(tmp_path / "index")
    for name in ("method.safetensors", "method.json", "head.safetensors"):
        (tmp_path / "index" / name).write_bytes((folders[0] / name).read_bytes())
    with pytest.raises(ArtifactMismatch, match="a mean is of span readers or re-rankers"):
        training.train(write_yaml(tmp_path / "no.yaml", {"kind": "train-average", "parts": parts}), out=tmp_path / "no")


def test_a_part_that_changed_makes_the_mean_anew(backbone: Path, tmp_path: Path) -> None:
    one, two = reader(tmp_path / "one", backbone, 1), reader(tmp_path / "two", backbone, 2)
    before = training.train(recipe(tmp_path, one, two), out=tmp_path / "mean").hash
    head = {name: tensor + 1 for name, tensor in load_file(one / "head.safetensors").items()}
    save_file(head, one / "head.safetensors")
    assert training.train(recipe(tmp_path, one, two), out=tmp_path / "mean").hash != before
    assert load_artifact(tmp_path / "mean", KIND, verify=True)


def test_parts_of_different_shapes_have_no_mean(backbone: Path, tmp_path: Path) -> None:
    one, two = reader(tmp_path / "one", backbone, 1), reader(tmp_path / "two", backbone, 2, rank=3)
    with pytest.raises(ArtifactMismatch, match="the parts' methods have different settings or backbones"):
        training.train(recipe(tmp_path, one, two), out=tmp_path / "mean")


def test_weights_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"the weights of method add up to 0\.75; they must add up to 1"):
        training.train(recipe(tmp_path, tmp_path, tmp_path, second=0.5), out=tmp_path / "mean")
