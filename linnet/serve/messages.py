"""`/v1/messages`: Anthropic's Messages API."""

import json
import secrets
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response

from linnet.serve.answers import Answer
from linnet.serve.blocks import Block, Blocks, News
from linnet.serve.conversation import Turn, begin, encode_conversation
from linnet.serve.errors import APIError
from linnet.serve.messages_input import conversation_of
from linnet.serve.routes import JSONRoute, responses
from linnet.serve.schemas.base import SamplingFields
from linnet.serve.schemas.messages import (
    CountAnswer,
    CountRequest,
    Message,
    MessageError,
    MessageEvent,
    MessagesRequest,
    MessageUsage,
    OutputBlock,
    StopReason,
    TextBlock,
    ThinkingBlock,
    ToolUseBlock,
)
from linnet.serve.service import Service
from linnet.serve.stream import EventStream, answer, named_event

router = APIRouter(route_class=JSONRoute, tags=["Anthropic"])


@router.post(
    "/v1/messages",
    response_model=Message,
    responses=responses(MessageEvent, error=MessageError),
    summary="Answer a conversation",
)
async def create_message(request: Request, body: MessagesRequest) -> Response:
    """Answer a conversation; with `stream`, in events that end with `message_stop`."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    thinking = body.thinking
    budget = thinking.budget_tokens if thinking and thinking.type == "enabled" else None
    fields = SamplingFields(
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=body.stop_sequences,
        thinking_token_budget=budget,
    )
    turn = await begin(
        service,
        conversation_of(body),
        fields,
        max_tokens=body.max_tokens,
        effort="none" if thinking and thinking.type == "disabled" else None,
    )
    reply = _Reply(service, turn)
    if body.stream:
        return EventStream(turn.run, reply.events(), _failure, service.settings.ping_s)
    return await answer(request, turn.run, reply.whole())


@router.post(
    "/v1/messages/count_tokens",
    responses=responses(error=MessageError),
    summary="Count the tokens of a conversation",
)
async def count_tokens(request: Request, body: CountRequest) -> CountAnswer:
    """Return how many tokens the prompt of a conversation has."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    with service.preparing():
        prompt = await encode_conversation(service, conversation_of(body), is_bounded=False)
    return CountAnswer(input_tokens=len(prompt))


def _failure(error: APIError) -> bytes:
    return b"event: error\ndata: " + json.dumps(error.body(anthropic=True)).encode() + b"\n\n"


class _Reply:
    """Forms the answer to one request, whole or in events."""

    def __init__(self, service: Service, turn: Turn) -> None:
        self._service, self._turn = service, turn
        self._blocks = Blocks()
        self._id = f"msg_{secrets.token_hex(12)}"
        self._cached = 0

    async def whole(self) -> Message:
        async for _ in self._news():
            pass
        (reply,) = self._turn.answers
        return self._message(
            [_output_block(block, block.text) for block in self._blocks.all], reply
        )

    async def events(self) -> AsyncIterator[bytes]:
        yield _event("message_start", message=self._message([], None))
        yield _event("ping")
        async for news in self._news():
            yield _block_event(news)
        (reply,) = self._turn.answers
        ended = self._message([], reply)
        delta = {"stop_reason": ended.stop_reason, "stop_sequence": ended.stop_sequence}
        yield _event("message_delta", delta=delta, usage=ended.usage)
        yield _event("message_stop")

    async def _news(self) -> AsyncIterator[News]:
        (reply,) = self._turn.answers
        async for _, update in self._turn.run:
            for news in self._blocks.push(reply.push(update)):
                yield news
            if reply.is_enough:
                self._turn.run.cancel(0)
        for news in self._blocks.finish():
            yield news

    def _message(self, content: list[OutputBlock], reply: Answer | None) -> Message:
        """Return the message with what is known: all of it if the reply has ended."""
        took = reply.usage if reply else None
        cached = took.cached_tokens if took else 0
        stop_reason = _stop_reason(reply) if reply else None
        return Message(
            id=self._id,
            model=self._service.model_name,
            content=content,
            stop_reason=stop_reason,
            stop_sequence=str(reply.stop_reason)
            if reply and stop_reason == "stop_sequence"
            else None,
            usage=MessageUsage(
                input_tokens=self._turn.num_prompt - cached,
                cache_read_input_tokens=cached,
                output_tokens=took.completion_tokens if took else 0,
            ),
        )


def _stop_reason(reply: Answer) -> StopReason:
    if reply.finish_reason == "length":
        return "max_tokens"
    if reply.has_calls:
        return "tool_use"
    return "stop_sequence" if isinstance(reply.stop_reason, str) else "end_turn"


def _output_block(block: Block, text: str) -> OutputBlock:
    if block.kind == "content":
        return TextBlock(text=text)
    if block.kind == "reasoning":
        return ThinkingBlock(thinking=text)
    return ToolUseBlock(id=block.call_id, name=block.name, input=_arguments(text))


def _arguments(text: str) -> dict[str, Any]:  # Any: JSON that the model wrote
    """Return arguments as an object, empty where the model broke off or wrote none."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _block_event(news: News) -> bytes:
    block = news.block
    if news.event == "begin":
        start = _output_block(block, "")
        return _event("content_block_start", index=block.index, content_block=start)
    if news.event == "end":
        return _event("content_block_stop", index=block.index)
    kind, name = {
        "content": ("text_delta", "text"),
        "reasoning": ("thinking_delta", "thinking"),
        "call": ("input_json_delta", "partial_json"),
    }[block.kind]
    return _event("content_block_delta", index=block.index, delta={"type": kind, name: news.text})


def _event(kind: str, **fields: object) -> bytes:
    return named_event(kind, MessageEvent(type=kind, **fields))  # pyright: ignore
