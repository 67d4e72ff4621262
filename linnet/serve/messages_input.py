"""The messages of Anthropic's API as a conversation."""

import json
from typing import Any

from linnet.serve.conversation import Conversation, NamedTool, ToolChoice, unsupported_part
from linnet.serve.errors import bad_request
from linnet.serve.schemas.messages import CountRequest, InputBlock, InputMessage, MessageToolChoice

Message = dict[str, Any]  # Any: JSON from outside


def conversation_of(body: CountRequest) -> Conversation:
    """Return the conversation of a request.

    Raises:
        APIError: a block is of an unknown type, or lacks a field.
    """
    messages: list[Message] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system)})
    for message in body.messages:
        messages += _answer(message) if message.role == "assistant" else _turn(message)
    choice = body.tool_choice
    return Conversation(
        messages=messages,
        tools=[
            {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
            if tool.description is not None
            else {"name": tool.name, "parameters": tool.input_schema}
            for tool in body.tools or ()
        ],
        tool_choice=_tool_choice(choice),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
    )


def _tool_choice(choice: MessageToolChoice | None) -> ToolChoice:
    if choice is None or choice.type == "auto":
        return "auto"
    if choice.type == "tool":
        if choice.name is None:
            raise bad_request("a tool_choice of type tool needs a name", "tool_choice")
        return NamedTool(choice.name)
    return "required" if choice.type == "any" else "none"


def _answer(message: InputMessage) -> list[Message]:
    """Return an earlier answer."""
    if isinstance(message.content, str):
        return [{"role": "assistant", "content": message.content}]
    texts, thoughts, calls = [], [], []
    for block in message.content:
        if block.type == "text":
            texts.append(block.text or "")
        elif block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            calls.append(_call(block))
        elif block.type != "redacted_thinking":
            raise unsupported_part(block.type, "messages")
    answer: Message = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        answer["reasoning_content"] = "\n".join(thoughts)
    if calls:
        answer["tool_calls"] = calls
    return [answer]


def _call(block: InputBlock) -> Message:
    if not block.id or not block.name or block.input is None:
        raise bad_request("a tool_use block needs id, name and input", "messages")
    function = {"name": block.name, "arguments": json.dumps(block.input)}
    return {"id": block.id, "type": "function", "function": function}


def _turn(message: InputMessage) -> list[Message]:
    """Return a user's message: first the results of tools, each a message, then the text."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    results: list[Message] = []
    texts: list[InputBlock] = []
    for block in message.content:
        if block.type != "tool_result":
            texts.append(block)
        elif not block.tool_use_id:
            raise bad_request("a tool_result block needs tool_use_id", "messages")
        else:
            text = _text(block.content or "")
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
    if texts or not results:
        results.append({"role": message.role, "content": _text(texts)})
    return results


def _text(content: str | list[InputBlock]) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text" or block.text is None:
            raise unsupported_part(block.type, "messages")
    return "".join(block.text or "" for block in content)
