"""What those who run a server look at: /healthz, /metrics, and logs as one JSON object a line.

A request's line has its number, user, route, status, milliseconds, model and numbers of tokens. Texts are in it only
with `--log-texts`, keys never.
"""

import json
import logging
import sys
import time
import traceback
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from odqa.serve.state import Service, service_of, user_of

router = APIRouter()
Served = Annotated[Service, Depends(service_of)]
_OWN = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "color_message"}


@router.get("/healthz", response_model=None)
async def health(service: Served) -> Response:
    """200 while requests are taken, else 503. Needs no key."""
    is_fine = service.scheduler.is_alive
    running, waiting = service.scheduler.load
    record = {"status": "ok" if is_fine else "closing", "model": service.name, "running": running, "waiting": waiting}
    return JSONResponse(record, 200 if is_fine else 503)


@router.get("/metrics", response_model=None)
async def metrics(service: Served, user: Annotated[str, Depends(user_of)]) -> Response:
    """Prometheus' text format."""
    return PlainTextResponse(service.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


class JsonLines(logging.Formatter):
    """A record as one line: time, level, event, and what `extra` says."""

    def format(self, record: logging.LogRecord) -> str:
        said: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        said |= {key: value for key, value in record.__dict__.items() if key not in _OWN}
        if "event" not in said:
            said |= {"event": record.name, "message": record.getMessage()}
        if record.exc_info and record.exc_info[1] is not None:
            said["error"] = "".join(traceback.format_exception(record.exc_info[1]))
        return json.dumps(said, default=str)


def log_as_json(level: int = logging.INFO) -> None:
    """Send the server's log, and uvicorn's, to stderr in this form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, from_level in (("odqa.serve", level), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(from_level)
    logging.getLogger("uvicorn.access").disabled = True
