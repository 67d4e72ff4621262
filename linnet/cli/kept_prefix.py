"""The beginning of a prompt that is computed once and kept on disk.

The engine writes a prefix to disk where a request ends, so the files of a folder are a request of
their own that asks for no answer. It is cut short at growing distances and sent again, to leave
prefixes along the way: after a change in a file, the longest one before it is where the next
question goes on.
"""

import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from linnet.cli.answering import Request
from linnet.infer import Engine, SamplingParams
from linnet.infer.updates import Progress, Update
from linnet.model.paged import PAGE_SIZE

FIRST_STOP = 4096
GROWTH = 1.5
"""Between two stops; all that is kept is at most three times as long as the prompt."""


@dataclass(frozen=True, slots=True)
class Kept:
    """What is known of a prefix once it is kept."""

    num_cached: int
    """Tokens that had been computed before."""
    is_complete: bool
    """False if Ctrl-C came first; what was computed until then is kept."""


def cache_folder() -> Path:
    """Return where prefixes are kept, unless the user names another folder."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "linnet" / "prefixes"


def keep_prefix(
    engine: Engine,
    tokens: Sequence[int],
    stops: Sequence[int],
    on_progress: Callable[[Progress], None],
) -> Kept:
    """Let the engine compute a prefix, or find it on disk, and keep it.

    Args:
        engine: started, with a folder to spill into.
        tokens: the prefix and one more token.
        stops: ascending lengths at which a part of it is kept as well.
        on_progress: told how far it is.

    Raises:
        EngineError: the engine failed.
    """
    num_cached: int | None = None
    while True:
        to_next_stop = _ToNextStop(stops)
        request = Request(engine, tokens, SamplingParams(max_tokens=0), to_next_stop)
        update = Update()
        for update in request:
            if update.progress is not None:
                num_cached = update.progress.cached if num_cached is None else num_cached
                on_progress(update.progress)
        is_complete = update.finish_reason == "length" and not request.is_interrupted
        if is_complete or not to_next_stop.is_reached or request.is_interrupted:
            return Kept(num_cached or 0, is_complete)


class _ToNextStop:
    """Says when a request has come to the first stop that was still ahead when it began."""

    def __init__(self, stops: Sequence[int]) -> None:
        self._stops = stops
        self._stop: float | None = None
        self.is_reached = False

    def __call__(self, update: Update) -> bool:
        if update.progress is None or self.is_reached:
            return False
        if self._stop is None:
            ahead = self._stops[bisect_right(self._stops, update.progress.processed) :]
            self._stop = ahead[0] if ahead else float("inf")
        self.is_reached = update.progress.processed >= self._stop
        return self.is_reached


def stops_within(
    engine: Engine, num_tokens: int, max_bytes: int, last_parts: Sequence[int] = ()
) -> list[int]:
    """Return where to keep parts of a prefix.

    Args:
        engine: whose memory plan says how large they are.
        num_tokens: of the prefix.
        max_bytes: of disk space; where the stops take more than half of it there are none.
        last_parts: tokens of the parts at the end that are likely to change, the last one first.
    """
    stops, stop = set(), FIRST_STOP
    while stop < num_tokens:
        stops.add(stop)
        stop = int(stop * GROWTH)
    end = num_tokens
    for part in last_parts:
        end -= part
        stops.add(end)
    plan = engine.plan
    sizes = [plan.slot_bytes + stop * plan.page_bytes // PAGE_SIZE for stop in stops]
    return sorted(stop for stop in stops if stop > 0) if sum(sizes) <= max_bytes // 2 else []
