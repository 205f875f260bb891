"""`Engine` over HTTP: what tunes a prompt in this process tunes it against a server, and cannot tell.

    engine = HttpEngine(Endpoint("http://127.0.0.1:8000/v1", key=key), "odqa-mini-d1")

Against `odqa serve` prompts go out as `prefix_embeds` beside texts, and the log-probabilities of any tokens come back.
Another server (vLLM) knows neither: then the client puts prompt and text together as vectors, for which it must be
given the model's word vectors (`words`), and gets the likeliest tokens only, as many as the server tells.

Requests with different prompts, methods or wishes go out side by side, `concurrency` at once; the server computes them
in one batch. Bytes and seconds are counted (`spent`). A server shows no states, so there are no deep prompts.
"""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from odqa.errors import DataError, ServerError
from odqa.frozen.engine import Ask, Facts, Prompted, Sampling, Vectors, Written
from odqa.read.endpoint import Endpoint

T = TypeVar("T")
_LIKELIEST = 20  # how many vLLM tells, unless it is told otherwise


@dataclass(frozen=True, slots=True)
class _Group:
    """Requests that go out as one: the same prompt or method, and the same wish."""

    prompt: Vectors | None
    method: str | None
    sampling: Sampling
    numbers: list[int]


class HttpEngine:
    """A model behind a server that speaks OpenAI's protocol. `model` is its name there; a request's `method` NAME is
    the model MODEL:NAME.

    `words` (V, D): the word vectors of a model whose server joins no prompts and texts. Raises ServerError where the
    server cannot be reached or refuses, DataError for what this server cannot do.
    """

    def __init__(self, endpoint: Endpoint, model: str, *, words: Vectors | None = None, concurrency: int = 16) -> None:
        self.endpoint, self.model, self._words, self.concurrency = endpoint, model, words, concurrency
        self._root = endpoint.beside(endpoint.base_url.removesuffix("/v1"))
        self._known: dict[tuple[str, bool], list[int]] = {}

    @cached_property
    def _card(self) -> Mapping[str, Any]:
        def find(reply: Any) -> Mapping[str, Any]:
            cards = {card["id"]: card for card in reply["data"]}
            if self.model not in cards:
                raise ValueError(f"model {self.model!r} is not served here ({', '.join(sorted(cards)[:8])})")
            return dict(cards[self.model])

        return self.endpoint.look("/models", find)

    @property
    def joins(self) -> bool:
        """Whether the server itself puts prompts before texts: it is one of odqa's."""
        return "odqa" in self._card

    @cached_property
    def facts(self) -> Facts:
        said = self._card.get("odqa")
        if said is not None:
            return Facts(**said)
        width = None if self._words is None else int(self._words.shape[1])
        return Facts(
            model=self.model,
            fingerprint=None,
            width=width,
            layers=None,
            vocabulary=None if self._words is None else len(self._words),
            window=self._card.get("max_model_len"),
            embedding_spread=None if self._words is None else float(self._words.std()),
            takes_prompts=self._words is not None,
        )

    def spent(self) -> dict[str, float]:
        """Since the start: requests, further tries, bytes of bodies up and down, and seconds until the replies came."""
        both = self.endpoint.counts, self._root.counts
        return {
            "requests": sum(one.requests for one in both),
            "retries": sum(one.retries for one in both),
            "bytes_up": sum(one.sent for one in both),
            "bytes_down": sum(one.received for one in both),
            "seconds": sum(one.seconds for one in both),
        }

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return self._tokens(texts, special=False)

    def embed(self, ids: Sequence[int]) -> Vectors:
        if self._words is not None:
            return np.asarray(self._words[list(ids)], dtype=np.float32)
        if not self.joins:
            raise DataError(f"{self.model}: its server gives no word vectors. Give them to the engine (words).")
        body = {"model": self.model, "tokens": list(ids)}
        return self._ask(self.endpoint, "/word_vectors", body, lambda reply: _decode(reply["prompt_embeds"]))

    def spread(self, sources: Sequence[Prompted]) -> list[float]:
        raise DataError(f"{self.model}: a server shows no states of layers. Use an engine in this process.")

    def generate(self, asks: Sequence[Ask]) -> list[list[Written]]:
        found: list[list[Written]] = [[] for _ in asks]
        groups = self._groups([ask.source for ask in asks], [ask.sampling for ask in asks])

        def write(group: _Group) -> None:
            sampling = group.sampling
            wish = {
                "max_tokens": sampling.max_tokens,
                "n": sampling.n,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": sampling.seed,
                "stop": list(sampling.stop),
                "logprobs": sampling.top,
            }
            texts = self._complete(group, [asks[number].source for number in group.numbers], wish)
            for place, number in enumerate(group.numbers):
                found[number] = [
                    _written(choice, sampling) for choice in texts[place * sampling.n : (place + 1) * sampling.n]
                ]

        self._side_by_side(write, groups)
        return found

    def score(self, sources: Sequence[Prompted], targets: Sequence[Sequence[int]]) -> list[list[float]]:
        found: list[list[float]] = [[] for _ in sources]
        if not all(len(target) for target in targets):
            raise DataError("score: a target has no tokens.")
        joined = [
            Prompted(ids=[*self._ids(source), *target], prompt=source.prompt, deep=source.deep, method=source.method)
            for source, target in zip(sources, targets, strict=True)
        ]
        wish = {"max_tokens": 0, "temperature": 0.0, "echo": True, "logprobs": 0}

        def score(group: _Group) -> None:
            choices = self._complete(group, [joined[number] for number in group.numbers], wish)
            for number, choice in zip(group.numbers, choices, strict=True):
                of_target = choice["logprobs"]["token_logprobs"][-len(targets[number]) :]
                if any(value is None for value in of_target):
                    raise DataError(f"request {number}: nothing stands before its target.")
                found[number] = [float(value) for value in of_target]

        self._side_by_side(score, self._groups(joined, [Sampling()] * len(joined)))
        return found

    def choose(self, sources: Sequence[Prompted], tokens: Sequence[int]) -> NDArray[np.float32]:
        found = np.zeros((len(sources), len(tokens)), dtype=np.float32)
        wish: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}
        wish |= {"logprobs": 0, "logprob_token_ids": list(tokens)} if self.joins else {"logprobs": _LIKELIEST}

        def choose(group: _Group) -> None:
            choices = self._complete(group, [sources[number] for number in group.numbers], wish)
            for number, choice in zip(group.numbers, choices, strict=True):
                told = {_token(name): score for name, score in choice["logprobs"]["top_logprobs"][0].items()}
                if missing := [token for token in tokens if token not in told]:
                    raise DataError(
                        f"request {number}: the server tells the {len(told)} likeliest tokens, and token {missing[0]} "
                        "is none of them. Choose likelier words, or let the server tell more."
                    )
                found[number] = [told[token] for token in tokens]

        self._side_by_side(choose, self._groups(sources, [Sampling()] * len(sources)))
        return found

    # --- on the wire ---

    def _groups(self, sources: Sequence[Prompted], samplings: Sequence[Sampling]) -> list[_Group]:
        found: dict[tuple[object, ...], _Group] = {}
        for number, (source, sampling) in enumerate(zip(sources, samplings, strict=True)):
            if source.deep is not None:
                raise DataError(f"request {number}: a server takes no deep prompts. Use an engine in this process.")
            is_alone = not source.text and not source.ids  # a prompt alone is a request of its own
            of_prompt = None if source.prompt is None else id(source.prompt)
            key = (of_prompt, source.method, sampling, number if is_alone else None)
            found.setdefault(key, _Group(source.prompt, source.method, sampling, [])).numbers.append(number)
        return list(found.values())

    def _complete(self, group: _Group, sources: Sequence[Prompted], wish: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The choices of one request, in order."""
        model = self.model if group.method is None else f"{self.model}:{group.method}"
        body: dict[str, Any] = {"model": model, "return_tokens_as_token_ids": True}
        body |= {name: value for name, value in wish.items() if value not in (None, [])}
        is_alone = not sources[0].text and not sources[0].ids
        if group.prompt is not None and not self.joins:
            if body.get("echo"):
                raise DataError(f"{self.model}: its server gives no log-probabilities behind prompts of vectors.")
            body["prompt_embeds"] = [
                _encode(np.concatenate([group.prompt, self.embed(self._ids(source))])) for source in sources
            ]
        elif group.prompt is not None:
            body["prefix_embeds"] = _encode(group.prompt)
        if "prompt_embeds" not in body and not (is_alone and group.prompt is not None):
            texts = [source.text if source.ids is None else list(source.ids) for source in sources]
            is_text = all(isinstance(text, str) for text in texts)
            body["prompt"] = texts if is_text else [self._ids(source) for source in sources]
        count = len(sources) * int(wish.get("n", 1))

        def parse(reply: Any) -> list[dict[str, Any]]:
            choices = sorted(reply["choices"], key=lambda choice: choice["index"])
            if len(choices) != count or any(choice.get("logprobs") is None for choice in choices):
                raise ValueError(f"expected {count} texts with log-probabilities")
            return choices

        return self._ask(self.endpoint, "/completions", body, parse)

    def _ids(self, source: Prompted) -> list[int]:
        if source.ids is not None:
            return list(source.ids)
        return [] if source.text is None else self._tokens([source.text], special=True)[0]

    def _tokens(self, texts: Sequence[str], *, special: bool) -> list[list[int]]:
        def find(text: str) -> None:
            body = {"model": self.model, "prompt": text, "add_special_tokens": special}
            reply = self._ask(self._root, "/tokenize", body, lambda reply: [int(token) for token in reply["tokens"]])
            self._known[text, special] = reply

        self._side_by_side(find, [text for text in dict.fromkeys(texts) if (text, special) not in self._known])
        return [list(self._known[text, special]) for text in texts]

    def _ask(self, endpoint: Endpoint, path: str, body: Mapping[str, Any], parse: Callable[[Any], T]) -> T:
        def careful(reply: Any) -> T:
            try:
                return parse(reply)
            except (KeyError, TypeError, IndexError) as error:
                raise ValueError(f"not a reply of OpenAI's protocol ({error!r})") from error

        try:
            return endpoint.ask(path, body, careful)[0]
        except ServerError as error:
            if error.status == 400:
                raise DataError(str(error)) from error
            raise

    def _side_by_side(self, work: Callable[[Any], None], items: Sequence[Any]) -> None:
        """Do it for all items; the first error ends it."""
        if len(items) < 2:
            for item in items:
                work(item)
            return
        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


def _written(choice: Mapping[str, Any], sampling: Sampling) -> Written:
    told = choice["logprobs"]
    top = tuple({_token(name): float(score) for name, score in place.items()} for place in told["top_logprobs"] or [])
    return Written(
        text=str(choice["text"]),
        ids=tuple(_token(name) for name in told["tokens"]),
        logprobs=tuple(float(score) for score in told["token_logprobs"]),
        finish="stop" if choice["finish_reason"] == "stop" else "length",
        top=top if sampling.top else (),
    )


def _token(name: str) -> int:
    """The number in token_id:N. Raises ValueError for another name."""
    return int(name.removeprefix("token_id:"))


def _encode(vectors: Vectors) -> str:
    """As vLLM takes them: base64 of torch.save."""
    import torch

    held = io.BytesIO()
    torch.save(torch.from_numpy(np.ascontiguousarray(vectors, dtype=np.float32)), held)
    return base64.b64encode(held.getvalue()).decode()


def _decode(text: str) -> Vectors:
    from safetensors.numpy import load

    (vectors,) = load(base64.b64decode(text)).values()
    found: Vectors = vectors.astype(np.float32)
    return found
