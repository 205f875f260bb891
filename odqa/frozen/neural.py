"""Neural recursion: a frozen model reads its own last hidden states again, through a small trained connector.

    h = LM([P1; e(x)])                        pass 1, no decoding           (B, T, S)
    c = e(x) + f([h; s e(x)])                 one vector a token            (B, T, D)
    pass 2 reads [P2; c]

or, with K `vectors`, which pass 2 reads beside the text:

    c_k = w_k + f(sum_t a_kt z_t),  a_k = softmax_t(q_k . z_t / sqrt(S + D)),  z_t = [h_t; s e(x_t)]
    pass 2 reads [P2; c_1 ... c_K; e(x)]

s, from the table of word vectors, makes them as large as states are (our choice). f is linear (`depth` 0) or has
`depth` gelu layers of `width`; its last map starts at zero, so that a fresh connector hands on the embeddings, or K
words: then pass 2 is a plain pass. That start is our choice; the paper's is `start` "random", without e(x) and w_k in
the sums. P1 and P2 are soft prompts, one a pass. The gradient goes through both passes; the model's weights stay.

Pass 1 is cut where a causal model's source ends: nothing of an answer is in it, answers are written behind pass 2 in
the usual way, and two passes cost two forward passes. Pass 1 of an encoder-decoder is its encoder's (our choice).
Trains (S + D) w + w + (depth - 1) (w^2 + w) + w D + D values (linear: (S + D) D + D), with vectors K (S + 2 D) more
(with a random start K (S + D)), and 2 P D. S is the width of the last hidden states, D in most models.

Source: Levine et al. 2022 (arXiv 2204.10019), section 4.2; its sizes are not known. They pre-train the connector on
plain language modelling and find that vital; with our start it is not (docs/methods.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.backbone import Backbone, takes
from odqa.frozen.before_text import BeforeText, Call, Words, has_text, positions_with
from odqa.frozen.flops import count_flops
from odqa.frozen.layout import insert, remove, text_positions, text_start, told_source_ends
from odqa.frozen.method import Method
from odqa.frozen.words import check_length, check_room, random_words

Start = Literal["text", "random"]


class NeuralRecursion(Method):
    """Two passes of the model, joined by a connector. `vectors` None: it makes one vector a token of the text.

    `depth` inner layers (0: linear) of `width` (None: that of the model). `prompt` is P, 0 for none. Prompts and the
    words that vectors start from are random words of the vocabulary.
    """

    kind: ClassVar[str] = "neural-recursion"

    def __init__(
        self,
        backbone: Backbone,
        *,
        vectors: int | None = None,
        depth: int = 1,
        width: int | None = None,
        prompt: int = 0,
        start: Start = "text",
        seed: int = 0,
    ) -> None:
        super().__init__(backbone, vectors=vectors, depth=depth, width=width, prompt=prompt, start=start, seed=seed)
        _check_sizes(backbone, vectors, depth, width, prompt)
        if start not in ("text", "random"):
            raise DataError(f"{self.kind}: start is {start!r}; it must be text or random.")
        self.vectors, self.prompt_length, self.moves_text = vectors, prompt, start == "text"
        self.scale = _embedding_scale(backbone)
        generator = torch.Generator().manual_seed(seed)
        seen = _states_width(backbone) + backbone.width  # S + D
        sizes = [seen, *[width or backbone.width] * depth, backbone.width]
        self.connector = _network(sizes, generator)
        if self.moves_text:
            last = self.connector[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)
        if vectors is not None:
            self.queries = nn.Parameter(torch.randn(vectors, seen, generator=generator))
            if self.moves_text:
                self.words = nn.Parameter(_word_vectors(backbone, vectors, seed))  # (K, D)
        if prompt:
            self.prompts = nn.ParameterList(_word_vectors(backbone, prompt, seed + 1 + number) for number in range(2))
        self._hooks: list[Any] = []
        self._again = torch.empty(0)  # (B, P + K, D) of the call under way

    @property
    def length(self) -> int:
        """Vectors before the text of pass 2: P + K."""
        return self.prompt_length + (self.vectors or 0)

    def virtual_tokens(self, backbone: Backbone) -> int:
        return self.length if backbone.architecture == "causal" else 0

    @property
    def reads_source(self) -> bool:
        return True

    def _install(self, backbone: Backbone) -> None:
        reader = _reader(backbone)

        def read_twice(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
            kwargs = {**dict(zip(("input_ids",), args, strict=False)), **kwargs}
            return (), (kwargs if has_text(kwargs.get("past_key_values")) else self._second_input(backbone, kwargs))

        self._hooks.append(reader.register_forward_pre_hook(read_twice, with_kwargs=True))
        if self.length:
            self._hooks.append(BeforeText(backbone, self.kind, self.length, self._before_text))

    def _remove(self, backbone: Backbone) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._again = torch.empty(0)

    def _before_text(self, batch: int) -> Words:
        # Asked for more rows than were read (beams), only `shown` counts.
        return Words(self._again, torch.ones(batch, self.length, dtype=torch.long, device=self._again.device))

    def _second_input(self, backbone: Backbone, kwargs: dict[str, Any]) -> dict[str, Any]:
        """What pass 2 is called with, after pass 1."""
        kwargs = dict(kwargs)
        text = kwargs.get("inputs_embeds")
        text = backbone.embed(kwargs.pop("input_ids")) if text is None else text  # (B, T, D)
        mask = kwargs.get("attention_mask")
        mask = text.new_ones(text.shape[:2], dtype=torch.long) if mask is None else mask
        states = self._first_pass(backbone, text, mask, kwargs)
        seen = torch.cat([states, self.scale * text.to(states)], dim=-1)  # (B, T, S + D)
        is_source = _source_mask(backbone, mask)[..., None]  # (B, T, 1)
        dtype = next(self.parameters()).dtype
        if self.vectors is None:
            made = self.connector(seen.to(dtype)).to(text)
            kwargs["inputs_embeds"] = torch.where(is_source, text + made if self.moves_text else made, text)
            before = []
        else:
            kwargs["inputs_embeds"] = text
            made = self.connector(_attend(self.queries, seen.to(dtype), is_source))  # (B, K, D)
            before = [self.words + made if self.moves_text else made]
        if self.prompt_length:
            before.insert(0, self.prompts[1].expand(len(text), -1, -1))
        if before:
            self._again = torch.cat(before, dim=1)
        return kwargs

    def _first_pass(
        self, backbone: Backbone, text: torch.Tensor, mask: torch.Tensor, call: Mapping[str, Any]
    ) -> torch.Tensor:
        """The last hidden states of the text's tokens: (B, T, S)."""
        batch, length = len(text), self.prompt_length
        start, shown = text_start(mask), mask.new_ones(batch, length)
        given, types = call.get("position_ids"), call.get("token_type_ids")
        places = text_positions(mask) if given is None else given.expand(batch, -1)
        if length:
            if backbone.architecture == "causal":
                check_room(backbone, self.kind, length, text.shape[1])
            places = positions_with(backbone, places, start, shown)
            text = insert(text, start, self.prompts[0].to(text).expand(batch, -1, -1))
            mask = insert(mask, start, shown)
            types = None if types is None else insert(types, start, types.new_zeros(batch, length))
        reader, options = _reader(backbone), dict[str, Any]()
        if backbone.architecture == "causal":
            reader, options = reader.base_model, {"use_cache": False}
        if takes(reader, "position_ids"):
            options["position_ids"] = places
        if types is not None:
            options["token_type_ids"] = types
        # `forward` itself: the hooks of pass 2 have no part in pass 1.
        output = reader.forward(inputs_embeds=text, attention_mask=mask, return_dict=True, **options)
        states: torch.Tensor = output.last_hidden_state
        return remove(states, start, length) if length else states


@dataclass(frozen=True, slots=True)
class Cost:
    """Operations for a source of `tokens` tokens and the first token of its answer, in one pass and in two."""

    tokens: int
    once: int
    twice: int

    @property
    def times(self) -> float:
        return self.twice / self.once

    def __str__(self) -> str:
        return (
            f"a source of {self.tokens} tokens takes {self.once / 1e6:,.1f} MFLOPs in one pass and "
            f"{self.twice / 1e6:,.1f} in two ({self.times:.2f} times)"
        )


def cost_of_passes(backbone: Backbone, method: NeuralRecursion, *, tokens: int) -> Cost:
    """Counted, not estimated; the method is attached for it unless it is."""
    sources = [[backbone.padding] * tokens]
    targets = [[backbone.padding]] if backbone.architecture == "seq2seq" else None

    def read() -> object:
        return backbone.forward(sources, targets)

    was_attached = method.is_attached
    if was_attached:
        method.detach()
    once = count_flops(read)
    method.attach(backbone)
    twice = count_flops(read)
    if not was_attached:
        method.detach()
    return Cost(tokens, once, twice)


def _reader(backbone: Backbone) -> Any:
    """The module that reads a source."""
    return backbone.model.get_encoder() if backbone.architecture == "seq2seq" else backbone.model


def _source_mask(backbone: Backbone, mask: torch.Tensor) -> torch.Tensor:
    """(B, T) mask of the text -> that of its sources alone, bool; beams of a source are next to one another."""
    is_text, ends = mask.bool(), told_source_ends()
    if ends is None or backbone.architecture != "causal":
        return is_text
    lengths = torch.tensor(ends, device=mask.device).repeat_interleave(len(mask) // len(ends))
    return is_text & (text_positions(mask) < lengths[:, None])


def _attend(queries: torch.Tensor, seen: torch.Tensor, is_source: torch.Tensor) -> torch.Tensor:
    """(K, W), (B, T, W), (B, T, 1) -> for each query the mean of what it attends to: (B, K, W)."""
    scores = torch.einsum("kw,btw->bkt", queries, seen) / queries.shape[1] ** 0.5
    found: torch.Tensor = scores.masked_fill(~is_source.mT, -torch.inf).softmax(-1) @ seen
    return found


def _network(sizes: Sequence[int], generator: torch.Generator) -> nn.Sequential:
    """Linear maps from each size to the next one, gelu between them. Weights and biases are drawn as torch draws those
    of linear layers: evenly between -1 / sqrt(d_in) and 1 / sqrt(d_in)."""
    parts: list[nn.Module] = []
    for d_in, d_out in pairwise(sizes):
        linear, bound = nn.Linear(d_in, d_out), d_in**-0.5
        for tensor in (linear.weight, linear.bias):
            nn.init.uniform_(tensor, -bound, bound, generator=generator)
        parts += [linear, nn.GELU()]
    return nn.Sequential(*parts[:-1])


@torch.no_grad()
def _embedding_scale(backbone: Backbone) -> float:
    """What brings the entries of word vectors to a root mean square of 1, which is about the size of last states."""
    table = backbone.model.get_input_embeddings().weight
    return float(table.float().square().mean().sqrt().clamp_min(1e-6).reciprocal())


@torch.no_grad()
def _word_vectors(backbone: Backbone, length: int, seed: int) -> torch.Tensor:
    """(length, D), float32, on the processor."""
    words = random_words(backbone, length, seed)
    return backbone.embed(words[None].to(backbone.device))[0].float().cpu().clone()


@torch.no_grad()
def _states_width(backbone: Backbone) -> int:
    """S, as the model itself says when it reads one token: some encoders give more than D."""
    reader = _reader(backbone)
    reader = reader.base_model if backbone.architecture == "causal" else reader
    token = torch.tensor([[backbone.padding]], device=backbone.device)
    output = reader.forward(input_ids=token, attention_mask=torch.ones_like(token), return_dict=True)
    return int(output.last_hidden_state.shape[-1])


def _check_sizes(backbone: Backbone, vectors: int | None, depth: int, width: int | None, prompt: int) -> None:
    kind = NeuralRecursion.kind
    smallest = {"vectors": (vectors, 1), "depth": (depth, 0), "width": (width, 1), "prompt": (prompt, 0)}
    for name, (value, least) in smallest.items():
        if value is not None and value < least:
            raise DataError(f"{kind}: {name} is {value}; it must be at least {least}.")
    if depth == 0 and width is not None:
        raise DataError(f"{kind}: depth is 0, a linear connector, and has no width. Remove width or set depth: 1.")
    if (length := prompt + (vectors or 0)) > 0:
        check_length(backbone, kind, length)
