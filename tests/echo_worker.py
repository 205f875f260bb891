"""A worker for tests/unit/test_dump.py, without the imports of a test: says what it got, fails, or dies."""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from odqa.errors import DataError


def echo(setup: Any) -> Callable[[Any, bytes], Any]:
    def call(task: Any, payload: bytes) -> Any:
        sys.stdout.write("noise\n")
        if task == "bad data":
            raise DataError("one line")
        if task == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return [setup, task, payload.decode()]

    return call
