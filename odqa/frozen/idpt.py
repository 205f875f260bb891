"""Input-dependent prompt tuning, ID-PT: a small network writes the soft prompt of each text from that text.

    H    = encoder([E; e(x)])                       E: (N, W), learned; the encoder is frozen; H: (N + T, S)
    p(x) = P0 + s softmax(Q (W_k H)^T) (W_v H) W_o  Q: (P, A), in heads; W_k, W_v: (A, S); W_o: (D, A); P0: (P, D)
    e(x) -> [p(x); e(x)]                            as in prompt tuning

A fixed number of queries makes a prompt of fixed length out of a text of any length. Trains N W + P A + 2 A S + A D +
P D values. Source: Levine et al. 2022 (arXiv 2204.10019), section 2: frozen T5 encoder, learned encoder prompt, learned
cross-attention. The paper gives no sizes for the latter and no code exists; ours are: one layer of attention, states of
the encoder normalised, P0 (so that what is learned is what depends on the text), W_o zero at the start (a fresh ID-PT
is prompt tuning from random words), and s, the standard deviation of the frozen word vectors, so that one learning rate
suits models with small and large ones.

The encoder is the backbone's own (of a causal model: its layers), or any other model, whose tokenizer may differ: then
the text is decoded and tokenised again. It reads the source of a causal model's row, never its target: see
`odqa.frozen.layout.source_ends`. A model that is given word vectors in place of tokens cannot have this method.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from odqa.errors import ArtifactMismatch, DataError
from odqa.frozen.backbone import Backbone, load_backbone, takes
from odqa.frozen.before_text import BeforeText, Given, Words, positions_with
from odqa.frozen.layout import insert, pad_rows, text_positions, text_start, told_source_ends
from odqa.frozen.method import Count, Method
from odqa.frozen.words import check_length, check_room, random_words
from odqa.models import is_encoder_decoder


class InputPrompt(Method):
    """`length` word vectors before each text, made from it.

    `encoder` names the frozen model that reads the text (None: the backbone's own encoder or layers), `encoder_length`
    is N, `inner` A, in `heads` heads. `read` is how many tokens of a text the encoder reads, from its beginning (None:
    all; a text that does not fit its window is then an error). `encoder_fingerprint` is that of the named encoder: it
    is saved with the method, and another one is refused.
    """

    kind: ClassVar[str] = "id-pt"

    def __init__(
        self,
        backbone: Backbone,
        *,
        length: int,
        encoder: str | None = None,
        encoder_length: int = 10,
        inner: int = 64,
        heads: int = 4,
        read: int | None = None,
        seed: int = 0,
        encoder_fingerprint: str | None = None,
    ) -> None:
        sizes = {"length": length, "encoder_length": encoder_length, "inner": inner, "heads": heads}
        super().__init__(backbone, encoder=encoder, read=read, seed=seed, **sizes)
        self._check(sizes, read)
        check_length(backbone, self.kind, length)
        reader = FrozenReader(backbone, encoder)
        check_length(reader.backbone, f"{self.kind}: its encoder", encoder_length)
        if encoder is not None:
            if encoder_fingerprint not in (None, reader.backbone.fingerprint):
                raise ArtifactMismatch(
                    f"{self.kind} was trained with an encoder {str(encoder_fingerprint)[:8]}; {encoder} is "
                    f"{reader.backbone.fingerprint[:8]}. Use that encoder or train the method again."
                )
            self.settings["encoder_fingerprint"] = reader.backbone.fingerprint
        self._reader = [reader]  # in a list, so that torch does not take its weights for ours
        self.scale = float(backbone.model.get_input_embeddings().weight.detach().float().std())
        with torch.no_grad():
            words = random_words(reader.backbone, encoder_length, seed + 1)
            self.encoder_prompt = nn.Parameter(_vectors(reader.backbone, words))  # E
            self.prompt = nn.Parameter(_vectors(backbone, random_words(backbone, length, seed)))  # P0
        width = reader.width()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.queries = nn.Parameter(torch.randn(length, inner))
            self.key, self.value = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.out = nn.Linear(inner, backbone.width, bias=False)
        nn.init.zeros_(self.out.weight)
        self._before: list[BeforeText] = []

    def _check(self, sizes: dict[str, int], read: int | None) -> None:
        for name, value in {**sizes, "read": 1 if read is None else read}.items():
            if value < 1:
                raise DataError(f"{self.kind}: {name} is {value}; it must be at least 1.")
        if sizes["inner"] % sizes["heads"]:
            raise DataError(f"{self.kind}: inner {sizes['inner']} is no multiple of heads {sizes['heads']}.")

    @property
    def length(self) -> int:
        """P."""
        return len(self.prompt)

    def virtual_tokens(self, backbone: Backbone) -> int:
        return self.length if backbone.architecture == "causal" else 0

    @property
    def reads_source(self) -> bool:
        return True

    def count(self, backbone: Backbone) -> Count:
        """As ever; an encoder other than the backbone's is frozen too."""
        count = super().count(backbone)
        more = 0 if self.settings["encoder"] is None else self._reader[0].backbone.count_parameters()
        return Count(count.trainable, count.frozen + more, count.stored_bytes)

    def _install(self, backbone: Backbone) -> None:
        if self.settings["encoder"] is None:
            self._reader[0] = FrozenReader(backbone, None)
        self._reader[0].backbone.model.to(backbone.device)
        self._before.append(BeforeText(backbone, self.kind, self.length, self._shown, self._of_text))

    def _remove(self, backbone: Backbone) -> None:
        self._before.pop().remove()

    def _shown(self, batch: int) -> Words:
        shown = torch.ones(batch, self.length, dtype=torch.long, device=self.prompt.device)
        return Words(self.prompt.expand(batch, -1, -1), shown)

    def _of_text(self, given: Given) -> torch.Tensor:
        """(B, P, D), float32."""
        rows, reader = self.rows(given), self._reader[0]
        with self._before[-1].aside():
            states, mask = reader.read(rows, self.encoder_prompt, self._backbone[0].tokenizer, self.settings["read"])
        return self.write(states, mask)

    def rows(self, given: Given) -> list[list[int]]:
        """What the encoder is to read of each row: the tokens of its text, or of its source."""
        if given.ids is None:
            raise DataError(f"{self.kind}: the model is given word vectors; it reads token ids only.")
        rows = [row[shown.bool()].tolist() for row, shown in zip(given.ids, given.mask, strict=True)]
        ends = told_source_ends()
        if ends is None:
            return rows
        copies = len(rows) // len(ends)  # beams and samples of a source stand next to one another
        return [row[: ends[number // copies]] for number, row in enumerate(rows)]

    def write(self, states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The encoder's states (B, S', S) and their mask (B, S') -> prompts (B, P, D), float32."""
        batch, heads = len(states), self.settings["heads"]
        states = nn.functional.layer_norm(states.float(), states.shape[-1:])
        queries = self.queries.view(1, self.length, heads, -1).expand(batch, -1, -1, -1).transpose(1, 2)
        keys, values = (
            part(states).view(batch, states.shape[1], heads, -1).transpose(1, 2) for part in (self.key, self.value)
        )
        found = nn.functional.scaled_dot_product_attention(  # (B, heads, P, A / heads)
            queries.to(keys.dtype), keys, values, attn_mask=mask.bool()[:, None, None]
        )
        change: torch.Tensor = self.out(found.transpose(1, 2).flatten(2)).float()
        return self.prompt + self.scale * change


def _vectors(backbone: Backbone, ids: torch.Tensor) -> torch.Tensor:
    """Word vectors (N, D) of ids, float32, on the processor."""
    return backbone.embed(ids[None].to(backbone.device))[0].float().cpu().clone()


class FrozenReader:
    """The frozen encoder: what it makes of texts that begin with learned vectors."""

    def __init__(self, backbone: Backbone, name: str | None) -> None:
        if name is None:
            self.backbone = backbone
        else:
            self.backbone = load_backbone(
                name,
                "seq2seq" if is_encoder_decoder(name) else "encoder",
                device=str(backbone.device),
                dtype=str(backbone.model.dtype).removeprefix("torch."),
                attention=backbone.model.config._attn_implementation,
            )
        model = self.backbone.model
        if self.backbone.architecture == "seq2seq":
            self.stack: Any = model.get_encoder()
        else:
            self.stack = model if self.backbone.architecture == "encoder" else model.base_model
        self._takes_positions = takes(self.stack, "position_ids")
        self._has_same_words: bool | None = None

    @torch.no_grad()
    def width(self) -> int:
        """S, of its states: it is asked."""
        mask = torch.ones(1, 1, dtype=torch.long, device=self.backbone.device)
        return int(self._states(self.backbone.embed(mask), mask, None).shape[-1])

    def read(
        self, rows: Sequence[Sequence[int]], prompt: torch.Tensor, tokenizer: Any, longest: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """States (B, N + T, S) and mask (B, N + T) of [prompt; text] for texts as ids of `tokenizer`.

        At most `longest` tokens of each are read. Raises DataError for one that does not fit the encoder's window.
        """
        own = [list(row)[:longest] for row in self._translate(rows, tokenizer)]
        window, is_causal = self.backbone.window, self.backbone.architecture == "causal"
        for number, row in enumerate(own):
            if window is not None and len(row) > window:
                raise DataError(
                    f"id-pt: row {number} of the batch has {len(row)} tokens for its encoder {self.backbone.name}, "
                    f"whose window is {window}. Set read to {window} or less, or shorten the text."
                )
        ids, mask = pad_rows(own, self.backbone.padding, "left" if is_causal else "right")
        ids, mask = ids.to(self.backbone.device), mask.to(self.backbone.device)
        if is_causal:
            check_room(self.backbone, "id-pt: its encoder", len(prompt), ids.shape[1])
        shown = mask.new_ones(len(mask), len(prompt))
        start, words = text_start(mask), self.backbone.embed(ids)
        block = prompt.to(words.dtype).expand(len(words), -1, -1)
        wide = insert(mask, start, shown)
        positions = positions_with(self.backbone, text_positions(mask), start, shown)
        return self._states(insert(words, start, block), wide, positions), wide

    def _states(self, vectors: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
        more: dict[str, Any] = {"use_cache": False} if self.backbone.architecture == "causal" else {}
        if positions is not None and self._takes_positions:
            more["position_ids"] = positions
        output = self.stack(inputs_embeds=vectors, attention_mask=mask, return_dict=True, **more)
        states: torch.Tensor = output.last_hidden_state
        return states

    def _translate(self, rows: Sequence[Sequence[int]], tokenizer: Any) -> Sequence[Sequence[int]]:
        """Ids of `tokenizer` as ids of the encoder's: the same if the vocabularies are, else by way of the text."""
        own = self.backbone.tokenizer
        if self._has_same_words is None:
            self._has_same_words = tokenizer.get_vocab() == own.get_vocab()
        if self._has_same_words:
            return rows
        texts = tokenizer.batch_decode(
            [list(row) for row in rows], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        ids: list[list[int]] = own(texts, verbose=False)["input_ids"]
        return ids
