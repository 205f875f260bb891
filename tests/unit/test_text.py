"""odqa.text against slow, plain readings of the same definitions, and against the traps that other tools fell into."""

import csv
import gzip
import json
import os
import unicodedata
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from odqa.text import (
    answer_spans,
    as_written,
    broken_patterns,
    exact_match,
    f1,
    has_answer,
    normalize_answer,
    token_string,
    tokenize,
)

# --- an independent reading of DPR's definition: token lists, compared position by position ---------------------------


def slow_tokens(text: str) -> list[str]:
    pattern = regex.compile(
        r"([\p{L}\p{N}\p{M}]+)|([^\p{Z}\p{C}])", flags=regex.IGNORECASE + regex.UNICODE + regex.MULTILINE
    )
    return [match.group().lower() for match in pattern.finditer(unicodedata.normalize("NFD", text))]


def slow_has_answer(text: str, answers: list[str]) -> bool:
    words = slow_tokens(text)
    wanted = [slow_tokens(answer) for answer in answers]
    return any(words[i : i + len(w)] == w for w in wanted if w for i in range(len(words) - len(w) + 1))


# Letters that lower, compose, decompose and reorder in odd ways, marks, punctuation, blanks and control characters.
ODD = (
    "aAbBe10 .,'\"-$<\t\n\u00a0\u200b\u00ad\u00e9\u0301\u0327\u0323\u226e\u0338\u0345"
    "\u0130\u03a3\u03c3\u03c2\u1e9e\ufb01\uac00\u00bd\U0001f600"
)
texts = st.text(alphabet=ODD, max_size=30) | st.text(max_size=30)


@st.composite
def text_and_answers(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, pieces of it, and strangers."""
    text = draw(texts)
    cuts = st.tuples(st.integers(0, len(text)), st.integers(0, len(text))).map(sorted)
    pieces = draw(st.lists(cuts.map(lambda cut: text[cut[0] : cut[1]]), max_size=3))
    return text, pieces + draw(st.lists(texts, max_size=2))


@given(text_and_answers())
@settings(max_examples=500, deadline=None)
def test_has_answer_equals_a_plain_reading_of_dpr(case: tuple[str, list[str]]) -> None:
    text, answers = case
    assert has_answer(text, answers) == slow_has_answer(text, answers)


@given(text_and_answers())
@settings(max_examples=500, deadline=None)
def test_answer_spans_are_empty_exactly_if_has_answer_is_false(case: tuple[str, list[str]]) -> None:
    text, answers = case
    assert bool(answer_spans(text, answers)) == has_answer(text, answers)


@given(text_and_answers())
@settings(max_examples=500, deadline=None)
def test_every_span_of_the_original_text_contains_the_answer_again(case: tuple[str, list[str]]) -> None:
    text, answers = case
    spans = answer_spans(text, answers)
    assert spans == sorted(set(spans))
    for start, end in spans:
        assert 0 <= start < end <= len(text)
        assert slow_has_answer(text[start:end], answers)


@given(texts)
@settings(max_examples=300, deadline=None)
def test_ascii_shortcut_and_joined_lowering_give_drqas_tokens(text: str) -> None:
    assert tokenize(text) == slow_tokens(text)


def test_every_ascii_character_has_the_same_tokens_in_both_tokenizers() -> None:
    for code in range(128):
        text = f"a{chr(code)}b"
        assert tokenize(text) == slow_tokens(text), repr(text)


# --- has_answer: the known traps --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("It happened in 2010.", "10", False),  # tokens, not characters
        ("It took 10, not 20.", "10", True),
        ("New York City", "york city", True),
        ("New York, City", "york city", False),  # the comma is a token of its own
        ("the U.S. Army", "U.S.", True),
        ("the US Army", "U.S.", False),
        ("Beyonce\u0301 sang", "Beyonc\u00e9", True),  # decomposed and composed are the same
        ("Beyonce sang", "Beyonc\u00e9", False),  # but accents count
        ("It cost $5 (!)", "!", True),  # punctuation alone is a token
        ("It cost 5", "$", False),
        ("STRASSE", "stra\u00dfe", False),  # lower case is not case folding
        ("anything", "", False),  # here DPR says True
        ("anything", " \t\u200b", False),
        ("", "x", False),
    ],
)
def test_has_answer_matches_whole_tokens_only(text: str, answer: str, found: bool) -> None:
    assert has_answer(text, [answer]) is found


def test_has_answer_needs_one_of_the_answers_and_finds_nothing_without_any() -> None:
    assert has_answer("it was blue", ["red", "blue"])
    assert not has_answer("it was blue", [])


def test_regex_answers_are_searched_without_case_anywhere_in_the_text() -> None:
    assert has_answer("born in the year 1984 in Ulm", [r"19\d\d"], "regex")
    assert has_answer("in Rome", ["paris|ROME"], "regex")
    assert not has_answer("born in 1784", [r"19\d\d"], "regex")


def test_a_pattern_that_does_not_compile_finds_nothing_and_is_named() -> None:
    assert not has_answer("anything (", ["("], "regex")
    assert has_answer("anything", ["(", "thing"], "regex")
    # CuratedTREC has "Sultan K\\ösen": decomposed as DPR does it, "\\o" is no escape.
    assert broken_patterns(["(", "thing", "Sultan K\\\u00f6sen"]) == ["(", "Sultan K\\\u00f6sen"]


# --- answer_spans -----------------------------------------------------------------------------------------------------


def test_answer_spans_count_the_characters_of_the_text_as_it_is() -> None:
    text = "Beyonce\u0301 met BEYONC\u00c9."
    assert answer_spans(text, ["beyonc\u00e9"]) == [(0, 8), (13, 20)]


def test_answer_spans_of_all_answers_are_sorted_and_may_overlap() -> None:
    text = "New York, New York"
    assert answer_spans(text, ["York", "new york", "York, New"]) == [(0, 8), (4, 8), (4, 13), (10, 18), (14, 18)]


def test_answer_spans_finds_overlapping_occurrences_of_one_answer() -> None:
    assert answer_spans("a a a", ["a a"]) == [(0, 3), (2, 5)]


def test_a_composed_character_that_matched_in_part_is_in_the_span_as_a_whole() -> None:
    assert answer_spans("x \u226e y", ["<"]) == [(2, 3)]  # NFD: "<" and a mark, two tokens


def test_token_string_of_a_text_without_tokens_is_in_no_other() -> None:
    assert token_string("\u200b ") == "  "
    assert "  " not in token_string("a b . c")


# --- real data --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("ODQA_DATA" not in os.environ, reason="needs nq-mini: set ODQA_DATA to the folder that holds it")
def test_every_gold_passage_of_nq_mini_holds_an_answer() -> None:
    """Its README counts them with another implementation: every NQ question's passages hold an answer."""
    folder = Path(os.environ["ODQA_DATA"]) / "nq-mini"
    names = ("nq_train", "nq_tune", "nq_dev")
    questions = [
        json.loads(line)
        for name in names
        for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    wanted = {str(pid) for question in questions for pid in question["positive_ids"]}
    with gzip.open(folder / "psgs.tsv.gz", "rt", encoding="utf-8", newline="") as file:
        texts = {pid: text for pid, text, _ in csv.reader(file, delimiter="\t") if pid in wanted}
    assert len(questions) == 1449 + 162 + 376
    for question in questions:
        for pid in map(str, question["positive_ids"]):
            assert has_answer(texts[pid], question["answers"]), question["id"]
            assert slow_has_answer(texts[pid], question["answers"]), question["id"]


# --- SQuAD's metrics --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The  Beatles!", "beatles"),
        ("an apple a day", "apple day"),
        ("theatre", "theatre"),  # articles are words
        ("U.S.A.", "usa"),  # punctuation goes without leaving a blank
        ("the-the", "thethe"),  # punctuation goes first, so no article is left to drop
        ("\u201cquoted\u201d", "\u201cquoted\u201d"),  # only ASCII punctuation is dropped
        ("a", ""),
    ],
)
def test_normalize_answer_follows_squads_order(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


def test_exact_match_takes_the_best_answer() -> None:
    assert exact_match("the Beatles.", ["Rolling Stones", "Beatles"])
    assert not exact_match("Beatles band", ["Beatles"])


def test_only_abstaining_is_right_without_answers_and_never_right_with_them() -> None:
    assert exact_match("", []) and f1("", []) == 1.0
    assert not exact_match("Rome", []) and f1("Rome", []) == 0.0
    assert not exact_match("", ["the"]) and f1("", ["the"]) == 0.0


def test_exact_match_against_patterns_starts_at_the_first_character() -> None:
    assert exact_match("1984, in May", [r"19\d\d"], "regex")
    assert not exact_match("in 1984", [r"19\d\d"], "regex")


def test_f1_counts_words_as_often_as_they_occur() -> None:
    # {new, york, york} and {york, york, city} share york twice: precision 2/3, recall 2/3. On sets it would be 1/2.
    assert f1("New York York", ["York York City"]) == pytest.approx(2 / 3)
    # {x, x, x} and {x}: precision 1/3, recall 1. On sets it would be 1.
    assert f1("x x x", ["x"]) == pytest.approx(0.5)


@given(st.text(alphabet="ab the.", max_size=12), st.lists(st.text(alphabet="ab the.", max_size=12), max_size=3))
def test_an_exact_match_has_an_f1_of_one_and_f1_stays_in_range(prediction: str, answers: list[str]) -> None:
    score = f1(prediction, answers)
    assert 0.0 <= score <= 1.0
    assert exact_match(prediction, answers) == (score == 1.0) or _is_reordered(prediction, answers)


def _is_reordered(prediction: str, answers: list[str]) -> bool:
    """F1 ignores order: "b a" against "a b" is 1.0 without being an exact match."""
    words = sorted(normalize_answer(prediction).split())
    return any(sorted(normalize_answer(answer).split()) == words for answer in answers)


# --- as the passage writes it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "passage", "written"),
    [
        ("beyonce", "In 2003 Beyoncé sang.", "Beyoncé"),
        ("1 , 000", "There were 1,000 of them.", "1,000"),
        ("u . s .", "the U.S. of old", "U.S."),
        ("sao paulo", "in S\u00e3o\nPaulo", "S\u00e3o\nPaulo"),
        ("sao paulo", "in Sa\u0303o Paulo", "Sa\u0303o Paulo"),  # decomposed
        ("istanbul", "\u0130stanbul", "\u0130stanbul"),  # its lower case is an i and a mark
        ("rock ' n ' roll", "Rock 'n' roll!", "Rock 'n' roll"),
        ("10", "In 2010, 10 came.", "10"),
        ("Paris", "nothing of it", "Paris"),
        ("", "text", ""),
        ("paris", "", "paris"),
        ("\u0301", "text", "\u0301"),  # nothing but a mark
    ],
)
def test_a_text_is_written_as_the_passage_writes_it(text: str, passage: str, written: str) -> None:
    assert as_written(text, [passage]) == written


def test_the_first_passage_that_has_a_text_writes_it() -> None:
    assert as_written("new york", ["Old York", "NEW YORK", "New York"]) == "NEW YORK"
    assert as_written("new york", []) == "new york"


def test_a_text_inside_of_a_word_is_not_that_text() -> None:
    assert as_written("art", ["Partisan ARTS and Art"]) == "Art"
    assert as_written("art", ["Partisan"]) == "art"


@given(st.text(), st.text(min_size=1), st.text())
def test_what_is_written_is_in_the_passage_or_the_text_itself(before: str, text: str, after: str) -> None:
    passage = f"{before} {text} {after}"
    written = as_written(text, [passage])
    assert written in passage
    assert as_written(written, [passage]) == written


def test_spans_of_a_pattern_are_those_of_the_text_as_it_is() -> None:
    text = "Heyrovsk\u00fd was born in 1890 and won in 1959."
    found = answer_spans(text, [r"1\d\d\d", "Heyrovsk[y\u00fd]", "("], "regex")
    assert [text[start:end] for start, end in found] == ["Heyrovsk\u00fd", "1890", "1959"]
    assert answer_spans(text, ["Prague"], "regex") == []


# --- scripts without blanks: the matcher `characters` -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("首都は東京です", "東京", True),  # no blank marks the word
        ("首都は東京です", "京都", False),
        ("東京タワー", "タワー", True),  # a run of Katakana ends where Han begins
        ("インドの首都", "イン", False),  # but is not cut
        ("在2010年", "10", False),  # nor are digits
        ("在２０１０年", "2010", True),  # full width
        ("ｶﾞﾗｽの靴", "ガラス", True),  # half width, with its mark
        ("กรุงเทพมหานครเป็นเมืองหลวง", "กรุงเทพ", True),
        ("ที่นี่", "ท", False),  # a letter with its marks is one
        ("พ.ศ. ๒๕๖๐", "๒๕", False),  # digits of Thai are digits
        ("北京，上海", "北京上海", False),  # punctuation counts, as DrQA's does
        ("國家", "国家", False),  # traditional and simplified are not the same
        ("It took 10, not 20.", "10", True),  # elsewhere as DrQA
        ("in 2010", "10", False),
        ("", "東", False),
        ("東", "", False),
    ],
)
def test_characters_are_matched_one_by_one_where_no_blanks_part_words(text: str, answer: str, found: bool) -> None:
    assert has_answer(text, [answer], "characters") is found
    assert bool(answer_spans(text, [answer], "characters")) is found


def test_the_default_matcher_stays_dprs() -> None:
    assert not has_answer("首都は東京です", ["東京"])
    assert token_string("首都は 東京に") == " 首都は 東京に "


@given(text_and_answers())
@settings(max_examples=200, deadline=None)
def test_characters_equal_drqas_tokens_where_there_are_no_such_characters(case: tuple[str, list[str]]) -> None:
    # The alphabet has letters that NFKD changes and NFD does not; both sides go through NFKD first.
    text, answers = (unicodedata.normalize("NFKD", case[0]), [unicodedata.normalize("NFKD", a) for a in case[1]])
    if not regex.search(r"[\p{Han}\p{Hiragana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]", text):
        assert has_answer(text, answers, "characters") == has_answer(text, answers)


@pytest.mark.parametrize(
    ("prediction", "answer", "exact", "overlap"),
    [
        ("「東京」。", "東 京", True, 1.0),
        ("東京都", "東京", False, 0.8),  # precision 2/3, recall 1
        ("Ｔokyo", "tokyo!", True, 1.0),
        ("the 東京", "東京", False, 0.8),  # articles are of some language; they stay
        ("กรุงเทพ", "ภู", False, 0.0),
        ("、。", "、。", True, 1.0),  # nothing is left of both
    ],
)
def test_exact_match_and_f1_over_characters(prediction: str, answer: str, exact: bool, overlap: float) -> None:
    assert exact_match(prediction, [answer], "characters") is exact
    assert f1(prediction, [answer], "characters") == pytest.approx(overlap)


def mlqa_tokens(text: str) -> list[str]:
    """MLQA's `mixed_segmentation` after its normalisation, for Chinese: mlqa_evaluation_v1.py, in other words."""
    kept = "".join(c for c in text.lower() if unicodedata.category(c)[0] != "P" and c not in "$+<=>^`|~")
    return regex.findall(r"[\u4e00-\u9fa5]|[^\s\u4e00-\u9fa5]+", kept)


@pytest.mark.parametrize(
    ("prediction", "answer"), [("中国北京市", "北京"), ("约2010年3月", "2010年"), ("ABC公司", "abc 公司")]
)
def test_f1_of_chinese_is_mlqas(prediction: str, answer: str) -> None:
    words, wanted = mlqa_tokens(prediction), mlqa_tokens(answer)
    common = sum(min(words.count(word), wanted.count(word)) for word in set(words))
    assert f1(prediction, [answer], "characters") == pytest.approx(2 * common / (len(words) + len(wanted)))
