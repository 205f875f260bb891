"""`odqa serve`: a model behind uvicorn, from its start to a shutdown that finishes what runs.

On SIGTERM or Ctrl-C nothing new is taken, and texts that are being written or wait are finished; after `grace` seconds
what is left is answered with an error (503), so that no client hears nothing. Listens on this machine only, unless told
otherwise; then keys are needed.
"""

import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from odqa.errors import DataError
from odqa.frozen.bank import Bank
from odqa.read.lm import load_lm
from odqa.serve.app import create_app
from odqa.serve.artifacts import Artifacts
from odqa.serve.keys import Keys
from odqa.serve.limits import Limits
from odqa.serve.metrics import Metrics
from odqa.serve.operations import log_as_json
from odqa.serve.scheduler import Scheduler
from odqa.serve.state import Service

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_FAREWELL = 5  # seconds for the last answers to be sent, after the grace
_HEADER_BYTES = 64 << 10

log = logging.getLogger("odqa.serve")


def load_service(
    model: str,
    folder: Path,
    *,
    name: str | None = None,
    limits: Limits | None = None,
    chat_template: Path | None = None,
    device: str = "auto",
    dtype: str = "float32",
    log_texts: bool = False,
) -> Service:
    """Load a model and what is registered in a folder, and start its engine. Raises DataError for what cannot be used.

    float32 by default: in bfloat16 the rounding differs with the size of a batch, and now and then a text with it.
    """
    limits = limits or Limits()
    template = None if chat_template is None else _read_template(chat_template)
    backbone = load_lm(model, device=device, dtype=dtype)
    name = name or Path(model.removeprefix("embedded:")).name
    if not name or set(name) & set(":/") or not name.isprintable():
        raise DataError(f"--name {name!r}: a model's name has no colon and no slash.")
    artifacts, metrics = Artifacts(folder), Metrics()
    scheduler = Scheduler(Bank(backbone, artifacts.folder), limits, metrics)
    return Service(
        name=name,
        backbone=backbone,
        bank=scheduler.bank,
        scheduler=scheduler,
        artifacts=artifacts,
        keys=Keys(folder),
        limits=limits,
        metrics=metrics,
        chat_template=template,
        logs_texts=log_texts,
    )


def serve(
    service: Service, *, host: str = "127.0.0.1", port: int = 8000, grace: float = 30.0, open_to_all: bool = False
) -> None:
    """Serve until a signal comes. Raises DataError for an address that is taken, or that would need keys."""
    if host not in _LOOPBACK and not service.keys.are_needed and not open_to_all:
        raise DataError(
            f"--host {host} can be reached by others, and there are no keys in {service.keys.file.parent}. Make one "
            "with: odqa serve-key USER, or say --open."
        )
    log_as_json()
    listener = _listen(host, port)
    address = f"[{host}]" if ":" in host else host
    config = uvicorn.Config(
        create_app(service, open_to_all=open_to_all),
        log_config=None,
        access_log=False,
        lifespan="off",
        http="h11",
        ws="none",
        server_header=False,
        limit_concurrency=2 * service.limits.connections,  # the application refuses first, in the protocol's form
        h11_max_incomplete_event_size=_HEADER_BYTES,
        timeout_graceful_shutdown=int(grace) + _FAREWELL,
        backlog=service.limits.connections,
    )
    facts = {"event": "ready", "url": f"http://{address}:{listener.getsockname()[1]}", "model": service.name}
    try:
        _Server(config, service, grace, facts).run(sockets=[listener])
    finally:
        service.close()
        log.info("stopped", extra={"event": "stopped"})


class _Server(uvicorn.Server):
    """uvicorn's, which tells the service when the end begins, and does not end the process by the signal itself."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float, facts: dict[str, Any]) -> None:
        super().__init__(config)
        self._service, self._grace, self._facts = service, grace, facts

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        log.info("ready", extra=self._facts)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self.should_exit:
            self._service.drain()
            threading.Thread(target=self._service.close, args=(self._grace,), daemon=True).start()
        super().handle_exit(sig, frame)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {
            number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
    except OSError as error:
        raise DataError(f"--host {host} --port {port}: {error.strerror or error}. Choose another one.") from error
    listener.set_inheritable(True)
    return listener


def _read_template(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--chat-template {file}: {error}.") from error
