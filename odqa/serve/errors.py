"""Errors in the form of OpenAI's protocol: `{"error": {"message", "type", "param", "code"}}` and a status.

A message is one sentence for whoever asked. What they cannot have caused is logged and told as "internal error", with
the number of the request and nothing else.
"""

from typing import Any

from odqa.errors import OdqaError

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class ApiError(OdqaError):
    """A request that is answered with an error. `code` is for programs, `param` names the field at fault.

    `wait`: seconds after which it may be asked again (Retry-After).
    """

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, wait: float | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.wait = status, code, param, wait

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        said = str(self).encode("utf-8", "replace").decode()  # half a surrogate pair cannot be sent
        return {"error": {"message": said, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        found = {} if self.wait is None else {"Retry-After": str(max(1, round(self.wait)))}
        return found | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def bad(message: str, param: str | None = None, *, code: str | None = None) -> ApiError:
    """What the request's author can mend."""
    return ApiError(400, message, code=code, param=param)


def unknown_model(name: str) -> ApiError:
    """The same for a model that is not there and for one that is another user's."""
    shown = name if len(name) <= 80 else f"{name[:77]}..."
    return ApiError(
        404, f"The model {shown!r} does not exist. GET /v1/models lists yours.", code="model_not_found", param="model"
    )


def internal(request_id: str) -> ApiError:
    return ApiError(500, f"Internal error; the log has it under request {request_id}.", code="internal_error")


def closing() -> ApiError:
    return ApiError(503, "The server is shutting down. Ask again in a moment.", code="shutting_down", wait=5)


def too_late(seconds: float) -> ApiError:
    return ApiError(503, f"Not finished within {seconds:g} s. Ask for less, or later.", code="timeout", wait=5)
