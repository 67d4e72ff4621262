"""A dialogue to learn from: its checks, and files that hold one per line.

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}

`tools` may stand beside `messages`, and an answer with `"weight": 0` is shown but not learned.
Anything else is an error that names the file and the line.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linnet.errors import DataError
from linnet.text import render_chat

Message = Mapping[str, Any]  # Any: JSON


@dataclass(frozen=True)
class Dialogue:
    """Messages in the chat format, the answers to learn among them.

    Attributes:
        messages: as `linnet.text.render_chat` takes them; at least one is learned.
        tools: JSON descriptions of the tools that may be called.
    """

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


def is_learned(message: Message) -> bool:
    """Tell whether a message is an answer to learn."""
    return message.get("role") == "assistant" and message.get("weight", 1) != 0


class DialogueFile:
    """The dialogues of a `.jsonl` file, all checked at once and read one at a time.

    Attributes:
        path: the file.
        lines: the numbers of its lines that hold a dialogue, from 1.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a file and check every line.

        Raises:
            DataError: the file cannot be read, has no dialogue, or a line is none.
        """
        self.path = Path(path)
        self.lines: list[int] = []
        self._offsets: list[int] = []
        offset = 0
        try:
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        parse_dialogue(line, f"{self.path} line {number}")
                        self.lines.append(number)
                        self._offsets.append(offset)
                    offset += len(line)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror or error}") from None
        if not self.lines:
            raise DataError(f"{self.path} holds no dialogue; expected one JSON object per line")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Dialogue:
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            return parse_dialogue(file.readline(), self.name(index))

    def name(self, index: int) -> str:
        """Return where a dialogue stands, for messages to the user."""
        return f"{self.path} line {self.lines[index]}"


def parse_dialogue(line: str | bytes, where: str) -> Dialogue:
    """Read one line of a file of dialogues.

    Args:
        line: a JSON object.
        where: file and line, for the error.

    Raises:
        DataError: it is no JSON, has another shape, or nothing that the assistant says.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise DataError(f"{where} has no list 'messages'; expected {{'messages': [...]}}")
    if unknown := sorted(record.keys() - {"messages", "tools"}):
        raise DataError(f"{where} has the key {unknown[0]!r}; expected 'messages' and 'tools'")
    messages, tools = record["messages"], record.get("tools") or []
    if not isinstance(tools, list):
        raise DataError(f"{where}: 'tools' is {type(tools).__name__}; expected a list")
    for kind, items in (("message", messages), ("tool", tools)):
        for place, item in enumerate(items):
            if not isinstance(item, dict):
                raise DataError(f"{where}: {kind} {place} is {type(item).__name__}, no object")
    weights = [message.get("weight", 1) for message in messages]
    if not all(weight in (0, 1) for weight in weights):
        raise DataError(f"{where}: a message has a weight that is neither 0 nor 1")
    if not any(map(is_learned, messages)):
        raise DataError(f"{where} has no message of the assistant, so nothing to learn")
    try:
        render_chat(messages, tools)
    except (ValueError, AttributeError) as error:
        raise DataError(f"{where}: {error}") from None
    return Dialogue(tuple(messages), tuple(tools))
