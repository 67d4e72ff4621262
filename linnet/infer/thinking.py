"""How much a model thinks: the think spans of a completion, counted and closed in time.

The tags are looked for in the bytes of the tokens, not in their ids: MiniMax-M1's tokenizer has no
tokens of its own for them, and one that has may still write them out in pieces.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Literal

from linnet.text.special import THINKING_AND_TOOLS

OPEN, CLOSE = (tag.encode() for tag in THINKING_AND_TOOLS[:2])

Phase = Literal["idle", "counting", "waiting_utf8", "forcing", "done"]
_LONGEST_CHARACTER = 4  # bytes, in UTF-8
_RECENT_TOKENS = len(CLOSE)  # No token is empty, so that a tag lies within so many.


def thinks_at_end(text: bytes) -> bool:
    """Whether `text` ends inside a think span."""
    return text.rfind(OPEN) > text.rfind(CLOSE)


class ThinkSpans:
    """Follows a completion into and out of its think spans, and says when to close one.

    `idle` outside of a span, `counting` inside. Once the budget is used up, `waiting_utf8` while a
    character is unfinished (3 tokens at most), then `forcing` the close tag. `done` outside of a
    span with nothing left to spend: a span opened then is closed at once.
    """

    def __init__(
        self,
        close_tokens: Callable[[int], Sequence[int]] = lambda typed: (),
        starts_open: bool = False,
        budget: int | None = None,
    ) -> None:
        """Start at the end of a prompt.

        Args:
            close_tokens: gives the tokens that complete a close tag of which so many bytes are
                there.
            starts_open: the prompt ends inside a span.
            budget: tokens that may lie inside spans; None for any number.
        """
        self.phase: Phase = "counting" if starts_open else "idle"
        self.num_tokens = 0
        """Tokens inside spans so far, without those of the tags."""
        self._close_tokens, self._budget = close_tokens, budget
        self._recent: deque[tuple[bytes, bool]] = deque(maxlen=_RECENT_TOKENS)
        self._queue: deque[int] = deque()
        self._num_waited = 0
        self._spend()

    @property
    def is_open(self) -> bool:
        """Whether the next token lies inside a span."""
        return self.phase not in ("idle", "done")

    @property
    def forced(self) -> int | None:
        """The token that must come next, if there is one."""
        return self._queue[0] if self._queue else None

    def push(self, data: bytes) -> None:
        """Go on by one token, given its bytes; it is the forced one, if there was one."""
        if self._queue:
            self._queue.popleft()
        counts = self.is_open
        self.num_tokens += counts
        if data:
            self._recent.append((data, counts))
        while (at := self._text.find(CLOSE if self.is_open else OPEN)) >= 0:
            if self.is_open:
                self._close(at)
            else:
                self._open(at)
        self._spend()

    def after_close(self, data: bytes) -> bytes:
        """Return what a token with these bytes would write after the close tag it completes."""
        return (self._text + data).partition(CLOSE)[2]

    @property
    def _text(self) -> bytes:
        return b"".join(data for data, _ in self._recent)

    def _open(self, at: int) -> None:
        self.phase = "counting"
        self._forget(at + len(OPEN))

    def _close(self, at: int) -> None:
        start = 0
        for data, counted in self._recent:
            self.num_tokens -= counted and start >= at
            start += len(data)
        self.phase = "idle" if self._budget is None or self.num_tokens < self._budget else "done"
        self._num_waited = 0
        self._forget(at + len(CLOSE))

    def _forget(self, end: int) -> None:
        rest = self._text[end:]
        self._recent.clear()
        if rest:
            self._recent.append((rest, False))

    def _spend(self) -> None:
        if self.phase not in ("counting", "waiting_utf8"):
            return
        if self._budget is None or self.num_tokens < self._budget:
            return
        if self._num_waited < _LONGEST_CHARACTER - 1 and _ends_inside_character(self._text):
            self.phase = "waiting_utf8"
            self._num_waited += 1
            return
        self.phase = "forcing"
        self._queue.extend(self._close_tokens(_typed_part(self._text)))


def _ends_inside_character(text: bytes) -> bool:
    for num_bytes in range(1, min(_LONGEST_CHARACTER, len(text) + 1)):
        byte = text[-num_bytes]
        if byte >= 0xC0:  # the first of a character of 2 to 4 bytes
            return num_bytes < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        if byte < 0x80:
            return False
    return False


def _typed_part(text: bytes) -> int:
    """Return how many bytes of a close tag `text` ends with."""
    return max(size for size in range(len(CLOSE)) if text.endswith(CLOSE[:size]))
