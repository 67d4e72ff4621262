"""Tokens to text as they come: whole characters only, and nothing of a stop string."""

from linnet.text import Tokenizer


class TextOutput:
    """The text of one completion, which ends at the first stop string.

    Which stop string ends the text, and where, does not depend on how tokens cut it: it is the
    one that is complete first, and of several with the same end the longest.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Start with no text.

        Args:
            tokenizer: None gives no text at all.
            stop: texts that end the text.
            include_stop: keep the stop string.
            min_tokens: before this many tokens no stop string counts.
        """
        self._decoder = None if tokenizer is None else tokenizer.stream()
        self._stop, self._include_stop = stop, include_stop
        self._tokens_to_go = min_tokens
        self._held = ""
        self.stop_string: str | None = None
        """The stop string that ended the text."""

    @property
    def is_closed(self) -> bool:
        """Whether a stop string has ended the text."""
        return self.stop_string is not None

    def push(self, token: int) -> str:
        """Return what can be shown after one more token, possibly nothing."""
        self._tokens_to_go -= 1
        return "" if self._decoder is None else self._show(self._decoder.push(token))

    def finish(self) -> str:
        """Return what was held back: it turned out to be no stop string, or no character."""
        if self._decoder is None or self.is_closed:
            return ""
        text = self._show(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _show(self, text: str) -> str:
        if self.is_closed:
            return ""
        text = self._held + text
        if self._tokens_to_go <= 0 and (found := self._first_stop(text)):
            start, end = found
            self.stop_string, self._held = text[start:end], ""
            return text[: end if self._include_stop else start]
        keep = self._possible_start(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str) -> tuple[int, int] | None:
        starts = ((text.find(stop), len(stop)) for stop in self._stop)
        found = [(start, start + length) for start, length in starts if start >= 0]
        return min(found, key=lambda span: (span[1], span[0]), default=None)

    def _possible_start(self, text: str) -> int:
        """Return the length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0
