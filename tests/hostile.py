"""Requests that nobody would send who means well, drawn from a seed without end."""

import base64
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from odqa.serve.tensors import encode_vectors
from tests.unit.test_serve_tensors import HOSTILE

NASTY: list[Any] = [
    *(None, True, False, 0, -1, 2**31, 2**63, 10**300, 0.5, -0.0, "", "a", "\x00", "\ud800", "ÿ" * 500, "A" * 70_000),
    *([], {}, [[]], [None], [""], ["a"] * 3000, [0] * 3000, [-1], [2**70], [[0], [0, "a"]], {"a": {"b": []}}),
    *("../../etc/passwd", "llama:../../x", "llama:", ":", "llama:x:y", "</s><|user|>", "${jndi:x}", "' OR 1=1", "%00"),
]
RAW = [
    b"",
    b"{",
    b"null",
    b"NaN",
    b"[" * 50_000,
    b"\xff" * 100,
    b'{"n":1e999}',
    b'{"model":"llama","model":1}',
    b"{}" * 9,
]
NAMES = ["x", "..", ".", "a/b", "..%2f..%2fkeys.json", "%00", "A", "a" * 65, "-", "%ed%a0%80", "con", " ", "a%0d%0ab"]
TYPES = ["application/json", "application/json; charset=utf-16", "text/plain", "", "application/x-www-form-urlencoded"]


@dataclass(frozen=True)
class Attack:
    """One request."""

    method: str
    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def attacks(seed: int) -> Iterator[Attack]:
    chance = random.Random(seed)
    tensors = [base64.b64encode(raw).decode() for raw, _ in HOSTILE.values()]
    good = encode_vectors(torch.zeros(3, 32))
    tensors += [good[:-9], good + "A", "A" * 400_000, encode_vectors(torch.full((2, 32), 3e38)), "=", "{}"]
    fields: dict[str, dict[str, Any]] = {
        "/v1/completions": {
            "model": "llama", "prompt": "a", "max_tokens": 2, "n": 1, "temperature": 0.5, "top_p": 0.9, "seed": 1,
            "stop": ["b"], "logprobs": 1, "echo": False, "stream": False, "stream_options": None, "user": "u",
            "logprob_token_ids": [1], "return_tokens_as_token_ids": True, "prompt_embeds": None, "prefix_embeds": None,
        },
        "/v1/chat/completions": {
            "model": "llama", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "n": 1, "stop": "b",
            "logprobs": True, "top_logprobs": 1, "stream": False,
        },
        "/tokenize": {"model": "llama", "prompt": "a", "add_special_tokens": True},
        "/v1/word_vectors": {"model": "llama", "tokens": [1, 2]},
        "/v1/artifacts/x": {"prompt_embeds": good, "description": None, "tensors": None},
    }  # fmt: skip
    while True:
        path = chance.choice(list(fields))
        method = "PUT" if "artifacts" in path else "POST"
        body: dict[str, Any] = dict(fields[path])
        headers = {"Content-Type": "application/json"}
        kind = chance.randrange(8)
        if kind <= 2:  # a field or two that are something else
            for name in chance.sample(list(body), chance.randint(1, 2)):
                body[name] = chance.choice(NASTY)
            if chance.random() < 0.2:
                body[chance.choice(["tools", "\ud800", "a" * 5000, "__class__"])] = chance.choice(NASTY)
        elif kind == 3:  # tensors
            tensor = chance.choice(tensors)
            if "artifacts" in path:
                settings = {"length": chance.choice(NASTY), "rank": chance.choice(NASTY), "alpha": chance.choice(NASTY)}
                lora = {
                    "kind": chance.choice(["lora", "prompt-tuning", "x"]),
                    "settings": settings,
                    "backbone": "0" * 64,
                }
                body = chance.choice([{"prompt_embeds": tensor}, {"description": lora, "tensors": tensor}])
            else:
                body = {"model": "llama", chance.choice(["prompt_embeds", "prefix_embeds"]): tensor, "max_tokens": 2}
                path = "/v1/completions"
                body |= chance.choice([{}, {"prompt": "a"}, {"stream": True}])
        elif kind == 4:  # names
            name = chance.choice(NAMES)
            path = chance.choice(["/v1/artifacts/", "/v1/models/", "/", "//", "/v1/", "/v1/completions/"]) + name
            method = chance.choice(["GET", "PUT", "DELETE", "POST", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW"])
            body = {"prompt_embeds": good}
        if kind == 5:  # no JSON
            yield Attack(method, path, chance.choice(RAW), headers)
            continue
        data = json.dumps(body).encode()
        if kind == 6:  # damaged on the way
            place = chance.randrange(len(data))
            data = chance.choice(
                [data[:place], data[:place] + bytes([chance.randrange(256)]) + data[place + 1 :], data + data[place:]]
            )
        if kind == 7:
            headers = {
                "Content-Type": chance.choice(TYPES),
                "Authorization": chance.choice(["Bearer", "x" * 5000, "B c"]),
            }
        yield Attack(method, path, data, headers)


def ask_attacks(seed: int) -> Iterator[Attack]:
    """The same of the routes that answer questions and keep marks."""
    chance = random.Random(seed)
    marked = f"ask-{'0' * 24}"
    while True:
        is_mark = chance.random() < 0.3
        path = f"/ask/{chance.choice([marked, *NAMES])}/mark" if is_mark else "/ask"
        body: dict[str, Any] = {"is_right": True} if is_mark else {"question": "a", "stream": None, "trace": False}
        kind = chance.randrange(4)
        if kind <= 1:
            body[chance.choice([*body, "pipeline", "\ud800"])] = chance.choice(NASTY)
        data = json.dumps(body).encode()
        if kind == 2:
            data = chance.choice([*RAW, data[: chance.randrange(len(data))]])
        method = chance.choice(["POST"] * 6 + ["GET", "PUT", "DELETE", "BREW"])
        yield Attack(method, path, data, {"Content-Type": chance.choice(["application/json"] * 4 + TYPES)})
