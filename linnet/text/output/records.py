"""What a completion is split into: deltas while it streams, and all of them joined."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CallDelta:
    """News of one tool call."""

    index: int
    """Place of the call in the completion, from 0."""
    id: str | None
    """Set in the first delta of a call, and only there."""
    name: str | None
    """Set with `id`."""
    arguments: str
    """More of the arguments' JSON text."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one piece of a completion adds."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One tool call."""

    id: str
    name: str
    arguments: str
    """JSON text. It is unfinished, and so not valid, if the model broke off or wrote no JSON."""


@dataclass(frozen=True, slots=True)
class ParsedOutput:
    """A whole completion."""

    content: str
    reasoning: str
    calls: tuple[ToolCall, ...]


def join_deltas(deltas: Iterable[Delta]) -> ParsedOutput:
    """Return the completion that a sequence of deltas adds up to."""
    content: list[str] = []
    reasoning: list[str] = []
    heads: list[tuple[str, str]] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        content.append(delta.content)
        reasoning.append(delta.reasoning)
        for call in delta.calls:
            if call.id is not None and call.name is not None:
                heads.append((call.id, call.name))
                arguments.append([])
            arguments[call.index].append(call.arguments)
    calls = tuple(
        ToolCall(call_id, name, "".join(pieces))
        for (call_id, name), pieces in zip(heads, arguments, strict=True)
    )
    return ParsedOutput("".join(content), "".join(reasoning), calls)
