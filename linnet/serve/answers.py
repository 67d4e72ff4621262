"""A completion as it grows: what of it is content, reasoning or tool calls, and how it ends."""

from typing import Literal

from linnet.infer.updates import Update, Usage
from linnet.text.output import CallDelta, Delta, OutputParser, ParsedOutput, join_deltas

FinishReason = Literal["stop", "length", "tool_calls"]


class Answer:
    """One answer to a conversation.

    Args:
        parser: splits the completion.
        parallel_tool_calls: whether more than one call is wanted; what follows the first call is
            dropped otherwise.
        is_named: whether the request named the tool to call, which OpenAI's API tells by the finish
            reason "stop".
    """

    def __init__(
        self, parser: OutputParser, parallel_tool_calls: bool = True, is_named: bool = False
    ) -> None:
        self._parser = parser
        self._parallel_tool_calls, self._is_named = parallel_tool_calls, is_named
        self._deltas: list[Delta] = []
        self._end: Update | None = None
        self.is_enough = False
        """Whether the rest will be dropped, so that generating may stop."""
        self.num_tokens = 0

    def push(self, update: Update) -> Delta:
        """Take an update, and return what it adds to the answer."""
        self.num_tokens += len(update.tokens)
        pieces = [self._parser.push(update.text)] if update.text else []
        if update.finish_reason is not None:
            self._end = update
            pieces.append(self._parser.finish())
        joined = Delta(
            "".join(piece.content for piece in pieces),
            "".join(piece.reasoning for piece in pieces),
            tuple(call for piece in pieces for call in piece.calls),
        )
        delta = self._wanted(joined)
        self._deltas.append(delta)
        return delta

    def _wanted(self, delta: Delta) -> Delta:
        if self.is_enough:
            return Delta()
        if self._parallel_tool_calls or all(call.index == 0 for call in delta.calls):
            return delta
        self.is_enough = True
        return Delta(delta.content, delta.reasoning, _first_calls(delta.calls))

    @property
    def output(self) -> ParsedOutput:
        """All of the answer so far."""
        return join_deltas(self._deltas)

    @property
    def has_calls(self) -> bool:
        """Whether a tool call has begun."""
        return any(delta.calls for delta in self._deltas)

    @property
    def usage(self) -> Usage:
        """What it took, once it has ended."""
        assert self._end is not None and self._end.usage is not None
        return self._end.usage

    @property
    def stop_reason(self) -> str | int | None:
        """The stop string or token that ended it, or "repetition"."""
        assert self._end is not None
        return "repetition" if self._end.finish_reason == "repetition" else self._end.stop_reason

    @property
    def finish_reason(self) -> FinishReason:
        """Why it ended, in OpenAI's words: one that only repeats itself was cut at a length."""
        assert self._end is not None
        if self._end.finish_reason in ("length", "repetition"):
            return "length"
        return "tool_calls" if self.has_calls and not self._is_named else "stop"


def _first_calls(calls: tuple[CallDelta, ...]) -> tuple[CallDelta, ...]:
    return tuple(call for call in calls if call.index == 0)
