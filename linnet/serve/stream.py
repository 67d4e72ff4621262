"""Answers over HTTP: whole ones, streams of server-sent events, and the client who goes away."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi import Response
from pydantic import BaseModel
from starlette.requests import ClientDisconnect, Request
from starlette.types import Receive, Scope, Send

from linnet.serve.errors import APIError
from linnet.serve.runs import Run

_log = logging.getLogger(__name__)
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


class ModelResponse(Response):
    """A pydantic model as JSON."""

    media_type = "application/json"

    def __init__(self, model: BaseModel) -> None:
        super().__init__(model.model_dump_json(by_alias=True))


def data_event(model: BaseModel) -> bytes:
    """Return an event without a name, as OpenAI's chat and completion streams send them."""
    return b"data: " + model.model_dump_json(by_alias=True).encode() + b"\n\n"


def named_event(name: str, model: BaseModel) -> bytes:
    """Return an event with a name."""
    return b"event: " + name.encode() + b"\n" + data_event(model)


def error_event(error: APIError) -> bytes:
    """Return how OpenAI's chat and completion streams tell of an error, for which the SDK looks."""
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n" + DONE


class EventStream(Response):
    """A stream of server-sent events about one `Run`, which ends with it.

    Args:
        run: closed when the client leaves or the events end.
        events: the events, encoded.
        on_error: gives the events that tell of an error in the middle.
        ping_s: silence after which a comment is sent.
    """

    def __init__(
        self,
        run: Run,
        events: AsyncIterator[bytes],
        on_error: Callable[[APIError], bytes],
        ping_s: float,
    ) -> None:
        super().__init__(
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]
        self._run, self._events, self._on_error, self._ping_s = run, events, on_error, ping_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until they end or the client goes away."""
        with self._run:
            try:
                await unless_disconnected(receive, self._send(send))
            except (ClientDisconnect, OSError):
                return

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        async for event in with_pings(self._told(), self._ping_s):
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _told(self) -> AsyncIterator[bytes]:
        """Yield the events; an error becomes the last one, for the headers are gone by then."""
        try:
            async for event in self._events:
                yield event
        except APIError as error:
            yield self._on_error(error)
        except Exception:
            _log.exception("a stream failed")
            yield self._on_error(APIError(500, "the server failed in the middle of the stream"))


async def with_pings(events: AsyncIterator[bytes], silence_s: float) -> AsyncIterator[bytes]:
    """Yield `events`, and a comment after each `silence_s` without one."""
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            coming = coming or asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({coming}, timeout=silence_s)
            if not done:
                yield PING
                continue
            try:
                event = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield event
    finally:
        if coming is not None:
            await _cancelled(coming)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`, or give it up when the client goes away.

    Raises:
        ClientDisconnect: the client is gone.
    """
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait({worker, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not worker.done():
            raise ClientDisconnect
        return worker.result()
    finally:
        await _cancelled(worker)
        await _cancelled(watcher)


async def answer(request: Request, run: Run, work: Coroutine[Any, Any, BaseModel]) -> Response:
    """Return the whole answer that `work` forms of `run`; a disconnect cancels both.

    Raises:
        ClientDisconnect: the client is gone.
    """
    with run:
        return ModelResponse(await unless_disconnected(request.receive, work))


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(task: asyncio.Future[Any]) -> None:
    """Cancel a task that may be over already, and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # else asyncio would complain that nobody looked at it
