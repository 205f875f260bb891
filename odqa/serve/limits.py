"""What one request, one user and all of them together may ask for. All defaults are our choice."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a server.

    A request: `body_bytes`, `body_seconds` until its body is there, `request_rows` texts written (prompts times n),
    `new_tokens` and `logprobs` of each, `request_seconds` until it is answered, waiting included.
    A user: `user_rows` waiting, `requests_a_minute` (0: any number; a tenth of it may come at once), `artifacts` of
    `artifact_bytes` each.
    All: `rows` computed together, which share `cache_tokens` of key/value cache, padding and what is still to be
    written included; `prefill_tokens` read between two steps, so that those who are written for do not stand still;
    `waiting_rows` and `waiting_bytes` (of vectors); `connections`, and `reading_bytes` of bodies under way.
    Questions to the pipeline have at most `question_characters`; `waiting_asks` may wait for their turn, `user_asks` of
    one user.
    """

    body_bytes: int = 8 << 20
    body_seconds: float = 30.0
    request_rows: int = 1024
    new_tokens: int = 1024
    logprobs: int = 20
    request_seconds: float = 120.0
    user_rows: int = 2048
    requests_a_minute: int = 3000
    artifacts: int = 100
    artifact_bytes: int = 4 << 20
    rows: int = 64
    cache_tokens: int = 32_768
    prefill_tokens: int = 4096
    waiting_rows: int = 4096
    waiting_bytes: int = 256 << 20
    connections: int = 1024
    reading_bytes: int = 256 << 20
    question_characters: int = 2000
    waiting_asks: int = 64
    user_asks: int = 8
