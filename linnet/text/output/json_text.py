"""Reading JSON as it is written, and writing it on as strict JSON.

Models write nearly JSON: line ends inside strings, `\\d` for a backslash, `True`. These are put
right on the way. What cannot be put right stops the reading: nothing is guessed, and what
was written until then is no valid JSON.
"""

import json
import math
import re

MAX_DEPTH = 100
"""Objects and arrays in each other; a reader of JSON that recurses stands this."""
_MAX_NUMBER_LEN = 1000  # Python refuses to read integers of more than 4300 digits

_SPACE = re.compile(r"[ \t\r\n]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
# A surrogate is an escape only in a pair: alone it is no character, and no file can hold it.
_HEX = "[0-9a-fA-F]"
_HIGH, _LOW = rf"u[dD][89abAB]{_HEX}{{2}}", rf"u[dD][c-fC-F]{_HEX}{{2}}"
_ESCAPE = re.compile(rf'\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F]){_HEX}{{4}}|{_HIGH}\\{_LOW})')
_ESCAPE_START = re.compile(rf"\\(?:u{_HEX}{{0,3}}|{_HIGH}(?:\\(?:u{_HEX}{{0,3}})?)?)?")
_HIGH_LEN = 6
_SCALAR = re.compile(r"[-+.0-9A-Za-z_]+")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_LITERALS = {name: name for name in ("true", "false", "null")}
_LITERALS |= {"True": "true", "False": "false", "None": "null"}
_LITERALS |= {name: f'"{name}"' for name in ("NaN", "Infinity", "-Infinity")}
_CLOSE = {"{": "}", "[": "]"}


class JsonValue:
    """Reads one JSON value from pieces of text and returns it as strict JSON, piece by piece.

    Strings come out as they are read, numbers and literals when they end. A number that no float
    holds, or NaN, becomes a string.
    """

    def __init__(self) -> None:
        self.is_complete = False
        self.is_broken = False
        self._stack: list[str] = []
        # What may come next: "value", "item" (or "]"), "key", "first key" (or "}"), ":" or ",".
        self._next = "value"
        self._is_in_string = False
        self._is_key = False
        self._escape = ""
        self._scalar: list[str] = []

    @property
    def is_in_nested_string(self) -> bool:
        """Whether the text so far ends inside a string that is in an object or an array."""
        return self._is_in_string and bool(self._stack)

    def feed(self, text: str, at: int = 0) -> tuple[str, int]:
        """Read on.

        Returns:
            The strict JSON of what was read, and the place in `text` where reading stopped: its
            end, or after the value, or at the character that breaks it.
        """
        out: list[str] = []
        while at < len(text) and not (self.is_complete or self.is_broken):
            if self._is_in_string:
                at = self._read_string(text, at, out)
            elif self._scalar:
                at = self._read_scalar(text, at, out)
            else:
                end = _end_of_space(text, at)
                out.append(text[at:end])
                at = end if end > at else self._read_mark(text, at, out)
        return "".join(out), at

    def finish(self) -> str:
        """Say that the text ends here, which ends a number; return what that adds."""
        out: list[str] = []
        if self._scalar:
            self._end_scalar(out)
        return "".join(out)

    def _read_mark(self, text: str, at: int, out: list[str]) -> int:
        char = text[at]
        takes_value = self._next in ("value", "item")
        if char == '"' and (takes_value or self._next in ("key", "first key")):
            self._is_in_string, self._is_key = True, not takes_value
        elif char in _CLOSE and takes_value and len(self._stack) < MAX_DEPTH:
            self._stack.append(char)
            self._next = "first key" if char == "{" else "item"
        elif self._stack and char == _CLOSE[self._stack[-1]] and self._may_close:
            self._stack.pop()
            self._end_value()
        elif char == self._next == ",":
            self._next = "key" if self._stack[-1] == "{" else "value"
        elif char == self._next == ":":
            self._next = "value"
        elif takes_value and _SCALAR.match(char):
            return self._read_scalar(text, at, out)
        else:
            self.is_broken = True
            return at
        out.append(char)
        return at + 1

    @property
    def _may_close(self) -> bool:
        return self._next in (",", "item", "first key")

    def _read_string(self, text: str, at: int, out: list[str]) -> int:
        char = text[at]
        if self._escape:
            return self._read_escape(text, at, out)
        if plain := _PLAIN.match(text, at):
            out.append(plain.group())
            return plain.end()
        if char == '"':
            self._is_in_string = False
            out.append(char)
            if self._is_key:
                self._next = ":"
            else:
                self._end_value()
        elif char == "\\":
            self._escape = char
        else:
            out.append(json.dumps(char)[1:-1])
        return at + 1

    def _read_escape(self, text: str, at: int, out: list[str]) -> int:
        escape = self._escape + text[at]
        if _ESCAPE.fullmatch(escape):
            out.append(escape)
            self._escape = ""
            return at + 1
        if _ESCAPE_START.fullmatch(escape):
            self._escape = escape
            return at + 1
        # Not an escape, so its backslash stands for itself; what follows is read on its own.
        out.append("\\" + self._escape[:_HIGH_LEN])
        self._escape = self._escape[_HIGH_LEN:]
        return at

    def _read_scalar(self, text: str, at: int, out: list[str]) -> int:
        if match := _SCALAR.match(text, at):
            self._scalar.append(match.group())
            return match.end()
        self._end_scalar(out)
        return at

    def _end_scalar(self, out: list[str]) -> None:
        text = "".join(self._scalar)
        self._scalar = []
        strict = _LITERALS.get(text) or strict_number(text)
        if strict is None and _NUMBER.fullmatch(text):
            strict = json.dumps(text)
        if strict is None:
            self.is_broken = True
        else:
            out.append(strict)
            self._end_value()

    def _end_value(self) -> None:
        self._next = ","
        self.is_complete = not self._stack


def strict_json(text: str) -> str | None:
    """Return a text that is nearly JSON as strict JSON, or None if it is not one JSON value."""
    value = JsonValue()
    strict, end = value.feed(text)
    strict += value.finish()
    return strict if value.is_complete and _end_of_space(text, end) == len(text) else None


def strict_number(text: str) -> str | None:
    """Return `text` if it is a JSON number that programs can hold, else None."""
    if len(text) > _MAX_NUMBER_LEN or not _NUMBER.fullmatch(text):
        return None
    is_integer = text.removeprefix("-").isdigit()
    return text if is_integer or math.isfinite(float(text)) else None


def quoted(text: str) -> str:
    """Return a text as a JSON string."""
    return json.dumps(text, ensure_ascii=False)


def _end_of_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at
