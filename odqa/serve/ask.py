"""/ask: a question to the pipeline, its answer with evidence and trace; and what a user says of an answer.

    POST /ask {"question": "..."}                        one JSON object, when all is done
    POST /ask {"question": "...", "stream": "lines"}     a JSON object a line as things happen; "events": the same as
                                                         server-sent events
    POST /ask/ID/mark {"is_right": true}                 right or wrong; kept as an example (`odqa.serve.marks`)
    GET /ask                                             which pipeline answers, over what

A stream has `begin` (the question's number, and how many are before it), a `step` after each stage of each pass, and
as its last one either `answer` or `error`: what lacks both is not whole.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response, StreamingResponse

from odqa.serve.asking import Asker, Job, News
from odqa.serve.errors import ApiError, bad, too_late
from odqa.serve.listening import ClientGone, listen
from odqa.serve.schema import AskRequest, MarkRequest
from odqa.serve.state import Service, note, service_of, user_of

router = APIRouter()
User = Annotated[str, Depends(user_of)]
Served = Annotated[Service, Depends(service_of)]
Json = dict[str, Any]
Form = Literal["lines", "events"]
_TYPES: dict[Form, str] = {"lines": "application/x-ndjson", "events": "text/event-stream"}


@router.get("/ask", response_model=None)
async def describe(user: User, service: Served) -> Response:
    """Which pipeline answers, how many passages it searches, and what may be asked of it."""
    asker = _asker(service)
    loaded = asker.loaded
    return _json(
        {
            "recipe": loaded.recipe.name,
            "hash": loaded.recipe.hash,
            "passages": 0 if loaded.index is None else len(loaded.index.store),
            "passes": loaded.pipeline.max_passes,
            "question_characters": service.limits.question_characters,
            "waiting": asker.waiting,
        }
    )


@router.post("/ask", response_model=None)
async def ask(asked: AskRequest, request: Request, user: User, service: Served) -> Response:
    """Answer a question, and show what the answer is taken from."""
    asker = _asker(service)
    if len(asked.question) > service.limits.question_characters:
        most = service.limits.question_characters
        raise bad(f"The question has {len(asked.question):,} characters; at most {most:,} are read here.", "question")
    loop = asyncio.get_running_loop()
    news: asyncio.Queue[News] = asyncio.Queue()

    def report(what: News) -> None:
        loop.call_soon_threadsafe(news.put_nowait, what)

    job, before = asker.submit(user, asked.question, report, with_trace=asked.trace)
    note(request, ask=job.id, **({"question": asked.question} if service.logs_texts else {}))
    if asked.stream is None:
        return await _whole(request, job, news)
    begin = {"event": "begin", "id": job.id, "question": job.question, "recipe": asker.loaded.recipe.name}
    lines = _stream(request, job, news, {**begin, "before": before}, asked.stream)
    return StreamingResponse(lines, media_type=_TYPES[asked.stream], headers={"Cache-Control": "no-store"})


@router.post("/ask/{ask_id}/mark", response_model=None)
async def mark(ask_id: str, asked: MarkRequest, user: User, service: Served) -> Response:
    """Say that an answer was right or wrong; of several marks of an answer the last one counts."""
    asker = _asker(service)
    made = await asyncio.to_thread(asker.mark, user, ask_id, is_right=asked.is_right)
    return _json({"id": made.ask, "is_right": made.is_right})


def _asker(service: Service) -> Asker:
    if service.asker is None:
        said = "This server answers no questions: it runs without a pipeline (odqa serve --no-ask)."
        raise ApiError(404, said, code="no_pipeline")
    return service.asker


async def _whole(request: Request, job: Job, news: "asyncio.Queue[News]") -> Response:
    """The steps and the answer, in one piece."""
    steps: list[Json] = []
    async with aclosing(_heard(request, job, news)) as heard:
        while True:
            what = await anext(heard)
            if isinstance(what, Exception):
                raise what
            if what["event"] == "answer":
                return _json({**what, "steps": steps})
            steps.append(what)


async def _stream(
    request: Request, job: Job, news: "asyncio.Queue[News]", begin: Json, form: Form
) -> AsyncIterator[str]:
    yield _line(begin, form)
    try:
        async with aclosing(_heard(request, job, news)) as heard:
            async for what in heard:
                if isinstance(what, Exception):
                    assert isinstance(what, ApiError)
                    yield _line({"event": "error", **what.body()}, form)
                    return
                yield _line(what, form)
                if what["event"] == "answer":
                    return
    except ClientGone:
        return


async def _heard(request: Request, job: Job, news: "asyncio.Queue[News]") -> AsyncGenerator[News, None]:
    """The news of a question, an error if they take too long; whoever stops listening cancels the question."""
    heard = listen(request, news)
    try:
        while True:
            try:
                # The pipeline looks at the time between two stages only; who waits is told in time.
                yield await asyncio.wait_for(anext(heard), max(0.0, job.seconds - job.age))
            except TimeoutError:
                yield too_late(job.seconds)
                return
    finally:
        job.cancel()
        await heard.aclose()


def _line(told: Json, form: Form) -> str:
    said = json.dumps(told, separators=(",", ":"), allow_nan=False)
    return f"{said}\n" if form == "lines" else f"event: {told['event']}\ndata: {said}\n\n"


def _json(value: Json) -> Response:
    return Response(json.dumps(value, allow_nan=False), media_type="application/json")
