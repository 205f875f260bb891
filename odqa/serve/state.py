"""What all routes share, and how they get it: `Depends(service_of)`, `Depends(user_of)`.

A user is whom the key in `Authorization: Bearer KEY` belongs to. Without a file of keys everybody is the user "local",
and then the server only answers this machine (see `odqa.serve.server`) and pages that it gave out itself.
"""

import threading
import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from fastapi import Request

from odqa.frozen.backbone import Backbone
from odqa.frozen.bank import Bank
from odqa.frozen.engine import Facts
from odqa.frozen.local import LocalEngine
from odqa.serve.artifacts import Artifacts, Registered
from odqa.serve.asking import Asker
from odqa.serve.encoder import Encoder
from odqa.serve.errors import ApiError, unknown_model
from odqa.serve.keys import LOCAL, Keys
from odqa.serve.limits import Limits
from odqa.serve.metrics import Metrics
from odqa.serve.scheduler import Scheduler


@dataclass(slots=True, eq=False)
class Service:
    """A model and all that is served of it. `name` is the model's; USER's artifact NAME is the model `name`:NAME."""

    name: str
    backbone: Backbone
    bank: Bank
    scheduler: Scheduler
    artifacts: Artifacts
    keys: Keys
    limits: Limits
    metrics: Metrics
    chat_template: str | None = None
    logs_texts: bool = False
    asker: Asker | None = None
    """What answers questions from a collection; None: nothing does here."""
    started: float = field(default_factory=time.time)
    rates: "Rates" = field(init=False)
    encoder: Encoder = field(init=False)
    facts: Facts = field(init=False)
    """What one who tunes a prompt has to know."""

    def __post_init__(self) -> None:
        self.rates = Rates(self.limits.requests_a_minute)
        own = LocalEngine(self.backbone).facts
        self.facts = replace(own, model=self.name, takes_deep=False)  # deep prompts have no form in the protocol
        self.encoder = Encoder(self.name, self.backbone, self.chat_template)

    @property
    def window(self) -> int | None:
        return self.backbone.window

    @property
    def is_causal(self) -> bool:
        return self.backbone.architecture == "causal"

    def drain(self) -> None:
        """Take nothing more; what was taken is finished."""
        self.scheduler.drain()
        if self.asker is not None:
            self.asker.drain()

    def close(self, seconds: float = 0.0) -> None:
        """`drain`, wait for at most so many seconds, and fail what is left."""
        self.drain()
        end = time.monotonic() + seconds
        if self.asker is not None:
            self.asker.close(seconds)
        self.scheduler.close(max(0.0, end - time.monotonic()))

    def resolve(self, user: str, model: str) -> Registered | None:
        """What a model name means to a user: one of their artifacts, or None, the frozen model itself.

        Raises ApiError (404) for any other name, whether another user has it or nobody.
        """
        if model == self.name:
            return None
        base, colon, name = model.rpartition(":")
        found = self.artifacts.find(user, name) if colon and base == self.name else None
        if found is None:
            raise unknown_model(model)
        return found


class Rates:
    """Requests a minute, user by user: a bucket that holds a tenth of a minute's, and fills all the time."""

    def __init__(self, a_minute: int) -> None:
        self._a_second = a_minute / 60
        self._most = max(1.0, a_minute / 10)
        self._lock = threading.Lock()
        self._buckets: dict[str, tuple[float, float]] = {}  # what is in it, and when that was so

    def take(self, user: str) -> None:
        """Raises ApiError (429) if the user has to wait."""
        if not self._a_second:
            return
        now = time.monotonic()
        with self._lock:
            held, then = self._buckets.get(user, (self._most, now))
            held = min(self._most, held + (now - then) * self._a_second)
            self._buckets[user] = (held - 1 if held >= 1 else held, now)
        if held < 1:
            said = f"More than {self._a_second * 60:g} requests a minute. Slow down."
            raise ApiError(429, said, code="rate_limit_exceeded", wait=(1 - held) / self._a_second)


def service_of(request: Request) -> Service:
    return cast(Service, request.app.state.service)


async def user_of(request: Request) -> str:
    """Who asks. Raises ApiError: 401 without a valid key, 429 for too many requests."""
    return authenticate(service_of(request), request.scope)


def authenticate(service: Service, scope: MutableMapping[str, Any]) -> str:
    """Who asks, by the headers of a request; once a request. Raises ApiError as `user_of` does."""
    facts = scope["odqa"]
    if "user" not in facts:
        user = LOCAL
        if service.keys.are_needed:
            given = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
            scheme, _, key = given.partition(" ")
            found = service.keys.user_of(key.strip()) if scheme.lower() == "bearer" and key.strip() else None
            if found is None:
                said = "This server needs a key: send Authorization: Bearer KEY (who runs it: odqa serve-key USER)."
                raise ApiError(401, said, code="invalid_api_key")
            user = found
        facts["user"] = user
        service.rates.take(user)
    return str(facts["user"])


def note(request: Request, **facts: Any) -> None:
    """Put facts of a request into its line of the log: numbers and names of models, no texts."""
    request.scope["odqa"].update(facts)
