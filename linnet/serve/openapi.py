"""The OpenAPI document, and the page at `/docs` that shows it without a line of script."""

import asyncio
import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi

from linnet import __version__
from linnet.serve.page import page_headers

JsonObject = dict[str, Any]  # Any: an OpenAPI document
router = APIRouter(include_in_schema=False)
_DESCRIPTION = (
    "OpenAI's chat, completions and responses, and Anthropic's messages, for a hybrid "
    "lightning-attention model. Fields that are not listed are ignored; a listed one with a wrong "
    "value is an error."
)


def set_document(app: FastAPI) -> None:
    """Let an application describe itself as it is."""

    def document() -> JsonObject:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document


def _document(app: FastAPI) -> JsonObject:
    document = get_openapi(
        title="linnet", version=__version__, description=_DESCRIPTION, routes=app.routes
    )
    schemas = document["components"]["schemas"]
    for operation in _operations(document):
        # FastAPI adds its own refusal; ours is 400, whatever is wrong.
        operation["responses"].pop("422", None)
        if "401" in operation["responses"]:
            operation["security"] = [{"bearer": []}, {}]
        for answer in operation["responses"].values():
            for content in answer.get("content", {}).values():
                for name, definition in content.pop("$defs", {}).items():
                    schemas.setdefault(name, definition)
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    return document


def _operations(document: JsonObject) -> Iterator[JsonObject]:
    for path in document["paths"].values():
        yield from path.values()


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """Return the document."""
    # In a thread: writing it the first time takes longer than a stream should pause.
    document = await asyncio.to_thread(request.app.openapi)
    return Response(json.dumps(document), media_type="application/json")


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Show the document."""
    document = await asyncio.to_thread(request.app.openapi)
    parts = [f"<h1>linnet {__version__}</h1><p>{escape(_DESCRIPTION)}</p>"]
    parts.append('<p>The whole document: <a href="/openapi.json">openapi.json</a></p>')
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(_section(document, f"{method.upper()} {path}", operation))
    return Response(
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>linnet API</title>'
        '<meta name="viewport" content="width=device-width">' + "".join(parts) + "</html>",
        headers=page_headers(),
        media_type="text/html; charset=utf-8",
    )


def _section(document: JsonObject, title: str, operation: JsonObject) -> str:
    parts = [f"<h2>{escape(title)}</h2><p>{escape(operation.get('description', ''))}</p>"]
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if body:
        parts.append("<h3>Request</h3>" + _fields(document, body["schema"]))
    parts.append("<h3>Answers</h3><ul>")
    for status, answer in operation["responses"].items():
        parts.append(f"<li>{escape(status)}: {escape(answer.get('description', ''))}</li>")
    return "".join([*parts, "</ul>"])


def _fields(document: JsonObject, schema: JsonObject) -> str:
    name = schema.get("$ref", "").rpartition("/")[2]
    model = document["components"]["schemas"].get(name, schema)
    rows = []
    for field, description in model.get("properties", {}).items():
        need = "required" if field in model.get("required", ()) else ""
        texts = (field, _type_name(description), need, description.get("description", ""))
        rows.append("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in texts) + "</tr>")
    return f"<table>{''.join(rows)}</table>"


def _type_name(schema: JsonObject) -> str:
    """Return a schema in few words."""
    if "$ref" in schema:
        return schema["$ref"].rpartition("/")[2]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            names = [_type_name(choice) for choice in schema[key]]
            return " or ".join(name for name in dict.fromkeys(names) if name != "null")
    if "enum" in schema or "const" in schema:
        choices = schema.get("enum", [schema.get("const")])
        return " | ".join(json.dumps(choice) for choice in choices)
    if schema.get("type") == "array":
        return f"list of {_type_name(schema.get('items', {}))}"
    return schema.get("type", "any")
