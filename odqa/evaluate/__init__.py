"""Joins the traces of a run with gold answers, after the run, and says how good it was and where answers were lost.

Nothing here retrieves, reads or knows a model. A metric is a value whose text is what one types to get it: `recall@20`.
Rates are in percent (0 to 100), `tokens` in tokens a question. Every score carries its question set, split, n, matcher
and a 95% interval: percentile bootstrap over questions (Efron 1979), seeded. A question that the run abstained on is
wrong, one that the run lacks is an error; neither leaves a mean.

Metrics, for a question with gold answers:

    em, f1              of the last answer (`odqa.text`)
    recall@k            an answer is in one of the first k passages that the first pass retrieved
    rerank_recall@k     the same after the first pass's re-ranker
    final_recall@k      the same in the ranking that the first pass packs from: rerank_recall@k with a re-ranker, and
                        recall@k without, so that systems with and without one compare
    recall_in_context   an answer is in the kept text of one packed passage of any pass (titles do not count)
    ceiling             an answer is in some passage of the collection, found or not (`odqa.evaluate.ceiling`)
    tokens              tokens given to the reader, summed over its passes

Without gold answers (unanswerable), only abstaining is right: em and f1 count it; recall has nothing to find and leaves
it out, so that its n is smaller.

The funnel gives each question exactly one outcome. A wrong one belongs to the stage that came nearest in any pass:

    not retrieved             no passage that a retriever returned holds an answer
    reranked away             one was retrieved, and re-ranking lost it: it is not among the re-ranked, or it would have
                              been packed in the retriever's order (it stood within the first m, m passages were packed)
                              and is not within the first m any more
    not packed                one came to the packer, and did not fit, was a duplicate, ranked too low, or was trimmed
                              to sentences without the answer
    misread                   one was packed, and the reader said something else (or should have abstained)
    undone by a re-pass       an earlier pass answered right, the last one does not
    correct                   right, and a packed passage holds an answer (or rightly abstained)
    correct without evidence  right, though no packed passage holds an answer: known by heart, or guessed

Beside the funnel, a run of several passes says of each of them how many questions it read, `mended by pass 2` (wrong
before it, right after it) and `undone by pass 2` (the reverse), which the outcomes of the last pass cannot tell.

So recall_in_context is the share of `correct`, `misread` and those `undone by a re-pass` that had their evidence. In a
closed-book run a question is `correct without evidence` or `not retrieved`.

Answering or not (selective prediction) is judged from the confidence of the best answer, given or withheld: see
`odqa.evaluate.selective`. Confidence is a reader's calibrated probability; a run without it has no such numbers.

The way of the data: `funnel` judges a question, `metrics` reads it, `scores` sums a run up with `intervals`,
`breakdowns` does so for questions of a kind, `compare` pairs two runs.
"""

from odqa.evaluate.breakdowns import (
    Group,
    answer_type,
    break_down,
    question_word,
    reach_curve,
    recall_curve,
)
from odqa.evaluate.ceiling import AnswerSearch, questions_with_answer
from odqa.evaluate.compare import (
    GAIN_METRICS,
    Check,
    Comparison,
    Difference,
    Expectation,
    Gain,
    check_expectations,
    compare,
    measure_gain,
)
from odqa.evaluate.funnel import OUTCOMES, Outcome, QuestionResult, TextOf, judge
from odqa.evaluate.intervals import RESAMPLES, Interval, bootstrap_interval, paired_difference
from odqa.evaluate.metrics import DEPTHS, Metric
from odqa.evaluate.scores import Evaluation, RankedResult, Score, evaluate, evaluate_rankings
from odqa.evaluate.selective import (
    Decision,
    RiskCoverage,
    Selective,
    auroc,
    auroc_interval,
    calibration_error,
    refused,
    risk_coverage,
    selective,
    threshold_keeping,
)

__all__ = [
    "DEPTHS",
    "GAIN_METRICS",
    "OUTCOMES",
    "RESAMPLES",
    "AnswerSearch",
    "Check",
    "Comparison",
    "Decision",
    "Difference",
    "Evaluation",
    "Expectation",
    "Gain",
    "Group",
    "Interval",
    "Metric",
    "Outcome",
    "QuestionResult",
    "RankedResult",
    "RiskCoverage",
    "Score",
    "Selective",
    "TextOf",
    "answer_type",
    "auroc",
    "auroc_interval",
    "bootstrap_interval",
    "break_down",
    "calibration_error",
    "check_expectations",
    "compare",
    "evaluate",
    "evaluate_rankings",
    "judge",
    "measure_gain",
    "paired_difference",
    "question_word",
    "questions_with_answer",
    "reach_curve",
    "recall_curve",
    "refused",
    "risk_coverage",
    "selective",
    "threshold_keeping",
]
