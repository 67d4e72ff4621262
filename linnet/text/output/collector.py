"""Where the parsers put what they find, until `take` makes a delta of it."""

import secrets

from linnet.text.output.records import CallDelta, Delta


class Collector:
    """Gathers content, reasoning and tool calls."""

    def __init__(self) -> None:
        self.content = CutText(joint="")
        self.reasoning = CutText(joint="\n")
        self.reasoning.cut()  # the tag before it, which may stand in the prompt
        self._num_calls = 0
        self._head: tuple[str, str] | None = None
        self._arguments: list[str] = []
        self._calls: list[CallDelta] = []

    def start_call(self, name: str) -> None:
        """Begin a tool call; arguments added from now on are its own."""
        self._settle()
        self._num_calls += 1
        self._head = f"call_{secrets.token_hex(12)}", name

    def add_arguments(self, text: str) -> None:
        """Add JSON text to the arguments of the last call."""
        self._arguments.append(text)

    def take(self) -> Delta:
        """Return what is new since the last time."""
        self._settle()
        calls, self._calls = tuple(self._calls), []
        return Delta(self.content.take(), self.reasoning.take(), calls)

    def _settle(self) -> None:
        arguments = "".join(self._arguments)
        if self._head or arguments:
            call_id, name = self._head or (None, None)
            self._calls.append(CallDelta(self._num_calls - 1, call_id, name, arguments))
        self._head, self._arguments = None, []


class CutText:
    """Text out of which spans are cut, without the blank lines that were around them.

    Where text stands on both sides of cuts, the white space before the first of them stays; if
    there was none, that after the last; if there was none either, `joint`. Cuts at the beginning
    take the blank lines after them along, cuts at the end all white space around them.
    """

    def __init__(self, joint: str) -> None:
        self._joint = joint
        self._is_empty = True
        self._before: str | None = None  # white space before a cut that no text has followed yet
        self._space: list[str] = []  # white space after the text so far, or after the last cut
        self._shown: list[str] = []

    def add(self, text: str) -> None:
        """Add text; white space at its end is held back until more text follows."""
        body = text.rstrip()
        if not body:
            self._space.append(text)
            return
        if self._before is None:
            self._shown += [*self._space, body]
        else:
            start = len(body) - len(body.lstrip())
            self._space.append(body[:start])
            self._shown += [self._bridge(), body[start:]]
            self._before = None
        self._space = [text[len(body) :]]
        self._is_empty = False

    def cut(self) -> None:
        """Note that something was left out here."""
        if self._before is None:
            self._before = "".join(self._space)
        self._space = []

    def finish(self) -> None:
        """Release the white space at the end, unless it stands beside a cut."""
        if self._before is None:
            self._shown += self._space
            self._space = []

    def take(self) -> str:
        """Return what can be shown and was not yet."""
        shown, self._shown = "".join(self._shown), []
        return shown

    def _bridge(self) -> str:
        after = "".join(self._space)
        if self._is_empty:
            return after[after.rfind("\n") + 1 :]
        return self._before or after or self._joint
