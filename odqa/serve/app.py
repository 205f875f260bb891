"""The application: who may come in, how large a body may be, what an error looks like, and which routers there are."""

import asyncio
import logging
import secrets
import time
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import odqa
from odqa.serve import ask, completions, models, operations, page
from odqa.serve.errors import ApiError, bad, internal
from odqa.serve.listening import ClientGone
from odqa.serve.state import Service, authenticate

ROUTERS = (operations.router, models.router, completions.router, ask.router, page.router)

log = logging.getLogger("odqa.serve")
_WITH_BODY = ("POST", "PUT", "PATCH")
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_WORDS = 120  # characters of what somebody sent in a message


def create_app(service: Service, *, open_to_all: bool = False) -> "Gate":
    """The whole application for one model. `open_to_all`: without keys it also answers other machines."""
    # The usual pages of documentation load scripts from elsewhere; /openapi.json says the same.
    app = FastAPI(title="odqa", version=odqa.__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(ClientGone, _gone)
    app.add_exception_handler(Exception, _failed)
    return Gate(app, service, open_to_all=open_to_all)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), error.status, error.headers())


async def _invalid(request: Request, error: Exception) -> Response:
    """The first mistake, and how many more there are."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first = found[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    said = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        place, said = "", f"The body is not JSON ({first.get('ctx', {}).get('error', said)})"
    elif first["type"] == "extra_forbidden":
        said = "not a field that this server knows"
    elif first["type"] == "missing" and not place:
        said = "a body is missing; send a JSON object"
    more = f" ({len(found) - 1} more mistakes)" if len(found) > 1 else ""
    words = f"{_short(place)}: {_short(said)}" if place else _short(said)
    return await _refused(request, bad(f"{words}{more}.", _short(place) or None))


async def _http(request: Request, error: Exception) -> Response:
    """Unknown routes and methods, and bodies that FastAPI cannot parse."""
    assert isinstance(error, HTTPException)
    words = {
        404: "There is no such route here. GET /openapi.json lists them.",
        405: f"{_short(request.method)} is not a method of this route.",
        400: "The body is not JSON that can be read.",
    }
    answer = await _refused(request, ApiError(error.status_code, words.get(error.status_code, str(error.detail))))
    answer.headers.update(error.headers or {})
    return answer


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it; nginx's number, for the log


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(request, internal(request.scope["odqa"]["request"]))


class Gate:
    """What comes before every route: a number, a bounded body that is there in time, and afterwards a line of the log.

    Bodies are read whole here. Without keys, only what addresses this machine by a name of its own is let in, and no
    page of another site: else any page that somebody here opens could use the server (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, service: Service, *, open_to_all: bool = False) -> None:
        self.app, self.service = app, service
        self._is_local = not open_to_all
        self._requests = 0  # under way
        self._reading = 0  # bytes of all bodies that are being read or answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        facts = scope["odqa"] = {"request": f"req-{secrets.token_hex(8)}"}
        started, status = time.monotonic(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", facts["request"].encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        held = 0
        self._requests += 1
        try:
            self._check(scope)
            if scope["method"] in _WITH_BODY:  # of nobody we know no body is read
                authenticate(self.service, scope)
            body = await self._body(scope, receive)
            held = len(body)
            self._reading += held
            await self.app(scope, _once(body, receive), tell)
        except ApiError as error:
            # What is left of the body is not read: the connection cannot be used again.
            headers = error.headers() | ({"Connection": "close"} if error.status in (401, 408, 413, 429) else {})
            await JSONResponse(error.body(), error.status, headers)(scope, receive, tell)
        except ClientGone:
            status = status or 499
        except Exception:  # a defect: the client gets one sentence, the log the rest
            log.exception("request failed", extra={"event": "failed", **facts})
            if not status:
                await JSONResponse(internal(facts["request"]).body(), 500)(scope, receive, tell)
        finally:
            self._reading -= held
            self._requests -= 1
            self._tell(scope, facts, status, time.monotonic() - started)

    def _check(self, scope: Scope) -> None:
        if self._requests > self.service.limits.connections:
            raise ApiError(503, "Too many requests are under way. Ask again in a moment.", code="overloaded", wait=1)
        headers = dict(reversed(scope["headers"]))
        host = headers.get(b"host", b"").decode("latin-1")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and ":" in host else host
        if self._is_local and not self.service.keys.are_needed:
            if name not in _LOOPBACK:
                raise ApiError(403, "Without keys this server answers requests to localhost only.", code="wrong_host")
            origin = headers.get(b"origin", b"").decode("latin-1")
            if origin and origin.partition("://")[2] != host:
                raise ApiError(
                    403, "Without keys this server takes no requests of other sites' pages.", code="wrong_origin"
                )
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] in _WITH_BODY and kind != b"application/json":
            raise ApiError(415, "Send JSON, with the header Content-Type: application/json.", code="wrong_content_type")
        stated = headers.get(b"content-length", b"0")
        if stated.isdigit() and int(stated[:20]) > self.service.limits.body_bytes:
            raise self._too_large()

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        """Raises ApiError for one that is too large, too slow, or more than there is room for; ClientGone."""
        limits = self.service.limits
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    piece = message.get("body", b"")
                    size += len(piece)
                    pieces.append(piece)
                    self._reading += len(piece)
                    if size > limits.body_bytes:
                        raise self._too_large()
                    if self._reading > limits.reading_bytes:
                        raise ApiError(429, "Too many bytes of requests are under way.", code="too_many_bytes", wait=1)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise ApiError(408, f"The body was not there within {limits.body_seconds:g} s.", code="slow_body") from None
        finally:
            self._reading -= size

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"A body has at most {self.service.limits.body_bytes:,} bytes here.", code="body_too_large"
        )

    def _tell(self, scope: Scope, facts: dict[str, Any], status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.service.metrics.count("odqa_requests_total", route=route, status=str(status))
        said = {"event": "request", "route": route, "method": scope["method"][:16], "status": status}
        log.info("request", extra={**said, "milliseconds": round(1000 * seconds, 1), **facts})


def _once(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, then what comes from the connection."""
    is_given = False

    async def next_message() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WORDS else f"{line[: _WORDS - 3]}..."
