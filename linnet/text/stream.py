"""Decoding token by token, as generation needs it: whole characters, each id looked at once."""

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Turns token ids into text as they come, holding back the bytes of an unfinished character."""

    def __init__(self, token_bytes: Callable[[int], bytes]):
        """Take the function that gives the bytes of one token; made by `Tokenizer.stream`."""
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes, possibly empty."""
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """Return what is held back: empty, or U+FFFD for a character that never ended."""
        return self._utf8.decode(b"", final=True)
