"""What a request may say: OpenAI's fields, those of vLLM that concern soft prompts, and two of our own.

Fields that are not heeded here are refused unless they say what is done anyway (`presence_penalty: 0`): a server that
takes `logit_bias` and ignores it gives answers to another question. Values are checked for their form; whether they fit
the model and its window is checked where those are known (`odqa.serve.prompts`).

Our own: `prefix_embeds`, word vectors put directly before each `prompt` (vLLM's `prompt_embeds` are prompts of their
own, for which a client must know the embedding matrix), and `logprob_token_ids`, tokens whose log-probability is told
at each place beside the likeliest ones.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_STOPS = 4  # OpenAI's
_LISTED = 4096  # our choice: prompts in a list; the server's own limit on rows is checked later

Name = Annotated[str, Field(min_length=1, max_length=256)]


def _is_tokens(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _check_prompt(value: Any) -> Any:
    """One sentence for whatever is wrong; pydantic's own report on a union names every item once for each form."""
    if value is None or isinstance(value, str) or _is_tokens(value):
        return value
    is_list = isinstance(value, list) and 0 < len(value) <= _LISTED
    if is_list and (all(isinstance(item, str) for item in value) or all(_is_tokens(item) for item in value)):
        return value
    raise ValueError(f"expected a text, a list of token ids, or a list of up to {_LISTED} of either")


def _check_texts(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and 0 < len(value) <= _LISTED and all(isinstance(item, str) for item in value):
        return value
    raise ValueError(f"expected base64 text, or a list of up to {_LISTED} of them")


def _check_stop(value: Any) -> Any:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    is_fine = isinstance(stops, list) and len(stops) <= _STOPS
    if not is_fine or not all(isinstance(stop, str) and 0 < len(stop) <= 256 for stop in stops):
        raise ValueError(f"expected up to {_STOPS} texts of 1 to 256 characters")
    return stops


def _listing(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1, "maxItems": _LISTED}


_TEXT, _TOKENS = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_PROMPT = {"anyOf": [_TEXT, _listing(_TEXT), _TOKENS, _listing(_TOKENS), {"type": "null"}]}
_TEXTS = {"anyOf": [_TEXT, _listing(_TEXT), {"type": "null"}]}
_STOP = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": _STOPS}, {"type": "null"}]}

PromptField = Annotated[Any, BeforeValidator(_check_prompt), Field(json_schema_extra=_PROMPT)]
TextsField = Annotated[Any, BeforeValidator(_check_texts), Field(json_schema_extra=_TEXTS)]
StopField = Annotated[Any, BeforeValidator(_check_stop), Field(json_schema_extra=_STOP)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=_LISTED)]


class Request(BaseModel):
    """Base of all bodies: unknown fields are errors, numbers are finite, "5" is not 5."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Request):
    include_usage: bool = False


class Writing(Request):
    """What completions and chats have in common: how a text goes on."""

    model: Name
    n: int = Field(1, ge=1, le=_LISTED)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: StopField = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="taken, and used for nothing")
    ignore_eos: bool = Field(False, description="go on behind an end token, as in vLLM")
    # Refused unless they say what is done anyway.
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options go with stream: true")
        return self


class CompletionRequest(Writing):
    """POST /v1/completions."""

    prompt: PromptField = None
    prompt_embeds: TextsField = None
    prefix_embeds: str | None = None
    max_tokens: int | None = Field(16, ge=0, lt=2**31)
    logprobs: int | None = Field(None, ge=0, lt=2**31)
    echo: bool = False
    return_tokens_as_token_ids: bool = Field(False, description="tokens as token_id:N, as in vLLM")
    logprob_token_ids: TokenIds | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        if self.prompt is None and self.prompt_embeds is None and self.prefix_embeds is None:
            raise ValueError("give a prompt, prompt_embeds or prefix_embeds")
        if self.echo and self.prompt_embeds is not None:
            raise ValueError("echo needs a prompt of tokens; prompt_embeds have none")
        if self.prefix_embeds is not None and self.prompt_embeds is not None:
            raise ValueError("prefix_embeds go before a prompt; put them into prompt_embeds")
        if self.logprob_token_ids and self.logprobs is None:
            raise ValueError("logprob_token_ids go with logprobs")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens is 0 and echo is false: nothing would be said")
        return self


class TextPart(Request):
    type: Literal["text"]
    text: str


class EmbedsPart(Request):
    """Word vectors in the place of words, as in vLLM's chats."""

    type: Literal["prompt_embeds"]
    prompt_embeds: str


class Message(Request):
    role: Literal["system", "developer", "user", "assistant"]
    content: (
        str
        | Annotated[
            list[Annotated[TextPart | EmbedsPart, Field(discriminator="type")]], Field(min_length=1, max_length=64)
        ]
    )
    name: str | None = Field(None, max_length=64)


class ChatRequest(Writing):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, lt=2**31)
    response_format: "TextFormat | None" = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs go with logprobs: true")
        return self


class TextFormat(Request):
    type: Literal["text"]


class TokenizeRequest(Request):
    """POST /tokenize, as in vLLM."""

    model: Name
    prompt: str
    add_special_tokens: bool = True


class VectorsRequest(Request):
    """POST /v1/word_vectors: what a soft prompt may start from."""

    model: Name
    tokens: TokenIds = Field(min_length=1)


class Description(Request):
    """`method.json` of a saved method."""

    kind: str = Field(max_length=64)
    settings: dict[str, bool | int | float | str | list[str] | None] = Field(max_length=32)
    backbone: str = Field(max_length=128)


class ArtifactRequest(Request):
    """PUT /v1/artifacts/{name}: a soft prompt as vectors, or a saved method: its description and tensors."""

    prompt_embeds: str | None = None
    description: Description | None = None
    tensors: str | None = Field(None, description="base64 of method.safetensors")

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        is_method = self.description is not None and self.tensors is not None
        if (self.prompt_embeds is not None) == is_method or (self.description is None) != (self.tensors is None):
            raise ValueError("give prompt_embeds, or description and tensors")
        return self


def _check_characters(value: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("half a surrogate pair is not a character")
    return value


class AskRequest(Request):
    """POST /ask."""

    question: Annotated[str, AfterValidator(_check_characters)]
    stream: Literal["lines", "events"] | None = Field(None, description="JSON lines or server-sent events")
    trace: bool = Field(False, description="with all that a run folder keeps of a question")


class MarkRequest(Request):
    """POST /ask/{ask_id}/mark."""

    is_right: bool
