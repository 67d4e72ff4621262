"""Tool calls as MiniMax-M1 writes them: JSON objects between `<tool_calls>` and `</tool_calls>`.

One object per line is the rule; objects over several lines, on one line, in a list, and without a
closing tag are read as well. A call is reported as soon as its name is known, and its arguments as
they come. What else stands between the tags is content: a line of prose, an object without a name.
Once its name has been reported a call cannot be taken back, so where its object breaks off or is no
JSON, its arguments stay unfinished and the rest of the line is left out.
"""

import json
import re
from typing import Literal

from linnet.text.output.collector import Collector
from linnet.text.output.json_text import JsonValue, strict_json
from linnet.text.output.tags import Tags

OPEN, CLOSE = "<tool_calls>", "</tool_calls>"
Stop = Literal["close", "think"]
_STOPS: dict[str, Stop] = {CLOSE: "close", "<think>": "think"}

_SPACE = re.compile(r"[ \t\r\n]+")
_SEPARATORS = re.compile(r"[\s,\[\]]*")
_BETWEEN = Tags("{", OPEN, CLOSE, "<think>")
_REST = Tags("\n", CLOSE)


class M1Calls:
    """Reads what follows `<tool_calls>`."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self._object: _CallObject | None = None
        self._is_skipping = False  # the rest of a line with a broken call
        self._is_after_call = True  # where separators mean nothing

    def feed(self, text: str, at: int) -> tuple[int, Stop | None]:
        """Read `text` from `at` on.

        Returns:
            The place after what was read, and the tag that stopped it; without one, more text is
            needed.
        """
        while True:
            if self._object:
                at = self._object.feed(text, at)
                if not self._object.is_over:
                    return at, None
                self._end_object(self._object, text[at : at + 1])
            elif self._is_skipping:
                start, match = _REST.find(text, at)
                if match is None:
                    return start, None
                self._is_skipping = False
                at = start  # a closing tag is for `_read_between`
            else:
                at, is_stuck, stop = self._read_between(text, at)
                if is_stuck or stop:
                    return at, stop

    def _read_between(self, text: str, at: int) -> tuple[int, bool, Stop | None]:
        if self._is_after_call and (separators := _SEPARATORS.match(text, at)):
            at = separators.end()
        start, match = _BETWEEN.find(text, at)
        if start > at:
            self._is_after_call = False
            self._collector.content.add(text[at:start])
        if match is None:
            return start, True, None
        self._is_after_call = True
        if match.group() == "{":
            self._collector.content.cut()
            self._object = _CallObject(self._collector)
            return start, False, None
        return match.end(), False, _STOPS.get(match.group())

    def _end_object(self, ended: "_CallObject", following: str) -> None:
        self._object = None
        if ended.is_reported:
            is_next_call = following == "{" and ended.is_at_line_end
            self._is_skipping = ended.is_broken and not is_next_call
        else:
            self._collector.content.add(ended.read)
            self._is_after_call = False


class _CallObject:
    """One `{"name": ..., "arguments": {...}}`, reported while it is read."""

    def __init__(self, collector: Collector) -> None:
        self._collector = collector
        self.is_over = False
        self.is_broken = False
        self.is_reported = False
        self.is_at_line_end = False  # whether nothing but white space was read since a line end
        # What may come next: "{", "first key" (or "}"), "key", ":", "value" or ",".
        self._next = "{"
        self._key = ""
        self._value: JsonValue | None = None
        self._role: Literal["key", "name", "arguments", "stream", "ignore"] = "ignore"
        self._collected: list[str] = []  # the value so far, unless it streams
        self._has_arguments = False
        self._early: list[str] = []  # arguments that came before the name
        self._read: list[str] = []

    @property
    def read(self) -> str:
        """The text read until the name was known."""
        return "".join(self._read)

    def feed(self, text: str, at: int) -> int:
        """Read on; return the place after what was read, or of what breaks the object."""
        start = at
        while at < len(text) and not self.is_over:
            if self._value:
                at = self._read_value(self._value, text, at)
            elif space := _SPACE.match(text, at):
                at = space.end()
            else:
                at = self._read_mark(text, at)
        read = text[start:at]
        space = read[len(read.rstrip()) :]
        self.is_at_line_end = "\n" in space or (space == read and self.is_at_line_end)
        if not self.is_reported:
            self._read.append(read)
        return at

    def _read_mark(self, text: str, at: int) -> int:
        char = text[at]
        if self._next == "value" or (char == '"' and self._next in ("key", "first key")):
            self._begin_value(char)
            return at
        if char == "{" == self._next:
            self._next = "first key"
        elif char == "}" and self._next in ("first key", ","):
            self._end()
        elif char == ":" == self._next:
            self._next = "value"
        elif char == "," == self._next:
            self._next = "key"
        else:
            self.is_over = self.is_broken = True
            return at
        return at + 1

    def _begin_value(self, first: str) -> None:
        self._value = JsonValue()
        self._role = "ignore"
        if self._next != "value":
            self._role = "key"
        elif self._key == "name" and first == '"' and not self.is_reported:
            self._role = "name"
        elif self._key == "arguments" and not self._has_arguments:
            self._has_arguments = True
            self._role = "stream" if first == "{" else "arguments"

    def _read_value(self, value: JsonValue, text: str, at: int) -> int:
        piece, at = value.feed(text, at)
        if self._role == "stream":
            self._add_arguments(piece)
        elif self._role != "ignore":
            self._collected.append(piece)
        if value.is_broken:
            self.is_over = self.is_broken = True
        elif value.is_complete:
            self._end_value()
        return at

    def _end_value(self) -> None:
        collected, self._collected = "".join(self._collected), []
        self._value = None
        self._next = ":" if self._role == "key" else ","
        if self._role == "key":
            self._key = json.loads(collected)
        elif self._role == "name":
            self._report(json.loads(collected))
        elif self._role == "arguments":
            self._add_arguments(_as_arguments(collected))

    def _report(self, name: str) -> None:
        if name:
            self.is_reported = True
            self._collector.start_call(name)
            self._collector.add_arguments("".join(self._early))

    def _add_arguments(self, text: str) -> None:
        if self.is_reported:
            self._collector.add_arguments(text)
        else:
            self._early.append(text)

    def _end(self) -> None:
        self.is_over = True
        if self.is_reported and not self._has_arguments:
            self._collector.add_arguments("{}")


def _as_arguments(value: str) -> str:
    """Return arguments that are no object as such: null, or an object written into a string."""
    if value == "null":
        return "{}"
    inner = json.loads(value) if value.startswith('"') else None
    if isinstance(inner, str):
        strict = strict_json(inner.strip() or "{}")
        if strict and strict.startswith("{"):
            return strict
    return value
