"""Tags in text that comes in pieces."""

import re

# Bounded, so that what never becomes a tag is given up and not searched again with every piece.
_MAX_TAG_LEN = 300
_NAME = (
    r"""[ \t]{1,4}name=(?:"([^"<>\n]{1,256})"|'([^'<>\n]{1,256})'|([^\s"'<>]{1,256}))[ \t]{0,4}>"""
)


class Tags:
    """Some tags to look for."""

    def __init__(self, *tags: str, named: tuple[str, ...] = ()) -> None:
        """Take whole tags such as `<think>`, and the words of those that have a name.

        `named=("invoke",)` finds `<invoke name="f">`, with any name.
        """
        patterns = [re.escape(tag) for tag in tags] + [rf"<{word}{_NAME}" for word in named]
        self._whole = re.compile("|".join(patterns))
        self._stems = (*tags, *(f"<{word} " for word in named))
        self._header = re.compile(rf"<(?:{'|'.join(named) or '(?!)'})[ \t][^<>\n]*")

    def find(self, text: str, at: int) -> tuple[int, re.Match[str] | None]:
        """Find the first tag at or after `at`.

        Returns:
            Where it starts, and its match. Without a match, where the end of `text` starts that
            may yet become a tag; `len(text)` if there is none.
        """
        match = self._whole.search(text, at)
        if match:
            return match.start(), match
        start = text.rfind("<", at)
        if start < 0 or not self._may_begin(text, start):
            return len(text), None
        return start, None

    def _may_begin(self, text: str, start: int) -> bool:
        if len(text) - start > _MAX_TAG_LEN:
            return False
        end = text[start:]
        return any(stem.startswith(end) for stem in self._stems) or (
            self._header.fullmatch(end) is not None
        )


def name_of(match: re.Match[str]) -> str:
    """Return the name in a tag that has one."""
    return next(name for name in match.groups() if name is not None)
