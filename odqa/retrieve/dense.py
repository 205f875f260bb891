"""Bi-encoders: texts in, vectors out, with every setting that decides what a vector means kept beside the index.

Any encoder that `transformers` loads: a sentence-transformers folder (its pooling, normalisation, length and prompts
are read here, so that a query need not wait for that package's import), a plain encoder (Contriever, E5), DPR's
question and context encoders, or Spider's one encoder for both in the same layout; alone, or with a method that was
trained for one side or both (`odqa.retrieve.tuned`).
Encoding tokenises once, sorts by length and cuts batches by tokens; bfloat16 where the processor is fast at it.

torch and transformers are imported when an encoder is loaded. This module knows nothing of search.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from odqa.artifacts import Draft, sha256_file, sha256_json
from odqa.corpus.store import PassageStore
from odqa.errors import DataError
from odqa.models import embedded_folder, quiet_loading
from odqa.retrieve.tuned import Side, TunedMethod
from odqa.runtime import choose_device, choose_dtype, progress, run_batches
from odqa.types import Passage

if TYPE_CHECKING:
    import torch
    from tokenizers import Encoding

    from odqa.frozen.backbone import Backbone

R = TypeVar("R")
Pooling = Literal["auto", "mean", "cls", "pooler"]
Titles = Literal["space", "newline", "pair", "none"]
Segments = Literal["tokenizer", "zero"]

PART_ROWS = 8192  # passages a part: a minute or two of work on two cores, which is what a kill costs at most
_TEXT_BYTES = 32 << 20  # text that is tokenised at once: five parts of 100-word passages, or 32 of a million characters
LENGTH_STEP = 8  # batches are padded to multiples of this, because ever-changing shapes make the CPU allocator grow
_LONGEST = 512  # tokens, if neither settings nor the folder know a limit
# Names of a model's inputs, and of the fields of tokenizers.Encoding that fill them.
_FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_PASSAGE_PROMPTS = ("document", "passage", "corpus")  # as encode_document of sentence-transformers says; one not empty


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What decides the vectors of a bi-encoder.

    `question_model` and `passage_model` are local folders, hub names or `embedded:all-MiniLM-L6-v2`; without a passage
    model one model does both. `pooling`: "mean" over tokens, the first token ("cls"), the model's own "pooler" (of
    DPR's classes both are the first token, projected if the model does so), or "auto": what the folder says.
    `normalize`: unit length, or None for what the folder says (plain models: no). `prompts`: where no prefix is named,
    take the folder's own (those of sentence-transformers' `encode_query` and `encode_document`). `*_max_tokens` count
    special tokens; None is the folder's own length. `titles` puts "title text", "title\\ntext", the pair
    [CLS] title [SEP] text [SEP] (DPR), or leaves titles out. `segments`: token types as the tokenizer gives them (1 for
    the text of a pair), or all "zero", as the authors of DPR and Spider trained and encoded. `dtype` is that of the
    computation, `store_dtype` that of the saved passage vectors.
    """

    question_model: str
    passage_model: str | None = None
    pooling: Pooling = "auto"
    normalize: bool | None = None
    query_prefix: str = ""
    passage_prefix: str = ""
    prompts: bool = True
    query_max_tokens: int | None = None
    passage_max_tokens: int | None = None
    titles: Titles = "space"
    segments: Segments = "tokenizer"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    store_dtype: Literal["float16", "float32"] = "float16"

    def __post_init__(self) -> None:
        for side, limit in (("query", self.query_max_tokens), ("passage", self.passage_max_tokens)):
            if limit is not None and limit < 3:
                raise DataError(f"encoder: {side}_max_tokens is {limit}; two special tokens and a word need 3.")

    def passage_text(self, passage: Passage) -> str | tuple[str, str]:
        """What of a passage is encoded: a text, or a (title, text) pair."""
        if self.titles == "pair":
            return self.passage_prefix + passage.title, passage.text
        joint = {"space": " ", "newline": "\n"}.get(self.titles)
        with_title = f"{passage.title}{joint}{passage.text}" if joint and passage.title else passage.text
        return self.passage_prefix + with_title


class Encoder:
    """Encodes questions and passages as `settings` say. Finds the question folder at once, loads models when needed.

    `method` is the folder of a trained bi-encoder (`odqa.retrieve.tuned`), whose method the encoder computes with.
    Raises ArtifactMismatch, when it first encodes or is asked for `tuned`, for one of another model or other settings.
    """

    def __init__(
        self,
        settings: EncoderSettings,
        *,
        device: str = "auto",
        batch_tokens: int | None = None,
        method: Path | None = None,
    ) -> None:
        self.settings = settings
        self.device = device
        self.batch_tokens = batch_tokens
        self.method = method
        self.question_folder = resolve_model(settings.question_model)

    @cached_property
    def passage_folder(self) -> Path:
        """The folder of the passage model; a query never asks for it."""
        name = self.settings.passage_model
        return self.question_folder if name in (None, self.settings.question_model) else resolve_model(str(name))

    @cached_property
    def resolved(self) -> EncoderSettings:
        """The settings with every open choice made as the folders' configurations say; loads no weights.

        Raises DataError for two folders that leave the pooling or the normalisation open and say different things.
        """
        settings = self.settings
        is_open = settings.pooling == "auto" or None in (
            settings.normalize,
            settings.query_max_tokens,
            settings.passage_max_tokens,
        )
        if not (is_open or settings.prompts):
            return settings
        question, passage = _FolderDefaults.load(self.question_folder), _FolderDefaults.load(self.passage_folder)
        pooling, normalize = settings.pooling, settings.normalize
        resolved = replace(
            settings,
            pooling=_agreed("pooling", question.pooling, passage.pooling) if pooling == "auto" else pooling,
            normalize=_agreed("normalize", question.normalize, passage.normalize) if normalize is None else normalize,
            query_prefix=settings.query_prefix or (question.query_prompt if settings.prompts else ""),
            passage_prefix=settings.passage_prefix or (passage.passage_prompt if settings.prompts else ""),
            prompts=False,  # made: a folder that changes later changes nothing
            query_max_tokens=settings.query_max_tokens or question.max_tokens,
            passage_max_tokens=settings.passage_max_tokens or passage.max_tokens,
        )
        _check_prompt(self.question_folder, question, resolved.query_prefix, resolved.pooling)
        _check_prompt(self.passage_folder, passage, resolved.passage_prefix, resolved.pooling)
        return resolved

    @property
    def width(self) -> int:
        """D, the width of the vectors."""
        return self._question_tower.width

    def encode_questions(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of questions: float32 (Q, D), row i for text i."""
        prefixed = [self.resolved.query_prefix + text for text in texts]
        return self._question_tower.encode(prefixed, self.resolved.query_max_tokens)

    def encode_passages(self, passages: Sequence[Passage]) -> np.ndarray:
        """Vectors of passages: float32 (N, D), row i for passage i."""
        texts = [self.resolved.passage_text(passage) for passage in passages]
        return self._passage_tower.encode(texts, self.resolved.passage_max_tokens)

    @cached_property
    def tuned(self) -> TunedMethod | None:
        """The method, checked against this encoder; None without one."""
        if self.method is None:
            return None
        tuned = TunedMethod.load(self.method)
        tuned.check({side: fingerprint(self.folder(side)) for side in tuned.sides}, asdict(self.resolved))
        return tuned

    def folder(self, side: Side) -> Path:
        """The folder of the model that encodes a side."""
        return self.question_folder if side == "questions" else self.passage_folder

    def tower(self, side: Side, *, trainable: bool = False) -> "Tower":
        """A model of one side in memory, with its method; `trainable`: a frozen one in float32 to put a method on."""
        if trainable:
            return Tower(self.folder(side), replace(self.resolved, dtype="float32"), self.device, self.batch_tokens)
        method = self.method if self.tuned is not None and side in self.tuned.sides else None
        return Tower(self.folder(side), self.resolved, self.device, self.batch_tokens, method)

    @cached_property
    def _question_tower(self) -> "Tower":
        return self.tower("questions")

    @cached_property
    def _passage_tower(self) -> "Tower":
        is_same = self.passage_folder == self.question_folder and (self.tuned is None or self.tuned.side == "both")
        return self._question_tower if is_same else self.tower("passages")


def save_passage_vectors(
    encoder: Encoder, store: PassageStore, draft: Draft, name: str = "vectors", *, part_rows: int = PART_ROWS
) -> None:
    """Encode a store into `part-00000.npy` ... in the folder `name` of `draft`; a resumed job skips finished parts.

    Each part is (part_rows, D) in `store_dtype`, and depends on its own passages alone.
    """
    with progress("encode", len(store), "passages") as bar:
        for part, start in enumerate(range(0, len(store), part_rows)):
            stop = min(start + part_rows, len(store))
            draft.part(
                f"{name}/part-{part:05d}.npy",
                lambda path, rows=range(start, stop): _save_vectors(path, encoder, store, rows),  # type: ignore[misc]
            )
            bar.advance(stop - start)


def resolve_model(name: str) -> Path:
    """The local folder of a model: a folder as it is, an embedded model, or a hub name (from its cache, or fetched)."""
    embedded = embedded_folder(name)
    if embedded is not None:
        return embedded
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise DataError(f"encoder {name!r} is neither a folder nor a hub name (OWNER/NAME) nor an embedded model.")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.txt", "*.model", *_WEIGHTS]
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["onnx/*", "openvino/*"]))
    except Exception as error:  # the hub's errors have no common base: connection, authorisation, unknown name
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"encoder {name!r}: no such folder here, and the hub does not give it ({reason}).") from error


def fingerprint(folder: Path) -> str:
    """sha256 over the sha256 of a model folder's weights files, in name order; loads neither torch nor the model."""
    files = [file for pattern in _WEIGHTS for file in sorted(folder.glob(pattern))]
    if not files:
        raise DataError(f"encoder {folder}: no weights here (expected {' or '.join(_WEIGHTS)}).")
    digest = hashlib.sha256()
    for file in files:
        if file.suffix == files[0].suffix:  # safetensors alone, if both kinds are there: transformers loads these
            digest.update(sha256_file(file).encode())
    return digest.hexdigest()


def tokenizer_fingerprint(folder: Path) -> str:
    """sha256 of what a model folder does to a text before the model: its tokenizer's rules, and perhaps lower case.

    Of tokenizer.json how it is spaced, and how it pads and cuts, do not count: the encoder does that itself. A folder
    without that file goes by its vocabulary and settings.
    """
    rules = _json(folder / "tokenizer.json")
    if rules is None:
        names = (
            "vocab.txt",
            "vocab.json",
            "merges.txt",
            "sentencepiece.bpe.model",
            "spiece.model",
            "tokenizer_config.json",
        )
        rules = {name: sha256_file(folder / name) for name in names if (folder / name).is_file()}
    else:
        rules = {key: value for key, value in rules.items() if key not in ("padding", "truncation")}
    return sha256_json([rules, _is_lower_cased(folder)])


def _is_lower_cased(folder: Path) -> bool:
    """Whether a sentence-transformers folder wants its texts in lower case before the tokenizer sees them."""
    return bool((_json(folder / "sentence_bert_config.json") or {}).get("do_lower_case"))


@dataclass(frozen=True, slots=True)
class _FolderDefaults:
    """What a model folder says about the use of its model."""

    pooling: Literal["mean", "cls", "pooler"]
    normalize: bool
    max_tokens: int
    query_prompt: str = ""
    passage_prompt: str = ""
    pools_prompts: bool = True

    @classmethod
    def load(cls, folder: Path) -> "_FolderDefaults":
        config = _json(folder / "config.json")
        if config is None:
            raise DataError(f"encoder {folder}: config.json is missing; expected a model that transformers can load.")
        positions = int(config.get("max_position_embeddings") or _LONGEST)
        told = (_json(folder / "tokenizer_config.json") or {}).get("model_max_length") or positions
        limit = min(
            positions, int(told)
        )  # RoBERTa has two positions more than it can use; MiniLM's tokenizer says more
        modules = _json(folder / "modules.json")
        if modules is not None:
            return _sentence_transformers_defaults(folder, modules, limit)
        is_dpr = config.get("model_type") == "dpr"
        return cls("pooler" if is_dpr else "mean", False, limit)


def _agreed(name: str, question: R, passage: R) -> R:
    """What both folders say. Raises DataError if they do not say the same."""
    if question != passage:
        raise DataError(
            f"encoder: {name} is {question!r} by the question model's folder and {passage!r} by the passage model's. "
            f"Name it in the recipe (dense.{name})."
        )
    return question


def _check_prompt(folder: Path, says: _FolderDefaults, prefix: str, pooling: Pooling) -> None:
    """Raises DataError if the folder wants the mean over the text without its prompt, which nothing here computes."""
    if prefix and pooling == "mean" and not says.pools_prompts:
        raise DataError(
            f"encoder {folder}: its Pooling leaves the prompt out of the mean (include_prompt: false), which is not "
            f"supported; the prompt is {prefix!r}. Use another encoder."
        )


def _sentence_transformers_defaults(folder: Path, modules: list[dict[str, str]], limit: int) -> _FolderDefaults:
    """Read modules.json and what it points to; only Transformer, Pooling and Normalize are understood."""
    kinds = {module["type"].rsplit(".", 1)[-1]: module["path"] for module in modules}
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown or "Pooling" not in kinds:
        what = f"modules {', '.join(sorted(unknown))}" if unknown else "no Pooling module"
        raise DataError(f"encoder {folder}: modules.json has {what}; Transformer, Pooling and Normalize are supported.")
    pooling = _json(folder / kinds["Pooling"] / "config.json") or {}
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "mean": "mean", "cls": "cls"}
    newer = pooling.get("pooling_mode")  # one name; older files have a switch for every mode
    switched_on = [key for key, on in pooling.items() if key.startswith("pooling_mode_") and on is True]
    chosen = [newer] if isinstance(newer, str) else switched_on
    if len(chosen) != 1 or chosen[0] not in modes:
        raise DataError(f"encoder {folder}: pooling {' and '.join(chosen) or 'missing'}; mean and cls are supported.")
    length = (_json(folder / "sentence_bert_config.json") or {}).get("max_seq_length")
    mode: Any = modes[chosen[0]]
    prompts = (_json(folder / "config_sentence_transformers.json") or {}).get("prompts") or {}
    return _FolderDefaults(
        mode,
        "Normalize" in kinds,
        length or limit,
        query_prompt=prompts.get("query") or "",
        passage_prompt=next((prompts[name] for name in _PASSAGE_PROMPTS if prompts.get(name)), ""),
        pools_prompts=pooling.get("include_prompt", True),
    )


def _json(path: Path) -> Any:
    """The JSON value of a file, None if there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error}).") from error


class Tower:
    """One transformer with its tokenizer: texts to vectors. `method` is the folder of one that it computes with."""

    def __init__(
        self,
        folder: Path,
        settings: EncoderSettings,
        device: str,
        batch_tokens: int | None = None,
        method: Path | None = None,
    ) -> None:
        self.device = choose_device(device)
        self.folder = folder
        self._settings = settings
        self._batch_tokens = batch_tokens
        dtype = choose_dtype(settings.dtype, self.device)
        self.tokenizer = _load_tokenizer(folder)
        if method is None:
            self.model = _load_model(folder, dtype, settings.pooling)
        else:
            self.model = _load_model(folder, choose_dtype("float32", self.device), settings.pooling)
            self._specialise(method, dtype)
        self.model.to(self.device)
        self._positions = getattr(self.model.config, "max_position_embeddings", None) or _LONGEST
        _check_length(folder, settings, self._positions)
        self.width = int(getattr(self.model.config, "projection_dim", 0) or self.model.config.hidden_size)

    def encode(self, texts: Sequence[str | tuple[str, str]], max_tokens: int | None) -> np.ndarray:
        """float32 (N, D) for N texts or (title, text) pairs, cut at `max_tokens`."""
        import torch

        encodings = self.tokenise(texts, max_tokens)
        vectors = np.empty((len(texts), self.width), np.float32)

        def work(batch: list[int]) -> None:
            with torch.inference_mode():  # a setting of the thread
                found = self.vectors(self.inputs([encodings[i] for i in batch]))
                vectors[batch] = found.cpu().numpy()

        lengths = [len(encoding.ids) for encoding in encodings]
        run_batches(work, lengths, device=self.device, batch_tokens=self._batch_tokens, step=LENGTH_STEP)
        return vectors

    def tokenise(self, texts: Sequence[str | tuple[str, str]], max_tokens: int | None) -> list["Encoding"]:
        """Token ids of texts or (title, text) pairs, cut at `max_tokens` (None: what the model reads)."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()  # MiniLM's tokenizer.json pads and cuts at 128, its model reads 256
        backend.enable_truncation(max_tokens or self._positions)
        encodings: list[Encoding] = backend.encode_batch(list(texts))
        return encodings

    def inputs(self, encodings: Sequence["Encoding"]) -> dict[str, "torch.Tensor"]:
        """What the model takes, (B, T) each, padded to a common length."""
        import torch

        longest = max(len(encoding.ids) for encoding in encodings)
        shape = (len(encodings), min(_round_up(longest, LENGTH_STEP), self._positions))
        names = {"attention_mask", *self.tokenizer.model_input_names}
        inputs = {name: np.zeros(shape, np.int64) for name in names}
        inputs["input_ids"] += self.tokenizer.pad_token_id or 0
        for row, encoding in enumerate(encodings):
            for name, values in inputs.items():
                if name != "token_type_ids" or self._settings.segments == "tokenizer":
                    values[row, : len(encoding.ids)] = getattr(encoding, _FIELDS[name])
        return {name: torch.from_numpy(values).to(self.device) for name, values in inputs.items()}

    def vectors(self, inputs: dict[str, "torch.Tensor"]) -> "torch.Tensor":
        """Run the model and pool: float32 (B, D)."""
        import torch

        vectors = _pool(self.model(**inputs), inputs["attention_mask"], self._settings.pooling)
        return torch.nn.functional.normalize(vectors, dim=1) if self._settings.normalize else vectors

    def backbone(self) -> "Backbone":
        """The model as a frozen backbone, for methods: it requires no gradient, and is known by its fingerprint."""
        from odqa.frozen.backbone import Backbone
        from odqa.frozen.backbone import fingerprint as of_weights

        self.model.requires_grad_(False)
        return Backbone(str(self.folder), "encoder", self.model, self.tokenizer, of_weights(self.model))

    def _specialise(self, folder: Path, dtype: "torch.dtype") -> None:
        """Put a trained method into the model, which is in float32 and this tower's own, and compute in `dtype`."""
        from odqa.frozen.lora import Lora
        from odqa.frozen.method import load_method

        backbone = self.backbone()
        method = load_method(folder, backbone)
        method.requires_grad_(False)
        if isinstance(method, Lora):
            method.merge(backbone)
        else:
            method.attach(backbone)
        self.model.to(dtype)


def _check_length(folder: Path, settings: EncoderSettings, positions: int) -> None:
    for side, limit in (("query", settings.query_max_tokens), ("passage", settings.passage_max_tokens)):
        if limit is not None and limit > positions:
            raise DataError(f"encoder {folder}: {side}_max_tokens is {limit}, the model reads at most {positions}.")


def _pool(output: Any, mask: "torch.Tensor", pooling: Pooling) -> "torch.Tensor":
    """One float32 vector a text (B, D). DPR's classes give theirs, the first token's, projected, as `pooler_output`."""
    is_dpr = not hasattr(output, "last_hidden_state")
    if is_dpr and pooling == "mean":
        raise DataError("pooling: mean asks for all tokens, of which DPR's classes give only the first. Use cls.")
    if is_dpr or pooling == "pooler":
        pooled: torch.Tensor | None = getattr(output, "pooler_output", None)
        if pooled is None:
            raise DataError("pooling: pooler asks for a pooler that this encoder does not have. Use mean or cls.")
        return pooled.float()
    states: torch.Tensor = output.last_hidden_state.float()  # (B, T, D)
    if pooling == "cls":
        return states[:, 0]
    weights = mask.unsqueeze(-1).float()
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def _load_model(folder: Path, dtype: "torch.dtype", pooling: Pooling) -> Any:
    """The model in eval mode. Raises DataError for one that does not load, or lacks weights that its vectors need."""
    import transformers

    config = _json(folder / "config.json") or {}
    if config.get("is_encoder_decoder"):
        raise DataError(f"encoder {folder}: {config.get('model_type')} has a decoder; only encoders are supported.")
    name = "AutoModel"
    if config.get("model_type") == "dpr":  # AutoModel takes every DPR folder for a question encoder
        is_context = "DPRContextEncoder" in (config.get("architectures") or [])
        name = "DPRContextEncoder" if is_context else "DPRQuestionEncoder"
    loader: Any = getattr(transformers, name)
    try:
        with quiet_loading():
            model, report = loader.from_pretrained(
                str(folder), dtype=dtype, local_files_only=True, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(f"encoder {folder}: transformers cannot load it ({str(error).splitlines()[0]}).") from error
    # transformers draws weights that a file lacks at random and only warns: vectors of noise, hits that look like hits.
    needs_pooler = pooling == "pooler"
    missing = sorted(key for key in report["missing_keys"] if needs_pooler or not key.startswith("pooler."))
    if missing:
        raise DataError(
            f"encoder {folder}: {len(missing)} weights that {type(model).__name__} needs are not in its files "
            f"({missing[0]}, ...). Check architectures in its config.json{' or pool by mean or cls' * needs_pooler}."
        )
    return model.eval()


def _load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer as transformers sees it: it says which inputs the model takes. It must be a fast one."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"encoder {folder}: no tokenizer ({str(error).splitlines()[0]}).") from error
    unknown = set(tokenizer.model_input_names) - set(_FIELDS)
    if unknown or getattr(tokenizer, "backend_tokenizer", None) is None:
        raise DataError(f"encoder {folder}: its tokenizer has no fast form, or inputs beside {', '.join(_FIELDS)}.")
    if _is_lower_cased(folder):
        from tokenizers import normalizers

        own = tokenizer.backend_tokenizer.normalizer
        lower = normalizers.Lowercase()
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([lower, own]) if own else lower
    return tokenizer


def _save_vectors(path: Path, encoder: Encoder, store: PassageStore, rows: range) -> None:
    pieces = store.ranges(rows=len(rows), size=_TEXT_BYTES, within=rows)
    with np.errstate(over="ignore"):  # reported below
        vectors = np.concatenate(
            [encoder.encode_passages(store.slice(piece.start, piece.stop)) for piece in pieces]
        ).astype(encoder.settings.store_dtype)
    if not np.isfinite(vectors).all():
        raise DataError(
            f"the encoder gives NaN or infinity for a passage near id {store[rows.start].id!r}; try dtype: float32 and"
            " store_dtype: float32."
        )
    with path.open("wb") as file:
        np.save(file, vectors, allow_pickle=False)
