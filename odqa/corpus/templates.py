"""The words that wikitext templates show: `{{convert|5|km|mi}}` says "5 km", `{{reflist}}` says nothing.

A template is a program that lives on another page of the wiki. Running it would need that page, and Lua; instead this
module knows by name the templates that carry words of the sentence around them, and says those words from the arguments
alone. Every other template is silent: citations, notes, boxes, navigation, maintenance.

The names are those of the English Wikipedia, which most other wikis share for these jobs. What a template would
*compute* (the converted value, the name of the language, an age) is left out: only what an author wrote is kept.
"""

import re
from collections.abc import Callable

# What decides whether a pipe separates arguments: one inside a link, `[[target|label]]`, does not.
_PIPE_OR_LINK = re.compile(r"\[\[|\]\]|\|")
# `name=value`. Whatever else stands before a "=" (an address, a tag, a formula) belongs to a positional argument.
_NAME = re.compile(r"\s*[\w-][\w .-]*\s*")


class Arguments:
    """The arguments of one template call, under their names; positional ones are named "1", "2", ... as in wikitext."""

    __slots__ = ("_values", "positional")

    def __init__(self, source: str) -> None:
        """Parse what stands between the template's first pipe and its closing braces."""
        self._values: dict[str, str] = {}
        count = 0
        for part in _split_outside_links(source) if "[[" in source else source.split("|"):
            name, equals, value = part.partition("=")
            if equals and _NAME.fullmatch(name):
                self._values[name.strip().lower()] = value.strip()
            else:
                count += 1
                self._values[str(count)] = part.strip()
        #: The values of "1", "2", ... up to the first that is missing.
        self.positional: list[str] = []
        while (key := str(len(self.positional) + 1)) in self._values:
            self.positional.append(self._values[key])

    def named(self) -> list[tuple[str, str]]:
        """The named arguments in their order, names in lower case."""
        return [(name, value) for name, value in self._values.items() if not name.isdigit()]

    def get(self, *names: str) -> str:
        """Return the first non-empty value among `names`, or "" (an absent and an empty argument look the same)."""
        for name in names:
            if value := self._values.get(name):
                return value
        return ""


def _split_outside_links(source: str) -> list[str]:
    parts, start, depth = [], 0, 0
    for match in _PIPE_OR_LINK.finditer(source):
        if match[0] == "[[":
            depth += 1
        elif match[0] == "]]":
            depth = max(0, depth - 1)
        elif depth == 0:
            parts.append(source[start : match.start()])
            start = match.end()
    return [*parts, source[start:]]


Rule = Callable[[Arguments], str]


def render(body: str, *, keep_infoboxes: bool = False) -> str:
    """Say the words of one template, given what stands between its braces; "" when it carries none.

    Templates inside the arguments must have been rendered before. Links and quote marks in the arguments stay.
    `keep_infoboxes`: a box of facts says a line a fact, "Birth date: 12 March 1950."; see `_infobox`.
    """
    name, pipe, rest = body.partition("|")
    name = name.strip().lower()
    rule = _RULES.get(name)
    if rule is None and keep_infoboxes and _INFOBOX.match(name.replace("_", " ")):
        return _infobox(Arguments(rest))
    if rule is None:
        if "_" in name:
            rule = _RULES.get(name.replace("_", " "))
        if rule is None and (family := _FAMILY.match(name)):
            rule = _FAMILIES[family[1]]
        if rule is None:
            return _render_function(name, body) if ":" in name else ""
    return rule(Arguments(rest if pipe else ""))


def _render_function(name: str, body: str) -> str:
    """Say the argument of `{{formatnum:1234}}` and its like; every other parser function is silent."""
    if name.split(":", 1)[0].strip() in ("formatnum", "lc", "uc", "lcfirst", "ucfirst"):
        return body.split(":", 1)[1].split("|", 1)[0].strip()
    return ""


# ---------------------------------------------------------------- makers of rules


def _says(text: str) -> Rule:
    """A template that stands for fixed characters."""
    return lambda arguments: text


def _argument(*names: str, before: str = "", after: str = "") -> Rule:
    """A template that shows one argument: the first non-empty one of `names`."""

    def rule(arguments: Arguments) -> str:
        value = arguments.get(*names)
        return f"{before}{value}{after}" if value else ""

    return rule


def _joined(separator: str, before: str = "", after: str = "") -> Rule:
    """A template that shows all its positional arguments in a row."""

    def rule(arguments: Arguments) -> str:
        values = [value for value in arguments.positional if value]
        return f"{before}{separator.join(values)}{after}" if values else ""

    return rule


def _last(arguments: Arguments) -> str:
    """A template that shows its last positional argument: the ones before it are codes, colours or sizes."""
    return next((value for value in reversed(arguments.positional) if value), arguments.get("text"))


# ---------------------------------------------------------------- rules of their own

_RANGE_WORDS = {"-": "–", "to(-)": "–", "x": " × ", "xx": " × ", "*": " × ", "by": " by ", "to": " to ", "and": " and "}
_RANGE_WORDS |= {"–": "–", "or": " or ", "+/-": " ± ", "±": " ± ", "+": " + ", "and(-)": " and ", "×": " × "}
_UNITS = {"c": "°C", "f": "°F", "sqmi": "sq mi", "sqft": "sq ft", "sqin": "sq in", "sqyd": "sq yd", "cuft": "cu ft"}
_UNITS |= {"cuin": "cu in", "usgal": "US gal", "impgal": "imp gal"}
_SCALED_UNIT = re.compile(r"e(3|6|9|12)(\w+)")  # "e6acre" is a million acres
_SCALES = {"3": "thousand", "6": "million", "9": "billion", "12": "trillion"}
_SMALLER_UNITS = frozenset(("in", "ft", "yd", "oz", "lb", "st", "cwt", "qtr", "chain", "furlong"))


def _convert(arguments: Arguments) -> str:
    """`{{convert|5|to|10|km|mi}}` says "5 to 10 km", `{{convert|6|ft|2|in|m}}` says "6 ft 2 in"."""
    values = arguments.positional
    if not values:
        return ""
    if arguments.get("comma") not in ("off", "gaps"):
        values = [_with_commas(value) for value in values]
    # 1. The number, or the range: number, word, number, ...
    said, at = values[0], 1
    while at + 1 < len(values) and (word := _RANGE_WORDS.get(values[at].lower())):
        said += word + values[at + 1]
        at += 2
    # 2. Its unit, then smaller units with a number of their own. A number without such a unit is a rounding.
    while at < len(values):
        said += " " + _unit(values[at])
        at += 1
        if at + 1 >= len(values) or values[at + 1] not in _SMALLER_UNITS or not values[at][:1].isdigit():
            break
        said += " " + values[at]
        at += 1
    return said


_LARGE_NUMBER = re.compile(r"([-−–+]?)(\d{4,})(\.\d+)?")


def _with_commas(value: str) -> str:
    """`2381741` as the page shows it, "2,381,741"; what is no plain number stays."""
    number = _LARGE_NUMBER.fullmatch(value)
    return value if number is None else f"{number[1]}{int(number[2]):,}{number[3] or ''}"


def _unit(code: str) -> str:
    if scaled := _SCALED_UNIT.fullmatch(code):
        return f"{_SCALES[scaled[1]]} {_unit(scaled[2])}"
    return _UNITS.get(code.lower(), code)


def _fraction(arguments: Arguments) -> str:
    """`{{frac|1|2}}` says "1/2", `{{frac|3|1|2}}` "3 1/2", `{{frac|2}}` "1/2"."""
    values = arguments.positional
    if len(values) >= 3:
        return f"{values[0]} {values[1]}/{values[2]}"
    return "/".join(values) if len(values) == 2 else f"1/{values[0]}" if values else "/"


def _number(arguments: Arguments) -> str:
    """`{{val|1.5|0.2|e=6|u=m}}` says "1.5 ± 0.2 × 10^6 m"; an uncertainty "(7)" stays glued to its digits."""
    values = arguments.positional
    said = values[0] if values else ""
    if len(values) > 1:
        said += values[1] if values[1].startswith("(") else f" ± {values[1]}"
    if power := arguments.get("e"):
        said += f" × 10^{power}"
    unit = arguments.get("u", "ul", "up")
    return f"{said} {unit}" if unit else said


def _height(arguments: Arguments) -> str:
    """`{{height|ft=5|in=11}}` says "5 ft 11 in"."""
    return " ".join(f"{arguments.get(unit)} {unit}" for unit in ("m", "cm", "ft", "in") if arguments.get(unit))


def _quote(author: str, source: str) -> Rule:
    """A block quotation: the words, then who said them and where (which also have names of their own)."""

    def rule(arguments: Arguments) -> str:
        text = arguments.get("1", "text", "quote", "content", "quotetext")
        by = arguments.get(author, "author", "sign", "by"), arguments.get(source, "source", "cite", "title")
        credit = ", ".join(part for part in by if part)
        return f"\n{text} — {credit}\n" if text and credit else f"\n{text}\n"

    return rule


def _rquote(arguments: Arguments) -> str:
    """`{{rquote|left|words|author|source}}`: the first argument is a place on the page."""
    text, *credit = [*(value for value in arguments.positional[1:] if value), ""]
    return f"\n{text} — {', '.join(credit[:-1])}\n" if len(credit) > 1 else f"\n{text}\n"


# Words in {{IPAc-en}} that stand before the sounds, and what they show.
_IPA_LABELS = {"us": "US ", "uk": "UK ", "uklang": "UK ", "uslang": "US ", "ukpron": "UK ", "uspron": "US "}
_IPA_LABELS |= dict.fromkeys(("lang", "pron", "audio", "icon", "local", "also"), "")


def _ipa_segments(arguments: Arguments) -> str:
    """`{{IPAc-en|UK|ˈ|æ|p|əl}}` says "UK /ˈæpəl/"; "_" is a space there."""
    label = "".join(_IPA_LABELS.get(segment.lower(), "") for segment in arguments.positional[:2])
    sounds = "".join(segment for segment in arguments.positional if segment.lower() not in _IPA_LABELS)
    return f"{label}/{sounds.replace('_', ' ')}/" if sounds else ""


def _ipa_of_language(arguments: Arguments) -> str:
    """`{{IPA-fr|paʁi|lang|Paris.ogg}}` says "[paʁi]", with one pair of brackets only."""
    sounds = arguments.get("1")
    return sounds if not sounds or sounds[0] in "[/" else f"[{sounds}]"


def _ipa(arguments: Arguments) -> str:
    """`{{IPA|/pæk/}}` and, newer, `{{IPA|fr|paʁi}}` with a language code in front."""
    values = arguments.positional
    return values[1] if len(values) > 1 and values[0].isalpha() and len(values[0]) <= 3 else arguments.get("1")


def _glossed(arguments: Arguments) -> str:
    """`{{nihongo|English|漢字|romaji|more}}` says "English (漢字, romaji, more)"."""
    head, *gloss = [*arguments.positional, ""]
    said = ", ".join(value for value in gloss if value)
    return f"{head} ({said})" if head and said else head or said


def _scripts(arguments: Arguments) -> str:
    """`{{zh|s=汉字|p=hànzì}}` says "汉字, hànzì": every way of writing that is given, once, in this order."""
    keys = ("1", "c", "s", "t", "hangul", "hanja", "kanji", "kana", "p", "w", "y", "j", "rr", "mr", "poj", "l", "lit")
    return ", ".join(dict.fromkeys(value for key in keys if (value := arguments.get(key))))


_MONTHS = "January February March April May June July August September October November December"


def _month(value: str) -> str:
    return _MONTHS.split()[int(value) - 1] if value.isascii() and value.isdigit() and 1 <= int(value) <= 12 else value


def _date(arguments: Arguments) -> str:
    """`{{birth date|1950|3|12}}` says "12 March 1950"; a date given as one argument is said as it is."""
    values = [value for value in arguments.positional[:3] if value]
    if len(values) < 2 or not values[0].isdigit():
        return values[0] if values else ""
    return " ".join([*(day.lstrip("0") for day in values[2:3]), _month(values[1]), values[0]])


def _old_style_date(arguments: Arguments) -> str:
    """`{{OldStyleDate|February 2|1905|January 20}}` says "February 2 [O.S. January 20] 1905"."""
    new, year, old = (*arguments.positional, "", "", "")[:3]
    return " ".join(part for part in (new, f"[O.S. {old}]" if old else "", year) if part)


def _old_style_date_and_year(arguments: Arguments) -> str:
    """`{{OldStyleDateDY|7 January|1634|28 December 1633}}` says "7 January 1634 [O.S. 28 December 1633]"."""
    new, year, old = (*arguments.positional, "", "", "")[:3]
    return " ".join(part for part in (new, year, f"[O.S. {old}]" if old else "") if part)


def _as_of(arguments: Arguments) -> str:
    """`{{as of|2010|1|lc=y}}` says "as of January 2010"."""
    if alternative := arguments.get("alt"):
        return alternative
    return f"{'as of' if arguments.get('lc') else 'As of'} {_date(arguments)}"


def _ship(prefix: str) -> Rule:
    """`{{USS|Hornet|CV-12|6}}` says "USS Hornet (CV-12)"; a third argument chooses a shorter form."""

    def rule(arguments: Arguments) -> str:
        name, number, form = (*arguments.positional, "", "", "")[:3]
        return f"{prefix} {name} ({number})" if number and not form else f"{prefix} {name}"

    return rule


def _interlanguage(arguments: Arguments) -> str:
    """`{{ill|Name|de|Anderer}}`, and the older `{{ill|de|Name|...}}`, say "Name"."""
    first, second = (*arguments.positional, "", "")[:2]
    return arguments.get("lt") or (second if second and len(first) <= 3 and first.islower() else first)


_WIDTH = re.compile(r"\d*(?:\.\d+)?(?:em|px|%)?")


def _list(arguments: Arguments) -> str:
    """A list as wikitext, alone or behind the number or width of columns: `{{columns-list|2|* One}}`."""
    first, second = (*arguments.positional, "", "")[:2]
    found = second if _WIDTH.fullmatch(first) else first
    return f"\n{found}\n" if found else ""


def _coordinates(arguments: Arguments) -> str:
    """`{{coord|30|12|N|74|7|W}}` says "30°12′N 74°7′W"; one for the title of the page (too) is not in the sentence."""
    if "t" in arguments.get("display").replace("inline", ""):
        return ""
    numbers, parts = list[str](), list[str]()
    for value in arguments.positional:
        if value.upper() in ("N", "S", "E", "W"):
            parts.append("".join(map("".join, zip(numbers, "°′″", strict=False))) + value.upper())
            numbers = []
        elif re.fullmatch(r"[-−]?\d+(?:\.\d+)?", value):
            numbers.append(value)
        else:
            break
    if not parts and len(numbers) >= 2:
        signs = zip(numbers, ("NS", "EW"), strict=False)
        parts = [f"{number.lstrip('-−')}°{sign[number[0] in '-−']}" for number, sign in signs]
    return " ".join(parts)


def _items(arguments: Arguments) -> str:
    """A list whose items are arguments: one wikitext list item each."""
    return "".join(f"\n* {value}" for value in arguments.positional if value) + "\n"


def _columns(arguments: Arguments) -> str:
    """`{{columns|col1=...|col2=...}}`: the columns one after the other."""
    return "\n".join(filter(None, (arguments.get(f"col{number}") for number in range(1, 10)))) + "\n"


# Boxes of facts, by how their names begin: English, and what a dozen other Wikipedias call them.
_INFOBOX = re.compile(
    r"infobox|infoboks|infoskaste|geobox|taxobox|automatic taxobox|autotaxobox|speciesbox|chembox|drugbox|starbox"
    r"|ficha de|info/|infocaseta|infotaula|infokast|infokvir|инфокутия|карточка|картка|bilgi kutusu"
)
# What describes the box and its pictures rather than the subject.
_BESIDE_FACTS = re.compile(
    r"image|img|photo|pic(?:ture)?(?![a-z])|caption|alt(?![a-z])|logo|flag|map|coa(?![a-z])|seal|signature|icon|banner"
    r"|cover|width|size$|colou?r|bg|style|class$|align|coor|lat[dms]?$|lon[gdms]*$|lat[-_ ]|long?[-_ ]|foot ?note|ref"
    r"|pushpin|url|web ?site|homepage|hide|show|audio|sound|dim(?![a-z])|region code|iso code|border|above$|below$"
)
_ROWS = re.compile(r"\s*(?:\n[*#:;\s]*|<br[^<>]*>)\s*", re.IGNORECASE)
_FILE = re.compile(r"\.(?:jpe?g|png|gif|svg|tiff?|og[gv]|webm|pdf)\b", re.IGNORECASE)


def _infobox(arguments: Arguments) -> str:
    """A line a fact: its key as words, a colon, its value on one line with a full stop; rows are set off by commas.

    Left out: empty and fixed values (yes, no), pictures and what describes them, colours, sizes, coordinates, maps,
    addresses, references, tables. Keys lose their underscores and a number behind them ("leader_name1").
    """
    lines = []
    for key, value in arguments.named():
        words = key.replace("_", " ").replace("-", " ").strip()
        if re.fullmatch(r"(?:module|embed|child|misc)\d*", key):  # a box in the box has said its lines
            lines.append(value)
            continue
        said = ", ".join(part for part in _ROWS.split(value.strip("*#:; \n")) if part.strip())
        is_fact = any(character.isalnum() for character in said) and said.lower() not in ("yes", "no", "y", "n")
        if (
            not is_fact
            or "{|" in value
            or _FILE.search(said)
            or any(_BESIDE_FACTS.match(words[at:]) for at in _starts(words))
        ):
            continue
        label = words.rstrip("0123456789 ") or words
        lines.append(f"{label[:1].upper()}{label[1:]}: {said.rstrip(' .;,')}.")
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _starts(words: str) -> list[int]:
    """Where the words of a key begin."""
    return [0, *(at + 1 for at, character in enumerate(words) if character == " ")]


_ACCIDENTALS = {"sharp": "♯", "flat": "♭", "natural": "♮", "#": "♯", "b": "♭"}


def _accidental(arguments: Arguments) -> str:
    return _ACCIDENTALS.get(arguments.get("1").lower(), arguments.get("1"))


# ---------------------------------------------------------------- which template follows which rule


def _table(*groups: tuple[str, Rule]) -> dict[str, Rule]:
    """Spell out `("name, other name", rule)` as a dictionary from each name to its rule."""
    return {name.strip(): rule for names, rule in groups for name in names.split(", ")}


_RULES: dict[str, Rule] = _table(
    # Measures and numbers.
    ("convert, cvt, convert/2, conv", _convert),
    ("frac, sfrac, fraction", _fraction),
    ("val", _number),
    ("height", _height),
    ("e, exp", _argument("1", before=" × 10^")),
    ("10^", _argument("1", before="10^")),
    ("format price, nts, formatnum, gaps, numero, number, track gauge, railgauge, rail gauge", _argument("1")),
    ("ntsh, hs", _says("")),
    ("us$, usd", _argument("1", before="US$")),
    ("a$, aud", _argument("1", before="A$")),
    ("€, euro, eur", _argument("1", before="€")),
    ("£, gbp, pound sterling", _argument("1", before="£")),
    ("inr, indian rupee", _argument("1", before="₹")),
    ("¥, jpy", _argument("1", before="¥")),
    ("half", _says("1/2")),
    ("sup", _argument("1", before="^")),
    ("chem, chem2, ce", _joined("")),
    ("simplenuclide, simplenuclide2, nuclide, nuclide2", _joined("-")),
    # Languages, scripts and sounds.
    ("lang, langue, transl, transliteration, rtl-lang, ltr-lang, script, wikt-lang, langnf", _last),
    ("nihongo, nihongo2, nihongo3", _glossed),
    ("zh, zh-full, zh-cn, korean, ko-hhrm, cjkv", _scripts),
    ("ipac-en, ipac", _ipa_segments),
    ("ipa, ipa2, ipa-all, ipa link, ipalink, ipa blink, ipablink, ipa soundbox", _ipa),
    ("ipaslink, ipa slink", _argument("1", before="/", after="/")),
    ("respell, pronunciation respelling", _joined("-")),
    ("unicode, polytonic, hebrew, hebrew2, arabic, nastaliq, urdu, linktext", _joined("")),
    ("angbr, angle bracket, grapheme, angbr ipa", _joined("", before="⟨", after="⟩")),
    # Quotations.
    ("quote, blockquote, bquote, quotation, poemquote, poem quote, quote box, quotebox, block quote", _quote("2", "3")),
    ("cquote, centered pull quote, pull quote, pullquote, cquote2, verse translation, quote frame", _quote("4", "5")),
    ("rquote, rbquote", _rquote),
    ("cite quote, talkquote, talk quote inline, tq", _argument("1", "text")),
    # Looks: the argument in another size, weight, colour or place.
    ("nowrap, nobr, small, smaller, big, large, larger, huge, midsize, em, strong, italic, bold, i, b", _argument("1")),
    ("nobold, noitalic, normal, underline, strikethrough, center, left, right, align, centre", _argument("1")),
    ("abbr, abbrlink, abbreviation, tooltip, define, sc, smallcaps, sc1, sc2, smallcaps all, caps", _argument("1")),
    ("mono, code, codes, samp, var, mvar, math, tt, kbd, pre, sub, su, nomobile, no wrap, nowrap2", _argument("1")),
    (
        "vanchor, visible anchor, anchored, bracket, highlight, not a typo, typo, proper name, sic",
        _argument("1", "text"),
    ),
    ("as written, notatypo, chem name, longitem, native name, sort dash, allow wrap, nowiki, vr", _argument("1")),
    ("resize, font, font color, fontcolor, color, colour, background color, sort, font-size, fs", _last),
    ("citation needed span, cn-span, citequote, clarify span, fact span", _argument("1", "text")),
    ("keypress, key press, key", _joined("+")),
    ("music", _accidental),
    # Dates.
    ("birth date, death date, start date, end date, dob, film date, dts, date, start-date, end-date", _date),
    ("birth date and age, death date and age, start date and age, bda, dda, birth-date, death-date", _date),
    ("as of, asof", _as_of),
    ("circa, c., ca., c", _argument("1", before="c. ")),
    ("floruit, fl., fl", _argument("1", before="fl. ")),
    ("reign, r.", _joined("–", before="r. ")),
    ("born, b., born-in", _argument("1", before="b. ")),
    ("died, d.", _argument("1", before="d. ")),
    ("oldstyledate, old style date", _old_style_date),
    ("oldstyledatedy", _old_style_date_and_year),
    ("year, by, fy, baseball year", _argument("1")),
    # Names and links.
    ("flag, flagu, flagcountry, flag+link, flagathlete", _argument("1")),
    ("ill, illm, interlanguage link, interlanguage link multi, link-interwiki", _interlanguage),
    ("sortname", _joined(" ")),
    ("bibleverse, bibleverse-nb, bibleref, bibleref2, bibleref2-nb", _joined(" ")),
    ("section link, slink", _joined(" § ")),
    ("url", _argument("2", "1")),
    ("ship, ss", _joined(" ")),
    ("uss", _ship("USS")),
    ("hms", _ship("HMS")),
    ("hmas", _ship("HMAS")),
    ("hmcs", _ship("HMCS")),
    ("rms", _ship("RMS")),
    # Lists.
    ("hlist, flat list", _joined(", ")),
    ("plainlist, flatlist, plain list, columns-list, column-list, div col list, bulletlist, collapse", _list),
    ("coord", _coordinates),
    ("unbulleted list, ubl, ublist, vunblist, ordered list, bulleted list, unbulleted, numbered list", _items),
    ("columns", _columns),
    # Characters.
    ("!", _says("|")),
    ("=", _says("=")),
    ("', `", _says("'")),
    ("'s", _says("'s")),
    ("-', '-", _says("'")),
    ('-", "-, pad quote', _says('"')),
    ("' \"", _says("'\"")),
    ("\" '", _says("\"'")),
    ("okina, hamza, ayin", _says("ʻ")),
    ("mdash, em dash, —", _says("—")),
    ("mdashb, spaced mdash", _says(" — ")),
    ("ndash, en dash, –", _says("–")),
    ("snd, snds, spnd, spaced ndash, spaced en dash, ndashb, dash", _says(" – ")),
    ("nbsp, spaces, space, thinsp, thin space, hair space, sp, nnbsp, emsp, ensp, pad, indent", _says(" ")),
    ("·, dot, middot, •, bull, bullet, \\, /", _says(" · ")),
    ("eqm", _says(" ⇌ ")),
    ("dagger, †", _says("†")),
)

# Families with a suffix: {{lang-fr|...}} (val-, vol- in Latvian and Latgalian), {{IPA-de|...}}, {{script/Hebrew|...}}.
_FAMILY = re.compile(r"(lang-|val-|vol-|ipa-|ipac-|script/)")
_FAMILIES: dict[str, Rule] = {
    **dict.fromkeys(("lang-", "val-", "vol-"), lambda arguments: arguments.get("1") or _scripts(arguments)),
    "ipa-": _ipa_of_language,
    "ipac-": _ipa_segments,
    "script/": _argument("1"),
}
