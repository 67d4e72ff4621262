"""MiniMax-M2's tool calls: each case is checked at every cut (`check`)."""

import pytest

from linnet.text import OutputParser, parse_output

OPEN, CLOSE = "<minimax:tool_call>", "</minimax:tool_call>"
PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "count": {"type": "integer"},
        "list": {"type": "array", "items": {"type": "string"}},
        "object": {"$ref": "#/$defs/Object"},
        "either": {"oneOf": [{"type": "string"}, {"type": "object"}]},
        "any": {},
    },
    "$defs": {"Object": {"type": "object"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": PARAMETERS}},
    {"name": "open", "parameters": {"additionalProperties": {"type": "number"}}},
]


def call(name, **parameters) -> str:
    lines = [f'<parameter name="{key}">{value}</parameter>' for key, value in parameters.items()]
    return "\n".join([f'<invoke name="{name}">', *lines, "</invoke>"])


def region(*lines) -> str:
    return "\n".join([OPEN, *lines, CLOSE])


def calls_of(check, text):
    content, reasoning, calls = check(text, "m2", TOOLS)
    assert (content, reasoning) == ("", "")
    return calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (region(call("f", text="a")), [("f", {"text": "a"})]),
        (region(call("f")), [("f", {})]),
        (
            region(call("f", count="5", any="[1]"), call("open", x="1.5", y="b")),
            [("f", {"count": 5, "any": [1]}), ("open", {"x": 1.5, "y": "b"})],
        ),
        (region(call("unknown", count="5")), [("unknown", {"count": "5"})]),
        (region(call("f", unknown="null")), [("f", {"unknown": "null"})]),
        (region(call("f", text="null", maybe="null")), [("f", {"text": "null", "maybe": None})]),
        (region(call("f", text="", maybe="")), [("f", {"text": "", "maybe": ""})]),
        (region(call("f", maybe="nullable")), [("f", {"maybe": "nullable"})]),
        (region(call("f", text="\n a\n\n b\n")), [("f", {"text": " a\n\n b"})]),
        (region(call("f", text=" a\n")), [("f", {"text": " a\n"})]),
        (
            region(call("f", text='é 🦜 "\\\n\t\x00\u2028')),
            [("f", {"text": 'é 🦜 "\\\n\t\x00\u2028'})],
        ),
        (
            region(call("f", text=f"</invoke>{CLOSE}<think></think><parameter name='a'></param")),
            [("f", {"text": f"</invoke>{CLOSE}<think></think><parameter name='a'></param"})],
        ),
        (region(call("f", list='["</parameter>"]')), [("f", {"list": ["</parameter>"]})]),
        (
            region(call("f", object='{"</parameter>": "\\""}')),
            [("f", {"object": {"</parameter>": '"'}})],
        ),
        (
            region(call("f", either='{"a": "</parameter>"}')),
            [("f", {"either": {"a": "</parameter>"}})],
        ),
        (region(call("f", list='"</')), [("f", {"list": '"</'})]),
        (region(call("f", list="[1, 2")), [("f", {"list": "[1, 2"})]),
        (region(call("f", list="['a']")), [("f", {"list": "['a']"})]),
        (OPEN + call("f", text="a") + call("f") + CLOSE, [("f", {"text": "a"}), ("f", {})]),
        (OPEN + call("f", text="a"), [("f", {"text": "a"})]),
        (region(call("f", text="a")) + "\n" + region(call("f")), [("f", {"text": "a"}), ("f", {})]),
        (region(OPEN, call("f")), [("f", {})]),
        (
            region("<invoke name='f'>", "<parameter name=text>a</parameter></invoke>"),
            [("f", {"text": "a"})],
        ),
        (
            region('<invoke name="f" >', '<parameter\tname="text" >a</parameter></invoke>'),
            [("f", {"text": "a"})],
        ),
        (region('<invoke name="f">', call("f", count=1)), [("f", {}), ("f", {"count": 1})]),
        (
            OPEN + '<invoke name="f"><parameter name="count">1</parameter>' + CLOSE,
            [("f", {"count": 1})],
        ),
        (
            region('<invoke name="f">so<parameter name="count">1</parameter>, <b>\n</invoke>'),
            [("f", {"count": 1})],
        ),
        (
            region(call("f", count="1", text="a").replace('"text"', '"count"')),
            [("f", {"count": 1})],
        ),
    ],
    ids=[
        *("one", "no parameters", "parallel", "unknown tool", "unknown parameter", "null", "empty"),
        *("nullable", "framed", "white space", "unicode", "tags in a string", "tag in a list"),
        *("tag in a key", "tag in either", "quote", "open list", "python list", "one line"),
        *("no close", "two regions", "opened twice", "quotes", "spaces", "no end of call"),
        *("no end of last call", "text between", "repeated"),
    ],
)
def test_calls_are_read(check, text, calls):
    assert calls_of(check, text) == calls


@pytest.mark.parametrize(
    "text",
    [
        OPEN + '<invoke name="f">',
        OPEN + '<invoke name="f"><parameter name="count">5',
        OPEN + '<invoke name="f"><parameter name="text">half',
        OPEN + '<invoke name="f"><parameter name="maybe">null',
        OPEN + '<invoke name="f"><parameter name="text">a</parameter>',
        OPEN + '<invoke name="f"><parameter name="text">a</parameter></invo',
    ],
)
def test_a_call_that_was_cut_off_has_unfinished_arguments(check, text):
    assert calls_of(check, text) == [("f", None)]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (f"Use {OPEN} to call.", "Use to call."),
        (region("<invoke>", "none"), "<invoke>\nnone"),
        (region('<invoke name="">'), '<invoke name="">'),
        (region('<invoke name="a\nb">'), '<invoke name="a\nb">'),
        (region(f'<invoke name="{"a" * 300}">'), f'<invoke name="{"a" * 300}">'),
        (region('<parameter name="a">1</parameter>'), '<parameter name="a">1</parameter>'),
        ("<tool_calls>{}</tool_calls>", "<tool_calls>{}</tool_calls>"),
        (f'A<invoke name="f"></invoke>{CLOSE}', f'A<invoke name="f"></invoke>{CLOSE}'),
    ],
)
def test_what_is_no_call_is_content(check, text, content):
    assert check(text, "m2", TOOLS) == (content, "", [])


def test_prose_and_thinking_between_calls(check):
    text = region("First", call("f"), f"<think>{call('g')}</think>", "then", call("open"))
    assert check(f"Hi.\n{text}\nBye.", "m2", TOOLS) == (
        "Hi.\nFirst\nthen\nBye.",
        call("g"),
        [("f", {}), ("open", {})],
    )


def test_strings_come_out_as_they_are_written_and_numbers_at_their_end():
    parser = OutputParser("m2", TOOLS)
    (first,) = parser.push(OPEN + '<invoke name="f"><parameter name="text">He').calls
    assert (first.name, first.arguments) == ("f", '{"text": "He')
    assert [call.arguments for call in parser.push('l"lo').calls] == ['l\\"lo']
    assert parser.push("</par").calls == ()
    assert [call.arguments for call in parser.push("am").calls] == []
    assert [call.arguments for call in parser.push("</parameter>").calls] == ['</param"']
    (number,) = parser.push('<parameter name="count">1').calls
    assert number.arguments == ', "count": '
    assert [call.arguments for call in parser.push("2</parameter>").calls] == ["12"]
    assert [call.arguments for call in parser.push("</invoke>").calls] == ["}"]


@pytest.mark.parametrize(
    "tools",
    [
        [None, 5, "f", {}, {"name": 3}, {"function": None}, {"function": {"name": "f"}}],
        [{"name": "f", "parameters": 5}],
        [{"name": "f", "parameters": {"properties": 5, "additionalProperties": True}}],
    ],
)
def test_tools_without_a_schema_give_strings(tools):
    (only,) = parse_output(region(call("f", a="5")), "m2", tools).calls
    assert only.arguments == '{"a": "5"}'


def test_truncation_shows_only_what_the_whole_shows(check_truncated):
    text = region(call("f", text="a < b\n", count="5", maybe="null", list='["</parameter>"]'))
    check_truncated(f"Hi.\n{text}\nBye", "m2", TOOLS)
