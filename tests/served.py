"""A served model for tests: the application in this process, behind a real socket."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from odqa.serve.app import create_app
from odqa.serve.limits import Limits
from odqa.serve.server import load_service
from odqa.serve.state import Service


@contextmanager
def service_of(model: Path, folder: Path, limits: Limits | None = None, **options: Any) -> Iterator[Service]:
    """A service whose engine ends with the block."""
    service = load_service(str(model), folder, limits=limits, device="cpu", **options)
    try:
        yield service
    finally:
        service.scheduler.close()


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """Its address, on a free port of this machine, while the block lasts."""
    import uvicorn

    config = uvicorn.Config(
        create_app(service), port=0, log_config=None, access_log=False, lifespan="off", http="h11", ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + 20
    while not server.started:
        assert thread.is_alive() and time.monotonic() < end, "the server does not start"
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server does not stop"
