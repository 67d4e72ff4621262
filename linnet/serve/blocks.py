"""An answer as a row of blocks, which is how the Responses and Messages APIs give it."""

import secrets
from dataclasses import dataclass, field
from typing import Literal

from linnet.text import Delta

Kind = Literal["reasoning", "content", "call"]


@dataclass(slots=True, eq=False)
class Block:
    """A stretch of an answer that is all of one kind."""

    index: int
    """Place in the answer."""
    kind: Kind
    call_id: str = ""
    name: str = ""
    """Of a call."""
    pieces: list[str] = field(default_factory=list)
    unique: str = field(default_factory=lambda: secrets.token_hex(12))
    """Makes an id, with a prefix that tells the kind."""

    @property
    def text(self) -> str:
        """The text so far; of a call, its arguments."""
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class News:
    """A block begins, goes on by `text`, or ends."""

    event: Literal["begin", "more", "end"]
    block: Block
    text: str = ""


class Blocks:
    """Sorts the deltas of an answer into blocks: another kind, or another call, ends the last."""

    def __init__(self) -> None:
        self.all: list[Block] = []
        self._open: Block | None = None

    def push(self, delta: Delta) -> list[News]:
        """Take a delta; return what it does to the blocks."""
        news: list[News] = []
        if delta.reasoning:
            news += self._add("reasoning", delta.reasoning)
        if delta.content:
            news += self._add("content", delta.content)
        for call in delta.calls:
            if call.id is not None:
                news += self._begin("call", call.id, call.name or "")
            if call.arguments:
                news += self._add("call", call.arguments)
        return news

    def finish(self) -> list[News]:
        """End the last block; an answer without any has one without text."""
        news = [] if self.all else self._begin("content")
        return news + self._end()

    @property
    def is_in_content(self) -> bool:
        """Whether the last block is content."""
        return self._open is not None and self._open.kind == "content"

    def _add(self, kind: Kind, text: str) -> list[News]:
        news = [] if self._open and self._open.kind == kind else self._begin(kind)
        assert self._open is not None
        self._open.pieces.append(text)
        return [*news, News("more", self._open, text)]

    def _begin(self, kind: Kind, call_id: str = "", name: str = "") -> list[News]:
        news = self._end()
        self._open = Block(len(self.all), kind, call_id, name)
        self.all.append(self._open)
        return [*news, News("begin", self._open)]

    def _end(self) -> list[News]:
        if self._open is None:
            return []
        ended, self._open = self._open, None
        return [News("end", ended)]
