"""Cross-encoders: what reads (question, passage) pairs and gives each a score. Two kinds behind the same few calls.

`HubModel` is any sequence-classification model that transformers loads. `TrainedModel` is an artifact of
`odqa.rerank.train`: a small learned part on a frozen encoder. Both make rows of token ids that keep the whole question,
and score batches of them; they know nothing of rankings.
"""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from odqa.artifacts import MANIFEST, load_artifact
from odqa.errors import DataError, RecipeError
from odqa.frozen.backbone import Backbone, load_backbone
from odqa.frozen.fast_bert import speed_up
from odqa.frozen.finetuning import FineTuning
from odqa.frozen.lora import Lora
from odqa.frozen.method import Method, load_method, load_tensors
from odqa.frozen.pairs import PairHead
from odqa.frozen.rows import Rows
from odqa.models import quiet_loading
from odqa.rerank.train import DESCRIPTION, HEAD, KIND
from odqa.runtime import choose_device, choose_dtype
from odqa.types import Passage, Query

ROUND_TO = 16  # rows are padded to a multiple of this: with ever-changing shapes the processor's memory grows
_DEFAULT_TOKENS = 512  # if neither tokenizer nor configuration says the window: that of BERT
_NO_WINDOW = 10**9
_POOLED = 1e-3  # our choice: see export_classifier
_PLACED = {"device_map", "quantization_config"}  # options of from_pretrained that say where the weights go, and as what

Pair = tuple[Query, Passage]
Row = Mapping[str, list[int]]
"""A pair as the model takes it: `input_ids`, `attention_mask`, perhaps `token_type_ids`, of equal length."""


class PairScorer(Protocol):
    """Rows for pairs, and scores for rows of at most `max_tokens`: of a longer one the passage loses its end."""

    name: str
    max_tokens: int
    dtype: torch.dtype

    @property
    def device(self) -> torch.device: ...

    def encode(self, pairs: Sequence[Pair]) -> tuple[list[Row], int]:
        """A row for each pair, not padded, and how many of them had to be cut.

        Raises DataError naming the query whose question leaves no room for a passage.
        """
        ...

    def scores(self, rows: Sequence[Row]) -> list[float]:
        """The scores of one batch, computed together; higher is better. Any thread may call it."""
        ...


def load_pair_scorer(
    name: str,
    *,
    title_separator: str | None = " ",
    max_tokens: int | None = None,
    positive_label: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    **load_options: Any,
) -> PairScorer:
    """The model in a folder, an artifact of ours or one for transformers, or else of that name on the hub.

    `title_separator` and `positive_label` are for models of the hub; an artifact says how it reads a passage. Raises
    DataError for a folder that is neither, ArtifactMismatch for an artifact that is no re-ranker.
    """
    folder = Path(name)
    if (folder / DESCRIPTION).is_file() or (folder / MANIFEST).is_file():
        if load_options:
            raise RecipeError(f"reranker cross: {name} is a trained re-ranker; it takes no {', '.join(load_options)}.")
        return TrainedModel(folder, max_tokens=max_tokens, device=device, dtype=dtype)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(
            f"re-ranker {name}: this folder holds neither a model for transformers (config.json) nor a trained "
            f"re-ranker ({DESCRIPTION}). Name the folder that odqa train made, or a cross-encoder."
        )
    return HubModel(
        name,
        title_separator=title_separator,
        max_tokens=max_tokens,
        positive_label=positive_label,
        device=device,
        dtype=dtype,
        **load_options,
    )


class HubModel:
    """A sequence-classification model; score: the logit of one label, or of two the log-odds of the positive one.

    `title_separator` stands between title and text; None leaves titles out. In a `dtype` smaller than float32 the last
    linear layer still computes in float32, of a BERT all but the linear maps of its layers.

    Raises DataError for a model that does not load or whose head was never trained, RecipeError for another number of
    labels.
    """

    def __init__(
        self,
        name: str,
        *,
        title_separator: str | None = " ",
        max_tokens: int | None = None,
        positive_label: int = 1,
        device: str = "auto",
        dtype: str = "auto",
        **load_options: Any,
    ) -> None:
        if positive_label not in (0, 1):
            raise RecipeError(f"reranker cross: positive_label is {positive_label}; it must be 0 or 1.")
        self.name, self.title_separator, self.positive_label = name, title_separator, positive_label
        self.tokenizer, self.model = _load(name, load_options)
        self.labels = int(self.model.config.num_labels)
        if self.labels not in (1, 2):
            raise RecipeError(
                f"reranker cross: {name} has {self.labels} labels; a re-ranker has 1 (a score) or 2 (no, yes)."
            )
        self.max_tokens = _choose_max_tokens(name, _window(self.tokenizer, self.model.config), max_tokens)
        self.dtype = cast(torch.dtype, self.model.dtype)
        if not _PLACED & load_options.keys():
            where = choose_device(device)
            self.dtype = choose_dtype(dtype, where)
            self.model.to(where)
            if not speed_up(self.model.float(), self.dtype):
                self.model.to(self.dtype)
        if self.model.dtype != torch.float32:
            _keep_last_layer_precise(self.model, self.labels)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    def encode(self, pairs: Sequence[Pair]) -> tuple[list[Row], int]:
        """See `PairScorer.encode`; rows are as the model's own tokenizer makes them."""
        if not pairs:
            return [], 0
        questions = [query.text for query, _ in pairs]
        passages = [self._passage_text(passage) for _, passage in pairs]
        rows = _by_row(self.tokenizer(questions, passages, verbose=False))
        long = [number for number, row in enumerate(rows) if len(row["input_ids"]) > self.max_tokens]
        if long:
            special = self.tokenizer.num_special_tokens_to_add(pair=True)
            for number in long:
                query = pairs[number][0]
                alone = self.tokenizer(query.text, add_special_tokens=False, verbose=False)["input_ids"]
                _check_question(self.name, query, len(alone), special, self.max_tokens)
            shortened = self.tokenizer(
                [questions[number] for number in long],
                [passages[number] for number in long],
                truncation="only_second",
                max_length=self.max_tokens,
            )
            for number, row in zip(long, _by_row(shortened), strict=True):
                rows[number] = row
        return rows, len(long)

    @torch.inference_mode()
    def scores(self, rows: Sequence[Row]) -> list[float]:
        """See `PairScorer.scores`."""
        batch = self.tokenizer.pad(list(rows), padding="longest", pad_to_multiple_of=ROUND_TO, return_tensors="pt")
        width = int(batch["input_ids"].shape[1])
        if width > self.max_tokens:  # rounded up past the window: the columns too many hold padding only
            is_right = self.tokenizer.padding_side == "right"
            kept = slice(0, self.max_tokens) if is_right else slice(width - self.max_tokens, width)
            batch = {name: tensor[:, kept] for name, tensor in batch.items()}
        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}  # (B, T) each
        logits = self.model(**inputs).logits.float()  # (B, labels)
        if self.labels == 1:
            return cast(list[float], logits[:, 0].tolist())
        return cast(list[float], (logits[:, self.positive_label] - logits[:, 1 - self.positive_label]).tolist())

    def _passage_text(self, passage: Passage) -> str:
        if self.title_separator is None or not passage.title:
            return passage.text
        return passage.title + self.title_separator + passage.text


class TrainedModel:
    """A re-ranker that `odqa train` made: the frozen encoder with the method in its weights, and the relevance head.

    LoRA is merged into a copy of the weights that is this model's own, in float32 and before any cast to `dtype`; other
    methods are attached. The head computes in float32 always.

    Raises ArtifactMismatch for another kind of artifact or another backbone than it was trained on, ArtifactError for a
    damaged one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        max_tokens: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        load_artifact(folder, KIND)
        self.name = str(folder)
        settings = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        where = choose_device(device)
        self.dtype = choose_dtype(dtype, where)
        self.backbone = load_backbone(settings["backbone"], "encoder", device="cpu", dtype="float32")
        _specialise(self.backbone, load_method(folder, self.backbone), self.dtype)
        self.backbone.model.to(where)
        self.head = PairHead(self.backbone.width)
        load_tensors(self.head, load_file(folder / HEAD), str(folder / HEAD))
        self.head.requires_grad_(False).to(self.device)
        self.rows = Rows(self.backbone.tokenizer, int(self.backbone.model.config.max_position_embeddings))
        self.max_tokens = _choose_max_tokens(self.name, self.rows.window, max_tokens)

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def encode(self, pairs: Sequence[Pair]) -> tuple[list[Row], int]:
        """See `PairScorer.encode`; rows are those of training: [CLS] question [SEP] title [SEP] text [SEP]."""
        rows: list[Row] = []
        cut = 0
        for query, passage in pairs:
            question = self.rows.question(query.text)
            pieces = self.rows.passage(passage.title, passage.text)
            ids = [self.rows.cls, *question, self.rows.sep, *pieces.title, self.rows.sep, *pieces.text, self.rows.sep]
            if len(ids) > self.max_tokens:
                _check_question(self.name, query, len(question), 4, self.max_tokens)
                ids = [*ids[: self.max_tokens - 1], self.rows.sep]
                cut += 1
            first = 2 + len(question)
            types = [0] * first + [1] * (len(ids) - first)
            rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "token_type_ids": types})
        return rows, cut

    @torch.inference_mode()
    def scores(self, rows: Sequence[Row]) -> list[float]:
        """See `PairScorer.scores`."""
        longest = max(len(row["input_ids"]) for row in rows)
        width = min(-(-longest // ROUND_TO) * ROUND_TO, self.rows.window)
        padding = {"input_ids": self.rows.pad, "attention_mask": 0, "token_type_ids": 0}
        inputs = {
            name: torch.tensor([[*row[name], *[pad] * (width - len(row[name]))] for row in rows]).to(self.device)
            for name, pad in padding.items()
        }  # (B, T) each
        states = self.backbone.model(**inputs).last_hidden_state
        return cast(list[float], self.head(states).tolist())


def export_classifier(artifact: Path, folder: Path) -> None:
    """Write a trained re-ranker as an ordinary model for sequence classification, with a tokenizer, into `folder`.

    transformers and sentence-transformers load it, and `HubModel` with the title separator " [SEP] ": given a question
    and "TITLE [SEP] TEXT" they make the rows of training. Such a model puts a tanh between the first token and the
    scores; a pooler that scales down by 1000, with a head that scales up again, leaves tanh no room to bend: what is
    lost is 3e-7 h**2 of each state h, relative. Raises DataError for a backbone that is no BERT.
    """
    from transformers import BertForSequenceClassification, BertModel

    settings = json.loads((artifact / DESCRIPTION).read_text(encoding="utf-8"))
    backbone = load_backbone(settings["backbone"], "encoder", device="cpu", dtype="float32")
    method = load_method(artifact, backbone)
    if type(backbone.model) is not BertModel or not isinstance(method, Lora):
        raise DataError(f"{artifact}: {method.kind} on {backbone.name} cannot be exported; LoRA on a BERT can.")
    method.merge(backbone)
    head = load_file(artifact / HEAD)
    config = copy.deepcopy(backbone.model.config)
    config.num_labels = 1
    model = BertForSequenceClassification(config)
    model.bert.load_state_dict(backbone.model.state_dict())
    with torch.no_grad():
        model.bert.pooler.dense.weight.copy_(_POOLED * torch.eye(backbone.width))
        model.bert.pooler.dense.bias.zero_()
        model.classifier.weight.copy_(head["weight"] / _POOLED)
        model.classifier.bias.copy_(head["bias"])
    tokenizer: Any = backbone.tokenizer
    tokenizer.backend_tokenizer.no_truncation()  # MiniLM's tokenizer.json pads and cuts at 128
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # else it is not saved
    with quiet_loading():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _specialise(backbone: Backbone, method: Method, dtype: torch.dtype) -> None:
    """Put the method into a backbone in float32 that is nobody else's, and let it compute in `dtype`."""
    method.requires_grad_(False)
    if isinstance(method, Lora):
        method.merge(backbone)
    else:
        method.attach(backbone)
    is_plain = isinstance(method, Lora | FineTuning)  # other weights, and nothing else
    if not (is_plain and speed_up(backbone.model, dtype)):
        backbone.model.to(dtype)


def _by_row(encoded: Mapping[str, list[list[int]]]) -> list[Row]:
    """From lists by feature to features by row."""
    return [dict(zip(encoded.keys(), values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def _check_question(name: str, query: Query, tokens: int, special: int, most: int) -> None:
    """Raises DataError if a question with its special tokens fills the window."""
    if tokens + special >= most:
        raise DataError(
            f"query {query.id}: the question takes {tokens} tokens, {name} reads at most {most} "
            "together with a passage. Shorten the question."
        )


def _load(name: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """Tokenizer and frozen model. Refuses a model whose classification head would be drawn at random."""
    try:
        with quiet_loading():
            tokenizer = AutoTokenizer.from_pretrained(name)
            loaded = AutoModelForSequenceClassification.from_pretrained(name, output_loading_info=True, **options)
    except (OSError, ValueError) as error:
        raise DataError(f"re-ranker {name!r} does not load: {str(error).splitlines()[0]}") from error
    model, report = loaded
    if report["missing_keys"]:
        raise DataError(
            f"re-ranker {name!r} has no trained classification head ({min(report['missing_keys'])} is missing). "
            "Use a cross-encoder, or train one on this model."
        )
    return tokenizer, model.requires_grad_(False).eval()


def _window(tokenizer: Any, config: Any) -> int | None:
    """Tokens that tokenizer and model both allow; None if neither says."""
    windows = [int(tokenizer.model_max_length)] if tokenizer.model_max_length < _NO_WINDOW else []
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        windows.append(positions)
    return min(windows, default=None)


def _choose_max_tokens(name: str, window: int | None, asked: int | None) -> int:
    """The longest pair in tokens: what is asked for, at most the window."""
    if asked is not None and window is not None and asked > window:
        raise RecipeError(f"reranker cross: max_tokens is {asked}, but {name} reads at most {window}.")
    if asked is not None and asked < 8:
        raise RecipeError(f"reranker cross: max_tokens is {asked}; a question and a passage need at least 8.")
    return asked or window or _DEFAULT_TOKENS


def _keep_last_layer_precise(model: nn.Module, labels: int) -> None:
    """Let the last linear layer, the one that makes the logits, compute in float32.

    In bfloat16 a logit has 8 significant bits: near 8.0 the next one is 0.0625 away, and passages tie.
    """
    layers = [layer for layer in model.modules() if type(layer) is nn.Linear and layer.out_features == labels]
    if layers:
        layers[-1].float()
        layers[-1].register_forward_pre_hook(lambda _layer, args: tuple(value.float() for value in args))
