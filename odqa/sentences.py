"""Where sentences end in English prose such as Wikipedia's: rules, no model, the standard library only.

A full stop, question or exclamation mark ends a sentence if a blank follows, and then something that is no lower-case
letter. After abbreviations it does not ("Dr. No"), or only if the next word often begins a sentence ("in the U.S. The
Senate" against "the U.S. Senate"). The word lists are our choice, made on Wikipedia text. The idea, and the two kinds
of abbreviation, are those of Kiss & Strunk 2006 (Punkt), which learns its lists instead.

Limits: a sentence that begins with a lower-case letter ("iPod sales fell.") stays with the one before; line ends count
as blanks; by default, scripts that put no blank between sentences are one sentence.

For those scripts there are two further rules, on request (`scripts="any"`). The marks of Chinese and Japanese, and
those of India, Burma and Cambodia, end a sentence whatever follows, with the brackets that close behind them. Thai and
Lao have no such mark, and set off sentences and longer clauses by a blank: there, a blank between two letters of these
scripts ends a sentence, if what it ends has at least 20 letters (ours: shorter ones are names and numbers).

The invariant: the spans are in order, do not overlap, and leave nothing but blanks out.
"""

import re
from typing import Literal

# The mark itself, then what closes with it: quotation marks, brackets, footnotes such as [12] or [citation needed].
_END = re.compile(r"[.!?…]+(?:[\"'”’»)\]}]|\[[^\[\]]{1,30}\])*(?=\s)")
_OPENERS = "\"'“‘«([{`¿¡"
_WORD_BEFORE = re.compile(r"[^\W\d_](?:[^\W_]|\.(?=[^\W_]))*$")  # "Dr", "U.S", "J", up to the full stop
_WORD_AFTER = re.compile(r"[^\W_]+")
_DOTTED = re.compile(r"(?:[^\W\d_]{1,2}\.)+[^\W\d_]{1,2}")  # U.S, e.g, Ph.D


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# A name, a number or a word of the same sentence follows these: their full stop ends no sentence.
_BEFORE_NAMES = _words(
    "dr mr mrs ms messrs prof gen maj col lt cpl capt cmdr sgt adm gov sen rep rev hon pres supt mt ft st ste fr "
    "vol vols pp op ed eds trans lit ca c cf vs v approx est fl b d r "
    "jan feb mar apr jun jul aug sept sep oct nov dec"
)
# These stand inside of a sentence or end it; so do initials and dotted abbreviations. The next word decides.
_ANYWHERE = _words("jr sr esq inc ltd co corp bros dept univ assn etc al ave blvd rd no nos p ch fig figs sec min max")
# Words that begin a sentence far more often than a name.
_BEGINNINGS = _words(
    "the he she it they we his her its their this that these those there in on at by from for with after before during "
    "since until when while as although though however but and if an no not some many most other both such who what "
    "where why how one two three according also among because despite each early following further later"
)


_FULL_WIDTH_END = re.compile(r"[。！？｡։।॥။។]+[」』）】〉》”’\"')\]]*")
_UNMARKED_END = re.compile(r"(?<=[\u0e00-\u0eff])\s+(?=[\u0e00-\u0eff])")
_SHORTEST_UNMARKED = 20  # letters


def sentence_spans(text: str, *, scripts: Literal["spaced", "any"] = "spaced") -> list[tuple[int, int]]:
    """Start and end of each sentence, in characters: `text[start:end]` has no blanks around it. Blank text: none.

    `scripts`: whether the rules for scripts without blanks between sentences apply as well.
    """
    spans = _spaced_spans(text)
    if scripts == "spaced" or text.isascii():
        return spans
    return [part for start, end in spans for part in _cut_unspaced(text, start, end)]


def _cut_unspaced(text: str, start: int, end: int) -> list[tuple[int, int]]:
    """Cut a span further, where scripts without blanks end sentences."""
    ends = sorted(
        [(mark.end(), mark.end(), 0) for mark in _FULL_WIDTH_END.finditer(text, start, end)]
        + [(mark.start(), mark.end(), _SHORTEST_UNMARKED) for mark in _UNMARKED_END.finditer(text, start, end)]
    )
    spans = []
    for stop, following, shortest in ends:
        if stop - start >= max(1, shortest):
            spans.append((start, stop))
            start = _skip_blanks(text, following)
    return [*spans, (start, end)] if start < end else spans


def _spaced_spans(text: str) -> list[tuple[int, int]]:
    spans = []
    start = _skip_blanks(text, 0)
    for mark in _END.finditer(text):
        following = _skip_blanks(text, mark.end())
        if following < len(text) and _ends_here(text, mark.start(), following):
            spans.append((start, mark.end()))
            start = following
    end = len(text.rstrip())
    return [*spans, (start, end)] if start < end else spans


def split_sentences(text: str, *, scripts: Literal["spaced", "any"] = "spaced") -> list[str]:
    """The sentences of a text, without the blanks between them."""
    return [text[start:end] for start, end in sentence_spans(text, scripts=scripts)]


def _ends_here(text: str, mark: int, following: int) -> bool:
    """Whether the mark at `mark` ends a sentence, if the next text begins at `following`."""
    opened = following
    while opened < len(text) - 1 and text[opened] in _OPENERS:
        opened += 1
    if text[opened].islower():
        return False
    if text[mark] != "." or text[mark : mark + 2] in ("..", ".!", ".?"):
        return True
    word = _WORD_BEFORE.search(text, max(0, mark - 30), mark)  # 30: longer than any abbreviation
    if word is None:  # a number, a bracket, or a mark that stands alone as in tokenised text
        return True
    before = word.group()
    is_initial = len(before) == 1 and before.isupper()
    if before.lower() in _BEFORE_NAMES and not is_initial:
        return False
    if is_initial or before.lower() in _ANYWHERE or _DOTTED.fullmatch(before):
        after = _WORD_AFTER.match(text, opened)
        return after is not None and after.group().lower() in _BEGINNINGS
    return True


def _skip_blanks(text: str, start: int) -> int:
    while start < len(text) and text[start].isspace():
        start += 1
    return start
