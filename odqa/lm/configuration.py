"""The configuration of odqa-mini, apart from the model, which the table of configurations need not load."""

from typing import TYPE_CHECKING, Any

from transformers.configuration_utils import PreTrainedConfig

from odqa.lm.auto import register_model
from odqa.models import MINILM

if TYPE_CHECKING:
    from transformers import BertConfig


class OdqaMiniConfig(PreTrainedConfig):  # type: ignore[misc]
    """`encoder_sha256` is that of MiniLM's weights, with which the decoder was trained; `rank` 0 is no update."""

    model_type = "odqa-mini"

    def __init__(
        self,
        encoder_name: str = MINILM,
        encoder_sha256: str | None = None,
        rank: int = 0,
        alpha: float = 64.0,
        decoder_layers: int = 3,
        vocab_size: int = 30522,
        hidden_size: int = 384,
        num_hidden_layers: int = 6,
        num_attention_heads: int = 12,
        intermediate_size: int = 1536,
        hidden_act: str = "gelu",
        max_position_embeddings: int = 512,
        layer_norm_eps: float = 1e-12,
        **others: Any,
    ) -> None:
        self.encoder_name, self.encoder_sha256, self.rank, self.alpha = encoder_name, encoder_sha256, rank, alpha
        self.decoder_layers, self.vocab_size, self.hidden_size = decoder_layers, vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.intermediate_size, self.hidden_act = intermediate_size, hidden_act
        self.max_position_embeddings, self.layer_norm_eps = max_position_embeddings, layer_norm_eps
        defaults = {
            "is_encoder_decoder": True,
            "pad_token_id": 0,
            "bos_token_id": 101,  # [CLS]
            "decoder_start_token_id": 101,
            "eos_token_id": 102,  # [SEP]
            "tie_word_embeddings": True,
        }
        super().__init__(**(defaults | others))
        register_model()

    def bert(self, *, decoder: bool) -> "BertConfig":
        """The settings of one of its two stacks of BERT layers. No dropout: too little is trained to need it."""
        from transformers import BertConfig

        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.decoder_layers if decoder else self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            hidden_act=self.hidden_act,
            max_position_embeddings=self.max_position_embeddings,
            layer_norm_eps=self.layer_norm_eps,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            is_decoder=decoder,
            add_cross_attention=decoder,
            attn_implementation=getattr(self, "_attn_implementation", None),
        )
