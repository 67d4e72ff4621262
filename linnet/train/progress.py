"""What a person sees while a model trains: a live bar in a terminal, a line now and then elsewhere.

A bar that redraws itself turns a CI log into thousands of lines, so anything that is not a terminal
gets one plain line every ten seconds through the logger instead. Never both.
"""

import logging
import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_log = logging.getLogger(__name__)

_SMOOTHING = 0.95  # weight of the past in the displayed loss; about the last 20 steps count


class TrainingProgress:
    """Show step, loss, held-out bits per byte, speed and time left; use as a context manager."""

    def __init__(
        self,
        total_steps: int,
        description: str,
        enabled: bool = True,
        *,
        initial_step: int = 0,
        console: Console | None = None,
        log: Callable[[str], None] = _log.info,
        log_every_s: float = 10.0,
    ) -> None:
        """Prepare the display; nothing is shown before the `with` block begins.

        Args:
            total_steps: the step that training ends at.
            description: the run's name.
            enabled: False shows nothing, for ranks other than 0 and for `--quiet`.
            initial_step: the step that a resumed run begins after.
            console: where to draw; standard error when None. Pass the console that log messages
                are written to, so that rich can keep them above the bar.
            log: receives the plain lines when `console` is not a terminal.
            log_every_s: seconds between plain lines.
        """
        self._total_steps = total_steps
        self._initial_step = initial_step
        self._description = description
        self._log = log
        self._log_every_s = log_every_s
        self._console = console or Console(stderr=True)
        self._enabled = enabled
        self._bar = self._new_bar() if enabled and self._console.is_terminal else None
        self._start_s = time.monotonic()
        self._logged_s = float("-inf")
        self._step = self._logged_step = initial_step
        self._loss: float | None = None
        self._speed: tuple[float | None, float | None] = (None, None)
        self._bits_per_byte: float | None = None

    def __enter__(self) -> Self:
        self._start_s = time.monotonic()
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self._enabled and self._step != self._logged_step:
            self._log_line()

    def update(
        self,
        step: int,
        *,
        total_steps: int | None = None,
        loss: float,
        tokens_per_s: float | None = None,
        mfu: float | None = None,
        bits_per_byte: float | None = None,
    ) -> None:
        """Show the state after `step`.

        Args:
            step: optimizer steps done.
            total_steps: the step that training ends at, if that is another one by now.
            loss: training loss of this step, in nats per token; shown smoothed.
            tokens_per_s: training speed.
            mfu: model FLOPs utilization as a fraction of 1.
            bits_per_byte: held-out bits per byte; the last known value stays when None.
        """
        self._step = step
        self._total_steps = self._total_steps if total_steps is None else total_steps
        if self._loss is not None and math.isfinite(self._loss):
            self._loss = _SMOOTHING * self._loss + (1 - _SMOOTHING) * loss
        else:
            self._loss = loss  # the first one, or the first after a non-finite one
        self._speed = (tokens_per_s, mfu)
        if bits_per_byte is not None:
            self._bits_per_byte = bits_per_byte
        if self._bar is not None:
            self._bar.update(
                self._task, completed=step, total=self._total_steps, figures=self._figures()
            )
        elif self._enabled and time.monotonic() - self._logged_s >= self._log_every_s:
            self._log_line()

    def _new_bar(self) -> Progress:
        bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
            refresh_per_second=2,  # the drawing thread shares the cores with training
            speed_estimate_period=300,
        )
        self._task = bar.add_task(
            self._description, total=self._total_steps, completed=self._initial_step, figures=""
        )
        return bar

    def _figures(self) -> str:
        tokens_per_s, mfu = self._speed
        parts = [
            f"loss {self._loss:.3f}" if self._loss is not None else "",
            f"{self._bits_per_byte:.3f} bits/byte" if self._bits_per_byte is not None else "",
            f"{format_count(tokens_per_s)} tokens/s" if tokens_per_s is not None else "",
            f"MFU {mfu:.1%}" if mfu is not None else "",
        ]
        return "  ".join(part for part in parts if part)

    def _log_line(self) -> None:
        self._logged_s, self._logged_step = time.monotonic(), self._step
        elapsed_s = self._logged_s - self._start_s
        done = self._step - self._initial_step
        left_s = elapsed_s / done * (self._total_steps - self._step) if done > 0 else 0.0
        self._log(
            f"{self._description}: step {self._step}/{self._total_steps}  {self._figures()}  "
            f"elapsed {format_duration(elapsed_s)}  ETA {format_duration(left_s)}"
        )


def format_count(value: float) -> str:
    """Return a count with three significant digits: `950`, `12.3k`, `1.26M`, `456B`."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        # 999,500 rounds to 1.00M, not to 1000k.
        if abs(value) >= size * 0.9995:
            scaled = value / size
            digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
            return f"{scaled:.{digits}f}{suffix}"
    return f"{value:.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"


def format_duration(seconds: float) -> str:
    """Return seconds as `45s`, `12m 30s`, `3h 05m` or `2d 04h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"
