"""Rows of one batch with methods of their own: each gets what it gets alone. Alone means: attached, the only row."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from odqa.errors import ArtifactError, ArtifactMismatch, DataError
from odqa.frozen.backbone import Architecture, Backbone, fingerprint, load_backbone
from odqa.frozen.bank import Bank, Row
from odqa.frozen.method import Method, create_method, load_method
from odqa.frozen.peft_format import save_peft
from tests.tiny_models import tiny_bert, tiny_bert2bert, tiny_gpt2, tiny_llama, tiny_odqa_mini, tiny_t5

MODELS: dict[str, tuple[Architecture, Callable[..., Path], dict[str, Any]]] = {
    "gpt2": ("causal", tiny_gpt2, {}),
    "llama": ("causal", tiny_llama, {}),
    "t5": ("seq2seq", tiny_t5, {"factor": 1.0}),
    "bert2bert": ("seq2seq", tiny_bert2bert, {}),
    "odqa-mini": ("seq2seq", tiny_odqa_mini, {}),
    "bert": ("encoder", tiny_bert, {}),
}
WRITERS = [name for name, (architecture, _, _) in MODELS.items() if architecture != "encoder"]
# Every kind, and of each two that differ in length, rank or in what they change.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt-3": ("prompt-tuning", {"length": 3}),
    "prompt-7": ("prompt-tuning", {"length": 7}),
    "team/deep-5": ("deep-prompt", {"length": 5}),
    "team/prefix-2": ("prefix-tuning", {"length": 2, "inner": 4}),
    "prefix-4": ("prefix-tuning", {"length": 4, "inner": None, "cross": False}),
    "lora-2": ("lora", {"rank": 2, "alpha": 4.0}),
    "lora-5": ("lora", {"rank": 5, "alpha": 3.0}),
    "adapter-3": ("adapter", {"rank": 3}),
    "adapter-6": ("adapter", {"rank": 6, "norms": True, "cross": True}),
}
NAMES: list[str | None] = [*METHODS, None]
TEXTS = [[40 + (7 * row + place) % 60 for place in range(3 + 2 * (row % 4))] for row in range(len(NAMES))]
TARGETS = [[71, 72, 73][: 1 + row % 3] for row in range(len(NAMES))]
ORDER = [6, 0, 9, 3, 8, 1, 5, 7, 2, 4]


@dataclass(frozen=True)
class World:
    """A tiny model, and a folder with a method of each kind that was moved from its start."""

    backbone: Backbone
    folder: Path

    def alone(self, name: str | None, call: Callable[[], Any]) -> Any:
        """What the frozen model gives with this method attached as ever, without the bank."""
        if name is None:
            return call()
        method = load_method(self.folder / name, self.backbone)
        method.attach(self.backbone)
        try:
            return call()
        finally:
            method.detach()

    def written(self, name: str | None, ids: list[int], **options: Any) -> list[int]:
        def write() -> list[int]:
            return self.backbone.generate([ids], max_new_tokens=6, do_sample=False, **options)[0]

        return list(self.alone(name, write))


def moved(backbone: Backbone, kind: str, seed: int, **settings: Any) -> Method:
    method = create_method(kind, backbone, **settings)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in method.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.1)
    return method


_worlds: dict[str, World] = {}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("worlds")


def world_of(name: str, root: Path) -> World:
    if name not in _worlds:
        architecture, make, settings = MODELS[name]
        folder = make(root / name / "model", **settings)
        backbone = load_backbone(str(folder), architecture, device="cpu", dtype="float32")
        for seed, (user, (kind, of_kind)) in enumerate(METHODS.items()):
            moved(backbone, kind, seed, **of_kind).save(root / name / "users" / user)
        _worlds[name] = World(backbone, root / name / "users")
    return _worlds[name]


@pytest.fixture(params=WRITERS)
def world(request: pytest.FixtureRequest, root: Path) -> World:
    return world_of(str(request.param), root)


@pytest.fixture
def gpt2(root: Path) -> World:
    return world_of("gpt2", root)


# --- mixed is as alone ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_losses_of_a_mixed_batch_are_those_of_its_rows_alone(world: World) -> None:
    backbone, bank = world.backbone, Bank(world.backbone, world.folder)
    alone = [
        world.alone(name, lambda text=text, target=target: backbone.token_losses([text], [target])[0])
        for name, text, target in zip(NAMES, TEXTS, TARGETS, strict=True)
    ]
    assert len({round(float(losses[0]), 3) for losses in alone}) == len(alone), "every row differs from the others"
    for order in (range(len(NAMES)), ORDER):
        with bank.attached([NAMES[row] for row in order]):
            for side in ("left", "right"):
                mixed = backbone.token_losses(
                    [TEXTS[row] for row in order], [TARGETS[row] for row in order], padding=side
                )
                for row, losses in zip(order, mixed, strict=True):
                    # Losses of T5 are near 100 nats a token, so the tolerance is relative: float32 has 7 digits.
                    torch.testing.assert_close(losses[: len(alone[row])], alone[row], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}], ids=["greedy", "beams", "uncached"])
def test_a_mixed_batch_writes_what_its_rows_write_alone(world: World, options: dict[str, Any]) -> None:
    bank = Bank(world.backbone, world.folder)
    alone = [world.written(name, text, **options) for name, text in zip(NAMES, TEXTS, strict=True)]
    rows = [Row(TEXTS[row], NAMES[row]) for row in ORDER]
    assert bank.generate(rows, max_new_tokens=6, **options) == [alone[row] for row in ORDER]


def test_a_row_samples_what_its_generator_says_whatever_its_neighbours(world: World) -> None:
    bank = Bank(world.backbone, world.folder)

    def sampled(order: list[int]) -> tuple[list[Any], list[float]]:
        generators = [torch.Generator().manual_seed(row) for row in order]
        texts = bank.generate(
            [Row(TEXTS[row], NAMES[row]) for row in order], max_new_tokens=6, generators=generators, temperature=2.0
        )
        return texts, [float(torch.rand((), generator=generator)) for generator in generators]

    alone = [sampled([row]) for row in ORDER[:4]]
    texts, next_numbers = sampled(ORDER)
    assert texts[:4] == [text for (text,), _ in alone]
    assert next_numbers[:4] == [number for _, (number,) in alone], "a generator moves on as far as alone"


@torch.no_grad()
def test_states_of_an_encoder_are_those_of_the_rows_alone(root: Path) -> None:
    world = world_of("bert", root)
    backbone, bank = world.backbone, Bank(world.backbone, world.folder)
    alone = [
        world.alone(name, lambda text=text: backbone.forward([text])[0])
        for name, text in zip(NAMES, TEXTS, strict=True)
    ]
    with bank.attached(NAMES):
        mixed = backbone.forward(TEXTS)
    for found, expected in zip(mixed, alone, strict=True):
        torch.testing.assert_close(found[: len(expected)], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_eager_attention_mixes_too(gpt2: World) -> None:
    eager = load_backbone(gpt2.backbone.name, "causal", device="cpu", dtype="float32", attention="eager")
    with Bank(eager, gpt2.folder).attached(NAMES):
        found = eager.token_losses(TEXTS, TARGETS)
    with Bank(gpt2.backbone, gpt2.folder).attached(NAMES):
        expected = gpt2.backbone.token_losses(TEXTS, TARGETS)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_two_hundred_users_with_prompts_of_random_lengths(gpt2: World) -> None:
    bank, backbone = Bank(gpt2.backbone), gpt2.backbone
    chances = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (200,), generator=chances).tolist()
    texts = [[40 + row % 50] * size for row, size in enumerate(torch.randint(1, 9, (200,), generator=chances).tolist())]
    prompts = [moved(backbone, "prompt-tuning", row, length=length) for row, length in enumerate(lengths)]
    for row, prompt in enumerate(prompts):
        bank.add(str(row), prompt)
    written = bank.generate([Row(text, str(row)) for row, text in enumerate(texts)], max_new_tokens=4)
    for row in range(0, 200, 13):
        prompts[row].attach(backbone)
        assert written[row] == backbone.generate([texts[row]], max_new_tokens=4, do_sample=False)[0]
        prompts[row].detach()


def test_samples_have_the_probabilities_of_the_softmax(gpt2: World) -> None:
    bank = Bank(gpt2.backbone, gpt2.folder)
    generators = [torch.Generator().manual_seed(row) for row in range(600)]
    row = Row(TEXTS[0], "lora-2")
    first = [tokens[0] for tokens in bank.generate([row] * 600, max_new_tokens=1, generators=generators, top_k=3)]
    logits = gpt2.alone("lora-2", lambda: gpt2.backbone.forward([TEXTS[0]]))[0, -1]
    likely, tokens = logits.topk(3)
    for probability, token in zip(likely.softmax(0).tolist(), tokens.tolist(), strict=True):
        # 600 draws: a standard deviation is at most 0.02.
        assert first.count(token) / 600 == pytest.approx(probability, abs=0.07)
    assert set(first) <= set(tokens.tolist())


def test_the_backbone_comes_back_bit_identical_also_after_an_error(world: World) -> None:
    backbone = world.backbone
    with torch.no_grad():
        before = backbone.token_losses(TEXTS, TARGETS)
        with pytest.raises(ZeroDivisionError), Bank(backbone, world.folder).attached(NAMES):
            1 / 0  # noqa: B018
        assert torch.equal(backbone.token_losses(TEXTS, TARGETS), before)
    assert fingerprint(backbone.model) == backbone.fingerprint


def test_a_batch_of_another_number_of_rows_is_no_guess(gpt2: World) -> None:
    for name in ("prompt-3", "lora-2"):
        with Bank(gpt2.backbone, gpt2.folder).attached([name, None]), pytest.raises((DataError, ValueError), match="2"):
            gpt2.backbone.forward(TEXTS[:3])


# --- names, files, memory ---------------------------------------------------------------------------------------------


def test_an_unknown_user_is_an_error_that_names_the_known_ones(gpt2: World) -> None:
    bank = Bank(gpt2.backbone, gpt2.folder)
    assert bank.names() == sorted(METHODS)
    for name in ("prompt-4", "../users/lora-2", "", "team", str(gpt2.folder / "lora-2")):
        with pytest.raises(ArtifactError, match=r"row 1: the bank knows no .*; it has adapter-3, .* and 1 more\."):
            bank.generate([Row(TEXTS[0]), Row(TEXTS[1], name)], max_new_tokens=2)
    with pytest.raises(ArtifactError, match="it has no methods"):
        Bank(gpt2.backbone).parts("anna")
    with pytest.raises(DataError, match="no such folder"):
        Bank(gpt2.backbone, gpt2.folder / "nowhere")


def test_a_method_of_another_backbone_is_refused(gpt2: World, root: Path) -> None:
    other = world_of("llama", root)
    bank = Bank(other.backbone, gpt2.folder)
    with pytest.raises(
        ArtifactMismatch, match=f"row 0: .*lora-2: .* trained on backbone {gpt2.backbone.fingerprint[:8]}"
    ):
        bank.mix(["lora-2"])
    with pytest.raises(ArtifactMismatch):
        bank.add("lora", load_method(gpt2.folder / "lora-2", gpt2.backbone))


def test_one_row_without_room_is_named_and_the_others_go_on_if_asked(gpt2: World) -> None:
    backbone, bank = gpt2.backbone, Bank(gpt2.backbone, gpt2.folder)
    bank.add("long", create_method("prompt-tuning", backbone, length=240))
    rows = [
        Row(TEXTS[0], "prompt-3"),
        Row([41] * 12, "long"),
        Row(TEXTS[2], "nobody"),
        Row(TEXTS[3]),
        Row([], "lora-2"),
    ]
    with pytest.raises(
        DataError, match=r"row 1 \(long\) needs 258 tokens \(text 12, prompt 240, new 6\); .* window of 256"
    ):
        bank.generate(rows, max_new_tokens=6)
    results = bank.generate(rows, max_new_tokens=6, on_error="return")
    assert results[0] == gpt2.written("prompt-3", TEXTS[0]) and results[3] == gpt2.written(None, TEXTS[3])
    assert [str(error).partition(":")[0] for error in results if isinstance(error, DataError)] == [
        "row 1 (long) needs 258 tokens (text 12, prompt 240, new 6); "
        + f"{backbone.name} has a window of 256. Shorten one of them.",
        "row 4 (lora-2)",
    ]
    assert isinstance(results[2], ArtifactError) and "knows no 'nobody'" in str(results[2])
    assert bank.generate(rows[1:3], max_new_tokens=6, on_error="return")[1].__class__ is ArtifactError
    with bank.attached([None, "long"]), pytest.raises(DataError, match="row 1: a prompt of 240 vectors and its text"):
        backbone.forward([[41] * 20, [41] * 20])
    exact = Row([41] * 10, "long")  # 10 + 240 + 6 = 256
    assert bank.generate([exact], max_new_tokens=6)[0] == bank.generate([exact, Row([42] * 99)], max_new_tokens=6)[0]


def test_a_text_longer_than_an_encoders_window_is_named(root: Path) -> None:
    world = world_of("odqa-mini", root)
    bank = Bank(world.backbone, world.folder)
    results = bank.generate([Row([41] * 129), Row(TEXTS[1], "prompt-7")], max_new_tokens=6, on_error="return")
    assert "row 0 needs 129 tokens (text 129)" in str(results[0])
    assert results[1] == world.written("prompt-7", TEXTS[1])


def test_what_is_kept_in_memory_is_bounded_and_used_last(gpt2: World) -> None:
    sizes = {name: Bank(gpt2.backbone, gpt2.folder).parts(name).bytes for name in METHODS}
    # LoRA of rank 2: 2 (d_in + d_out) values of 4 bytes a map; GPT-2's maps are 32-96, 32-32, 32-128 and 128-32.
    assert sizes["lora-2"] == 4 * 2 * 2 * (128 + 64 + 160 + 160)
    # A prompt is kept as keys and values: 2 layers, 3 positions, 2 * 32 values.
    assert sizes["prompt-3"] == 4 * 2 * 3 * 2 * 32
    bank = Bank(gpt2.backbone, gpt2.folder, keep_bytes=sizes["lora-2"] + sizes["prompt-3"] + sizes["prompt-7"])
    for name in ("lora-2", "prompt-3", "prompt-7", "lora-2"):
        bank.parts(name)
    assert bank.kept == ["prompt-3", "prompt-7", "lora-2"]
    bank.parts("prefix-4")  # larger than prompt-3
    assert bank.kept == ["lora-2", "prefix-4"] if sizes["prefix-4"] > sizes["prompt-3"] + sizes["prompt-7"] else True
    assert bank.kept_bytes == sum(sizes[name] for name in bank.kept) <= bank.keep_bytes
    tiny = Bank(gpt2.backbone, gpt2.folder, keep_bytes=0)
    assert tiny.generate([Row(TEXTS[0], "lora-2")], max_new_tokens=6) == [gpt2.written("lora-2", TEXTS[0])]
    assert tiny.kept == [] and tiny.kept_bytes == 0


def test_a_method_in_memory_is_not_read_again_unless_its_file_changed(gpt2: World, tmp_path: Path) -> None:
    shutil.copytree(gpt2.folder / "lora-2", tmp_path / "anna")
    bank = Bank(gpt2.backbone, tmp_path)
    first = bank.parts("anna")
    assert bank.parts("anna") is first
    moved(gpt2.backbone, "lora", 9, rank=3, alpha=6.0).save(tmp_path / "anna")
    changed = bank.parts("anna")
    assert changed is not first and changed.bytes > first.bytes and bank.kept_bytes == changed.bytes


def test_a_checkpoint_of_peft_is_a_member_too(gpt2: World, tmp_path: Path) -> None:
    for name in ("lora-5", "prefix-4"):
        save_peft(load_method(gpt2.folder / name, gpt2.backbone), gpt2.backbone, tmp_path / name)
    bank = Bank(gpt2.backbone, tmp_path)
    assert bank.names() == ["lora-5", "prefix-4"]
    written = bank.generate([Row(TEXTS[0], "prefix-4"), Row(TEXTS[1], "lora-5")], max_new_tokens=6)
    assert written == [gpt2.written("prefix-4", TEXTS[0]), gpt2.written("lora-5", TEXTS[1])]


def test_a_damaged_or_unfit_member_is_one_clear_error(gpt2: World, tmp_path: Path) -> None:
    create_method("fine-tuning", gpt2.backbone).save(tmp_path / "tuned")
    for name in ("cut", "renamed", "empty", "other-length"):
        shutil.copytree(gpt2.folder / "prompt-3", tmp_path / name)
    tensors = tmp_path / "cut" / "method.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:40])
    (tmp_path / "renamed" / "method.json").write_text('{"kind": "prompt-tuning", "settings": {}}')
    (tmp_path / "empty" / "method.safetensors").unlink()
    description = tmp_path / "other-length" / "method.json"
    named = json.loads(description.read_text())
    named["settings"]["length"] = 4
    description.write_text(json.dumps(named))
    bank = Bank(gpt2.backbone, tmp_path)
    for name, message in {
        "tuned": "fine-tuning cannot be one row's own; prompt-tuning, deep-prompt, prefix-tuning, lora, adapter can",
        "cut": "a damaged method",
        "renamed": "backbone is missing",
        "empty": "method.safetensors is missing",
        "other-length": r"prompt has shape \(3, 32\), expected \(4, 32\)",
    }.items():
        with pytest.raises(ArtifactError, match=message):
            bank.parts(name)


def test_options_that_contradict_each_other_are_refused(gpt2: World) -> None:
    bank = Bank(gpt2.backbone, gpt2.folder)
    for options in (
        {"do_sample": True},
        {"num_return_sequences": 2},
        {"generators": [torch.Generator()]},
        {"generators": [torch.Generator()] * 2, "num_beams": 2},
    ):
        with pytest.raises(ValueError, match="generate: "):
            bank.generate([Row(TEXTS[0]), Row(TEXTS[1])], max_new_tokens=2, **options)
