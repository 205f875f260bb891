"""What there is to name in a request: the model, a user's artifacts; and what a client must know of a model."""

import asyncio
import base64
import binascii
import contextlib
from dataclasses import asdict
from typing import Annotated, Any

import torch
from fastapi import APIRouter, Depends, Response
from fastapi.responses import JSONResponse

from odqa.errors import OdqaError
from odqa.frozen.mixture import MIXABLE
from odqa.frozen.steps import Text, make_steps
from odqa.serve.artifacts import Registered
from odqa.serve.errors import ApiError, bad
from odqa.serve.keys import NAME
from odqa.serve.prompts import check_known
from odqa.serve.schema import ArtifactRequest, Description, TokenizeRequest, VectorsRequest
from odqa.serve.state import Service, service_of, user_of
from odqa.serve.tensors import decode_vectors, encode_vectors

router = APIRouter()
User = Annotated[str, Depends(user_of)]
Served = Annotated[Service, Depends(service_of)]
Json = dict[str, Any]
_TENSORS = 512  # our choice: more than any method of ours has


@router.get("/v1/models", response_model=None)
async def list_models(user: User, service: Served) -> Json:
    """The model, and the user's artifacts as models."""
    own = [_artifact_card(service, one) for one in service.artifacts.of(user)]
    return {"object": "list", "data": [_model_card(service), *own]}


@router.get("/v1/models/{model}", response_model=None)
async def show_model(model: str, user: User, service: Served) -> Json:
    """One of them."""
    registered = service.resolve(user, model)
    return _model_card(service) if registered is None else _artifact_card(service, registered)


@router.get("/v1/artifacts", response_model=None)
async def list_artifacts(user: User, service: Served) -> Json:
    """The user's artifacts."""
    return {"object": "list", "data": [one.to_json() for one in service.artifacts.of(user)]}


@router.get("/v1/artifacts/{name}", response_model=None)
async def show_artifact(name: str, user: User, service: Served) -> Json:
    """One of them."""
    return _find(service, user, name).to_json()


@router.put("/v1/artifacts/{name}", response_model=None)
async def register(name: str, asked: ArtifactRequest, user: User, service: Served) -> Response:
    """Give a soft prompt or a saved method a name, in the place of what had it before."""
    if not NAME.fullmatch(name):
        raise bad(
            "An artifact's name has 1 to 64 of a-z, 0-9, - and _, and begins and ends with a letter or digit.", "name"
        )
    is_new = service.artifacts.find(user, name) is None
    if is_new and len(service.artifacts.of(user)) >= service.limits.artifacts:
        raise bad(
            f"You have {service.limits.artifacts} artifacts already; delete one first.", code="too_many_artifacts"
        )
    description, tensors = await asyncio.to_thread(_given, service, asked)
    vectors = await asyncio.wrap_future(service.scheduler.call(lambda: _try(service, description, tensors)))
    saved = await asyncio.to_thread(service.artifacts.save, user, name, description, tensors, vectors=vectors)
    return JSONResponse(saved.to_json(), 201 if is_new else 200)


@router.delete("/v1/artifacts/{name}", response_model=None)
async def delete(name: str, user: User, service: Served) -> Json:
    """Forget an artifact."""
    _find(service, user, name)
    await asyncio.to_thread(service.artifacts.delete, user, name)
    return {"name": name, "deleted": True}


@router.post("/tokenize", response_model=None)
async def tokenize(asked: TokenizeRequest, user: User, service: Served) -> Json:
    """Token ids of a text, as in vLLM."""
    service.resolve(user, asked.model)
    with contextlib.suppress(UnicodeEncodeError):
        asked.prompt.encode()
        ids = await asyncio.to_thread(service.encoder.text, asked.prompt, special=asked.add_special_tokens)
        return {"count": len(ids), "max_model_len": service.window, "tokens": ids}
    raise bad("The text has half a surrogate pair (\\ud800 to \\udfff), which is no character.", "prompt")


@router.post("/v1/word_vectors", response_model=None)
async def word_vectors(asked: VectorsRequest, user: User, service: Served) -> Json:
    """The model's vectors of tokens, (n, width) as base64 of safetensors: what a soft prompt may start from."""
    service.resolve(user, asked.model)
    check_known(service, asked.tokens, "tokens")
    ids = torch.tensor(asked.tokens, device=service.backbone.device)
    vectors = await asyncio.to_thread(lambda: service.backbone.embed(ids).detach().float())
    return {"prompt_embeds": encode_vectors(vectors)}


def _model_card(service: Service) -> Json:
    return {
        "id": service.name,
        "object": "model",
        "created": int(service.started),
        "owned_by": "odqa",
        "max_model_len": service.window,
        "odqa": asdict(service.facts),
    }


def _artifact_card(service: Service, registered: Registered) -> Json:
    return {
        "id": f"{service.name}:{registered.name}",
        "object": "model",
        "created": registered.made,
        "owned_by": registered.user,
        "max_model_len": None if service.window is None else service.window - registered.vectors,
        "parent": service.name,
    }


def _find(service: Service, user: str, name: str) -> Registered:
    found = service.artifacts.find(user, name)
    if found is None:
        shown = name if len(name) <= 80 else f"{name[:77]}..."
        raise ApiError(404, f"You have no artifact {shown!r}.", code="artifact_not_found", param="name")
    return found


def _given(service: Service, asked: ArtifactRequest) -> tuple[Json, dict[str, torch.Tensor]]:
    """A description and tensors as a saved method has them. Raises ApiError."""
    fingerprint = service.backbone.fingerprint
    if asked.prompt_embeds is not None:
        longest = (service.window or service.limits.cache_tokens) - 1
        try:
            vectors = decode_vectors(asked.prompt_embeds, width=service.backbone.width, longest=longest)
        except ValueError as error:
            raise bad(f"prompt_embeds: {error}", "prompt_embeds") from None
        settings = {"length": len(vectors), "start": "vocabulary", "text": None, "seed": 0}
        return {"kind": "prompt-tuning", "settings": settings, "backbone": fingerprint}, {"prompt": vectors.float()}
    assert asked.description is not None and asked.tensors is not None
    description: Description = asked.description
    if description.kind not in MIXABLE:
        raise bad(f"kind is {description.kind!r}; expected one of {', '.join(MIXABLE)}.", "description")
    if description.backbone != fingerprint:
        raise bad(
            f"The method was trained on backbone {description.backbone[:8]}; {service.name} is {fingerprint[:8]}.",
            "description",
            code="backbone_mismatch",
        )
    return description.model_dump(), _tensors(service, asked.tensors)


def _tensors(service: Service, text: str) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        raw = base64.b64decode(text, validate=True)
        if len(raw) > service.limits.artifact_bytes:
            raise bad(
                f"tensors are {len(raw):,} bytes; this server keeps {service.limits.artifact_bytes:,}.", "tensors"
            )
        tensors: dict[str, torch.Tensor] = load(raw)
    except (binascii.Error, SafetensorError, ValueError, KeyError, RuntimeError, OverflowError, AttributeError):
        raise bad("tensors are not base64 of safetensors.", "tensors") from None
    is_plain = all(tensor.is_floating_point() and tensor.dtype.itemsize >= 2 for tensor in tensors.values())
    if len(tensors) > _TENSORS or not is_plain or not all(bool(torch.isfinite(one).all()) for one in tensors.values()):
        raise bad(f"Expected at most {_TENSORS} tensors of finite floats of 2 bytes or more.", "tensors")
    return tensors


def _try(service: Service, description: Json, tensors: dict[str, torch.Tensor]) -> int:
    """Compute with a method before it is registered, so that it cannot fail in a batch with other users' rows.

    How much of the window it takes. On the engine's thread. Raises ApiError for one that does not work.
    """
    kind = description["kind"]
    try:
        parts = service.bank.workshop.make(kind, description["settings"], tensors, "the artifact")
        window = service.window
        if window is not None and parts.moved + 2 > window:
            raise bad(f"Its {parts.moved} vectors leave no room in a window of {window}.")
        steps = make_steps(service.backbone)
        logits = [steps.join([Text([0], parts=parts)])[0][-1], steps.step([0])[0]]
    except ApiError:
        raise
    except OdqaError as error:
        raise bad(str(error)) from None
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError, IndexError):
        raise bad(f"The settings do not make a {kind} of {service.name}; send them as method.json has them.") from None
    if not all(bool(torch.isfinite(one.max())) for one in logits):
        raise bad("The model's numbers overflow with it.")
    return parts.moved
