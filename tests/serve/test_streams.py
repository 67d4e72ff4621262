"""What a random model does not say: tool calls, errors, silence. The engine follows a script."""

import json
import time
from contextlib import suppress

import httpx2
import openai
import pytest

from linnet.text import M2_TEMPLATE, Tokenizer

USER = [{"role": "user", "content": "1+2?"}]
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}, "s": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}]
M1 = (
    "<think>\nI add.\n</think>\nLet me see.\n<tool_calls>\n"
    '{"name": "add", "arguments": {"a": 1, "s": "é</think>"}}\n'
    '{"name": "add", "arguments": {"a": 2}}\n</tool_calls>'
)
M2 = (
    "I add.\n</think>\n\nLet me see.\n<minimax:tool_call>\n"
    '<invoke name="add">\n<parameter name="a">1</parameter>\n'
    '<parameter name="s">é</think></parameter>\n</invoke>\n'
    '<invoke name="add">\n<parameter name="a">2</parameter>\n</invoke>\n</minimax:tool_call>'
)
ARGUMENTS = [{"a": 1, "s": "é</think>"}, {"a": 2}]


@pytest.fixture(scope="module")
def m2_tokenizer(tokenizer) -> Tokenizer:
    return Tokenizer(tokenizer._backend, chat_template=M2_TEMPLATE)


@pytest.fixture(params=["m1", "m2"])
def caller(request, scripted, tokenizer, m2_tokenizer):
    """Return a function that makes an engine whose model calls a tool twice, in each format."""
    text, kind = (M1, tokenizer) if request.param == "m1" else (M2, m2_tokenizer)
    return lambda cut=3: scripted(text, tokenizer=kind, cut=cut)


def ask(client, **options):
    return client.chat.completions.create(model="tiny", messages=USER, **options)


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_calls_are_told_apart_whole_and_streamed(caller, serve, cut):
    with serve(caller(cut)) as address, address.openai() as client:
        whole = ask(client, tools=TOOLS).choices[0]
        with client.chat.completions.stream(model="tiny", messages=USER, tools=TOOLS) as stream:
            for _ in stream:
                pass
            streamed = stream.get_final_completion().choices[0]
    for choice in (whole, streamed):
        message = choice.message
        assert choice.finish_reason == "tool_calls"
        assert (message.reasoning_content, message.content) == ("I add.", "Let me see.")
        assert [call.function.name for call in message.tool_calls] == ["add", "add"]
        assert [json.loads(call.function.arguments) for call in message.tool_calls] == ARGUMENTS
        assert len({call.id for call in message.tool_calls}) == 2


def test_one_call_only_when_parallel_calls_are_not_wanted(caller, serve):
    engine = caller()
    with serve(engine) as address, address.openai() as client:
        choice = ask(client, tools=TOOLS, parallel_tool_calls=False).choices[0]
        (call,) = choice.message.tool_calls
        assert json.loads(call.function.arguments) == ARGUMENTS[0]
        assert choice.finish_reason == "tool_calls"
    assert engine.tickets[0].is_cancelled


def test_without_tools_their_tags_are_text(scripted, serve, tokenizer):
    engine = scripted(M1)
    with serve(engine) as address, address.openai() as client:
        plain = ask(client).choices[0].message
        refused = ask(client, tools=TOOLS, tool_choice="none").choices[0].message
    assert plain.content == refused.content and "<tool_calls>" in plain.content
    assert "tool_setting" not in tokenizer.decode(engine.prompts[1])


def test_history_of_m1_holds_thoughts_and_calls_as_they_were_said(scripted, serve, tokenizer):
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]
    messages = [
        *USER,
        {"role": "assistant", "content": "", "reasoning_content": "I add.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
    ]
    engine = scripted("3")
    with serve(engine) as address, address.openai() as client:
        client.chat.completions.create(model="tiny", messages=messages, tools=TOOLS)
    prompt = tokenizer.decode(engine.prompts[0], skip_special=False)
    assert "<think>\nI add.\n</think>\n<tool_calls>\n" in prompt
    assert "tool name: add\ntool result: 3" in prompt
    assert '{"name": "add", "parameters": {"type": "object"' in prompt


def test_responses_and_messages_give_the_same_blocks(caller, serve):
    tools = [{"type": "function", "name": "add", "parameters": PARAMETERS}]
    with serve(caller()) as address, address.openai() as client, address.http() as http:
        with client.responses.stream(model="tiny", input="1+2?", tools=tools) as stream:
            for _ in stream:
                pass
            final = stream.get_final_response()
        tools = [{"name": "add", "input_schema": PARAMETERS}]
        body = {"messages": USER, "max_tokens": 99, "tools": tools}
        message = http.post("/v1/messages", json=body).json()
    kinds = [item.type for item in final.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert final.output[0].content[0].text == "I add."
    assert final.output_text == "Let me see."
    assert [json.loads(item.arguments) for item in final.output[2:]] == ARGUMENTS
    assert final.usage.output_tokens_details.reasoning_tokens == 2
    blocks = message["content"]
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use"]
    assert [block["input"] for block in blocks[2:]] == ARGUMENTS
    assert message["usage"] == {
        "input_tokens": len(http_prompt(address)) - 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 4,
        "output_tokens": 6,
    }


def http_prompt(address) -> list[int]:
    return address.engine.prompts[-1]


def test_usage_and_timings_come_from_the_engine(scripted, serve):
    with serve(scripted("hello")) as address, address.openai() as client:
        answer = ask(client)
    assert answer.usage.prompt_tokens_details.cached_tokens == 4
    assert answer.usage.completion_tokens_details.reasoning_tokens == 2
    assert answer.timings == {
        "cache_n": 4,
        "prompt_n": 6,
        "prompt_ms": pytest.approx(10),
        "prompt_per_second": pytest.approx(600),
        "predicted_n": 6,
        "predicted_ms": pytest.approx(30),
        "predicted_per_second": pytest.approx(5 / 0.03, abs=0.01),
        "queue_ms": 10,
        "first_token_ms": 20,
    }


@pytest.mark.parametrize(
    ("finish", "status", "message"),
    [("error", 500, "the weights are damaged"), ("cancelled", 503, "the weights are damaged")],
)
def test_failure_is_told_before_and_in_the_middle_of_a_stream(
    scripted, serve, finish, status, message
):
    engine = scripted("hello", finish=finish, error="the weights are damaged")
    with serve(engine) as address, address.openai() as client, address.http() as http:
        with pytest.raises(openai.InternalServerError, match=message) as caught:
            ask(client)
        assert caught.value.status_code == status
        assert ("retry-after" in caught.value.response.headers) == (status == 503)
        received = []
        with pytest.raises(openai.APIError, match=message):
            for chunk in ask(client, stream=True):
                received.append(chunk.choices[0].delta.content)
        assert "".join(received) == "hello"
        events = list(client.responses.create(model="tiny", input="a", stream=True))
        assert events[-1].type == "response.failed"
        assert events[-1].response.error.message == message
        body = {"messages": USER, "max_tokens": 9, "stream": True}
        last = http.post("/v1/messages", json=body).text.strip().split("\n\n")[-1]
        assert last.startswith("event: error\ndata: ") and message in last


def test_repetition_counts_as_a_length(scripted, serve):
    with serve(scripted("aaa", finish="repetition")) as address, address.openai() as client:
        choice = ask(client).choices[0]
    assert (choice.finish_reason, choice.stop_reason) == ("length", "repetition")


def test_silence_is_broken_by_comments_that_the_sdk_ignores(scripted, serve):
    with serve(scripted("abc", pause_s=0.15), ping_s=0.05) as address:
        with address.http() as http:
            body = {"messages": USER, "stream": True}
            text = http.post("/v1/chat/completions", json=body).text
        assert text.count(": ping\n\n") >= 4
        with address.openai() as client:
            assert sum(1 for _ in ask(client, stream=True)) == 5


@pytest.mark.parametrize(
    ("path", "body", "n"),
    [
        ("chat/completions", {"messages": USER}, 3),
        ("chat/completions", {"messages": USER, "stream": True}, 3),
        ("completions", {"prompt": "a"}, 3),
        ("completions", {"prompt": "a", "stream": True}, 3),
        ("responses", {"input": "a"}, 1),
        ("responses", {"input": "a", "stream": True}, 1),
        ("messages", {"messages": USER, "max_tokens": 9}, 1),
        ("messages", {"messages": USER, "max_tokens": 9, "stream": True}, 1),
    ],
    ids=lambda value: "stream" if "stream" in str(value) else str(value)[:16],
)
def test_disconnect_cancels_every_choice(scripted, serve, path, body, n):
    engine = scripted("x" * 1000, pause_s=0.02)
    with serve(engine) as address:
        with (
            address.http() as http,
            suppress(httpx2.ReadTimeout),
            http.stream("POST", f"/v1/{path}", json=body | {"n": n}, timeout=0.15) as response,
        ):
            next(response.iter_raw())
        deadline = time.monotonic() + 5
        while not all(ticket.is_cancelled for ticket in engine.tickets):
            assert time.monotonic() < deadline, "a request goes on without its client"
            time.sleep(0.01)
    assert len(engine.tickets) == n
