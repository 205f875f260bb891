"""The reader behind a server, against a local one that speaks the protocol: answers, prices, failures, and the key."""

import json
import math
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest

from odqa import jobs
from odqa.errors import DataError, RecipeError, ServerError
from odqa.pack import GreedyPacker
from odqa.read.api import ApiReader, ByteEstimate, LocalTokenizer, parse_reply
from odqa.read.endpoint import FIRST_PAUSE, Endpoint, Secret
from odqa.read.prompts import TEMPLATES, Demonstration, Prompt
from odqa.recipes import Places, load_recipe
from odqa.report import confidence
from odqa.types import Answer, PackedContext, Passage, Query
from tests.api_server import Body, Says, Server, first_word, serving
from tests.command_line import odqa, ok
from tests.small_world import write_jsonl, write_yaml
from tests.tiny_models import tiny_llama
from tests.unit.conformance_read import HITS, QUERIES, ReaderConformance

KEY = 'sk-live-4711-"secret"'  # a quotation mark: JSON writes it otherwise


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


class Pauses(list[float]):
    """Stands for `time.sleep`."""

    def __call__(self, seconds: float) -> None:
        self.append(seconds)


def endpoint(server: Server, **settings: Any) -> Endpoint:
    return Endpoint(server.url, **{"sleep": Pauses(), "chance": lambda: 1.0, "timeout": 5.0, **settings})


def make(server: Server, *, settings: dict[str, Any] | None = None, **options: Any) -> ApiReader:
    asked = endpoint(server, **(settings or {}))
    return ApiReader(asked, "small", ByteEstimate(3.0), **{"window": 2000, "chat": False, **options})


def pack(reader: ApiReader, budget: int = 400, windows: int = 1) -> list[PackedContext]:
    return GreedyPacker(reader, budget, windows=windows).pack(QUERIES, HITS)


def read_one(reader: ApiReader) -> Answer:
    return reader.read(pack(reader)[:1])[0]


class TestCompletions(ReaderConformance):
    chat = False

    @pytest.fixture(scope="class")
    def reader(self) -> Iterator[ApiReader]:
        with serving() as running:
            yield make(running, chat=self.chat)

    @pytest.fixture(scope="class")
    def contexts(self, reader: ApiReader) -> list[PackedContext]:
        return pack(reader)


class TestChat(TestCompletions):
    chat = True


# --- what is asked, and what becomes of it ----------------------------------------------------------------------------


def test_a_completion_is_asked_for_with_the_prompt_of_the_lm_reader(server: Server) -> None:
    reader = make(server)
    (context,) = pack(reader)[:1]
    reader.read([context])
    ((path, headers, asked),) = server.heard
    passages = [hit.passage for hit in context.hits]
    assert path == "/v1/completions" and "Authorization" not in headers
    assert asked == {
        "model": "small",
        "prompt": Prompt(TEMPLATES["open-book"]).text(QUERIES[0].text, passages),
        "max_tokens": 32,
        "temperature": 0.0,
        "stop": ["\n", "Question:"],
        "logprobs": 1,
    }


def test_a_chat_has_demonstrations_as_turns_and_the_passages_in_the_last_message(server: Server) -> None:
    shown = Demonstration("who wrote it", "a king", Passage("d", "the book of a king"))
    reader = make(server, chat=True, demonstrations=[shown], samples=2, temperature=0.5, top_p=0.9, seed=7)
    (context,) = pack(reader)[:1]
    reader.read([context])
    ((path, _, asked),) = server.heard
    first, answer, last = asked.pop("messages")
    assert path == "/v1/chat/completions"
    assert (first["role"], answer["role"], last["role"]) == ("user", "assistant", "user")
    assert (
        first["content"].startswith("Answer the question in a few words") and "the book of a king" in first["content"]
    )
    assert answer["content"] == "a king" and "Answer the question" not in last["content"]
    assert all(hit.passage.text in last["content"] for hit in context.hits)
    assert last["content"].endswith(f"Question: {QUERIES[0].text}")
    assert asked["n"] == 2 and asked["top_p"] == 0.9 and asked["seed"] == 7 and asked["logprobs"] is True


def test_options_replace_fields_of_the_request_and_null_takes_one_out(server: Server) -> None:
    read_one(make(server, options={"max_tokens": None, "max_completion_tokens": 99}, send_stop=False, logprobs="none"))
    assert server.heard[0][2].keys() == {"model", "prompt", "temperature", "max_completion_tokens"}


@pytest.mark.parametrize("chat", [False, True])
def test_the_score_is_the_sum_of_the_log_probabilities_up_to_the_end_of_the_answer(server: Server, chat: bool) -> None:
    server.text_of = lambda asked: "Paris of \nFrance and more"
    answer = read_one(make(server, chat=chat, send_stop=False))
    # tokens "Paris ", "of ", "\nFrance ": the third ends it
    assert answer.text == "Paris of" and answer.score == pytest.approx(-1.5)
    assert [(c.text, c.logprob) for c in answer.candidates] == [("Paris of", pytest.approx(-1.5))]


def test_without_log_probabilities_the_score_of_a_single_text_is_unknown(server: Server) -> None:
    server.gives_logprobs = False
    reader = make(server)
    ((answer, notes),) = reader.read_with_notes(pack(reader)[:1])
    assert answer.text == "what" and math.isnan(answer.score) and math.isnan(answer.candidates[0].logprob)
    assert notes["score"] == "unknown" and confidence(answer) == "confidence unknown"


def test_without_log_probabilities_samples_vote() -> None:
    texts = iter(["Rome", "the Paris", "paris", "London"])
    reply = {"choices": [{"text": next(texts), "index": number} for number in range(4)]}
    with serving() as server:
        server.script = [Says(200, reply)]
        reader = make(server, samples=4, temperature=1.0)
        ((answer, notes),) = reader.read_with_notes(pack(reader)[:1])
    assert answer.text == "the Paris" and answer.score == pytest.approx(math.log(2 / 4))
    assert [c.text for c in answer.candidates] == ["the Paris", "Rome", "London"]
    assert notes["score"] == "share of texts" and notes["prompt_tokens"] is None


def test_windows_are_asked_apart_and_their_probabilities_averaged(server: Server) -> None:
    server.text_of = lambda asked: "Paris" if "paris is the capital" in asked["prompt"] else "Rome now"
    reader = make(server)
    (context,) = pack(reader, 220, windows=2)[:1]
    assert len(context.by_window()) == 2
    ((answer, notes),) = reader.read_with_notes([context])
    # P(Paris) = e^-0.5 / 2, P(Rome now) = e^-1 / 2
    assert answer.text == "Paris" and answer.score == pytest.approx(-0.5 - math.log(2))
    assert [c.logprob for c in answer.candidates] == pytest.approx([-0.5 - math.log(2), -1 - math.log(2)])
    assert notes["requests"] == 2 and notes["completion_tokens"] == 3


def test_likelier_samples_come_first(server: Server) -> None:
    scored = {"Rome": -2.0, "Paris": -0.25}
    choices = [
        {"text": text, "index": n, "finish_reason": "length", "logprobs": {"tokens": [text], "token_logprobs": [value]}}
        for n, (text, value) in enumerate(scored.items())
    ]
    server.script = [Says(200, {"choices": choices})]
    answer = read_one(make(server, samples=2, temperature=1.0))
    assert answer.text == "Paris" and answer.score == -0.25
    assert [c.text for c in answer.candidates] == ["Paris", "Rome"]


@pytest.mark.parametrize("content", ["unanswerable", "", None])
def test_a_refusal_and_the_word_for_it_abstain(server: Server, content: str | None) -> None:
    message = {"role": "assistant", "content": content, "refusal": "no"}
    server.script = [Says(200, {"choices": [{"message": message, "finish_reason": "stop"}]})]
    answer = read_one(make(server, chat=True))
    assert answer.text == "" and answer.candidates == ()


def test_notes_have_what_the_server_counted(server: Server) -> None:
    reader = make(server)
    contexts = pack(reader)
    found = reader.read_with_notes(contexts)
    for (_, notes), context, (_, _, asked) in zip(found, contexts, sorted_as(contexts, server), strict=True):
        assert notes == {
            "model": "small-0425",
            "requests": 1,
            "prompt_tokens": len(asked["prompt"].split()),
            "completion_tokens": 1,
            "finish": ["stop"],
            "score": "log-probability",
        }
        assert isinstance(notes["prompt_tokens"], int) and notes["prompt_tokens"] <= context.tokens
    total = sum(len(asked["prompt"].split()) for _, _, asked in server.heard)
    spent = {"requests": 3, "from_cache": 0, "retries": 0, "prompt_tokens": total, "completion_tokens": 3}
    assert reader.spent() == spent


def sorted_as(contexts: list[PackedContext], server: Server) -> list[tuple[str, dict[str, str], Body]]:
    """What the server heard, in the order of the contexts; threads may have changed it."""
    return [next(one for one in server.heard if c.query.text in one[2]["prompt"]) for c in contexts]


def test_no_more_requests_than_allowed_are_under_way_and_equal_ones_are_asked_once() -> None:
    with serving() as server:
        server.delay = 0.05
        reader = make(server, concurrency=3)
        contexts = [
            GreedyPacker(reader, 200).pack([Query(str(number), f"{number % 9} who was king")], [[]])[0]
            for number in range(18)
        ]
        answers = reader.read(contexts)
        assert [answer.text for answer in answers] == [str(number % 9) for number in range(18)]
        assert server.most_at_once == 3 and len(server.heard) == 9


# --- prices -----------------------------------------------------------------------------------------------------------


def test_the_estimate_counts_bytes_and_rounds_up() -> None:
    # 6 bytes / 3; 4 bytes / 3 -> 2; three CJK characters of 3 bytes each / 3
    assert ByteEstimate(3.0).count(["rivers", "Rome", "北京市", ""]) == [2, 2, 3, 0]
    assert ByteEstimate(3.0).identity == "3 bytes a token"


def test_a_local_tokenizer_prices_what_the_model_of_that_tokenizer_would_read(tmp_path: Path, server: Server) -> None:
    tokens = LocalTokenizer(str(tiny_llama(tmp_path / "llama")))
    reader = ApiReader(endpoint(server), "small", tokens, window=4000, chat=False)
    (context,) = pack(reader, 2000)[:1]
    reader.read([context])
    whole = len(tokens._tokenizer(server.heard[0][2]["prompt"])["input_ids"])  # with <s>
    # Pieces apart cost at most a token more at each of their seams; the tiny vocabulary has merges across none.
    assert whole <= context.tokens <= whole + len(context.hits) + 2
    assert tokens.count(["</s>"]) != [1] and tokens.count([]) == []
    other = LocalTokenizer(str(tiny_llama(tmp_path / "again", seed=1)))
    assert tokens.identity == other.identity  # the weights are none of its business


def test_a_chat_pays_for_each_message_beside_its_words(server: Server) -> None:
    shown = [Demonstration("who", "x")]
    with_none, with_ten = (
        make(server, chat=True, demonstrations=shown, message_tokens=n).costs(QUERIES[0], HITS[0]) for n in (0, 10)
    )
    assert with_ten.fixed - with_none.fixed == 40  # two turns, the question, the reply that begins
    assert with_ten.passages == with_none.passages


def test_a_missing_tokenizer_is_one_error() -> None:
    with pytest.raises(DataError, match="tokenizer 'nowhere/none' does not load"):
        LocalTokenizer("nowhere/none")


def test_a_context_of_other_prices_is_refused(server: Server) -> None:
    context = pack(make(server))[0]
    other = ApiReader(endpoint(server), "small", ByteEstimate(2.0), window=2000, chat=False)
    with pytest.raises(ValueError, match="by this reader's prices"):
        other.read([context])


# --- failures that pass -----------------------------------------------------------------------------------------------


def test_429_then_an_answer_waits_as_long_as_the_server_asks(server: Server) -> None:
    pauses = Pauses()
    server.script = [Says(429, {"error": {"message": "slow down"}}, {"Retry-After": "7"}), Says(503, "busy")]
    reader = make(server, settings={"sleep": pauses, "chance": lambda: 0.5})
    assert read_one(reader).text == "what"
    assert pauses == [7.0, FIRST_PAUSE]  # then half of twice the first pause
    assert reader.spent()["retries"] == 2 and reader.spent()["requests"] == 1


def test_a_date_in_retry_after_is_heeded(server: Server) -> None:
    import time

    pauses = Pauses()
    server.script = [Says(503, "", {"Retry-After": formatdate(time.time() + 20, usegmt=True)})]
    read_one(make(server, settings={"sleep": pauses}))
    assert 15 < pauses[0] <= 20


def test_pauses_double_up_to_the_longest_and_jitter_shortens_them(server: Server) -> None:
    pauses = Pauses()
    server.script = [Says(500, "oops")] * 5
    read_one(make(server, settings={"sleep": pauses, "longest_wait": 5.0, "chance": lambda: 0.25}))
    assert pauses == [0.25, 0.5, 1.0, 1.25, 1.25]


def test_500s_without_end_are_one_error_that_says_how_often(server: Server) -> None:
    server.script = [Says(500, {"error": {"message": "out of memory"}})] * 9
    with pytest.raises(ServerError) as caught:
        read_one(make(server, settings={"retries": 2}))
    assert len(server.heard) == 3
    assert str(caught.value) == (
        f"{server.url}/completions: HTTP 500: out of memory (3 times in a row). What was answered is kept: run again "
        "later, raise reader.timeout, or lower reader.concurrency."
    )


def test_a_wait_that_is_too_long_is_an_error(server: Server) -> None:
    server.script = [Says(429, "", {"Retry-After": "3600"})]
    with pytest.raises(ServerError, match=r"HTTP 429; the server asks to wait 3600 s, more than reader.longest_wait"):
        read_one(make(server))
    assert len(server.heard) == 1


def test_an_account_without_money_is_not_asked_again(server: Server) -> None:
    error = {"message": "You exceeded your current quota.", "code": "insufficient_quota"}
    server.script = [Says(429, {"error": error})]
    with pytest.raises(ServerError, match=r"HTTP 429: You exceeded your current quota\.$"):
        read_one(make(server))
    assert len(server.heard) == 1


def test_a_body_that_drips_in_ends_with_the_time_out(server: Server) -> None:
    server.script = [Says(200, "x" * 500, drip=0.02)] * 2
    with pytest.raises(ServerError, match=r"no whole reply within 0\.3 s \(2 times in a row\)"):
        read_one(make(server, settings={"timeout": 0.3, "retries": 1}))


def test_a_silent_server_ends_with_the_time_out_and_a_broken_connection_is_tried_again(server: Server) -> None:
    server.script = [Says(200, "x" * 50, cut=10)]
    reader = make(server, settings={"timeout": 5.0, "retries": 1})
    assert read_one(reader).text == "what" and reader.spent()["retries"] == 1
    server.delay = 1.0
    with pytest.raises(ServerError, match=r"no whole reply within 0\.2 s \(once, and reader.retries is 0\)"):
        read_one(make(server, settings={"timeout": 0.2, "retries": 0}))


def test_a_server_that_is_not_there_is_one_error() -> None:
    with serving() as gone:
        pass
    with pytest.raises(ServerError, match=r"/v1/completions: no reply \(.*refused.*\) \(2 times in a row\)"):
        read_one(make(gone, settings={"retries": 1}))


# --- failures that stay -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        (Says(200, "<html>hello"), "the reply is not JSON ('<html>hello'). Check reader.base_url; it usually ends in"),
        (Says(200, '{"choices": [{"te'), "the reply is not JSON"),
        (Says(200, "[]"), "the reply has no choices (found: list)"),
        (Says(200, {"object": "error", "choices": []}), "the reply has no choices (found: object, choices)"),
        (Says(200, {"choices": [{"message": {"content": "x"}}]}), "not of the form choices[].text (KeyError('text'))"),
        (Says(200, {"choices": [{"text": 5}]}), "not of the form choices[].text"),
        (Says(200, {"choices": [None]}), "not of the form choices[].text"),
        (Says(200, {"choices": [{"text": "x"}, {"text": "y"}]}), "the reply has 2 texts, 1 were asked for"),
        (Says(400, {"detail": "no logprobs here"}), "HTTP 400: no logprobs here. Check reader.options"),
        (Says(404, {"detail": "Not Found"}), "HTTP 404: Not Found. Check reader.model (small), reader.endpoint"),
        (Says(401, {"error": {"message": f"wrong key: {KEY}"}}), "the server refuses no key (reader.key_variable)"),
        (Says(302, "", {"Location": "http://127.0.0.1:9/v1"}), "HTTP 302: the server points elsewhere"),
    ],
)  # fmt: skip
def test_a_wrong_reply_is_one_clear_error_and_is_not_asked_for_again(
    server: Server, tmp_path: Path, says: Says, expected: str
) -> None:
    server.script = [says]
    with pytest.raises(ServerError) as caught:
        read_one(make(server, settings={"cache": tmp_path / "cache"}))
    assert expected in str(caught.value) and str(caught.value).startswith(f"{server.url}/completions: ")
    assert "\n" not in str(caught.value) and len(server.heard) == 1
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("value", [float("nan"), 0.5, "high", None])
def test_a_log_probability_that_is_none_is_an_error(value: object) -> None:
    scored = {"tokens": ["x"], "token_logprobs": [value]}
    with pytest.raises(ValueError, match="not of the form"):
        parse_reply({"choices": [{"text": "x", "logprobs": scored}]}, chat=False)


def test_a_model_that_is_not_served_is_named_with_the_nearest_that_is(server: Server) -> None:
    reader = ApiReader(endpoint(server), "smal", ByteEstimate(3.0), window=2000, chat=False)
    with pytest.raises(ServerError) as caught:
        read_one(reader)
    assert str(caught.value) == (
        f"{server.url}/completions: HTTP 404: model 'smal' is not served here (small, large). Did you mean small?"
    )


def test_required_log_probabilities_that_do_not_come_are_an_error(server: Server) -> None:
    server.gives_logprobs = False
    with pytest.raises(ServerError, match=r"no log-probabilities. Set reader.logprobs: auto"):
        read_one(make(server, logprobs="required"))


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://host/v1", "https:///v1"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(RecipeError, match=r"reader.base_url is"):
        Endpoint(url)


@pytest.mark.parametrize("url", ["https://me:pw@host/v1", "https://host/v1?key=pw", "https://host/v1#pw"])
def test_a_url_with_a_secret_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Endpoint(url)
    assert "pw" not in str(caught.value)


def test_settings_that_contradict_each_other_are_refused(server: Server) -> None:
    with pytest.raises(RecipeError, match="3 samples at temperature 0 are all the same"):
        make(server, samples=3)
    with pytest.raises(RecipeError, match="leave no room for a prompt in a window of 32"):
        make(server, window=32)


# --- the cache --------------------------------------------------------------------------------------------------------


def test_an_equal_request_is_asked_once_whatever_the_key(server: Server, tmp_path: Path) -> None:
    first = make(server, settings={"cache": tmp_path, "key": Secret("A", "key-number-one")})
    answer = read_one(first)
    again = make(server, settings={"cache": tmp_path, "key": Secret("B", "key-number-two")})
    assert read_one(again) == answer and len(server.heard) == 1
    assert again.spent() == {
        "requests": 0,
        "from_cache": 1,
        "retries": 0,
        "prompt_tokens": 0,
        "completion_tokens": 0,
    }


@pytest.mark.parametrize("change", [{"max_new_tokens": 9}, {"options": {"top_k": 1}}, {"logprobs": "none"}])
def test_another_request_is_asked_again(server: Server, tmp_path: Path, change: dict[str, Any]) -> None:
    read_one(make(server, settings={"cache": tmp_path}))
    read_one(make(server, settings={"cache": tmp_path}, **change))
    assert len(server.heard) == 2


def test_what_was_answered_before_a_failure_is_kept(server: Server, tmp_path: Path) -> None:
    reader = make(server, settings={"cache": tmp_path, "retries": 0}, concurrency=1)
    contexts = pack(reader)
    server.script = [server.reply("/v1/completions", {"model": "small", "prompt": "x"}), Says(500, "")]
    with pytest.raises(ServerError):
        reader.read(contexts)
    assert len(list(tmp_path.rglob("*.json"))) == 1
    heard = len(server.heard)
    assert len(reader.read(contexts)) == 3 and len(server.heard) == heard + 2


def test_a_damaged_file_of_the_cache_is_an_error_with_its_name(server: Server, tmp_path: Path) -> None:
    read_one(make(server, settings={"cache": tmp_path}))
    (file,) = tmp_path.rglob("*.json")
    file.write_text("{")
    with pytest.raises(DataError, match=f"{file.name}: not a reply that odqa kept. Delete this file"):
        read_one(make(server, settings={"cache": tmp_path}))


# --- the key ----------------------------------------------------------------------------------------------------------


def world(folder: Path, server: Server, **reader: Any) -> Path:
    """A closed-book pipeline on the server, with questions."""
    write_jsonl(folder / "questions.jsonl", [{"id": f"q{n}", "question": f"{n} who was king"} for n in range(3)])
    settings = {"kind": "api", "base_url": server.url, "model": "small", "window": 500, "bytes_per_token": 3}
    settings |= {"prompt": "closed-book", "key_variable": "MY_KEY", "retries": 0, **reader}
    recipe = {"kind": "pipeline", "packer": {"budget": 300}, "reader": settings}
    return write_yaml(folder / "closed.yaml", recipe)


def test_a_run_sends_the_key_and_writes_it_nowhere(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.text_of = lambda asked: f"it is {KEY} indeed"  # a server that gives away what it was told
    recipe, places = world(tmp_path, server), Places(artifacts=tmp_path / "artifacts")
    run = jobs.run(recipe, str(tmp_path / "questions.jsonl"), tmp_path / "run", places=places)
    assert [headers["Authorization"] for _, headers, _ in server.heard] == [f"Bearer {KEY}"] * 3
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len([file for file in files if "api-cache" in file.parts]) == 3
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert "4711" not in text, file
    assert run.trace("q1").answer.text == "it is [MY_KEY] indeed"
    spent = run.manifest["measured"]["reader"]
    assert spent["requests"] == 3 and spent["completion_tokens"] > 0
    step = run.trace("q1").steps[-1]
    assert step.stage == "read" and step.notes["model"] == "small-0425" and step.notes["completion_tokens"] == 4


@pytest.mark.parametrize(
    "says",
    [
        Says(401, {"error": {"message": f"Incorrect API key provided: {KEY}"}}),
        Says(400, {"error": {"message": f"bad header Bearer {KEY}"}}),
        Says(500, f"panic: {KEY}"),
        Says(200, f"<html>{KEY}"),
        Says(200, {"choices": [{KEY: KEY}]}),
        Says(200, {KEY: 1}),
    ],
)
def test_no_error_shows_the_key(server: Server, says: Says) -> None:
    import traceback

    server.script = [says]
    reader = make(server, settings={"key": Secret("MY_KEY", KEY), "retries": 0})
    with pytest.raises(ServerError) as caught:
        read_one(reader)
    assert "4711" not in str(caught.value) + "".join(traceback.format_exception(caught.value))
    assert "4711" not in repr(vars(reader.endpoint))
    if says.status == 401:
        assert str(caught.value).endswith("HTTP 401: the server refuses the key in MY_KEY.")


def test_the_key_does_not_follow_a_redirection(server: Server) -> None:
    with serving() as other:
        server.script = [Says(307, "", {"Location": f"{other.url}/completions"})]
        with pytest.raises(ServerError, match="points elsewhere"):
            read_one(make(server, settings={"key": Secret("MY_KEY", KEY)}))
        assert other.heard == []


def test_a_missing_key_is_named_by_its_variable(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_KEY", raising=False)
    with pytest.raises(RecipeError, match="the environment variable MY_KEY is not set"):
        jobs.load_pipeline(world(tmp_path, server), places=Places(artifacts=tmp_path))


@pytest.mark.parametrize("value", ["two words", "line\nbreak-sk-4711", "schlüssel"])
def test_what_no_header_can_carry_is_refused_without_showing_it(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(RecipeError) as caught:
        Secret.from_environment("MY_KEY")
    assert value not in str(caught.value) and "MY_KEY" in str(caught.value)


def test_a_key_that_stands_in_the_recipe_too_is_refused(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    recipe = world(tmp_path, server, options={"user": KEY})
    with pytest.raises(RecipeError, match=r"the key of MY_KEY stands in the recipe, too") as caught:
        jobs.load_pipeline(recipe, places=Places(artifacts=tmp_path))
    assert "4711" not in str(caught.value)


def test_a_dummy_key_is_sent_and_not_looked_for_in_answers(server: Server) -> None:
    server.text_of = lambda asked: "none of them"
    reader = make(server, settings={"key": Secret("MY_KEY", "none")})
    assert read_one(reader).text == "none of them"
    assert server.heard[0][1]["Authorization"] == "Bearer none"


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("reader.bytes_per_token=null", "give either a tokenizer or bytes_per_token"),
        ("reader.tokenizer=x", "give either a tokenizer or bytes_per_token"),
        ("reader.samples=2", "2 samples at temperature 0"),
        ("reader.windw=9", "Did you mean window?"),
    ],
)
def test_a_recipe_must_name_how_tokens_are_counted(server: Server, tmp_path: Path, change: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(world(tmp_path, server), "pipeline", changes=[change])
    assert expected in str(caught.value)


def test_windows_are_for_this_reader_too_and_its_identity_is_server_model_and_prices(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    changes = ["packer.windows=2"]
    loaded = jobs.load_pipeline(world(tmp_path, server), places=Places(artifacts=tmp_path), changes=changes)
    assert loaded.ask("5 who was king").answer.text == "5"
    identities = {
        jobs._reader_identity(
            jobs.load_pipeline(world(tmp_path, server), places=Places(artifacts=tmp_path), changes=[change])
        )
        for change in ("batch=1", "reader.model=large", "reader.bytes_per_token=2", f"reader.base_url={server.url}/x")
    }
    assert len(identities) == 4


def test_a_run_goes_on_after_a_failure_and_pays_for_nothing_twice(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    recipe = world(tmp_path, server, concurrency=1)
    places, asked = Places(artifacts=tmp_path / "artifacts"), str(tmp_path / "questions.jsonl")
    ok = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}
    server.script = [Says(200, ok), Says(500, "")]
    with pytest.raises(ServerError, match="What was answered is kept"):
        jobs.run(recipe, asked, tmp_path / "run", places=places)
    finished = jobs.run(recipe, asked, tmp_path / "run", places=places)
    assert [trace.answer.text for trace in finished.traces()] == ["x", "1", "2"]
    assert len(server.heard) == 4
    record = json.loads((tmp_path / "run/answers.jsonl").read_text().splitlines()[0])
    assert record["score"] == "nan"  # that reply had no log-probabilities


def test_the_command_line_answers_and_says_a_failure_in_one_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    server.gives_logprobs = False
    recipe, common = world(tmp_path, server), ("--artifacts", tmp_path)
    answered = ok("ask", recipe, "5 who was king", *common)
    assert answered.out == "5\n" and "confidence unknown" in answered.err
    assert ok("ask", recipe, "5 who was king", "--json", *common).json["score"] == "nan"
    failed = odqa("ask", recipe, "5 who was king", *common, "--set", "reader.model=larg")
    assert failed.code == 2 and failed.out == ""
    assert failed.err == (
        f"ServerError: {server.url}/chat/completions: HTTP 404: model 'larg' is not served here (small, large). "
        "Did you mean large?\n"
    )


def test_the_servers_default_answer_is_the_first_word() -> None:
    """The fixture itself: what conformance relies on."""
    assert first_word({"prompt": "x Question: what now"}) == "what"
