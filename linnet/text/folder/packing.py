"""From a folder to the texts of a prompt: which files, in which order, and how each is shown.

The order is a matter of what can be reused: a prompt is continued from the longest beginning that
was seen before, so a change in one file costs all that stand after it. By path, the prompt depends
on nothing but the files; by age, what was changed last stands at the end, where it costs least.
There is no list of the files ahead of them, since a new file would change it.
"""

import os
import re
import stat
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathspec import GitIgnoreSpec

from linnet.errors import DataError
from linnet.text.folder.ignore import VERSION_CONTROL, IgnoreRules, compile_rules

Order = Literal["path", "age"]

MAX_FILE_BYTES = 1 << 20
MAX_TOTAL_BYTES = 256 << 20
"""More than any model here takes in; a folder beyond is refused before all of it is read."""

MAX_DEPTH = 64
"""Folders within folders."""

MAX_SEARCH_S = 60.0
"""To find the files."""

_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class PackedFile:
    """A file that is part of the prompt."""

    path: str
    """Below the folder, with `/`; unprintable characters are replaced."""
    text: str
    """Its name and content, as the prompt shows them."""


@dataclass(frozen=True, slots=True)
class SkippedFile:
    """A file, or a folder with all in it, that is not part of the prompt."""

    path: str
    """As in `PackedFile`; that of a folder ends with `/`."""
    reason: str


@dataclass(frozen=True, slots=True)
class PackedFolder:
    """What of a folder is part of the prompt, and what is not."""

    files: tuple[PackedFile, ...]
    """In the order of the prompt."""
    skipped: tuple[SkippedFile, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    path: str
    file: Path
    mtime_ns: int


def pack_folder(
    folder: str | Path,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    use_ignore_rules: bool = True,
    order: Order = "path",
    max_file_bytes: int = MAX_FILE_BYTES,
) -> PackedFolder:
    """Read the text files of a folder and those below; links are not followed.

    Args:
        folder: or a single file, which is taken whatever the rules say.
        include: gitignore patterns; only files that match one are taken.
        exclude: gitignore patterns of what is left out.
        use_ignore_rules: leave out what `.gitignore` files and `ignore.DEFAULTS` name.
        order: of the files: by path, or the one changed longest ago first.
        max_file_bytes: larger files are left out.

    Raises:
        DataError: the folder does not exist or cannot be read, holds too much, or no text.
    """
    root = Path(folder)
    try:
        root = root.resolve(strict=True)
        is_folder = root.is_dir()
        if is_folder:
            rules = IgnoreRules.of(root, exclude, use_ignore_rules)
            found = list(_Search(rules, include, use_ignore_rules).walk(root, ""))
        else:
            found = [_Found(root.name, root, root.stat().st_mtime_ns)]
    except OSError as error:
        raise DataError(f"{str(folder)!r} cannot be read: {error.strerror or error}") from None
    skipped = [item for item in found if isinstance(item, SkippedFile)]
    files = [item for item in found if isinstance(item, _Found)]
    if order == "age":
        files.sort(key=lambda item: (item.mtime_ns, item.path))
    packed = list(_read_all(files, max_file_bytes, skipped, str(folder)))
    if not packed:
        reasons = ", ".join(sorted({item.reason for item in skipped})) or "it is empty"
        raise DataError(f"{str(folder)!r} holds no text file to pack: {reasons}")
    return PackedFolder(tuple(packed), tuple(skipped))


class _Search:
    """Finds files; the time for it is bounded."""

    def __init__(self, rules: IgnoreRules, include: Sequence[str], use_ignore_rules: bool) -> None:
        self._rules, self._use_ignore_rules = rules, use_ignore_rules
        self._include = GitIgnoreSpec(compile_rules(include)) if include else None
        self._deadline_s = time.monotonic() + MAX_SEARCH_S

    def walk(
        self, folder: Path, prefix: str, rules: IgnoreRules | None = None, depth: int = 0
    ) -> Iterator[_Found | SkippedFile]:
        """Yield the files below a folder, by path, and what is left out."""
        rules = rules or self._rules
        if self._use_ignore_rules:
            rules = rules.within(folder)
        with os.scandir(folder) as entries:
            ordered = sorted(entries, key=lambda entry: entry.name)
        for entry in ordered:
            if time.monotonic() > self._deadline_s:
                raise DataError(
                    f"to find the files took longer than {MAX_SEARCH_S:.0f} s; give a smaller "
                    "folder"
                )
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_folder and entry.name in VERSION_CONTROL:
                continue
            end = "/" if is_folder else ""
            path = f"{prefix}{entry.name}{end}"
            reason = rules.reason(f"{folder.as_posix().rstrip('/')}/{entry.name}{end}")
            if reason is None and is_folder and depth == MAX_DEPTH:
                reason = f"deeper than {MAX_DEPTH} folders"
            if reason is not None:
                yield SkippedFile(_shown(path), reason)
            elif is_folder:
                yield from self._enter(folder / entry.name, path, rules, depth + 1)
            else:
                yield self._judge(entry, path)

    def _enter(
        self, folder: Path, path: str, rules: IgnoreRules, depth: int
    ) -> Iterator[_Found | SkippedFile]:
        try:
            yield from self.walk(folder, path, rules, depth)
        except OSError as error:
            yield SkippedFile(_shown(path), f"unreadable ({error.strerror})")

    def _judge(self, entry: os.DirEntry[str], path: str) -> _Found | SkippedFile:
        if entry.is_symlink():
            return SkippedFile(_shown(path), "a link")
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError as error:
            return SkippedFile(_shown(path), f"unreadable ({error.strerror})")
        if not stat.S_ISREG(status.st_mode):
            return SkippedFile(_shown(path), "no regular file")
        if self._include is not None and not self._include.match_file(path):
            return SkippedFile(_shown(path), "not included")
        return _Found(path, Path(entry.path), status.st_mtime_ns)


def _read_all(
    files: Sequence[_Found], max_file_bytes: int, skipped: list[SkippedFile], folder: str
) -> Iterator[PackedFile]:
    """Yield files with their texts; add those without to `skipped`."""
    total = 0
    for item in files:
        shown = _shown(item.path)
        try:
            with item.file.open("rb") as file:
                data = file.read(max_file_bytes + 1)
        except OSError as error:
            skipped.append(SkippedFile(shown, f"unreadable ({error.strerror})"))
            continue
        text, reason = _decode(data)
        if len(data) > max_file_bytes:
            reason = f"larger than {max_file_bytes / 1024:,.0f} KiB"
        if text is None or reason is not None:
            skipped.append(SkippedFile(shown, reason or "binary"))
            continue
        total += len(data)
        if total > MAX_TOTAL_BYTES:
            raise DataError(
                f"{folder!r} holds more than {MAX_TOTAL_BYTES >> 20} MiB of text; give a smaller "
                "folder, or leave files out"
            )
        yield PackedFile(shown, _framed(shown, text))


def _decode(data: bytes) -> tuple[str | None, str | None]:
    """Return the text of a file, or why it has none."""
    try:
        if data.startswith(_UTF16_MARKS):
            text = data.decode("utf-16")
        elif b"\0" in data:
            return None, "binary"
        else:
            text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None, "not UTF-8"
    return (text, None) if text.strip() else (None, "empty")


def _framed(path: str, text: str) -> str:
    """Return a file as the prompt shows it; a longer fence keeps fences within the text apart."""
    text = text.replace("\r\n", "\n").strip("\n")
    longest = max((len(run) for run in re.findall(r"^ {0,3}(`{3,})", text, re.M)), default=2)
    fence = "`" * (longest + 1)
    return f"File: {path}\n{fence}\n{text}\n{fence}\n\n"


def _shown(path: str) -> str:
    return "".join(char if char.isprintable() else "\ufffd" for char in path)
