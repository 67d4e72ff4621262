"""Chats to prompts, in the MiniMax-M1 format or any checkpoint's template.

`render_chat` gives the text; `encode_chat` gives the ids that a model should see, which is not the
same as encoding that text: the template's `<end_of_sentence>` is a control token, one that a user
typed is not.
"""

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from linnet.errors import DataError
from linnet.text.output import tool_format_of
from linnet.text.special import BEGINNING_OF_SENTENCE
from linnet.text.template import M1_TEMPLATE, render
from linnet.text.template_m2 import M2_TEMPLATE
from linnet.text.tokenizer import Tokenizer

Message = Mapping[str, Any]  # Any: a message is JSON from outside, checked before it is rendered
ROLES = ("system", "user", "assistant", "tool")


def render_chat(
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    template: str | None = None,
) -> str:
    """Render a chat as the text of a prompt.

    Args:
        messages: `{"role", "content"}` mappings; a content is a string or a list of
            `{"type": "text", "text"}` parts, an assistant may have `tool_calls` and
            `reasoning_content` (which M1's template does not show), a tool result names its tool
            by `name` or `tool_call_id`.
        tools: JSON descriptions of the tools that may be called, bare or in the OpenAI form.
        add_generation_prompt: end with the opening of the assistant's turn.
        template: a Jinja chat template; MiniMax-M1's by default. One that is not ours gets
            `messages` and `tools` as they are, but the arguments of tool calls always as objects.

    Raises:
        ValueError: a message has an unknown role, a content that is not text, or a tool call
            without a name and a JSON object.
        DataError: the template cannot be rendered.
    """
    messages = [_parse_arguments(message) for message in messages]
    tool_names: dict[str, str] = {}
    checked = [_normalize(message, tool_names) for message in messages]
    tools = list(tools or ())
    if template in (None, M1_TEMPLATE, M2_TEMPLATE):
        messages, tools = checked, [tool.get("function", tool) for tool in tools]
    variables = {
        "messages": messages,
        "tools": tools or None,
        "add_generation_prompt": add_generation_prompt,
    }
    return render(template or M1_TEMPLATE, variables)


def chat_template_of(tokenizer: Tokenizer | None) -> str | None:
    """Return the template of a model's chats, for `encode_chat`; None is MiniMax-M1's.

    The published M1 template loses tool calls and reads lists of parts only; ours does neither.

    Raises:
        DataError: the model knows no chat format.
    """
    if tokenizer is None:
        raise DataError("the model has no tokenizer; put tokenizer.json into its folder")
    if tool_format_of(tokenizer) == "m1" and BEGINNING_OF_SENTENCE in tokenizer.special_ids:
        return None
    if tokenizer.chat_template is None:
        raise DataError(
            "the model has no chat template; continue plain text with it (`linnet generate`, "
            "/v1/completions)"
        )
    return tokenizer.chat_template


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    template: str | None = None,
) -> list[int]:
    """Encode a chat; only the template can write control tokens.

    A special token spelled out in a message or a tool description stays plain text. What an
    assistant said may hold `<think>` and `<tool_calls>`, which are its own to use. Arguments are
    those of `render_chat`.

    Raises:
        ValueError: as `render_chat`.
        DataError: the template cannot be rendered, or is MiniMax-M1's while `tokenizer` lacks its
            control tokens.
    """
    if template is None and BEGINNING_OF_SENTENCE not in tokenizer.special_ids:
        raise DataError(
            f"this tokenizer has no {BEGINNING_OF_SENTENCE}, which the MiniMax-M1 chat template "
            "writes; pass template= with the one made for this tokenizer"
        )
    disguise = _Disguise(tokenizer)
    text = render_chat(
        # JSON is read before it is disguised: `[` may be the edge of a special token.
        [disguise.message(_parse_arguments(message)) for message in messages],
        [_map_strings(tool, disguise.hide) for tool in tools or ()],
        add_generation_prompt,
        template,
    )
    ids: list[int] = []
    for piece in disguise.split(text):
        special = tokenizer.special_ids.get(piece)
        ids += [special] if special is not None else tokenizer.encode(disguise.reveal(piece))
    return ids


class _Disguise:
    """Makes text from outside unable to form a special token while a template is rendered.

    Every character that a special token begins or ends with is replaced by a marker nobody can
    guess, so even a token that the template would join from two messages is not one.
    """

    def __init__(self, tokenizer: Tokenizer):
        edges = sorted({name[end] for name in tokenizer.special_ids for end in (0, -1)})
        nonce = secrets.token_hex(8)
        self._marker_of = {ord(edge): f"q{nonce}q{place}q" for place, edge in enumerate(edges)}
        self._edge_of = {self._marker_of[ord(edge)]: edge for edge in edges}
        self._marker = re.compile("|".join(self._edge_of) or r"(?!)")
        self._special = _any_of(tokenizer.special_ids)
        control = tokenizer.control_ids
        self._visible = _any_of(
            {n: i for n, i in tokenizer.special_ids.items() if i not in control}
        )

    def hide(self, text: str) -> str:
        return text.translate(self._marker_of)

    def reveal(self, text: str) -> str:
        return self._marker.sub(lambda match: self._edge_of[match.group()], text)

    def message(self, message: Message) -> dict[str, Any]:
        """Hide all of a message, but not the thinking and tool call marks an assistant wrote."""
        hidden = _map_strings(message, self.hide)
        if message.get("role") == "assistant":
            hidden["content"] = _map_strings(message.get("content"), self._hide_assistant)
        return hidden

    def split(self, text: str) -> list[str]:
        """Cut rendered text into special tokens and the text between them."""
        return [piece for piece in self._special.split(text) if piece]

    def _hide_assistant(self, text: str) -> str:
        pieces = self._visible.split(text)
        pieces[::2] = map(self.hide, pieces[::2])  # odd places hold the matches
        return "".join(pieces)


def _any_of(names: Mapping[str, int]) -> re.Pattern[str]:
    # Longest first: a token may begin like another.
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:  # Any: JSON in, JSON out
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {
            _map_strings(key, change): _map_strings(item, change) for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_map_strings(item, change) for item in value]
    return value


def _normalize(message: Message, tool_names: dict[str, str]) -> dict[str, Any]:
    """Return a message in the form `M1_TEMPLATE` expects; `tool_names` maps call ids to names."""
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"a message has role {role!r}; expected one of {', '.join(ROLES)}")
    result: dict[str, Any] = {"role": role, "content": _parts(message)}
    if role == "assistant" and message.get("tool_calls"):
        result["tool_calls"] = [_call(call, tool_names) for call in message["tool_calls"]]
    if role == "assistant" and isinstance(message.get("reasoning_content"), str):
        result["reasoning_content"] = message["reasoning_content"]
    if role == "tool":
        name = message.get("name") or tool_names.get(message.get("tool_call_id", ""))
        for part in result["content"]:
            part.setdefault("name", name)
            if part["name"] is None:
                raise ValueError(
                    "a tool message names no tool; give it `name`, or the `tool_call_id` of a call"
                )
    return result


def _parts(message: Message) -> list[dict[str, Any]]:
    content, role = message.get("content"), message["role"]
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if content is None and role == "assistant":
        return []
    if not isinstance(content, (list, tuple)):
        raise ValueError(
            f"the content of a {role} message is {type(content).__name__}; expected a string or a "
            "list of text parts"
        )
    for part in content:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(
                f"a {role} message has a part of type {kind!r}; only text parts are supported, "
                "as {'type': 'text', 'text': ...}"
            )
    return [dict(part) for part in content]


def _call(call: Message, tool_names: dict[str, str]) -> dict[str, Any]:
    """Return one tool call as name and arguments, from the bare or the OpenAI form."""
    function = call.get("function", call)
    if "id" in call:
        tool_names[call["id"]] = function["name"]
    return {"name": function["name"], "arguments": dict(function["arguments"])}


def _parse_arguments(message: Message) -> Message:
    """Return a message with the arguments of its tool calls as JSON objects."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [_parse_call(call) for call in calls]} if calls else message


def _parse_call(call: Message) -> Message:
    function = call.get("function", call)
    name, arguments = function.get("name"), function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise ValueError(
            f"tool call {name!r} has arguments {function.get('arguments')!r}; expected a name and "
            "a JSON object"
        )
    parsed = {**function, "arguments": arguments}
    return {**call, "function": parsed} if "function" in call else parsed
