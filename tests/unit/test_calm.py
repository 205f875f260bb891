"""Two frozen models composed: what the anchor reads of the other, what it never sees, and that nothing else changes."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from odqa import jobs, training
from odqa.config import CalmLab, CalmSettings
from odqa.errors import ArtifactMismatch, DataError
from odqa.frozen.augment import Augmenting, choose_links
from odqa.frozen.backbone import Architecture, Backbone, frozen_guard, load_backbone
from odqa.frozen.calm import Calm
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.layout import source_ends
from odqa.frozen.links import Link, rotated
from odqa.frozen.method import Method, create_method, load_method
from odqa.frozen.prefix import PrefixTuning, prefix_of_prompt
from odqa.frozen.prompt_tuning import PromptTuning
from odqa.labs.calm import ARMS, KEYED, KNOWN, NUMERIC, SUBSTITUTION, run
from odqa.labs.runner import Desk
from odqa.read.lm import LmReader
from odqa.read.prompts import AnswerRules, PromptTemplate
from odqa.recipes import Places
from odqa.types import PackedContext, Query
from tests.small_world import passages, questions, write_jsonl, write_yaml
from tests.tiny_models import tiny_bert2bert, tiny_gpt2, tiny_llama, tiny_odqa_mini, tiny_t5

SOURCES = [[41, 42, 43, 44, 45, 46, 47], [51, 52, 53], [61, 62, 63, 64, 65]]
TARGETS = [[71, 72, 73], [74, 75], [76]]
WIDTH, OTHER_WIDTH, OTHER_LAYERS = 32, 24, 3  # of the anchors in tests.tiny_models, and of the augmenting models here


@dataclass(frozen=True)
class Case:
    """An anchor, and the augmenting models that are composed with it."""

    anchor: Callable[[Path], Path]
    architecture: Architecture
    others: tuple[str, ...]


CASES = {
    "gpt2 reads gpt2": Case(tiny_gpt2, "causal", ("gpt2",)),
    "llama reads two": Case(tiny_llama, "causal", ("llama", "bert")),
    "gpt2 reads bert": Case(tiny_gpt2, "causal", ("bert",)),
    "t5 reads llama": Case(lambda path: tiny_t5(path, factor=1.0), "seq2seq", ("llama",)),
    "bert2bert reads gpt2": Case(tiny_bert2bert, "seq2seq", ("gpt2",)),
    "odqa-mini reads two": Case(tiny_odqa_mini, "seq2seq", ("bert", "llama")),
}


def other_model(kind: str, tokenizer: Any, path: Path, *, seed: int = 1, window: int = 64) -> Path:
    """A random model of another width and depth than the anchors', with the anchor's tokenizer."""
    from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    common: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "initializer_range": 0.4}
    long: dict[str, Any] = {
        "hidden_size": OTHER_WIDTH,
        "num_hidden_layers": OTHER_LAYERS,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": window,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {
            "gpt2": lambda: GPT2LMHeadModel(
                GPT2Config(n_positions=window, n_embd=OTHER_WIDTH, n_layer=OTHER_LAYERS, n_head=2, **common)
            ),
            "llama": lambda: LlamaForCausalLM(LlamaConfig(**long, **common)),
            "bert": lambda: BertModel(BertConfig(**long, **common)),
        }[kind]()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@dataclass
class Composed:
    """A composition whose links do something, and its models."""

    anchor: Backbone
    others: list[Backbone]
    method: Calm


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Backbone, list[Backbone]]]:
    root, known = tmp_path_factory.mktemp("models"), dict[str, tuple[Backbone, list[Backbone]]]()

    def load(name: str) -> tuple[Backbone, list[Backbone]]:
        if name not in known:
            case, place = CASES[name], root / name.replace(" ", "-")
            anchor = load_float(str(case.anchor(place / "anchor")), case.architecture)
            others = [
                load_float(
                    str(other_model(kind, anchor.tokenizer, place / kind)), "encoder" if kind == "bert" else "causal"
                )
                for kind in case.others
            ]
            known[name] = anchor, others
        return known[name]

    return load


def load_float(name: str, architecture: Architecture) -> Backbone:
    return load_backbone(name, architecture, device="cpu", dtype="float32")


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def composed(name: str, models: Callable[[str], tuple[Backbone, list[Backbone]]]) -> Iterator[Composed]:
    anchor, others = models(name)
    method = active(Calm(anchor, models=[Augmenting(other) for other in others]))
    yield Composed(anchor, others, method)
    if method.is_attached:
        method.detach()


@pytest.fixture
def pair(models: Callable[[str], tuple[Backbone, list[Backbone]]]) -> Iterator[tuple[Backbone, Backbone]]:
    anchor, (other,) = models("gpt2 reads gpt2")
    yield anchor, other


def active(method: Calm, seed: int = 5) -> Calm:
    """The method with output maps that are not zero, wide enough to change what is written."""
    generator = torch.Generator().manual_seed(seed)
    for key, tensor in method.named_parameters():
        if key.endswith("out"):
            nn.init.normal_(tensor, std=0.3, generator=generator)
    return method


# --- a fresh composition, and what is trained -------------------------------------------------------------------------


def test_a_fresh_composition_is_the_anchor_to_the_bit(
    name: str, models: Callable[[str], tuple[Backbone, list[Backbone]]]
) -> None:
    anchor, others = models(name)
    before, written = anchor.forward(SOURCES, TARGETS), anchor.generate(SOURCES, max_new_tokens=5)
    method = Calm(anchor, models=[Augmenting(other) for other in others])
    method.attach(anchor)
    try:
        assert torch.equal(anchor.forward(SOURCES, TARGETS), before)
        assert anchor.generate(SOURCES, max_new_tokens=5) == written
    finally:
        method.detach()


def test_links_change_the_anchor_and_detaching_gives_it_back_to_the_bit(composed: Composed) -> None:
    anchor = composed.anchor
    before = anchor.forward(SOURCES, TARGETS)
    with frozen_guard(anchor), frozen_guard(composed.others[0]):
        composed.method.attach(anchor)
        assert (anchor.forward(SOURCES, TARGETS) - before).abs().max() > 0.1
        composed.method.detach()
    assert torch.equal(anchor.forward(SOURCES, TARGETS), before)
    assert not anchor.model._forward_hooks and not anchor.model._forward_pre_hooks


def test_links_have_as_many_values_as_the_paper_says_and_frozen_are_all_models(composed: Composed) -> None:
    # Anchors have 2 layers, the others 3: 3 links a model, of 24 * 32 + 4 * 32 * 32 values.
    count = composed.method.count(composed.anchor)
    assert count.trainable == len(composed.others) * 3 * (OTHER_WIDTH * WIDTH + 4 * WIDTH**2)
    assert count.stored_bytes == 4 * count.trainable
    assert count.frozen == sum(model.count_parameters() for model in (composed.anchor, *composed.others))
    names = {key.rsplit(".", 1)[1] for key in composed.method.tensors()}
    assert names == {"project", "query", "key", "value", "out"}


def test_only_links_have_gradients_and_every_one_of_them(composed: Composed) -> None:
    composed.method.attach(composed.anchor)
    composed.anchor.loss(SOURCES, TARGETS).backward()  # type: ignore[no-untyped-call]
    for model in (composed.anchor, *composed.others):
        assert all(tensor.grad is None for tensor in model.model.parameters())
    assert all(tensor.grad is not None and tensor.grad.abs().max() > 0 for tensor in composed.method.parameters())


def test_training_lowers_the_loss_and_moves_no_weight_of_a_model(
    pair: tuple[Backbone, Backbone], tmp_path: Path
) -> None:
    anchor, other = pair
    method = Calm(anchor, models=[Augmenting(other)])
    method.attach(anchor)
    try:
        first = anchor.loss(SOURCES, TARGETS).item()
        with frozen_guard(anchor), frozen_guard(other):
            settings = FitSettings(steps=12, learning_rates={"method": 0.01}, autocast=False)
            fit(
                {"method": method},
                lambda _: (SOURCES, TARGETS),
                lambda batch: anchor.loss(*batch),
                settings,
                checkpoint=tmp_path / "checkpoint",
            )
        assert anchor.loss(SOURCES, TARGETS).item() < 0.7 * first
    finally:
        method.detach()


# --- what a token sees ------------------------------------------------------------------------------------------------


def test_the_composition_computes_the_papers_formula(pair: tuple[Backbone, Backbone]) -> None:
    """Against the same written as loops over tokens, heads and links, from the two models' own layers."""
    anchor, other = pair
    method = active(Calm(anchor, models=[Augmenting(other, links=[(3, 0), (1, 1), (2, 2)])]))
    text = SOURCES[0] + TARGETS[0]
    expected = by_hand(anchor, other, method, text)
    method.attach(anchor)
    try:
        found = anchor.forward([text])[0]
    finally:
        method.detach()
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)  # logits of up to 100, in another order of sums


@torch.no_grad()
def by_hand(anchor: Backbone, other: Backbone, method: Calm, text: list[int]) -> torch.Tensor:
    ids = torch.tensor([text])
    seen: list[Any] = []
    blocks = other.model.transformer.h
    handles = [block.register_forward_hook(lambda _m, _a, output: seen.append(output)) for block in blocks]
    other.model(ids)
    for handle in handles:
        handle.remove()
    states = [found[0] if isinstance(found, tuple) else found for found in seen]
    body = anchor.model.transformer
    hidden = body.wte(ids) + body.wpe(torch.arange(len(text))[None])
    made: Any = method.links[0]
    links = {place: (states[layer - 1][0], made[place]) for place, layer in enumerate((3, 1, 2))}
    for number in range(3):
        other_states, link = links[number]
        hidden = hidden + torch.stack(
            [attended(link, hidden[0, t], other_states[: t + 1], t) for t in range(len(text))]
        )
        if number < 2:
            output = body.h[number](hidden)
            hidden = output[0] if isinstance(output, tuple) else output
    logits: torch.Tensor = anchor.model.lm_head(body.ln_f(hidden))[0]
    return logits


def attended(link: Link, hidden: torch.Tensor, others: torch.Tensor, place: int) -> torch.Tensor:
    """f_cross(f_proj(H_A), h) of one token at a place, from the states of the tokens up to it: (D_B,)."""

    def scaled(vector: torch.Tensor) -> torch.Tensor:
        return vector / vector.square().mean().sqrt()

    def turned(vector: torch.Tensor, at: int) -> torch.Tensor:
        half = len(vector) // 2
        pairs = torch.complex(vector[:half], vector[half:])
        angles = torch.tensor([at * 10_000 ** (-i / half) for i in range(half)])
        result = pairs * torch.polar(torch.ones(half), angles)
        return torch.cat([result.real, result.imag])

    size = WIDTH // link.heads
    parts = []
    for head in range(link.heads):
        own = slice(head * size, (head + 1) * size)
        query = turned(link.query[own] @ scaled(hidden), place)
        seen = [link.project @ scaled(state) for state in others]
        weights = torch.stack([query @ turned(link.key[own] @ c, at) / math.sqrt(size) for at, c in enumerate(seen)])
        values = torch.stack([link.value[own] @ c for c in seen])
        parts.append(weights.softmax(0) @ values)
    return link.out @ torch.cat(parts)


def test_a_token_sees_nothing_that_comes_later(composed: Composed) -> None:
    """Logits in the answer do not move with the answer's later tokens; with a causal m_A nor do those in the source."""
    composed.method.attach(composed.anchor)
    one = composed.anchor.forward([SOURCES[0]], [[71, 72, 73, 74]])[0]
    two = composed.anchor.forward([SOURCES[0]], [[71, 72, 99, 98]])[0]
    reads_all = all(other.architecture == "causal" for other in composed.others)
    if composed.anchor.architecture == "seq2seq":
        same = 3  # the third logits are for the token that differs, from the two before it
        start = 0
    else:
        same = len(SOURCES[0]) + 2
        start = 0 if reads_all else len(SOURCES[0])
    assert torch.equal(one[start:same], two[start:same])
    assert not torch.allclose(one[same:], two[same:])
    if reads_all and composed.anchor.architecture == "causal":
        changed = composed.anchor.forward([[*SOURCES[0][:4], 9, 9, 9]], [[71, 72, 73, 74]])[0]
        assert torch.equal(one[:4], changed[:4])


def test_m_a_reads_what_is_being_written(pair: tuple[Backbone, Backbone]) -> None:
    """With what it reads cut off at the source, the first token is as likely as before, those behind are not."""
    anchor, other = pair
    losses = {}
    for reads in ("all", "source"):
        method = active(Calm(anchor, models=[Augmenting(other, reads=reads)]))
        method.attach(anchor)
        losses[reads] = anchor.token_losses(SOURCES[:1], TARGETS[:1])[0]
        method.detach()
    torch.testing.assert_close(losses["all"][0], losses["source"][0])
    assert (losses["all"][1:] - losses["source"][1:]).abs().min() > 0.01


def test_padding_and_neighbours_change_nothing(composed: Composed) -> None:
    composed.method.attach(composed.anchor)
    together = composed.anchor.token_losses(SOURCES, TARGETS, padding="left")
    right = composed.anchor.token_losses(SOURCES, TARGETS, padding="right")
    torch.testing.assert_close(together, right, atol=1e-4, rtol=1e-4)
    for row, (source, target) in enumerate(zip(SOURCES, TARGETS, strict=True)):
        alone = composed.anchor.token_losses([source], [target])[0]
        torch.testing.assert_close(together[row, : len(target)], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generation_with_cache_writes_what_it_writes_without(composed: Composed, options: dict[str, Any]) -> None:
    composed.method.attach(composed.anchor)
    plain = composed.anchor.generate(SOURCES, max_new_tokens=6, use_cache=False, **options)
    assert composed.anchor.generate(SOURCES, max_new_tokens=6, use_cache=True, **options) == plain
    each = options.get("num_return_sequences", 1)
    alone = [composed.anchor.generate([source], max_new_tokens=6, **options) for source in SOURCES]
    assert [text for texts in alone for text in texts] == plain
    assert len(plain) == each * len(SOURCES)


def test_a_written_text_is_as_likely_as_its_logits_step_by_step(composed: Composed) -> None:
    """Greedy generation with a cache takes the best token of the whole pass over what it has written, at every step."""
    composed.method.attach(composed.anchor)
    (written,) = composed.anchor.generate(SOURCES[:1], max_new_tokens=5)
    logits = composed.anchor.forward(SOURCES[:1], [written])[0]
    if composed.anchor.architecture == "causal":
        logits = logits[len(SOURCES[0]) - 1 : -1]
    assert logits.argmax(-1).tolist() == written


def test_several_models_each_have_their_say(models: Callable[[str], tuple[Backbone, list[Backbone]]]) -> None:
    anchor, others = models("llama reads two")
    both = active(Calm(anchor, models=[Augmenting(other) for other in others]))
    both.attach(anchor)
    together = anchor.forward(SOURCES, TARGETS)
    both.detach()
    for number, other in enumerate(others):
        for key, tensor in both.named_parameters():
            if key.startswith(f"links.{1 - number}.") and key.endswith("out"):
                tensor.data.zero_()
        both.attach(anchor)
        silenced = anchor.forward(SOURCES, TARGETS)
        both.detach()
        alone = Calm(anchor, models=[Augmenting(other)])
        for key, tensor in alone.named_parameters():
            tensor.data.copy_(both.get_parameter(key.replace("links.0.", f"links.{number}.", 1)))
        alone.attach(anchor)
        torch.testing.assert_close(anchor.forward(SOURCES, TARGETS), silenced, atol=1e-4, rtol=1e-4)
        alone.detach()
        assert (silenced - together).abs().max() > 0.1
        active(both)


def test_rotation_keeps_lengths_and_counts_distances_only() -> None:
    states = torch.randn(1, 1, 2, 8, generator=torch.Generator().manual_seed(0))
    near, far = (rotated(states, torch.tensor([[at, at + 3]])) for at in (0, 50))
    torch.testing.assert_close(near.norm(dim=-1), states.norm(dim=-1))
    product = [(turned[0, 0, 0] @ turned[0, 0, 1]).item() for turned in (near, far)]
    assert product[0] == pytest.approx(product[1], abs=1e-4)
    torch.testing.assert_close(near[..., 0, :], states[..., 0, :])  # position 0 is no turn


# --- saving and other weights -----------------------------------------------------------------------------------------


def test_only_the_links_are_saved_and_loading_finds_the_models(composed: Composed, tmp_path: Path) -> None:
    composed.method.attach(composed.anchor)
    expected = composed.anchor.forward(SOURCES, TARGETS)
    composed.method.detach()
    composed.method.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["method.json", "method.safetensors"]
    saved = load_file(tmp_path / "method.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == composed.method.count(composed.anchor).trainable
    loaded = load_method(tmp_path, composed.anchor)
    assert isinstance(loaded, Calm)
    assert [model.fingerprint for model in loaded.models] == [model.fingerprint for model in composed.others]
    loaded.attach(composed.anchor)
    try:
        assert torch.equal(composed.anchor.forward(SOURCES, TARGETS), expected)
    finally:
        loaded.detach()


def test_links_of_another_pair_are_refused(pair: tuple[Backbone, Backbone], tmp_path: Path) -> None:
    anchor, other = pair
    Calm(anchor, models=[Augmenting(other)]).save(tmp_path / "links")
    elsewhere = load_float(str(tiny_gpt2(tmp_path / "anchor", seed=3)), "causal")
    with pytest.raises(ArtifactMismatch, match=f"trained on backbone {anchor.fingerprint[:8]}"):
        load_method(tmp_path / "links", elsewhere)
    changed = load_float(str(other_model("gpt2", anchor.tokenizer, tmp_path / "other", seed=9)), "causal")
    description = (tmp_path / "links" / "method.json").read_text()
    (tmp_path / "links" / "method.json").write_text(description.replace(other.name, changed.name))
    with pytest.raises(ArtifactMismatch, match=f"with an augmenting model {other.fingerprint[:8]}"):
        load_method(tmp_path / "links", anchor)


def test_links_are_spread_evenly_over_both_models() -> None:
    assert choose_links(None, 12, 12) == ((3, 0), (6, 3), (9, 6), (12, 9))  # every 12/4-th layer of m_A
    assert choose_links(None, 3, 4) == ((1, 0), (2, 1), (3, 2))
    assert choose_links(2, 12, 24) == ((6, 0), (12, 12))
    assert choose_links(6, 24, 6) == ((4, 0), (8, 1), (12, 2), (16, 3), (20, 4), (24, 5))
    assert choose_links([[0, 0], [3, 2]], 3, 2) == ((0, 0), (3, 2))


def test_a_recipe_names_models_and_links(pair: tuple[Backbone, Backbone]) -> None:
    anchor, other = pair
    given = {"kind": "calm", "models": [{"model": other.name, "links": [[3, 0], [3, 1]]}], "heads": 2}
    settings = CalmSettings.model_validate(given)
    made = create_method("calm", anchor, **settings.model_dump(mode="json", exclude={"kind"}))
    assert made.settings["models"] == [
        {
            "model": other.name,
            "architecture": "causal",
            "links": [[3, 0], [3, 1]],
            "reads": "all",
            "fingerprint": other.fingerprint,
        }
    ]
    assert {key for key in made.tensors() if key.endswith("project")} == {"links.0.0.project", "links.0.1.project"}


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"links": [(4, 0)]}, r"\[4, 0\] is no link"),
        ({"links": [(0, 3)]}, r"\[0, 3\] is no link"),
        ({"links": [(-1, 0)]}, r"\[-1, 0\] is no link"),
        ({"links": [(1, 0, 2)]}, r"is no link"),
        ({"links": [(1, 0), (1, 0)]}, "each once"),
        ({"links": []}, "at least one"),
        ({"links": 0}, "0 links"),
        ({"links": 9}, "9 links between 3 and 2 layers"),
        ({"heads": 5}, "5 heads do not divide the width 32"),
        ({"heads": 0}, "0 heads"),
        ({"heads": 32}, "heads of even width"),
        ({"models": []}, "no augmenting model"),
    ],
    ids=str,
)
def test_links_that_cannot_be_are_one_clear_error(
    pair: tuple[Backbone, Backbone], settings: dict[str, Any], error: str
) -> None:
    anchor, other = pair
    links = {"links": settings.pop("links")} if "links" in settings else {}
    with pytest.raises(DataError, match=error):
        Calm(anchor, **{"models": [Augmenting(other, **links)], **settings})


def test_a_model_with_another_tokenizer_is_refused(pair: tuple[Backbone, Backbone], tmp_path: Path) -> None:
    stranger = load_float(str(tiny_llama(tmp_path)), "causal")
    with pytest.raises(DataError, match="another tokenizer"):
        Calm(pair[0], models=[Augmenting(stranger)])


def test_a_model_cannot_augment_itself_and_an_encoder_decoder_none(
    pair: tuple[Backbone, Backbone], models: Callable[[str], tuple[Backbone, list[Backbone]]]
) -> None:
    with pytest.raises(DataError, match="augment itself"):
        Calm(pair[0], models=[Augmenting(pair[0])])
    with pytest.raises(DataError, match="encoder-decoder"):
        Calm(pair[0], models=[Augmenting(models("t5 reads llama")[0])])


def test_an_encoder_reads_the_source_alone_and_must_be_told_where_it_ends(
    models: Callable[[str], tuple[Backbone, list[Backbone]]],
) -> None:
    anchor, others = models("gpt2 reads bert")
    with pytest.raises(DataError, match="reads the source alone"):
        Calm(anchor, models=[Augmenting(others[0], reads="all")])
    method = active(Calm(anchor, models=[Augmenting(others[0])]))
    method.attach(anchor)
    try:
        ids = torch.tensor([SOURCES[0] + TARGETS[0]])
        with pytest.raises(DataError, match="told where it ends"):
            anchor.model(ids)
        with source_ends([len(SOURCES[0])]):
            logits = anchor.model(ids).logits
        torch.testing.assert_close(logits, anchor.forward(SOURCES[:1], TARGETS[:1]))
    finally:
        method.detach()


def test_a_text_that_only_the_anchor_has_room_for_is_an_error(
    pair: tuple[Backbone, Backbone],
) -> None:
    anchor, other = pair  # windows of 256 and 64 tokens
    method = Calm(anchor, models=[Augmenting(other)])
    assert method.longest_text == 64
    method.attach(anchor)
    try:
        with pytest.raises(DataError, match="a text of 65 tokens does not fit the window of 64"):
            anchor.forward([[41] * 65])
    finally:
        method.detach()


def test_vectors_in_place_of_tokens_and_foreign_caches_are_refused(pair: tuple[Backbone, Backbone]) -> None:
    anchor, other = pair
    ids = torch.tensor([SOURCES[0]])
    cache = anchor.model(ids, use_cache=True).past_key_values
    method = Calm(anchor, models=[Augmenting(other)])
    method.attach(anchor)
    try:
        with pytest.raises(DataError, match="vectors, not tokens"):
            anchor.model(inputs_embeds=anchor.embed(ids))
        with pytest.raises(DataError, match="filled without this composition"):
            anchor.model(ids[:, :1], past_key_values=cache, use_cache=True)
        with pytest.raises(DataError, match="the attention mask is"):
            anchor.model(ids, attention_mask=torch.ones(1, 3, dtype=torch.long))
    finally:
        method.detach()


def test_states_of_sources_that_were_encoded_before_others_are_refused(
    models: Callable[[str], tuple[Backbone, list[Backbone]]],
) -> None:
    anchor, others = models("t5 reads llama")
    method = Calm(anchor, models=[Augmenting(other) for other in others])
    method.attach(anchor)
    try:
        first = anchor.encode(SOURCES[:1])
        anchor.encode(SOURCES[1:])
        with pytest.raises(DataError, match="which tokens the encoder's states are from is not known"):
            anchor.loss(first, TARGETS[:1])
    finally:
        method.detach()


# --- together with prompts, and in a reader ---------------------------------------------------------------------------


def test_a_prefix_and_a_composition_go_together(pair: tuple[Backbone, Backbone]) -> None:
    anchor, other = pair
    method, prefix = active(Calm(anchor, models=[Augmenting(other)])), PrefixTuning(anchor, length=3, inner=None)
    found = []
    for order in ((method, prefix), (prefix, method)):
        for one in order:
            one.attach(anchor)
        found.append(anchor.generate(SOURCES, max_new_tokens=5))
        assert anchor.generate(SOURCES, max_new_tokens=5, use_cache=False) == found[-1]
        losses = anchor.token_losses(SOURCES, TARGETS)
        torch.testing.assert_close(losses, anchor.token_losses(SOURCES, TARGETS, padding="right"), atol=1e-4, rtol=1e-4)
        for one in reversed(order):
            one.detach()
    assert found[0] == found[1]


@pytest.mark.parametrize("prompt_first", [True, False])
def test_a_soft_prompt_in_front_of_the_tokens_says_how_to_attach_it(
    pair: tuple[Backbone, Backbone], prompt_first: bool
) -> None:
    anchor, other = pair
    methods: list[Method] = [PromptTuning(anchor, length=3), Calm(anchor, models=[Augmenting(other)])]
    for method in methods if prompt_first else methods[::-1]:
        method.attach(anchor)
    try:
        with pytest.raises(DataError, match="as a prefix"):
            anchor.forward(SOURCES)
    finally:
        for method in methods:
            method.detach()


def test_a_reader_reads_with_a_composition_and_a_prompt(pair: tuple[Backbone, Backbone]) -> None:
    """As the frozen model does with both attached by hand; the window is that of the model with the smaller one."""
    anchor, other = load_float(pair[0].name, "causal"), pair[1]
    template = PromptTemplate("short", question="Q: {question}", answer="A:", passage=None, untitled=None)
    methods = [active(Calm(anchor, models=[Augmenting(other)])), PromptTuning(anchor, length=3)]
    reader = LmReader(anchor, template, method=methods, max_new_tokens=4, rules=AnswerRules((), (), ()))
    assert (reader.window, reader.limit) == (64, 64 - 4 - 3)  # room for the answer and the prompt
    query = Query("q", "who wrote the song")
    context = PackedContext(query, "", (), reader.costs(query, []).fixed, 64)
    ((generation,),) = reader.generate([context])

    bare = load_float(pair[0].name, "causal")
    for method in (
        prefix_of_prompt(bare, PromptTuning(bare, length=3)),
        active(Calm(bare, models=[Augmenting(other)])),
    ):
        method.attach(bare)
    (written,) = bare.generate(reader.encode(context), max_new_tokens=4)
    assert generation.raw == bare.tokenizer.decode(written, skip_special_tokens=True)


def test_a_reader_with_an_encoder_beside_it_samples_and_searches(
    models: Callable[[str], tuple[Backbone, list[Backbone]]],
) -> None:
    """The encoder reads each prompt and never what is written, whatever the decoding: rows are the same alone."""
    anchor, others = models("gpt2 reads bert")
    anchor = load_float(anchor.name, "causal")
    method = active(Calm(anchor, models=[Augmenting(others[0])]))
    template = PromptTemplate("short", question="Q: {question}", answer="A:", passage=None, untitled=None)
    settings: dict[str, Any] = {"max_new_tokens": 4, "candidates": 2, "rules": AnswerRules((), (), ())}
    queries = [Query("q", "who"), Query("r", "what is the longest river")]
    for decoding in ({"sample": True}, {"beams": 3}):
        reader = LmReader(anchor, template, method=method, **settings, **decoding)
        contexts = [PackedContext(query, "", (), reader.costs(query, []).fixed, 64) for query in queries]
        together = [[one.raw for one in found] for found in reader.generate(contexts)]
        assert [[one.raw for one in reader.generate([context])[0]] for context in contexts] == together
        method.detach()


def test_links_are_trained_from_a_recipe_and_read_with_alone_and_beside_a_prompt(tmp_path: Path) -> None:
    """`odqa train`, then `odqa eval` of pipelines with the composition, with a prompt, and with both."""
    folder = tmp_path / "world"
    folder.mkdir()
    rows, text = questions(4), {passage.id: passage for passage in passages()}
    found = [text[row["positive_ids"][0]] for row in rows]
    examples = [row | {"title": p.title, "passage": p.text} for row, p in zip(rows, found, strict=True)]
    train = write_jsonl(folder / "train.jsonl", examples)
    listed = write_jsonl(
        folder / "passages.jsonl", [{"id": p.id, "title": p.title, "text": p.text} for p in passages()]
    )
    source = {"kind": "passages", "file": str(listed)}
    index = write_yaml(folder / "index.yaml", {"kind": "index", "passages": source, "bm25": {}})
    anchor = load_float(str(tiny_llama(folder / "anchor", window=512)), "causal")
    other = other_model("llama", anchor.tokenizer, folder / "other", window=512)
    reader = {"kind": "lm", "model": anchor.name, "max_new_tokens": 3, "device": "cpu", "dtype": "float32"}
    pipeline = {
        "kind": "pipeline",
        "index": str(index),
        "retriever": {"kind": "bm25"},
        "k": 2,
        "packer": {"budget": 400},
    }
    write_yaml(folder / "plain.yaml", pipeline | {"reader": reader})
    methods: dict[str, dict[str, Any]] = {
        "links": {"kind": "calm", "models": [{"model": str(other)}]},
        "prompt": {"kind": "prompt-tuning", "length": 2},
    }
    places = Places.from_environment(None, tmp_path / "artifacts")
    for name, method in methods.items():
        recipe: dict[str, Any] = {"kind": "train-lm-reader", "pipeline": str(folder / "plain.yaml"), "method": method}
        recipe |= {"train": str(train), "passages": [str(listed)], "contexts": {"questions": 2}, "autocast": False}
        recipe |= {"fit": {"steps": 2, "learning_rates": {"method": 0.3}}}
        made = training.train(write_yaml(folder / f"{name}.yaml", recipe), places=places)
        assert made.path == tmp_path / "artifacts" / name
    jobs.build_index(str(index), places=places)
    answers = {}
    for given in ("links", "prompt", ["links", "prompt"], ["prompt", "links"]):
        names = [given] if isinstance(given, str) else given
        folders = [str(tmp_path / "artifacts" / name) for name in names]
        loaded = jobs.load_pipeline(
            write_yaml(
                folder / "composed.yaml",
                pipeline | {"reader": reader | {"method": folders[0] if isinstance(given, str) else folders}},
            ),
            places=places,
        )
        trace = loaded.ask("when was the bridge of barbar built")
        answers["+".join(names)] = trace.answer.text, trace.answer.score
        reader_made = loaded.pipeline.reader
        assert isinstance(reader_made, LmReader)
        assert reader_made.limit == 512 - 3 - (2 if "prompt" in names else 0)
    assert answers["links+prompt"] == answers["prompt+links"]
    assert len({score for _, score in answers.values()}) == 3  # each method has its say


# --- the lab ----------------------------------------------------------------------------------------------------------


def test_the_lab_measures_every_arm_on_the_same_rows() -> None:
    """On a world too small to learn anything: what is measured, how often, and that LoRA has as many values."""
    settings = CalmLab(
        kind="lab-calm", keys=20, width_a=8, layers_a=1, width_b=16, layers_b=2, heads=2, model_steps=2, steps=2,
        links=((1, 0), (1, 1)), batch=4, test=5, points=1,
    )  # fmt: skip
    outcome = run(settings, 0, Desk(Places.from_environment(), lambda _line: None))
    assert list(outcome.scores) == ["m_A", "m_B", *ARMS]
    for measures in outcome.scores.values():
        assert {name: len(found) for name, found in measures.items()} == {
            SUBSTITUTION: 5, NUMERIC: 200, KEYED: 5, KNOWN: 5,
        }  # fmt: skip
    # Two links of 8 * 16 + 4 * 16 * 16 values. A rank of LoRA is 512 values: two layers of maps 16 to 48, 16 to 16,
    # 16 to 64 and back. 2,304 values are four and a half ranks.
    assert outcome.facts["composed"]["trained values"] == 2 * (8 * 16 + 4 * 16**2)
    assert outcome.facts["LoRA"]["trained values"] == 4 * 512
