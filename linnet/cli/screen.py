"""How an answer looks: with colors and a progress bar in a terminal, plain everywhere else."""

import sys
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.status import Status
from rich.text import Text

from linnet.infer.updates import Progress as PromptProgress
from linnet.text import Delta
from linnet.train.progress import format_count, format_duration

PLAIN_EVERY_S = 10.0
NUM_RECENT = 8
"""Steps whose speed is shown."""
MIN_BAR_TOKENS = 2048
"""Shorter prompts are taken in before one could read a bar."""

# What a model repeats of a file must not steer the terminal: no escape sequences, no bells.
_UNSAFE = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if code not in (9, 10)}
_UNSAFE[0x0D] = ""


def printable(text: str) -> str:
    """Return text without what would steer a terminal."""
    return text.translate(_UNSAFE)


def write_out(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


class PlainDisplay:
    """Writes the content of answers as it comes.

    Args:
        write: takes text, and shows it at once.
        show_thinking: write thoughts as well, between tags.
        bar: shows how much of the prompt is taken in.
    """

    def __init__(
        self,
        write: Callable[[str], object],
        show_thinking: bool = False,
        bar: "PromptBar | None" = None,
    ) -> None:
        self._write, self._show_thinking, self._bar = write, show_thinking, bar
        self._is_thinking = False

    def show_progress(self, progress: PromptProgress) -> None:
        """Show the bar while a prompt takes more than one step."""
        if self._bar is not None:
            self._bar.show(progress)

    def show(self, delta: Delta, num_tokens: int) -> None:
        """Write what is new."""
        if num_tokens and self._bar is not None:
            self._bar.stop()
        if delta.reasoning and self._show_thinking:
            self._write(delta.reasoning if self._is_thinking else f"<think>{delta.reasoning}")
            self._is_thinking = True
        if delta.content:
            self._end_thinking()
            self._write(delta.content)

    def finish(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.stop()
        self._end_thinking()
        self._write("\n")

    def _end_thinking(self) -> None:
        if self._is_thinking:
            self._write("</think>\n")
            self._is_thinking = False


class TerminalDisplay:
    """Shows answers in a terminal, thoughts dimmed or only counted.

    Args:
        console: the terminal.
        show_thinking: False tells how long the thoughts are and not what they are.
        bar: shows how much of the prompt is taken in; one in this terminal by default.
    """

    def __init__(
        self, console: Console, show_thinking: bool = True, bar: "PromptBar | None" = None
    ) -> None:
        self._console, self._show_thinking = console, show_thinking
        self._bar = bar or PromptBar(console)
        self._status: Status | None = None
        self._num_thoughts = 0
        self._is_thinking = self._is_begun = False

    def show_progress(self, progress: PromptProgress) -> None:
        """Show a bar while a prompt takes more than one step."""
        self._bar.show(progress)

    def show(self, delta: Delta, num_tokens: int) -> None:
        """Print what is new."""
        if num_tokens:
            self._bar.stop()
        if delta.reasoning:
            self._is_thinking = True
        if self._is_thinking and not delta.content:
            self._think(delta.reasoning, num_tokens)
        if delta.content:
            self._end_thinking()
            self._write(delta.content)

    def finish(self) -> None:
        """End the line, if there is one."""
        self._bar.stop()
        self._end_thinking()
        if self._is_begun:
            self._console.print()
        self._is_begun = False

    def _think(self, text: str, num_tokens: int) -> None:
        self._num_thoughts += num_tokens
        if self._show_thinking:
            self._write(text, "dim")
            return
        line = f"thinking: {self._num_thoughts:,} tokens"
        if self._status is None:
            self._status = self._console.status(line)
            self._status.start()
        self._status.update(line)

    def _end_thinking(self) -> None:
        if not self._is_thinking:
            return
        if self._status is not None:
            self._status.stop()
            self._write(f"(thought for {self._num_thoughts:,} tokens)", "dim")
        self._console.print("\n")
        self._status, self._num_thoughts, self._is_thinking = None, 0, False

    def _write(self, text: str, style: str = "") -> None:
        self._is_begun = True
        self._console.print(Text(printable(text), style), end="", soft_wrap=True)


class PromptBar:
    """How much of a prompt is taken in, how fast of late, and how long the rest takes at that.

    In a terminal a bar that vanishes at the end, elsewhere a line now and then.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=NUM_RECENT)
        self._written_s = 0.0

    def show(self, progress: PromptProgress) -> None:
        """Show it, unless this is the beginning or the end of a prompt."""
        now, done = time.monotonic(), progress.processed
        if not self._recent:
            self._written_s = now
        self._recent.append((now, done))
        begin_s, before = self._recent[0]
        is_short = progress.total - before < MIN_BAR_TOKENS
        if is_short or done <= before or done >= progress.total - 1:
            return
        speed = (done - before) / max(now - begin_s, 1e-9)
        left = format_duration((progress.total - done) / speed)
        figures = f"tokens, {format_count(speed)} tokens/s, {left} left"
        if self._console.is_terminal:
            self._draw(progress, figures)
        elif now - self._written_s >= PLAIN_EVERY_S:
            self._written_s = now
            self._console.print(f"{done:,} of {progress.total:,} {figures}", highlight=False)

    def stop(self) -> None:
        """Remove the bar; the next progress is that of another prompt."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._recent.clear()

    def _draw(self, progress: PromptProgress, figures: str) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn("reading"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=progress.total, figures="")
            self._bar.start()
        self._bar.update(self._task, completed=progress.processed, figures=figures)
