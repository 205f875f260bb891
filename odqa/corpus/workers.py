"""Calls of one function in other processes, with results in the order of the calls.

    python -m odqa.corpus.workers MODULE:FUNCTION     what a worker process runs

FUNCTION is called once with the setup, and returns the function that is called with each task. Tasks, results and the
setup are JSON values; a task may have bytes besides. They travel over the worker's standard input and output, each
message as two lengths of 8 bytes (big-endian) and what they measure: JSON, bytes.

Why not `concurrent.futures`: its processes import the caller's main module again or inherit its threads and locks, they
live on when the caller is killed, and their messages are pickles. These know nothing of the caller, and end with it.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any, TypeVar

from odqa.errors import DataError

T = TypeVar("T")
Call = Callable[[Any, bytes], Any]


def in_order(
    target: str, setup: Any, tasks: Iterable[tuple[T, Any, bytes]], *, processes: int
) -> Iterator[tuple[T, Any]]:
    """The results of `target` for each task (a label of the caller's, a JSON value, bytes), each with its label.

    At most two tasks a process are taken from `tasks` before their results are asked for, so memory stays bounded.
    Raises DataError if a process dies, and what FUNCTION raises there as far as it is a DataError.
    """
    workers = threading.local()
    started: list[_Worker] = []

    def call(task: Any, payload: bytes) -> Any:
        if not hasattr(workers, "own"):
            workers.own = _Worker(target, setup)
            started.append(workers.own)
        return workers.own.call(task, payload)

    waiting: deque[tuple[T, Future[Any]]] = deque()
    pool = ThreadPoolExecutor(processes)
    try:
        for label, task, payload in tasks:
            waiting.append((label, pool.submit(call, task, payload)))
            if len(waiting) >= 2 * processes:
                yield waiting[0][0], waiting.popleft()[1].result()
        while waiting:
            yield waiting[0][0], waiting.popleft()[1].result()
    finally:
        for _, future in waiting:
            future.cancel()
        for worker in list(started):
            worker.stop()  # so that no thread waits for it
        pool.shutdown()
        for worker in started:
            worker.stop()  # those that were just starting


class _Worker:
    def __init__(self, target: str, setup: Any) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-m", "odqa.corpus.workers", target]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.call(setup, b"")

    def call(self, task: Any, payload: bytes) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            _send(self._process.stdin, task, payload)
            reply, _ = _receive(self._process.stdout)
        except (OSError, EOFError):
            code = self._process.wait()
            how = f"killed by signal {-code}" if code < 0 else f"ended with {code}"
            raise DataError(
                f"a process that reads the dump was {how} (out of memory?). Run the same command again: it goes on"
                " where it stood. Fewer processes need less memory (passages.processes, --processes)."
            ) from None
        if "error" in reply:
            raise DataError(reply["error"])
        return reply["result"]

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # what it did not take is still to be flushed
                if pipe is not None:
                    pipe.close()


def _send(pipe: IO[bytes], value: Any, payload: bytes = b"") -> None:
    message = json.dumps(value).encode()
    pipe.write(len(message).to_bytes(8, "big") + len(payload).to_bytes(8, "big") + message)
    pipe.write(payload)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> tuple[Any, bytes]:
    lengths = pipe.read(16)
    if len(lengths) < 16:
        raise EOFError
    message, payload = (pipe.read(int.from_bytes(length, "big")) for length in (lengths[:8], lengths[8:]))
    return json.loads(message), payload


def main() -> None:
    """Serve calls until the input ends; errors of the data are replies, others end the process with a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller gets it too, and ends this process in good order
    inbox, outbox = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not come between the messages
    module, _, function = sys.argv[1].partition(":")
    make = getattr(importlib.import_module(module), function)
    call: Call | None = None
    reply: dict[str, Any]
    while True:
        try:
            task, payload = _receive(inbox)
        except EOFError:
            return
        try:
            if call is None:
                call, reply = make(task), {"result": None}
            else:
                reply = {"result": call(task, payload)}
        except DataError as error:
            reply = {"error": str(error)}
        try:
            _send(outbox, reply)
        except BrokenPipeError:
            return


if __name__ == "__main__":
    main()
