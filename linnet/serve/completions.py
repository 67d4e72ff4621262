"""`/v1/completions`: OpenAI's older API, which continues plain text or token ids.

Evaluation programs score with it: `echo` and `logprobs` give the logprobs of a prompt.
"""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from typing import cast

from fastapi import APIRouter, Request, Response

from linnet.infer.updates import Update
from linnet.serve.errors import bad_request
from linnet.serve.grammars import output_grammar
from linnet.serve.logprobs import CompletionScribe
from linnet.serve.routes import JSONRoute, responses
from linnet.serve.runs import EngineRequest, Run
from linnet.serve.sampling import sampling_params
from linnet.serve.schemas.base import Error
from linnet.serve.schemas.completions import (
    Completion,
    CompletionChoice,
    CompletionChunk,
    CompletionChunkChoice,
    CompletionLogprobs,
    CompletionRequest,
)
from linnet.serve.service import Service
from linnet.serve.stream import DONE, EventStream, answer, data_event, error_event
from linnet.serve.usage import prompt_progress, timings, total_usage, usage

DEFAULT_MAX_TOKENS = 16
router = APIRouter(route_class=JSONRoute, tags=["OpenAI"])


@router.post(
    "/v1/completions",
    response_model=Completion,
    responses=responses(CompletionChunk | Error, ends_with_done=True),
    summary="Continue prompts",
)
async def completions(request: Request, body: CompletionRequest) -> Response:
    """Continue prompts; with `stream`, in chunks that end with `data: [DONE]`."""
    service: Service = request.app.state.service
    service.check_model(body.model)
    _check(body)
    with service.preparing():
        prompts = await asyncio.to_thread(_tokenize, service, body)
        run = await service.start(_requests(service, body, prompts), "prompt")
    texts = _Texts(service, body, prompts, run)
    if body.stream:
        return EventStream(run, texts.events(), error_event, service.settings.ping_s)
    return await answer(request, run, texts.whole())


def _check(body: CompletionRequest) -> None:
    """Refuse what is known and not supported, rather than answer something else."""
    if body.suffix:
        raise bad_request("suffix is not supported; the model only continues text", "suffix")
    if body.best_of not in (None, body.n or 1):
        raise bad_request("best_of is not supported; it must equal n", "best_of")
    if body.max_tokens == 0 and not body.echo:
        raise bad_request("max_tokens is 0, which only makes sense with echo", "max_tokens")


def _tokenize(service: Service, body: CompletionRequest) -> list[list[int]]:
    prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if isinstance(prompts[0], int):
        return [cast(list[int], prompts)]
    if isinstance(prompts[0], list):
        return cast(list[list[int]], prompts)
    texts = cast(list[str], prompts)
    begin = service.tokenizer.begin_of_document_id
    start = [] if begin is None or body.add_special_tokens is False else [begin]
    return [start + ids for ids in service.tokenizer.encode_batch(texts)]


def _requests(
    service: Service, body: CompletionRequest, prompts: list[list[int]]
) -> list[EngineRequest]:
    params = sampling_params(
        body,
        service.vocab_size,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens,
        effort=body.reasoning_effort,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        grammar=output_grammar(body.response_format),
    )
    return [(prompt, rules) for prompt in prompts for rules in params]


class _Texts:
    """Forms the answer to one request, whole or in chunks."""

    def __init__(
        self, service: Service, body: CompletionRequest, prompts: list[list[int]], run: Run
    ) -> None:
        self._service, self._body, self._prompts, self._run = service, body, prompts, run
        self._n = body.n or 1
        count = len(prompts) * self._n
        self._scribes = [CompletionScribe(service.tokenizer) for _ in range(count)]
        self._is_echoed = [not body.echo] * count
        self._ends: list[Update | None] = [None] * count
        self._id, self._created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._start = time.monotonic()
        self._num_tokens = 0
        options = body.stream_options
        self._with_usage = bool(options and options.include_usage)
        self._usage_in_chunks = bool(options and options.continuous_usage_stats)

    async def whole(self) -> Completion:
        texts = [[] for _ in self._ends]
        logprobs: list[list[CompletionLogprobs]] = [[] for _ in self._ends]
        async for index, update in self._run:
            text, entries = self._news(index, update)
            texts[index].append(text)
            if entries is not None:
                logprobs[index].append(entries)
        choices = [
            CompletionChoice(
                index=index,
                text="".join(texts[index]),
                finish_reason=_finish_reason(end),
                stop_reason=_stop_reason(end),
                logprobs=_joined(logprobs[index]) if self._body.logprobs is not None else None,
            )
            for index, end in enumerate(self._all_ends())
        ]
        requests = [end.usage for end in self._all_ends() if end.usage]
        return Completion(
            id=self._id,
            created=self._created,
            model=self._service.model_name,
            choices=choices,
            usage=total_usage(requests, self._n),
            timings=timings(requests),
        )

    async def events(self) -> AsyncIterator[bytes]:
        async for index, update in self._run:
            if update.progress is not None and self._body.return_progress and index == 0:
                progress = prompt_progress(update.progress, time.monotonic() - self._start)
                yield self._chunk(None, {"prompt_progress": progress})
            text, logprobs = self._news(index, update)
            choice = CompletionChunkChoice(index=index, text=text, logprobs=logprobs)
            if update.finish_reason is not None:
                choice.finish_reason = _finish_reason(update)
                choice.stop_reason = _stop_reason(update)
            if text or logprobs or choice.finish_reason:
                yield self._chunk(choice, self._last_fields(choice))
        if self._with_usage:
            yield self._chunk(None, {"usage": total_usage(self._usages(), self._n)})
        yield DONE

    def _news(self, index: int, update: Update) -> tuple[str, CompletionLogprobs | None]:
        """Return what an update adds: text, and logprobs if they are asked for."""
        self._num_tokens += len(update.tokens)
        text, logprobs = update.text, [*update.prompt_logprobs, *update.logprobs]
        is_first = update.tokens or update.prompt_logprobs or update.finish_reason
        if is_first and not self._is_echoed[index]:
            self._is_echoed[index] = True
            text = self._echo(index) + text
        if update.finish_reason is not None:
            self._ends[index] = update
        num_top = self._body.logprobs
        if num_top is None or not logprobs:
            return text, None
        return text, self._scribes[index].write(logprobs, num_top)

    def _echo(self, index: int) -> str:
        return self._service.tokenizer.decode(self._prompts[index // self._n])

    def _last_fields(self, choice: CompletionChunkChoice) -> dict[str, object]:
        if choice.finish_reason is None or not self._run.is_finished:
            return {}
        return {"timings": timings(self._usages())}

    def _chunk(self, choice: CompletionChunkChoice | None, fields: Mapping[str, object]) -> bytes:
        if self._usage_in_chunks and "usage" not in fields:
            num_prompt = sum(map(len, self._prompts))
            fields = {**fields, "usage": usage(num_prompt, self._num_tokens)}
        return data_event(
            CompletionChunk(
                id=self._id,
                created=self._created,
                model=self._service.model_name,
                choices=[choice] if choice else [],
                **fields,  # pyright: ignore
            )
        )

    def _all_ends(self) -> list[Update]:
        return [end for end in self._ends if end is not None]

    def _usages(self):
        return [end.usage for end in self._all_ends() if end.usage is not None]


def _finish_reason(end: Update):
    return "stop" if end.finish_reason == "stop" else "length"


def _stop_reason(end: Update) -> str | int | None:
    return "repetition" if end.finish_reason == "repetition" else end.stop_reason


def _joined(pieces: list[CompletionLogprobs]) -> CompletionLogprobs:
    return CompletionLogprobs(
        text_offset=[offset for piece in pieces for offset in piece.text_offset],
        tokens=[token for piece in pieces for token in piece.tokens],
        token_logprobs=[value for piece in pieces for value in piece.token_logprobs],
        top_logprobs=[value for piece in pieces for value in piece.top_logprobs],
    )
