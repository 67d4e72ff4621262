import json
import random
import time

import pytest

from linnet.text.output.calls_m2 import _TextValue
from linnet.text.output.coercion import TEXT, coerce, value_type

ROOT = {
    "$defs": {
        "Color": {"enum": ["red", "null", 3]},
        "Loop": {"$ref": "#/$defs/Loop"},
        "a/b~c": {"type": "integer"},
        "Tree": {"type": "object", "properties": {"child": {"$ref": "#/$defs/Tree"}}},
        "List": [{"type": "boolean"}],
    }
}
STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}
BOOLEAN, ARRAY, OBJECT = {"type": "boolean"}, {"type": "array"}, {"type": "object"}


def nullable(schema):
    return {"anyOf": [schema, {"type": "null"}]}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        # A string is what was written.
        (STRING, "null", "null"),
        (STRING, "None", "None"),
        (STRING, "5", "5"),
        (STRING, "true", "true"),
        (STRING, '"a"', '"a"'),
        (STRING, '{"a": 1}', '{"a": 1}'),
        (STRING, "", ""),
        (STRING, "  a\n", "  a\n"),
        (STRING, "\na\n\n", "a\n"),
        (STRING, 'é🦜\u2028"\\\x00', 'é🦜\u2028"\\\x00'),
        # Numbers.
        (INTEGER, "5", 5),
        (INTEGER, " -5\n", -5),
        (INTEGER, "+05", 5),
        (INTEGER, "5.0", 5),
        (INTEGER, "3.7", 3.7),
        (INTEGER, "1e3", 1000),
        (INTEGER, "123456789012345678901234567890", 123456789012345678901234567890),
        (INTEGER, "1" * 5000, "1" * 5000),
        (INTEGER, "٣", "٣"),
        (INTEGER, "1_000", "1_000"),
        (INTEGER, "five", "five"),
        (INTEGER, "", ""),
        (INTEGER, "nan", "nan"),
        (INTEGER, "inf", "inf"),
        (INTEGER, "null", None),
        (NUMBER, "5", 5),
        (NUMBER, "5.0", 5.0),
        (NUMBER, ".5", 0.5),
        (NUMBER, "+1.5e2", 150.0),
        (NUMBER, "NaN", "NaN"),
        (NUMBER, "-Infinity", "-Infinity"),
        (NUMBER, "1e999", "1e999"),
        (NUMBER, "-.5e999", "-.5e999"),
        (NUMBER, "true", True),
        # Booleans.
        (BOOLEAN, "true", True),
        (BOOLEAN, "False", False),
        (BOOLEAN, "1", True),
        (BOOLEAN, "0", False),
        (BOOLEAN, "yes", "yes"),
        (BOOLEAN, "2", 2),
        # Arrays and objects.
        (ARRAY, '["a", 1]', ["a", 1]),
        (ARRAY, "\n[1]\n", [1]),
        (ARRAY, "a, b", "a, b"),
        (ARRAY, "[1", "[1"),
        (ARRAY, '{"a": 1}', {"a": 1}),
        (ARRAY, "[True, None]", [True, None]),
        (OBJECT, '{"a": {"b": "null"}}', {"a": {"b": "null"}}),
        (OBJECT, '{"a": "x\ny"}', {"a": "x\ny"}),
        (OBJECT, "{'a': 1}", "{'a': 1}"),
        (OBJECT, "[" * 5000, "[" * 5000),
        # Null and nullable.
        ({"type": "null"}, "null", None),
        ({"type": "null"}, "x", "x"),
        (nullable(STRING), "null", None),
        (nullable(STRING), "\nnull\n", None),
        (nullable(STRING), "nullable", "nullable"),
        (nullable(STRING), "None", "None"),
        (nullable(STRING), "a", "a"),
        (nullable(STRING), "", ""),
        (nullable(INTEGER), "null", None),
        (nullable(INTEGER), "None", None),
        (nullable(INTEGER), "7", 7),
        (nullable(ARRAY), "[1]", [1]),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["integer", "null"]}, "3", 3),
        ({"type": "integer", "nullable": True}, "null", None),
        ({"type": "string", "nullable": True}, "x", "x"),
        ({"type": "string", "nullable": False}, "null", "null"),
        # Several types: the first that fits.
        ({"type": ["string", "integer"]}, "5", 5),
        ({"type": ["string", "integer"]}, "05", "05"),
        ({"type": ["string", "integer"]}, "5.0", "5.0"),
        ({"type": ["string", "number"]}, "5.0", 5.0),
        ({"type": ["string", "boolean"]}, "true", True),
        ({"type": ["string", "boolean"]}, "True", "True"),
        ({"type": ["integer", "boolean"]}, "1", 1),
        ({"oneOf": [STRING, OBJECT]}, '{"a": 1}', {"a": 1}),
        ({"oneOf": [STRING, OBJECT]}, "{a}", "{a}"),
        ({"anyOf": [ARRAY, STRING]}, "[1]", [1]),
        ({"anyOf": [ARRAY, STRING]}, "[see]", "[see]"),
        ({"allOf": [{"description": "x"}, INTEGER]}, "5", 5),
        ({"type": ["string", "integer"], "anyOf": [STRING, NUMBER]}, "5", 5),
        ({"type": "string", "anyOf": [STRING, NUMBER]}, "5", "5"),
        # Listed values.
        ({"enum": ["1", 2]}, "1", "1"),
        ({"enum": ["1", 2]}, "2", 2),
        ({"enum": [1, "1"]}, "1", 1),
        ({"enum": ["a", None]}, "null", None),
        ({"enum": ["a", "null"]}, "null", "null"),
        ({"enum": [True, "x"]}, "true", True),
        ({"enum": ["a b"]}, "\na b\n", "a b"),
        ({"enum": [" a"]}, " a", " a"),
        ({"enum": ["a"]}, "b", "b"),
        ({"enum": [1, 2]}, "3", 3),
        ({"enum": [0.5]}, "0.5", 0.5),
        ({"enum": [[1], {"a": 1}]}, "[1]", [1]),
        ({"const": "5"}, "5", "5"),
        ({"const": None}, "null", None),
        ({"type": "string", "enum": ["1"]}, "1", "1"),
        ({"anyOf": [{"const": "1"}, INTEGER]}, "1", "1"),
        ({"anyOf": [{"const": "1"}, INTEGER]}, "2", 2),
        # References.
        ({"$ref": "#/$defs/Color"}, "null", "null"),
        ({"$ref": "#/$defs/Color"}, "3", 3),
        (nullable({"$ref": "#/$defs/a~1b~0c"}), "7", 7),
        ({"$ref": "#/$defs/Tree"}, "{}", {}),
        ({"$ref": "#/$defs/Loop"}, "5", 5),
        ({"$ref": "#/$defs/List/0"}, "1", True),
        ({"$ref": "#/$defs/List/9"}, "1", 1),
        ({"$ref": "#/$defs/None"}, "text", "text"),
        ({"$ref": "https://example.com/s.json"}, "5", 5),
        ({"$ref": "#anchor"}, "5", 5),
        ({"$ref": "#"}, "{}", {}),
        # No type, other words for types, and what is no schema.
        ({}, "5", 5),
        ({}, "text", "text"),
        ({}, "null", None),
        ({}, "NaN", "NaN"),
        ({"description": "x"}, '{"a": 1}', {"a": 1}),
        ({"properties": {}}, '{"a": 1}', {"a": 1}),
        ({"items": {}}, "[1]", [1]),
        ({"type": "int"}, "5", 5),
        ({"type": "STRING"}, "5", "5"),
        ({"type": "date"}, "5", "5"),
        ({"type": 7}, "5", "5"),
        ({"type": ["string", None, {}]}, "5", "5"),
        ({"enum": 5, "anyOf": 3, "oneOf": [], "allOf": "x", "$ref": 1}, "5", 5),
        ({"allOf": [STRING, INTEGER]}, "5", 5),
        ({"anyOf": ["x", None]}, "5", 5),
        (True, "5", 5),
        (None, "text", "text"),
        ("string", "5", 5),
    ],
)
def test_a_text_becomes_what_the_schema_says(schema, text, value):
    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    written = coerce(text, value_type(schema, ROOT))
    read = json.loads(written, parse_constant=no_constant)
    assert read == value
    assert type(read) is type(value)


def test_a_number_keeps_all_its_digits():
    text = "0.10000000000000000555"
    assert coerce(text, value_type(NUMBER)) == text


def test_a_parameter_that_no_schema_describes_is_a_string():
    assert coerce("5", TEXT) == '"5"'


@pytest.mark.parametrize("kinds", ["string", ["string", "null"]])
def test_streamed_strings_are_those_of_the_whole_text(kinds):
    expected = value_type({"type": kinds})
    source = random.Random(4)
    for _ in range(2000):
        text = "".join(
            source.choices(["n", "null", "\n", "\\", '"', " ", "é"], k=source.randrange(5))
        )
        value, out, at = _TextValue(expected), "", 0
        while at < len(text):
            end = at + source.randrange(4)
            out += value.add(text[at:end])
            at = end
        assert out + value.finish() == coerce(text, expected)


def test_no_schema_takes_long():
    tree = {f"D{i}": {"anyOf": [{"$ref": f"#/$defs/D{i + 1}"}] * 4} for i in range(64)}
    many = {"anyOf": [{"enum": [str(i) for i in range(1000)]}] * 1000}
    deep: dict = {}
    for _ in range(5000):
        deep = {"allOf": [deep]}
    long = {"anyOf": [{"$ref": "#" + "/a" * 10**6}] * 1000}
    start = time.process_time()
    for schema in ({"$ref": "#/$defs/D0"}, many, deep, long):
        coerce("5", value_type(schema, {"$defs": tree}))
    assert time.process_time() - start < 1
