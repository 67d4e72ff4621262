"""What an answer must match: a response format, or the call of a tool that must be called.

A call that must be made is begun in the prompt, by the tag that opens it, and the grammar is that
of the rest. So the answer is that call and nothing else; it has no room for thinking.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from linnet.infer.grammar import Grammar, GrammarError
from linnet.serve.errors import bad_request, from_engine
from linnet.serve.schemas import chat, responses
from linnet.text import ToolFormat

JsonObject = dict[str, Any]  # Any: JSON from outside
OutputFormat = (
    chat.TextFormat
    | chat.JsonObjectFormat
    | chat.JsonSchemaFormat
    | chat.RegexFormat
    | responses.PlainFormat
    | responses.ObjectFormat
    | responses.SchemaFormat
)


@dataclass(frozen=True, slots=True)
class ForcedCall:
    """How an answer is made to be a tool call."""

    opening: str
    """What the prompt ends with; its tags are special tokens where the tokenizer has them."""
    grammar: Grammar


def output_grammar(output: OutputFormat | None) -> Grammar | None:
    """Return the grammar of a response format; None for free text.

    Raises:
        APIError: the schema or pattern is too long.
    """
    match output:
        case chat.JsonObjectFormat() | responses.ObjectFormat():
            return Grammar.json_object()
        case chat.JsonSchemaFormat():
            return _made(Grammar.json_schema, output.json_schema.schema_)
        case responses.SchemaFormat():
            return _made(Grammar.json_schema, output.schema_)
        case chat.RegexFormat():
            return _made(Grammar.regex, output.pattern)
        case _:
            return None


def _made(make: Callable[[Any], Grammar], source: object) -> Grammar:
    try:
        return make(source)
    except GrammarError as error:
        raise from_engine(error, "") from None


def forced_call(
    tool_format: ToolFormat | None, tools: Sequence[JsonObject], is_thinking: bool
) -> ForcedCall:
    """Return how to have one of the tools called.

    Args:
        tool_format: how the model writes calls.
        tools: `{"name", "description", "parameters"}` each, at least one.
        is_thinking: the prompt ends inside a think span, which is closed first.

    Raises:
        APIError: the model has no format for calls, or the schemas are too long.
    """
    closing = "</think>\n\n" if is_thinking else ""
    if tool_format == "m1":
        return ForcedCall(f"{closing}<tool_calls>\n", _made(Grammar.json_schema, _m1_schema(tools)))
    if tool_format == "m2":
        pattern = "|".join(_m2_pattern(tool) for tool in tools)
        return ForcedCall(f"{closing}<minimax:tool_call>\n", _made(Grammar.regex, f"(?:{pattern})"))
    raise bad_request(
        "this model has no format for tool calls, so that none can be required", "tool_choice"
    )


def _m1_schema(tools: Sequence[JsonObject]) -> JsonObject:
    """Return the schema of `{"name": ..., "arguments": {...}}` for any of the tools."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["name"]},
                "arguments": {"$ref": f"#/$defs/tool{index}"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    schemas = {
        f"tool{index}": _moved(tool.get("parameters") or {"type": "object"}, f"#/$defs/tool{index}")
        for index, tool in enumerate(tools)
    }
    return (calls[0] if len(calls) == 1 else {"anyOf": calls}) | {"$defs": schemas}


def _moved(schema: Any, place: str) -> Any:  # Any: JSON from outside
    """Return a schema whose references into itself hold where it is a part of another one."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: place + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, place)
        for key, value in schema.items()
    }


def _m2_pattern(tool: JsonObject) -> str:
    """Return a pattern of `<invoke>` with the tool's parameters, in the order of its schema."""
    schema = tool.get("parameters") or {}
    properties, required = schema.get("properties") or {}, schema.get("required") or ()
    if not isinstance(properties, dict) or not isinstance(required, list):
        raise bad_request(f"the parameters of tool {tool['name']!r} are no JSON schema", "tools")
    pattern = f'<invoke name="{re.escape(tool["name"])}">\n'
    for name, parameter in properties.items():
        value = _m2_value(parameter if isinstance(parameter, dict) else {})
        element = f'<parameter name="{re.escape(name)}">{value}</parameter>\n'
        pattern += element if name in required else f"(?:{element})?"
    return pattern + "</invoke>"


def _m2_value(schema: JsonObject) -> str:
    """Return a pattern of a value as M2 writes it, without quotes; JSON is left to the model."""
    choices = schema.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(item, str) for item in choices):
        return f"(?:{'|'.join(map(re.escape, choices))})"
    plain = {"integer": "-?[0-9]{1,20}", "number": "-?[0-9]{1,20}(?:\\.[0-9]{1,20})?"}
    plain["boolean"] = "(?:true|false)"
    kind = schema.get("type")
    return plain.get(kind if isinstance(kind, str) else "", "[^<]*")
