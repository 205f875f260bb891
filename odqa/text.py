"""What counts as the same answer: SQuAD's string metrics and DPR's answer matching.

Two matchers, named in every report. `string`: NFD, the tokens of DrQA's SimpleTokenizer, lower case, contiguous.
`regex`: the answer is a pattern, searched in the passage (CuratedTREC). Nothing here knows questions or ranks: strings
in, a verdict out.

Sources: the SQuAD 1.1/2.0 evaluation scripts (Rajpurkar et al. 2016, 2018); DrQA (Chen et al. 2017); DPR's
`qa_validation` (Karpukhin et al. 2020).

Invariant: contiguous tokens are found by a substring search in the joined tokens. A token holds no blank and the joined
string puts one before and after each, so both searches agree.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import regex

Matcher = Literal["string", "regex"]

# DrQA's SimpleTokenizer: runs of letters, digits and marks; any other visible character alone.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", flags=regex.IGNORECASE | regex.UNICODE | regex.MULTILINE)
_ASCII_TOKEN = re.compile(r"[A-Za-z0-9]+|[!-/:-@\[-`{-~]")  # the same tokens for ASCII text, 2.3 times as fast
_PATTERN_FLAGS = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE  # DPR's for patterns as answers

_NO_TOKENS = "  "  # the `token_string` of a text without tokens

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without the words a, an, the, blanks squeezed. Source: SQuAD 1.1."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str], matcher: Matcher = "string") -> bool:
    """Whether the prediction is one of the answers.

    `string`: equal after `normalize_answer`. `regex`: a pattern matches from the first character of the prediction on
    (DrQA's rule for CuratedTREC). An empty prediction abstains: right if there are no answers, else wrong.
    """
    if not answers or not prediction:
        return not answers and not prediction
    if matcher == "regex":
        return any(pattern.match(prediction) for pattern in _patterns(tuple(answers)))
    normalized = normalize_answer(prediction)
    return any(normalize_answer(answer) == normalized for answer in answers)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best overlap with an answer, 0 to 1: harmonic mean of precision and recall on multisets of normalised words.

    An answer or prediction that has no words left after normalisation overlaps with its like alone (SQuAD 2.0's rule),
    so that an exact match always has an F1 of 1. An empty prediction abstains: 1.0 if there are no answers, else 0.0.
    """
    if not answers or not prediction:
        return float(not answers and not prediction)
    words = normalize_answer(prediction).split()
    return max(_overlap(words, normalize_answer(answer).split()) for answer in answers)


def has_answer(text: str, answers: Sequence[str], matcher: Matcher = "string") -> bool:
    """Whether a passage's text contains one of the answers, as DPR decides it.

    `string`: the answer's tokens stand side by side in the text, so "10" is not in "2010" and composed and decomposed
    accents are the same. `regex`: a pattern is found somewhere in the text; one that does not compile finds nothing, as
    in DPR (see `broken_patterns`: DPR decomposes patterns too, and that breaks three of CuratedTREC's).
    One deviation: an answer without tokens (blank, control characters) is found nowhere; DPR finds it in every passage.
    No question set we know has one.
    """
    if matcher == "regex":
        decomposed = unicodedata.normalize("NFD", text)
        return any(pattern.search(decomposed) for pattern in _patterns(tuple(answers)))
    haystack = token_string(text)
    return any(needle in haystack for needle in map(token_string, answers) if needle != _NO_TOKENS)


def answer_spans(text: str, answers: Sequence[str], matcher: Matcher = "string") -> list[tuple[int, int]]:
    """Every place where the tokens of an answer stand side by side: `text[start:end]`, sorted, each once, may overlap.

    Same matching as `has_answer`: the list is empty exactly if that is False. Offsets count the characters of `text` as
    it is. Where only a part of a character matched (the "<" of a composed "≮"), the whole character is in the span. Of
    a pattern (matcher regex) the matches do not overlap; one that is empty is a span without characters.
    """
    if matcher == "regex":
        return _pattern_spans(text, answers)
    haystack = token_string(text)
    needles = {needle for needle in map(token_string, answers) if needle != _NO_TOKENS and needle in haystack}
    if not needles:
        return []
    tokens = _token_offsets(text)
    found = set()
    for needle in needles:
        width = needle.count(" ") - 1  # tokens in the needle: one blank before each, and a last one
        at = haystack.find(needle)
        while at >= 0:
            first = haystack.count(" ", 0, at)
            found.add((tokens[first][0], tokens[first + width - 1][1]))
            at = haystack.find(needle, at + 1)
    return sorted(found)


def _pattern_spans(text: str, answers: Sequence[str]) -> list[tuple[int, int]]:
    decomposed = unicodedata.normalize("NFD", text)
    owner = [i for i, character in enumerate(text) for _ in unicodedata.normalize("NFD", character)]
    owner.append(len(text))
    spans = (match.span() for pattern in _patterns(tuple(answers)) for match in pattern.finditer(decomposed))
    return sorted({(owner[start], owner[end - 1] + 1 if end > start else owner[start]) for start, end in spans})


def tokenize(text: str) -> list[str]:
    """The tokens of DrQA's SimpleTokenizer over the NFD form of the text, in lower case."""
    return token_string(text).split()


@lru_cache(maxsize=1 << 14)  # 16,384 passages of 100 words and their keys: about 25 MB
def token_string(text: str) -> str:
    """The tokens joined by blanks, with one in front and one behind; two blanks for a text without tokens."""
    # Lowering the joined string equals lowering each token: the only rule that looks around, the Greek final sigma,
    # stops at a blank.
    matches = _ASCII_TOKEN.findall(text) if text.isascii() else _TOKEN.findall(unicodedata.normalize("NFD", text))
    return f" {' '.join(matches)} ".lower()


def broken_patterns(answers: Sequence[str]) -> list[str]:
    """The answers that the regex matcher cannot compile, and therefore never finds."""
    return [answer for answer in answers if _compile(answer) is None]


def _token_offsets(text: str) -> list[tuple[int, int]]:
    """Start and end of each token of `token_string(text)`, in characters of the text before its decomposition."""
    if unicodedata.is_normalized("NFD", text):
        return [match.span() for match in _TOKEN.finditer(text)]
    # owner[j] is the character of the text that gave character j of its NFD form. Canonical reordering moves marks only
    # within a run of marks, and such a run lies in one token: the owners of a token's characters stay the same.
    owner = [i for i, character in enumerate(text) for _ in unicodedata.normalize("NFD", character)]
    matches = _TOKEN.finditer(unicodedata.normalize("NFD", text))
    return [(owner[match.start()], owner[match.end() - 1] + 1) for match in matches]


def _overlap(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    common = (Counter(prediction) & Counter(answer)).total()
    return 2 * common / (len(prediction) + len(answer))


@lru_cache(maxsize=1 << 12)
def _patterns(answers: tuple[str, ...]) -> list["regex.Pattern[str]"]:
    return [pattern for pattern in map(_compile, answers) if pattern is not None]


def _compile(answer: str) -> "regex.Pattern[str] | None":
    try:
        return regex.compile(unicodedata.normalize("NFD", answer), flags=_PATTERN_FLAGS)
    except regex.error:
        return None


def as_written(text: str, passages: Sequence[str]) -> str:
    """The text as the first of the passages that has it writes it; the text itself if none does.

    Case, accents and blanks do not count: a model with an uncased vocabulary writes "beyonce" and "1 , 000" where the
    passage has "Beyoncé" and "1,000". What is found begins and ends where words do.
    """
    wanted = "".join(_folded(text)[0])
    if not wanted:
        return text
    for passage in passages:
        letters, places = _folded(passage)
        folded = "".join(letters)
        at = folded.find(wanted)
        while at >= 0:
            start, end = places[at], places[at + len(wanted) - 1] + 1
            if not (_inside_word(passage, start) or _inside_word(passage, end)):
                return passage[start:end]
            at = folded.find(wanted, at + 1)
    return text


def _folded(text: str) -> tuple[list[str], list[int]]:
    """Its letters in lower case, without accents and blanks, and where each stands in the text."""
    letters, places = [], []
    for place, character in enumerate(text):
        for letter in unicodedata.normalize("NFD", character).lower():
            if not letter.isspace() and unicodedata.category(letter) != "Mn":
                letters.append(letter)
                places.append(place)
    return letters, places


def _inside_word(text: str, at: int) -> bool:
    return 0 < at < len(text) and text[at - 1].isalnum() and text[at].isalnum()
