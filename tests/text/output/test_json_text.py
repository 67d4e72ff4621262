import json
import random

import pytest

from linnet.text.output.json_text import MAX_DEPTH, JsonValue, strict_json


def random_value(source: random.Random, depth: int = 0):
    size = source.randrange(4)
    if depth < 4 and (kind := source.randrange(3)):
        if kind == 1:
            return [random_value(source, depth + 1) for _ in range(size)]
        return {random_text(source): random_value(source, depth + 1) for _ in range(size)}
    number = source.choice([source.randint(-9, 999), source.gauss(0, 1e6)])
    return source.choice([None, source.random() < 0.5, number, random_text(source)])


def random_text(source: random.Random) -> str:
    return "".join(source.choices('ab "\\/\n\t{}[]:,<>é🦜\u2028\x01', k=source.randrange(7)))


def in_pieces(text: str, source: random.Random) -> str | None:
    value, out, at = JsonValue(), "", 0
    while at < len(text) and not (value.is_complete or value.is_broken):
        piece, at = value.feed(text[: at + source.randint(1, 4)], at)
        out += piece
    out += value.finish()
    return out if value.is_complete and not text[at:].strip(" \t\r\n") else None


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_json_comes_out_as_it_went_in(indent, ascii_only):
    source = random.Random(1)
    for _ in range(300):
        text = json.dumps(random_value(source), indent=indent, ensure_ascii=ascii_only)
        assert strict_json(text) == in_pieces(text, source) == text


def test_what_comes_out_of_damaged_json_is_json():
    source = random.Random(2)
    num_read = 0
    for _ in range(1000):
        text = json.dumps([random_value(source)], ensure_ascii=source.random() < 0.5)
        for _ in range(source.randint(1, 2)):
            at, end = sorted(source.choices(range(len(text) + 1), k=2))
            text = text[:at] + source.choice('"\\,:[]{}u1e-. ') + text[min(end, at + 1) :]
        strict = strict_json(text)
        assert strict == in_pieces(text, source)
        num_read += strict is not None
        if strict is not None:
            json.loads(strict)
        try:
            value = json.loads(text)
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
        except ValueError:  # no JSON, half a surrogate pair, or an infinite number
            continue
        assert strict is not None and json.loads(strict) == value, text
    assert num_read > 150


@pytest.mark.parametrize(
    ("text", "strict"),
    [
        ('"a\nb\t\x00"', '"a\\nb\\t\\u0000"'),
        (r""""\d \' \u12 \u12" """, r""""\\d \\' \\u12 \\u12" """.strip()),
        (r'"\ud83e\udd9c"', r'"\ud83e\udd9c"'),
        (r'"\ud83e" ', r'"\\ud83e"'),
        (r'"\ud83e\n\udd9c"', r'"\\ud83e\n\\udd9c"'),
        (r'"\ud83e\u00e9"', r'"\\ud83e\u00e9"'),
        ("[True, False, None]", "[true, false, null]"),
        ("[NaN, -Infinity, 1e999]", '["NaN", "-Infinity", "1e999"]'),
        ("1" * 1001, '"' + "1" * 1001 + '"'),
        (" -0.5e+3", " -0.5e+3"),
    ],
    ids=[
        *("control characters", "no escapes", "pair", "lone high", "parted pair", "high and other"),
        *("python", "not finite", "long", "number"),
    ],
)
def test_what_models_write_is_put_right(text, strict):
    assert strict_json(text) == strict
    json.loads(strict).__repr__().encode()


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "{", "[1,]", '{"a":1,}', "{a:1}", "{1:1}", '{"a" 1}', '{"a":}', '"a', "[1 2]"),
        *("]", "[}", "[1] 2", "1 1", "01", "1.", "+1", "1_0", "nope", "'a'", "<think>", ":", "٣"),
    ],
)
def test_what_is_no_json_is_refused(text):
    assert strict_json(text) is None


def test_depth_is_limited():
    assert strict_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    assert strict_json("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)) is None


def test_reading_stops_after_the_value():
    value = JsonValue()
    assert value.feed('x[1, "]"], 2', 1) == ('[1, "]"]', 9)
    assert value.is_complete


def test_strings_come_out_while_they_are_read():
    value = JsonValue()
    assert [value.feed(piece)[0] for piece in ('{"a": "b', "c", "\\", "n", '"', ", ")] == [
        '{"a": "b',
        "c",
        "",
        "\\n",
        '"',
        ", ",
    ]
