"""Completions as they stream: content, reasoning and tool calls, told apart piece by piece."""

from linnet.text.output.formats import starts_thinking, tool_format_of
from linnet.text.output.parser import OutputParser, ToolFormat, parse_output
from linnet.text.output.records import CallDelta, Delta, ParsedOutput, ToolCall, join_deltas

__all__ = [
    "CallDelta",
    "Delta",
    "OutputParser",
    "ParsedOutput",
    "ToolCall",
    "ToolFormat",
    "join_deltas",
    "parse_output",
    "starts_thinking",
    "tool_format_of",
]
