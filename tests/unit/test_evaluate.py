"""odqa.evaluate: each number worked out by hand, each outcome made by a trace that deserves it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from odqa.errors import DataError
from odqa.evaluate import (
    OUTCOMES,
    Decision,
    Evaluation,
    Expectation,
    Metric,
    Outcome,
    auroc,
    auroc_interval,
    bootstrap_interval,
    calibration_error,
    check_expectations,
    compare,
    evaluate,
    judge,
    measure_gain,
    paired_difference,
    refused,
    risk_coverage,
    selective,
    threshold_keeping,
)
from odqa.types import Answer, Candidate, Gold, Hit, PackedContext, Passage, Query, Step, Trace

# Passages y* hold the answer "Rome", n* do not.
TEXTS = {**{f"y{i}": f"It is Rome ({i})." for i in range(3)}, **{f"n{i}": f"It is Bern ({i})." for i in range(30)}}
ROME = Gold("q", ("Rome",))


def a_pass(
    number: int, retrieved: Sequence[str] = (), reranked: Sequence[str] | None = None, packed: Sequence[str] = ()
) -> tuple[list[Step], PackedContext]:
    """The steps of one pass and the context it read; 10 tokens a passage and 5 for the question, budget 64."""
    steps = [Step("retrieve", number, 0.5, 4, tuple(retrieved))] if retrieved else []
    steps += [Step("rerank", number, 0.5, 4, tuple(reranked))] if reranked is not None else []
    steps += [Step("pack", number, 0.5, 4, tuple(packed)), Step("read", number, 0.5, 4)]
    hits = tuple(Hit(Passage(pid, TEXTS[pid], "Rome"), 1.0, "x") for pid in packed)
    return steps, PackedContext(Query("q", "?"), "", hits, 5 + 10 * len(packed), 64)


def a_trace(answers: Sequence[str], *passes: tuple[list[Step], PackedContext], query_id: str = "q") -> Trace:
    return Trace(
        Query(query_id, "?"),
        steps=tuple(step for steps, _ in passes for step in steps),
        answers=tuple(Answer(query_id, text, -1.0) for text in answers),
        contexts=tuple(context for _, context in passes),
    )


# --- the funnel -------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Trace, Outcome]] = {
    "nothing retrieved holds it": (a_trace(["Bern"], a_pass(1, ["n0", "n1"], None, ["n0"])), "not retrieved"),
    "the re-ranker cut it off": (a_trace(["Bern"], a_pass(1, ["n0", "y0"], ["n0"], ["n0"])), "reranked away"),
    # y0 was first, 2 are packed, now it is third
    "the re-ranker pushed it out": (
        a_trace(["Bern"], a_pass(1, ["y0", "n0", "n1"], ["n0", "n1", "y0"], ["n0", "n1"])),
        "reranked away",
    ),
    # it would not have been packed in the retriever's order either
    "it ranked too low before and after": (
        a_trace(["Bern"], a_pass(1, ["n0", "n1", "y0"], ["n1", "n0", "y0"], ["n1", "n0"])),
        "not packed",
    ),
    # first after re-ranking, yet the packer left it out
    "it did not fit": (a_trace(["Bern"], a_pass(1, ["n0", "y0"], ["y0", "n0"], ["n0"])), "not packed"),
    "without a re-ranker it was too low": (a_trace(["Bern"], a_pass(1, ["n0", "y0"], None, ["n0"])), "not packed"),
    "it was there to read": (a_trace(["Bern"], a_pass(1, ["n0", "y0"], None, ["n0", "y0"])), "misread"),
    "abstained with it in view": (a_trace([""], a_pass(1, ["y0"], None, ["y0"])), "misread"),
    "right": (a_trace(["rome!"], a_pass(1, ["n0", "y0"], None, ["n0", "y0"])), "correct"),
    "right, re-ranked": (a_trace(["Rome"], a_pass(1, ["n0", "y0"], ["y0", "n0"], ["y0"])), "correct"),
    "right by heart": (a_trace(["Rome"], a_pass(1, ["n0"], None, ["n0"])), "correct without evidence"),
    "right, then wrong": (
        a_trace(["Rome", "Bern"], a_pass(1, ["y0"], None, ["y0"]), a_pass(2, ["n0"], None, ["n0"])),
        "undone by a re-pass",
    ),
    "wrong, then right": (
        a_trace(["Bern", "Rome"], a_pass(1, ["n0"], None, ["n0"]), a_pass(2, ["y0"], None, ["y0"])),
        "correct",
    ),
    # the first pass found nothing, the second came as far as the packer
    "the nearest pass counts": (
        a_trace(["Bern", "Bern"], a_pass(1, ["n0"], None, ["n0"]), a_pass(2, ["n1", "y0"], None, ["n1"])),
        "not packed",
    ),
    "evidence of an earlier pass was read": (
        a_trace(["Bern", "Bern"], a_pass(1, ["y0"], None, ["y0"]), a_pass(2, ["n1"], None, ["n1"])),
        "misread",
    ),
    "closed book, wrong": (a_trace(["Bern"], a_pass(1)), "not retrieved"),
    "closed book, right": (a_trace(["Rome"], a_pass(1)), "correct without evidence"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_question_has_the_outcome_of_the_stage_that_lost_it(case: str) -> None:
    trace, outcome = CASES[case]
    assert judge(trace, ROME, TEXTS.__getitem__).outcome == outcome


def test_without_gold_answers_only_abstaining_is_right() -> None:
    unanswerable = Gold("q", ())
    context = a_pass(1, ["y0"], None, ["y0"])
    abstained = judge(a_trace([""], context), unanswerable, TEXTS.__getitem__)
    assert (abstained.outcome, abstained.em, abstained.f1) == ("correct", True, 1.0)
    answered = judge(a_trace(["Rome"], context), unanswerable, TEXTS.__getitem__)
    assert (answered.outcome, answered.em, answered.f1) == ("misread", False, 0.0)
    undone = judge(a_trace(["", "Rome"], context, context), unanswerable, TEXTS.__getitem__)
    assert undone.outcome == "undone by a re-pass"


def test_titles_do_not_count_as_evidence() -> None:
    # every passage has the title "Rome"; n0's text lacks it
    assert not judge(a_trace(["Rome"], a_pass(1, ["n0"], None, ["n0"])), ROME, TEXTS.__getitem__).in_context


def test_in_context_means_the_kept_text_not_the_passage_of_the_collection() -> None:
    steps, _ = a_pass(1, ["y0"], None, ["y0"])
    cut = PackedContext(Query("q", "?"), "", (Hit(Passage("y0", "It is"), 1.0, "x"),), 5, 64)
    result = judge(a_trace(["Bern"], (steps, cut)), ROME, TEXTS.__getitem__)
    assert (result.in_context, result.retrieve_rank, result.outcome) == (False, 1, "not packed")


def test_an_answer_across_two_packed_passages_is_not_in_context() -> None:
    hits = (Hit(Passage("a", "New"), 1.0, "x"), Hit(Passage("b", "York"), 1.0, "x"))
    context = PackedContext(Query("q", "?"), "New York", hits, 5, 64)
    result = judge(a_trace(["x"], ([], context)), Gold("q", ("New York",)), TEXTS.__getitem__)
    assert not result.in_context


def test_ranks_are_those_of_the_first_pass_and_tokens_of_all() -> None:
    trace = a_trace(
        ["x", "x"], a_pass(1, ["n0", "n1", "y0"], ["n0", "y0", "n1"], ["n0"]), a_pass(2, ["y0"], ["y0"], ["n1", "n0"])
    )
    result = judge(trace, ROME, TEXTS.__getitem__)
    assert (result.retrieve_rank, result.rerank_rank, result.passes) == (3, 2, 2)
    assert result.tokens == 15 + 25


def test_packed_passages_are_never_looked_up_again() -> None:
    def refuse(passage_id: str) -> str:
        raise AssertionError(passage_id)

    context = PackedContext(Query("q", "?"), "", (Hit(Passage("y0", TEXTS["y0"]), 1.0, "x"),), 5, 64)
    assert judge(a_trace(["Rome"], ([], context)), ROME, refuse).outcome == "correct"


# --- a run ------------------------------------------------------------------------------------------------------------


def run_of(cases: Sequence[str], prefix: str = "q") -> tuple[list[Trace], list[Gold]]:
    """The named cases as the questions of one run, renamed q0, q1, ..."""
    traces = [
        Trace(
            Query(f"{prefix}{i}", "?"),
            CASES[case][0].steps,
            CASES[case][0].answers,
            CASES[case][0].contexts,
        )
        for i, case in enumerate(cases)
    ]
    return traces, [Gold(trace.query.id, ROME.answers) for trace in traces]


def scored(traces: Sequence[Trace], gold: Sequence[Gold], depths: Sequence[int] = (1, 2)) -> Evaluation:
    return evaluate(traces, gold, TEXTS.__getitem__, question_set="toy", split="dev", depths=depths)


def test_the_funnel_adds_up_to_the_number_of_questions() -> None:
    evaluation = scored(*run_of(list(CASES)))
    assert sum(evaluation.funnel.values()) == len(CASES) == len(evaluation.questions)
    assert list(evaluation.funnel) == list(OUTCOMES)
    assert all(evaluation.funnel.values()), "a case for every outcome"


def test_scores_are_percentages_worked_out_by_hand() -> None:
    # y0 is retrieved: never, second, second, second; packed: no, no, yes, yes; answered right: only the last
    names = ["nothing retrieved holds it", "without a re-ranker it was too low", "it was there to read", "right"]
    evaluation = scored(*run_of(names))
    values = {score.name: score.value for score in evaluation.scores}
    assert values == {
        "em": 25.0,
        "f1": 25.0,
        "recall@1": 0.0,
        "recall@2": 75.0,
        "final_recall@1": 0.0,  # nothing re-ranks: the same
        "final_recall@2": 75.0,
        "recall_in_context": 50.0,
        "tokens": (15 + 15 + 25 + 25) / 4,  # 5 for the question, 10 a passage
    }
    assert evaluation.budget == 64
    score = evaluation.score("recall@2")
    assert (score.n, score.question_set, score.split, score.matcher) == (4, "toy", "dev", "has_answer string")
    assert 0 <= score.low <= score.value <= score.high <= 100


def test_recall_is_measured_only_as_deep_as_the_run_went() -> None:
    names = [score.name for score in scored(*run_of(["right"]), depths=(1, 2, 3)).scores]
    assert names == [
        "em", "f1", "recall@1", "recall@2", "final_recall@1", "final_recall@2", "recall_in_context", "tokens",
    ]  # fmt: skip


def test_reranked_runs_have_rerank_recall_and_closed_books_no_recall() -> None:
    names = [score.name for score in scored(*run_of(["it did not fit"])).scores]
    assert names == [
        "em",
        "f1",
        "recall@1",
        "recall@2",
        "rerank_recall@1",
        "rerank_recall@2",
        "final_recall@1",
        "final_recall@2",
        "recall_in_context",
        "tokens",
    ]
    assert [score.name for score in scored(*run_of(["closed book, right"])).scores] == ["em", "f1", "tokens"]


def test_an_abstention_counts_as_zero_and_stays_in_the_mean() -> None:
    evaluation = scored(*run_of(["abstained with it in view", "right"]))
    assert (evaluation.score("em").value, evaluation.score("em").n) == (50.0, 2)


def test_unanswerable_questions_count_for_em_and_leave_recall_with_a_smaller_n() -> None:
    traces, gold = run_of(["right", "abstained with it in view"])
    evaluation = scored(traces, [gold[0], Gold("q1", ())])
    assert (evaluation.score("em").value, evaluation.score("em").n) == (100.0, 2)
    assert (evaluation.score("recall_in_context").value, evaluation.score("recall_in_context").n) == (100.0, 1)


def test_patterns_have_no_f1_and_broken_ones_are_noted() -> None:
    traces, _ = run_of(["right", "it was there to read"])
    patterns = [Gold("q0", ("R.me",)), Gold("q1", ("(",))]
    evaluation = evaluate(traces, patterns, TEXTS.__getitem__, question_set="trec", split="test", matcher="regex")
    assert evaluation.score("em").matcher == "DrQA regex"
    assert "f1" not in {score.name for score in evaluation.scores}
    assert evaluation.notes == ("1 answer patterns do not compile and find nothing, as in DPR",)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            ["x0", "x1"],
            r"another question set: 0 ids in common; 2 questions of the run have no gold .*first: q0, q1.*; 2 gold",
        ),
        (["q0"], r"1 ids in common; 1 questions of the run have no gold record \(first: q1\)\."),
        (["q0", "q1", "q2"], r"2 ids in common; 1 gold questions are not in the run \(first: q2\)\."),
        (["q0", "q1", "q0"], r"'q0' are given more than once"),
        ([], "empty"),
    ],
)
def test_gold_of_another_question_set_is_one_clear_line(ids: list[str], message: str) -> None:
    traces, _ = run_of(["right", "right by heart"])
    with pytest.raises(DataError, match=message):
        scored(traces, [Gold(query_id, ("Rome",)) for query_id in ids])


def test_an_evaluation_comes_back_from_json_and_is_the_same_twice() -> None:
    traces, gold = run_of(list(CASES))
    text = json.dumps(scored(traces, gold).to_json(), allow_nan=False)
    assert text == json.dumps(scored(traces, gold).to_json())
    back = Evaluation.from_json(json.loads(text))
    assert json.dumps(back.to_json()) == text
    with pytest.raises(DataError, match="not scores of this version"):
        Evaluation.from_json({"em": 1})


def test_final_recall_is_that_of_the_ranking_that_is_packed_from() -> None:
    plain = scored(*run_of(["without a re-ranker it was too low"]))  # n0 y0
    reranked = scored(*run_of(["it did not fit"]))  # the same, re-ranked to y0 n0
    assert (plain.score("final_recall@1").value, plain.score("final_recall@2").value) == (0.0, 100.0)
    assert (reranked.score("recall@1").value, reranked.score("final_recall@1").value) == (0.0, 100.0)
    assert (plain.is_reranked, reranked.is_reranked) == (False, True)


@pytest.mark.parametrize("case", ["it did not fit", "without a re-ranker it was too low"])
def test_scores_of_the_first_version_get_their_final_rank_when_read(case: str) -> None:
    evaluation = scored(*run_of([case]))
    record = evaluation.to_json()
    for question in record["questions"]:
        del question["final_rank"]
    assert Evaluation.from_json(record).questions == evaluation.questions


# --- metrics as values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["em", "recall@20", "rerank_recall@5", "final_recall@1", "recall_in_context"])
def test_the_repr_of_a_metric_is_what_one_types(name: str) -> None:
    assert repr(Metric.parse(name)) == name


@pytest.mark.parametrize("name", ["recall", "recall@0", "recall@x", "em@5", "EM", "ndcg@10", ""])
def test_an_unknown_metric_is_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(DataError, match=r"is not a metric of odqa \(em, f1, recall@k, rerank_recall@k"):
        Metric.parse(name)


# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_bootstrap_interval_of_a_proportion_is_near_the_normal_one() -> None:
    # 400 zeros and ones, half each: standard error 50 / sqrt(400) = 2.5 points, so 50 +- 1.96 * 2.5 = 45.1 .. 54.9.
    # The ends of 5,000 resamples have a standard error of about 0.1; 0.5 also covers the steps of 0.25 points.
    interval = bootstrap_interval([0.0, 100.0] * 200, resamples=5000)
    assert interval.value == 50.0
    assert interval.low == pytest.approx(45.1, abs=0.5)
    assert interval.high == pytest.approx(54.9, abs=0.5)


def test_the_same_seed_gives_the_same_interval_and_blocks_do_not_matter() -> None:
    values = list(np.random.default_rng(1).random(50))
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)
    # 5,000 values: blocks of 800 resamples, and a last one that is not full
    big = bootstrap_interval([1.0] * 5000, resamples=1001)
    assert (big.low, big.high) == (1.0, 1.0)


def test_an_interval_of_nothing_is_an_error_and_of_one_value_a_point() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval([])
    assert bootstrap_interval([7.0]).low == bootstrap_interval([7.0]).high == 7.0


def test_pairing_removes_what_makes_questions_hard_for_both() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.random(200) * 100
    first, second = list(difficulty), list(difficulty + 1)
    interval = paired_difference(first, second)
    assert interval.low == pytest.approx(1.0) and interval.high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 2.0])


def test_compare_pairs_by_id_and_lists_the_questions_that_changed() -> None:
    first = scored(*run_of(["right", "it was there to read", "it was there to read"]))
    traces, gold = run_of(["right", "right", "it was there to read"])
    comparison = compare(first, scored(traces[::-1], gold))
    em = next(item for item in comparison.differences if item.name == "em")
    assert (em.first, em.second, em.delta.value, em.n) == pytest.approx((100 / 3, 200 / 3, 100 / 3, 3))
    assert not em.is_clear
    assert [(a.id, a.outcome, b.outcome) for a, b in comparison.changed] == [("q1", "misread", "correct")]
    with pytest.raises(DataError, match="1 questions are only in the first, 0 only in the second"):
        compare(first, scored(*run_of(["right", "right"])))


# --- expectations -----------------------------------------------------------------------------------------------------


def test_expectations_hold_within_their_tolerance_and_miss_beyond_it() -> None:
    evaluation = scored(*run_of(["right", "it was there to read", "it was there to read"]))  # em 33.333...
    near, edge, far = check_expectations(
        evaluation, [Expectation("em", 33.3, 0.1), Expectation("em", 34.3333, 1.0), Expectation("em", 40.0, 1.0)]
    )
    assert (near.ok, edge.ok, far.ok) == (True, True, False)
    with pytest.raises(DataError, match=r"recall@100 was not measured on toy dev \(measured: em, f1, recall@1"):
        check_expectations(evaluation, [Expectation("recall@100", 90.0, 0.3)])


@pytest.mark.parametrize(("bound", "ok"), [(33.3, True), (33.4, False), (-5.0, True)])
def test_a_lower_bound_may_be_exceeded_and_not_missed(bound: float, ok: bool) -> None:
    evaluation = scored(*run_of(["right", "it was there to read", "it was there to read"]))  # em 33.333...
    (check,) = check_expectations(evaluation, [Expectation("em", bound, 0.0, is_lower_bound=True)])
    assert check.ok is ok


def test_a_gain_pairs_two_systems_in_its_metrics_in_their_order() -> None:
    n = 30
    without = scored(*run_of(["without a re-ranker it was too low"] * n))
    reranked = scored(*run_of(["right, re-ranked"] * (n - 1) + ["it did not fit"]))
    gain = measure_gain("a", without, "b", reranked, metrics=("em", "final_recall@1", "final_recall@20"))
    assert [item.name for item in gain.differences] == ["em", "final_recall@1"]  # nothing went to depth 20
    em, recall = gain.differences
    # 29 of 30 questions became right, all 30 have the passage first now
    assert (em.delta.value, recall.delta.value, em.n) == (pytest.approx(100 * 29 / 30), 100.0, 30)
    assert gain.name == "a -> b" and gain.to_json()["differences"][1] == {
        "name": "final_recall@1", "from": 0.0, "to": 100.0, "value": 100.0, "low": 100.0, "high": 100.0, "n": 30,
    }  # fmt: skip
    with pytest.raises(DataError, match="a -> b on toy: f1 was not measured in both"):
        gain.check([Expectation("f1", 1.0, 0.0)])


def test_the_lower_bound_of_a_gain_asks_for_an_interval_above_zero_too() -> None:
    first = scored(*run_of(["it was there to read"] * 20))
    for right, is_clear in ((1, False), (19, True)):  # one of 20: some resamples miss it, and the interval touches 0
        second = scored(*run_of(["right"] * right + ["it was there to read"] * (20 - right)))
        gain = measure_gain("a", first, "b", second)
        bound = Expectation("em", 1.0, 0.0, is_lower_bound=True, must_be_clear=True)
        (strict,), (loose,) = gain.check([bound]), gain.check([Expectation("em", 1.0, 0.0, is_lower_bound=True)])
        assert (strict.ok, loose.ok) == (is_clear, True)


def test_final_recall_is_compared_unless_it_repeats_recall() -> None:
    plain, reranked = scored(*run_of(["right"])), scored(*run_of(["right, re-ranked"]))
    assert "final_recall@1" not in {item.name for item in compare(plain, plain).differences}
    assert "final_recall@1" in {item.name for item in compare(plain, reranked).differences}


def test_scoring_and_reporting_load_no_torch() -> None:
    code = "import sys, odqa.evaluate, odqa.report, odqa.runs; assert not {'torch', 'numpy', 'rich'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- answering or not -------------------------------------------------------------------------------------------------


def decisions(*pairs: tuple[float, bool]) -> list[Decision]:
    return [Decision(confidence, is_right=is_right) for confidence, is_right in pairs]


def test_risk_coverage_answers_the_surest_first_and_ties_together() -> None:
    """0.9 right; 0.5 right and wrong, tied; 0.1 wrong: risks 0/1, 1/3, 2/4 at coverage 1/4, 3/4, 1."""
    curve = risk_coverage(decisions((0.5, False), (0.9, True), (0.1, False), (0.5, True)))
    assert curve.thresholds == (0.9, 0.5, 0.1)
    assert curve.coverage == (0.25, 0.75, 1.0)
    assert curve.risk == pytest.approx((0.0, 1 / 3, 0.5))
    assert curve.area == pytest.approx((0.0 + 2 * (1 / 3) + 0.5) / 4)  # each question with the risk at its confidence


def test_auroc_counts_pairs_and_halves_of_ties() -> None:
    """Of the pairs (3,1) (3,2) (2,1) (2,2) three are in order and one is tied: 3.5 / 4."""
    assert auroc([3.0, 2.0], [1.0, 2.0]) == pytest.approx(0.875)
    assert auroc([1.0, 2.0], [3.0, 2.0]) == pytest.approx(0.125)


def test_auroc_is_that_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="the peer scikit-learn is not installed")
    generator = np.random.default_rng(4)
    scores, is_right = generator.integers(0, 40, 300) / 40, generator.random(300) < 0.4  # many ties
    assert auroc(scores[is_right], scores[~is_right]) == pytest.approx(metrics.roc_auc_score(is_right, scores))


def test_auroc_interval_holds_its_value_and_repeats_with_its_seed() -> None:
    generator = np.random.default_rng(5)
    right, wrong = generator.normal(1, 1, 80), generator.normal(0, 1, 60)
    interval = auroc_interval(right, wrong, resamples=300)
    assert 50 < interval.low < interval.value < interval.high < 100
    assert auroc_interval(right, wrong, resamples=300) == interval
    assert auroc_interval([2.0], [1.0], resamples=10).low == 100.0  # nothing else can be drawn


@pytest.mark.parametrize("sides", [([], [1.0]), ([1.0], [])])
def test_auroc_needs_both_kinds(sides: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="at least one positive and one negative"):
        auroc(*sides)


def test_calibration_error_is_over_bins_of_equal_mass() -> None:
    """Bins {0.1, 0.3} with one of two right and {0.8, 1.0} with both: |0.2 - 0.5| and |0.9 - 1.0|, each for half."""
    found = decisions((1.0, True), (0.3, True), (0.8, True), (0.1, False))
    assert calibration_error(found, bins=2) == pytest.approx(0.2)
    assert calibration_error(found, bins=50) == pytest.approx((0.1 + 0.7 + 0.2 + 0.0) / 4)  # a bin a decision


def test_a_threshold_keeps_at_least_the_share_of_right_answers() -> None:
    """Ten right answers at 0.1 to 1.0: nine are kept from 0.2 on; 0.95 needs all ten. Wrong ones have no say."""
    found = decisions(*((step / 10, True) for step in range(1, 11)), (0.05, False), (0.95, False))
    assert threshold_keeping(found, 0.9) == pytest.approx(0.2)
    assert threshold_keeping(found, 0.95) == pytest.approx(0.1)
    assert refused(found, 0.2) == [100.0] + [0.0] * 9 + [100.0, 0.0]  # 0.1 and 0.05; who has 0.2 is answered
    with pytest.raises(ValueError, match="no answer is right"):
        threshold_keeping(decisions((0.5, False)))


def test_a_withheld_answer_is_judged_by_its_best_candidate() -> None:
    context = a_pass(1, ["y0"], None, ["y0"])
    withheld = Answer("q", "", -0.1, (Candidate("", -0.1), Candidate("Rome", -2.0), Candidate("Bern", -3.0)), 1, 0.2)
    trace = Trace(Query("q", "?"), tuple(context[0]), (withheld,), (context[1],))
    question = judge(trace, ROME, TEXTS.__getitem__)
    assert not question.em and question.decision == Decision(0.2, is_right=True, is_answerable=True)
    unanswerable = judge(trace, Gold("q", ()), TEXTS.__getitem__)
    assert unanswerable.em and unanswerable.decision == Decision(0.2, is_right=False, is_answerable=False)
    uncalibrated = judge(a_trace(["Rome"], context), ROME, TEXTS.__getitem__)
    assert uncalibrated.confidence is None and uncalibrated.decision is None


def test_selective_scores_come_back_from_json_with_the_questions() -> None:
    def run(confidence: float | None) -> Evaluation:
        traces = []
        for name, text in (("a", "Rome"), ("b", "Bern")):
            context = a_pass(1, ["y0"], None, ["y0"])
            surer = None if confidence is None else confidence + 0.1 * (text == "Rome")
            answers = (Answer(name, text, -1.0, (Candidate(text, -1.0),), 1, surer),)
            traces.append(Trace(Query(name, "?"), tuple(context[0]), answers, (context[1],)))
        gold = [Gold("a", ("Rome",)), Gold("b", ())]
        return evaluate(traces, gold, TEXTS.__getitem__, question_set="toy", split="dev", resamples=20)

    evaluation = run(0.5)
    found = evaluation.selective
    assert found is not None and (found.n, found.answerable, found.right) == (2, 1, 1)
    assert found.auroc_right is not None and found.auroc_right.value == 100.0
    assert found.calibration_error == pytest.approx(100 * ((1 - 0.6) + 0.5) / 2)
    record = json.loads(json.dumps(evaluation.to_json()))
    assert record["selective"]["auroc_answerable"]["value"] == 100.0
    assert Evaluation.from_json(record).selective == found
    assert run(None).selective is None
    old = {
        **record,
        "questions": [
            {k: v for k, v in q.items() if "best" not in k and k != "confidence"} for q in record["questions"]
        ],
    }
    assert Evaluation.from_json(old).selective is None  # scores.json of the first version


def test_one_kind_of_question_has_no_separation() -> None:
    found = selective(decisions((0.2, True), (0.4, True)), resamples=10)
    assert found.auroc_right is None and found.auroc_answerable is None and found.aurc == 0.0


# --- several passes


def asked_again(answers: Sequence[str], notes: dict[str, object], query_id: str = "q") -> Trace:
    """A trace of closed-book passes, with one decision before the second."""
    passes = [a_pass(number, packed=[]) for number in range(1, len(answers) + 1)]
    trace = a_trace(answers, *passes, query_id=query_id)
    return replace(trace, steps=(*trace.steps, Step("recurse", 2, 0.1, 4, notes=notes)))


def test_each_later_pass_says_how_many_it_read_mended_and_undid() -> None:
    traces = [
        asked_again(["Bern", "Rome"], {}, "a"),
        asked_again(["Rome", "Bern", "Rome"], {}, "b"),
        asked_again(["Rome", "Rome"], {}, "c"),
        asked_again(["Bern"], {}, "d"),
    ]
    gold = [Gold(query_id, ("Rome",)) for query_id in "abcd"]
    found = evaluate(traces, gold, TEXTS.__getitem__, question_set="x", split="dev")
    assert {number: (one.read, one.mended, one.undone) for number, one in found.re_passes.items()} == {
        2: (3, 1, 1),
        3: (1, 1, 0),
    }
    again = Evaluation.from_json(json.loads(json.dumps(found.to_json())))
    assert again.re_passes == found.re_passes and again.questions == found.questions
    assert found.to_json()["re_passes"] == {
        "2": {"read": 3, "mended": 1, "undone": 1},
        "3": {"read": 1, "mended": 1, "undone": 0},
    }


def test_a_run_of_one_pass_has_no_word_of_later_ones() -> None:
    trace = a_trace(["Rome"], a_pass(1, packed=[]))
    record = evaluate([trace], [ROME], TEXTS.__getitem__, question_set="x", split="dev").to_json()
    assert "re_passes" not in record and "picks" not in record
    assert not {"right", "picks"} & set(record["questions"][0])


def test_choosing_among_the_samples_is_scored_beside_reading_them_again() -> None:
    drawn = {"picks": {"most frequent sample": "Bern"}, "candidates": [{"text": "Bern"}, {"text": "rome."}]}
    traces = [
        asked_again(["Bern", "Rome"], drawn, "a"),
        asked_again(["Rome"], {"why": "sure enough"}, "b"),  # not asked again: its first answer counts
        asked_again(["Bern", "Bern"], {**drawn, "candidates": [{"text": "Bern"}]}, "c"),
        asked_again(["Rome", "Rome"], {"picks": {"most frequent sample": "Rome"}, "candidates": []}, "d"),
    ]
    gold = [Gold(query_id, ("Rome",)) for query_id in "abcd"]
    found = evaluate(traces, gold, TEXTS.__getitem__, question_set="x", split="dev")
    # first: b, d; most frequent: b, d; among the samples: a, b (its answer); last: a, b, d
    assert found.picks == {
        "first pass": 50.0,
        "most frequent sample": 50.0,
        "oracle over the samples": 50.0,
        "last pass": 75.0,
    }
    assert Evaluation.from_json(json.loads(json.dumps(found.to_json()))).picks == found.picks


def test_what_was_fused_with_an_earlier_pass_came_to_the_packer_of_this_one() -> None:
    steps, context = a_pass(2, ["n0"], None, ["n1"])
    fused = [steps[0], Step("fuse", 2, 0.1, 4, ("n0", "n1", "y0")), *steps[1:]]
    trace = a_trace(["Bern", "Bern"], a_pass(1, ["n2"], None, ["n2"]), (fused, context))
    assert judge(trace, ROME, TEXTS.__getitem__).outcome == "not packed"
