"""What every parser test checks: however a completion is cut, the deltas add up to the same."""

import json
import random
from collections.abc import Callable, Iterator

import pytest

from linnet.text import OutputParser, ParsedOutput, join_deltas, parse_output

TAGS = ("<think>", "</think>", "<tool_calls>", "</tool_calls>", "<minimax:tool_call>")
HALF_TAGS = tuple(tag[:length] for tag in TAGS for length in range(2, len(tag) + 1))

Summary = tuple[str, str, list[tuple[str, object]]]


def stream(pieces: list[str], *options) -> ParsedOutput:
    """Parse pieces, and check that each call announces itself once, in order."""
    parser = OutputParser(*options)
    deltas = [*(parser.push(piece) for piece in pieces), parser.finish()]
    seen: list[str] = []
    for delta in deltas:
        for call in delta.calls:
            if call.index == len(seen):
                assert call.id and call.name
                seen.append(call.id)
            else:
                assert call.index == len(seen) - 1
                assert call.id is None and call.name is None and call.arguments
    assert len(set(seen)) == len(seen)
    return join_deltas(deltas)


def without_ids(parsed: ParsedOutput) -> tuple[str, str, list[tuple[str, str]]]:
    return parsed.content, parsed.reasoning, [(call.name, call.arguments) for call in parsed.calls]


def summary(parsed: ParsedOutput) -> Summary:
    """Return content, reasoning, and calls with arguments as values: None for unfinished ones."""
    calls = [(call.name, loaded(call.arguments)) for call in parsed.calls]
    return parsed.content, parsed.reasoning, calls


def loaded(arguments: str) -> object:
    try:
        return json.loads(arguments, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    except ValueError:
        return None


def cuts(text: str, seed: int, everywhere: bool) -> Iterator[list[str]]:
    yield list(text)
    for at in range(len(text) + 1) if everywhere else ():
        yield [text[:at], text[at:]]
    source = random.Random(seed)
    for longest in (3, 7, 30):
        pieces, rest = [], text
        while rest:
            size = source.randint(0, longest)
            pieces.append(rest[:size])
            rest = rest[size:]
        yield pieces


@pytest.fixture
def check() -> Callable[..., Summary]:
    """Return a function that parses a text in many pieces and returns what all agree on."""

    def check(text: str, *options, everywhere: bool = True) -> Summary:
        parsed = parse_output(text, *options)
        whole = without_ids(parsed)
        for pieces in cuts(text, len(text), everywhere):
            assert without_ids(stream(pieces, *options)) == whole, pieces
        return summary(parsed)

    return check


@pytest.fixture
def check_truncated() -> Callable[..., None]:
    """Return a function that cuts the end off everywhere: what is shown is a part of the whole."""

    def check(text: str, *options) -> None:
        whole = parse_output(text, *options)
        for end in range(len(text)):
            part = parse_output(text[:end], *options)
            for shown, complete in (part.content, whole.content), (part.reasoning, whole.reasoning):
                # What stands at the very end may turn out to be the beginning of a tag, or a gap.
                assert complete.startswith(shown.removesuffix("<").rstrip()), end
                assert not shown.endswith(HALF_TAGS), end
            assert len(part.calls) <= len(whole.calls)
            for call, complete in zip(part.calls, whole.calls, strict=False):
                assert call.name == complete.name
                assert complete.arguments.startswith(call.arguments), end

    return check
