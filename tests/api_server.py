"""A local server that speaks OpenAI's protocol, and misbehaves on demand."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Says:
    """One scripted reply. `drip` seconds between its bytes; `cut`: the connection breaks after so many of them."""

    status: int = 200
    body: str | Body = ""
    headers: dict[str, str] = field(default_factory=dict)
    drip: float = 0.0
    cut: int | None = None


@dataclass(slots=True)
class Server:
    """`script` replies go first, one a POST; then `text_of` writes each answer, with log-probabilities if asked for.

    Every word of an answer is a token of log-probability -0.5. `heard` has the headers and bodies of all POSTs.
    """

    text_of: Callable[[Body], str]
    script: list[Says] = field(default_factory=list)
    heard: list[tuple[str, dict[str, str], Body]] = field(default_factory=list)
    models: list[str] = field(default_factory=lambda: ["small", "large"])
    gives_logprobs: bool = True
    usage: bool = True
    most_at_once: int = 0
    delay: float = 0.0
    url: str = ""
    _lock: Any = field(default_factory=threading.Lock)
    _now: int = 0

    def reply(self, path: str, asked: Body) -> Says:
        if asked.get("model") not in self.models:
            return Says(404, {"error": {"message": f"The model `{asked.get('model')}` does not exist.", "code": None}})
        chat = path.endswith("/chat/completions")
        words = asked["messages"][-1]["content"] if chat else asked["prompt"]
        text = self.text_of(asked)
        for stop in asked.get("stop", []):
            text = text.partition(stop)[0]
        choices = [self._choice(text, number, chat, asked) for number in range(asked.get("n", 1))]
        body: Body = {"model": f"{asked['model']}-0425", "choices": choices}
        if self.usage:
            body["usage"] = {"prompt_tokens": len(words.split()), "completion_tokens": len(text.split())}
        return Says(200, body)

    def _choice(self, text: str, number: int, chat: bool, asked: Body) -> Body:
        tokens = [f"{word} " for word in text.split(" ")] if text else []
        choice: Body = {"index": number, "finish_reason": "stop"}
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        if asked.get("logprobs") and self.gives_logprobs:
            content = [{"token": token, "logprob": -0.5} for token in tokens]
            choice["logprobs"] = (
                {"content": content} if chat else {"tokens": tokens, "token_logprobs": [-0.5] * len(tokens)}
            )
        return choice

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            yield
        finally:
            with self._lock:
                self._now -= 1


def first_word(asked: Body) -> str:
    """An answer that depends on the question and on nothing else."""
    words = asked["messages"][-1]["content"] if "messages" in asked else asked["prompt"]
    return str(words.rpartition("Question: ")[2].split()[0])


@contextlib.contextmanager
def serving(text_of: Callable[[Body], str] = first_word) -> Iterator[Server]:
    """Run a server on a free port of this machine while the block lasts."""
    server = Server(text_of)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.counted():
                with server._lock:
                    server.heard.append((self.path, dict(self.headers), asked))
                    says = server.script.pop(0) if server.script else server.reply(self.path, asked)
                time.sleep(server.delay)
                self.say(says)

        def do_GET(self) -> None:
            known = self.path.endswith("/models")
            self.say(Says(200, {"data": [{"id": name} for name in server.models]}) if known else Says(404))

        def say(self, says: Says) -> None:
            data = (says.body if isinstance(says.body, str) else json.dumps(says.body)).encode()
            self.send_response(says.status)
            for name, value in {"Content-Type": "application/json", **says.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client may be gone
                for byte in data[: says.cut] if says.drip or says.cut is not None else []:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(says.drip)
                if not says.drip and says.cut is None:
                    self.wfile.write(data)

        def log_message(self, *_args: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server.url = f"http://127.0.0.1:{http.server_port}/v1"
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
