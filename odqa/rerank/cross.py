"""Re-ranking with a cross-encoder: one model reads question and passage together and gives the pair a score.

Any sequence-classification model that transformers loads, from a folder or hub name, or a re-ranker that `odqa train`
made (`odqa.rerank.models`). How the passages were found counts only if `retriever_weight` says so.

Source: Nogueira & Cho 2019 (arXiv 1901.04085), the model; scores equal those of sentence-transformers' CrossEncoder
before its activation.
"""

from typing import Any

from odqa.rerank.models import load_pair_scorer
from odqa.rerank.pairs import PairReranker
from odqa.runtime import Recent
from odqa.types import Passage


class CrossEncoderReranker(PairReranker):
    """Scores (question, passage) pairs with the model in `model`; see `PairReranker` for the other settings.

    Score: the logit of a model with one label; with two labels the log-odds of `positive_label`, which order the
    passages as its probability does. Higher is better; scores of different models do not compare.

    `title_separator` stands between title and text; None leaves titles out (an artifact of `odqa train` has its own
    way). A pair longer than `max_tokens` (None: the model's window) loses the end of its passage, never a part of its
    question. `dtype` "auto" is bfloat16 where that is fast; the last layer stays in float32, so that close passages do
    not tie.

    Raises DataError for a model that does not load or has no trained classification head, RecipeError for one with
    another number of labels, ArtifactMismatch for an artifact of another kind or another backbone.
    """

    def __init__(
        self,
        model: str,
        *,
        depth: int | None = None,
        retriever_weight: float = 0.0,
        title_separator: str | None = " ",
        max_tokens: int | None = None,
        positive_label: int = 1,
        batch_tokens: int | None = None,
        memory: Recent[tuple[str, Passage], float] | None = None,
        device: str = "auto",
        dtype: str = "auto",
        **load_options: Any,
    ) -> None:
        super().__init__(
            "cross", depth=depth, retriever_weight=retriever_weight, batch_tokens=batch_tokens, memory=memory
        )
        self.model = load_pair_scorer(
            model,
            title_separator=title_separator,
            max_tokens=max_tokens,
            positive_label=positive_label,
            device=device,
            dtype=dtype,
            **load_options,
        )
