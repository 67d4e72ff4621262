"""How routes read bodies, and what all of them document."""

from collections.abc import Callable, Coroutine
from typing import Any

import pydantic_core
from fastapi import HTTPException, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, TypeAdapter

from linnet.serve.schemas.base import Error

JsonObject = dict[str, Any]  # Any: a part of an OpenAPI document
REFERENCE = "#/components/schemas/{model}"
_PROBLEMS = {
    400: "The request cannot be meant; `code` is `context_length_exceeded` if it is too long",
    401: "The API key is missing or wrong",
    403: "The server does not answer to this host name",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body is larger than the server takes",
    500: "The engine failed",
    503: "Too many requests wait, or the server is stopping; see `Retry-After`",
}


class JSONRoute(APIRoute):
    """A route that reads JSON strictly: finite numbers, bounded depth, valid Unicode."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler, with a request that reads so."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    async def json(self) -> Any:  # Any: JSON
        try:
            # It refuses what nests deeper than 200 levels, so that nothing below need count them.
            return pydantic_core.from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            # The one exception that FastAPI lets through from here.
            raise HTTPException(400, f"the body is not valid JSON: {error}") from None


def responses(
    event: Any = None, ends_with_done: bool = False, error: type[BaseModel] = Error
) -> dict[int | str, JsonObject]:
    """Return what OpenAPI should say of answers besides the plain one.

    Args:
        event: the type of each event's data, if the route can stream.
        ends_with_done: whether `[DONE]` follows the last event.
        error: the shape of a refusal.
    """
    documented: dict[int | str, JsonObject] = {
        status: {"model": error, "description": text} for status, text in _PROBLEMS.items()
    }
    if event is not None:
        documented[200] = {
            "description": "The answer; a stream of server-sent events if `stream` is true",
            "content": {"text/event-stream": _stream_of(event, ends_with_done)},
        }
    return documented


def _stream_of(event: Any, ends_with_done: bool) -> JsonObject:
    """Describe a stream, as OpenAPI 3.2 does; `openapi` moves `$defs` to their place."""
    schema = TypeAdapter(event).json_schema(ref_template=REFERENCE, mode="serialization")
    definitions = schema.pop("$defs", {})
    data: JsonObject = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": schema,
    }
    if ends_with_done:
        data = {"anyOf": [data, {"const": "[DONE]"}]}
    properties = {"event": {"type": "string"}, "data": data}
    item = {"type": "object", "properties": properties, "required": ["data"]}
    return {"itemSchema": item, "$defs": definitions}
