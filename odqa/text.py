"""What counts as the same answer: SQuAD's string metrics and DPR's answer matching.

Three matchers, named in every report. `string`: NFD, the tokens of DrQA's SimpleTokenizer, lower case, contiguous.
`regex`: the answer is a pattern, searched in the passage (CuratedTREC). `characters`: as `string`, for scripts without
blanks between words, where DrQA's tokens are whole clauses and an answer inside of one is never found: NFKD (so that
full-width and half-width forms are the same), and each character of Han, Hiragana, Bopomofo, Thai, Lao, Khmer and
Myanmar is a token, with the marks above and below it. Katakana stays a run, as letters and digits do, because it
writes foreign names: "イン" is not in "インド". Simplified and traditional characters are different. A short answer may
be found inside of a longer word. Nothing here knows questions or ranks: strings in, a verdict out.

Sources: the SQuAD 1.1/2.0 evaluation scripts (Rajpurkar et al. 2016, 2018); DrQA (Chen et al. 2017); DPR's
`qa_validation` (Karpukhin et al. 2020); for F1 over characters, the MLQA evaluation script (Lewis et al. 2020), which
does so for Chinese.

Invariant: contiguous tokens are found by a substring search in the joined tokens. A token holds no blank and the joined
string puts one before and after each, so both searches agree.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal

import regex

Matcher = Literal["string", "regex", "characters"]

# DrQA's SimpleTokenizer: runs of letters, digits and marks; any other visible character alone.
_TOKEN = regex.compile(r"[\p{L}\p{N}\p{M}]+|[^\p{Z}\p{C}]", flags=regex.IGNORECASE | regex.UNICODE | regex.MULTILINE)
# The same, but for scripts without blanks: a character of theirs with its marks is a token. Their digits stay runs.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Bopomofo}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_CHARACTER = regex.compile(
    rf"(?V1)[[{_UNSPACED}]&&[\p{{L}}\p{{Nl}}]]\p{{M}}*|[[\p{{L}}\p{{N}}\p{{M}}]--[[{_UNSPACED}]&&[\p{{L}}\p{{Nl}}]]]+|[^\p{{Z}}\p{{C}}]"
)
_ASCII_TOKEN = re.compile(r"[A-Za-z0-9]+|[!-/:-@\[-`{-~]")  # the same tokens for ASCII text, 2.3 times as fast
_PATTERN_FLAGS = regex.IGNORECASE | regex.UNICODE | regex.MULTILINE  # DPR's for patterns as answers

_NO_TOKENS = "  "  # the `token_string` of a text without tokens

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation, without the words a, an, the, blanks squeezed. Source: SQuAD 1.1."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def normalize_characters(text: str) -> str:
    """The tokens of the matcher `characters`, less Unicode's and ASCII's punctuation, joined by blanks.

    Blanks between characters do not count, and no article is dropped: of which language would it be?
    """
    tokens = token_string(text, "characters").split()
    return " ".join(token for token in tokens if not _is_punctuation(token))


def _is_punctuation(token: str) -> bool:
    return len(token) == 1 and (token in string.punctuation or unicodedata.category(token)[0] == "P")


def _normalizer(matcher: Matcher) -> Callable[[str], str]:
    return normalize_characters if matcher == "characters" else normalize_answer


def exact_match(prediction: str, answers: Sequence[str], matcher: Matcher = "string") -> bool:
    """Whether the prediction is one of the answers.

    `string`: equal after `normalize_answer`, `characters` after `normalize_characters`. `regex`: a pattern matches from
    the first character of the prediction on (DrQA's rule for CuratedTREC). An empty prediction abstains: right if there
    are no answers, else wrong.
    """
    if not answers or not prediction:
        return not answers and not prediction
    if matcher == "regex":
        return any(pattern.match(prediction) for pattern in _patterns(tuple(answers)))
    normalize = _normalizer(matcher)
    normalized = normalize(prediction)
    return any(normalize(answer) == normalized for answer in answers)


def f1(prediction: str, answers: Sequence[str], matcher: Matcher = "string") -> float:
    """Best overlap with an answer, 0 to 1: harmonic mean of precision and recall on multisets of normalised words.

    With the matcher `characters` on characters, and on words where there are blanks. There is none for `regex`.

    An answer or prediction that has no words left after normalisation overlaps with its like alone (SQuAD 2.0's rule),
    so that an exact match always has an F1 of 1. An empty prediction abstains: 1.0 if there are no answers, else 0.0.
    """
    if not answers or not prediction:
        return float(not answers and not prediction)
    normalize = _normalizer(matcher)
    words = normalize(prediction).split()
    return max(_overlap(words, normalize(answer).split()) for answer in answers)


def has_answer(text: str, answers: Sequence[str], matcher: Matcher = "string") -> bool:
    """Whether a passage's text contains one of the answers, as DPR decides it.

    `string`: the answer's tokens stand side by side in the text, so "10" is not in "2010" and composed and decomposed
    accents are the same. `regex`: a pattern is found somewhere in the text; one that does not compile finds nothing, as
    in DPR (see `broken_patterns`: DPR decomposes patterns too, and that breaks three of CuratedTREC's).
    One deviation: an answer without tokens (blank, control characters) is found nowhere; DPR finds it in every passage.
    No question set we know has one. `characters`: as `string`, with the tokens that the module's head tells.
    """
    if matcher == "regex":
        decomposed = unicodedata.normalize("NFD", text)
        return any(pattern.search(decomposed) for pattern in _patterns(tuple(answers)))
    haystack = token_string(text, matcher)
    needles = (token_string(answer, matcher) for answer in answers)
    return any(needle in haystack for needle in needles if needle != _NO_TOKENS)


def answer_spans(text: str, answers: Sequence[str], matcher: Matcher = "string") -> list[tuple[int, int]]:
    """Every place where the tokens of an answer stand side by side: `text[start:end]`, sorted, each once, may overlap.

    Same matching as `has_answer` with this matcher: the list is empty exactly if that is False. Offsets count the
    characters of `text` as it is. Where only a part of a character matched (the "<" of a composed "≮"), the whole
    character is in the span. Of a pattern (matcher regex) the matches do not overlap; one that is empty is a span
    without characters.
    """
    if matcher == "regex":
        return _pattern_spans(text, answers)
    haystack = token_string(text, matcher)
    needles = {needle for answer in answers if (needle := token_string(answer, matcher)) != _NO_TOKENS}
    needles = {needle for needle in needles if needle in haystack}
    if not needles:
        return []
    tokens = _token_offsets(text, matcher)
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
def token_string(text: str, matcher: Matcher = "string") -> str:
    """The tokens joined by blanks, with one in front and one behind; two blanks for a text without tokens."""
    if matcher == "characters" and not text.isascii():
        return f" {' '.join(_CHARACTER.findall(unicodedata.normalize('NFKD', text)))} ".lower()
    # Lowering the joined string equals lowering each token: the only rule that looks around, the Greek final sigma,
    # stops at a blank.
    matches = _ASCII_TOKEN.findall(text) if text.isascii() else _TOKEN.findall(unicodedata.normalize("NFD", text))
    return f" {' '.join(matches)} ".lower()


def broken_patterns(answers: Sequence[str]) -> list[str]:
    """The answers that the regex matcher cannot compile, and therefore never finds."""
    return [answer for answer in answers if _compile(answer) is None]


def _token_offsets(text: str, matcher: Matcher) -> list[tuple[int, int]]:
    """Start and end of each token of `token_string`, in characters of the text before its decomposition."""
    form: Literal["NFD", "NFKD"] = "NFKD" if matcher == "characters" else "NFD"
    pattern = _CHARACTER if matcher == "characters" else _TOKEN
    if unicodedata.is_normalized(form, text):
        return [match.span() for match in pattern.finditer(text)]
    # owner[j] is the character of the text that gave character j of its decomposition. Canonical reordering moves marks
    # only within a run of marks, and such a run lies in one token: the owners of a token's characters stay the same.
    owner = [i for i, character in enumerate(text) for _ in unicodedata.normalize(form, character)]
    matches = pattern.finditer(unicodedata.normalize(form, text))
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
