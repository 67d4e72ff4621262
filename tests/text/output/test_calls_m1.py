"""MiniMax-M1's tool calls: each case is checked at every cut (`check`)."""

import json

import pytest

from linnet.text import OutputParser, join_deltas, parse_output

OPEN, CLOSE = "<tool_calls>", "</tool_calls>"
HARD = {
    "tag": "</tool_calls>",
    "open": "<tool_calls>\n{",
    "think": "<think>a</think>",
    "name": "g",
    "arguments": {"name": "h", "arguments": []},
    "quote": 'a "b" \\ \\" { } [ ] , :',
    "unicode": "é 你好 🦜 \u2028 \x00\n\t",
    "numbers": [0, -1.5e-7, 12345678901234567890],
    "rest": [True, False, None, {}, [], ""],
}
LOOSE = {"a": "\n\\d", "b": True}
EASY = {"a": {"name": [1, "x"]}}


def line(name, arguments, **how) -> str:
    return json.dumps({"name": name, "arguments": arguments}, **how)


def region(*lines) -> str:
    return "\n".join([OPEN, *lines, CLOSE])


def calls_of(check, text):
    content, reasoning, calls = check(text, "m1")
    assert (content, reasoning) == ("", "")
    return calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (region(line("f", {"a": 1})), [("f", {"a": 1})]),
        (region(line("f", {}), line("g", {"b": "c"})), [("f", {}), ("g", {"b": "c"})]),
        (region(line("f", HARD)), [("f", HARD)]),
        (region(line("f", HARD, ensure_ascii=False)), [("f", HARD)]),
        (region(line("f", EASY, indent=2), line("g", {}, indent=1)), [("f", EASY), ("g", {})]),
        (region(line("f", EASY, separators=(",", ":"))), [("f", EASY)]),
        (region("", line("f", {}), "  ", "", line("g", {}), ""), [("f", {}), ("g", {})]),
        (OPEN + line("f", {}) + line("g", {}) + CLOSE, [("f", {}), ("g", {})]),
        (OPEN + json.dumps([{"name": "f"}, {"name": "g"}]) + CLOSE, [("f", {}), ("g", {})]),
        (OPEN + "\n" + line("f", EASY), [("f", EASY)]),
        (OPEN + "\n" + line("f", {}) + "\n", [("f", {})]),
        (OPEN + "\n" + line("f", {}) + "\n</tool_ca", [("f", {})]),
        (
            OPEN + line("f", {}) + CLOSE + "\n" + OPEN + line("g", {}) + CLOSE,
            [("f", {}), ("g", {})],
        ),
        (region(OPEN, line("f", {})), [("f", {})]),
        (region('{"arguments": {"a": "name"}, "name": "f"}'), [("f", {"a": "name"})]),
        (region('{"arguments": "{\\"a\\": \\"é\\"}", "name": "f"}'), [("f", {"a": "é"})]),
        (region('{"name": "f"}'), [("f", {})]),
        (region('{"name": "f", "arguments": null}'), [("f", {})]),
        (region('{"name": "f", "arguments": ""}'), [("f", {})]),
        (region(line("f", '{"a": [1]}')), [("f", {"a": [1]})]),
        (region(line("f", "{a}")), [("f", "{a}")]),
        (region(line("f", [1, "</tool_calls>"])), [("f", [1, "</tool_calls>"])]),
        (region(line("f", 5)), [("f", 5)]),
        (region('{"id": {"name": 1}, "name": "f", "x": [{}], "arguments": {}}'), [("f", {})]),
        (region('{"name": "f", "name": "g", "arguments": {}, "arguments": {"a": 1}}'), [("f", {})]),
        (region('{"\\u006eame": "\\u0066\\ud83e\\udd9c", "arguments": {}}'), [("f🦜", {})]),
        (region('{"name": "f", "arguments": {"a": "\n\\d", "b": True}}'), [("f", LOOSE)]),
        (region('{"name": "f", "arguments": {"a": NaN}}'), [("f", {"a": "NaN"})]),
    ],
    ids=[
        *("one", "parallel", "hard", "hard unicode", "pretty", "compact", "blank lines"),
        *("one line", "list", "no close", "no close, line end", "half close", "two regions"),
        *("opened twice", "arguments first", "string arguments first", "no arguments", "null"),
        *("empty string", "object in a string", "text", "array", "number", "other keys"),
        *("repeated keys", "escaped keys", "nearly JSON", "not finite"),
    ],
)
def test_calls_are_read(check, text, calls):
    assert calls_of(check, text) == calls


@pytest.mark.parametrize(
    ("lines", "calls"),
    [
        (['{"name": "f", "arguments": {"a": 1,, "b": 2}}'], [("f", None)]),
        (['{"name": "f", "arguments": {"a": foo}}', line("g", {})], [("f", None), ("g", {})]),
        (['{"name": "f" "arguments": {}}', line("g", {})], [("f", None), ("g", {})]),
        (['{"name": "f", "arguments": {"a": 1}', line("g", {})], [("f", {"a": 1}), ("g", {})]),
        (['{"name": "f", "arguments": {"a": 1}'], [("f", {"a": 1})]),
        (
            ['{"name": "f", "arguments": {"a": 1}, oops', line("g", {})],
            [("f", {"a": 1}), ("g", {})],
        ),
        (['{"name": "f", "arguments": {"a": [1}}'], [("f", None)]),
        (['{"name": "f", "arguments": ' + "[" * 101 + "]" * 101 + "}"], [("f", None)]),
        (['{"name": "f", "arguments": {"a": 1,', line("g", {})], [("f", None), ("g", {})]),
        (['{"name": "f", "arguments": {{}}}', line("g", {})], [("f", None), ("g", {})]),
        (['{"name": "f", "arguments": {"a": "x}}', "b"], [("f", None)]),
    ],
    ids=[
        *("two commas", "bare word", "no comma", "missing brace", "missing last brace", "oops"),
        *("wrong bracket", "too deep", "missing half", "two braces", "open string"),
    ],
)
def test_a_broken_call_keeps_its_name_and_spoils_no_other(check, lines, calls):
    assert calls_of(check, region(*lines)) == calls


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"Use {OPEN} to call.", "Use to call."),
        (f"Use {OPEN}{CLOSE} to call.", "Use to call."),
        (region("I call nothing"), "I call nothing"),
        (region("{like: this}", "or this"), "{like: this}\nor this"),
        (region('{"foo": 1}'), '{"foo": 1}'),
        (region('{"name": 5, "arguments": {}}'), '{"name": 5, "arguments": {}}'),
        (region('{"name": "", "arguments": {}}'), '{"name": "", "arguments": {}}'),
        (region("{'name': 'f', 'arguments': {}}"), "{'name': 'f', 'arguments': {}}"),
        (region("[1, 2] and", "more"), "1, 2] and\nmore"),
        (region("a < b </tool > c"), "a < b </tool > c"),
        (f"A\n{OPEN}\n{{}}\n{CLOSE}\nB", "A\n{}\nB"),
        (f"A {CLOSE} B", f"A {CLOSE} B"),
    ],
)
def test_what_is_no_call_is_content(check, text, content):
    assert check(text, "m1") == (content, "", [])


def test_prose_between_calls_is_content(check):
    text = region("First", line("f", {}), "then {x} and", line("g", {}), "done")
    assert check(f"Hi.\n\n{text}\n\nBye.\n", "m1") == (
        "Hi.\n\nFirst\nthen {x} and\ndone\nBye.\n",
        "",
        [("f", {}), ("g", {})],
    )


def test_thinking_between_calls_is_reasoning(check):
    text = region(line("f", {}), f"<think>\nthen {OPEN}{line('x', {})}\n</think>", line("g", {}))
    assert check(text, "m1") == (
        "",
        f"then {OPEN}{line('x', {})}",
        [("f", {}), ("g", {})],
    )


def test_arguments_come_out_as_they_are_written():
    parser = OutputParser("m1")
    assert parser.push('<tool_calls>\n{"na').calls == ()
    (first,) = parser.push('me": "f", "arguments": {"text": "He').calls
    assert (first.index, first.name, first.arguments) == (0, "f", '{"text": "He')
    (more,) = parser.push("llo").calls
    assert (more.index, more.id, more.name, more.arguments) == (0, None, None, "llo")
    assert parser.push("\\").calls == ()
    assert [call.arguments for call in parser.push('n", "n": 1').calls] == ['\\n", "n": ']
    assert [call.arguments for call in parser.push("2}").calls] == ["12}"]


def test_arguments_wait_for_the_name():
    parser = OutputParser("m1")
    assert parser.push('<tool_calls>{"arguments": {"a": 1}, ').calls == ()
    (call,) = parser.push('"name": "f"').calls
    assert (call.name, call.arguments) == ("f", '{"a": 1}')


def test_one_piece_may_hold_several_calls():
    parser = OutputParser("m1")
    delta = parser.push(region(line("f", {"a": 1}), line("g", {})))
    assert [(call.index, call.name, call.arguments) for call in delta.calls] == [
        (0, "f", '{"a": 1}'),
        (1, "g", "{}"),
    ]
    assert join_deltas([delta]).calls[0].id != join_deltas([delta]).calls[1].id


def test_a_call_that_was_cut_off_has_unfinished_arguments():
    text = region(line("f", {"path": "/home/user/x"}))
    end = text.index("user")
    (call,) = parse_output(text[:end], "m1").calls
    assert call.arguments == '{"path": "/home/'


def test_truncation_shows_only_what_the_whole_shows(check_truncated):
    check_truncated("Hi.\n" + region(line("f", HARD), line("g", {"a": 1}, indent=2)), "m1")
    check_truncated(region('{"arguments": {"a": 1}, "name": "f"}', line("g", {})), "m1")
