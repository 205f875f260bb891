"""A served model for tests: the application in this process, behind a real socket, or in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


@dataclass
class Process:
    """`odqa serve` in a process of its own. `log` has its JSON lines so far."""

    url: str
    process: "subprocess.Popen[bytes]"
    log_file: Path

    @property
    def log(self) -> list[dict[str, Any]]:
        lines = self.log_file.read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]

    @property
    def memory(self) -> int:
        """Resident bytes (Linux)."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def stop(self, number: int = signal.SIGTERM, seconds: float = 60) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)


@contextmanager
def serving(model: Path, folder: Path, *options: str) -> Iterator[Process]:
    """A process that serves while the block lasts, if nothing ends it before; it asks no pipeline unless told to."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    command = [sys.executable, "-m", "odqa.cli", "serve", str(model), "--folder", str(folder), "--port", "0"]
    if not {"--ask", "--pipeline"} & set(options):
        command.append("--no-ask")
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--threads", "1", *options], stderr=file)
    made = Process("", process, log)
    end = time.monotonic() + 120
    try:
        while not (ready := [line for line in made.log if line["event"] == "ready"]):
            assert process.poll() is None and time.monotonic() < end, log.read_text(encoding="utf-8")
            time.sleep(0.02)
        made.url = ready[0]["url"]
        yield made
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
