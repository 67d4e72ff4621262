"""Tool calls as MiniMax-M2 writes them: `<invoke>` with `<parameter>`s, values as bare text.

A value ends at `</parameter>` and nothing else in it is a tag; in a value that the schema lets be
an object or an array, not even `</parameter>` inside a JSON string is. Strings are passed on as
they come, other values when they end (`linnet.text.output.coercion`). A parameter that is given
twice keeps its first value. What stands between calls is content, what stands between parameters
is left out. A call whose `</invoke>` is missing ends with the next call or the closing tag; at the
end of the output its arguments stay unfinished.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from linnet.text.output.coercion import TEXT, ValueType, coerce, value_type
from linnet.text.output.collector import Collector
from linnet.text.output.json_text import JsonValue, quoted
from linnet.text.output.tags import Tags, name_of

OPEN, CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"
Tool = Mapping[str, Any]  # Any: JSON from outside
Stop = Literal["close", "think"]
_STOPS: dict[str, Stop] = {CLOSE: "close", "<think>": "think"}

_BETWEEN = Tags(OPEN, CLOSE, "<think>", named=("invoke",))
_IN_CALL = Tags("</invoke>", CLOSE, named=("invoke", "parameter"))
_VALUE_END = Tags("</parameter>")


class M2Calls:
    """Reads what follows `<minimax:tool_call>`."""

    def __init__(self, collector: Collector, tools: Sequence[Tool]) -> None:
        self._collector = collector
        self._tools = {name: schema for name, schema in map(_named_schema, tools) if name}
        self._types: dict[tuple[str, str], ValueType] = {}
        self._call: str | None = None  # the name of the call that is open
        self._given: set[str] = set()
        self._value: _TextValue | _TypedValue | None = None
        self._is_repeated = False

    def feed(self, text: str, at: int) -> tuple[int, Stop | None]:
        """Read `text` from `at` on.

        Returns:
            The place after what was read, and the tag that stopped it; without one, more text is
            needed.
        """
        while True:
            if self._value:
                at, is_stuck = self._read_value(self._value, text, at)
                stop = None
            elif self._call:
                at, is_stuck, stop = self._read_call(self._call, text, at)
            else:
                at, is_stuck, stop = self._read_between(text, at)
            if is_stuck or stop:
                return at, stop

    def _read_between(self, text: str, at: int) -> tuple[int, bool, Stop | None]:
        start, match = _BETWEEN.find(text, at)
        self._collector.content.add(text[at:start])
        if match is None:
            return start, True, None
        stop = _STOPS.get(match.group())
        if stop is None and match.group() != OPEN:
            self._collector.content.cut()
            self._begin_call(name_of(match))
        return match.end(), False, stop

    def _read_call(self, call: str, text: str, at: int) -> tuple[int, bool, Stop | None]:
        start, match = _IN_CALL.find(text, at)
        if match is None:
            return start, True, None
        if match.group().startswith("<parameter"):
            self._begin_value(call, name_of(match))
            return match.end(), False, None
        self._collector.add_arguments("}" if self._given else "{}")
        self._call = None
        if match.group().startswith("<invoke"):
            self._begin_call(name_of(match))
        return match.end(), False, "close" if match.group() == CLOSE else None

    def _begin_call(self, name: str) -> None:
        self._call, self._given = name, set()
        self._collector.start_call(name)

    def _begin_value(self, call: str, parameter: str) -> None:
        self._is_repeated = parameter in self._given
        expected = self._type_of(call, parameter)
        self._value = _TextValue(expected) if expected.is_text else _TypedValue(expected)
        self._add(f"{', ' if self._given else '{'}{quoted(parameter)}: ")
        self._given.add(parameter)

    def _read_value(
        self, value: "_TextValue | _TypedValue", text: str, at: int
    ) -> tuple[int, bool]:
        start, match = _VALUE_END.find(text, at)
        self._add(value.add(text[at:start]))
        if match is None:
            return start, True
        if value.takes_tags:
            self._add(value.add(match.group()))
        else:
            self._add(value.finish())
            self._value = None
        return match.end(), False

    def _add(self, arguments: str) -> None:
        if not self._is_repeated:
            self._collector.add_arguments(arguments)

    def _type_of(self, call: str, parameter: str) -> ValueType:
        if (call, parameter) not in self._types:
            self._types[call, parameter] = _parameter_type(self._tools.get(call), parameter)
        return self._types[call, parameter]


class _TextValue:
    """A string, perhaps nullable: out as it comes in, as soon as it cannot be `null` any more."""

    takes_tags = False

    def __init__(self, expected: ValueType) -> None:
        self._is_nullable = "null" in expected.kinds
        self._is_framed: bool | None = None
        self._is_open = False
        self._held = ""

    def add(self, text: str) -> str:
        """Take more of the text; return what that adds to the JSON."""
        if not text:
            return ""
        if self._is_framed is None:
            self._is_framed = text.startswith("\n")
            text = text[1:] if self._is_framed else text
        text, self._held = self._held + text, ""
        if self._is_nullable and not self._is_open and self._may_be_null(text):
            self._held = text
            return ""
        if self._is_framed and text.endswith("\n"):
            text, self._held = text[:-1], "\n"
        return self._opening() + quoted(text)[1:-1]

    def finish(self) -> str:
        """Return what the end of the text adds."""
        rest = self._held.removesuffix("\n") if self._is_framed else self._held
        if rest == "null" and not self._is_open:  # only a nullable string holds that back
            return rest
        return self._opening() + quoted(rest)[1:]

    def _may_be_null(self, text: str) -> bool:
        return "null".startswith(text) or (self._is_framed is True and text == "null\n")

    def _opening(self) -> str:
        opening = "" if self._is_open else '"'
        self._is_open = True
        return opening


class _TypedValue:
    """A value that only its whole text tells: nothing comes out before the end."""

    def __init__(self, expected: ValueType) -> None:
        self._expected = expected
        self._pieces: list[str] = []
        self._json = JsonValue() if expected.kinds & {"array", "object"} else None

    @property
    def takes_tags(self) -> bool:
        """Whether the text so far ends inside a string of an object or an array."""
        return self._json is not None and self._json.is_in_nested_string

    def add(self, text: str) -> str:
        """Take more of the text."""
        self._pieces.append(text)
        if self._json:
            self._json.feed(text)
        return ""

    def finish(self) -> str:
        """Return the JSON of the value."""
        return coerce("".join(self._pieces), self._expected)


def _named_schema(tool: Tool) -> tuple[str, Any]:  # Any: JSON from outside
    """Return the name and the parameters of a tool, given bare or in the OpenAI form."""
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str):
        return "", None
    return name, function.get("parameters")


def _parameter_type(schema: Any, parameter: str) -> ValueType:  # Any: JSON from outside
    """Return the type of a parameter; one that the schema does not describe is a string."""
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if isinstance(properties, Mapping) and parameter in properties:
        return value_type(properties[parameter], schema)
    others = schema.get("additionalProperties") if isinstance(schema, Mapping) else None
    return value_type(others, schema) if isinstance(others, Mapping) else TEXT
