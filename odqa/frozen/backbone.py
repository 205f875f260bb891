"""A frozen language model: weights that require no gradient and never change, and the proof of it.

Any local folder or hub name that `transformers` loads, behind the same calls for every architecture: `embed`, `encode`,
`forward`, `token_losses`, `loss`, `generate`. They compute with the method that is attached, and so does the model
itself when somebody calls it or its `generate`: an attached method is not seen from outside, logits and states have the
shapes that they have without it. Knows tensors and token ids, never a passage.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from odqa.errors import DataError
from odqa.frozen.layout import Side, pad_rows, source_ends, text_positions
from odqa.models import embedded_folder, quiet_loading
from odqa.runtime import choose_device, choose_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Everything a model's own generation settings may ask for and nobody here does unless told to.
PLAIN_GENERATION: Mapping[str, Any] = {
    "do_sample": False,
    "early_stopping": False,
    "min_new_tokens": 0,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_k": 50,  # without do_sample nothing is cut off; any other value is warned of
    "top_p": 1.0,
}
Architecture = Literal["encoder", "causal", "seq2seq"]

# Config entries that say how a model was loaded, not what it computes.
_NOT_IDENTITY = {"transformers_version", "dtype", "torch_dtype", "name_or_path", "use_cache"}
# How configurations name the longest text they were made for, most common first.
_WINDOW_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")

# Where an encoder's output has its mask, if a soft prompt made it longer than the text's.
SOURCE_MASK = "odqa_source_mask"

Tokens = Sequence[Sequence[int]]


@dataclass(slots=True)
class Encoded:
    """What the encoder of an encoder-decoder gives: states (B, S, D), and their mask (B, S).

    S is the longest source, and P more with a soft prompt. Sources that were encoded apart may be joined along S.
    """

    states: torch.Tensor
    mask: torch.Tensor


@dataclass(slots=True)
class Backbone:
    """A frozen model with its tokenizer.

    `fingerprint` is that of the weights as stored on disk, before any cast to a compute type: the name by which method
    artifacts know their backbone. `name` is what the recipe said.
    """

    name: str
    architecture: Architecture
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    fingerprint: str

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def width(self) -> int:
        """Hidden width D."""
        stated = getattr(self.model.config, "hidden_size", None)
        return int(stated or self.model.get_input_embeddings().weight.shape[1])

    @property
    def layers(self) -> int:
        """Number of transformer layers L."""
        return int(self.model.config.num_hidden_layers)

    @property
    def window(self) -> int | None:
        """The longest text in tokens that the configuration states; None: none (T5)."""
        configs = [self.model.config, getattr(self.model.config, "encoder", None)]
        stated = [getattr(config, name, None) for config in configs for name in _WINDOW_NAMES]
        return next((value for value in stated if isinstance(value, int)), None)

    @property
    def padding(self) -> int:
        """The padding token; some models have none, and then any does, because the mask hides it."""
        pad, end = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        return int(pad if pad is not None else end if end is not None else 0)

    def count_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.model.parameters())

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Word vectors without positions: (B, T) token ids -> (B, T, D)."""
        vectors: torch.Tensor = self.model.get_input_embeddings()(ids)
        return vectors

    def encode(self, sources: Tokens, *, padding: Side = "right") -> Encoded:
        """Run the encoder of an encoder-decoder over token ids; positions count text, wherever the padding is."""
        ids, mask = self._tensors(sources, padding)
        encoder = self.model.get_encoder()
        positions = {"position_ids": text_positions(mask)} if takes(encoder, "position_ids") else {}
        output = encoder(input_ids=ids, attention_mask=mask, return_dict=True, **positions)
        return Encoded(output.last_hidden_state, getattr(output, SOURCE_MASK, mask))

    def forward(
        self, sources: "Tokens | Encoded", targets: Tokens | None = None, *, padding: Side | None = None
    ) -> torch.Tensor:
        """Logits, or an encoder's states, one row a source.

        encoder: (B, T, D) states. causal: (B, T, V) logits, [r, i] for what follows token i of source and target
        together. seq2seq: (B, U, V) logits, [r, i] for target token i. `padding` is the side of the pads (None: left
        for causal models, else right); what stands at pads means nothing.
        """
        if self.architecture == "seq2seq":
            if targets is None:
                raise ValueError("forward: an encoder-decoder needs targets")
            encoded = sources if isinstance(sources, Encoded) else self.encode(sources, padding=padding or "right")
            return self._decode(encoded, targets)
        if isinstance(sources, Encoded):
            raise ValueError(
                f"forward: encoded sources are for encoder-decoders, not for the {self.architecture} model"
            )
        if self.architecture == "encoder":
            ids, mask = self._tensors(sources, padding or "right")
            states: torch.Tensor = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
            return states
        rows = [[*source, *target] for source, target in zip(sources, targets or [()] * len(sources), strict=True)]
        with source_ends([len(source) for source in sources]):
            return self._continue(*self._tensors(rows, padding or "left"))

    def token_losses(
        self, sources: "Tokens | Encoded", targets: Tokens, *, padding: Side | None = None
    ) -> torch.Tensor:
        """-log P(target token | source, target tokens before it) in nats: (B, U) float32, 0.0 behind a target's end.

        U is the longest target. Targets bring their own end token. A row's sum is minus the log-likelihood of its
        target. Raises ValueError for an empty source of a causal model (nothing predicts its first target token).
        """
        if isinstance(sources, Encoded) or self.architecture == "seq2seq":
            logits = self.forward(sources, targets, padding=padding)
        else:
            logits = self._target_logits(sources, targets, padding or "left")
        wanted, mask = self._tensors(targets, "right")
        losses = nn.functional.cross_entropy(logits.float().transpose(1, 2), wanted, reduction="none")
        return losses * mask

    def loss(self, sources: "Tokens | Encoded", targets: Tokens, *, padding: Side | None = None) -> torch.Tensor:
        """Mean of `token_losses` over all target tokens of the batch, in nats: a scalar."""
        return self.token_losses(sources, targets, padding=padding).sum() / sum(len(target) for target in targets)

    @torch.inference_mode()
    def generate(
        self,
        sources: "Tokens | Encoded",
        *,
        max_new_tokens: int,
        padding: Side | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """New tokens of each source, its end token included where it came.

        `options` go to the model's `generate` (num_beams, do_sample, use_cache, ...). With several sequences a source
        (num_return_sequences) they follow one another. A causal model writes at the end of a row, so its pads are left.
        """
        options = {"pad_token_id": self.padding, **options}
        if isinstance(sources, Encoded) or self.architecture == "seq2seq":
            from transformers.modeling_outputs import BaseModelOutput

            encoded = sources if isinstance(sources, Encoded) else self.encode(sources, padding=padding or "right")
            out = self.model.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded.states),
                attention_mask=encoded.mask,
                max_new_tokens=max_new_tokens,
                **options,
            )[:, 1:]
        else:
            if padding == "right":
                raise ValueError("generate: a causal model writes at the end of a row; pad on the left")
            ids, mask = self._tensors(sources, "left")
            with source_ends([len(source) for source in sources]):
                out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options)
            out = out[:, ids.shape[1] :]
        ends = self.end_tokens(options.get("eos_token_id"))
        return [_until_end(row, ends) for row in out.tolist()]

    def end_tokens(self, stated: Any = None) -> frozenset[int]:
        """Tokens that end a text: `stated`, else those of the generation settings and the tokenizer."""
        if stated is None:
            settings = getattr(self.model.generation_config, "eos_token_id", None)
            stated = [*(settings if isinstance(settings, list) else [settings]), self.tokenizer.eos_token_id]
        return frozenset(
            int(token) for token in (stated if isinstance(stated, list) else [stated]) if token is not None
        )

    def _tensors(self, rows: Tokens, side: Side) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = pad_rows(rows, self.padding, side)
        return ids.to(self.device), mask.to(self.device)

    def _continue(self, ids: torch.Tensor, mask: torch.Tensor, **options: Any) -> torch.Tensor:
        """Logits of a causal model; positions count text, wherever the padding is."""
        if takes(self.model, "position_ids"):
            options["position_ids"] = text_positions(mask)
        logits: torch.Tensor = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        return logits

    def _target_logits(self, sources: Tokens, targets: Tokens, side: Side) -> torch.Tensor:
        """A causal model's logits for target tokens only: (B, U, V)."""
        if not all(len(source) for source in sources):
            raise ValueError("token_losses: a causal model needs a source of at least one token")
        rows = [[*source, *target] for source, target in zip(sources, targets, strict=True)]
        ids, mask = self._tensors(rows, side)
        longest = max(len(target) for target in targets)
        # Rows that end together need the logits of their ends only: with V = 50,000 that is most of the memory.
        keep = longest + 1 if side == "left" and takes(self.model, "logits_to_keep") else 0
        with source_ends([len(source) for source in sources]):
            logits = self._continue(ids, mask, **({"logits_to_keep": keep} if keep else {}))
        width = ids.shape[1]
        before = torch.tensor([len(source) - 1 for source in sources], device=ids.device)
        if side == "left":
            before += width - torch.tensor([len(row) for row in rows], device=ids.device)
        before -= width - logits.shape[1]
        place = before[:, None] + torch.arange(longest, device=ids.device)
        return logits[torch.arange(len(rows), device=ids.device)[:, None], place.clamp_max(logits.shape[1] - 1)]

    def _decode(self, encoded: Encoded, targets: Tokens) -> torch.Tensor:
        """Logits of a decoder that is shown the right target tokens: (B, U, V)."""
        start = self.decoder_start()
        ids, _ = self._tensors([[start, *target[:-1]] for target in targets], "right")
        logits: torch.Tensor = self.model(
            encoder_outputs=(encoded.states,), attention_mask=encoded.mask, decoder_input_ids=ids, use_cache=False
        ).logits
        return logits

    def decoder_start(self) -> int:
        """The token with which an encoder-decoder's texts begin. Raises DataError for a model that does not say."""
        for settings in (self.model.generation_config, self.model.config):
            for name in ("decoder_start_token_id", "bos_token_id"):
                if (start := getattr(settings, name, None)) is not None:
                    return int(start)
        raise DataError(f"model {self.name!r} does not say with which token its decoder starts.")


def load_backbone(
    name: str,
    architecture: Architecture,
    *,
    device: str = "auto",
    dtype: str = "auto",
    attention: str = "sdpa",
    **load_options: Any,
) -> Backbone:
    """Load and freeze a model: no gradient, evaluation mode (dropout off), cast to `dtype` after fingerprinting.

    `attention` is `transformers`' attn_implementation. `load_options` go to `from_pretrained` unchanged. Raises
    DataError for a model that is not there or does not load.
    """
    import transformers

    path = embedded_folder(name) or name
    auto = {
        "encoder": transformers.AutoModel,
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
    }[architecture]
    try:
        with quiet_loading():
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            model = auto.from_pretrained(path, attn_implementation=attention, **load_options)
    except (OSError, ValueError) as error:
        raise DataError(f"model {name!r} does not load as {architecture}: {str(error).splitlines()[0]}") from error
    model.requires_grad_(False).eval()
    stored = fingerprint(model)
    if "device_map" not in load_options and "quantization_config" not in load_options:
        where = choose_device(device)
        model.to(device=where, dtype=choose_dtype(dtype, where))
    return Backbone(name, architecture, model, tokenizer, stored)


def takes(module: Any, name: str) -> bool:
    """Whether a module's forward pass has a parameter of that name."""
    return name in inspect.signature(module.forward).parameters


def layer_list(backbone: Backbone) -> nn.ModuleList:
    """The stack of layers; an encoder-decoder's is that of its decoder. Raises DataError if no list is found."""
    model = backbone.model
    skipped = set(model.get_encoder().modules()) if backbone.architecture == "seq2seq" else set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in skipped:
            return module
    raise DataError(f"{backbone.name}: {type(model).__name__} has no list of layers to look into.")


def _until_end(row: list[int], ends: frozenset[int]) -> list[int]:
    end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
    return row[: end + 1]


def fingerprint(model: "PreTrainedModel") -> str:
    """Hex sha256 over the config and over every parameter and buffer (name, type, shape, bytes), in order of names."""
    digest = hashlib.sha256()
    config = {
        key: value
        for key, value in model.config.to_dict().items()
        if key not in _NOT_IDENTITY and not key.startswith("_")
    }
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


@contextmanager
def frozen_guard(backbone: Backbone) -> Iterator[None]:
    """Assert that the block leaves the backbone as it was: the same bits, no gradient buffer, nothing trainable.

    Raises AssertionError: a backbone that moved is a defect of odqa, not of its input.
    """
    before = fingerprint(backbone.model)
    yield
    for name, tensor in backbone.model.named_parameters():
        if tensor.requires_grad or tensor.grad is not None:
            raise AssertionError(f"frozen weight {name} of {backbone.name} has been given a gradient")
    if fingerprint(backbone.model) != before:
        raise AssertionError(f"the frozen weights of {backbone.name} have changed")
