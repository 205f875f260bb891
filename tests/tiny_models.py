"""Random models of a few ten thousand weights with tokenizers of a few hundred tokens, for tests without a network.

Each function writes a folder that the Auto classes of transformers load, and returns it. The same arguments always give
the same weights. They know nothing: what they answer is noise, but sensitive noise. Weights are drawn wide (standard
deviation 0.4 instead of 0.02), so that a token, a position or a mask that is wrong changes what they say.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_VOCABULARY = """
the a an of in is was and to who what when where which how many did does by for on at with from as it its he she they
paris london rome berlin france italy germany capital city river seine tiber bridge tower king queen war book song film
wrote built born died won first last year old new great north south east west world water mountain sea sun moon star
gold silver iron one two three four five six seven eight nine ten title text question answer passage passages context
words unknown yes no and or not name named called country largest longest highest author president team game music
"""
WORDS = _VOCABULARY.split()
TEXT = [" ".join(WORDS[start:] + WORDS[:start]) for start in range(0, len(WORDS), 7)]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] | trim }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_WIDTH, _LAYERS, _HEADS, _DEVIATION = 32, 2, 4, 0.4


def tiny_gpt2(path: Path, *, window: int = 256, seed: int = 0) -> Path:
    """A causal LM with learned absolute positions; byte-level BPE, no token is added to a text, no padding token."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = _byte_level(["<|endoftext|>"])
    end = tokenizer.token_to_id("<|endoftext|>")
    config = GPT2Config(
        vocab_size=tokenizer.get_vocab_size(),
        n_positions=window,
        n_embd=_WIDTH,
        n_layer=_LAYERS,
        n_head=_HEADS,
        bos_token_id=end,
        eos_token_id=end,
        initializer_range=_DEVIATION,
    )
    return _save(path, seed, GPT2LMHeadModel, config, tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def tiny_llama(path: Path, *, window: int = 256, chat: bool = False, seed: int = 0) -> Path:
    """A causal LM with rotary positions and grouped key/value heads; byte-level BPE with `<s>` before every text.

    `chat` adds a chat template, with control tokens for the roles and the end of a turn.
    """
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _byte_level(["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"])
    start, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("</s>")
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)])
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=window,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        num_key_value_heads=_HEADS // 2,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=tokenizer.token_to_id("<pad>"),
        initializer_range=_DEVIATION,
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    if chat:
        names["chat_template"] = CHAT_TEMPLATE
    return _save(path, seed, LlamaForCausalLM, config, tokenizer, **names)


def tiny_t5(path: Path, *, window: int = 256, factor: float = 4.0, seed: int = 0) -> Path:
    """An encoder-decoder LM with relative positions; unigram pieces with `</s>` after every text.

    Its configuration says nothing about a window, the tokenizer's `model_max_length` does. `factor` is how wide weights
    are drawn; with 4.0 attention is so sharp that most of it is exactly zero, gradients too.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing
    from transformers import T5Config, T5ForConditionalGeneration

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [("▁" + word, -5.0) for word in dict.fromkeys(WORDS)]
    pieces += [(chr(code), -9.0) for code in range(33, 127)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    config = T5Config(
        vocab_size=tokenizer.get_vocab_size(),
        d_model=_WIDTH,
        d_kv=_WIDTH // _HEADS,
        d_ff=2 * _WIDTH,
        num_layers=_LAYERS,
        num_heads=_HEADS,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        initializer_factor=factor,
    )
    names: dict[str, Any] = {
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_max_length": window,
    }
    return _save(path, seed, T5ForConditionalGeneration, config, tokenizer, **names)


def tiny_bert(path: Path, *, window: int = 128, seed: int = 0) -> Path:
    """An encoder: word pieces of lower-cased text, `[CLS] A [SEP] B [SEP]`."""
    from transformers import BertModel

    tokenizer = _word_pieces()
    return _save(
        path, seed, BertModel, _bert_config(tokenizer, window), tokenizer, **_BERT_NAMES, model_max_length=window
    )


def tiny_multilingual(path: Path, *, window: int = 512, seed: int = 0) -> Path:
    """An encoder of any script, made like multilingual-e5-small: a BERT with `<s> A </s>` and a tokenizer of its own
    (bytes, where that has XLM-R's sentence pieces)."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BertModel

    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = _byte_level(list(names.values()))
    ends = [(name, tokenizer.token_to_id(name)) for name in ("<s>", "</s>")]
    tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=ends
    )
    return _save(path, seed, BertModel, _bert_config(tokenizer, window), tokenizer, **names, model_max_length=window)


def tiny_bert2bert(path: Path, *, window: int = 128, seed: int = 0) -> Path:
    """An encoder-decoder of two BERTs, with learned absolute positions on both sides; texts end with `[SEP]`."""
    from transformers import EncoderDecoderConfig, EncoderDecoderModel

    tokenizer = _word_pieces()
    ids = {name: tokenizer.token_to_id(token) for name, token in _BERT_NAMES.items()}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(
        _bert_config(tokenizer, window),
        _bert_config(tokenizer, window, is_decoder=True, add_cross_attention=True),
        decoder_start_token_id=ids["cls_token"],
        bos_token_id=ids["cls_token"],
        eos_token_id=ids["sep_token"],
        pad_token_id=ids["pad_token"],
    )
    return _save(path, seed, EncoderDecoderModel, config, tokenizer, **_BERT_NAMES, model_max_length=window)


def tiny_odqa_mini(path: Path, *, window: int = 128, seed: int = 0) -> Path:
    """odqa-mini's architecture, saved whole; its encoder gives states and word vectors side by side."""
    import torch

    from odqa.lm.configuration import OdqaMiniConfig
    from odqa.lm.mini import OdqaMiniForConditionalGeneration

    def wide(config: Any) -> Any:
        model = OdqaMiniForConditionalGeneration(config)
        with torch.no_grad():
            for tensor in model.parameters():
                if tensor.ndim == 2:
                    tensor.mul_(_DEVIATION / tensor.std())
        return model

    tokenizer = _word_pieces()
    ids = {name: tokenizer.token_to_id(token) for name, token in _BERT_NAMES.items()}
    config = OdqaMiniConfig(
        decoder_layers=_LAYERS,
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=_WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        intermediate_size=2 * _WIDTH,
        max_position_embeddings=window,
        pad_token_id=ids["pad_token"],
        bos_token_id=ids["cls_token"],
        decoder_start_token_id=ids["cls_token"],
        eos_token_id=ids["sep_token"],
    )
    return _save(path, seed, wide, config, tokenizer, **_BERT_NAMES, model_max_length=window)


def tiny_cross_encoder(path: Path, labels: int = 1, *, window: int = 128, seed: int = 0) -> Path:
    """A BERT that classifies a pair of texts into `labels` classes."""
    from transformers import BertForSequenceClassification

    tokenizer = _word_pieces()
    config = _bert_config(tokenizer, window, num_labels=labels)
    return _save(path, seed, BertForSequenceClassification, config, tokenizer, **_BERT_NAMES, model_max_length=window)


_BERT_NAMES: dict[str, Any] = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def _byte_level(special: list[str]) -> "Tokenizer":
    """Byte-level BPE trained on `TEXT`: 256 bytes, the special tokens and about 200 merges; any text round-trips."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + 200, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _word_pieces() -> "Tokenizer":
    """Word pieces from a fixed vocabulary: `WORDS`, and each printable ASCII character as start and continuation."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    characters = [chr(code) for code in range(33, 127)]
    special = list(_BERT_NAMES.values())
    pieces = dict.fromkeys([*special, *WORDS, *characters, *("##" + character for character in characters)])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return tokenizer


def _bert_config(tokenizer: "Tokenizer", window: int, **settings: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=window,
        hidden_size=_WIDTH,
        intermediate_size=2 * _WIDTH,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        initializer_range=_DEVIATION,
        **settings,
    )


def _save(path: Path, seed: int, model_class: Any, config: Any, tokenizer: "Tokenizer", **names: Any) -> Path:
    """Draw the weights from `seed` without touching torch's global generator, and save model and tokenizer."""
    import torch
    from transformers import PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
    path.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path
