"""Pre-training odqa-mini: batches of tasks as token ids, the two models to begin with, and what a trained one saves.

The gradient loop is `odqa.frozen.fit`, so a killed pre-training goes on where it was. What a batch holds depends on
seed and number alone.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from odqa.corpus.examples import Example
from odqa.frozen.backbone import Backbone
from odqa.frozen.fit import FitSettings, fit
from odqa.frozen.lora import Lora
from odqa.frozen.method import load_tensors
from odqa.lm.mini import PARTS, UPDATE, OdqaMiniForConditionalGeneration, configure, start_from_encoder
from odqa.lm.tasks import Corpus, make, reading_parts
from odqa.models import embedded_folder
from odqa.text import as_written, exact_match

CHECKPOINT = "checkpoint.safetensors"
POINTING = 0.5  # our choice: weight of `pointing_loss`
IGNORED = -100  # the label of a position without loss
_BLOCK = 16  # our choice: batches whose items are sorted by length together


@dataclass(frozen=True, slots=True)
class MixSettings:
    """What a pre-training batch holds: `items` examples, of each task its share; sources longer than `longest` tokens
    lose their end, targets longer than `longest_target` theirs. Values are our choice."""

    shares: Mapping[str, float]
    items: int = 32
    longest: int = 256
    longest_target: int = 24
    seed: int = 0


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """`input_ids`, `attention_mask`: (B, T); `labels`: (B, N), of a decoder-only model (B, T); IGNORED has no loss."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> "TokenBatch":
        return TokenBatch(*(getattr(self, name).to(device) for name in self.__slots__))


class Mix:
    """`mix(i)`: the i-th batch."""

    def __init__(
        self, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, settings: MixSettings, *, decoder_only: bool
    ) -> None:
        self.corpus, self.tokenizer, self.settings, self.decoder_only = corpus, tokenizer, settings, decoder_only
        self._block, self._items = -1, list[list[tuple[list[int], list[int]]]]()

    def __call__(self, index: int) -> TokenBatch:
        block, place = divmod(index, _BLOCK)
        if block != self._block:
            self._block, self._items = block, self._plan(block)
        return (self._causal if self.decoder_only else self._seq2seq)(self._items[place])

    def _plan(self, block: int) -> list[list[tuple[list[int], list[int]]]]:
        """(source ids, target ids) of the items of `_BLOCK` batches; a batch has items of similar length."""
        settings = self.settings
        rng = np.random.default_rng([settings.seed, block])
        names = list(settings.shares)
        chances = np.array([settings.shares[name] for name in names])
        count = settings.items * _BLOCK
        drawn = [make(names[k], self.corpus, rng) for k in rng.choice(len(names), count, p=chances / chances.sum())]
        if self.decoder_only:
            sources = self._ids(["".join(f"{part}\n" for part in item.parts) for item in drawn])
            targets = self._ids([f" {item.target}" if item.parts else item.target for item in drawn])
        else:
            sources = self._ids([item.source for item in drawn])
            targets = self._ids([item.target for item in drawn])
        pairs = [
            (
                source[: settings.longest],
                target[: settings.longest_target if item.task != "plain" else settings.longest],
            )
            for item, source, target in zip(drawn, sources, targets, strict=True)
        ]
        pairs.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
        batches = [pairs[start : start + settings.items] for start in range(0, count, settings.items)]
        return [batches[number] for number in rng.permutation(_BLOCK)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return list(self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])

    def _seq2seq(self, pairs: Sequence[tuple[list[int], list[int]]]) -> TokenBatch:
        first, last = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        sources, mask = pad([[first, *source, last] for source, _ in pairs], self.tokenizer.pad_token_id)
        labels, _ = pad([[*target, last] for _, target in pairs], IGNORED, step=4)
        return TokenBatch(sources, mask, labels)

    def _causal(self, pairs: Sequence[tuple[list[int], list[int]]]) -> TokenBatch:
        """Source, "Answer:", target and end in one row; of a source with a target only the target has a loss."""
        first, last = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        (asked,) = self._ids(["Answer:"])
        rows = [[first, *source, *(asked if source else []), *target, last] for source, target in pairs]
        ids, mask = pad(rows, self.tokenizer.pad_token_id)
        labels = ids.masked_fill(mask == 0, IGNORED)
        for number, (source, _) in enumerate(pairs):
            if source:
                labels[number, : 1 + len(source) + len(asked)] = IGNORED
        return TokenBatch(ids, mask, labels)


def pad(rows: Sequence[Sequence[int]], filler: int, *, step: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as (B, T) ids and mask; T is a multiple of `step`: ever-changing shapes grow the processor's memory."""
    width = -(-max(len(row) for row in rows) // step) * step
    ids = torch.full((len(rows), width), filler)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids, mask


# --- the encoder-decoder ----------------------------------------------------------------------------------------------


class Mini(nn.Module):
    """What of odqa-mini-1 is trained: the decoder and its output map. The update of its encoder is a `Lora`."""

    def __init__(self, model: OdqaMiniForConditionalGeneration) -> None:
        super().__init__()
        self.decoder, self.output = model.decoder, model.output


@dataclass(frozen=True, slots=True)
class EncoderDecoderSizes:
    """The encoder's name, which of its layers the decoder starts from, and its low-rank update."""

    encoder: str
    layers: tuple[int, ...]
    rank: int
    alpha: float


def pretrain_encoder_decoder(
    folder: Path,
    sizes: EncoderDecoderSizes,
    corpus: Corpus,
    mix: MixSettings,
    tune: Mapping[str, Sequence[Example]],
    settings: FitSettings,
    *,
    checkpoint: Path,
    device: torch.device,
    start: Path | None = None,
    attention: str = "sdpa",
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[dict[str, Any]], int]:
    """Train and save into `folder`. Returns the curve and how many values were saved.

    It begins with MiniLM's own layers, or with what an earlier edition of the same sizes saved (`start`: its folder).
    `tune`: examples whose passage is read; exact match is measured where the settings say.
    """
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder(sizes.encoder) or sizes.encoder)
    config = configure(sizes.encoder, tokenizer, rank=sizes.rank, alpha=sizes.alpha, decoder_layers=len(sizes.layers))
    save_tokenizer(tokenizer, folder, config.max_position_embeddings)
    model = OdqaMiniForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=start_from_encoder(config, sizes.layers), attn_implementation=attention
    ).to(device)
    model.requires_grad_(False).eval()
    encoder = Backbone(config.encoder_name, "encoder", model.encoder.bert, tokenizer, str(config.encoder_sha256))
    update = Lora(encoder, rank=config.rank, alpha=config.alpha)
    update.attach(encoder)
    trained = Mini(model).requires_grad_(True)
    if start is not None:
        load_parts(start, trained, update)

    def loss(batch: TokenBatch) -> torch.Tensor:
        at = batch.to(device)
        out = model(input_ids=at.input_ids, attention_mask=at.attention_mask, labels=at.labels, output_attentions=True)
        pointed: torch.Tensor = out.cross_attentions[0][:, 0]
        total: torch.Tensor = out.loss + POINTING * pointing_loss(pointed, at.input_ids, at.labels)
        return total

    def evaluate() -> dict[str, float]:
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.autocast):
            return {f"{name}.em": read_exactly(model, tokenizer, examples) for name, examples in tune.items()}

    result = fit(
        {"update": update, "decoder": trained},
        Mix(corpus, tokenizer, mix, decoder_only=False),
        loss,
        settings,
        checkpoint=checkpoint,
        evaluate=evaluate if tune else None,
        log=log,
    )
    tensors = {name: value.detach().cpu().half().contiguous() for name, value in trained.named_parameters()}
    tensors |= {
        f"{UPDATE}{name}": value.detach().cpu().half().contiguous() for name, value in update.named_parameters()
    }
    save_file(tensors, folder / PARTS)
    update.detach()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    return result.curve, sum(tensor.numel() for tensor in tensors.values())


def load_parts(folder: Path, trained: Mini, update: Lora) -> None:
    """Copy what an earlier edition saved. Raises ArtifactError if it has other sizes."""
    saved = load_file(folder / PARTS)
    for module, tensors in (
        (trained, {name: tensor for name, tensor in saved.items() if not name.startswith(UPDATE)}),
        (update, {name.removeprefix(UPDATE): tensor for name, tensor in saved.items() if name.startswith(UPDATE)}),
    ):
        load_tensors(module, tensors, str(folder / PARTS))


def pointing_loss(pointed: torch.Tensor, source: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log P(pointing at the label's token), over the labels that stand in the source, in nats.

    (B, N, T) weights that add up to 1 over T, (B, T) source ids, (B, N) labels. Without it a decoder learns to copy
    late: the gradient reaches the pointer only through the mixed word vector. Our choice.
    """
    same = (labels[:, :, None] == source[:, None, :]) & (labels != IGNORED)[:, :, None]
    copied = same.any(-1)
    right = (pointed * same).sum(-1)[copied]
    return -right.clamp_min(torch.finfo(pointed.dtype).tiny).log().sum() / copied.sum().clamp_min(1)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, window: int) -> None:
    """Save the tokenizer without the truncation and padding that MiniLM's file switches on."""
    fast: Any = tokenizer
    fast.backend_tokenizer.no_truncation()
    fast.backend_tokenizer.no_padding()
    fast.model_max_length = window
    fast.save_pretrained(folder)


@torch.inference_mode()
def read_exactly(
    model: Any, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, batch: int = 16
) -> float:
    """Exact match (0 to 100) of greedy answers to the task `read`, as the passage writes them."""
    right = 0
    order = sorted(examples, key=lambda example: len(example.passage.text))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        texts = [" ".join(reading_parts(e.question, e.passage)) for e in part]
        ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
        rows, mask = pad([[first, *row[:510], last] for row in ids], tokenizer.pad_token_id)
        out = model.generate(
            input_ids=rows.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=24,
            do_sample=False,
        )
        for example, text in zip(part, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
            right += exact_match(as_written(text, [example.passage.text]), example.answers)
    return round(100 * right / len(examples), 1)


# --- the decoder ------------------------------------------------------------------------------------------------------

SPECIAL = ("<pad>", "<s>", "</s>")  # padding, beginning, end


def train_tokenizer(texts: Sequence[str], size: int, folder: Path, window: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE vocabulary of `size` (Sennrich et al. 2016, arXiv 1508.07909; bytes as in GPT-2), saved.

    It puts the beginning before every text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    begin = (SPECIAL[1], bpe.token_to_id(SPECIAL[1]))
    bpe.post_processor = processors.TemplateProcessing(f"{SPECIAL[1]} $A", special_tokens=[begin])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        model_max_length=window,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """Entries of the vocabulary, hidden width, layers, heads, inner width, longest text in tokens."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    inner: int
    window: int


def pretrain_decoder(
    folder: Path,
    sizes: DecoderSizes,
    corpus: Corpus,
    mix: MixSettings,
    settings: FitSettings,
    *,
    checkpoint: Path,
    device: torch.device,
    attention: str = "sdpa",
    log: Callable[[str], None] = lambda line: None,
) -> tuple[list[dict[str, Any]], int]:
    """Train a Llama of this size from random values and save it whole, in float16. Returns curve and values saved."""
    texts = [f"{passage.title}. {passage.text}" for passage in corpus.passages]
    tokenizer = train_tokenizer(texts, sizes.vocabulary, folder, sizes.window)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=sizes.inner,
        max_position_embeddings=sizes.window,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation=attention,
    )
    torch.manual_seed(settings.seed)
    model: Any = LlamaForCausalLM(config).to(device)

    def loss(batch: TokenBatch) -> torch.Tensor:
        at = batch.to(device)
        value: torch.Tensor = model(input_ids=at.input_ids, attention_mask=at.attention_mask, labels=at.labels).loss
        return value

    batches = Mix(corpus, tokenizer, mix, decoder_only=True)
    result = fit({"model": model}, batches, loss, settings, checkpoint=checkpoint, log=log)
    model.half().save_pretrained(folder)
    return result.curve, model.num_parameters()


def write_curve(folder: Path, curve: Sequence[Mapping[str, Any]]) -> None:
    """curve.json: loss and scores by step, without seconds, which differ between equal runs."""
    entries = [{key: value for key, value in entry.items() if key != "seconds"} for entry in curve]
    (folder / "curve.json").write_text(json.dumps(entries) + "\n", encoding="utf-8")
