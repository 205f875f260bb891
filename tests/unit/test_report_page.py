"""odqa.report as HTML and markdown: every number is there, and nothing from outside is more than text."""

import base64
import hashlib
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from odqa.evaluate import OUTCOMES, Evaluation, evaluate
from odqa.report.charts import Line, interval_bar, line_chart, stacked_bar
from odqa.report.content import Source, choose_sample, gather, pieces, tokens_to_answer
from odqa.report.markup import Html, el
from odqa.report.page import render_page
from odqa.report.paper import escaped, render_paper
from odqa.types import Answer, Gold, Hit, PackedContext, Passage, Query, Step, Trace

ATTACK = "</p><script>alert('x')</script><img src=x onerror=alert(1)>\"' onload=alert(2) x=\""
TEXTS = {"p1": "Rome is the capital of Italy.", "p2": "Bern is in Switzerland.", "p3": f"Rome {ATTACK} hills."}


def a_trace(query_id: str, said: str, *, hostile: str = "", packed: tuple[str, ...] = ("p2", "p1")) -> Trace:
    query = Query(query_id, f"what is the capital of italy{hostile}")
    hits = tuple(Hit(Passage(pid, TEXTS[pid] + hostile, f"title {pid}{hostile}"), 2.5, "bm25") for pid in packed)
    steps = (
        Step("retrieve", 1, 0.125, 4, ("p2", "p3", "p1"), (3.0, 2.5, 1.0)),
        Step("pack", 1, 0.001, 4, packed, (2.5,) * len(packed), (40,) * len(packed)),
        Step("read", 1, 0.5, 4),
    )
    return Trace(query, steps, (Answer(query_id, said, -0.25),), (PackedContext(query, "", hits, 95, 128),))


def a_source(name: str, *said: str, hostile: str = "", held: set[str] | None = None) -> Source:
    traces = [a_trace(f"q{number}{hostile}", text, hostile=hostile) for number, text in enumerate(said)]
    gold = [Gold(trace.query.id, (f"Rome{hostile}",) if hostile else ("Rome",)) for trace in traces]
    found = evaluate(
        traces, gold, TEXTS.__getitem__, question_set=f"toy{hostile}", split="dev", depths=(1, 2), resamples=50,
        in_collection=held,
    )  # fmt: skip
    look_up = {pid: Passage(pid, text, f"title {pid}") for pid, text in TEXTS.items()}.get
    return Source(f"{name}{hostile}", found, traces, {"run": f"runs/{name}{hostile}"}, look_up)


class Reader(HTMLParser):
    """What a browser would make of a page: the elements with their attributes, text and scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        else:
            self.text += data


# --- nothing from outside is more than text ---------------------------------------------------------------------------


def test_a_hostile_passage_question_answer_and_name_stay_text() -> None:
    source = a_source("sys", "Rome" + ATTACK, "Bern", hostile=ATTACK, held={f"q0{ATTACK}"})
    plain = Reader(render_page(gather([a_source("sys", "Rome", "Bern", held={"q0"})], sample=5), title="plain"))
    page = Reader(render_page(gather([source], sample=5), title=f"title {ATTACK}"))
    assert len(page.scripts) == 1 and page.scripts == plain.scripts  # ours, and no other
    assert {tag for tag, _ in page.elements} == {tag for tag, _ in plain.elements}  # no img
    names = {name for _, attributes in page.elements for name in attributes}
    assert names == {name for _, attributes in plain.elements for name in attributes}  # no onerror, no onload
    assert page.text.count("alert('x')") > 10  # it is there, as text


def test_the_policy_allows_the_one_script_by_its_hash_and_loads_nothing() -> None:
    html = render_page(gather([a_source("sys", "Rome")], sample=5), title="t")
    page = Reader(html)
    digest = base64.b64encode(hashlib.sha256(page.scripts[0].encode()).digest()).decode()
    (policy,) = [a["content"] for tag, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    loading = [(tag, a) for tag, a in page.elements if tag in ("link", "img", "iframe") or "src" in a]
    assert loading == [] and "http:" not in html and "https:" not in html and "url(" not in html


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_browser_runs_our_script_and_no_other(tmp_path: Path) -> None:
    source = a_source("sys", "Rome" + ATTACK, "Bern", hostile=ATTACK)
    attack = "<script>document.title='taken'</script>"
    page = render_page(gather([source], sample=5), title=f"mine {ATTACK}")
    page = page.replace("<footer>", f"<footer>{attack}<img src=x onerror=\"document.title='taken'\">")  # past escaping
    (tmp_path / "r.html").write_text(page, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", f"file://{tmp_path / 'r.html'}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    assert "<title>mine" in dom and "<title>taken" not in dom
    form = re.search(r'<form class="filter"[^>]*>', dom)
    assert form is not None and "hidden" not in form[0]  # our script ran, and shows the filter


def test_control_and_direction_characters_are_blanks() -> None:
    assert el("p", "a\x1b[31mb\u202ec\ud800") == "<p>a [31mb c </p>"


def test_only_el_makes_markup() -> None:
    assert el("p", "<b>", Html("<i>"), ["&", None], class_='"') == '<p class="&quot;">&lt;b&gt;<i>&amp;</p>'
    assert el("input", type="search", hidden=True, value=None) == '<input type="search" hidden>'
    assert el("line", x1=0, stroke_width=2) == '<line x1="0" stroke-width="2"/>'


def test_a_name_with_a_bar_does_not_split_a_cell_of_markdown() -> None:
    paper = render_paper(gather([a_source("a|b", "Rome")], sample=1), title="t")
    assert "| outcome | a\\|b |" in paper and "a\\\\|b" not in paper


def test_markdown_shows_a_hostile_passage_as_text() -> None:
    paper = render_paper(gather([a_source("sys", "Rome" + ATTACK, "Bern", hostile=ATTACK)], sample=5), title=ATTACK)
    assert "<" not in paper and "onerror" in paper
    assert escaped("a|b *c* [d](e)\n# f `g`") == "a|b \\*c\\* \\[d\\](e) \\# f \\`g\\`"


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_page_has_the_funnel_the_curves_the_kinds_the_times_and_the_questions() -> None:
    sections = gather([a_source("sys", "Rome", "Bern", held={"q0", "q1"})], sample=5)
    page = Reader(render_page(sections, title="toy"))
    headings = ["Where was the answer lost?", "Scores", "Recall at k", "What the budget buys", "Where the time goes"]
    headings += ["Exact match by question word", "Exact match by answer type", "Questions"]
    assert all(heading in page.text for heading in headings)
    assert "A passage with an answer was packed (retrieved at rank 2); the reader said something else." in page.text
    marks = [a["class"] for tag, a in page.elements if tag == "mark"]
    assert "gold said" in marks and "gold" in marks and "said" in marks  # q0 is right; q1 said Bern, gold is Rome
    charts = [a for tag, a in page.elements if tag == "svg" and a.get("class") == "chart"]
    assert len(charts) == 2 and all(a["role"] == "img" and a["aria-label"] for a in charts)


def test_the_markdown_has_the_same_numbers() -> None:
    paper = render_paper(gather([a_source("sys", "Rome", "Bern")], sample=5), title="toy")
    assert "| misread | 1 (50.0%) |" in paper and "**sys: exact match by question word**" in paper
    assert "#### what is the capital of italy" in paper and "**_Rome_** is the capital of Italy." in paper


def test_a_comparison_pairs_each_system_with_the_first_and_marks_what_differs() -> None:
    (section,) = gather([a_source("a", "Bern", "Rome", "Rome"), a_source("b", "Rome", "Bern", "Rome")], sample=3)
    ((first, second, comparison),) = section.comparisons
    assert (first, second, len(comparison.won), len(comparison.lost)) == ("a", "b", 1, 1)
    page = Reader(render_page([section], title="a and b"))
    assert (
        "b against a" in page.text
        and "2 questions changed: 1 became right, 1 became wrong, 0 ended elsewhere" in page.text
    )
    cards = {a["data-differs"] for _, a in page.elements if a.get("class") == "card"}
    assert cards == {"true", "false"}


def test_systems_that_differ_in_their_budget_alone_are_a_line() -> None:
    small, large = a_source("whole-64", "Bern"), a_source("whole-128", "Rome")
    small = replace(small, evaluation=replace(small.evaluation, budget=64))
    other = a_source("other", "Rome")
    page = render_page(gather([small, large, other], sample=1), title="t")
    assert "whole: em" in page and "other: em" not in page and "whole: em: 100.0 % at 128" in page
    assert "Against the token budget" not in render_page(gather([large, other], sample=1), title="t")


def test_what_was_found_and_not_packed_is_shown_if_the_index_is_there() -> None:
    trace = a_trace("q0", "Bern", packed=("p2",))
    gold = [Gold("q0", ("Rome",))]
    found = evaluate([trace], gold, TEXTS.__getitem__, question_set="toy", split="dev", depths=(1,), resamples=10)
    passage = Passage("p3", TEXTS["p3"], "Hills")
    source = Source("sys", found, [trace], {}, {"p3": passage}.get)
    (section,) = gather([source], sample=1)
    shown = section.systems[0].shown["q0"]
    assert shown.missed == (2, passage) and "retrieved at rank 2, and not packed; 1 were" in shown.where
    unknown = gather([Source("sys", found, [trace], {})], sample=1)[0]
    assert unknown.systems[0].shown["q0"].missed is None


def test_the_sample_has_every_outcome_and_the_same_seed_gives_the_same() -> None:
    evaluation = a_source("sys", *["Rome"] * 30, "Bern").evaluation
    chosen = choose_sample([evaluation], 4, seed=1)
    assert chosen == choose_sample([evaluation], 4, seed=1) and len(chosen) == 4 and chosen[0] == "q30"
    assert len(choose_sample([evaluation], 99)) == 31 and choose_sample([evaluation], 0) == []


def test_tokens_to_the_answer_count_what_comes_before_it() -> None:
    # 95 tokens in all, 2 passages of 40: 15 for the question; the answer is in the second passage.
    assert tokens_to_answer(a_trace("q", "x"), ["Rome"], "string") == 95
    assert tokens_to_answer(a_trace("q", "x"), ["Bern"], "string") == 55
    assert tokens_to_answer(a_trace("q", "x"), ["Oslo"], "string") is None


def test_pieces_joined_are_the_text_and_overlap_is_both() -> None:
    found = pieces("In New York City.", ["New York"], "York City", "string")
    assert [(piece.text, piece.is_gold, piece.is_said) for piece in found] == [
        ("In ", False, False),
        ("New ", True, False),
        ("York", True, True),
        (" City", False, True),
        (".", False, False),
    ]
    patterns = pieces("Born 1985 in Rome", [r"19\d\d"], "", "regex")
    assert [piece.text for piece in patterns if piece.is_gold] == ["1985"]


def test_the_same_runs_give_the_same_bytes() -> None:
    def page() -> str:
        return render_page(gather([a_source("a", "Rome", "Bern"), a_source("b", "Rome", "Rome")], sample=2), title="t")

    assert page() == page()


def test_a_run_without_passages_has_a_page_too() -> None:
    query = Query("q", "who?")
    trace = Trace(
        query, (Step("read", 1, 0.5, 1),), (Answer("q", "Rome", -1.0),), (PackedContext(query, "", (), 9, 64),)
    )
    found: Evaluation = evaluate([trace], [Gold("q", ())], str, question_set="toy", split="", resamples=10)
    page = render_page(gather([Source("closed", found, [trace], {})], sample=1), title="closed")
    assert "There is no answer: saying nothing would have been right." in page and "Recall at k" not in page


# --- charts -----------------------------------------------------------------------------------------------------------


def test_a_line_goes_from_the_left_margin_to_the_right_one_and_up_with_its_values() -> None:
    chart = line_chart([Line("a", ((1, 50.0), (10, 100.0)))], label="l", x_label="k", y_label="%", x_scale="log")
    points = re.search(r'<polyline points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"', chart)
    assert points is not None
    x1, y1, x2, y2 = map(float, points.groups())
    assert (x1, x2) == (56.0, 442.0) and y2 == 12.0 < y1  # 100 % is the top margin
    assert "<title>a: 50.0 % at 1</title>" in chart
    with pytest.raises(ValueError, match="at least one point"):
        line_chart([], label="l", x_label="k", y_label="%")


def test_bars_have_widths_in_percent() -> None:
    assert '<rect x="0" y="3" width="40" height="10" class="fill"/>' in interval_bar(40, 30, 50, label="l")
    stack = stacked_bar([("o0", 25.0), ("o1", 0.0), ("o2", 75.0)], label="l")
    assert re.findall(r'x="([\d.]+)" y="0" width="([\d.]+)"', stack) == [("0.0", "25.0"), ("25.0", "75.0")]


def test_every_outcome_has_a_colour_in_the_style_sheet() -> None:
    style = (Path(__file__).parents[2] / "odqa/report/page.css").read_text(encoding="utf-8")
    assert all(f".o{number} {{" in style and f".b-o{number} {{" in style for number in range(len(OUTCOMES)))
