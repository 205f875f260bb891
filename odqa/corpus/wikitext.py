"""Wikitext to clean running text: what a reader of the article's body sees, without what stands beside it.

Kept: paragraphs, quotations, list items (each closed with a full stop), the words of text-carrying templates
(`odqa.corpus.templates`), short formulas. Left out: references, tables, boxes, galleries, file and category links,
comments, and whatever broken markup leaves behind. Only if asked for: section titles, where text follows them, and the
lines of infoboxes, each as "Birth date: 12 March 1950." and closed with a full stop like the items of lists.

This is a cleaner, not a parser: a fixed row of passes over the text, each linear in its length, in an order in which
every pass relies on the ones before it. It knows nothing of dumps, other pages or template definitions.

The invariant: no input raises, and broken markup costs at most the broken construct, not the rest of the article.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from html import unescape

from odqa.corpus import templates


@dataclass(frozen=True, slots=True)
class Namespaces:
    """The namespace names of one wiki that decide what a link shows; lower case, with their translations."""

    #: Links into these show nothing in the text: files and categories.
    silent: frozenset[str] = frozenset(("file", "image", "category", "media"))
    #: Names of all namespaces; `[[:Category:Plants]]` is shown without them.
    known: frozenset[str] = frozenset(("file", "image", "category", "media", "template", "help", "portal", "wikipedia"))

    @classmethod
    def of(cls, *, silent: Iterable[str], known: Iterable[str]) -> "Namespaces":
        """Add a wiki's own names to the English ones, which every MediaWiki understands as well."""
        hidden = frozenset(name.lower().replace("_", " ") for name in silent if name)
        every = frozenset(name.lower().replace("_", " ") for name in known if name)
        return cls(cls().silent | hidden, cls().known | hidden | every)


ENGLISH = Namespaces()


def clean(
    wikitext: str,
    *,
    namespaces: Namespaces = ENGLISH,
    keep_headings: bool = False,
    keep_infoboxes: bool = False,
) -> str:
    """Turn the wikitext of one article into plain text, one paragraph or list item a line, "" if nothing remains.

    `keep_headings`: section titles are lines too, "Early life.", if text follows before the next title of their level
    or above. `keep_infoboxes`: see `odqa.corpus.templates.render`.

    The order of the steps matters: each one may assume that the markup of the earlier ones is gone.
    """
    text = wikitext.replace("\r\n", "\n")
    # 1. Elements whose content is no text (references, comments, galleries, ...) or is not wikitext (nowiki, math).
    text = _drop_elements(text)
    # 2. Templates, innermost first. Some say words, some open or close the tables of step 3.
    text = _expand_templates(text, keep_infoboxes=keep_infoboxes)
    # 3. Tables.
    text = _drop_tables(text)
    # 4. Links. Captions of files hold links themselves, so plain links go first and the files around them last.
    text = _resolve_links(text, namespaces)
    # 5. HTML tags and entities: only now, since "&#91;" must not become a link's bracket earlier.
    text = _drop_tags(text)
    # 6. Lines: section titles, list bullets, quote marks, table debris.
    text = "\n".join(_clean_lines(text, keep_headings=keep_headings))
    # 7. Brackets that opened or closed nothing, and the holes that steps 1 to 5 left: "(; born 1950)", " ,".
    text = _mend(_STRAY.sub("", text))
    # 8. Give nowiki text its characters back.
    return text.translate(_REVEALED) if "nowiki" in wikitext else text


_STRAY = re.compile(r"\{\{+|\}\}+|\[\[+|\]\]+")


# ---------------------------------------------------------------- 1. elements

_DROPPED = "ref|references|gallery|timeline|score|hiero|imagemap|graph|mapframe|maplink|syntaxhighlight|source|pre"
_DROPPED += "|templatedata|templatestyles|inputbox|categorytree|includeonly|indicator"
# One regex finds every opening, so that whichever comes first wins: a comment inside a <ref>, a <ref> inside a comment.
# Elements that the page hides by style (sort keys) count as openings too.
_OPENING = re.compile(
    rf"<(?:!--|(?P<tag>{_DROPPED}|math|chem|ce|nowiki)\b[^<>]*>"
    r"|(?P<hidden>span|div)\b[^<>]*?display\s*:\s*none[^<>]*>)",
    re.IGNORECASE,
)
_CLOSING = {
    tag: re.compile(rf"</{tag}\s*>", re.IGNORECASE)
    for tag in (*_DROPPED.split("|"), "math", "chem", "ce", "nowiki", "span", "div")
}
_CLOSING["!--"] = re.compile("-->")
# References do not nest: a second opening before the closing means that the first one was never closed.
_CLOSING["ref"] = re.compile(r"</ref\s*>|<ref\b", re.IGNORECASE)

# Markup characters move to a private block of Unicode while they are inside <nowiki>, and return in the last step.
_HIDDEN = {ord(character): 0xE000 + ord(character) for character in "[]{}|<>'=*#:;!&_-"}
_REVEALED = {hidden: character for character, hidden in _HIDDEN.items()}


def _drop_elements(text: str) -> str:
    """Remove comments and elements that carry no text, with their content; convert formulas; shield nowiki.

    An element that is never closed loses its tag only.
    """
    if "<" not in text:
        return text
    pieces: list[str] = []
    position = 0
    unclosed: set[str] = set()  # so that a page full of unclosed tags is not searched to its end for each of them
    while opening := _OPENING.search(text, position):
        pieces.append(text[position : opening.start()])
        position = opening.end()
        tag = (opening["tag"] or opening["hidden"] or "!--").lower()
        if tag in unclosed or text[position - 2] == "/":
            continue
        closing = _CLOSING[tag].search(text, position)
        if closing is None:
            unclosed.add(tag)
        elif tag == "!--" or closing[0][1] == "/":
            inner = text[position : closing.start()]
            if tag == "nowiki":
                pieces.append(inner.translate(_HIDDEN))
            elif tag in ("math", "chem", "ce"):
                pieces.append(_plain_formula(inner))
            position = closing.end()
    pieces.append(text[position:])
    return "".join(pieces)


# TeX that plain text can show. What needs layout (fractions, roots, sums, matrices) leaves a backslash behind and is
# given up as a whole: half a formula is worse than none.
_TEX_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|textstyle|limits)(?![a-z])|\\[,;:! ]|\\(?=%)|~")
_TEX_FONT = re.compile(r"\\(?:math(?:rm|bf|it|sf|cal|bb|frak)|text(?:rm|bf|it)?|operatorname|mbox|rm|bold|ce)\b\s*")
_TEX_SYMBOL = re.compile(r"\\([A-Za-z]+)")
_TEX_SYMBOLS_TABLE = """
    alpha:α beta:β gamma:γ delta:δ epsilon:ε varepsilon:ε zeta:ζ eta:η theta:θ iota:ι kappa:κ lambda:λ mu:μ nu:ν
    xi:ξ pi:π rho:ρ sigma:σ tau:τ upsilon:υ phi:φ varphi:φ chi:χ psi:ψ omega:ω Gamma:Γ Delta:Δ Theta:Θ Lambda:Λ Xi:Ξ
    Pi:Π Sigma:Σ Phi:Φ Psi:Ψ Omega:Ω times:× cdot:· pm:± mp:∓ le:≤ leq:≤ ge:≥ geq:≥ ne:≠ neq:≠ approx:≈ equiv:≡
    sim:~ infty:∞ to:→ rightarrow:→ leftarrow:← Rightarrow:⇒ rightleftharpoons:⇌ in:∈ notin:∉ subset:⊂ cup:∪ cap:∩
    forall:∀ exists:∃ neg:¬ land:∧ lor:∨ wedge:∧ vee:∨ circ:∘ prime:′ partial:∂ nabla:∇ ldots:… dots:… cdots:…
    hbar:ħ ell:ℓ star:⋆ ast:∗ mid:| lt:< gt:> langle:⟨ rangle:⟩ log:log ln:ln sin:sin cos:cos tan:tan exp:exp
    max:max min:min lim:lim deg:deg
"""
_TEX_SYMBOLS = dict(pair.split(":") for pair in _TEX_SYMBOLS_TABLE.split())
_TEX_GROUP = re.compile(r"\{([^{}]*)\}")
_FORMULA_LIMIT = 80  # characters; chosen: longer ones are displayed equations rather than parts of a sentence


def _plain_formula(tex: str) -> str:
    r"""Say a simple formula as text, `\alpha_{1} \times x^2` as "α_1 × x^2"; "" if it needs more than a line."""
    if len(tex) > 4 * _FORMULA_LIMIT:
        return ""
    text = _TEX_FONT.sub("", _TEX_LAYOUT.sub(" ", tex))
    text = _TEX_SYMBOL.sub(lambda symbol: _TEX_SYMBOLS.get(symbol[1], "\\"), text)
    text = " ".join(_TEX_GROUP.sub(r"\1", text).split())
    if len(text) > _FORMULA_LIMIT or any(character in text for character in "\\{}&<["):
        return ""
    return text.replace("'", "′")  # a prime; two apostrophes would read as italics


# ---------------------------------------------------------------- 2. templates

_BRACES = re.compile(r"\{\{+|\}\}+")
_DEEPEST = 40  # templates within templates: MediaWiki's own limit, which also bounds the work on hostile input
# The head of a template that is never closed: its name, and the rows "| key = value" below it, or the first pipe.
_UNCLOSED_HEAD = re.compile(r"[^|\n\[\]]*(?:(?:\n[ \t]*\|[^\n]*)+|\|)|")


def _expand_templates(text: str, *, keep_infoboxes: bool = False) -> str:
    """Replace every `{{...}}` by the words it says; unpaired braces vanish, with the head of an unclosed template."""
    if "{{" not in text and "}}" not in text:
        return text
    stack: list[list[str]] = [[]]  # the pieces of each template that is open, below them those of the page
    position = 0
    for braces in _BRACES.finditer(text):
        stack[-1].append(text[position : braces.start()])
        position = braces.end()
        pairs, odd = divmod(position - braces.start(), 2)
        if odd:  # the outer brace of "{{{!}}" belongs to a table, the inner one of "|}}}" as well
            stack[-1].append(braces[0][0])
        if braces[0][0] == "{":
            stack.extend([] for _ in range(min(pairs, _DEEPEST + 1 - len(stack))))
        else:
            for _ in range(min(pairs, len(stack) - 1)):
                body = "".join(stack.pop())
                stack[-1].append(templates.render(body, keep_infoboxes=keep_infoboxes))
    stack[-1].append(text[position:])
    while len(stack) > 1:
        stack[-2].append(_UNCLOSED_HEAD.sub("", "".join(stack.pop()), count=1))
    return "".join(stack[0])


# ---------------------------------------------------------------- 3. tables

_TABLE_MARK = re.compile(r"\{\||\|\}|<(/?)table\b[^<>]*>", re.IGNORECASE)
# Wikitext marks count at the start of a line only. The look back is bounded: lists and indents are a few marks deep.
_LINE_START = re.compile(r"(?:\A|\n)[ \t:;*#]*\Z")
_TABLE_LINE = re.compile(r"^[ \t]*(?:\{\||\||!)[^\n]*", re.MULTILINE)


def _drop_tables(text: str) -> str:
    """Remove tables, nested ones with them. Of a table that is never closed, only its row lines go."""
    if "{|" not in text and "|}" not in text and "<table" not in text:
        return text
    kept: list[str] = []
    position = 0  # all before it is in `kept` or dropped
    starts: list[int] = []  # of the tables that are open
    for mark in _TABLE_MARK.finditer(text):
        is_html = mark[0][0] == "<"
        before = text[max(0, mark.start() - 16) : mark.start()]
        if not is_html and not _LINE_START.search(before if mark.start() > 16 else "\n" + before):
            continue
        if mark[0] == "{|" or (is_html and not mark[1]):
            starts.append(mark.start())
        elif len(starts) > 1:
            starts.pop()
        else:
            # The end of an outermost table, or an end without a beginning: of that, only the mark itself goes.
            kept.append(text[position : starts.pop() if starts else mark.start()])
            position = mark.end()
    if not starts:
        return "".join([*kept, text[position:]])
    kept.append(text[position : starts[0]])
    return "".join([*kept, _TABLE_LINE.sub("", text[starts[0] :])])


# ---------------------------------------------------------------- 4. links

# An innermost link. The label may hold single brackets ("[sic]") but no further link.
_LINK = re.compile(r"\[\[([^\[\]|\n]*)(?:\|([^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*))?\]\]")
_EXTERNAL = re.compile(
    r"\[(?:https?:|ftps?:|mailto:|news:|irc:|//)[^\s\[\]<>]*\s*([^\[\]\n]*(?:\[[^\[\]\n]*\][^\[\]\n]*)*)\]",
    re.IGNORECASE,
)
# What is left of links that do not close: the opening and its target.
_UNCLOSED_LINK = re.compile(r"\[\[(?:[^\[\]|\n]*\|)?")
_NESTED_LINKS = 4  # links in captions in captions; chosen, deeper ones are treated as debris
_LANGUAGE_CODE = re.compile(r"(?:[a-z]{2,3}|simple)(?:-[a-z-]+)?")
_MEDIA_FILE = re.compile(r"\.(?:jpe?g|png|gif|svg|tiff?|og[gav]|webm|webp|pdf|djvu|mid)\s*\Z", re.IGNORECASE)


def _resolve_links(text: str, namespaces: Namespaces) -> str:
    """Replace links by what they show."""
    if "[" not in text:
        return text.replace("]]", "")

    def shown(link: re.Match[str]) -> str:
        target, label = link.groups()
        return _special_link(target, label, namespaces) if ":" in target else label or target

    text = _LINK.sub(shown, text)
    text = _EXTERNAL.sub(r"\1", text)
    for _ in range(_NESTED_LINKS):
        if "[[" not in text:
            break
        text = _LINK.sub(shown, text)
    if "[[" in text:
        text = _UNCLOSED_LINK.sub("", _unclosed_file(namespaces).sub("", text))
    return text.replace("]]", "")


def _special_link(target: str, label: str | None, namespaces: Namespaces) -> str:
    """Say a link with a colon in its target: to a file, a category, another wiki, or an article with such a title."""
    prefix, _, title = target.partition(":")
    namespace = prefix.strip().lower().replace("_", " ")
    if not namespace:  # "[[:Category:Plants]]": a link to the page, where without the colon it would file the article
        prefix, colon, rest = title.partition(":")
        return label or (rest if colon and prefix.strip().lower() in namespaces.known else title)
    if namespace in namespaces.silent or _MEDIA_FILE.search(title):
        return ""
    if label:
        return label
    return "" if _LANGUAGE_CODE.fullmatch(prefix) else target


@cache
def _unclosed_file(namespaces: Namespaces) -> re.Pattern[str]:
    """Match a file or category link that never closes, up to the end of its line."""
    names = "|".join(map(re.escape, sorted(namespaces.silent)))
    return re.compile(rf"\[\[\s*(?:{names})\s*:[^\n]*", re.IGNORECASE)


# ---------------------------------------------------------------- 5. tags and entities

_BREAKING = "blockquote|center|dd|div|dl|dt|h[1-6]|hr|ol|p|poem|table|tbody|td|th|thead|tr|ul|caption"
# Known names only: "<stdio.h>" and "a <b and c> d" are text.
_TAG = re.compile(
    rf"<\s*(/?)(?:(?P<breaking>{_BREAKING})|(?P<item>li)|(?P<blank>br|wbr)|a|abbr|b|bdi|bdo|big|cite|code|col|colgroup"
    r"|data|del|dfn|em|font|i|img|ins|kbd|languages|mark|noinclude|nobr|nowiki|onlyinclude|q|rb|rp|rt|ruby|s|samp"
    rf"|section|small|span|strike|strong|sub|sup|time|translate|tt|u|var|tvar|math|{_DROPPED})\b[^<>]*>",
    re.IGNORECASE,
)
# "10<sup>6</sup>" must not become "106". The look behind comes after the literal, which keeps the search fast.
_POWER = re.compile(r"<sup>(?<=[\w)'’]<sup>)\s*(?=[-−–+]?\d)", re.IGNORECASE)
_INVISIBLE = "\u200b\u200e\u200f\u00ad\ufeff\u2060"
_BLANKS = "\xa0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\u2028\u2029\x85"


def _drop_tags(text: str) -> str:
    """Remove HTML tags, keep what they enclose; resolve entities; make every kind of blank a plain one."""
    if "<" in text:
        if "sup>" in text:
            text = _POWER.sub("^", text)
        text = _TAG.sub(_tag_text, text)
    if "&" in text:
        text = unescape(text)
    if not text.isascii():
        for character in _INVISIBLE:
            text = text.replace(character, "")
        for character in _BLANKS:
            text = text.replace(character, " ")
    return text.replace("\t", " ")


def _tag_text(tag: re.Match[str]) -> str:
    kind = tag.lastgroup
    if kind == "item":
        return "\n" if tag[1] else "\n* "
    return "" if kind is None else " " if kind == "blank" else "\n"


# ---------------------------------------------------------------- 6. lines

_LINE_MARKS = frozenset("=*#:;|{-")
_MAGIC_WORD = re.compile(r"__[^\W\da-z_]+__")  # __NOTOC__ and its translations; not Python's __init__
_QUOTE_MARKS = re.compile(r"'{2,}")
_WORD = re.compile(r"[^\W_]")
_CLOSERS = frozenset(")]\"”’»%′″'")


def _clean_lines(text: str, *, keep_headings: bool) -> Iterable[str]:
    """Yield the lines that say something, without their wikitext marks."""
    if "__" in text:
        text = _MAGIC_WORD.sub("", text)
    titles: list[tuple[int, str]] = []  # of the sections that are open, level and words, and have no text yet
    for line in text.split("\n"):
        line = line.strip()
        if not line:
            continue
        is_item = False
        if line[0] in _LINE_MARKS:
            if line[0] == "=" and line[-1] == "=" and len(line) > 2:
                level = min(len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("=")))
                titles = [title for title in titles if title[0] < level]
                if keep_headings and _WORD.search(line):
                    titles.append((level, _as_item(_drop_quote_marks(line.strip("= ")).strip())))
                continue
            elif line[0] == "|" or line.startswith("{|"):
                continue  # a row that its table lost
            elif line[0] != "-" or line.startswith("----"):
                is_item = line[0] in "*#;"
                if line[0] == ";":  # "; Term : its meaning"
                    line = line.replace(" : ", ": ", 1)
                line = line.lstrip("-" if line[0] == "-" else "*#:; ")
        if "''" in line:
            line = _drop_quote_marks(line).strip()
        if not _WORD.search(line):
            continue
        yield from (words for _, words in titles)
        titles.clear()
        yield _as_item(line) if is_item else line


def _as_item(line: str) -> str:
    """The words of a list item, closed with a full stop unless they end with a mark of their own."""
    return f"{line}." if line[-1:].isalnum() or line[-1:] in _CLOSERS else line


def _drop_quote_marks(line: str) -> str:
    """Remove the marks of italics and bold, keep the apostrophes that touch them, as in `''Titanic'''s`.

    Two marks are italics, three bold, five both; four are an apostrophe and bold. Where a line leaves both bold and
    italics open, one of its triples is an apostrophe and italics: the first after a letter (MediaWiki's `doQuotes`).
    """
    if "'''" not in line:
        return line.replace("''", "")
    runs = [(marks.start(), len(marks[0])) for marks in _QUOTE_MARKS.finditer(line)]
    is_bold_open = sum(length != 2 for _, length in runs) % 2
    is_italic_open = sum(length == 2 or length >= 5 for _, length in runs) % 2
    with_apostrophe = {start for start, length in runs if length == 4}
    if is_bold_open and is_italic_open:
        triples = (start for start, length in runs if length == 3 and start and line[start - 1].isalpha())
        with_apostrophe.update(list(triples)[:1])
    return _QUOTE_MARKS.sub(
        lambda marks: "'" if marks.start() in with_apostrophe else "'" * max(0, len(marks[0]) - 5), line
    )


# ---------------------------------------------------------------- 7. holes

_OPENING_HOLE = re.compile(r"\([ ,;:]*[,;][ ,;]*")  # "(; born", "(, "; a lone ":" may be meant
_CLOSING_HOLE = re.compile(r"(?<![\s,;:])[ ,;:]+\)")  # " )", ", )"; the look behind keeps long runs linear
# After a blank only, since "main()" is a name; and one pair inside another, as in "((; ))".
_EMPTY_PARENTHESES = re.compile(r" \((?:[ ,;:./–—-]|\([ ,;:./–—-]*\))*\)")
# Not the " .5" of numbers, nor a dot of ". . .". After a comma or a stop that a blank followed, the later stop stays.
_SPACED_STOP = re.compile(r"(?:(?<=[^\s.,A-Z])[.,])? \.(?! ?\.)(?<! \. \.)(?=\s|\Z)")
_REPEATED_COMMA = re.compile(r",(?:\s*,)+")


def _mend(text: str) -> str:
    """Close the gaps that dropped markup leaves around punctuation. Each repair first asks whether it can apply."""
    while "  " in text:
        text = text.replace("  ", " ")
    if "(" in text:
        text = _OPENING_HOLE.sub("(", text).replace("( ", "(")
        if " )" in text or ",)" in text or ";)" in text or ":)" in text:
            text = _CLOSING_HOLE.sub(")", text)
        text = _EMPTY_PARENTHESES.sub("", text)
    text = text.replace(" ,", ",").replace("\n, ", "\n").replace("\n. ", "\n")
    if " ." in text:
        text = _SPACED_STOP.sub(".", text)
    if ",," in text or ", ," in text:
        text = _REPEATED_COMMA.sub(",", text)
    return text.lstrip(" ,.\n").rstrip()
