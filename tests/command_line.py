"""`odqa ...` inside the test's process: the entry point itself, without the seconds that a new interpreter takes."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from odqa.cli import main


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left: exit code, stdout, stderr. A traceback is not among it: it fails the test."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which must be one JSON value and nothing else."""
        return json.loads(self.out)


def odqa(*arguments: str | Path) -> Outcome:
    """Run one command to its end."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        patch.object(sys, "argv", ["odqa", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Outcome(code, out.getvalue(), err.getvalue())


def ok(*arguments: str | Path) -> Outcome:
    """Run one command that must succeed."""
    outcome = odqa(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def refused(*arguments: str | Path) -> str:
    """Run one command that must end as bad input does: code 2, nothing on stdout, one line that is returned.

    Lines before the last are progress; none may be of a traceback.
    """
    outcome = odqa(*arguments)
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    return outcome.err.strip().splitlines()[-1]
