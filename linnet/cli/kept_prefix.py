"""The beginning of a prompt that is computed once and kept on disk.

The engine writes a prefix to disk where a request ends, so the files of a folder are a request of
their own that asks for no answer. Shorter requests at growing distances come before it, each going
on where the last one ended: after a change in a file, the longest prefix before it is where the
next question starts.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    length, done = len(tokens) - 1, 0
    num_cached: int | None = None

    def take_in(end: int, ends_early: Callable[[Update], bool] | None = None) -> bool:
        """Compute the prefix up to a length; False if Ctrl-C came first."""
        nonlocal done, num_cached
        request = Request(engine, tokens[: end + 1], SamplingParams(max_tokens=0), ends_early)
        for update in request:
            if update.progress is not None:
                done = update.progress.processed
                num_cached = update.progress.cached if num_cached is None else num_cached
                on_progress(replace(update.progress, total=length))
        return not request.is_interrupted

    # The first request finds out what there is; where stops are ahead, it ends after one step.
    goes_on = take_in(length, lambda update: _is_before(update.progress, stops))
    for end in (*stops, length):
        if goes_on and end > done:
            goes_on = take_in(end)
    return Kept(num_cached or 0, is_complete=goes_on)


def _is_before(progress: Progress | None, stops: Sequence[int]) -> bool:
    return progress is not None and any(stop > progress.processed for stop in stops)


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
