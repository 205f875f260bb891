"""A reader behind a server: a language model that speaks OpenAI's protocol, by completions or as a chat.

The same prompts, demonstrations and answer rules as the reader that runs a model itself (`odqa.read.prompts`), and the
same way to join windows (`odqa.read.generated`). The frozen model is the server's: which weights it has nobody here can
prove, so the name that it answers to is noted for every question, with the tokens that it counted.

Prices: the packer needs them before the server counts. They are those of a tokenizer at hand, or an estimate that the
recipe names (`ByteEstimate`); pieces of a prompt are counted apart, so that prices add up exactly. The server tokenises
the whole text by itself and may count a few tokens less or more (GPT-2's vocabulary one more for each passage); both
numbers are in the trace. A text such as `</s>` in a passage goes to the server as it is.

It knows no streams, no tools, and no gold answer. How servers fail is the business of `odqa.read.endpoint`.
"""

import math
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Protocol

from odqa.artifacts import sha256_json
from odqa.errors import DataError, RecipeError
from odqa.models import embedded_folder
from odqa.read.endpoint import Endpoint
from odqa.read.generated import Generation, join_windows
from odqa.read.prompts import AnswerRules, ChooseDemonstrations, Demonstration, Prompt, PromptTemplate, find_template
from odqa.read.prompts import last_message as unrendered
from odqa.runtime import progress
from odqa.text import normalize_answer
from odqa.types import Answer, Hit, PackedContext, Query, TokenCosts

_FRAMES = 256  # our choice: prices of frames (prompts without passages) kept
_STOPS = 4  # how many stop strings OpenAI's protocol takes

Logprobs = Literal["auto", "required", "none"]


class CountsTokens(Protocol):
    """What a text costs, by a rule that has a name."""

    @property
    def identity(self) -> str:
        """Equal for equal rules."""
        ...

    @property
    def added(self) -> int:
        """Tokens that are put around a whole text."""
        ...

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself."""
        ...


class LocalTokenizer:
    """Counts with a tokenizer of `transformers`, by folder, hub name or embedded name: best the server model's own.

    Raises DataError for one that is not there.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(embedded_folder(name) or name)
        except (OSError, ValueError) as error:
            raise DataError(f"tokenizer {name!r} does not load: {str(error).splitlines()[0]}") from error
        self.added = int(self._tokenizer.num_special_tokens_to_add())

    @property
    def identity(self) -> str:
        return sha256_json([type(self._tokenizer).__name__, sorted(self._tokenizer.get_vocab().items())])

    def count(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself; the text of a special token is text."""
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True, verbose=False)
        return [len(ids) for ids in encoded["input_ids"]]


class ByteEstimate:
    """An estimate for models whose tokenizer is not at hand: a token for every `bytes_per_token` bytes of UTF-8.

    Rounded up for each piece. Bytes and not characters, because the vocabularies of current models fall back to bytes:
    scripts that they know badly cost up to a token a byte. Wikipedia's English has 4.4 to 4.5 bytes a token in OpenAI's
    vocabularies, and fewer than 3 in under 1 % of passages.
    """

    added = 1  # a beginning-of-text token, which most models have

    def __init__(self, bytes_per_token: float) -> None:
        self.bytes_per_token = bytes_per_token

    @property
    def identity(self) -> str:
        return f"{self.bytes_per_token:g} bytes a token"

    def count(self, texts: Sequence[str]) -> list[int]:
        """Estimated tokens of each text by itself."""
        return [math.ceil(len(text.encode("utf-8", "surrogatepass")) / self.bytes_per_token) for text in texts]


@dataclass(frozen=True, slots=True)
class Written:
    """One text of a reply, what ended it, and its tokens with their log-probabilities if the server gives any."""

    raw: str
    finish: str
    tokens: tuple[tuple[str, float], ...] | None


@dataclass(frozen=True, slots=True)
class Reply:
    """A server's reply: its texts, the name of its model, and the tokens that it counted (None: it did not say)."""

    texts: tuple[Written, ...]
    model: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class ApiReader:
    """Asks a server for an answer to each window of each question; see the module, and `LmReader` for windows.

    Prompt: `prompt` and `demonstrations` as `LmReader`'s. With `chat` they go out as a conversation that the server
    renders: demonstrations are turns before the last message. `message_tokens` is charged for each message, and once
    for the reply that begins, beside the words (without `chat`: nothing); chat templates put 3 to 8 tokens around a
    message, and some a system message of 20 before all.

    Window: `window` tokens, the server's, shared with the answer (`max_new_tokens`).

    Decoding: greedy (`temperature` 0), or `samples` texts a window at a `temperature`, with `top_p` and `seed` if the
    server heeds them. `options` are put into every request as they are; None takes a field out.

    Score: with log-probabilities ("auto": if the server gives them; "required": or an error; "none": not asked for)
    that of the best text in nats, summed over its tokens, as `LmReader`'s. Without, P(answer) is the share of texts,
    over windows and samples, that say it (self-consistency: Wang et al. 2022, arXiv 2203.11171). Of a single text
    there is no share to take: score and log-probability are then NaN, unknown.

    `send_stop` tells the server the first four of the `rules`' stop strings, so that nobody pays for what comes behind;
    a text that begins with one is then empty, and abstains. A refusal (no content) abstains as well. `concurrency`
    requests are under way at once, at most; equal ones are asked once.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        tokens: CountsTokens,
        prompt: PromptTemplate | str = "open-book",
        *,
        window: int,
        chat: bool = True,
        demonstrations: Sequence[Demonstration] | ChooseDemonstrations = (),
        message_tokens: int = 16,
        max_new_tokens: int = 32,
        samples: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        logprobs: Logprobs = "auto",
        spelling: Literal["model", "passage"] = "model",
        rules: AnswerRules | None = None,
        send_stop: bool = True,
        options: Mapping[str, Any] | None = None,
        concurrency: int = 8,
    ) -> None:
        if samples > 1 and temperature == 0:
            raise RecipeError(f"reader api: {samples} samples at temperature 0 are all the same. Set a temperature.")
        self.limit = window - max_new_tokens
        """The longest prompt in tokens."""
        if self.limit < 1:
            raise RecipeError(
                f"reader api: max_new_tokens {max_new_tokens} leave no room for a prompt in a window of {window}."
            )
        self.endpoint, self.model, self.tokens, self.chat = endpoint, model, tokens, chat
        template = find_template(prompt) if isinstance(prompt, str) else prompt
        shown = demonstrations if callable(demonstrations) else tuple(demonstrations)
        self.prompt = Prompt(template, shown, unrendered if chat else None)
        self.rules = AnswerRules() if rules is None else rules
        self.message_tokens, self.samples, self.logprobs = message_tokens, samples, logprobs
        self.spelling, self.concurrency = spelling, concurrency
        stop = list(self.rules.stop[:_STOPS]) if send_stop else []
        given = {"model": model, "max_tokens": max_new_tokens, "temperature": temperature, "n": samples, "seed": seed}
        given |= {"top_p": top_p, "stop": stop, "logprobs": None if logprobs == "none" else True if chat else 1}
        # Servers know different parts of the protocol: what says nothing new is not sent.
        idle: Mapping[str, object] = {"n": 1, "seed": None, "top_p": 1.0, "stop": [], "logprobs": None}
        sent = {name: value for name, value in given.items() if name not in idle or value != idle[name]}
        self._request = {name: value for name, value in (sent | dict(options or {})).items() if value is not None}
        self._prompt_tokens = self._completion_tokens = 0
        self._lock = threading.Lock()
        # A packer asks for prices several times a question; demonstrations are long.
        self._frame = lru_cache(maxsize=_FRAMES)(self._price_frame)

    @property
    def identity(self) -> str:
        """What can be known of the reader's content: server, model, and the rule that prices are made by."""
        return sha256_json([self.endpoint.base_url, self.model, self.tokens.identity])

    def costs(self, query: Query, hits: Sequence[Hit]) -> TokenCosts:
        """Prices by the tokenizer at hand or the estimate; None for a passage that does not fit beside the question.

        Raises DataError if the question alone does not fit the window, RecipeError if the prompt reads no passages.
        """
        frame = self._frame(query.text)
        if frame > self.limit:
            raise DataError(
                f"query {query.id}: the question takes {frame} tokens with its prompt; reader.window leaves room for "
                f"{self.limit}. Shorten the question or the demonstrations."
            )
        own = self.tokens.count([self.prompt.passage(hit.passage).text for hit in hits])
        return TokenCosts(frame, tuple(n if frame + n <= self.limit else None for n in own), self.limit)

    def show(self, hits: Sequence[Hit]) -> str:
        """Packed passages as the prompt words them."""
        return "".join(self.prompt.passage(hit.passage).text for hit in hits).rstrip()

    def read(self, contexts: Sequence[PackedContext]) -> list[Answer]:
        """One answer a context. Raises ServerError, and ValueError for a context that was packed for another prompt."""
        return [answer for answer, _ in self.read_with_notes(contexts)]

    def read_with_notes(self, contexts: Sequence[PackedContext]) -> list[tuple[Answer, Mapping[str, object]]]:
        """`read`, with what belongs into the trace: the model's name, the tokens the server counted, where it ended."""
        requests = [[self._ask_for(context.query, hits) for hits in self._windows(context)] for context in contexts]
        replies = self._ask([request for of_context in requests for request in of_context])
        found: list[tuple[Answer, Mapping[str, object]]] = []
        for context, of_context in zip(contexts, requests, strict=True):
            said = [replies[sha256_json(request)] for request in of_context]
            found.append((self._answer(context, said), self._notes(said)))
        return found

    def spent(self) -> Mapping[str, int]:
        """Since the start: requests, replies from the cache, further tries, and the tokens of what was really asked."""
        counts = self.endpoint.counts
        return {
            "requests": counts.requests,
            "from_cache": counts.from_cache,
            "retries": counts.retries,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
        }

    # --- requests ---

    def _price_frame(self, question: str) -> int:
        """What a prompt costs without passages."""
        pieces = [piece.text for piece in [*self.prompt.before(question), *self.prompt.after(question)]]
        if not self.chat:
            return sum(self.tokens.count(pieces)) + self.tokens.added
        earlier = [message["content"] for message in self.prompt.turns(question)]
        messages = len(earlier) + 2  # the question, and the reply that begins
        return sum(self.tokens.count([*earlier, *pieces])) + messages * self.message_tokens

    def _windows(self, context: PackedContext) -> list[tuple[Hit, ...]]:
        """The passages of each window, whose prices are checked."""
        windows = context.by_window()
        priced = [self.costs(context.query, hits) for hits in windows]
        total = sum(costs.fixed + sum(price or 0 for price in costs.passages) for costs in priced)
        if total != context.tokens:
            raise ValueError(
                f"query {context.query.id}: the context says {context.tokens} tokens, by this reader's prices it has "
                f"{total}. Pack it with the costs of this reader."
            )
        return windows

    def _ask_for(self, query: Query, hits: Sequence[Hit]) -> dict[str, Any]:
        """The request for one window."""
        passages = [hit.passage for hit in hits]
        if self.chat:
            return {**self._request, "messages": self.prompt.messages(query.text, passages)}
        return {**self._request, "prompt": self.prompt.text(query.text, passages)}

    def _ask(self, requests: Sequence[dict[str, Any]]) -> dict[str, Reply]:
        """The replies by the hash of their request. The first error ends it; what was answered by then is kept."""
        wanted = {sha256_json(request): request for request in requests}
        path = "/chat/completions" if self.chat else "/completions"
        replies: dict[str, Reply] = {}
        has_failed = threading.Event()
        with progress("read", len(wanted), "requests") as bar:

            def ask(name: str) -> None:
                if has_failed.is_set():
                    return  # a reply that nobody waits for costs as much as one that is read
                try:
                    reply, is_known = self.endpoint.ask(path, wanted[name], self._parse)
                except BaseException:
                    has_failed.set()
                    raise
                with self._lock:
                    replies[name] = reply
                    self._prompt_tokens += 0 if is_known else reply.prompt_tokens or 0
                    self._completion_tokens += 0 if is_known else reply.completion_tokens or 0
                    bar.advance()

            with ThreadPoolExecutor(self.concurrency) as pool:
                futures = [pool.submit(ask, name) for name in wanted]
                try:
                    for future in futures:
                        future.result()
                finally:
                    has_failed.set()  # also where it was interrupted from outside
        return replies

    def _parse(self, found: Any) -> Reply:
        """Raises ValueError with what is wrong about a reply."""
        reply = parse_reply(found, chat=self.chat)
        if len(reply.texts) != self.samples:
            raise ValueError(
                f"the reply has {len(reply.texts)} texts, {self.samples} were asked for. Of a server that ignores n "
                "take one: set reader.samples: 1."
            )
        if self.logprobs == "required" and any(text.tokens is None for text in reply.texts):
            raise ValueError("the reply has no log-probabilities. Set reader.logprobs: auto to go on without.")
        return reply

    # --- answers ---

    def _answer(self, context: PackedContext, replies: Sequence[Reply]) -> Answer:
        texts = [text for reply in replies for text in reply.texts]
        is_scored = all(text.tokens is not None for text in texts)
        rank = self._by_logprob if is_scored else self._by_share
        windows = [rank(reply) for reply in replies]
        answer = join_windows(context, windows, read=context.by_window(), spelling=self.spelling)
        if is_scored or len(texts) > 1:
            return answer
        unknown = tuple(replace(candidate, logprob=math.nan) for candidate in answer.candidates)
        return replace(answer, score=math.nan, candidates=unknown)

    def _by_logprob(self, reply: Reply) -> list[Generation]:
        """The texts of a window, the likeliest first."""
        return sorted((self._generation(text) for text in reply.texts), key=lambda generation: -generation.logprob)

    def _by_share(self, reply: Reply) -> list[Generation]:
        """The different texts of a window, the most frequent first, with the log of their share."""
        written = [self._generation(replace(text, tokens=None)) for text in reply.texts]
        keys = [normalize_answer(generation.text) or generation.text for generation in written]
        first = dict(zip(reversed(keys), reversed(written), strict=True))
        return [replace(first[key], logprob=math.log(count / len(keys))) for key, count in Counter(keys).most_common()]

    def _generation(self, text: Written) -> Generation:
        """A text as the rules end and clean it; its tokens are counted up to there, as those of `LmReader`."""
        found = self.rules.find_stop(text.raw)
        stop = found[1] if found else "max_new_tokens" if text.finish == "length" else "end of text"
        logprob, count, so_far = 0.0, 0, ""
        for token, value in text.tokens or ():
            logprob, count, so_far = logprob + value, count + 1, so_far + token
            if self.rules.find_stop(so_far):
                break
        return Generation(self.rules.clean(text.raw), text.raw, stop, count, logprob)

    def _notes(self, replies: Sequence[Reply]) -> dict[str, object]:
        texts = [text for reply in replies for text in reply.texts]
        is_scored = all(text.tokens is not None for text in texts)
        return {
            "model": ", ".join(dict.fromkeys(reply.model or "unnamed" for reply in replies)),
            "requests": len(replies),
            "prompt_tokens": _total(reply.prompt_tokens for reply in replies),
            "completion_tokens": _total(reply.completion_tokens for reply in replies),
            "finish": [text.finish for text in texts],
            "score": "log-probability" if is_scored else "share of texts" if len(texts) > 1 else "unknown",
        }


def parse_reply(found: Any, *, chat: bool) -> Reply:
    """A reply of /chat/completions (`chat`) or /completions. Raises ValueError, saying what was found and expected."""
    if not isinstance(found, dict) or not isinstance(found.get("choices"), list) or not found["choices"]:
        told = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"the reply has no choices (found: {told}). Is this a server of OpenAI's protocol?")
    try:
        choices = sorted(found["choices"], key=lambda choice: choice.get("index") or 0)
        texts = tuple((_of_chat if chat else _of_completion)(choice) for choice in choices)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        form = "choices[].message.content" if chat else "choices[].text"
        raise ValueError(f"the reply is not of the form {form} ({error!r}). Check reader.endpoint.") from None
    usage = found.get("usage")
    counted = usage if isinstance(usage, dict) else {}
    model = found.get("model")
    return Reply(
        texts,
        model if isinstance(model, str) else None,
        _whole(counted.get("prompt_tokens")),
        _whole(counted.get("completion_tokens")),
    )


def _of_chat(choice: Any) -> Written:
    content = choice["message"]["content"]
    scored = (choice.get("logprobs") or {}).get("content")
    tokens = None if scored is None else _scored((one["token"], one["logprob"]) for one in scored)
    if content is not None and not isinstance(content, str):
        raise TypeError(f"content is {type(content).__name__}")
    return Written(content or "", str(choice.get("finish_reason")), tokens)


def _of_completion(choice: Any) -> Written:
    found = choice.get("logprobs") or {}
    words, values = found.get("tokens"), found.get("token_logprobs")
    tokens = None if words is None or values is None else _scored(zip(words, values, strict=True))
    if not isinstance(choice["text"], str):
        raise TypeError(f"text is {type(choice['text']).__name__}")
    return Written(choice["text"], str(choice.get("finish_reason")), tokens)


def _scored(pairs: Iterable[tuple[Any, Any]]) -> tuple[tuple[str, float], ...]:
    tokens = tuple((str(token), float(value)) for token, value in pairs)
    if not all(math.isfinite(value) and value <= 1e-6 for _, value in tokens):  # 1e-6: rounded in the server
        raise ValueError("a log-probability is not a number below 0")
    return tokens


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _total(counts: Iterable[int | None]) -> int | None:
    """The sum, or None if one is not known."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)
