"""The page of odqa serve in headless Chromium: by keyboard, on a phone's width, with hostile passages, offline."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest

from odqa.pipeline import Pipeline
from odqa.serve.keys import Keys
from odqa.serve.state import Service
from odqa.types import Answer, Candidate, Hit, PackedContext, Query, TokenCosts
from tests.asked import HOSTILE, HOSTILE_ID, HOSTILE_QUESTION, Again, asked_service, hostile_world
from tests.browser import CHROMIUM, Browser, browser
from tests.served import listening
from tests.small_world import questions

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")

QUESTION = questions(1)[0]["question"]
STATUS = "document.getElementById('status').textContent"
ANSWERED = f"{STATUS}.startsWith('Answered')"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("page")
    with asked_service(hostile_world(root / "world"), root / "served") as made:
        yield made


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(service) as address:
        yield address


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("chromium") / "profile") as made:
        yield made


class Scripted:
    """A reader that says what it is told, pass by pass, and takes it from the hostile passage where that has it."""

    def __init__(self, reader: Any, texts: list[str]) -> None:
        self.reader, self.texts = reader, texts
        self.may_read = Event()
        self.may_read.set()

    def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
        assert self.may_read.wait(30)
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        start = HOSTILE.find(text)
        place = (HOSTILE_ID, start, start + len(text)) if start >= 0 else (None, None, None)
        candidates = (Candidate(text, -0.1, *place), Candidate("<b>1667</b>", -3.0))
        return [Answer(context.query.id, text, -0.1, candidates) for context in contexts]

    def costs(self, query: Query, hits: Sequence[Hit]) -> TokenCosts:
        found: TokenCosts = self.reader.costs(query, hits)
        return found


@pytest.fixture
def pipeline(service: Service) -> Iterator[Pipeline]:
    """The pipeline that answers, which says 1666; a test may change its stages."""
    assert service.asker is not None
    loaded = service.asker.loaded
    kept = loaded.pipeline
    loaded.pipeline = replace(kept, reader=Scripted(kept.reader, ["1666"]))  # type: ignore[arg-type]
    yield loaded.pipeline
    loaded.pipeline = kept


def open_page(tab: Browser, url: str, width: int = 1100) -> None:
    tab.messages.clear()
    tab.requests.clear()
    tab.open(url, width=width)
    tab.wait("document.getElementById('about').textContent.includes('bm25 answers from 61 passages')")


def ask(tab: Browser, question: str) -> None:
    """By keyboard: the question has the focus when the page is there."""
    tab.type(question)
    tab.press("Enter")


def text_of(tab: Browser, selector: str) -> list[str]:
    found: list[str] = tab.value(f"[...document.querySelectorAll({json.dumps(selector)})].map((e) => e.textContent)")
    return found


def test_a_question_is_asked_and_its_answer_marked_right_by_keyboard(
    tab: Browser, url: str, pipeline: Pipeline, service: Service
) -> None:
    open_page(tab, url)
    assert tab.value("document.activeElement.id") == "question"
    ask(tab, HOSTILE_QUESTION)
    tab.wait(ANSWERED)
    assert text_of(tab, "#answer") == ["1666"] and text_of(tab, "#confidence") == ["confidence 0.90, uncalibrated"]
    focused = []
    while "right" not in focused:
        tab.press("Tab")
        focused.append(tab.value("document.activeElement.id"))
        assert len(focused) < 5, focused
    tab.press(" ")
    tab.wait("document.getElementById('kept').textContent.startsWith('Kept: right')")
    tab.press("Tab")
    tab.press("Enter")
    tab.wait("document.getElementById('kept').textContent.startsWith('Kept: wrong')")
    assert tab.value("document.getElementById('wrong').getAttribute('aria-pressed')") == "true"
    assert service.asker is not None
    kept = service.asker.marks.of("local")[-1]
    assert (kept.question, kept.answer, kept.is_right) == (HOSTILE_QUESTION, "1666", False)
    assert HOSTILE_ID in kept.passage_ids


def test_the_page_shows_what_was_packed_what_it_cost_and_the_times(tab: Browser, url: str, pipeline: Pipeline) -> None:
    open_page(tab, url)
    ask(tab, QUESTION)
    tab.wait(ANSWERED)
    (trace,) = pipeline.answer([Query("q", QUESTION)])
    (context,), pack = trace.contexts, trace.steps[1]
    shown = text_of(tab, "#evidence .passages li")
    assert len(shown) == len(context.hits)
    for line, hit, tokens in zip(shown, context.hits, pack.tokens, strict=True):
        assert f"passage {hit.passage.id}, {tokens} tokens" in line
    (note,) = text_of(tab, "#evidence .note")
    assert f"{len(context.hits)} passages packed, {context.tokens} of {context.budget} tokens" in note
    assert text_of(tab, "#passes tbody th") == ["retrieve", "pack", "read"]
    assert all(cell.endswith((" ms", " s")) for cell in text_of(tab, "#passes tbody td:nth-child(2)"))
    widths = tab.value("[...document.querySelectorAll('.spent span')].map((e) => e.getBoundingClientRect().width)")
    assert len(widths) >= len(context.hits) and all(width > 0 for width in widths[: len(context.hits)])


def test_a_hostile_passage_is_text_and_nothing_else_is_loaded(tab: Browser, url: str, pipeline: Pipeline) -> None:
    for width in (1100, 360):
        open_page(tab, url, width)
        ask(tab, HOSTILE_QUESTION)
        tab.wait(ANSWERED)
        assert tab.value("document.title") == "odqa: ask"
        assert tab.value("document.querySelectorAll('#result script, #result img, #result a, #result b b').length") == 0
        (shown,) = [text for text in text_of(tab, "#evidence .passages li p") if "Zanzor" in text]
        assert shown == HOSTILE.replace("\n", " ").replace("\u202e", " ")
        assert "1666" in text_of(tab, "#evidence mark") and len(text_of(tab, "#evidence .here")) == 1
        assert "<b>1667</b> 0.050" in text_of(tab, "#passes .ranking li")
        assert tab.messages == [] and all(request.startswith(f"{url}/") for request in tab.requests)
    # The policy holds where the script's care would not: markup made of a string is refused.
    refused = tab.value(
        "(() => { try { document.body.innerHTML = '<img src=x>'; return false; } catch { return true; } })()"
    )
    assert refused and tab.value("document.querySelectorAll('img').length") == 0


def test_marks_count_characters_as_python_does(tab: Browser, url: str) -> None:
    """Two spans that overlap, behind characters that UTF-16 writes as two."""
    open_page(tab, url)
    text = "\U0001f5fc\U0001f5fc was built in 1666."
    start = text.index("built")
    spans = [[start + 3, start + 13], [start, start + 8]]
    made = tab.value(f"marked({json.dumps(text)}, {spans}).map((e) => e.textContent ?? e)")
    assert made == [text[:start], "built in", "", " 1666", "."]


@pytest.mark.parametrize("width", [1100, 768, 360, 320])
def test_nothing_is_wider_than_the_screen(tab: Browser, url: str, pipeline: Pipeline, width: int) -> None:
    open_page(tab, url, width)
    ask(tab, HOSTILE_QUESTION + " " + "x" * 120)
    tab.wait(ANSWERED)
    tab.value("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert tab.value("document.documentElement.scrollWidth") <= width
    heights = tab.value(
        "[...document.querySelectorAll('button:not([hidden])')].map((e) => e.getBoundingClientRect().height)"
    )
    assert min(heights) >= 40  # a finger's


def test_each_pass_of_a_recursion_is_shown_with_what_it_changed(tab: Browser, url: str, pipeline: Pipeline) -> None:
    assert isinstance(pipeline.reader, Scripted)
    pipeline.reader.texts = ["Arn", "1666"]
    pipeline.recursion, pipeline.max_passes = Again(HOSTILE_QUESTION), 3
    open_page(tab, url)
    ask(tab, QUESTION)
    tab.wait(ANSWERED)
    assert text_of(tab, "#answer") == ["1666"] and "in 2 passes" in tab.value(STATUS)
    first, second, stopped = text_of(tab, "#passes .pass > summary")
    assert stopped == "Pass 3: no further pass"  # the recursion was asked, and stopped
    assert first.startswith("Pass 1: Arn (") and second.startswith("Pass 2: 1666 (") and second.endswith(", was Arn)")
    assert "Zanzor" in text_of(tab, "#passes .pass:nth-child(2) .inner > p")[0]
    assert "Zanzor" not in text_of(tab, "#passes .pass:nth-child(1) .inner > p")[0]


def test_stages_are_shown_while_the_reader_reads_and_escape_stops(tab: Browser, url: str, pipeline: Pipeline) -> None:
    assert isinstance(pipeline.reader, Scripted)
    pipeline.reader.may_read.clear()
    open_page(tab, url)
    ask(tab, HOSTILE_QUESTION)
    tab.wait(f"{STATUS}.startsWith('Pass 1: pack took')")
    assert text_of(tab, "#answer") == ["..."] and len(text_of(tab, "#evidence .passages li")) > 0
    assert tab.value("document.getElementById('go').disabled") and text_of(tab, "#evidence mark") == []
    tab.press("Escape")
    tab.wait(f"{STATUS} === 'Stopped.'")
    pipeline.reader.may_read.set()
    assert tab.value("document.getElementById('verdict').hidden") and not tab.value(
        "document.getElementById('go').disabled"
    )


def test_an_error_is_one_sentence_and_half_an_answer_is_none(tab: Browser, url: str, pipeline: Pipeline) -> None:
    assert isinstance(pipeline.reader, Scripted)
    pipeline.reader.texts = []  # the reader fails
    open_page(tab, url)
    ask(tab, HOSTILE_QUESTION)
    tab.wait("!document.getElementById('error').hidden")
    (said,) = text_of(tab, "#error")
    assert said.startswith("Internal error; the log has it under ask-") and text_of(tab, "#answer") == [
        "(no whole answer)"
    ]
    assert tab.value("document.getElementById('verdict').hidden")


def test_a_key_is_asked_for_where_there_are_keys(
    tab: Browser, url: str, pipeline: Pipeline, service: Service, tmp_path: Path
) -> None:
    before, service.keys = service.keys, Keys(tmp_path)
    try:
        key = service.keys.make("alice")
        tab.open(url)
        tab.wait("document.activeElement.id === 'key'")
        tab.wait("document.getElementById('about').textContent.includes('needs a key')")
        tab.value("document.getElementById('question').focus()")
        tab.type(HOSTILE_QUESTION)
        tab.value("document.getElementById('key').focus()")
        ask(tab, key)
        tab.wait(ANSWERED)
        assert text_of(tab, "#answer") == ["1666"]
        tab.open(url)  # the tab remembers it
        tab.wait("document.getElementById('about').textContent.includes('61 passages')")
        tab.value("sessionStorage.clear()")
    finally:
        service.keys = before
