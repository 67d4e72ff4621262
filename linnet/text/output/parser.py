"""A completion split, as it streams, into content, reasoning and tool calls.

- Reasoning stands between `<think>` and `</think>`; no other tag counts there. Spans are joined by
  a line end if nothing else separates them. A span that is not closed is reasoning to the end. A
  `</think>` without a beginning is left out.
- Blank lines around think spans, tool calls and inside think spans at both ends are left out
  (`CutText`), so that content and reasoning begin and end with text. Without any tag the content
  is the text as it is.
- What may become a tag is held back until it is one or cannot be one any more. At the end of the
  text the first two or more characters of a tag are left out; a single `<` is text.
- Tool calls: see `calls_m1` and `calls_m2`. Nothing a model writes raises an error.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from linnet.text.output import calls_m1, calls_m2
from linnet.text.output.calls_m1 import M1Calls
from linnet.text.output.calls_m2 import M2Calls
from linnet.text.output.collector import Collector
from linnet.text.output.records import Delta, ParsedOutput, join_deltas
from linnet.text.output.tags import Tags

ToolFormat = Literal["m1", "m2"]
_Read = Callable[[str, int], int]

THINK, END_THINK = "<think>", "</think>"
_THINK_START = Tags(THINK)
_THINK_END = Tags(END_THINK)


class OutputParser:
    """Takes a completion piece by piece and returns what each piece adds.

    However the text is cut into pieces, the deltas add up to the same (`join_deltas`). The work is
    linear in the length of the text.
    """

    def __init__(
        self,
        tool_format: ToolFormat | None,
        tools: Sequence[Mapping[str, Any]] = (),  # Any: JSON from outside
        starts_thinking: bool = False,
        separate_reasoning: bool = True,
    ) -> None:
        """Set up for one completion.

        Args:
            tool_format: how tool calls are written; None for a completion without any, in which
                their tags are content.
            tools: the tools that were offered, bare or in the OpenAI form; "m2" needs their
                schemas to tell numbers from strings. Calls of other tools are reported as well.
            starts_thinking: the prompt ends inside a think span.
            separate_reasoning: False leaves think spans in the content, tags and all, and opens
                the one that the prompt began.
        """
        self._collector = Collector()
        self._calls: M1Calls | M2Calls | None = None
        if tool_format == "m1":
            self._calls, open_calls = M1Calls(self._collector), (calls_m1.OPEN,)
        elif tool_format == "m2":
            self._calls, open_calls = M2Calls(self._collector, tools), (calls_m2.OPEN,)
        else:
            open_calls = ()
        self._content_tags = Tags(THINK, END_THINK, *open_calls)
        self._separate = separate_reasoning
        self._thought = self._collector.reasoning if separate_reasoning else self._collector.content
        if starts_thinking and not separate_reasoning:
            self._collector.content.add(f"{THINK}\n")
        self._read: _Read = self._read_start if starts_thinking else self._read_content
        self._read_outside: _Read = self._read_content  # what a think span goes back to
        self._held = ""

    def push(self, text: str) -> Delta:
        """Take the next piece of the text; return what it adds."""
        text, at = self._held + text, 0
        while at < len(text):
            before = at, self._read
            at = self._read(text, at)
            if (at, self._read) == before:
                break
        self._held = text[at:]
        return self._collector.take()

    def finish(self) -> Delta:
        """Say that the text is over; return what was held back."""
        if self._held == "<" and self._read != self._read_calls:
            is_outside = self._read == self._read_content
            (self._collector.content if is_outside else self._thought).add(self._held)
        self._held = ""
        self._collector.content.finish()
        return self._collector.take()

    # Each `_read_*` takes `text` from `at` on, perhaps sets another one to go on, and returns the
    # place after what it has taken. `push` calls them until nothing changes.

    def _read_content(self, text: str, at: int) -> int:
        start, match = self._content_tags.find(text, at)
        self._collector.content.add(text[at:start])
        if match is None:
            return start
        if match.group() == THINK:
            self._open_think()
        elif match.group() == END_THINK:
            self._mark(END_THINK)
        else:
            self._collector.content.cut()
            self._read = self._read_calls
        return match.end()

    def _read_calls(self, text: str, at: int) -> int:
        assert self._calls is not None
        at, stop = self._calls.feed(text, at)
        if stop == "close":
            self._collector.content.cut()
            self._read = self._read_content
        elif stop == "think":
            self._open_think()
        return at

    def _read_start(self, text: str, at: int) -> int:
        """Begin inside a think span, which the model may open once more."""
        begin = len(text) - len(text[at:].lstrip())
        self._thought.add(text[at:begin])
        start, match = _THINK_START.find(text, begin)
        if match is None and start == begin:
            return begin
        self._read = self._read_think
        if match is None or start > begin:
            return begin
        self._collector.reasoning.cut()
        return match.end()

    def _read_think(self, text: str, at: int) -> int:
        start, match = _THINK_END.find(text, at)
        self._thought.add(text[at:start])
        if match is None:
            return start
        self._mark(END_THINK)
        self._collector.reasoning.cut()
        self._read = self._read_outside
        return match.end()

    def _open_think(self) -> None:
        self._mark(THINK)
        self._read_outside, self._read = self._read, self._read_think

    def _mark(self, tag: str) -> None:
        """Cut a tag out of the content, or leave it there with the reasoning."""
        if self._separate:
            self._collector.content.cut()
        else:
            self._collector.content.add(tag)


def parse_output(
    text: str,
    tool_format: ToolFormat | None,
    tools: Sequence[Mapping[str, Any]] = (),  # Any: JSON from outside
    starts_thinking: bool = False,
    separate_reasoning: bool = True,
) -> ParsedOutput:
    """Split a whole completion; the arguments are those of `OutputParser`."""
    parser = OutputParser(tool_format, tools, starts_thinking, separate_reasoning)
    return join_deltas([parser.push(text), parser.finish()])
