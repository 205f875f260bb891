"""POST /v1/completions and /v1/chat/completions, whole or as a stream of server-sent events.

A stream ends with `data: [DONE]`. If something goes wrong after it has begun, an event with an error is its last one,
and [DONE] does not come; if the process dies, neither does the last chunk of the HTTP body. So no client takes half an
answer for a whole one.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from odqa.serve.errors import ApiError, bad
from odqa.serve.listening import ClientGone, listen
from odqa.serve.prompts import Prompt, check_known, check_rows, of_chat, of_completion, room, rows_of
from odqa.serve.scheduler import Row, Ticket
from odqa.serve.schema import ChatRequest, CompletionRequest, Writing
from odqa.serve.state import Service, note, service_of, user_of
from odqa.serve.writing import Piece, Place, Wish, Written

router = APIRouter()
User = Annotated[str, Depends(user_of)]
Served = Annotated[Service, Depends(service_of)]
Json = dict[str, Any]
News = tuple[int, "Piece | Written | Exception"]


@router.post("/v1/completions", response_model=None)
async def completions(asked: CompletionRequest, request: Request, user: User, service: Served) -> Response:
    """Go on from prompts: texts, token ids or word vectors."""
    method, moved = _method(service, user, asked.model)
    if asked.prefix_embeds is not None and method is not None:
        raise bad("prefix_embeds and an artifact both go before the prompt; name the model itself.", "prefix_embeds")
    if asked.logprobs is not None and asked.logprobs > service.limits.logprobs:
        raise bad(f"logprobs is {asked.logprobs}; this server tells at most {service.limits.logprobs}.", "logprobs")
    if asked.echo and asked.logprobs is not None and not service.is_causal:
        raise bad(f"{service.name} is an encoder-decoder: it has no log-probabilities of a prompt.", "echo")
    check_known(service, asked.logprob_token_ids or [], "logprob_token_ids")
    prompts = await asyncio.to_thread(of_completion, service, asked)
    check_rows(service, len(prompts) * asked.n)
    most = [room(service, prompt, moved) if asked.max_tokens is None else asked.max_tokens for prompt in prompts]
    rows = [
        row
        for prompt, new in zip(prompts, most, strict=True)
        for row in rows_of(service, [prompt], _wishes(asked, new), method=method, moved=moved)
    ]
    form = _Completion(service, asked, prompts)
    return await _answer(request, service, user, rows, form)


@router.post("/v1/chat/completions", response_model=None)
async def chat_completions(asked: ChatRequest, request: Request, user: User, service: Served) -> Response:
    """Go on with a conversation, by the model's chat template."""
    method, moved = _method(service, user, asked.model)
    if (asked.top_logprobs or 0) > service.limits.logprobs:
        raise bad(
            f"top_logprobs is {asked.top_logprobs}; this server tells at most {service.limits.logprobs}.",
            "top_logprobs",
        )
    prompt = await asyncio.to_thread(of_chat, service, asked)
    check_rows(service, asked.n)
    new = asked.max_completion_tokens or asked.max_tokens or room(service, prompt, moved)
    rows = rows_of(service, [prompt], _wishes(asked, new), method=method, moved=moved)
    return await _answer(request, service, user, rows, _Chat(service, asked, [prompt]))


def _method(service: Service, user: str, model: str) -> tuple[str | None, int]:
    """The bank's name for what a model is besides the frozen one, and how much of the window it takes."""
    registered = service.resolve(user, model)
    if registered is None:
        return None, 0
    return registered.place, registered.vectors


def _wishes(asked: CompletionRequest | ChatRequest, new: int) -> list[Wish]:
    if isinstance(asked, ChatRequest):
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        tokens: tuple[int, ...] = ()
        of_prompt = False
    else:
        top, tokens = asked.logprobs, tuple(asked.logprob_token_ids or ())
        of_prompt = asked.echo and asked.logprobs is not None
    return [
        Wish(
            max_tokens=new,
            temperature=asked.temperature,
            top_p=asked.top_p,
            seed=asked.seed,
            copy=copy,
            stop=tuple(asked.stop or ()),
            top=top,
            tokens=tokens,
            of_prompt=of_prompt,
            ignores_end=asked.ignore_eos,
            is_shown=asked.stream,
        )
        for copy in range(asked.n)
    ]


# --- waiting for the engine -------------------------------------------------------------------------------------------


async def _answer(request: Request, service: Service, user: str, rows: list[Row], form: "_Form") -> Response:
    """Hand the rows in and answer; a client that leaves is noticed, and its rows are let go."""
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[News] = asyncio.Queue()

    def report(number: int, what: "Piece | Written | Exception") -> None:
        loop.call_soon_threadsafe(news.put_nowait, (number, what))

    note(request, model=form.asked.model, rows=len(rows), prompt_tokens=form.prompt_tokens)
    if service.logs_texts:
        note(request, prompts=[prompt.text for prompt in form.prompts])
    started = time.monotonic()

    def done(written: Sequence[Written]) -> None:
        service.metrics.observe("odqa_request_seconds", time.monotonic() - started)
        note(request, completion_tokens=sum(len(text.ids) for text in written))
        if service.logs_texts:
            note(request, texts=[text.text for text in written])

    ticket = service.scheduler.submit(user, rows, report)
    try:
        if form.asked.stream:
            # The first news decide the status: what is refused by then is an error like any other.
            heard = listen(request, news)
            first = await anext(heard)
            if isinstance(first[1], Exception):
                raise first[1]
            events = _events(form, ticket, heard, first, len(rows), done)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        written = await _all(request, news, len(rows))
    except BaseException:
        ticket.cancel()
        raise
    done(written)
    return JSONResponse(form.whole(written))


async def _all(request: Request, news: "asyncio.Queue[News]", count: int) -> list[Written]:
    """The texts, in order. Raises the first error, and ClientGone."""
    found: dict[int, Written] = {}
    async for number, what in listen(request, news):
        if isinstance(what, Exception):
            raise what
        if isinstance(what, Written):
            found[number] = what
        if len(found) == count:
            break
    return [found[number] for number in range(count)]


async def _events(
    form: "_Form",
    ticket: Ticket,
    news: AsyncIterator[News],
    first: News,
    count: int,
    done: Callable[[Sequence[Written]], None],
) -> AsyncIterator[str]:
    """Server-sent events, as the texts grow. `done` is given the texts that were finished by the end."""
    written: list[Written] = []
    number, what = first
    try:
        for chunk in form.beginning(count):
            yield _event(chunk)
        while True:
            if isinstance(what, Exception):
                error = what if isinstance(what, ApiError) else ApiError(500, "Internal error.", code="internal_error")
                yield _event(error.body())
                return
            if isinstance(what, Written):
                written.append(what)
            for chunk in form.chunks(number, what):
                yield _event(chunk)
            if len(written) == count:
                break
            number, what = await anext(news)
        options = form.asked.stream_options
        if options is not None and options.include_usage:
            yield _event(form.envelope([]) | {"usage": form.usage(sum(len(text.ids) for text in written))})
        yield "data: [DONE]\n\n"
    except ClientGone:
        return
    finally:
        ticket.cancel()
        done(written)


def _event(value: Json) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


# --- the protocol's forms ---------------------------------------------------------------------------------------------


@dataclass
class _Form:
    """An answer in one of the protocol's two forms."""

    service: Service
    asked: Writing
    prompts: Sequence[Prompt]
    kind: str = ""
    prefix: str = ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(12)}"
        self.created = int(time.time())

    @property
    def prompt_tokens(self) -> int:
        return sum(Row(prompt.ids, Wish(0), prompt.vectors, prompt.prefix).read for prompt in self.prompts)

    def usage(self, written: int) -> Json:
        read = self.prompt_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def envelope(self, choices: list[Json], *, is_chunk: bool = True) -> Json:
        return {
            "id": self.id,
            "object": f"{self.kind}.chunk" if is_chunk and self.kind == "chat.completion" else self.kind,
            "created": self.created,
            "model": self.asked.model,
            "system_fingerprint": f"odqa-{self.service.backbone.fingerprint[:12]}",
            "choices": choices,
        }

    def whole(self, written: Sequence[Written]) -> Json:
        choices = [self.choice(number, text) for number, text in enumerate(written)]
        usage = self.usage(sum(len(text.ids) for text in written))
        return self.envelope(choices, is_chunk=False) | {"usage": usage}

    def choice(self, number: int, written: Written) -> Json:
        raise NotImplementedError

    def beginning(self, count: int) -> list[Json]:
        """Chunks before the first words."""
        return []

    def chunks(self, number: int, what: "Piece | Written") -> list[Json]:
        """Chunks for what is new of a text."""
        raise NotImplementedError


class _Completion(_Form):
    asked: CompletionRequest

    def __init__(self, service: Service, asked: CompletionRequest, prompts: Sequence[Prompt]) -> None:
        super().__init__(service, asked, prompts, "text_completion", "cmpl")
        self._offsets: dict[int, int] = {}

    def choice(self, number: int, written: Written) -> Json:
        before = self._before(number)
        places = (*written.prompt_places, *written.places) if self.asked.echo else written.places
        return self._choice(number, before + written.text, places, written.finish)

    def beginning(self, count: int) -> list[Json]:
        if not self.asked.echo or self.asked.logprobs is not None:
            return []
        return [self.envelope([self._choice(number, self._before(number), (), None)]) for number in range(count)]

    def chunks(self, number: int, what: "Piece | Written") -> list[Json]:
        piece, finish = (what.last, what.finish) if isinstance(what, Written) else (what, None)
        text, places = piece.text, piece.places
        if isinstance(what, Written) and self.asked.echo and self.asked.logprobs is not None:
            # The prompt's log-probabilities come with the end: they belong before the words, which wait for them.
            text, places = self._before(number) + what.text, (*what.prompt_places, *what.places)
        elif self.asked.echo and self.asked.logprobs is not None:
            return []
        return [self.envelope([self._choice(number, text, places, finish)])]

    def _before(self, number: int) -> str:
        """The prompt's text, if it is to be repeated."""
        if not self.asked.echo:
            return ""
        prompt = self.prompts[number // self.asked.n]
        return self.service.scheduler.tokens.text(prompt.ids) if prompt.text is None else prompt.text

    def _choice(self, number: int, text: str, places: Sequence[Place], finish: str | None) -> Json:
        logprobs = None if self.asked.logprobs is None else self._logprobs(number, places)
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, number: int, places: Sequence[Place]) -> Json:
        names = [self._name(place.token) for place in places]
        offset, offsets = self._offsets.get(number, 0), []
        for place in places:
            offsets.append(offset)
            offset += len(self.service.scheduler.tokens.name(place.token))
        self._offsets[number] = offset
        return {
            "tokens": names,
            "token_logprobs": [place.logprob for place in places],
            "top_logprobs": [
                None if place.logprob is None else {self._name(token): score for token, score in place.others}
                for place in places
            ],
            "text_offset": offsets,
        }

    def _name(self, token: int) -> str:
        return (
            f"token_id:{token}" if self.asked.return_tokens_as_token_ids else self.service.scheduler.tokens.name(token)
        )


class _Chat(_Form):
    asked: ChatRequest

    def __init__(self, service: Service, asked: ChatRequest, prompts: Sequence[Prompt]) -> None:
        super().__init__(service, asked, prompts, "chat.completion", "chatcmpl")

    def choice(self, number: int, written: Written) -> Json:
        message = {"role": "assistant", "content": written.text, "refusal": None}
        return {
            "index": number,
            "message": message,
            "logprobs": self._logprobs(written.places),
            "finish_reason": written.finish,
        }

    def beginning(self, count: int) -> list[Json]:
        return [
            self.envelope([self._choice(number, {"role": "assistant", "content": ""}, (), None)])
            for number in range(count)
        ]

    def chunks(self, number: int, what: "Piece | Written") -> list[Json]:
        if not isinstance(what, Written):
            return [self.envelope([self._choice(number, {"content": what.text}, what.places, None)])]
        last = what.last
        rest = [self._choice(number, {"content": last.text}, last.places, None)] if last.text or last.places else []
        return [self.envelope([choice]) for choice in (*rest, self._choice(number, {}, (), what.finish))]

    def _choice(
        self, number: int, delta: Json, places: Sequence[Place], finish: Literal["stop", "length"] | None
    ) -> Json:
        return {"index": number, "delta": delta, "logprobs": self._logprobs(places), "finish_reason": finish}

    def _logprobs(self, places: Sequence[Place]) -> Json | None:
        if not self.asked.logprobs:
            return None
        return {
            "content": [
                self._token(place.token, place.logprob)
                | {"top_logprobs": [self._token(token, score) for token, score in place.others]}
                for place in places
            ],
            "refusal": None,
        }

    def _token(self, token: int, score: float | None) -> Json:
        name = self.service.scheduler.tokens.name(token)
        return {"token": name, "logprob": score, "bytes": list(name.encode())}
