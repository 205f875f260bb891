"""Passages: where the cuts are, what a word is, and that no word is lost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odqa.corpus.split import Cut, count_words, split_article, split_into_windows


def numbered(count: int) -> str:
    return " ".join(f"w{number}" for number in range(count))


def sizes(text: str, words: int = 100) -> list[int]:
    return [count_words(passage) for passage in split_article(text, words=words)]


def test_passages_are_consecutive_disjoint_blocks_of_100_words() -> None:
    text = numbered(350)
    passages = split_article(text)
    assert sizes(text) == [100, 100, 100, 50]
    assert passages[1].split()[0] == "w100"
    assert " ".join(passages) == text


@pytest.mark.parametrize(
    ("total", "expected"),
    [
        (1, [1]),  # a short article is one short passage
        (100, [100]),
        (101, [51, 50]),  # a tail of 1 shares with the block before it
        (124, [62, 62]),  # a tail of 24 as well
        (125, [100, 25]),  # a tail of a quarter stays
        (210, [100, 55, 55]),
    ],
)
def test_a_small_tail_shares_evenly_with_the_block_before_it(total: int, expected: list[int]) -> None:
    assert sizes(numbered(total)) == expected


@pytest.mark.parametrize("text", ["", " ", "\n\n\t "])
def test_an_empty_article_has_no_passages(text: str) -> None:
    assert split_article(text) == []


def test_line_ends_and_runs_of_blanks_become_one_blank() -> None:
    assert split_article("One  line.\n\nAnother\tline.\n") == ["One line. Another line."]


def test_a_passage_of_no_words_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one word, not 0"):
        split_article("text", words=0)


def test_a_chinese_paragraph_is_cut_every_200_characters() -> None:
    # Two characters a word, 100 words a passage; 450 characters are 225 words, the tail of 25 is a quarter.
    passages = split_article("漢字" * 225)
    assert [len(passage) for passage in passages] == [200, 200, 50]
    assert "".join(passages) == "漢字" * 225


def test_a_thai_paragraph_is_cut_between_letters_and_not_before_their_marks() -> None:
    # "ที่" is one letter with two marks above it: three code points, and four such letters are a word.
    passages = split_article("ที่" * 800, words=100)
    assert [len(passage) for passage in passages] == [1200, 1200]
    assert all(passage[0] == "ท" for passage in passages)


def test_punctuation_stays_with_the_chinese_word_before_it() -> None:
    assert count_words("漢字。漢字、漢字") == 3
    assert not any(passage.startswith("。") for passage in split_article("漢字。" * 300, words=7))


def test_a_chinese_name_in_english_text_is_not_cut() -> None:
    # "(中華人民共和國)," counts as five words ("(" and four of two characters), so it moves to the next passage whole.
    text = f"{numbered(97)} (中華人民共和國), {numbered(60)}"
    passages = split_article(text)
    assert passages[1].startswith("(中華人民共和國), w0")
    assert " ".join(passages) == text


def test_a_million_characters_are_split_without_loss() -> None:
    for text in ("word " * 200_000, "字" * 1_000_000, "x" * 1_000_000):
        passages = split_article(text)
        assert sum(len(passage.replace(" ", "")) for passage in passages) == len(text.replace(" ", ""))


@given(text=st.text(alphabet="ab .,(\n\u00a0漢字。ひかなไทยี่ᄀ𠀀", max_size=400), words=st.integers(1, 12))
def test_no_word_is_lost_repeated_or_moved(text: str, words: int) -> None:
    passages = split_article(text, words=words)
    assert "".join("".join(passages).split()) == "".join(text.split())
    assert all(1 <= count_words(passage) <= words for passage in passages)


@given(text=st.text(alphabet="ab .,é\n", max_size=400), words=st.integers(1, 12))
def test_text_with_blanks_is_cut_at_blanks_only(text: str, words: int) -> None:
    assert " ".join(split_article(text, words=words)).split() == text.split()


# ---------------------------------------------------------------- windows of sentences


def sentences(count: int) -> list[str]:
    return [f"Sentence number {number}." for number in range(count)]


def windows_of_pyserini(found: list[str], size: int, stride: int) -> list[str]:
    """The loop of Pyserini's segmentation scripts: stop behind the first window that reaches the end."""
    segments = []
    for start in range(0, len(found), stride):
        segments.append(" ".join(found[start : start + size]))
        if start + size >= len(found):
            break
    return segments


@pytest.mark.parametrize(("size", "stride"), [(6, 3), (8, 4), (1, 1), (3, 2)])
@pytest.mark.parametrize("count", [*range(15), 100])
def test_windows_are_those_of_pyserini(count: int, size: int, stride: int) -> None:
    found = sentences(count)
    expected = windows_of_pyserini(found, size, stride)
    assert split_into_windows(" ".join(found), sentences=size, stride=stride) == expected


def test_a_line_of_the_article_ends_a_sentence_and_titles_count_as_one() -> None:
    text = "Early life.\nBorn in  Ulm,\tGermany\n一。二。"
    assert split_into_windows(text, sentences=2, stride=2) == ["Early life. Born in Ulm, Germany", "一。 二。"]


def test_a_window_that_moves_by_nothing_or_by_too_much_is_refused() -> None:
    for stride in (0, 7):
        with pytest.raises(ValueError, match=f"a window of 6 sentences cannot move by {stride}"):
            split_into_windows("A.", sentences=6, stride=stride)


def test_a_cut_is_words_or_windows() -> None:
    text = " ".join(sentences(9))
    assert Cut(words=10)(text) == split_article(text, words=10)
    assert Cut(sentences=6, stride=3)(text) == split_into_windows(text, sentences=6, stride=3)
