"""From the engine's thread to the event loop: the requests of one HTTP call and their news."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Self

from linnet.infer import SamplingParams
from linnet.infer.engine import Engine, Ticket
from linnet.infer.updates import Update
from linnet.serve.errors import APIError, unavailable
from linnet.serve.metrics import Metrics

EngineRequest = tuple[Sequence[int], SamplingParams]
"""A prompt and how to continue it."""


class Run:
    """The engine requests of one HTTP call; closing it cancels those that have not finished.

    Made and used on the event loop. Iterating gives `(index, update)` in order of arrival, until
    every request has had its last update.
    """

    def __init__(self, metrics: Metrics, num_requests: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Update, float]] = asyncio.Queue()
        self._clocks = [metrics.clock() for _ in range(num_requests)]
        self._lock = threading.Lock()
        self._tickets: dict[int, Ticket] = {}
        self._cancelled: set[int] = set()
        self._is_closed = False

    @classmethod
    async def start(
        cls, engine: Engine, metrics: Metrics, requests: Sequence[EngineRequest]
    ) -> Self:
        """Submit the requests: all of them, or none.

        Raises:
            EngineError, ValueError: as `Engine.submit`.
        """
        run = cls(metrics, len(requests))
        try:
            # In a thread: a long prompt is checked, and a grammar compiled.
            await asyncio.to_thread(run._submit, engine, requests)
        except BaseException:
            run.close()
            raise
        return run

    def _submit(self, engine: Engine, requests: Sequence[EngineRequest]) -> None:
        for index, (prompt, params) in enumerate(requests):
            ticket = engine.submit(prompt, params, self._listener(index))
            with self._lock:
                self._tickets[index] = ticket
                if self._is_closed:
                    ticket.cancel()
                    return

    def _listener(self, index: int) -> Callable[[Update], None]:
        def on_update(update: Update) -> None:
            # RuntimeError: the loop is closed, so nobody waits for the news.
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(
                    self._news.put_nowait, (index, update, time.monotonic())
                )

        return on_update

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update]]:
        """Yield the updates.

        Raises:
            APIError: the engine gave a request up.
        """
        while self._tickets:
            index, update, arrived = await self._news.get()
            self._clocks[index].observe(update, arrived)
            if update.finish_reason is not None:
                del self._tickets[index]
                if index not in self._cancelled:
                    _check_finish(update)
            yield index, update

    @property
    def is_finished(self) -> bool:
        """Whether every request has had its last update."""
        return not self._tickets

    def cancel(self, index: int) -> None:
        """Stop one request early; its last update still comes."""
        if index in self._tickets and index not in self._cancelled:
            self._cancelled.add(index)
            self._tickets[index].cancel()

    def close(self) -> None:
        """Cancel what has not finished."""
        with self._lock:
            self._is_closed = True
            for ticket in self._tickets.values():
                ticket.cancel()
            self._tickets.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _check_finish(update: Update) -> None:
    if update.finish_reason == "error":
        raise APIError(500, update.error or "the engine failed", code="engine_error")
    if update.finish_reason == "cancelled":
        raise unavailable(update.error or "the server stopped the request; send it again", 5)
