"""`/v1/responses`: OpenAI's Responses API, without its storage."""

import secrets
import time
from collections.abc import AsyncIterator

from fastapi import APIRouter, Request
from fastapi import Response as HTTPResponse

from linnet.infer.updates import Update
from linnet.serve.blocks import Block, Blocks, News
from linnet.serve.conversation import Turn, begin
from linnet.serve.errors import APIError, bad_request
from linnet.serve.logprobs import chat_logprobs
from linnet.serve.responses_input import conversation_of
from linnet.serve.routes import JSONRoute, responses
from linnet.serve.schemas.base import SamplingFields
from linnet.serve.schemas.responses import (
    FunctionCallItem,
    IncompleteDetails,
    InputTokensDetails,
    OutputLogprob,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    PlainFormat,
    ReasoningConfig,
    ReasoningItem,
    ReasoningText,
    Response,
    ResponseError,
    ResponseEvent,
    ResponsesRequest,
    ResponseUsage,
    Status,
    TextConfig,
)
from linnet.serve.service import Service
from linnet.serve.stream import EventStream, answer, named_event

LOGPROBS = "message.output_text.logprobs"
router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])


@router.post(
    "/v1/responses",
    response_model=Response,
    responses=responses(ResponseEvent),
    summary="Answer a turn",
)
async def create_response(request: Request, body: ResponsesRequest) -> HTTPResponse:
    """Answer a turn; with `stream`, in events that end with `response.completed`."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    _check(body)
    turn = await begin(
        service,
        conversation_of(body),
        SamplingFields(temperature=body.temperature, top_p=body.top_p),
        max_tokens=body.max_output_tokens,
        effort=body.reasoning.effort if body.reasoning else None,
        logprobs=_num_logprobs(body),
        output=body.text.format if body.text else None,
    )
    reply = _Reply(service, body, turn)
    if body.stream:
        ping_s = service.settings.ping_s
        return EventStream(turn.run, reply.events(), reply.failure, ping_s)
    return await answer(request, turn.run, reply.whole())


def _check(body: ResponsesRequest) -> None:
    """Refuse what is known and not supported, rather than answer something else."""
    for name in ("previous_response_id", "conversation"):
        if getattr(body, name) is not None:
            raise bad_request(
                f"{name} is not supported: this server stores nothing; send the earlier items",
                name,
            )
    if body.background:
        raise bad_request("background is not supported: this server stores nothing", "background")


def _num_logprobs(body: ResponsesRequest) -> int | None:
    is_asked = body.top_logprobs is not None or LOGPROBS in (body.include or ())
    return (body.top_logprobs or 0) if is_asked else None


class _Reply:
    """Forms the answer to one request, whole or in events."""

    def __init__(self, service: Service, body: ResponsesRequest, turn: Turn) -> None:
        self._service, self._body, self._turn = service, body, turn
        self._blocks = Blocks()
        self._logprobs: dict[int, list[OutputLogprob]] = {}
        self._id, self._created = f"resp_{secrets.token_hex(12)}", int(time.time())
        self._num_events = 0

    async def whole(self) -> Response:
        async for _ in self._news():
            pass
        return self._ended()

    async def events(self) -> AsyncIterator[bytes]:
        yield self._event("response.created", response=self._response("in_progress"))
        yield self._event("response.in_progress", response=self._response("in_progress"))
        async for news, logprobs in self._news():
            for event in self._block_events(news, logprobs):
                yield event
        ended = self._ended()
        yield self._event(f"response.{ended.status}", response=ended)

    def failure(self, error: APIError) -> bytes:
        """Return the event that ends a response which failed."""
        response = self._response("failed")
        response.error = ResponseError(message=error.message)
        return self._event("response.failed", response=response)

    async def _news(self) -> AsyncIterator[tuple[News, list[OutputLogprob]]]:
        """Yield what happens to the blocks, with the logprobs of new text."""
        (reply,) = self._turn.answers
        pending: list[OutputLogprob] = []
        async for _, update in self._turn.run:
            pending += self._read_logprobs(update)
            for news in self._blocks.push(reply.push(update)):
                # A token counts to the block whose text it completes.
                is_text = news.event == "more"
                yield news, self._note(news.block, pending) if is_text else []
                pending = [] if is_text else pending
            if reply.is_enough:
                self._turn.run.cancel(0)
        if pending and self._blocks.is_in_content:
            block = self._blocks.all[-1]
            yield News("more", block), self._note(block, pending)
        for news in self._blocks.finish():
            yield news, []

    def _note(self, block: Block, logprobs: list[OutputLogprob]) -> list[OutputLogprob]:
        if block.kind != "content":
            return []
        self._logprobs.setdefault(block.index, []).extend(logprobs)
        return logprobs

    def _read_logprobs(self, update: Update) -> list[OutputLogprob]:
        content = chat_logprobs(self._service.tokenizer, update.logprobs).content
        return [OutputLogprob(**token.model_dump()) for token in content]

    def _block_events(self, news: News, logprobs: list[OutputLogprob]) -> list[bytes]:
        block = news.block
        if block.kind == "call":
            return self._call_events(news)
        name = "output_text" if block.kind == "content" else "reasoning_text"
        place = {"item_id": _item_id(block), "output_index": block.index, "content_index": 0}
        extra = {"logprobs": logprobs} if block.kind == "content" else {}
        if news.event == "more":
            return [self._event(f"response.{name}.delta", delta=news.text, **place, **extra)]
        if news.event == "begin":
            return [
                self._item_event("added", block, "in_progress"),
                self._event("response.content_part.added", part=self._part(block, ""), **place),
            ]
        if block.kind == "content":
            extra = {"logprobs": self._logprobs.get(block.index, [])}
        return [
            self._event(f"response.{name}.done", text=block.text, **place, **extra),
            self._event("response.content_part.done", part=self._part(block, block.text), **place),
            self._item_event("done", block, "completed"),
        ]

    def _call_events(self, news: News) -> list[bytes]:
        block = news.block
        if news.event == "begin":
            return [self._item_event("added", block, "in_progress")]
        place = {"item_id": _item_id(block), "output_index": block.index}
        name = "response.function_call_arguments"
        if news.event == "more":
            return [self._event(f"{name}.delta", delta=news.text, **place)]
        done = {"arguments": block.text, "name": block.name}
        return [
            self._event(f"{name}.done", **done, **place),
            self._item_event("done", block, "completed"),
        ]

    def _item_event(self, what: str, block: Block, status: Status) -> bytes:
        item = self._item(block, status, is_empty=what == "added")
        return self._event(f"response.output_item.{what}", item=item, output_index=block.index)

    def _event(self, kind: str, **fields: object) -> bytes:
        event = ResponseEvent(type=kind, sequence_number=self._num_events, **fields)  # pyright: ignore
        self._num_events += 1
        return named_event(kind, event)

    def _part(self, block: Block, text: str) -> OutputText | ReasoningText:
        if block.kind == "reasoning":
            return ReasoningText(text=text)
        return OutputText(text=text, logprobs=self._logprobs.get(block.index, []) if text else [])

    def _item(
        self, block: Block, status: Status, is_empty: bool = False
    ) -> OutputMessage | ReasoningItem | FunctionCallItem:
        item_id, text = _item_id(block), "" if is_empty else block.text
        if block.kind == "call":
            return FunctionCallItem(
                id=item_id, status=status, call_id=block.call_id, name=block.name, arguments=text
            )
        parts = [] if is_empty else [self._part(block, text)]
        kind = OutputMessage if block.kind == "content" else ReasoningItem
        return kind(id=item_id, status=status, content=parts)  # pyright: ignore

    def _ended(self) -> Response:
        (reply,) = self._turn.answers
        is_cut = reply.finish_reason == "length"
        response = self._response("incomplete" if is_cut else "completed")
        response.output = [self._item(block, "completed") for block in self._blocks.all]
        if is_cut:
            response.incomplete_details = IncompleteDetails()
            response.output[-1].status = "incomplete"
        response.completed_at = None if is_cut else int(time.time())
        took = reply.usage
        response.usage = ResponseUsage(
            input_tokens=took.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=took.cached_tokens),
            output_tokens=took.completion_tokens,
            output_tokens_details=OutputTokensDetails(reasoning_tokens=took.reasoning_tokens),
            total_tokens=took.prompt_tokens + took.completion_tokens,
        )
        return response

    def _response(self, status: str) -> Response:
        body = self._body
        text = body.text or TextConfig()
        return Response(
            id=self._id,
            created_at=self._created,
            status=status,  # pyright: ignore
            instructions=body.instructions,
            max_output_tokens=body.max_output_tokens,
            model=self._service.model_name,
            output=[],
            parallel_tool_calls=body.parallel_tool_calls is not False,
            reasoning=body.reasoning or ReasoningConfig(),
            temperature=1.0 if body.temperature is None else body.temperature,
            text=text if text.format else TextConfig(format=PlainFormat(type="text")),
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            top_logprobs=body.top_logprobs or 0,
            top_p=1.0 if body.top_p is None else body.top_p,
            metadata=body.metadata or {},
        )


def _item_id(block: Block) -> str:
    prefix = {"content": "msg", "reasoning": "rs", "call": "fc"}[block.kind]
    return f"{prefix}_{block.unique}"
