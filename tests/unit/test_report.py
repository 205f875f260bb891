"""odqa.report: what a person reads, checked as whole lines."""

import math
from dataclasses import replace

import pytest

from odqa.evaluate import Evaluation, Expectation, check_expectations, compare, evaluate, judge, measure_gain
from odqa.report import (
    Published,
    Table,
    changed_tables,
    check_table,
    comparison_table,
    confidence,
    evidence,
    explain_question,
    mark,
    render,
    stage_table,
)
from odqa.types import Answer, Candidate, Dropped, Gold, Hit, PackedContext, Passage, Query, Step, Trace

TEXTS = {"p1": "Rome is the capital of Italy; Rome is old.", "p2": "Bern is in Switzerland.", "p3": "Rome has hills."}
MEASURED = {
    "stages": {
        "retrieve": {"seconds": 0.5, "steps": 2, "questions": 2},
        "read": {"seconds": 0.0, "steps": 2, "questions": 2},
    },
    "peak_memory_bytes": 512 * 2**20,
    "device": "cpu",
}


def a_trace(query_id: str = "q1", text: str = "Rome", packed: tuple[str, ...] = ("p1", "p2")) -> Trace:
    query = Query(query_id, "what is the capital of italy?")
    titles = {"p1": "Italy", "p2": "", "p3": "Hills"}
    hits = tuple(Hit(Passage(pid, TEXTS[pid], titles[pid]), 2.5, "bm25") for pid in packed)
    return Trace(
        query,
        steps=(
            Step("retrieve", 1, 0.125, 4, ("p2", "p1", "p3"), (3.0, 2.5, 1.0)),
            Step("pack", 1, 0.001, 4, packed, (2.5,) * len(packed), (40,) * len(packed), {"kept": len(packed)}),
            Step("read", 1, 0.5, 4),
        ),
        answers=(Answer(query_id, text, -0.25, (Candidate(text, -0.25, "p1", 0, 4), Candidate("Bern", -3.0))),),
        contexts=(PackedContext(query, "", hits, 95, 128, (Dropped("p3", "over the limit", 50),)),),
    )


def an_evaluation(*texts: str) -> Evaluation:
    traces = [a_trace(f"q{i}", text) for i, text in enumerate(texts)]
    gold = [Gold(trace.query.id, ("Rome",)) for trace in traces]
    return evaluate(
        traces,
        gold,
        TEXTS.__getitem__,
        question_set="toy",
        split="dev",
        depths=(1, 2),
        resamples=200,
        measured=MEASURED,
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_is_aligned_as_text_and_escaped_as_markdown() -> None:
    table = Table(
        "T", ("name", "value", "who"), (("a|b", "1.0", "x"), ("c", "10.0", "yy")), frozenset({"who"}), ("note",)
    )
    assert table.text().splitlines() == [
        "T",
        "name  value  who",
        "----  -----  ---",
        "a|b     1.0  x",
        "c      10.0  yy",
        "note",
    ]
    assert table.markdown().splitlines() == [
        "**T**",
        "",
        "| name | value | who |",
        "| --- | ---: | --- |",
        "| a\\|b | 1.0 | x |",
        "| c | 10.0 | yy |",
        "",
        "note",
    ]


def test_the_report_prints_every_number_with_its_n_matcher_and_interval_and_em_beside_its_budget() -> None:
    report = render([("bm25", an_evaluation("Rome", "Rome"))])
    lines = [" ".join(line.split()) for line in report.splitlines()]
    assert lines[0] == "toy dev"
    em = lines.index("em 100.0 [100.0, 100.0] % 2 SQuAD normalisation")
    assert lines[em + 1] == "budget 128 tokens/pass"
    assert "recall@1 0.0 [0.0, 0.0] % 2 has_answer string" in lines
    assert "recall_in_context 100.0 [100.0, 100.0] % 2 has_answer string" in lines
    assert "tokens 95.0 [95.0, 95.0] tokens 2" in lines
    assert "[95% interval: bootstrap over questions, 200 resamples, seed 0]" in lines


def test_the_report_shows_the_funnel_the_times_and_the_memory() -> None:
    report = render([("bm25", an_evaluation("Rome", "Bern"))])
    lines = [" ".join(line.split()) for line in report.splitlines()]
    assert "toy dev: where was the answer lost?" in lines
    assert "misread 1 (50.0%)" in lines and "correct 1 (50.0%)" in lines and "all 2 (100.0%)" in lines
    assert "bm25 retrieve 0.50 2 4.0" in lines  # 2 questions in half a second
    assert "bm25 read 0.00 2 -" in lines  # no time measured is no rate
    assert "bm25: peak memory 512 MiB, device cpu" in lines


def test_systems_on_one_question_set_stand_side_by_side() -> None:
    report = render([("one", an_evaluation("Rome", "Bern")), ("two", an_evaluation("Rome", "Rome"))], style="markdown")
    assert "| metric | one | two | unit | n | matcher |" in report
    assert "| correct | 1 (50.0%) | 2 (100.0%) |" in report


def test_expectations_stand_beside_what_was_found() -> None:
    evaluation = an_evaluation("Rome", "Bern")
    checks = check_expectations(evaluation, [Expectation("em", 50.2, 0.5), Expectation("recall@2", 92.0, 0.3)])
    rows = check_table([("bm25", check) for check in checks]).rows
    assert rows[0] == ("bm25", "toy dev", "em", "50.2", "0.5", "50.0", "yes")
    assert rows[1] == ("bm25", "toy dev", "recall@2", "92.0", "0.3", "100.0", "NO")


def test_many_systems_stand_one_below_the_other() -> None:
    systems = [(f"s{number}", an_evaluation("Rome", "Bern")) for number in range(7)]
    lines = [" ".join(line.split()) for line in render(systems).splitlines()]
    assert lines[1].startswith("metric em budget f1 recall@1")
    assert sum(line.startswith("s3 50.0 [0.0, 100.0] 128 ") for line in lines) == 1
    assert any(line.startswith("unit % tokens/pass %") for line in lines)
    assert any(line.startswith("outcome not retrieved reranked away") for line in lines)
    assert any(line.startswith("s6 0 (0.0%)") and line.endswith("2 (100.0%)") for line in lines)


def test_recall_after_a_reranker_is_printed_once_and_beside_systems_without_one() -> None:
    steps = (Step("retrieve", 1, 0.1, 1, ("p2", "p1")), Step("rerank", 1, 0.1, 1, ("p1", "p2")))
    reranked = [Trace(trace.query, steps, trace.answers, trace.contexts) for trace in (a_trace("q0"),)]
    gold = [Gold("q0", ("Rome",))]
    second = evaluate(reranked, gold, TEXTS.__getitem__, question_set="toy", split="dev", depths=(1,), resamples=20)
    alone = render([("one", an_evaluation("Rome"))])
    both = [" ".join(line.split()) for line in render([("one", an_evaluation("Rome")), ("two", second)]).splitlines()]
    assert "final_recall" not in alone  # it would repeat recall
    assert "final_recall@1 0.0 [0.0, 0.0] 100.0 [100.0, 100.0] % 1 has_answer string" in both
    assert not any(line.startswith("rerank_recall") for line in both)


def test_a_stage_that_did_not_run_is_shared_and_has_no_rate() -> None:
    stages = {
        "retrieve": {"seconds": 0.0, "steps": 4, "questions": 4, "shared": 4},
        "rerank": {"seconds": 2.0, "steps": 4, "questions": 4, "shared": 3},
        "read": {"seconds": 8.0, "steps": 4, "questions": 4},
    }
    measured = {"stages": stages, "ranking_from": "../../other/toy"}
    table = stage_table("toy", [("one", replace(an_evaluation("Rome"), measured=measured))])
    assert table.rows == (
        ("one", "retrieve", "shared", "4", "-"),
        ("one", "rerank", "2.00", "1", "0.5"),  # what was computed, over those questions alone
        ("one", "rerank", "shared", "3", "-"),
        ("one", "read", "8.00", "4", "0.5"),
    )
    assert table.notes == ("one: ranking taken from the run ../../other/toy",)


def test_the_times_say_what_a_reader_behind_a_server_cost_and_where_a_retrieval_is_from() -> None:
    spent = {"requests": 1200, "from_cache": 4, "retries": 0, "prompt_tokens": 90000, "completion_tokens": 7}
    measured = {"stages": {}, "retrieval_from": "../other", "reader": spent}
    table = stage_table("toy", [("one", replace(an_evaluation("Rome"), measured=measured))])
    assert table.notes == (
        "one: retrieval taken from the run ../other",
        "one: the reader's server: 1,200 requests, 4 from cache, 0 retries, 90,000 prompt tokens, 7 completion tokens",
    )


def test_gains_are_a_row_a_pair_and_marked_where_they_leave_zero_out() -> None:
    first, second = an_evaluation(*["Bern"] * 20), an_evaluation(*["Rome"] * 20)
    gains = [measure_gain("a", first, "b", second, metrics=("recall_in_context", "em"))]
    lines = [" ".join(line.split()) for line in render([("a", first), ("b", second)], gains=gains).splitlines()]
    at = lines.index("toy dev: gains")
    assert lines[at + 1] == "from to recall_in_context em n"
    assert lines[at + 3] == "a b +0.0 [+0.0, +0.0] +100.0 [+100.0, +100.0] * 20"


def test_the_bound_of_a_gain_stands_beside_its_interval() -> None:
    gain = measure_gain("a", an_evaluation(*["Bern"] * 20), "b", an_evaluation(*["Rome"] * 20), metrics=("em",))
    checks = gain.check([Expectation("em", 4.0, 0.0, is_lower_bound=True, must_be_clear=True)])
    (row,) = check_table([(gain.name, check) for check in checks]).rows
    assert row == ("a -> b", "toy dev", "em", "at least 4.0", "-", "100.0 [100.0, 100.0]", "yes")


def test_published_figures_are_marked_as_not_run() -> None:
    figure = Published("J1 frozen, DPR", "em", 46.6, "arXiv 2204.10019, table 2")
    text = render([("one", an_evaluation("Rome"))], published=[figure])
    lines = text[text.index("published, not run") :].splitlines()
    assert " ".join(lines[-1].split()) == "J1 frozen, DPR em 46.6 arXiv 2204.10019, table 2"


def test_a_comparison_shows_the_paired_difference_and_what_changed() -> None:
    comparison = compare(an_evaluation("Bern", "Rome"), an_evaluation("Rome", "Rome"))
    em = comparison_table("a", "b", comparison).rows[0]
    assert em[:3] == ("em", "50.0", "100.0") and em[3].startswith("+50.0 [") and em[5] == "no"
    assert comparison_table("a", "b", comparison).notes[1] == (
        "1 questions changed: 1 became right, 0 became wrong, 0 ended elsewhere"
    )
    (changed,) = changed_tables("a", "b", comparison)
    assert changed.title == "1 questions became right"
    assert changed.rows == (("q0", "Rome", "Bern: misread", "Rome: correct"),)


def test_changed_questions_are_told_both_ways_with_their_words() -> None:
    comparison = compare(an_evaluation("Bern", "Rome", "Bern"), an_evaluation("Rome", "Bern", "Zug"))
    tables = changed_tables("a", "b", comparison, {"q0": "capital?", "q1": "city?"})
    assert [table.title for table in tables] == ["1 questions became right", "1 questions became wrong"]
    assert tables[0].rows == (("q0", "capital?", "Rome", "Bern: misread", "Rome: correct"),)
    assert tables[1].rows == (("q1", "city?", "Rome", "Rome: correct", "Bern: misread"),)
    assert comparison.moved == []  # q2 is misread in both, though another word was said


# --- one question -----------------------------------------------------------------------------------------------------


def test_evidence_says_in_which_window_a_passage_was_read() -> None:
    trace = a_trace()
    trace = replace(trace, contexts=(replace(trace.contexts[0], windows=(1, 2)),))
    lines = evidence(trace).splitlines()
    assert "packed 2 passages in 2 windows, 95 of 128 tokens" in lines
    assert "1. Italy  [p1, bm25 2.5, 40 tokens, window 1]" in lines


def test_evidence_marks_the_answer_in_the_packed_passages_and_ends_with_the_times() -> None:
    text = evidence(a_trace())
    lines = text.splitlines()
    assert lines[0] == "Rome  (confidence 0.78, uncalibrated)"  # exp(-0.25) = 0.7788
    assert "packed 2 passages, 95 of 128 tokens" in lines
    assert "1. Italy  [p1, bm25 2.5, 40 tokens]" in lines
    assert "   [[Rome]] is the capital of Italy; [[Rome]] is old." in lines
    assert "2. (no title)  [p2, bm25 2.5, 40 tokens]" in lines
    assert "dropped: p3 (over the limit, 50 tokens)" in lines
    assert lines[-1].split() == ["all", "0.6260"]  # 0.125 + 0.001 + 0.5


def test_evidence_is_bold_on_a_terminal_and_a_passage_cannot_drive_it() -> None:
    query = Query("q", "?")
    hit = Hit(Passage("p", "\x1b[2JRome \ue000is old", "a\x07b"), 1.0, "x")
    trace = Trace(query, (), (Answer("q", "Rome", -1.0),), (PackedContext(query, "", (hit,), 9, 9),))
    text = evidence(trace, terminal=True)
    # the escape became a blank; "2JRome" is one token, so nothing is marked in it
    assert "\x1b" not in text and "\x07" not in text and "\ue000" not in text
    assert "\x1b[1mRome\x1b[0m is the capital" in evidence(a_trace(), terminal=True)


def test_an_abstention_and_a_closed_book_are_shown_as_such() -> None:
    trace = Trace(Query("q", "?"), (Step("read", 1, math.nan, 0),), (Answer("q", "", -1.0),))
    lines = evidence(trace).splitlines()
    assert lines[0].startswith("(abstained)")
    assert lines[-2].split() == ["read", "1", "-", "-", "-"]


def test_explain_lists_each_stage_with_ids_scores_tokens_and_notes() -> None:
    text = explain_question(a_trace(), depth=2)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "question q1: what is the capital of italy?"
    assert "retrieve: 0.1250 s, 3 passages" in lines
    assert "1 3.0000 p2" in lines and "2 2.5000 p1 Italy" in lines and "and 1 more" in lines
    assert "pack: 0.0010 s, 2 passages, 80 tokens" in lines
    assert "1 2.5000 p1 40 tokens Italy" in lines
    assert "kept: 2" in lines
    assert "answer: Rome (confidence 0.78, uncalibrated)" in lines
    assert "outcome" not in text and "*" not in text  # nothing is judged without gold


def test_explain_says_with_gold_where_the_answer_was_lost() -> None:
    trace = a_trace(text="Bern", packed=("p2",))
    gold = Gold("q1", ("Rome",))
    text = explain_question(trace, gold, text_of=TEXTS.__getitem__)
    assert "gold: Rome\noutcome: not packed" in text
    assert "2 *     2.5000  p1" in text
    without_index = explain_question(trace, gold)
    assert "outcome: not retrieved, reranked away or not packed (the index is needed to tell which)" in without_index
    row = judge(trace, gold, TEXTS.__getitem__)
    assert "gold: Rome\noutcome: not packed" in explain_question(trace, result=row)
    assert "outcome: misread" in explain_question(a_trace(text="Bern"), gold)
    assert "gold: (none: abstaining is right)\noutcome: misread" in explain_question(trace, Gold("q1", ()))


def test_each_pass_is_explained_with_its_own_answer() -> None:
    query = Query("q", "?")
    steps = (Step("read", 1, 0.1, 1), Step("read", 2, 0.1, 1))
    text = explain_question(Trace(query, steps, (Answer("q", "first", -1.0), Answer("q", "second", -2.0))))
    assert text.index("pass 1") < text.index("answer: first") < text.index("pass 2") < text.index("answer: second")


@pytest.mark.parametrize(
    ("spans", "marked"),
    [
        ([(0, 2)], "[[ab]]cdef"),
        ([(4, 6), (0, 1)], "[[a]]bcd[[ef]]"),
        ([(0, 3), (2, 4)], "[[abcd]]ef"),
        ([(0, 2), (2, 3)], "[[abc]]def"),
        ([], "abcdef"),
    ],
)
def test_overlapping_marks_become_one(spans: list[tuple[int, int]], marked: str) -> None:
    assert mark("abcdef", spans) == marked


def test_confidence_is_the_calibrated_one_where_there_is_one() -> None:
    assert confidence(Answer("q", "x", -0.25, confidence=0.5)) == "confidence 0.50"


def test_the_report_judges_confidence_only_where_all_questions_have_one() -> None:
    """q0 is right with 0.9, q1 wrong with 0.3: told apart perfectly; the curve has risk 0 at half, 1/2 at all."""
    traces = [a_trace("q0", "Rome"), a_trace("q1", "Bern")]
    sure = [replace(t, answers=(replace(t.answer, confidence=c),)) for t, c in zip(traces, (0.9, 0.3), strict=True)]
    gold = [Gold(trace.query.id, ("Rome",)) for trace in traces]

    def report(run: list[Trace]) -> str:
        item = evaluate(run, gold, TEXTS.__getitem__, question_set="toy", split="dev", resamples=20)
        return render([("one", item)])

    rows = [line.split("  ") for line in report(sure).splitlines()]
    assert ["AUROC, right against wrong answers", "100.0 [100.0, 100.0]"] in [[row[0], row[-1].strip()] for row in rows]
    assert ["area under the risk-coverage curve", "25.0"] in [[row[0], row[-1].strip()] for row in rows]
    assert "confidence right" not in report([sure[0], traces[1]])


def test_confidence_is_a_probability_only_where_the_score_is_a_log_probability() -> None:
    assert confidence(Answer("q", "x", 0.0)) == "confidence 1.00, uncalibrated"
    assert confidence(Answer("q", "x", 7.5)) == "score 7.5"
    assert confidence(Answer("q", "x", -math.inf)) == "score -inf"
