"""`/v1/responses`, through the openai SDK in strict mode."""

import json

import openai
import pydantic
import pytest

ADD = {
    "type": "function",
    "name": "add",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    },
}


class Point(pydantic.BaseModel):
    x: int = pydantic.Field(ge=0, le=9)


def ask(client, **options):
    return client.responses.create(
        **{"model": "tiny", "input": "the cat", "max_output_tokens": 12, "temperature": 0} | options
    )


def test_response_has_every_field(client):
    answer = ask(client, instructions="Be good.", metadata={"k": "v"})
    assert answer.status == "incomplete" and answer.output_text
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage.output_tokens == 12 and answer.usage.input_tokens_details.cached_tokens >= 0
    assert (answer.instructions, answer.metadata) == ("Be good.", {"k": "v"})
    (item,) = answer.output
    assert (item.type, item.status, item.content[0].type) == (
        "message",
        "incomplete",
        "output_text",
    )


def test_events_come_in_order_and_add_up(client):
    whole = ask(client, text={"format": {"type": "text"}})
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert len(deltas) > 3 and len({event.item_id for event in deltas}) == 1
    assert "".join(event.delta for event in deltas) == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert events[-1].response.output[0].id == deltas[0].item_id


def test_stream_helper_parses_a_call(client):
    with client.responses.stream(
        model="tiny", input="the cat", tools=[ADD], tool_choice="required", temperature=0
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    (call,) = final.output
    assert (call.type, call.name, call.status) == ("function_call", "add", "completed")
    assert call.parsed_arguments == json.loads(call.arguments) and call.call_id
    assert kinds[-3:] == [
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


def test_parse_gives_what_the_schema_asks_for(client):
    answer = client.responses.parse(
        model="tiny",
        input="the cat",
        text_format=Point,
        reasoning={"effort": "none"},
        max_output_tokens=100,
    )
    assert isinstance(answer.output_parsed, Point) and answer.status == "completed"
    assert answer.text.format.type == "json_schema"


def test_logprobs_when_asked(client):
    include = ["message.output_text.logprobs"]
    entries = ask(client, include=include, top_logprobs=1).output[0].content[0].logprobs
    assert len(entries) == 12 and all(len(entry.top_logprobs) == 1 for entry in entries)
    events = ask(client, include=include, top_logprobs=1, stream=True)
    streamed = [
        entry.token
        for event in events
        if event.type == "response.output_text.delta"
        for entry in event.logprobs
    ]
    assert streamed == [entry.token for entry in entries]


def test_earlier_items_are_read(client):
    items = [
        {"role": "developer", "content": "Be good."},
        {"role": "user", "content": [{"type": "input_text", "text": "1+1?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [
            {"type": "reasoning_text", "text": "hm"}]},
        {"type": "function_call", "call_id": "c", "name": "add", "arguments": "{\"a\": 1}"},
        {"type": "function_call_output", "call_id": "c", "output": "2"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "2"}]},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    assert ask(client, input=items, tools=[ADD]).output


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"conversation": "conv_1"}, "conversation is not supported"),
        ({"background": True}, "background is not supported"),
        ({"input": []}, "should have at least 1 item"),
        ({"input": [{"type": "computer_call"}]}, "type 'computer_call', which is unknown"),
        ({"input": [{"role": "user"}]}, "a message needs role and content"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "part of type 'input_image'; this model reads text only",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: Input should be 'function'"),
        ({"max_output_tokens": 0}, "max_output_tokens: Input should be greater"),
    ],
    ids=str,
)
def test_wrong_value_is_a_400_that_names_it(client, fields, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body=fields)
    assert message in caught.value.body["message"]
