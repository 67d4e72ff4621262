import json
import random
import re
import time

import pytest

from linnet.text import OutputParser, join_deltas, parse_output

M1, M2 = ("<tool_calls>", "</tool_calls>"), ("<minimax:tool_call>", "</minimax:tool_call>")
CALL = '<tool_calls>\n{"name": "f", "arguments": {}}\n</tool_calls>'


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("", "", ""),
        ("Hello\n\n", "Hello\n\n", ""),
        ("\n  a\n\n\nb \t", "\n  a\n\n\nb \t", ""),
        (" \n ", " \n ", ""),
        ("é 🦜\u3000", "é 🦜\u3000", ""),
        ("<think>a</think>b", "b", "a"),
        ("<think>\n\na\n\nb\n</think>\n\nc\n", "c\n", "a\n\nb"),
        ("<think>\n  a\n</think>\n\n  c", "  c", "  a"),
        ("\n<think>a</think>", "", "a"),
        ("<think></think>b", "b", ""),
        ("<think>\n \n</think>b", "b", ""),
        ("A\n<think>b</think>\n\nC", "A\nC", "b"),
        ("A<think>b</think>\n\nC", "A\n\nC", "b"),
        ("A<think>b</think>C", "AC", "b"),
        ("A <think>b</think>", "A", "b"),
        ("<think>a</think>B<think>c</think>D", "BD", "a\nc"),
        ("<think>a\n\n</think><think>\nb</think>", "", "a\n\nb"),
        ("A\n<think>b</think>\n<think>c</think>\n\nD", "A\nD", "b\nc"),
        ("<think>never closed\n", "", "never closed"),
        ("a</think>\n\nb", "a\n\nb", ""),
        ("</think></think>b", "b", ""),
        ("<think>a<think>b</think>c</think>d", "cd", "a<think>b"),
        (f"<think>{CALL}</think>a", "a", CALL),
        ("<think>{'<tool_calls>'</think>a", "a", "{'<tool_calls>'"),
        ("1 < 2 > 0", "1 < 2 > 0", ""),
        ("1 <", "1 <", ""),
        ("<think>1 <", "", "1 <"),
        ("a <t", "a ", ""),
        ("a </", "a ", ""),
        ("a <thin", "a ", ""),
        ("<think>a</thin", "", "a"),
        ("a <thin g", "a <thin g", ""),
        ("<<think>b</think>", "<", "b"),
        ("</ think> <think/> <THINK>", "</ think> <think/> <THINK>", ""),
        ("<thin<think>b</think><", "<thin<", "b"),
    ],
)
@pytest.mark.parametrize("tool_format", ["m1", None])
def test_reasoning_is_told_from_content(check, text, content, reasoning, tool_format):
    assert check(text, tool_format) == (content, reasoning, [])


@pytest.mark.parametrize(
    ("text", "content", "reasoning"),
    [
        ("a</think>b", "b", "a"),
        ("\na\n</think>\n\nb", "b", "a"),
        ("<think>\na\n</think>\n\nb", "b", "a"),
        ("\n <think>a</think>b", "b", "a"),
        ("a<think>b</think>c", "c", "a<think>b"),
        ("<thin", "", ""),
        ("<thin g</think>b", "b", "<thin g"),
        ("</think>b", "b", ""),
        ("never closed", "", "never closed"),
        ("a</think>B<think>c</think>D", "BD", "a\nc"),
        (f"{CALL}</think>b", "b", CALL),
        ("", "", ""),
        ("\n\n", "", ""),
        ("<", "", "<"),
    ],
)
def test_a_completion_may_begin_inside_a_think_span(check, text, content, reasoning):
    assert check(text, "m1", (), True) == (content, reasoning, [])


@pytest.mark.parametrize(
    ("text", "starts_thinking", "content"),
    [
        ("<think>\n a\n</think>\n\nb", False, "<think>\n a\n</think>\n\nb"),
        ("a </think>b", False, "a </think>b"),
        ("a\n</think>\n\nb", True, "<think>\na\n</think>\n\nb"),
        ("<think>\na\n</think>\n\nb", True, "<think>\n\na\n</think>\n\nb"),
        (f"<think>{CALL}</think>b", False, f"<think>{CALL}</think>b"),
        ("<think>a", False, "<think>a"),
        ("<think>a</thin", False, "<think>a"),
    ],
)
def test_reasoning_can_stay_in_the_content(check, text, starts_thinking, content):
    assert check(text, "m1", (), starts_thinking, False) == (content, "", [])


def test_calls_are_found_beside_reasoning_that_stays_in_the_content(check):
    text = f"<think>\n{CALL}\n</think>\n\n{CALL}\nBye"
    assert check(text, "m1", (), False, False) == (
        f"<think>\n{CALL}\n</think>\n\nBye",
        "",
        [("f", {})],
    )


def test_without_a_tool_format_calls_are_content(check):
    assert check(f"A\n{CALL}\n", None) == (f"A\n{CALL}\n", "", [])


def test_calls_are_cut_out_of_the_content(check):
    assert check(f"A.\n\n{CALL}\n\n", "m1") == ("A.", "", [("f", {})])
    assert check(f"<think>\nb\n</think>\n\n{CALL}", "m1") == ("", "b", [("f", {})])
    assert check(f"A.\n{CALL}\nB.", "m1") == ("A.\nB.", "", [("f", {})])


def test_text_comes_out_at_once_but_for_what_may_be_a_tag():
    parser = OutputParser("m1")
    shown = [parser.push(piece).content for piece in ("Say", "s ", "<", "b", ">", " <thin", "g>")]
    assert shown == ["Say", "s", "", " <b", ">", "", " <thing>"]


def test_a_prompt_that_ends_in_thinking_streams_reasoning():
    parser = OutputParser("m2", (), True)
    assert [parser.push(piece).reasoning for piece in ("\n", "Hm", " so", "\n</th", "ink>")] == [
        *("", "Hm", " so", "", "")
    ]


# Generated completions with a truth of their own.

TOOLS = [
    {
        "name": name,
        "parameters": {
            "properties": {
                "name": {"type": "string"},
                "text": {"type": ["string", "null"]},
                "count": {"type": "integer"},
                "ratio": {"type": "number"},
                "flag": {"type": "boolean"},
                "items": {"type": "array"},
                "object": {"type": "object"},
            }
        },
    }
    for name in ("search", "name", "write_file")
]
WORDS = ["a", "word", "<b>", "1 < 2", "</", "{", '"q"', "\\n", "🦜", "你好", "é", "]", "tool_calls"]
HOSTILE = [*WORDS, *M1, *M2, "</think>", "<think>", "</invoke>", '{"name": "x"}', "\n", "null"]
VALUE_WORDS = [word for word in HOSTILE if word != "</think>"]


def words(source: random.Random, choice: list[str]) -> str:
    return " ".join(source.choices(choice, k=source.randint(1, 6)))


def arguments(source: random.Random) -> dict:
    """Return random arguments that both formats can write."""
    values = {
        # A line end at the beginning of a string is lost in the M2 format.
        "name": words(source, HOSTILE).lstrip("\n"),
        "text": source.choice([None, "", words(source, HOSTILE).lstrip("\n")]),
        "count": source.randint(-99, 10**12),
        "ratio": source.choice([0.5, -1e-9, 3, 1e30]),
        "flag": source.random() < 0.5,
        "items": [words(source, [*HOSTILE, "</parameter>"]), None, [1.5]],
        "object": {words(source, HOSTILE): {"name": [True, words(source, HOSTILE)]}},
    }
    if values["text"] == "null":
        values["text"] = None
    chosen = source.sample(sorted(values), source.randint(0, len(values)))
    return {key: values[key] for key in chosen}


def write_m1(source: random.Random, calls: list[tuple[str, dict]]) -> str:
    lines = []
    for name, given in calls:
        items = [("name", name), ("arguments", given)]
        source.shuffle(items)
        indent, ascii_only = source.choice([None, None, 2]), source.random() < 0.5
        lines.append(json.dumps(dict(items), indent=indent, ensure_ascii=ascii_only))
    return M1[0] + "\n" + "\n".join(lines) + "\n" + M1[1]


def write_m2(source: random.Random, calls: list[tuple[str, dict]]) -> str:
    lines = [M2[0]]
    for name, given in calls:
        lines.append(f'<invoke name="{name}">')
        for key, value in given.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            lines.append(f'<parameter name="{key}">{text}</parameter>')
        lines.append("</invoke>")
    return "\n".join([*lines, M2[1]])


def generate(seed: int, tool_format: str):
    """Return a completion, and its content, reasoning and calls."""
    source = random.Random(seed)
    text, marked, thoughts, calls = "", "", [], []
    for _ in range(source.randint(1, 5)):
        kind = source.choice(["content", "think", "calls"])
        space = source.choice(["", "\n", "\n\n", " "])
        text += space
        marked += space
        if kind == "content":
            text += (piece := words(source, WORDS) + ".")
            marked += piece
            continue
        marked += "\0"
        if kind == "think":
            thoughts.append(words(source, VALUE_WORDS).strip())
            text += f"<think>\n{thoughts[-1]}\n</think>"
        else:
            names = [tool["name"] for tool in TOOLS]
            some = [(source.choice(names), arguments(source)) for _ in range(source.randint(1, 3))]
            text += (write_m1 if tool_format == "m1" else write_m2)(source, some)
            calls += some
    # A cut takes blank lines at the beginning and all space at the end; within, one gap stays.
    marked = re.sub(r"\A[\s\0]*\0(\s*\n)?", "", marked)
    marked = re.sub(r"\s*\0[\s\0]*\Z", "", marked)
    content = re.sub(r"(\s*)\0(?:[\s\0]*\0)?(\s*)", lambda gap: gap[1] or gap[2], marked)
    return text, content, "\n".join(filter(None, thoughts)), calls


@pytest.mark.parametrize("tool_format", ["m1", "m2"])
@pytest.mark.parametrize("seed", range(20))
def test_a_generated_completion_is_what_it_was_made_of(check, seed, tool_format):
    text, content, reasoning, calls = generate(seed, tool_format)
    assert check(text, tool_format, TOOLS, everywhere=len(text) < 300) == (
        content,
        reasoning,
        calls,
    )


@pytest.mark.slow
@pytest.mark.parametrize("tool_format", ["m1", "m2"])
def test_many_generated_completions_are_what_they_were_made_of(check, tool_format):
    for seed in range(1000, 1400):
        text, content, reasoning, calls = generate(seed, tool_format)
        found = check(text, tool_format, TOOLS, everywhere=len(text) < 500)
        assert found == (content, reasoning, calls), seed


@pytest.mark.parametrize("tool_format", ["m1", "m2", None])
@pytest.mark.parametrize("starts_thinking", [False, True])
@pytest.mark.parametrize("separate", [False, True])
def test_nothing_a_model_writes_raises_or_depends_on_the_pieces(
    check, tool_format, starts_thinking, separate
):
    source = random.Random(5)
    parts = [*HOSTILE, "<tool_", "calls>", "<invoke name=", '"search"', ">", "</parameter>"]
    parts += ['<parameter name="text">', '<parameter name="items">', '"arguments":', "[", "}", ","]
    parts += [
        '"name":',
        '{"name": "f", "arguments": {',
        ":",
        "\\u12",
        "\\ud83d",
        "True",
        "1e5",
        " ",
    ]
    for _ in range(20):
        text = "".join(source.choices(parts, k=source.randint(1, 25)))
        check(text, tool_format, TOOLS, starts_thinking, separate, everywhere=False)


def repeated(start: str, unit: str) -> str:
    return (start + unit * (200_000 // len(unit)))[:200_000]


def seconds(*arguments) -> float:
    start = time.process_time()
    parse_output(*arguments)
    return time.process_time() - start


IN_M1 = '<tool_calls>{"name":"f","arguments":{"a":'
IN_M2 = '<minimax:tool_call><invoke name="f"><parameter name="items">'


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        ("m1", repeated("", "<tool_cal")),
        ("m1", repeated("", "</think>")),
        ("m1", repeated("", " \n")),
        pytest.param("m1", repeated("<tool_calls>", "{"), marks=pytest.mark.slow),
        ("m1", repeated(IN_M1, "1")),
        pytest.param("m1", repeated(IN_M1 + '"', "\\u12"), marks=pytest.mark.slow),
        ("m2", repeated("<minimax:tool_call><invoke ", " ")),
        ("m2", repeated("<minimax:tool_call>", '<invoke name="')),
        ("m2", repeated(IN_M2 + '["', "</parameter>")),
        ("m2", repeated(IN_M2, "</param")),
    ],
    ids=[
        *("half tags", "closing tags", "space", "braces", "digits", "escapes"),
        *("header", "headers", "tags in a list", "half ends"),
    ],
)
def test_the_work_is_linear(tool_format, text):
    quarter = seconds(text[: len(text) // 4], tool_format, TOOLS)
    assert seconds(text, tool_format, TOOLS) < max(9 * quarter, 0.5)
    parser = OutputParser(tool_format, TOOLS)
    for at in range(0, len(text), 100):
        parser.push(text[at : at + 100])
        assert len(parser._held) <= 300  # what the next piece makes it look at once more


def test_joining_deltas_gives_what_parsing_the_whole_gives():
    parser = OutputParser("m1")
    joined = join_deltas([parser.push(f"A{CALL}"), parser.finish()])
    whole = parse_output(f"A{CALL}", "m1")
    assert joined.calls[0].id != whole.calls[0].id
    assert (joined.content, joined.calls[0].arguments) == ("A", "{}")
    assert (whole.content, whole.calls[0].arguments) == ("A", "{}")
