"""`/v1/messages`, in Anthropic's shape."""

import json

import pytest

USER = [{"role": "user", "content": "the cat"}]
ADD = {
    "name": "add",
    "description": "Add",
    "input_schema": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    },
}


def ask(http, **fields):
    body = {"model": "tiny", "messages": USER, "max_tokens": 12, "temperature": 0} | fields
    return http.post("/v1/messages", json=body)


def events_of(response) -> list[dict]:
    events = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def test_message_has_every_field(http):
    message = ask(http).json()
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", "tiny")
    assert message["content"][0]["type"] == "text" and message["content"][0]["text"]
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    usage = message["usage"]
    assert usage["output_tokens"] == 12
    count = http.post("/v1/messages/count_tokens", json={"messages": USER}).json()["input_tokens"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count


def test_events_come_in_order_and_add_up(http):
    events = events_of(ask(http, stream=True))
    kinds = [event["type"] for event in events]
    assert kinds[:3] == ["message_start", "ping", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    text = "".join(delta["text"] for delta in deltas)
    assert text == ask(http).json()["content"][0]["text"]
    assert events[-2]["delta"]["stop_reason"] == "max_tokens"
    assert events[-2]["usage"]["output_tokens"] == 12


def test_tool_is_called_when_it_must_be(http):
    options = {"tools": [ADD], "tool_choice": {"type": "any"}, "max_tokens": 100}
    message = ask(http, **options).json()
    (block,) = message["content"]
    assert (block["type"], block["name"], block["input"].keys()) == ("tool_use", "add", {"a"})
    assert message["stop_reason"] == "tool_use"
    events = events_of(ask(http, stream=True, **options))
    pieces = [
        event["delta"]["partial_json"] for event in events if event["type"] == "content_block_delta"
    ]
    assert json.loads("".join(pieces)) == block["input"]


def test_stop_sequence_is_named(http):
    text = ask(http, max_tokens=30).json()["content"][0]["text"]
    message = ask(http, max_tokens=30, stop_sequences=[text[8:10]]).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", text[8:10])


def test_earlier_blocks_are_read(http):
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "1+1?"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm", "signature": ""},
            {"type": "text", "text": "I add."},
            {"type": "tool_use", "id": "t", "name": "add", "input": {"a": 1}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "2"}]},
            {"type": "text", "text": "And?"},
        ]},
    ]  # fmt: skip
    assert ask(http, messages=messages, system="Be good.", tools=[ADD]).status_code == 200


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": None}, "max_tokens: Input should be a valid integer"),
        ({"temperature": 2}, "temperature: Input should be less than or equal to 1"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "type 'image'"),
        ({"tools": [ADD], "tool_choice": {"type": "tool"}}, "needs a name"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
    ],
    ids=str,
)
def test_wrong_value_is_a_400_in_anthropics_shape(http, fields, message):
    response = ask(http, **fields)
    body = response.json()
    assert response.status_code == 400 and message in body["error"]["message"]
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error")


def test_unknown_model_is_a_404(http):
    body = ask(http, model="claude").json()
    assert body["error"]["type"] == "not_found_error"
