"""/ask and marks as a client sees them: stage by stage, one question at a time, hostile texts, bad input."""

import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odqa.errors import DataError
from odqa.frozen.backbone import load_backbone
from odqa.frozen.in_use import PromptInUse
from odqa.frozen.local import LocalEngine
from odqa.jobs import load_pipeline
from odqa.pipeline import Pipeline
from odqa.read.lm import LmReader
from odqa.recipes import Places
from odqa.runs import trace_to_json
from odqa.serve.asking import Asker, News
from odqa.serve.errors import ApiError
from odqa.serve.keys import Keys
from odqa.serve.limits import Limits
from odqa.serve.marks import Mark, Marks, hand_over
from odqa.serve.state import Service
from odqa.types import Answer, Hit, PackedContext, Query, TokenCosts
from tests.asked import (
    HOSTILE,
    HOSTILE_ID,
    HOSTILE_QUESTION,
    HOSTILE_TITLE,
    Again,
    asked_service,
    asking,
    hostile_world,
)
from tests.served import listening
from tests.small_world import World, questions

QUESTION = questions(1)[0]["question"]
LIMITS = Limits(requests_a_minute=0, question_characters=200, user_asks=2, waiting_asks=3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return hostile_world(tmp_path_factory.mktemp("ask") / "world")


@pytest.fixture(scope="module")
def service(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with asked_service(world, tmp_path_factory.mktemp("served"), limits=LIMITS) as made:
        yield made


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    with listening(service) as address:
        yield address


@pytest.fixture
def pipeline(service: Service) -> Iterator[Pipeline]:
    """The pipeline that answers; a test may change its stages."""
    assert service.asker is not None
    loaded = service.asker.loaded
    kept = loaded.pipeline
    loaded.pipeline = replace(kept)
    yield loaded.pipeline
    loaded.pipeline = kept


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/ask", json={"question": QUESTION, **body}, timeout=60)


def told(url: str, **body: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in post(url, stream="lines", **body).text.splitlines()]


class Wrapped:
    """A reader around another; what it does before reading is the test's."""

    def __init__(self, reader: Any, before: Any) -> None:
        self.reader, self.before = reader, before

    def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
        self.before(contexts)
        return list(self.reader.read(contexts))

    def costs(self, query: Query, hits: Sequence[Hit]) -> TokenCosts:
        found: TokenCosts = self.reader.costs(query, hits)
        return found


# --- what is told -----------------------------------------------------------------------------------------------------


def test_the_answer_is_the_pipelines_with_its_evidence_and_steps(url: str, world: World) -> None:
    places = Places.from_environment(None, world.artifacts)
    trace = load_pipeline(world.pipeline("bm25"), places=places).ask(QUESTION)
    found = post(url, trace=True).json()
    assert found["answer"]["text"] == trace.answer.text and found["passes"] == 1
    assert found["trace"] == json.loads(json.dumps(trace_to_json(trace)))
    assert [(step["stage"], step["pass"]) for step in found["steps"]] == [("retrieve", 1), ("pack", 1), ("read", 1)]
    assert [one["id"] for one in found["evidence"]] == [hit.passage.id for hit in trace.contexts[0].hits]
    assert [one["tokens"] for one in found["evidence"]] == list(trace.steps[1].tokens)
    assert sum(one["tokens"] for one in found["evidence"]) <= found["tokens"] <= found["budget"] == 400
    retrieve, pack, _ = found["steps"]
    assert retrieve["count"] == len(trace.steps[0].ids) and len(retrieve["passages"]) <= 10
    assert retrieve["passages"][0]["title"] == trace.contexts[0].hits[0].passage.title
    assert pack["passages"][0]["text"] == trace.contexts[0].hits[0].passage.text


def test_marks_point_at_the_answer_in_characters(url: str, pipeline: Pipeline) -> None:
    """The span reader says where it found the answer; the answer is marked wherever it stands."""
    found = post(url).json()
    text = found["answer"]["text"]
    spans = [one["text"][start:end] for one in found["evidence"] for start, end in one["marks"]]
    assert text and spans and set(map(str.lower, spans)) == {text.lower()}
    (source,) = [one for one in found["evidence"] if "found" in one]
    assert source["text"][slice(*source["found"])] == text


def test_lines_and_events_tell_the_same(url: str) -> None:
    lines, events = post(url, stream="lines"), post(url, stream="events")
    assert lines.headers["content-type"].startswith("application/x-ndjson")
    assert events.headers["content-type"].startswith("text/event-stream")
    first = [json.loads(line) for line in lines.text.splitlines()]
    second = []
    for block in events.text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        second.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {second[-1]['event']}"
    names = ["begin", "step", "step", "step", "answer"]
    assert [one["event"] for one in first] == [one["event"] for one in second] == names
    assert first[0]["question"] == QUESTION and first[0]["id"] == first[-1]["id"] != second[0]["id"]
    assert first[-1]["answer"] == second[-1]["answer"] == post(url).json()["answer"]


def test_a_stage_is_told_before_the_next_one_has_ended(url: str, pipeline: Pipeline) -> None:
    may_read = threading.Event()
    pipeline.reader = Wrapped(pipeline.reader, lambda _: may_read.wait(30))
    with httpx.stream("POST", f"{url}/ask", json={"question": QUESTION, "stream": "lines"}, timeout=60) as stream:
        lines = stream.iter_lines()
        seen = [json.loads(next(lines)) for _ in range(3)]
        assert [one.get("stage") for one in seen] == [None, "retrieve", "pack"] and not may_read.is_set()
        may_read.set()
        assert [json.loads(line)["event"] for line in lines] == ["step", "answer"]


def test_each_pass_is_told_with_its_own_answer(url: str, pipeline: Pipeline) -> None:
    pipeline.recursion, pipeline.max_passes = Again(HOSTILE_QUESTION), 3
    found = told(url)
    readings = [one for one in found if one.get("stage") == "read"]
    assert [one["pass"] for one in readings] == [1, 2] and found[-1]["passes"] == 2
    assert readings[0]["answer"] == post(url).json()["steps"][2]["answer"]
    assert HOSTILE_ID in [one["id"] for one in readings[1]["evidence"]]
    assert HOSTILE_ID not in [one["id"] for one in readings[0]["evidence"]]
    assert found[-1]["answer"] == readings[1]["answer"]


def test_a_closed_book_pipeline_has_no_evidence(world: World, service: Service, tmp_path: Path) -> None:
    before = service.asker
    with asking(world, service, "closed", tmp_path), listening(service) as url:
        found = post(url).json()
        assert found["evidence"] == [] and [step["stage"] for step in found["steps"]] == ["pack", "read"]
        assert httpx.get(f"{url}/ask").json()["passages"] == 0
    service.asker = before


def test_what_answers_is_described(url: str) -> None:
    found = httpx.get(f"{url}/ask").json()
    assert found["recipe"] == "bm25" and found["passages"] == 61 and found["question_characters"] == 200


# --- passages are data ------------------------------------------------------------------------------------------------


def test_hostile_markup_is_told_as_it_is(url: str) -> None:
    """As JSON it is a text; what the page does with it is tested in a browser."""
    response = post(url, question=HOSTILE_QUESTION)
    (one,) = [one for one in response.json()["evidence"] if one["id"] == HOSTILE_ID]
    assert one["text"] == HOSTILE and one["title"] == HOSTILE_TITLE
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_a_packed_passage_cannot_change_the_slot_of_the_instructions(
    world: World, service: Service, tmp_path: Path
) -> None:
    """What the model gets before and behind the passages is the same, to the token, whatever they say; and no text of
    a passage becomes a control token. The hostile one has the template's words, its fields, the chat's own tokens."""
    before = service.asker
    with asking(world, service, "lm", tmp_path) as asker, listening(service) as url:
        reader: Any = asker.loaded.pipeline.reader
        assert isinstance(reader, LmReader)
        seen: list[list[int]] = []
        encode = reader.encode

        def watched(context: PackedContext) -> list[list[int]]:
            seen[:] = list(encode(context))
            return seen

        reader.encode = watched  # type: ignore[method-assign]
        found = post(url, question=HOSTILE_QUESTION).json()
        assert HOSTILE_ID in [one["id"] for one in found["evidence"]]
        (prompt,) = seen
        alone = reader.costs(Query("q", HOSTILE_QUESTION), []).fixed
        frame_before, frame_after = reader._frame(HOSTILE_QUESTION)
        assert alone == len(frame_before) + len(frame_after)
        assert prompt[: len(frame_before)] == frame_before and prompt[len(prompt) - len(frame_after) :] == frame_after
        middle = prompt[len(frame_before) : len(prompt) - len(frame_after)]
        tokenizer = reader.backbone.tokenizer
        assert not set(middle) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
        assert set(frame_before + frame_after) == set(prompt) - set(middle) | set(frame_before + frame_after)
        # The template's fields in it are letters: the question stands once, where the template puts it.
        text = reader.prompt.text(HOSTILE_QUESTION, [])
        assert text.count(HOSTILE_QUESTION) == 1 and "{question}" not in text
    service.asker = before


# --- one after the other ----------------------------------------------------------------------------------------------


def test_many_clients_get_their_own_answers_and_the_pipeline_is_entered_by_one_at_a_time(
    url: str, service: Service, pipeline: Pipeline
) -> None:
    asked = [row["question"] for row in questions(8)]
    alone = [post(url, question=question).json()["answer"] for question in asked]
    inside, most = [], []

    def enter(_: object) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()

    pipeline.reader = Wrapped(pipeline.reader, enter)
    assert service.asker is not None
    service.asker.limits = replace(LIMITS, user_asks=8, waiting_asks=8)
    with ThreadPoolExecutor(8) as pool:
        together = [response.json()["answer"] for response in pool.map(lambda q: post(url, question=q), asked)]
    service.asker.limits = LIMITS
    assert together == alone and len(most) == 8 and max(most) == 1


@pytest.fixture
def held(service: Service, pipeline: Pipeline) -> Iterator[tuple[Asker, threading.Event, threading.Event]]:
    """The pipeline stands in its reader until the second event is set; the first one says that it is there."""
    is_there, may_go = threading.Event(), threading.Event()

    def hold(_: object) -> None:
        is_there.set()
        assert may_go.wait(30)

    pipeline.reader = Wrapped(pipeline.reader, hold)
    assert service.asker is not None
    yield service.asker, is_there, may_go
    may_go.set()
    end = time.monotonic() + 30
    while service.asker.waiting or service.asker._running:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_users_take_turns_and_what_may_wait_is_bounded(held: tuple[Asker, threading.Event, threading.Event]) -> None:
    asker, is_there, may_go = held
    order: list[str] = []

    def hand_in(user: str, name: str) -> None:
        def report(what: News) -> None:
            if isinstance(what, Exception) or what["event"] == "answer":
                order.append(name)

        asker.submit(user, QUESTION, report)

    hand_in("alice", "a0")
    assert is_there.wait(30)  # a0 is being answered; the others wait
    for user, name in (("alice", "a1"), ("alice", "a2"), ("bob", "b1")):
        hand_in(user, name)
    with pytest.raises(ApiError, match="3 questions wait already, 2 of them yours") as refused:
        hand_in("alice", "a3")  # two of a user
    assert (refused.value.status, refused.value.code, refused.value.wait) == (429, "queue_full", 1)
    with pytest.raises(ApiError, match="3 questions wait already, 0 of them yours"):
        hand_in("carol", "c1")  # three of all
    may_go.set()
    end = time.monotonic() + 30
    while len(order) < 4:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert order == ["a0", "a1", "b1", "a2"]


def test_a_client_that_leaves_is_let_go_between_two_stages(
    url: str, service: Service, held: tuple[Asker, threading.Event, threading.Event]
) -> None:
    asker, is_there, may_go = held
    with httpx.stream("POST", f"{url}/ask", json={"question": QUESTION, "stream": "lines"}, timeout=60):
        assert is_there.wait(30)
    job = asker._running
    assert job is not None
    end = time.monotonic() + 30
    while not job.is_cancelled:
        assert time.monotonic() < end, "the server does not notice"
        time.sleep(0.01)
    may_go.set()
    assert post(url).json()["event"] == "answer"
    assert 'odqa_asks_total{end="cancelled"}' in service.metrics.render()


def test_what_takes_too_long_is_told_in_time_and_is_no_answer(
    url: str, held: tuple[Asker, threading.Event, threading.Event]
) -> None:
    asker, _, may_go = held
    asker.limits = replace(LIMITS, request_seconds=0.3)
    whole = post(url)
    assert whole.status_code == 503 and whole.json()["error"]["code"] == "timeout"
    last = told(url)[-1]  # it waited behind the first one, which stands
    assert last["event"] == "error" and last["error"]["code"] == "timeout"
    asker.limits = LIMITS
    may_go.set()
    assert post(url).status_code == 200


def test_a_stage_that_fails_is_one_clear_error_and_the_next_question_is_answered(
    url: str, pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    reader = pipeline.reader

    def fail(_: object) -> None:
        raise ZeroDivisionError("secret/path")

    pipeline.reader = Wrapped(reader, fail)
    response, lines = post(url), told(url)
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert [one["event"] for one in lines] == ["begin", "step", "step", "error"]
    assert "secret" not in response.text + json.dumps(lines) and "secret/path" in caplog.text

    def refuse(_: object) -> None:
        raise DataError("query question: the question takes 900 tokens, /srv/models/reader reads at most 512.")

    pipeline.reader = Wrapped(reader, refuse)
    refused = post(url)
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "bad_question"
    assert refused.json()["error"]["message"] == "The question takes 900 tokens, reader reads at most 512."
    pipeline.reader = reader
    assert post(url).status_code == 200


def test_a_shutdown_finishes_what_waits_and_takes_nothing_more(world: World, service: Service, tmp_path: Path) -> None:
    before = service.asker
    with asking(world, service, "bm25", tmp_path) as asker:
        found: list[News] = []
        for user in ("alice", "bob"):
            asker.submit(user, QUESTION, found.append)
        asker.close(30)
        assert [one["event"] for one in found if isinstance(one, dict)].count("answer") == 2
        with pytest.raises(ApiError, match="shutting down"):
            asker.submit("alice", QUESTION, found.append)
    service.asker = before


def test_without_grace_what_is_left_is_told_so(
    world: World, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = service.asker
    with asking(world, service, "bm25", tmp_path) as asker:
        is_there, may_go = threading.Event(), threading.Event()

        def hold(_: object) -> None:
            is_there.set()
            may_go.wait(30)

        asker.loaded.pipeline.reader = Wrapped(asker.loaded.pipeline.reader, hold)
        found: dict[str, list[News]] = {"alice": [], "bob": []}
        for user, heard in found.items():
            asker.submit(user, QUESTION, heard.append)
        assert is_there.wait(30)
        threading.Timer(0.2, may_go.set).start()
        asker.close(0)
        for heard in found.values():
            assert isinstance(heard[-1], ApiError) and heard[-1].code == "shutting_down"
            assert not [one for one in heard if isinstance(one, dict) and one["event"] == "answer"]
    service.asker = before


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"question": " \n"}, 400, "The question is empty. Ask something."),
        ({"question": "x" * 201}, 400, "The question has 201 characters; at most 200 are read here."),
        ({"question": 5}, 400, "question: Input should be a valid string."),
        ({}, 400, "question: Field required."),
        ({"question": "a", "stream": True}, 400, "stream: Input should be 'lines' or 'events'."),
        ({"question": "a", "pipeline": "../x.yaml"}, 400, "pipeline: not a field that this server knows."),
        ({"question": "\ud800"}, 400, "question: half a surrogate pair is not a character."),
    ],
)
def test_bad_questions_get_one_sentence(url: str, body: dict[str, Any], status: int, words: str) -> None:
    content = json.dumps(body)  # escapes half a pair
    response = httpx.post(f"{url}/ask", content=content, headers={"Content-Type": "application/json"})
    assert (response.status_code, response.json()["error"]["message"]) == (status, words)


@given(st.text(max_size=200))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_text_is_a_question_or_a_clear_error(url: str, text: str) -> None:
    """Control characters, other scripts, nothing but blanks: an answer, or 400 and a sentence."""
    response = httpx.post(f"{url}/ask", json={"question": text, "stream": "lines"}, timeout=60)
    if response.status_code == 200:
        assert [json.loads(line)["event"] for line in response.text.split("\n")[:-1]][-1] == "answer"
    else:
        assert response.status_code == 400 and not text.strip() and response.json()["error"]["param"] == "question"


def test_a_server_without_a_pipeline_says_so(service: Service, url: str) -> None:
    before, service.asker = service.asker, None
    for response in (post(url), httpx.get(f"{url}/ask"), httpx.post(f"{url}/ask/x/mark", json={"is_right": True})):
        assert response.status_code == 404 and response.json()["error"]["code"] == "no_pipeline"
    service.asker = before


# --- marks ------------------------------------------------------------------------------------------------------------


def mark(url: str, ask_id: str, is_right: bool, **options: Any) -> httpx.Response:
    return httpx.post(f"{url}/ask/{ask_id}/mark", json={"is_right": is_right}, **options)


def test_marks_are_kept_with_what_was_answered_from(url: str, service: Service) -> None:
    found = post(url).json()
    assert mark(url, found["id"], True).json() == {"id": found["id"], "is_right": True}
    assert mark(url, found["id"], False).status_code == 200  # a user may think better of it
    assert service.asker is not None
    kept = service.asker.marks.of("local")[-1]
    assert (kept.question, kept.answer, kept.is_right) == (QUESTION, found["answer"]["text"], False)
    assert list(kept.passage_ids) == [one["id"] for one in found["evidence"]]
    assert kept.recipe == service.asker.loaded.recipe.hash
    assert kept.prompt is None and kept.continuation is None  # a span reader has no prompt
    assert [one.ask for one in service.asker.marks.of("local")].count(kept.ask) == 1
    unknown = mark(url, "ask-0", True)
    assert unknown.status_code == 404 and unknown.json()["error"]["code"] == "unknown_ask"
    assert mark(url, found["id"], None).status_code == 400  # type: ignore[arg-type]


def test_a_generative_readers_mark_has_the_text_that_it_answered_from(
    world: World, service: Service, tmp_path: Path
) -> None:
    before = service.asker
    with asking(world, service, "lm", tmp_path) as asker, listening(service) as url:
        found = post(url).json()
        mark(url, found["id"], True)
        (kept,) = asker.marks.of("local")
        assert found["answer"]["text"] and kept.prompt is not None and kept.continuation is not None
        assert kept.continuation.strip() == found["answer"]["text"] and QUESTION in kept.prompt
        assert all(one["text"] in kept.prompt for one in found["evidence"])
        reader = asker.loaded.pipeline.reader
        assert isinstance(reader, LmReader) and kept.prompt.endswith(reader.prompt.text(QUESTION)[-len(QUESTION) :])
    service.asker = before


def test_marks_become_examples_of_a_prompt_in_use(world: World, tmp_path: Path) -> None:
    """Those with a prompt, each once; of an answer the last mark."""
    engine = LocalEngine(load_backbone(str(world.lm), "causal", device="cpu", dtype="float32"))
    prompt = PromptInUse.create(tmp_path / "users/alice/news", engine, engine.embed([5, 6]))
    marks = Marks(tmp_path)
    marks.add("alice", MARK, is_right=False)
    marks.add("alice", replace(MARK, ask="ask-2", prompt=None, continuation=None), is_right=True)
    assert hand_over(marks.of("alice"), prompt) == 1 and hand_over(marks.of("alice"), prompt) == 0
    marks.add("alice", MARK, is_right=True)
    assert hand_over(marks.of("alice"), prompt) == 1
    (kept,) = prompt.marks()
    assert (kept.text, kept.answer, kept.is_right, kept.version) == ("who? Answer:", " Ann", True, 1)


def test_nobody_marks_anothers_answer(service: Service, url: str, tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    headers = {user: {"Authorization": f"Bearer {keys.make(user)}"} for user in ("alice", "bob")}
    before, service.keys = service.keys, keys
    try:
        assert post(url).status_code == 401
        assert httpx.get(f"{url}/").status_code == 200  # the page holds nothing
        body = {"question": QUESTION}
        found = httpx.post(f"{url}/ask", json=body, headers=headers["alice"], timeout=60).json()
        assert mark(url, found["id"], True, headers=headers["bob"]).status_code == 404
        assert mark(url, found["id"], True, headers=headers["alice"]).status_code == 200
        assert service.asker is not None
        assert len(service.asker.marks.of("alice")) == 1 and service.asker.marks.of("bob") == []
    finally:
        service.keys = before


MARK = Mark("ask-1", "hash", "who?", "Ann", ("1", "2"), "who? Answer:", " Ann")


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path: Path) -> None:
    marks = Marks(tmp_path)
    marks.add("alice", MARK, is_right=True)
    file = tmp_path / "marks/alice.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + b'{"ask": "ask-2", "quest')
    assert [one.ask for one in marks.of("alice")] == ["ask-1"]
    made = marks.add("alice", replace(MARK, ask="ask-3"), is_right=False)
    assert file.read_bytes().startswith(whole) and [one.ask for one in marks.of("alice")] == ["ask-1", "ask-3"]
    assert marks.of("alice")[1] == made


def test_a_damaged_line_and_a_full_file_are_clear_errors(tmp_path: Path) -> None:
    marks = Marks(tmp_path, most_bytes=300)
    marks.add("alice", MARK, is_right=True)
    with pytest.raises(ApiError, match="there is no room for more"):
        marks.add("alice", replace(MARK, ask="ask-2"), is_right=True)
    with (tmp_path / "marks/alice.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"ask": 1}\n')
    with pytest.raises(DataError, match=r"alice\.jsonl:2: not a mark"):
        marks.of("alice")


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_whole_and_loads_nothing_from_elsewhere(url: str) -> None:
    files = {name: httpx.get(f"{url}/{name}") for name in ("", "page.css", "page.js")}
    for response in files.values():
        policy = response.headers["content-security-policy"]
        assert response.status_code == 200 and "default-src 'none'" in policy and "unsafe" not in policy
        assert "script-src 'self'" in policy and "require-trusted-types-for 'script'" in policy
        assert "http://" not in response.text and "https://" not in response.text
    page, script = files[""].text, files["page.js"].text
    assert not re.search(r"\sstyle=|<style|\son\w+=|javascript:", page)
    assert page.count("<script") == 1 and "--accent" in files["page.css"].text
    for maker in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
        assert maker not in script
