"""A server that speaks OpenAI's protocol, asked with patience: retries, time limits, and a memory on disk.

What fails in passing (429, 5xx, time-outs, broken connections) is tried again after a pause that doubles each time,
with full jitter (Brooker 2015, "Exponential Backoff And Jitter", AWS Architecture Blog), and never sooner than the
server's Retry-After. Everything else is one ServerError. Replies are kept by the whole request; the key is no part of
it.

The invariant: a key is read from the environment, sent in one header to one server, and written nowhere. Whatever comes
back is searched for it before anybody sees it, and redirections are not followed.
"""

import difflib
import email.utils
import http.client
import json
import os
import random
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from odqa.artifacts import sha256_json
from odqa.errors import DataError, RecipeError, ServerError

T = TypeVar("T")
Json = dict[str, Any]

# Time-out of the request, conflict, too early, too many requests, and a server that is down or overloaded: the list of
# OpenAI's own client, and 425 and 529, which gateways use.
PASSING = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
FIRST_PAUSE = 1.0  # our choice, in seconds; the longest pause before the second try
_LONGEST_REPLY = 64 * 2**20  # our choice, in bytes: no answer is that long, and no server may fill our memory
_SHORTEST_SECRET = 8
_SAID = 200  # our choice: characters of a server's own words in a message


@dataclass(frozen=True, slots=True)
class Secret:
    """A key, and the environment variable that it is from; only the variable's name is ever shown.

    A key of fewer than eight characters is a dummy (EMPTY, none) for a server that checks none; it is not searched for,
    because it might be a word of an answer.
    """

    variable: str
    value: str = field(repr=False)

    @classmethod
    def from_environment(cls, variable: str) -> "Secret":
        """Raises RecipeError if the variable is not set, or if what it holds cannot be a key."""
        value = os.environ.get(variable, "").strip()
        if not value:
            raise RecipeError(
                f"reader api: the environment variable {variable} is not set. Put the key there, or set "
                "reader.key_variable: null for a server without keys."
            )
        if not (value.isascii() and value.isprintable()) or " " in value:  # HTTP libraries quote it in their error
            raise RecipeError(f"reader api: what {variable} holds is not a key (blanks or other than ASCII in it).")
        return cls(variable, value)

    def hide(self, text: str) -> str:
        """The text with the name of the variable in the place of the key, also where JSON escapes the key."""
        if len(self.value) < _SHORTEST_SECRET:
            return text
        for written in (self.value, json.dumps(self.value)[1:-1]):
            text = text.replace(written, f"[{self.variable}]")
        return text


@dataclass(slots=True)
class Counts:
    """What was asked for since the start: requests that got a reply, replies from the memory on disk, further tries.

    Of all tries: bytes `sent` and `received` as bodies, and seconds until they were answered (of tries that were under
    way at once, the sum).
    """

    requests: int = 0
    from_cache: int = 0
    retries: int = 0
    sent: int = 0
    received: int = 0
    seconds: float = 0.0


class _Passing(Exception):
    """A failure that may pass: in words, and the seconds that the server asks to wait."""

    def __init__(self, what: str, wait: float = 0.0) -> None:
        super().__init__(what)
        self.wait = wait


class Endpoint:
    """One server, by the URL that its paths begin with (usually .../v1). Safe to use from several threads.

    `timeout` seconds bound each silence of the server and, to a silence, a whole try. A request is tried `retries` more
    times; a Retry-After of more than `longest_wait` seconds is not waited for. `cache` is a folder for replies (None:
    none are kept). `sleep` and `chance` (0 to 1) are there for tests.

    Raises RecipeError for a URL that is none, or that holds a password or a query, which would end up in manifests.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: Secret | None = None,
        timeout: float = 60.0,
        retries: int = 5,
        longest_wait: float = 60.0,
        cache: Path | None = None,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.base_url = check_url(base_url)
        self.timeout, self.retries, self.longest_wait, self.cache = timeout, retries, longest_wait, cache
        self.counts = Counts()
        self._key, self._sleep, self._chance = key, sleep, chance
        self._lock = threading.Lock()
        self._opener = urllib.request.build_opener(_NoRedirections())

    def ask(self, path: str, body: Mapping[str, Any], parse: Callable[[Any], T]) -> tuple[T, bool]:
        """POST `body` as JSON to `path`: what `parse` makes of the reply, and whether it was on disk already.

        Only replies that `parse` takes are kept. Raises ServerError, in the words of `parse` where that raises
        ValueError.
        """
        found = self._load(path, body)
        if found is not None:
            self._count(from_cache=1)
            return parse(found), True
        text = self._send(path, body)
        try:
            reply = json.loads(text)
        except ValueError:
            raise ServerError(
                f"{self.base_url}{path}: the reply is not JSON ({shortened(text)!r}). Check reader.base_url; it "
                "usually ends in /v1."
            ) from None
        try:
            parsed = parse(reply)
        except ValueError as error:
            raise ServerError(f"{self.base_url}{path}: {error}") from None
        self._count(requests=1)
        self._save(path, body, reply)
        return parsed, False

    def look(self, path: str, parse: Callable[[Any], T]) -> T:
        """GET `path`: what `parse` makes of the reply. Raises ServerError."""
        text = self._send(path, None)
        try:
            return parse(json.loads(text))
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.base_url}{path}: {error}. Check the address; it usually ends in /v1.") from None

    def beside(self, base_url: str) -> "Endpoint":
        """The same server, key and patience at another path; nothing is kept on disk."""
        return Endpoint(
            base_url,
            key=self._key,
            timeout=self.timeout,
            retries=self.retries,
            longest_wait=self.longest_wait,
            sleep=self._sleep,
            chance=self._chance,
        )

    # --- on the wire ---

    def _send(self, path: str, body: Mapping[str, Any] | None) -> str:
        """The text of the reply, however many tries it takes. Without a body: GET."""
        tries = 0
        while True:
            try:
                return self._try(path, None if body is None else json.dumps(body).encode())
            except _Passing as failure:
                tries += 1
                if failure.wait > self.longest_wait:
                    raise ServerError(
                        f"{self.base_url}{path}: {failure}; the server asks to wait {failure.wait:.0f} s, more than "
                        f"reader.longest_wait ({self.longest_wait:.0f} s). What was answered is kept: run again later."
                    ) from None
                if tries > self.retries:
                    times = f"{tries} times in a row" if tries > 1 else "once, and reader.retries is 0"
                    raise ServerError(
                        f"{self.base_url}{path}: {failure} ({times}). What was answered is kept: run again later, "
                        "raise reader.timeout, or lower reader.concurrency."
                    ) from None
                self._count(retries=1)
                longest = min(FIRST_PAUSE * 2 ** (tries - 1), self.longest_wait)
                self._sleep(max(failure.wait, longest * self._chance()))
            except _Refused as refused:
                raise ServerError(self._explain(path, body or {}, refused), refused.status) from None

    def _try(self, path: str, data: bytes | None) -> str:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "odqa"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key.value}"
        request = urllib.request.Request(self.base_url + path, data, headers)
        started = time.monotonic()
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                text = self._body(response)
                self._count(received=len(text.encode()))
                return text
        except urllib.error.HTTPError as error:
            with error:
                self._refuse(error)
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            reason = getattr(error, "reason", None) or error
            if isinstance(reason, ssl.SSLCertVerificationError):
                raise ServerError(
                    f"{self.base_url}: the server's certificate is not trusted ({reason.verify_message})."
                ) from None
            if isinstance(reason, TimeoutError):
                raise _Passing(f"no whole reply within {self.timeout:g} s") from None
            raise _Passing(f"no reply ({self._hidden(str(reason) or type(reason).__name__)})") from None
        finally:
            self._count(sent=len(data or b""), seconds=time.monotonic() - started)
        raise AssertionError("a try either returns or raises")

    def _body(self, response: Any) -> str:
        """The text of a reply, read in pieces so that one that drips in comes to an end."""
        end, pieces, size = time.monotonic() + self.timeout, [], 0
        while piece := response.read1(2**16):
            pieces.append(piece)
            size += len(piece)
            if time.monotonic() > end:
                raise TimeoutError
            if size > _LONGEST_REPLY:
                raise ServerError(f"{self.base_url}: a reply of more than {_LONGEST_REPLY} bytes is none of a model.")
        if response.length:  # `read1` takes a connection that was cut for the end
            raise http.client.IncompleteRead(b"".join(pieces), response.length)
        return self._hidden(b"".join(pieces).decode("utf-8", errors="replace"))

    def _refuse(self, error: urllib.error.HTTPError) -> None:
        """Raises what a status other than 2xx means."""
        try:
            text = self._body(error)
        except (OSError, http.client.HTTPException):
            text = ""
        said, code = _message(text)
        if error.code in PASSING and code != "insufficient_quota":  # OpenAI's 429 for an account without money
            raise _Passing(f"HTTP {error.code}{_quoted(said)}", _retry_after(error.headers.get("Retry-After")))
        raise _Refused(error.code, said)

    def _explain(self, path: str, body: Mapping[str, Any], refused: "_Refused") -> str:
        """One line for a refusal: what to do about it."""
        where = f"{self.base_url}{path}: HTTP {refused.status}"
        if refused.status in (401, 403):  # such replies quote parts of keys
            told = "no key (reader.key_variable)" if self._key is None else f"the key in {self._key.variable}"
            return f"{where}: the server refuses {told}."
        if 300 <= refused.status < 400:
            return f"{where}: the server points elsewhere. Give the address that it means as reader.base_url."
        model = body.get("model")
        if refused.status in (400, 404):
            served = self._models()
            if served and model not in served:
                near = difflib.get_close_matches(str(model), served, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                return f"{where}: model {model!r} is not served here ({shortened(', '.join(served))}).{hint}"
        hints = {
            400: " Check reader.options, reader.window, and whether the server takes logprobs (reader.logprobs: none).",
            404: f" Check reader.model ({model}), reader.endpoint, and reader.base_url, which usually ends in /v1.",
        }
        return f"{where}{_quoted(refused.said)}.{hints.get(refused.status, '')}"

    def _models(self) -> list[str]:
        """The models that the server says it has; none if it does not say."""
        try:
            found = json.loads(self._try("/models", None))["data"]
            return [str(model["id"]) for model in found]
        except (_Passing, _Refused, ServerError, ValueError, KeyError, TypeError):
            return []

    def _hidden(self, text: str) -> str:
        return text if self._key is None else self._key.hide(text)

    def _count(self, **more: float) -> None:
        with self._lock:
            for name, count in more.items():
                setattr(self.counts, name, getattr(self.counts, name) + count)

    # --- on disk ---

    def _place(self, path: str, body: Mapping[str, Any]) -> Path:
        assert self.cache is not None
        name = sha256_json({"url": self.base_url + path, "request": body})
        return self.cache / name[:2] / f"{name}.json"

    def _load(self, path: str, body: Mapping[str, Any]) -> Any:
        """The reply that is kept for this request; None if there is none. Raises DataError for a damaged file."""
        if self.cache is None or not (file := self._place(path, body)).is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            if record["request"] == body:
                return record["reply"]
        except (ValueError, KeyError, TypeError):
            pass
        raise DataError(f"{file}: not a reply that odqa kept. Delete this file; the server is then asked again.")

    def _save(self, path: str, body: Mapping[str, Any], reply: Any) -> None:
        if self.cache is None:
            return
        file = self._place(path, body)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.stem}.{os.getpid()}.{threading.get_ident()}.partial")
        record = {"url": self.base_url + path, "request": body, "reply": reply}
        partial.write_text(self._hidden(json.dumps(record, ensure_ascii=False)), encoding="utf-8")
        partial.replace(file)


def check_url(url: str) -> str:
    """The URL without a slash at its end. Raises RecipeError for one that is no http(s) URL, or that holds secrets."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError(f"reader.base_url is {url!r}; expected http(s)://HOST[:PORT][/PATH], usually with /v1.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise RecipeError(
            "reader.base_url holds a user, a query or a fragment, which would be written into every manifest. Give "
            "scheme, host and path only; a key goes into the environment (reader.key_variable)."
        )
    return url.rstrip("/")


class _Refused(Exception):
    """A status that will be the same at the next try, and what the server says about it."""

    def __init__(self, status: int, said: str) -> None:
        super().__init__(said)
        self.status, self.said = status, said


class _NoRedirections(urllib.request.HTTPRedirectHandler):
    """A redirection would carry the key to another server."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


def _message(text: str) -> tuple[str, str]:
    """What the body of a refusal says, and its code; in the forms of OpenAI, vLLM and FastAPI, or as it is."""
    try:
        found = json.loads(text)
    except ValueError:
        return text, ""
    error = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(error, dict):
        said = error.get("message") or error.get("detail") or ""
        return str(said), str(error.get("code") or error.get("type") or "")
    return str(error), ""


def _quoted(said: str) -> str:
    return f": {shortened(said)}" if said.strip() else ""


def shortened(text: str) -> str:
    """A server's words on one line, at most so many."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _SAID else f"{line[: _SAID - 3]}..."


def _retry_after(value: str | None) -> float:
    """Seconds to wait, from seconds or a date (RFC 9110, section 10.2.3); 0 for neither."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0
