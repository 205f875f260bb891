"""Measures `odqa serve` under load: clients at once on loopback, mixed prompts, artifacts, lengths and sampling, each
answer compared with the one that the same request got alone; then, in turn, the same load with one text at a time.
"""

import asyncio
import base64
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer

from benchmarks.common import RESULTS, ROOT, save_result

WARM = 3.0  # seconds of load before tokens are counted
NAMES = ("short", "long")  # of the registered artifacts
Json = dict[str, Any]


@dataclass
class Load:
    """What clients saw."""

    seconds: float = 0.0
    tokens: float = 0
    processor_seconds: float = 0.0
    rows_a_step: float = 0.0
    latencies: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    wrong: list[Json] = field(default_factory=list)

    def to_json(self) -> Json:
        ordered = sorted(self.latencies)
        found = {
            f"p{share}": round(ordered[min(len(ordered) - 1, len(ordered) * share // 100)], 3) for share in (50, 95, 99)
        }
        return {
            "seconds": round(self.seconds, 1),
            "requests": len(ordered),
            "errors": len(self.errors),
            "answers_other_than_alone": len(self.wrong),
            "latency_seconds": found,
            "tokens_a_second": round(self.tokens / self.seconds, 1),
            "tokens_a_processor_second": round(self.tokens / self.processor_seconds, 1),
            "rows_a_step": self.rows_a_step,
        }


def serve(
    model: Annotated[str, typer.Option(help="The model that is served, a causal one.")] = "embedded:odqa-mini-d1",
    clients: Annotated[int, typer.Option(min=1, help="At once; each asks again as soon as it is answered.")] = 64,
    seconds: Annotated[
        float, typer.Option(min=0.5, help="Of the load that errors and latencies are taken from.")
    ] = 120.0,
    rounds: Annotated[int, typer.Option(min=1, help="Of batched and one at a time, in turn.")] = 3,
    round_seconds: Annotated[float, typer.Option(min=0.5, help="Of each turn.")] = 15.0,
    requests: Annotated[int, typer.Option(min=4, help="Different requests that the clients draw from.")] = 160,
    threads: Annotated[int, typer.Option(min=1, help="Threads of an operation in the server.")] = 1,
    out: Annotated[Path, typer.Option(help="Where the result goes.")] = RESULTS / "bench-serve.json",
) -> None:
    """Latency, tokens a second and right answers of `odqa serve` under load."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        batched = stack.enter_context(running(model, Path(folder) / "batched", rows=clients, threads=threads))
        single = stack.enter_context(running(model, Path(folder) / "single", rows=1, threads=threads))
        name = Path(model.removeprefix("embedded:")).name
        for server in (batched, single):
            register(server.url, name)
        asked = list(mixed_requests(name, requests))
        alone = [say(post(batched.url, body)) for body in asked]
        typer.echo(f"{len(asked)} requests asked alone, {len(set(alone))} different answers")
        main = asyncio.run(load(batched, asked, alone, clients, seconds))
        typer.echo(json.dumps(main.to_json()))
        turns: dict[str, list[Load]] = {"batched": [], "one at a time": []}
        for _ in range(rounds):
            for label, server in (("batched", batched), ("one at a time", single)):
                turns[label].append(asyncio.run(load(server, asked, alone, clients, round_seconds)))
        result = {
            "what": "odqa serve on loopback; clients and server share the machine; answers compared with those alone",
            "model": name,
            "clients": clients,
            "threads": threads,
            "different_requests": len(asked),
            "load": main.to_json(),
            "peak_memory_bytes": peak_memory(batched.process.pid),
            "turns": {label: [one.to_json() for one in found] for label, found in turns.items()},
            "batched_over_one_at_a_time": {
                "tokens_a_second": spread([one.tokens / one.seconds for one in of] for of in turns.values()),
                "tokens_a_processor_second": spread(
                    [one.tokens / one.processor_seconds for one in of] for of in turns.values()
                ),
            },
            "versions": {package: version(package) for package in ("fastapi", "uvicorn", "transformers", "torch")},
        }
    save_result(out, result)
    typer.echo(json.dumps(result["batched_over_one_at_a_time"]))
    for problem in [*main.errors[:3], *(json.dumps(one) for one in main.wrong[:3])]:
        typer.echo(problem)


# --- servers ----------------------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A server in a process of its own."""

    url: str
    process: "subprocess.Popen[bytes]"


@contextlib.contextmanager
def running(model: str, folder: Path, *, rows: int, threads: int) -> Iterator[Running]:
    """`odqa serve` on a free port while the block lasts."""
    folder.mkdir(parents=True)
    log = folder / "log"
    options = ["--port", "0", "--folder", str(folder / "served"), "--rows", str(rows), "--threads", str(threads)]
    options += ["--requests-a-minute", "0", "--grace", "5"]
    command = [sys.executable, "-m", "odqa.cli", "serve", model, *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stderr=file, cwd=ROOT)
    try:
        yield Running(wait_until_ready(log, process), process)
    finally:
        process.terminate()
        process.wait(30)


def wait_until_ready(log: Path, process: "subprocess.Popen[bytes]", seconds: float = 120.0) -> str:
    """The address that the log names once the server listens."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for line in log.read_text(encoding="utf-8").splitlines():
            if line.startswith("{") and line.endswith("}") and json.loads(line)["event"] == "ready":
                return str(json.loads(line)["url"])
        if process.poll() is not None:
            break
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text(encoding='utf-8')}")


def post(url: str, body: Json, path: str = "/v1/completions", method: str = "POST") -> Json:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers, method=method)
    with urllib.request.urlopen(request, timeout=120) as reply:
        found: Json = json.load(reply)
    return found


def register(url: str, model: str) -> None:
    """Two soft prompts, 5 and 40 vectors, of the size of word vectors."""
    import torch
    from safetensors.torch import load, save

    tokens = list(range(100, 140))
    vectors = load(base64.b64decode(post(url, {"model": model, "tokens": tokens}, "/v1/word_vectors")["prompt_embeds"]))
    mixed = vectors["prompt_embeds"] * torch.linspace(0.5, 1.5, len(tokens))[:, None]
    for name, length in zip(NAMES, (5, 40), strict=True):
        held = base64.b64encode(save({"prompt_embeds": mixed[:length].contiguous()})).decode()
        post(url, {"prompt_embeds": held}, f"/v1/artifacts/{name}", "PUT")


def metrics(url: str) -> dict[str, float]:
    """The server's own numbers."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as reply:
        lines = [line for line in reply.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def processor_seconds(server: Running) -> float:
    """What a server's threads have used of the processor so far (Linux)."""
    fields = Path(f"/proc/{server.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(pid: int) -> int | None:
    """The largest resident size so far, on Linux."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return None


# --- load -------------------------------------------------------------------------------------------------------------


def mixed_requests(model: str, count: int, seed: int = 0) -> Iterator[Json]:
    """Questions of the embedded set, up to a dozen in one prompt; with artifacts and without; greedy and sampled."""
    lines = (ROOT / "odqa/assets/questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [str(json.loads(line)["question"]) for line in lines]
    chance = random.Random(seed)
    for number in range(count):
        asked = chance.sample(questions, chance.choice((1, 1, 2, 4, 12)))
        body: Json = {"prompt": "".join(f"Question: {text}?\n" for text in asked) + "Answer:"}
        body["model"] = chance.choice((model, model, *(f"{model}:{name}" for name in NAMES)))
        body |= {"max_tokens": chance.randint(8, 64), "ignore_eos": True}  # so long, whatever the model would say
        body |= {"temperature": 0} if number % 2 else {"temperature": 0.8, "top_p": 0.95, "seed": number}
        yield body


def say(reply: Json) -> str:
    choice = reply["choices"][0]
    return json.dumps([choice["text"], choice["finish_reason"], reply["usage"]["completion_tokens"]])


def spread(both: Iterable[list[float]]) -> Json:
    """Ratios of turns that followed one another."""
    ratios = [one / other for one, other in zip(*both, strict=True)]
    found = {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}
    return {name: round(ratio, 2) for name, ratio in found.items()}


async def load(server: Running, asked: list[Json], alone: list[str], clients: int, seconds: float) -> Load:
    """Clients that ask one request after the other until the time is over; all that was begun is finished.

    Tokens are those that the server wrote within the time, once all clients had been there for a while.
    """
    found, url = Load(), server.url
    began = time.monotonic()
    started = began + WARM

    async def client(number: int) -> None:
        chance = random.Random(number)
        connection = Connection(url)
        while time.monotonic() < started + seconds:
            which = chance.randrange(len(asked))
            before = time.monotonic()
            try:
                status, reply = await connection.post("/v1/completions", asked[which])
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                found.errors.append(repr(error))
                connection = Connection(url)
                continue
            if status != 200:
                found.errors.append(f"{status} {json.dumps(reply)[:300]}")
                continue
            found.latencies.append(time.monotonic() - before)
            if say(reply) != alone[which]:
                found.wrong.append(
                    {"asked": asked[which], "alone": json.loads(alone[which]), "got": json.loads(say(reply))}
                )
        await connection.close()

    async def watch() -> None:
        await asyncio.sleep(WARM)
        before, since, used = await asyncio.to_thread(metrics, url), time.monotonic(), processor_seconds(server)
        await asyncio.sleep(seconds)
        after = await asyncio.to_thread(metrics, url)
        found.seconds, found.processor_seconds = time.monotonic() - since, processor_seconds(server) - used
        wrote, steps, rows = (
            after[f"odqa_{name}"] - before[f"odqa_{name}"]
            for name in ("completion_tokens_total", "step_rows_count", "step_rows_sum")
        )
        found.tokens, found.rows_a_step = wrote, round(rows / steps, 1)

    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    return found


class Connection:
    """HTTP/1.1 with keep-alive in a few lines: the client must not take the processor from the server."""

    def __init__(self, url: str) -> None:
        self._place = urlsplit(url)
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, body: Json) -> tuple[int, Json]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._place.hostname, self._place.port)
        reader, writer = self._streams
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.lower().split(": ", 1) for line in lines if ": " in line)
        reply = json.loads(await reader.readexactly(int(headers["content-length"])))
        if headers.get("connection") == "close":
            await self.close()
        return int(status.split()[1]), reply

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
