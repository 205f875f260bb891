"""Wikitext to clean text: what is kept, what is dropped, what broken markup costs."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from odqa.corpus.wikitext import Namespaces, clean


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("[[Paris]] and [[Rome|the city]]", "Paris and the city"),
        ("[[bus]]es", "buses"),
        ("[[:Category:Plants]] and [[:Category:Plants|plants]]", "Plants and plants"),
        ("[[2001: A Space Odyssey]]", "2001: A Space Odyssey"),
        ("text [[fr:Paris]]", "text"),  # interlanguage
        ("[[wikt:oak|oak]]", "oak"),
        ("a[[File:x.jpg|thumb|a [[nested|caption]] with [http://x.org link]]]b", "ab"),
        ("[[Image:x.png|left]]text[[Category:Plants]]", "text"),
        ("[http://x.org The site] and [http://x.org]", "The site and"),
        ("[//x.org a [pdf] file]", "a [pdf] file"),
        ("[[Foo|he [sic] said]]", "he [sic] said"),
    ],
)
def test_links_show_their_labels_and_files_and_categories_nothing(wikitext: str, expected: str) -> None:
    assert clean(wikitext) == expected


def test_translated_namespaces_are_silent_as_well() -> None:
    latgalian = Namespaces.of(silent=["Fails", "Kategoreja"], known=["Fails", "Kategoreja", "Taiss"])
    wikitext = "Reiga[[Fails:Riga.jpg|thumb|Reiga]] [[Kategoreja:Latveja]] [[Taiss:Mīsts|taiss]]"
    assert clean(wikitext, namespaces=latgalian) == "Reiga taiss"


def test_a_file_of_an_unknown_namespace_is_known_by_its_extension() -> None:
    assert clean("a [[Bild:Foto.JPG|mini|Foto]] b") == "a b"


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("{{convert|5|km|mi}}", "5 km"),
        ("{{Convert|5|to|10|km|mi|abbr=on}}", "5 to 10 km"),
        ("{{convert|5|-|10|km}}", "5–10 km"),
        ("{{convert|6|ft|2|in|m}}", "6 ft 2 in"),
        ("{{convert|2381741|km2}} or {{convert|1300|to|1,500|mi}}", "2,381,741 km2 or 1,300 to 1,500 mi"),
        ("{{convert|12345.678|m}}, {{convert|−1300|ft}}, {{cvt|1/2|in}}", "12,345.678 m, −1,300 ft, 1/2 in"),
        ("{{convert|2000|km|comma=off}}", "2000 km"),
        ("{{columns-list|2|\n* One\n* Two\n}}", "One.\nTwo."),  # the first argument may be a width
        ("{{div col list|30em|\n* One\n}}and {{plainlist|\n* Two\n}}", "One.\nand\nTwo."),
        (
            "at {{coord|30|12|N|74|7|W|type:landmark}} and {{coord|43.5|-79|display=inline}}",
            "at 30°12′N 74°7′W and 43.5°N 79°W",
        ),
        ("Reiga {{coord|56|N|24|E|display=title}}{{coord|56|N|24|E|display=inline,title}}{{coord|x}}", "Reiga"),
        ("{{OldStyleDate|February 2|1905|January 20}}", "February 2 [O.S. January 20] 1905"),
        ("{{OldStyleDateDY|7 January|1634|28 December 1633}}", "7 January 1634 [O.S. 28 December 1633]"),
        ("{{convert|5|km|mi|1}}", "5 km"),  # the last number is a rounding
        ("{{convert|20|C}} and {{cvt|22|e6acre}}", "20 °C and 22 million acre"),
        ("{{lang|fr|le mot}} {{lang-ru|слово}} {{transl|ar|ALA-LC|kitāb}}", "le mot слово kitāb"),
        ("{{IPAc-en|UK|ˈ|æ|p|əl}} {{IPA-fr|pom|lang|Pomme.ogg}} {{IPA|/a/}}", "UK /ˈæpəl/ [pom] /a/"),
        ("{{nihongo|'''Aikido'''|合気道|Aikidō}}", "Aikido (合気道, Aikidō)"),
        ("{{zh|s=汉字|t=漢字|p=hànzì}}", "汉字, 漢字, hànzì"),
        ("a {{nowrap|b c}} {{small|d}} {{abbr|e|f}}", "a b c d e"),
        ("{{frac|3|1|2}} {{frac|1|2}} {{val|1.5|e=6|u=m}} 5{{e|9}}", "3 1/2 1/2 1.5 × 10^6 m 5 × 10^9"),
        ("{{as of|2010|1|lc=y}} {{circa|1200}} {{birth date|1950|03|02}}", "as of January 2010 c. 1200 2 March 1950"),
        ("{{formatnum:1234}} {{angbr|a}} {{chem|H|2|O}} {{USS|Hornet|CV-12|6}}", "1234 ⟨a⟩ H2O USS Hornet"),
        ("1914{{ndash}}18{{'s}} {{hlist|a|b}}", "1914–18's a, b"),
    ],
)
def test_templates_of_the_sentence_keep_their_words(wikitext: str, expected: str) -> None:
    assert clean(wikitext) == expected


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("{{quote|Words of [[Ann|her]].|Ann|A Book}}", "Words of her. — Ann, A Book"),
        ("{{cquote|Words.|20px|20px|Ann}}", "Words. — Ann"),
        ("{{quote|text=1 = 1|sign=Ann}}", "1 = 1 — Ann"),
        ("{{blockquote|{{lang|la|Veni}} vidi}}", "Veni vidi"),
        ("{{rquote|left|Words.|Ann}}", "Words. — Ann"),
        ("{{quote}}", ""),
    ],
)
def test_quotations_keep_their_words_and_who_said_them(wikitext: str, expected: str) -> None:
    assert clean(wikitext) == expected


def test_other_templates_are_silent_with_all_inside_them() -> None:
    assert (
        clean("a {{Infobox city\n| name = {{lang|fr|Nice}}\n| map = [[File:x.png]]\n}} b {{cite web|url=x}}") == "a b"
    )
    assert clean("a {{#if:x|y|z}} {{DEFAULTSORT:b}} {{CURRENTYEAR}} c") == "a c"


@pytest.mark.parametrize(
    "dropped",
    [
        "<ref>note {{cite|x}}</ref>",
        '<ref name="a/b" />',
        "<REF NAME=x>note</REF>",
        "<!-- comment\n[[with]] {{markup}} -->",
        "<gallery>\nFile:x.jpg|caption\n</gallery>",
        "<references><ref name=x>note</ref></references>",
        '<span style="display:none">key</span>',
        "<syntaxhighlight lang=c>int main() {}</syntaxhighlight>",
        "<math>\\frac{a}{b}</math>",
        "__NOTOC__",
        "<!-- <ref> -->",
    ],
)
def test_what_carries_no_text_is_dropped_whole(dropped: str) -> None:
    assert clean(f"before {dropped} after") == "before after"


def test_short_formulas_become_text_and_long_ones_vanish() -> None:
    assert clean(r"for <math>\alpha_{1} \leq x^2</math>, <math>\mathrm{n}</math>") == "for α_1 ≤ x^2, n"
    assert clean(r"<math>\begin{matrix} a \\ b \end{matrix}</math>") == ""


def test_powers_do_not_melt_into_the_number_before_them() -> None:
    assert clean("10<sup>6</sup> m<sup>−2</sup> 19<sup>th</sup> H<sub>2</sub>O") == "10^6 m^−2 19th H2O"


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("''a'' '''b''' '''''c'''''", "a b c"),
        ("''Titanic'''s crew '''sank'''", "Titanic's crew sank"),
        ("'''Ann''''s book", "Ann's book"),
        ("5 o'clock, rock 'n' roll", "5 o'clock, rock 'n' roll"),
    ],
)
def test_quote_marks_go_and_apostrophes_stay(wikitext: str, expected: str) -> None:
    assert clean(wikitext) == expected


def test_list_items_become_sentences_and_headings_go() -> None:
    wikitext = "Intro.\n== Title ==\n* one\n** two!\n# [[three]]\n; Term : meaning\n: indented\n----\n*\n"
    assert clean(wikitext) == "Intro.\none.\ntwo!\nthree.\nTerm: meaning.\nindented"
    assert clean("== Title ==\ntext", keep_headings=True) == "Title.\ntext"


def test_tables_go_with_the_tables_inside_them() -> None:
    assert clean('a\n{| class="x"\n|-\n| b || {{lang|fr|c}}\n{|\n| d\n|}\n|}\ne') == "a\ne"
    assert clean("a\n<table><tr><td>b</td></tr></table>\nc") == "a\nc"
    assert clean("a\n:{{{!}}\n{{!}} b\n{{!}}}\nc") == "a\nc"


def test_entities_and_all_kinds_of_blanks_are_plain() -> None:
    assert clean("a&nbsp;b &amp; c&#160;d\u2009e\u200bf &mdash;") == "a b & c d ef —"


def test_nowiki_is_text() -> None:
    assert clean("<nowiki>[[a]] {{b}} ''c'' * d</nowiki>") == "[[a]] {{b}} ''c'' * d"
    assert clean("Ann<nowiki>'</nowiki>s") == "Ann's"


def test_angle_brackets_that_are_no_tags_are_text() -> None:
    assert clean("#include <stdio.h> and 1 < 2 > 0") == "include <stdio.h> and 1 < 2 > 0."


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("Ann ({{audio|x.ogg}}; born 1950) sang", "Ann (born 1950) sang"),
        ("Ann ({{audio|x.ogg}}) sang", "Ann sang"),
        ("Ann ({{audio|x.ogg}}, {{audio|y.ogg}}) sang", "Ann sang"),
        ("Ann (born 1950; {{age|1950}}) sang", "Ann (born 1950) sang"),
        ("one {{audio|x}}, two {{audio|y}}.", "one, two."),
        ("one, {{audio|x}}, two", "one, two"),
        ("the main() function {{audio|x}} of", "the main() function of"),
        ("{{audio|x}}, also", "also"),
        ("* one\n* {{cite|x}}. First of three", "one.\nFirst of three."),
    ],
)
def test_holes_of_dropped_templates_are_closed(wikitext: str, expected: str) -> None:
    assert clean(wikitext) == expected


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        # Each piece of debris costs itself, not the text after it.
        ("a {{unclosed b\n\nc", "a unclosed b\nc"),
        ("{{Infobox x\n| a = {{lang|fr|b}}\n| c = d\n\nText stays.", "Text stays."),
        ("a }} b ]] c |} d", "a b c |} d"),
        ("a\n|}\nb", "a\nb"),
        ('a\n{| class="x"\n|-\n| b\n\nText stays.', "a\nText stays."),
        ("a <ref>b\n\nText stays.", "a b\nText stays."),
        ("a <ref name=x>b <ref>c</ref> d", "a b d"),
        ("a [[b|c\nText stays.", "a c\nText stays."),
        ("a [[File:b.jpg|thumb|c\nText stays.", "a\nText stays."),
        ("a <!-- b\nText stays.", "a b\nText stays."),
        ("a <gallery>\nText stays.", "a\nText stays."),
        ("| stray row\ntext", "text"),
    ],
)
def test_broken_markup_never_costs_the_rest_of_the_article(wikitext: str, expected: str) -> None:
    assert clean(wikitext) == expected


_PIECES = [
    "{{",
    "}}",
    "{|",
    "|}",
    "|-",
    "[[",
    "]]",
    "|",
    "\n",
    "''",
    "'''",
    "<ref>",
    "</ref>",
    "<!--",
    "-->",
    "a",
    " ",
    "=",
    "*",
]
_PIECES += [
    "<ref name=x/>",
    "{{{",
    "}}}",
    "[http://x ",
    "]",
    "File:",
    "<nowiki>",
    "</nowiki>",
    "<math>",
    "&lt;",
    "quote|",
    "(",
    ")",
    ",",
]


@given(st.lists(st.sampled_from(_PIECES), max_size=60).map("".join))
def test_no_input_raises_and_no_markup_of_links_or_templates_is_left(wikitext: str) -> None:
    text = clean(wikitext)
    if "nowiki" not in wikitext:
        assert not any(mark in text for mark in ("{{", "}}", "[[", "]]", "  "))


_REPEATED = [
    "{{",
    "}}",
    "[[",
    "[[a|",
    "{{quote|",
    "<ref>",
    "<!--",
    "<gallery>",
    "{|",
    "\n{|",
    "\n|}",
    "((",
    ",",
    " )",
    "'''",
]
_REPEATED += [
    "[http://x ",
    "{{convert|1|",
    "a|",
    "<",
    "&",
    "[[File:a|[",
    "(;",
    "<sup>",
    "\n* ",
    "<nowiki>",
    " (",
    "<span ",
]


@pytest.mark.parametrize("piece", _REPEATED)
def test_hostile_repetition_takes_linear_time(piece: str) -> None:
    # 200 kB take some hundredths of a second; a quadratic pass would take minutes.
    begin = time.process_time()
    clean(piece * (200_000 // len(piece)))
    assert time.process_time() - begin < 5


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        # What a silent template leaves between two marks (Anarchism and Andre Agassi of the 2016 slice).
        ("* ISBN 0-14-022697-4. {{oclc|221147531}}.", "ISBN 0-14-022697-4."),
        ("* Run Time: 52 minutes, {{OCLC|61658553}}.", "Run Time: 52 minutes."),
        # An ellipsis with blanks is one (Algorithm): its dots do not move.
        (
            'Knuth: ". . .we want good algorithms . . . in some sense',
            'Knuth: ". . .we want good algorithms . . . in some sense',
        ),
        ("as on a piano [etc] . . . With this", "as on a piano [etc] . . . With this"),
        ("by a kind, . . . and more", "by a kind, . . . and more"),
        ("at A.D. . Then", "at A.D.. Then"),  # two stops as the page has them
    ],
)
def test_what_is_left_between_marks_is_mended_and_ellipses_are_not(wikitext: str, text: str) -> None:
    assert clean(wikitext) == text


# ---------------------------------------------------------------- what is text on request


def test_titles_are_kept_where_text_follows_before_the_next_of_their_level() -> None:
    page = (
        "Lead.\n== Early ''life'' ==\n=== Youth ===\nBorn.\n=== School ===\n== Works ==\n=== Books ===\n* One\n"
        "== Empty ==\n== References ==\n{{reflist}}\n"
    )
    assert clean(page, keep_headings=True).split("\n") == [
        "Lead.", "Early life.", "Youth.", "Born.", "Works.", "Books.", "One.",
    ]  # fmt: skip
    assert clean(page).split("\n") == ["Lead.", "Born.", "One."]


INFOBOX = """{{Infobox person
| name        = Ada {{nowrap|King}}
| image       = Ada.jpg
| image_size  = 220px
| caption     = A portrait
| birth_date  = {{birth date|1815|12|10|df=y}}
| birth_place = [[London]], England<ref>A note.</ref>
| occupation  = * [[Mathematician]]
* Writer
| spouse1     = [[William King-Noel|William]]<br />(m. 1835)
| coordinates = {{coord|51|N|0|W}}
| website     = {{URL|example.org}}
| signature   = Ada signature.svg
| nationality =
| resting_place_coordinates = 1
| module      = {{Infobox writer|genre=Notes}}
}}
'''Ada''' was a mathematician."""


def test_infobox_lines_say_facts_and_not_what_the_box_looks_like() -> None:
    assert clean(INFOBOX, keep_infoboxes=True).split("\n") == [
        "Name: Ada King.",
        "Birth date: 10 December 1815.",
        "Birth place: London, England.",
        "Occupation: Mathematician, Writer.",
        "Spouse: William, (m. 1835).",
        "Genre: Notes.",
        "Ada was a mathematician.",
    ]
    assert clean(INFOBOX) == "Ada was a mathematician."


@pytest.mark.parametrize(
    ("wikitext", "text"),
    [
        (
            "{{Taxobox|name=Aardvark|ordo=[[Tubulidentata]]|status=LC|range_map=A.png}}",
            "Name: Aardvark.\nOrdo: Tubulidentata.\nStatus: LC.",
        ),
        ("{{Infoskaste volsts|prezidents=X}}", "Prezidents: X."),
        (
            "{{Infobox x|logo_a=File:A.svg|stats={{{!}}\n{{!}} a\n{{!}}}|map_caption=M|alt_name=Other|altitude=5}}",
            "Altitude: 5.",
        ),
        ("{{Infobox x|elevation_m=|yes=no}}", ""),
        ("{{Navbox|list1=[[A]]}}", ""),
    ],
)
def test_infoboxes_go_by_many_names_and_other_boxes_stay_silent(wikitext: str, text: str) -> None:
    assert clean(wikitext, keep_infoboxes=True) == text
