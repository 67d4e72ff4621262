"""The process that listens: uvicorn, with a stop that lets requests finish."""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from linnet.infer.engine import Engine

_log = logging.getLogger(__name__)
LAST_WORDS_S = 5.0
"""For answers to be sent after the engine has stopped."""


class Server(uvicorn.Server):
    """Serves an application until it is told to stop.

    On SIGTERM it goes on listening, but refuses new requests, until those that run are done or
    `drain_s` is over. On SIGINT, and on a second SIGTERM, it stops at once. Either way the engine
    is stopped, and what still runs is told so.
    """

    def __init__(
        self,
        app: FastAPI,
        engine: Engine,
        *,
        drain_s: float,
        on_start: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; `run(sockets=[...])` serves at bound sockets.

        Args:
            app: made by `create_app`.
            engine: what it serves, started.
            drain_s: time for requests to finish.
            on_start: called once requests are answered.
        """
        super().__init__(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(LAST_WORDS_S),
            )
        )
        self._engine, self._drain_s, self._on_start = engine, drain_s, on_start
        self._is_asked_to_drain = False
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to answer."""
        await super().startup(sockets)
        self._on_start()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal."""
        if sig == signal.SIGTERM and not self._is_asked_to_drain:
            self._is_asked_to_drain = True
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Return whether it is time to stop; called ten times a second."""
        if self._is_asked_to_drain and self._draining is None:
            _log.warning("draining: up to %g s for the requests that run", self._drain_s)
            self._draining = asyncio.create_task(self._stop_engine(self._drain_s))
        if await super().on_tick(counter):
            await self._stop_engine(0)
            return True
        return self._draining is not None and self._draining.done()

    async def _stop_engine(self, drain_s: float) -> None:
        # In a thread: the updates of the last requests come by this loop.
        await asyncio.to_thread(self._engine.stop, drain_s)
