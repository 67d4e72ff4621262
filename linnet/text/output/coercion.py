"""Untyped parameter values to JSON, by the JSON schema of the parameter.

The M2 format writes every value as bare text: `5` may be a number or a string. The schema decides:

- A value that `enum` or `const` lists is that value.
- A string stays what was written, be it `null`, `5` or `"quoted"`. One that starts with a line end
  was set on lines of its own: that line end, and one at the end, are no part of it.
- Where several types are allowed, the first that fits is taken: null, boolean, integer, number,
  array, object, string.
- What fits no allowed type is taken as JSON if it is JSON, and as a string otherwise: whoever
  validates the arguments then names the real mistake.

Schemas come from outside: the work on one is bounded, and what cannot be understood allows all.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from linnet.text.output.json_text import quoted, strict_json, strict_number

Schema = Any  # Any: JSON from outside; all but mappings allow everything
KINDS = frozenset({"null", "boolean", "integer", "number", "array", "object", "string"})
_MAX_NODES = 1000
_MAX_DEPTH = 32
_MAX_LISTED = 10_000
_MAX_REFERENCE_LEN = 1000
_MAX_NUMBER_LEN = 1000
# Words of other systems for the types of JSON schema.
_ALIASES = {
    **{"int": "integer", "float": "number", "double": "number", "bool": "boolean"},
    **{"list": "array", "tuple": "array", "dict": "object", "none": "null"},
}
_LOOSE_INTEGER = re.compile(r"[-+]?[0-9]+")
_LOOSE_NUMBER = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
_MAX_EXACT_INTEGER = 2**53


@dataclass(frozen=True, slots=True)
class ValueType:
    """What the schema of a parameter allows, as far as it matters for reading a text."""

    kinds: frozenset[str] = KINDS
    """The allowed types; "number" comes with "integer"."""
    literals: Mapping[str, str] | None = None
    """The JSON of listed values, by the text that stands for them."""

    @property
    def is_text(self) -> bool:
        """Whether any text is that string, except `null` if null is allowed."""
        return not self.literals and "string" in self.kinds and self.kinds <= {"string", "null"}


TEXT = ValueType(frozenset({"string"}))


def value_type(schema: Schema, root: Schema = None) -> ValueType:
    """Return what a schema allows; `root` is the schema that its local `$ref` point into."""
    walk = _Walk(root)
    kinds = walk.kinds(schema)
    return ValueType(kinds or KINDS, walk.literals or None)


def coerce(text: str, expected: ValueType) -> str:
    """Return the JSON text of a value written as bare text; see the head of this file."""
    bare, kinds = text.strip(), expected.kinds
    for written in (text, bare):
        if expected.literals and written in expected.literals:
            return expected.literals[written]
    if "null" in kinds and (unframed(text) if "string" in kinds else bare) == "null":
        return "null"
    if "boolean" in kinds and (boolean := _boolean(bare, kinds)):
        return boolean
    if "integer" in kinds and (number := _number(bare, kinds)):
        return number
    if _may_be_container(bare, kinds) and (strict := strict_json(bare)):
        return strict
    if "string" in kinds:
        return quoted(unframed(text))
    return strict_json(bare) or quoted(unframed(text))


def unframed(text: str) -> str:
    """Return a text without the line ends around it, if it was set on lines of its own."""
    return text[1:].removesuffix("\n") if text.startswith("\n") else text


def _boolean(text: str, kinds: frozenset[str]) -> str | None:
    if text in ("true", "false"):
        return text
    if "string" not in kinds and text.lower() in ("true", "false"):
        return text.lower()
    return {"1": "true", "0": "false"}.get(text) if kinds <= {"boolean", "null"} else None


def _number(text: str, kinds: frozenset[str]) -> str | None:
    if len(text) > _MAX_NUMBER_LEN:
        return None
    strict = strict_number(text)
    is_integer = _LOOSE_INTEGER.fullmatch(text) is not None
    if strict and (is_integer or "number" in kinds):
        return strict
    if "string" in kinds:
        return None
    if is_integer:
        return str(int(text))
    value = float(text) if _LOOSE_NUMBER.fullmatch(text) else math.inf
    if "number" in kinds and math.isfinite(value):
        return repr(value)
    if value.is_integer() and abs(value) <= _MAX_EXACT_INTEGER:
        return str(int(value))
    return None


def _may_be_container(text: str, kinds: frozenset[str]) -> bool:
    return (text.startswith("[") and "array" in kinds) or (
        text.startswith("{") and "object" in kinds
    )


class _Walk:
    """One walk over a schema, which no schema can make long."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._num_nodes = 0
        self._num_listed = 0
        self._depth = 0
        self.literals: dict[str, str] = {}

    def kinds(self, schema: Schema) -> frozenset[str]:
        """Return the types that a schema allows, and collect the values it lists."""
        self._num_nodes += 1
        if (
            not isinstance(schema, Mapping)
            or self._num_nodes > _MAX_NODES
            or self._depth == _MAX_DEPTH
        ):
            return KINDS
        self._depth += 1
        kinds = frozenset.intersection(KINDS, *self._constraints(schema))
        self._depth -= 1
        return kinds | {"null"} if schema.get("nullable") is True else kinds

    def _constraints(self, schema: Mapping[str, Any]) -> Iterator[frozenset[str]]:
        if "$ref" in schema:
            yield self.kinds(_resolve(self._root, schema["$ref"]))
        if "type" in schema:
            yield _named_kinds(schema["type"])
        elif "properties" in schema:
            yield frozenset({"object"})
        elif "items" in schema:
            yield frozenset({"array"})
        listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        if isinstance(listed, list) and listed:
            yield self._listed_kinds(listed)
        for word in ("anyOf", "oneOf"):
            if isinstance(schema.get(word), list) and schema[word]:
                yield frozenset().union(*map(self.kinds, schema[word]))
        if isinstance(schema.get("allOf"), list):
            yield from map(self.kinds, schema["allOf"])

    def _listed_kinds(self, listed: list[Any]) -> frozenset[str]:
        self._num_listed += len(listed)
        if self._num_listed > _MAX_LISTED:
            return KINDS
        kinds: set[str] = set()
        for value in listed:
            kinds.add(_kind_of(value))
            if isinstance(value, str):
                self.literals.setdefault(value, quoted(value))
            elif not isinstance(value, (list, Mapping)):
                written = json.dumps(value)
                if strict := strict_json(written):
                    self.literals.setdefault(written, strict)
        return frozenset(kinds | ({"integer"} if "number" in kinds else set()))


def _named_kinds(names: Any) -> frozenset[str]:  # Any: JSON from outside
    kinds: set[str] = set()
    for name in names if isinstance(names, list) else [names]:
        word = name.lower() if isinstance(name, str) else ""
        word = _ALIASES.get(word, word)
        kinds |= {"integer", "number"} if word == "number" else {word}
    return frozenset(kinds & KINDS or {"string"})


def _kind_of(value: Any) -> str:  # Any: JSON from outside
    for kind, types in (
        ("null", type(None)),
        ("boolean", bool),
        ("integer", int),
        ("number", float),
        ("string", str),
        ("array", list),
    ):
        if isinstance(value, types):
            return kind
    return "object"


def _resolve(root: Schema, reference: Any) -> Schema:  # Any: JSON from outside
    """Return the part of `root` that `#/a/b` names, or None."""
    if not isinstance(reference, str) or len(reference) > _MAX_REFERENCE_LEN:
        return None
    start, *steps = reference.split("/")
    if start != "#":
        return None
    part = root
    for step in steps:
        key = step.replace("~1", "/").replace("~0", "~")
        if isinstance(part, Mapping):
            part = part.get(key)
        elif isinstance(part, list) and key.isdecimal() and len(key) < 10 and int(key) < len(part):
            part = part[int(key)]
        else:
            return None
    return part
