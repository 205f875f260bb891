"""In-context learning: which solved examples a prompt shows, drawn once by a seed or chosen for each question.

Nothing is trained. `draw` shows every question the same examples (Brown et al. 2020, arXiv 2005.14165, draw them at
random); `Nearest` shows each question those whose questions are most like it, which answers better than random ones
(Liu et al. 2021, arXiv 2101.06804). Likeness is BM25 between questions: it needs no second model in memory, and Rubin
et al. (2021, arXiv 2112.08633, table 3) find it as good as sentence embeddings or better.
"""

from collections.abc import Sequence

import numpy as np

from odqa.corpus.examples import Example
from odqa.errors import DataError
from odqa.read.prompts import Demonstration
from odqa.text import normalize_answer, tokenize


def solved(example: Example, *, with_passage: bool = True) -> Demonstration:
    """A reading example as a demonstration: its first answer, and the passage where that stands unless told not to."""
    return Demonstration(example.question, example.answers[0], example.passage if with_passage else None)


def draw(pool: Sequence[Demonstration], count: int, seed: int) -> tuple[Demonstration, ...]:
    """`count` of the pool, each at most once, in an order that the seed decides too.

    Raises DataError if the pool has fewer.
    """
    _check(pool, count)
    places = np.random.default_rng(seed).choice(len(pool), count, replace=False)
    return tuple(pool[place] for place in places)


class Nearest:
    """Chooses the `count` demonstrations whose questions are most like a question; the most alike stands last.

    The last is next to the question, where models heed it most (Liu et al. 2021). A demonstration of the question
    itself is left out, whatever its case and punctuation: it would tell the answer. Ties go to the earlier one.
    """

    def __init__(self, pool: Sequence[Demonstration], count: int) -> None:
        import bm25s

        _check(pool, count + 1)  # one may be the question itself
        self.pool, self.count = pool, count
        self._questions = [normalize_answer(one.question) for one in pool]
        self._bm25 = bm25s.BM25(k1=0.9, b=0.4, backend="numpy")
        self._bm25.index([_terms(one.question) for one in pool], show_progress=False)

    def __call__(self, question: str) -> tuple[Demonstration, ...]:
        own = normalize_answer(question)
        known = [term for term in _terms(question) if term in self._bm25.vocab_dict]
        scores = self._bm25.get_scores(known) if known else np.zeros(len(self.pool))
        order = np.argsort(-scores, kind="stable")
        chosen: list[Demonstration] = []
        for place in order:
            if self._questions[place] != own:
                chosen.append(self.pool[place])
            if len(chosen) == self.count:
                break
        return tuple(reversed(chosen))


def _terms(question: str) -> list[str]:
    return [token.lower() for token in tokenize(question) if token.isalnum()]


def _check(pool: Sequence[Demonstration], count: int) -> None:
    if len(pool) < count:
        raise DataError(f"demonstrations: {len(pool)} examples to choose from; at least {count} are needed.")
