"""Where sentences end: Wikipedia's traps, and the invariant on any text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odqa.sentences import sentence_spans, split_sentences


@pytest.mark.parametrize(
    "marked",
    [
        "He left.|She stayed!|Why?|Nobody knows.",
        "Dr. No met Mr. J. R. R. Tolkien.|They spoke.",
        "George W. Bush won in 2000.|He governed until 2009.",
        "The film cost 1.5 million.|It earned 3.7 million.",
        "He moved to the U.S. Senate in 1999.|There he stayed.",
        "He moved to the U.S.|The Senate was next.",
        "He holds a Ph.D. from M.I.T. and teaches.|His wife does not.",
        "Martin Luther King Jr. was born in Atlanta.",
        "It was built by Smith & Co.|The roof is of lead.",
        "Born on Jan. 5, 1900, he died c. 1950.|His son followed.",
        'He said "No."|She said "Yes."|Both left.',
        "The coast is long (see map).|Few live there.",
        "It was an assassination.[12][citation needed]|Nobody was tried.",
        "She likes chlorophyll a.|Plants need it.",
        "Who Wants to Be a Millionaire? was a show.|It ran for years.",
        "Then came ... silence.|In 1990 it ended.",
        "He was born in Rome .|He died in Paris .",
        "The answer is no.|The question was long.",
        "See No. 5 and Fig. 2 for this.|Both are new.",
        "Größe zählt.|Ärger auch.",
        "It opened in 1912.|45 people came.",
        "part of a sentence that began before.|This one is whole.|This one ends in the",
    ],
)
def test_sentences_end_where_a_reader_ends_them(marked: str) -> None:
    expected = marked.split("|")
    assert split_sentences(marked.replace("|", " ")) == expected


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_blank_text_has_no_sentence(text: str) -> None:
    assert sentence_spans(text) == []


def test_blanks_around_and_between_sentences_belong_to_none() -> None:
    assert sentence_spans("  One.\n\n Two. ") == [(2, 6), (9, 13)]


@given(
    st.text() | st.lists(st.sampled_from(["U.S.", "Dr.", "He", "a", "B.", "no.", '"', ")", "...", "?"])).map(" ".join)
)
def test_spans_are_in_order_and_leave_only_blanks_out(text: str) -> None:
    spans = sentence_spans(text)
    at = 0
    for start, end in spans:
        assert at <= start < end
        assert not text[at:start].strip()
        assert text[start:end] == text[start:end].strip()
        at = end
    assert not text[at:].strip()


@pytest.mark.parametrize(
    "marked",
    [
        "東京は日本の首都である。|人口は約1400万人！？|「はい。」|と彼は言った。",
        "他說：「你好！」|然後離開了。|他們在2010年到達",
        "သူသွားသည်။|သူပြန်လာသည်။",
        # Thai sets off sentences and long clauses by a blank; what comes before has 20 letters or more.
        "กรุงเทพมหานครเป็นเมืองหลวง|ของประเทศไทยและเป็นศูนย์กลาง",
        "จังหวัด เชียงใหม่",  # shorter: a name
    ],
)
def test_scripts_without_blanks_have_rules_of_their_own_on_request(marked: str) -> None:
    expected = marked.split("|")
    joined = marked.replace("|", " " if "ก" <= marked[0] <= "๛" else "")
    assert split_sentences(joined, scripts="any") == expected


@given(st.text() | st.lists(st.sampled_from(["東", "。", "！」", " ", "A. ", "ก" * 25, "?", "\n"])).map("".join))
def test_further_rules_only_cut_further_and_lose_nothing(text: str) -> None:
    further = sentence_spans(text, scripts="any")
    assert "".join("".join(text[start:end] for start, end in further).split()) == "".join(text.split())
    ends = {end for _, end in further}
    assert ends >= {end for _, end in sentence_spans(text)}
