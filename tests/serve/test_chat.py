"""`/v1/chat/completions`, through the openai SDK in strict mode."""

import json

import openai
import pydantic
import pytest

from linnet.infer.engine import EngineSettings

USER = [{"role": "user", "content": "the cat"}]
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/number"}, "b": {"$ref": "#/$defs/number"}},
            "required": ["a", "b"],
            "additionalProperties": False,
            "$defs": {"number": {"type": "integer", "minimum": 0, "maximum": 99}},
        },
    },
}
SUB = {"type": "function", "function": {"name": "sub", "parameters": {"type": "object"}}}


class Point(pydantic.BaseModel):
    x: int = pydantic.Field(ge=0, le=9)
    is_far: bool


def ask(client, messages=USER, **options):
    options = {"model": "tiny", "max_tokens": 12, "seed": 1} | options
    return client.chat.completions.create(messages=messages, **options)


def test_answer_has_every_field(client):
    answer = ask(client)
    (choice,) = answer.choices
    assert choice.message.role == "assistant" and choice.message.content
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
    assert answer.model == "tiny" and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage.completion_tokens == 12
    assert usage.total_tokens == usage.prompt_tokens + 12
    assert usage.completion_tokens_details.reasoning_tokens == 0
    assert usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens
    assert answer.timings["predicted_n"] == 12
    assert answer._request_id.startswith("req_")


def test_text_that_is_stuck_is_ended(client):
    stuck = {"repetition_stop": {"num_tokens": 5, "probability": 0.0}}
    choice = ask(client, extra_body=stuck).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("length", "repetition")
    answer = ask(client, extra_body={"repetition_stop": {}})
    assert answer.usage.completion_tokens == 12


def test_chunks_come_in_order_and_add_up_to_the_whole(client):
    whole = ask(client)
    options = {"stream_options": {"include_usage": True}}
    chunks = list(ask(client, stream=True, **options))
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    first, *middle, end, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.role for chunk in middle] == [None] * len(middle)
    assert len(middle) > 3
    text = "".join(chunk.choices[0].delta.content for chunk in middle)
    assert text == whole.choices[0].message.content
    assert end.choices[0].finish_reason == "length" and not end.choices[0].delta.to_dict()
    assert usage.choices == [] and usage.usage.completion_tokens == 12
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)


def test_without_usage_every_chunk_has_a_choice(client):
    assert all(chunk.choices for chunk in ask(client, stream=True))


def test_usage_in_every_chunk_when_asked(client):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(ask(client, stream=True, stream_options=options))
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts) and (counts[0], counts[-1]) == (0, 12)


def test_several_choices_differ_and_repeat_by_seed(client):
    texts = [[c.message.content for c in ask(client, n=3, seed=5).choices] for _ in range(2)]
    assert texts[0] == texts[1] and len(set(texts[0])) == 3
    assert ask(client, seed=6).choices[0].message.content == texts[0][1]


def test_stream_helper_gathers_several_choices(client):
    # A pattern, because the helper takes an answer that is cut at a length for an error.
    pattern = {
        "response_format": {"type": "regex", "pattern": "the [a-z]{3,9}"},
        "reasoning_effort": "none",
    }
    whole = ask(client, n=3, extra_body=pattern, max_tokens=50)
    with client.chat.completions.stream(
        model="tiny", messages=USER, max_tokens=50, seed=1, n=3, extra_body=pattern
    ) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    texts = [choice.message.content for choice in final.choices]
    assert texts == [choice.message.content for choice in whole.choices]
    assert len(set(texts)) == 3
    assert [choice.finish_reason for choice in final.choices] == ["stop"] * 3


def test_logprobs_of_every_token(client):
    answer = ask(client, logprobs=True, top_logprobs=2, temperature=0)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == 12
    for entry in entries:
        assert len(entry.top_logprobs) == 2
        assert entry.logprob == entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    raw = b"".join(bytes(entry.bytes) for entry in entries)
    assert answer.choices[0].message.content == raw.decode(errors="replace")


def test_streamed_logprobs_are_those_of_the_whole(client):
    whole = ask(client, logprobs=True, top_logprobs=1)
    chunks = ask(client, logprobs=True, top_logprobs=1, stream=True)
    entries = [
        entry
        for chunk in chunks
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    names = [(entry.token, entry.bytes) for entry in whole.choices[0].logprobs.content]
    assert [(entry.token, entry.bytes) for entry in entries] == names


def test_prefill_progress_is_told_when_asked(client):
    long = [{"role": "user", "content": "the hat " * 300}]
    chunks = list(ask(client, long, stream=True, extra_body={"return_progress": True}))
    told = [chunk.prompt_progress for chunk in chunks if hasattr(chunk, "prompt_progress")]
    # The last token of a prompt is taken in with the first of the answer.
    assert len(told) >= 2 and told[-1]["processed"] >= told[-1]["total"] - 1
    assert [step["processed"] for step in told] == sorted(step["processed"] for step in told)
    assert told[-1].keys() == {"total", "cache", "processed", "time_ms"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_required_tool_is_called_with_arguments_that_fit(client, stream):
    options = {"tools": [ADD, SUB], "tool_choice": "required", "max_tokens": 200}
    with client.chat.completions.stream(model="tiny", messages=USER, seed=1, **options) as events:
        final = events.get_final_completion() if stream else ask(client, **options)
    (call,) = final.choices[0].message.tool_calls
    assert final.choices[0].finish_reason == "tool_calls"
    assert not final.choices[0].message.content
    arguments = json.loads(call.function.arguments)
    assert call.id and call.type == "function"
    if call.function.name == "add":
        assert all(0 <= arguments[name] <= 99 for name in "ab")
    else:
        assert call.function.name == "sub"


def test_named_tool_is_the_one_that_is_called(client):
    choice = {"type": "function", "function": {"name": "add"}}
    answer = ask(client, tools=[SUB, ADD], tool_choice=choice, max_tokens=200)
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "add" and json.loads(call.function.arguments).keys() == {"a", "b"}
    assert answer.choices[0].finish_reason == "stop"


def test_tool_deltas_name_a_call_once(client):
    chunks = ask(client, tools=[ADD], tool_choice="required", max_tokens=200, stream=True)
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [bool(call.id) for call in deltas] == [True] + [False] * (len(deltas) - 1)
    assert [bool(call.function.name) for call in deltas] == [bool(call.id) for call in deltas]
    assert {call.index for call in deltas} == {0} and len(deltas) > 2


def test_tool_history_is_read(client):
    calls = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    messages = [
        {"role": "developer", "content": "Be good."},
        *USER,
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "3"}]},
    ]
    assert ask(client, messages, tools=[ADD]).choices[0].finish_reason == "length"


def test_parse_gives_what_the_schema_asks_for(client):
    answer = client.chat.completions.parse(
        model="tiny",
        messages=USER,
        response_format=Point,
        reasoning_effort="none",
        max_tokens=100,
    )
    point = answer.choices[0].message.parsed
    assert isinstance(point, Point) and answer.choices[0].finish_reason == "stop"


def test_parse_of_a_strict_tool(client):
    answer = client.chat.completions.parse(
        model="tiny", messages=USER, tools=[ADD], tool_choice="required", max_tokens=200
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.parsed_arguments.keys() == {"a", "b"}


def test_json_object_is_an_object(client):
    answer = ask(client, response_format={"type": "json_object"}, max_tokens=500, temperature=0.2)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.startswith("{")


def test_reasoning_is_kept_apart_and_bounded(client, tokenizer):
    options = {
        "extra_body": {
            "response_format": {"type": "regex", "pattern": "the (cat|hat)"},
            "logit_bias": {str(tokenizer.special_ids["<think>"]): 100},
            "thinking_token_budget": 5,
        },
        "max_tokens": 50,
    }
    answer = ask(client, **options)
    message = answer.choices[0].message
    assert message.content in ("the cat", "the hat") and message.reasoning_content
    assert answer.usage.completion_tokens_details.reasoning_tokens == 5
    chunks = list(ask(client, stream=True, **options))
    deltas = [chunk.choices[0].delta.to_dict() for chunk in chunks]
    thought = "".join(delta.get("reasoning_content", "") for delta in deltas)
    text = "".join(delta.get("content", "") for delta in deltas)
    assert (thought, text) == (message.reasoning_content, message.content)
    options["extra_body"]["separate_reasoning"] = False
    joined = ask(client, **options).choices[0].message
    assert joined.content.startswith("<think>") and joined.content.endswith(text)


def test_stop_ends_the_text_and_is_told(client):
    text = ask(client, max_tokens=40).choices[0].message.content
    stop = text[10:12]
    choice = ask(client, max_tokens=40, stop=[stop, "never"]).choices[0]
    assert choice.message.content == text[: text.index(stop)]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", stop)


def test_rules_of_sampling_reach_the_engine(client):
    token = client.post("/../tokenize", cast_to=dict, body={"prompt": "t"})["tokens"][-1]
    biased = ask(client, logit_bias={str(token): 100}, max_tokens=5)
    assert biased.choices[0].message.content == "ttttt"


def test_unknown_fields_are_ignored(client):
    extra = {"mirostat": 2, "user": "me", "service_tier": "auto", "store": True, "nonsense": []}
    assert ask(client, extra_body=extra).choices


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature: Input should be greater than or equal to 0"),
        ({"temperature": "1"}, "temperature: Input should be a valid number"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
        ({"max_tokens": True}, "max_tokens: Input should be a valid integer"),
        ({"n": 0}, "n: Input should be greater"),
        ({"n": 100}, "asks for 100 completions; this server takes 12"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"stop": [""]}, "stop may hold 16 texts"),
        ({"stop": ["a"] * 17}, "stop may hold 16 texts"),
        ({"logit_bias": {"a": 1}}, "'a', which is no token"),
        ({"logit_bias": {"99999": 1}}, "'99999', which is no token"),
        ({"logit_bias": {"1": 101}}, "not in -100 ... 100"),
        ({"stop_token_ids": [-1]}, "token -1 is outside"),
        ({"messages": []}, "messages: List should have at least 1 item"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role: Input should be"),
        ({"messages": [{"role": "user"}]}, "a user message has no content"),
        ({"messages": [{"role": "tool", "content": "3"}]}, "names no tool"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "part of type 'image_url'; this model reads text only",
        ),
        ({"tool_choice": "required"}, "tool_choice is required, but there are no tools"),
        (
            {"tools": [SUB], "tool_choice": {"type": "function", "function": {"name": "mul"}}},
            "names 'mul', which is not in tools",
        ),
        ({"tools": [SUB, SUB]}, "two tools have the same name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [SUB], "response_format": {"type": "json_object"}}, "a response format cannot"),
        ({"response_format": {"type": "xml"}}, "response_format: Input tag 'xml'"),
        ({"response_format": {"type": "regex", "pattern": "("}}, "the regex cannot be used"),
        (
            {"response_format": {"type": "regex", "pattern": "a" * 300_000}},
            "the regex has 300000 bytes",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}},
            "the JSON schema cannot be used",
        ),
        (
            {"reasoning_effort": "low", "thinking_token_budget": 5},
            "thinking_budget and reasoning_effort are both given",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else str(sorted(value)),
)
def test_wrong_value_is_a_400_that_names_it(client, fields, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **{"messages": USER}, extra_body=fields)
    body = caught.value.body
    assert message in body["message"] and body["type"] == "invalid_request_error"
    assert body.keys() == {"message", "type", "param", "code"}


def test_unknown_model_is_a_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        ask(client, model="gpt-5")
    assert caught.value.code == "model_not_found" and caught.value.param == "model"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_prompt_that_is_too_long_names_both_numbers(client, stream):
    long = [{"role": "user", "content": "zq " * 3000}]
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, long, stream=stream)
    assert caught.value.code == "context_length_exceeded"
    assert "maximum context length is 2048 tokens" in str(caught.value)


def test_answer_is_cut_where_the_context_ends(make_engine, serve):
    settings = EngineSettings(max_sequences=1, max_model_len=64, memory_bytes=64 << 20)
    with serve(make_engine(settings)) as address, address.openai() as client:
        answer = ask(client, max_tokens=None, extra_body={"ignore_eos": True})
        assert answer.usage.total_tokens == 64
        assert answer.choices[0].finish_reason == "length"
        assert ask(client, max_tokens=5000, extra_body={"ignore_eos": True}).usage == answer.usage
