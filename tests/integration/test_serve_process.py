"""The server as a process: killed under load and started again, stopped politely, and the guide's own lines."""

import itertools
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from odqa.serve.tensors import encode_vectors
from tests.command_line import odqa
from tests.served import listening, service_of, serving
from tests.tiny_models import tiny_llama

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs/guides/serving.md").read_text(encoding="utf-8")
ASKED = {"model": "llama", "prompt": "where is the river", "max_tokens": 60, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("process") / "llama", chat=True)


class Clients:
    """Threads that ask, whole and as streams, until the server is gone; what they took for answers."""

    def __init__(self, url: str, count: int = 6) -> None:
        self.url, self.whole, self.broken, self.refused = url, [], 0, 0
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self._threads:
            thread.start()

    whole: list[str]

    def _run(self, number: int) -> None:
        while True:
            try:
                text = self._stream() if number % 2 else self._once()
            except (httpx.TransportError, json.JSONDecodeError):
                with self._lock:
                    self.broken += 1
                return
            with self._lock:
                if text is None:
                    self.refused += 1
                    return
                self.whole.append(text)

    def _once(self) -> str | None:
        reply = httpx.post(f"{self.url}/v1/completions", json=ASKED, timeout=60)
        return str(reply.json()["choices"][0]["text"]) if reply.status_code == 200 else None

    def _stream(self) -> str | None:
        """A stream's text, if it came to its end; what OpenAI's clients do."""
        pieces: list[str] = []
        with httpx.stream("POST", f"{self.url}/v1/completions", json={**ASKED, "stream": True}, timeout=60) as reply:
            if reply.status_code != 200:
                return None
            for line in reply.iter_lines():
                if line == "data: [DONE]":
                    return "".join(pieces)
                if line:
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return None
                    pieces.append(event["choices"][0]["text"])
        raise httpx.RemoteProtocolError("the stream ended without [DONE]")

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()


def vectors(value: float) -> dict[str, str]:
    return {"prompt_embeds": encode_vectors(torch.full((2, 32), value))}


def test_a_killed_server_keeps_what_was_registered_and_gives_no_half_answers(llama: Path, tmp_path: Path) -> None:
    kept: set[str] = set()  # names that were acknowledged
    tried: set[str] = set()  # that may or may not be there
    with serving(llama, tmp_path, "--requests-a-minute", "0") as server:
        clients = Clients(server.url)
        killer = threading.Timer(0.05, server.process.kill)
        for step in itertools.count():
            if step >= 5 and len(clients.whole) >= 3 and not killer.ident:
                killer.start()
            name = f"n{step % 7}"
            tried.add(name)
            try:
                put = httpx.put(f"{server.url}/v1/artifacts/{name}", json=vectors(0.1 * (step % 50)))
            except httpx.TransportError:
                break
            assert put.status_code in (200, 201)
            kept.add(name)
        clients.wait()
        killer.join()
        assert server.process.wait(30) == -signal.SIGKILL
    assert clients.broken + clients.refused == 6 and len(kept) >= 3
    assert len(set(clients.whole)) == 1, "greedy: every answer that was taken for whole is the same one"
    with service_of(llama, tmp_path) as again, listening(again) as url:
        names = {one["name"] for one in httpx.get(f"{url}/v1/artifacts").json()["data"]}
        assert kept <= names <= tried
        for name in sorted(names):
            reply = httpx.post(f"{url}/v1/completions", json={**ASKED, "model": f"llama:{name}"})
            assert reply.status_code == 200, "whole, in its old or new form"
        assert httpx.post(f"{url}/v1/completions", json=ASKED).json()["choices"][0]["text"] == clients.whole[0]


@pytest.mark.slow
def test_a_polite_stop_finishes_what_runs(llama: Path, tmp_path: Path) -> None:
    with serving(llama, tmp_path, "--requests-a-minute", "0", "--grace", "30") as server:
        replies: list[httpx.Response] = []
        asked = {**ASKED, "n": 40, "max_tokens": 150}
        thread = threading.Thread(
            target=lambda: replies.append(httpx.post(f"{server.url}/v1/completions", json=asked, timeout=60))
        )
        thread.start()
        while httpx.get(f"{server.url}/healthz").json()["running"] == 0:
            time.sleep(0.005)
        assert server.stop() == 0
        thread.join(60)
        assert replies[0].status_code == 200 and len(replies[0].json()["choices"]) == 40
        assert server.log[-1]["event"] == "stopped"
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/healthz")


@pytest.mark.slow
def test_a_stop_without_grace_answers_the_rest_with_an_error(llama: Path, tmp_path: Path) -> None:
    with serving(llama, tmp_path, "--requests-a-minute", "0", "--grace", "0") as server:
        clients = Clients(server.url, 4)
        time.sleep(0.3)
        assert server.stop() == 0
        clients.wait()
        assert len(set(clients.whole)) <= 1 and clients.broken + clients.refused == 4


# --- the guide --------------------------------------------------------------------------------------------------------


def blocks(kind: str) -> Iterator[str]:
    yield from re.findall(rf"^```{kind}\n(.*?)^```$", GUIDE, flags=re.MULTILINE | re.DOTALL)


def test_the_guides_lines_run(llama: Path, tmp_path: Path) -> None:
    """Its curl lines and Python, against a server as it starts one; the model is a random one, so no answer is read."""
    lines = [
        line for text in blocks("bash") for line in text.replace("\\\n", "").splitlines() if line.startswith("curl")
    ]
    assert len(lines) >= 7
    with serving(llama, tmp_path, "--name", "odqa-mini-d1", "--ask") as server:
        for line in lines:
            line = line.replace("http://127.0.0.1:8000", server.url)
            done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60, cwd=tmp_path)
            assert done.returncode == 0, (line, done.stderr)
            assert '"error"' not in done.stdout, (line, done.stdout)
        for text in blocks("py"):
            code = text.replace("http://127.0.0.1:8000", server.url)
            exec(compile(code, "serving.md", "exec"), {})


def test_the_guide_names_every_option() -> None:
    shown = set(re.findall(r"`(--[a-z-]+)", GUIDE))
    known = set(re.findall(r"(--[a-z-]+)", odqa("serve", "--help").out))
    assert shown <= known, "no option that is not there"
    assert known - shown <= {"--help"}, "and none left out"


def test_a_key_is_made_on_the_command_line(tmp_path: Path) -> None:
    made = odqa("serve-key", "alice", "--folder", str(tmp_path / "served"))
    assert made.code == 0 and re.fullmatch(r"odqa-[\w-]{43}\n", made.out)
    stored: dict[str, Any] = json.loads((tmp_path / "served/keys.json").read_text(encoding="utf-8"))
    assert [record["user"] for record in stored["keys"]] == ["alice"] and made.out.strip() not in json.dumps(stored)
    assert odqa("serve-key", "alice", "--folder", str(tmp_path / "served"), "--revoke").out == "1 revoked\n"
    wrong = odqa("serve-key", "Al", "--folder", str(tmp_path / "served"))
    assert wrong.code == 2 and wrong.err.count("\n") == 1


def test_without_the_web_framework_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    done = odqa("serve", "embedded:odqa-mini-d1")
    assert done.code == 2 and "pip install 'odqa[serve]'" in done.err and done.err.count("\n") == 1
