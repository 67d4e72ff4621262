"""One answer of an engine in this process, as it streams, until it ends or Ctrl-C stops it."""

import queue
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from linnet.errors import EngineError
from linnet.infer import Engine, SamplingParams, Ticket
from linnet.infer.updates import FinishReason, Progress, Update, Usage
from linnet.text import (
    Delta,
    OutputParser,
    join_deltas,
    starts_thinking,
)


class Display(Protocol):
    """Where an answer is shown."""

    def show_progress(self, progress: Progress) -> None:
        """Show how much of the prompt is taken in."""

    def show(self, delta: Delta, num_tokens: int) -> None:
        """Show more of the answer, which so many tokens brought."""

    def finish(self) -> None:
        """Show that the answer is over."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer."""

    text: str
    """As the model wrote it."""
    tokens: tuple[int, ...]
    """An end token included."""
    content: str
    reasoning: str
    finish_reason: FinishReason
    usage: Usage


def stream_answer(
    engine: Engine, prompt: Sequence[int], params: SamplingParams, display: Display
) -> Answer:
    """Answer a prompt and show it; Ctrl-C ends the answer early, a second one the program.

    Args:
        engine: started, with a model that has a tokenizer.
        prompt: ids, up to the opening of the assistant's turn.
        params: how to choose tokens.
        display: where to show it.

    Raises:
        EngineError: the request is refused, or the engine failed.
        ValueError: the params ask for what the model cannot do.
    """
    tokenizer = engine.model.tokenizer
    assert tokenizer is not None
    tail = tokenizer.decode(prompt[-16:], skip_special=False)
    parser = OutputParser(None, starts_thinking=starts_thinking(tail))
    texts: list[str] = []
    tokens: list[int] = []
    deltas: list[Delta] = []
    last = Update()
    try:
        for last in Request(engine, prompt, params):
            if last.progress is not None:
                display.show_progress(last.progress)
            texts.append(last.text)
            tokens += last.tokens
            deltas.append(parser.push(last.text))
            display.show(deltas[-1], len(last.tokens))
        deltas.append(parser.finish())
        display.show(deltas[-1], 0)
    finally:
        display.finish()
    assert last.finish_reason is not None and last.usage is not None
    parsed = join_deltas(deltas)
    return Answer(
        text="".join(texts),
        tokens=tuple(tokens),
        content=parsed.content,
        reasoning=parsed.reasoning,
        finish_reason=last.finish_reason,
        usage=last.usage,
    )


class Request:
    """One request; iterating gives its updates. Ctrl-C cancels it, and its last update still comes.

    Args:
        engine: started.
        prompt: ids.
        params: how to choose tokens.
        ends_early: called with each update in the engine's thread; True cancels the request.
    """

    def __init__(
        self,
        engine: Engine,
        prompt: Sequence[int],
        params: SamplingParams,
        ends_early: Callable[[Update], bool] | None = None,
    ) -> None:
        self._engine, self._prompt, self._params = engine, prompt, params
        self._ends_early = ends_early
        self._updates: queue.SimpleQueue[Update] = queue.SimpleQueue()
        self._ticket: Ticket | None = None
        self._is_cancelled = False
        self.is_interrupted = False
        """Whether Ctrl-C was pressed."""

    def __iter__(self) -> Iterator[Update]:
        """Submit the request and yield its updates.

        Raises:
            EngineError: the request is refused, or the engine failed.
            ValueError: the prompt or the params cannot be meant.
        """
        with _interrupts(self._interrupt):
            try:
                self._ticket = self._engine.submit(self._prompt, self._params, self._on_update)
                if self._is_cancelled:  # by an update, or by Ctrl-C, that came before the ticket
                    self._ticket.cancel()
                while True:
                    update = self._updates.get()
                    if update.finish_reason == "error":
                        raise EngineError(update.error or "the engine failed")
                    yield update
                    if update.finish_reason is not None:
                        return
            finally:
                self._cancel()

    def _interrupt(self) -> None:
        self.is_interrupted = True
        self._cancel()

    def _cancel(self) -> None:
        self._is_cancelled = True
        if self._ticket is not None:
            self._ticket.cancel()

    def _on_update(self, update: Update) -> None:
        """Take an update, in the engine's thread."""
        if self._ends_early is not None and self._ends_early(update):
            self._cancel()
        self._updates.put(update)


@contextmanager
def _interrupts(cancel: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C call `cancel`, and the next one do what it did before."""
    before = signal.getsignal(signal.SIGINT)

    def handle(_signal: int, _frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        cancel()

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def as_message(answer: Answer, template: str | None) -> dict[str, Any]:  # Any: JSON
    """Return an answer as a message of the conversation that goes on."""
    if template is None:
        # The format has no field for thoughts: they stand before the answer, as they were written.
        return {"role": "assistant", "content": answer.text}
    message = {"role": "assistant", "content": answer.content}
    return {**message, "reasoning_content": answer.reasoning} if answer.reasoning else message


def figures(usage: Usage) -> str:
    """Return in one line what an answer took."""
    parts = [f"{usage.prompt_tokens:,} prompt tokens, {usage.cached_tokens:,} of them cached"]
    if usage.first_token_s is not None:
        parts.append(f"first token after {usage.first_token_s:.2f} s")
        seconds, more = usage.total_s - usage.first_token_s, usage.completion_tokens - 1
        speed = f" at {more / seconds:,.0f} tokens/s" if more and seconds > 0 else ""
        parts.append(f"{usage.completion_tokens:,} tokens{speed}")
    return "; ".join(parts)
