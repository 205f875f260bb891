"""Whatever is sent: no 500, no traceback, an error in the protocol's form, and a server that goes on.

A few hundred requests every time; ten thousand, those of schemathesis among them, as a slow test.
"""

import itertools
import json
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.hostile import Attack, attacks
from tests.served import Process, serving
from tests.tiny_models import tiny_llama

OPTIONS = ("--requests-a-minute", "0", "--body-bytes", "1000000", "--body-seconds", "1", "--new-tokens", "64")
GROWTH = 400 << 20  # our choice: a leak of 100 kB a request would show; torch and its buffers take some of it


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    root = tmp_path_factory.mktemp("hostile")
    with serving(tiny_llama(root / "llama", chat=True), root / "served", *OPTIONS) as made:
        yield made


def check(reply: httpx.Response, what: object) -> None:
    """An answer of any kind that a client can read, and nothing of ours in it."""
    assert reply.status_code != 500 and reply.status_code < 504, (what, reply.text)
    assert "Traceback" not in reply.text and "site-packages" not in reply.text, what
    if reply.status_code >= 400 and reply.request.method != "HEAD":
        error = reply.json()["error"]
        assert error["message"] and "\n" not in error["message"] and len(error["message"]) < 600, what


def send(server: Process, many: list[Attack]) -> Counter[int]:
    found: Counter[int] = Counter()
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for attack in many:
            request = client.build_request(attack.method, "/", content=attack.body, headers=attack.headers)
            request.url = request.url.copy_with(raw_path=attack.path.encode())
            reply = client.send(request)
            check(reply, attack)
            found[reply.status_code] += 1
    return found


def check_alive(server: Process) -> None:
    asked = {"model": "llama", "prompt": "where is the river", "max_tokens": 4, "temperature": 0}
    assert httpx.post(f"{server.url}/v1/completions", json=asked).status_code == 200
    assert server.process.poll() is None
    failed = [line for line in server.log if line["event"] in ("failed", "step_failed") or "error" in line]
    assert not failed, failed[:1]
    assert not list((server.log_file.parent.parent).glob("etc")) and not (server.log_file.parent / "keys.json").exists()


def test_hostile_requests_are_answered(server: Process) -> None:
    found = send(server, list(itertools.islice(attacks(0), 300)))
    assert found[400] > 100 and found[200] > 5 and found[415] > 5 and found[404] > 5, "of all kinds"
    check_alive(server)


def test_broken_http_is_survived(server: Process) -> None:
    """What no library sends: broken lines, lengths that lie, two lengths, a header without end, silence."""
    place = urlsplit(server.url)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    pieces = [
        b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
        head + b"Content-Length: -5\r\n\r\n{}", head + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
        head + b"Content-Length: 99999999999999999999999\r\n\r\n{}", head + b"Content-Length: 50\r\n\r\n{",
        head + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n", head + b"X: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
    ]  # fmt: skip
    silent = []
    for piece in pieces:
        connection = socket.create_connection((place.hostname or "", place.port or 0), timeout=5)
        try:
            connection.sendall(piece)
            reply = connection.recv(65_536)
            assert b"500 Internal" not in reply and b"Traceback" not in reply, piece[:80]
        except OSError:
            pass  # hung up on: as good an answer
        silent.append(connection)
    check_alive(server)
    for connection in silent:
        connection.close()


@pytest.mark.slow
def test_ten_thousand_hostile_requests(server: Process, tmp_path: Path) -> None:
    send(server, list(itertools.islice(attacks(1), 500)))
    before = server.memory
    found: Counter[int] = Counter()
    parts = [list(itertools.islice(attacks(seed), 1750)) for seed in range(2, 6)]
    results: list[Any] = []

    def attack(part: list[Attack]) -> None:
        try:
            results.append(send(server, part))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=attack, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
        found += result
    count = schemathesis_requests(server, 3000)
    assert sum(found.values()) + count >= 10_000
    check_alive(server)
    time.sleep(0.5)
    growth = server.memory - before
    sys.stdout.write(json.dumps({"statuses": dict(found), "schemathesis": count, "growth_bytes": growth}) + "\n")  # -s
    assert growth < GROWTH


def schemathesis_requests(server: Process, count: int) -> int:
    """So many requests made from the OpenAPI description, half of them against it."""
    import hypothesis
    import schemathesis
    from schemathesis import GenerationMode

    schema = schemathesis.openapi.from_dict(httpx.get(f"{server.url}/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 10
    sent = 0
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            share = count // (2 * len(operations)) + 1

            @hypothesis.settings(
                max_examples=share, deadline=None, database=None, derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )  # fmt: skip
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Any) -> None:
                nonlocal sent
                sent += 1
                reply = case.call(base_url=server.url, timeout=60)
                assert reply.status_code != 500 and "Traceback" not in reply.text, case.as_curl_command()

            ask()
    return sent
