"""From a request to rows: token ids or vectors, checked against the model, its window and the limits."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from odqa.serve.encoder import parts_of
from odqa.serve.errors import bad
from odqa.serve.scheduler import Row
from odqa.serve.schema import ChatRequest, CompletionRequest
from odqa.serve.state import Service
from odqa.serve.tensors import decode_vectors
from odqa.serve.writing import Wish

_CHARACTERS = 64  # our choice: a text of more characters a token of the window is not even looked at


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request: what is read, and its text as it was given (None: it was given as tokens)."""

    ids: tuple[int, ...] = ()
    vectors: torch.Tensor | None = None
    prefix: torch.Tensor | None = None
    text: str | None = None


def of_completion(service: Service, asked: CompletionRequest) -> list[Prompt]:
    """The prompts of a request: vectors before texts, as vLLM orders them. Raises ApiError."""
    found = [
        Prompt(vectors=_vectors(service, text, f"prompt_embeds{where}")) for where, text in _each(asked.prompt_embeds)
    ]
    prefix = None if asked.prefix_embeds is None else _vectors(service, asked.prefix_embeds, "prefix_embeds")
    given = asked.prompt
    if given is None and prefix is not None:
        given = [[]]
    is_one = isinstance(given, str) or (isinstance(given, list) and bool(given) and isinstance(given[0], int))
    for prompt in [given] if is_one else given or []:
        if isinstance(prompt, str):
            found.append(Prompt(tuple(_encode(service, prompt, "prompt")), prefix=prefix, text=prompt))
        else:
            found.append(Prompt(tuple(_known(service, prompt, "prompt")), prefix=prefix))
    return found


def of_chat(service: Service, asked: ChatRequest) -> Prompt:
    """The prompt of a conversation. Raises ApiError."""
    texts = [
        text for message in asked.messages for text in parts_of(message, lambda text, is_it: "" if is_it else text)
    ]
    _check_text(service, "".join(texts), "messages")
    pieces = service.encoder.chat(asked.messages)
    if not any(isinstance(piece, str) for piece in pieces):
        return Prompt(tuple(token for piece in pieces for token in piece if isinstance(token, int)))
    embed, device = service.backbone.embed, service.backbone.device
    joined = [
        _vectors(service, piece, "messages").float()
        if isinstance(piece, str)
        else embed(torch.tensor(piece, dtype=torch.long, device=device)).float().cpu()
        for piece in pieces
    ]
    return Prompt(vectors=torch.cat(joined))


def rows_of(
    service: Service, prompts: Sequence[Prompt], wishes: Sequence[Wish], *, method: str | None, moved: int
) -> list[Row]:
    """Each prompt with each of the wishes (n texts). Raises ApiError for what has no room in the window."""
    rows = []
    for prompt in prompts:
        for wish in wishes:
            row = Row(prompt.ids, wish, prompt.vectors, prompt.prefix, method, moved)
            _check_room(service, row)
            rows.append(row)
    return rows


def room(service: Service, prompt: Prompt, moved: int) -> int:
    """How many tokens may be written behind a prompt."""
    most = service.limits.new_tokens
    if service.window is None or not service.is_causal:
        return most if service.window is None else min(most, service.window)
    read = Row(prompt.ids, Wish(0), prompt.vectors, prompt.prefix).read
    return max(1, min(most, service.window - read - moved))


def _check_room(service: Service, row: Row) -> None:
    limits, new = service.limits, row.wish.max_tokens
    if new > limits.new_tokens:
        raise bad(f"max_tokens is {new}; this server writes at most {limits.new_tokens}.", "max_tokens")
    if not row.read:
        raise bad("The prompt has no tokens.", "prompt")
    if service.window is None and row.read > _longest(service):
        raise bad(f"The prompt has {row.read} tokens; this server reads {_longest(service)}.", "prompt")
    if service.window is None:
        return
    needs = {"prompt": row.read}
    if service.is_causal:
        needs |= {"artifact": row.moved, "max_tokens": new}
    elif new > service.window:
        raise bad(f"max_tokens is {new}; {service.name} writes at most {service.window}.", "max_tokens")
    if sum(needs.values()) > service.window:
        said = ", ".join(f"{name} {count}" for name, count in needs.items() if count)
        raise bad(
            f"The request needs {sum(needs.values())} tokens ({said}); {service.name} has a window of "
            f"{service.window}. Shorten one of them.",
            "prompt",
            code="context_length_exceeded",
        )


def _each(given: str | list[str] | None) -> list[tuple[str, str]]:
    """Values with their places in the request: nothing for one alone."""
    if isinstance(given, list):
        return [(f"[{number}]", text) for number, text in enumerate(given)]
    return [] if given is None else [("", given)]


def _encode(service: Service, text: str, param: str) -> list[int]:
    _check_text(service, text, param)
    return service.encoder.text(text)


def _check_text(service: Service, text: str, param: str) -> None:
    """Before anything is made of it: tokenising megabytes takes seconds."""
    longest = _longest(service)
    if len(text) > _CHARACTERS * longest:
        raise bad(
            f"{param} has {len(text):,} characters; {service.name} reads {longest} tokens.",
            param,
            code="context_length_exceeded",
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad(f"{param} has half a surrogate pair (\\ud800 to \\udfff), which is no character.", param) from None


def _known(service: Service, ids: Sequence[int], param: str) -> Sequence[int]:
    size = service.encoder.vocabulary
    if len(ids) > _longest(service):
        raise bad(
            f"{param} has {len(ids):,} tokens; {service.name} reads {_longest(service)}.",
            param,
            code="context_length_exceeded",
        )
    wrong = next((token for token in ids if not 0 <= token < size), None)
    if wrong is not None:
        shown = str(wrong) if abs(wrong) < 10**12 else "a huge number"
        raise bad(f"Token {shown} is not one of 0 to {size - 1}.", param)
    return ids


def _longest(service: Service) -> int:
    """The most tokens of a text: the window, or of a model without one, our own bound."""
    return service.window or service.limits.cache_tokens


def _vectors(service: Service, text: str, param: str) -> torch.Tensor:
    longest = _longest(service)
    try:
        vectors = decode_vectors(text, width=service.backbone.width, longest=longest)
    except ValueError as error:
        raise bad(f"{param}: {error}", param) from None
    if not bool(torch.isfinite(vectors.to(service.backbone.model.dtype)).all()):
        kind = str(service.backbone.model.dtype).removeprefix("torch.")
        raise bad(f"{param}: some values are too large for {kind}, in which the model computes.", param)
    return vectors


def check_known(service: Service, ids: Sequence[int], param: str) -> None:
    """Raises ApiError (400) for a token that the model does not have."""
    _known(service, ids, param)


def check_rows(service: Service, count: int) -> None:
    """Raises ApiError (400) for a request that asks for too many texts."""
    if count > service.limits.request_rows:
        most = service.limits.request_rows
        raise bad(f"{count} texts (prompts times n); this server writes at most {most} a request.", "n")
