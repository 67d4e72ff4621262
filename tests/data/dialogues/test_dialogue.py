"""Files of dialogues: what is read, and how a bad line is reported."""

import json
from pathlib import Path

import pytest

from linnet.data.dialogues import DialogueFile
from linnet.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hey"}]}


def write(path: Path, *lines: object) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n")
    return path


def test_every_dialogue_is_found_again_by_its_number(tmp_path):
    others = [{**GOOD, "tools": [{"name": f"tool_{i}"}]} for i in range(3)]
    file = DialogueFile(write(tmp_path / "d.jsonl", others[0], "", others[1], others[2]))
    assert [file[i].tools[0]["name"] for i in range(len(file))] == ["tool_0", "tool_1", "tool_2"]
    assert [file.name(i).rsplit("/")[-1] for i in range(3)] == [
        "d.jsonl line 1",
        "d.jsonl line 3",
        "d.jsonl line 4",
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([1], "has no list 'messages'"),
        ({"messages": "Hi"}, "has no list 'messages'"),
        ({**GOOD, "tool": []}, "has the key 'tool'"),
        ({**GOOD, "tools": "f"}, "'tools' is str"),
        ({**GOOD, "tools": ["f"]}, "tool 0 is str"),
        ({"messages": ["Hi"]}, "message 0 is str"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no message of the assistant"),
        ({"messages": [{**m, "weight": 0} for m in GOOD["messages"]]}, "nothing to learn"),
        ({"messages": [{**m, "weight": 0.5} for m in GOOD["messages"]]}, "neither 0 nor 1"),
        ({"messages": [{"role": "bot", "content": ""}, *GOOD["messages"]]}, "role 'bot'"),
        ({"messages": [{"role": "assistant", "content": 3}]}, "is int; expected a string"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]},
            "tool call 'f' has arguments",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": ["f"]}]}, "line 2: "),
    ],
)
def test_bad_line_is_named_with_its_file(tmp_path, line, complaint):
    path = write(tmp_path / "bad.jsonl", GOOD, line)
    with pytest.raises(DataError) as caught:
        DialogueFile(path)
    assert "bad.jsonl line 2" in str(caught.value) and complaint in str(caught.value)


def test_missing_or_empty_file_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        DialogueFile(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no dialogue"):
        DialogueFile(write(tmp_path / "empty.jsonl", ""))
