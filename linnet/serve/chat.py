"""`/v1/chat/completions`: OpenAI's chat API."""

import secrets
import time
from collections.abc import AsyncIterator, Mapping

from fastapi import APIRouter, Request, Response

from linnet.infer.updates import Update
from linnet.serve.conversation import Conversation, NamedTool, Turn, begin, text_of
from linnet.serve.errors import bad_request
from linnet.serve.logprobs import chat_logprobs
from linnet.serve.routes import JSONRoute, responses
from linnet.serve.schemas.base import Error, Usage
from linnet.serve.schemas.chat import (
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatMessage,
    ChatRequest,
    ChunkChoice,
    Delta,
    FunctionDelta,
    NamedToolChoice,
    ToolCall,
    ToolCallDelta,
)
from linnet.serve.service import Service
from linnet.serve.stream import DONE, EventStream, answer, data_event, error_event
from linnet.serve.usage import prompt_progress, timings, total_usage, usage
from linnet.text import output

router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])


@router.post(
    "/v1/chat/completions",
    response_model=ChatCompletion,
    responses=responses(ChatCompletionChunk | Error, ends_with_done=True),
    summary="Answer a conversation",
)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation; with `stream`, in chunks that end with `data: [DONE]`."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    turn = await begin(
        service,
        conversation_of(body),
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        effort=body.reasoning_effort,
        logprobs=_num_logprobs(body),
        output=body.response_format,
    )
    chat = _Chat(service, body, turn)
    if body.stream:
        return EventStream(turn.run, chat.events(), error_event, service.settings.ping_s)
    return await answer(request, turn.run, chat.whole())


def conversation_of(body: ChatRequest) -> Conversation:
    """Return the conversation of a request.

    Raises:
        APIError: a message is not text, or not what its role may be.
    """
    choice = body.tool_choice or "auto"
    if isinstance(choice, NamedToolChoice):
        choice = NamedTool(choice.function.name)
    return Conversation(
        messages=[message_of(message) for message in body.messages],
        tools=[
            tool.function.model_dump(
                include={"name", "description", "parameters"}, exclude_none=True
            )
            for tool in body.tools or ()
        ],
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        separate_reasoning=body.separate_reasoning is not False,
    )


def message_of(message: ChatMessage) -> dict[str, object]:
    """Return a message with its content as text.

    Raises:
        APIError: the content is not text, or is missing.
    """
    if message.content is None and message.role != "assistant":
        raise bad_request(f"a {message.role} message has no content", "messages")
    role = "system" if message.role == "developer" else message.role
    result: dict[str, object] = {"role": role, "content": text_of(message.content, "messages")}
    if role == "assistant":
        result["reasoning_content"] = message.reasoning_content or message.reasoning
        result["tool_calls"] = [call.model_dump() for call in message.tool_calls or ()]
    if role == "tool":
        result |= {"name": message.name, "tool_call_id": message.tool_call_id or ""}
    return {key: value for key, value in result.items() if value is not None}


def _num_logprobs(body: ChatRequest) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise bad_request("top_logprobs needs logprobs to be true", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


class _Chat:
    """Forms the answer to one request, whole or in chunks."""

    def __init__(self, service: Service, body: ChatRequest, turn: Turn) -> None:
        self._service, self._body, self._turn = service, body, turn
        self._id, self._created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self._start = time.monotonic()
        options = body.stream_options
        self._with_usage = bool(options and options.include_usage)
        self._usage_in_chunks = bool(options and options.continuous_usage_stats)
        self._cached = 0

    async def whole(self) -> ChatCompletion:
        run, answers = self._turn.run, self._turn.answers
        logprobs = [[] for _ in answers]
        async for index, update in run:
            answers[index].push(update)
            logprobs[index] += update.logprobs
            if answers[index].is_enough:
                run.cancel(index)
        choices = [
            ChatChoice(
                index=index,
                message=_message(answer.output),
                finish_reason=answer.finish_reason,
                stop_reason=answer.stop_reason,
                logprobs=chat_logprobs(self._service.tokenizer, logprobs[index])
                if self._body.logprobs
                else None,
            )
            for index, answer in enumerate(answers)
        ]
        requests = [answer.usage for answer in answers]
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._service.model_name,
            choices=choices,
            usage=total_usage(requests, len(requests)),
            timings=timings(requests),
        )

    async def events(self) -> AsyncIterator[bytes]:
        run, answers = self._turn.run, self._turn.answers
        for index in range(len(answers)):
            # The role comes alone and in order of the choices: the SDK builds its list from it.
            yield self._chunk(ChunkChoice(index=index, delta=Delta(role="assistant", content="")))
        async for index, update in run:
            if update.progress is not None:
                self._cached = update.progress.cached
                if self._body.return_progress and index == 0:
                    seconds = time.monotonic() - self._start
                    progress = prompt_progress(update.progress, seconds)
                    yield self._chunk(None, {"prompt_progress": progress})
            for choice in self._choices(index, update):
                yield self._chunk(choice, self._last_fields(choice))
        if self._with_usage:
            requests = [answer.usage for answer in answers]
            # By itself and last: the SDK takes the usage of the last chunk, which may be none.
            yield self._chunk(None, {"usage": total_usage(requests, len(requests))})
        yield DONE

    def _last_fields(self, choice: ChunkChoice) -> dict[str, object]:
        """Return what goes with the end of the last choice."""
        if choice.finish_reason is None or not self._turn.run.is_finished:
            return {}
        return {"timings": timings([answer.usage for answer in self._turn.answers])}

    def _choices(self, index: int, update: Update) -> list[ChunkChoice]:
        """Return what an update adds to the stream: news, then the end by itself."""
        answer = self._turn.answers[index]
        news = delta_of(answer.push(update))
        logprobs = None
        if self._body.logprobs and update.logprobs:
            logprobs = chat_logprobs(self._service.tokenizer, update.logprobs)
        if answer.is_enough:
            self._turn.run.cancel(index)
        choices = []
        if news.model_fields_set or logprobs:
            choices.append(ChunkChoice(index=index, delta=news, logprobs=logprobs))
        if update.finish_reason is not None:
            end = ChunkChoice(index=index, delta=Delta(), finish_reason=answer.finish_reason)
            if answer.stop_reason is not None:
                end.stop_reason = answer.stop_reason
            choices.append(end)
        return choices

    def _chunk(self, choice: ChunkChoice | None, fields: Mapping[str, object] = {}) -> bytes:
        if self._usage_in_chunks and "usage" not in fields:
            fields = {**fields, "usage": self._usage_so_far()}
        return data_event(
            ChatCompletionChunk(
                id=self._id,
                created=self._created,
                model=self._service.model_name,
                choices=[choice] if choice else [],
                **fields,  # pyright: ignore
            )
        )

    def _usage_so_far(self) -> Usage:
        generated = sum(answer.num_tokens for answer in self._turn.answers)
        return usage(self._turn.num_prompt, generated, self._cached)


def _message(parsed: output.ParsedOutput) -> AnswerMessage:
    message = AnswerMessage(content=parsed.content)
    if parsed.reasoning:
        message.reasoning_content = parsed.reasoning
    if parsed.calls:
        message.content = parsed.content or None
        message.tool_calls = [
            ToolCall(id=call.id, function=CalledFunction(name=call.name, arguments=call.arguments))
            for call in parsed.calls
        ]
    return message


def delta_of(news: output.Delta) -> Delta:
    """Return the delta of a chunk; nothing is set where there is no news."""
    fields: dict[str, object] = {}
    if news.content:
        fields["content"] = news.content
    if news.reasoning:
        fields["reasoning_content"] = news.reasoning
    if news.calls:
        fields["tool_calls"] = [_call_delta(call) for call in news.calls]
    return Delta(**fields)  # pyright: ignore


def _call_delta(call: output.CallDelta) -> ToolCallDelta:
    # `function` is set even without news: the SDK asserts it.
    function = FunctionDelta(name=call.name, arguments=call.arguments)
    kind = "function" if call.id is not None else None
    return ToolCallDelta(index=call.index, id=call.id, type=kind, function=function)
