"""Errors as clients expect them: OpenAI's shape, and Anthropic's below `/v1/messages`."""

import json
import math
from collections.abc import Mapping
from typing import Any

from fastapi import Response

from linnet.errors import EngineError, Overloaded, PromptTooLong, RequestError
from linnet.infer.grammar import GrammarError

ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class APIError(Exception):
    """A request that fails, with what its sender should be told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's name for the class of error."""
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def body(self, anthropic: bool = False) -> dict[str, Any]:  # Any: a JSON object
        """Return the JSON object that tells it."""
        if anthropic:
            kind = _ANTHROPIC_TYPES.get(self.status, "api_error")
            return {"type": "error", "error": {"type": kind, "message": self.message}}
        details = {"message": self.message, "type": self.type, "param": self.param}
        return {"error": details | {"code": self.code}}

    def response(self, path: str) -> Response:
        """Return the whole answer to a request for `path`."""
        # ASCII: a message may quote what the client sent, and that need not be valid Unicode.
        content = json.dumps(self.body(path.startswith(ANTHROPIC_PATH)))
        return Response(content, self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> APIError:
    """Return the error for a request that cannot be meant."""
    return APIError(400, message, param=param, code=code)


def unavailable(message: str, retry_after_s: float) -> APIError:
    """Return the error for a request that may be sent again later."""
    seconds = max(1, math.ceil(retry_after_s))
    return APIError(503, message, code="overloaded", headers={"Retry-After": str(seconds)})


def context_exceeded(num_tokens: int, limit: int, param: str) -> APIError:
    """Return the error for a prompt and completion of `num_tokens` where `limit` fit."""
    message = (
        f"This model's maximum context length is {limit} tokens. However, your request needs "
        f"{num_tokens} tokens. Please reduce the length of the messages or completion."
    )
    return bad_request(message, param, "context_length_exceeded")


def from_engine(error: Exception, param: str) -> APIError:
    """Return what to tell about an error that the engine, or reading a prompt for it, raised.

    Args:
        error: an `EngineError`, `DataError` or `ValueError`.
        param: the field of the request that holds the prompt.
    """
    if isinstance(error, Overloaded):
        return unavailable(str(error), error.retry_after_s)
    if isinstance(error, PromptTooLong):
        return context_exceeded(error.num_tokens, error.limit, param)
    if isinstance(error, GrammarError):
        return bad_request(str(error), code="invalid_grammar")
    if isinstance(error, EngineError) and not isinstance(error, RequestError):
        return APIError(500, str(error), code="engine_error")
    return bad_request(str(error), param)
