"""The input of the Responses API as a conversation."""

from typing import Any

from linnet.serve.conversation import Conversation, NamedTool, text_of
from linnet.serve.errors import bad_request
from linnet.serve.schemas import responses
from linnet.serve.schemas.responses import InputItem, ResponsesRequest

Message = dict[str, Any]  # Any: JSON from outside


def conversation_of(body: ResponsesRequest) -> Conversation:
    """Return the conversation of a request.

    Raises:
        APIError: an item is of an unknown type, or lacks a field.
    """
    choice = body.tool_choice or "auto"
    if isinstance(choice, responses.NamedTool):
        choice = NamedTool(choice.name)
    messages = _Messages()
    if body.instructions:
        messages.add({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        messages.add({"role": "user", "content": body.input})
    else:
        for item in body.input:
            messages.add_item(item)
    return Conversation(
        messages=messages.all,
        tools=[
            tool.model_dump(include={"name", "description", "parameters"}, exclude_none=True)
            for tool in body.tools or ()
        ],
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        param="input",
    )


class _Messages:
    """Collects messages: reasoning, text and calls that stand in a row are one answer."""

    def __init__(self) -> None:
        self.all: list[Message] = []

    def add(self, message: Message) -> None:
        self.all.append(message)

    def add_item(self, item: InputItem) -> None:
        if item.type == "message":
            self._add_message(item)
        elif item.type == "function_call":
            if not item.call_id or not item.name or item.arguments is None:
                raise bad_request("a function_call needs call_id, name and arguments", "input")
            function = {"name": item.name, "arguments": item.arguments}
            call = {"id": item.call_id, "type": "function", "function": function}
            self._answer().setdefault("tool_calls", []).append(call)
        elif item.type == "function_call_output":
            if not item.call_id or item.output is None:
                raise bad_request("a function_call_output needs call_id and output", "input")
            text = text_of(item.output, "input")
            self.add({"role": "tool", "tool_call_id": item.call_id, "content": text})
        elif item.type == "reasoning":
            thought = text_of(item.content or item.summary, "input")
            answer = self._answer(begins=True)
            answer["reasoning_content"] = answer.get("reasoning_content", "") + thought
        else:
            raise bad_request(f"an input item has type {item.type!r}, which is unknown", "input")

    def _add_message(self, item: InputItem) -> None:
        if item.role is None or item.content is None:
            raise bad_request("a message needs role and content", "input")
        text = text_of(item.content, "input")
        if item.role == "assistant":
            answer = self._answer(begins=True)
            answer["content"] += text
        else:
            role = "system" if item.role == "developer" else item.role
            self.add({"role": role, "content": text})

    def _answer(self, begins: bool = False) -> Message:
        """Return the answer that is being collected, a new one if there is none.

        `begins`: what comes next stands before calls, so that an answer with calls is over.
        """
        last = self.all[-1] if self.all else {}
        if last.get("role") != "assistant" or (begins and "tool_calls" in last):
            self.add({"role": "assistant", "content": ""})
        return self.all[-1]
