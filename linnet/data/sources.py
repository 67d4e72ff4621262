"""Where documents come from: files, folders, globs, or Python's own standard library.

A source streams documents in one fixed order and keeps a held-out part apart by the hash of each
text, so a file keeps its side when it moves, and a copy can never be on both.
"""

import glob
import hashlib
import itertools
import logging
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from linnet.data.formats import EXTENSIONS, read_texts, suffix_of
from linnet.errors import ConfigError, DataError

log = logging.getLogger(__name__)

Split = Literal["train", "held_out"]
SMALL_CORPUS = 64
"""Documents below which the held-out part is chosen by count, not by a threshold of the hash."""

SKIPPED_FOLDERS = frozenset({"__pycache__", "dist-packages", "site-packages"})


@dataclass(frozen=True)
class Document:
    """One text and where it came from.

    Attributes:
        name: the file's path below its root, with the record's number where a file holds many.
        text: the whole text.
    """

    name: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Source:
    """A corpus, made by `open_source`.

    Attributes:
        spec: how the user named it.
        files: pairs of a name and a path, sorted by name.
        text_field: the JSON key or parquet column that holds a text.
        held_out: fraction of documents kept from training.
    """

    spec: str
    files: tuple[tuple[str, Path], ...]
    text_field: str = "text"
    held_out: float = 0.05

    def documents(self, split: Split) -> Iterator[Document]:
        """Yield the distinct, non-empty documents of one split, in sorted order of files.

        Raises:
            DataError: a file is damaged, or the split turns out empty.
        """
        if split not in ("train", "held_out"):
            raise ConfigError(f"split is {split!r}; expected 'train' or 'held_out'")
        first = list(itertools.islice(self._distinct(), SMALL_CORPUS))
        if not first:
            raise DataError(f"{self.spec!r} holds no text: {len(self.files)} files, all empty")
        if len(first) < SMALL_CORPUS:
            chosen = iter(_split_small([document for _, document in first], self.held_out)[split])
        else:
            chosen = (d for digest, d in self._distinct() if self._side(digest) == split)
        document = next(chosen, None)
        if document is None:
            raise DataError(
                f"the {split} part of {self.spec!r} is empty with held_out={self.held_out}; "
                "change held_out or give more documents"
            )
        yield document
        yield from chosen

    @property
    def fingerprint(self) -> str:
        """Short hash of the file names, sizes and times, and of how they are read and split."""
        facts = [(name, path.stat().st_size, path.stat().st_mtime_ns) for name, path in self.files]
        content = repr((self.text_field, self.held_out, facts))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def _distinct(self) -> Iterator[tuple[bytes, Document]]:
        """Yield each different text once, with its hash."""
        seen: set[bytes] = set()
        for document in self._read():
            digest = _digest(document)
            if digest not in seen:
                seen.add(digest)
                yield digest, document

    def _side(self, digest: bytes) -> Split:
        is_held_out = int.from_bytes(digest[:8]) < self.held_out * 2**64
        return "held_out" if is_held_out else "train"

    def _read(self) -> Iterator[Document]:
        undecodable: list[str] = []
        for name, path in self.files:
            try:
                for record, text in read_texts(path, self.text_field):
                    if text:
                        yield Document(name if record is None else f"{name}:{record}", text)
            except UnicodeDecodeError:
                undecodable.append(name)
        if not undecodable:
            return
        found = f"{len(undecodable)} of {len(self.files)} files are not UTF-8"
        if len(undecodable) == len(self.files):
            raise DataError(f"{self.spec!r}: {found}; convert them first (for example with iconv)")
        # The standard library has a few such files on purpose, as test fixtures.
        level = logging.INFO if self.spec == "stdlib" else logging.WARNING
        log.log(level, "%s: %s and are skipped, first %s", self.spec, found, undecodable[0])


def open_source(spec: str, text_field: str = "text", held_out: float = 0.05) -> Source:
    """Find the files of a corpus; nothing is read yet.

    Args:
        spec: `stdlib` (the Python standard library of this interpreter), or a file, a folder (with
            its subfolders, hidden ones left out), a glob, or several of these separated by commas.
        text_field: the JSON key or parquet column that holds a text.
        held_out: fraction of documents, in [0, 1), kept from training.

    Raises:
        ConfigError: `held_out` is not a fraction.
        DataError: a path is missing, or no file has a supported extension.
    """
    if not 0 <= held_out < 1:
        raise ConfigError(f"held_out is {held_out}; expected a fraction in [0, 1)")
    parts = [spec] if os.path.exists(spec) else [part.strip() for part in spec.split(",")]
    found: dict[Path, str] = {}
    for part in parts:
        for name, path in _stdlib_files() if part == "stdlib" else _find_files(part):
            found.setdefault(path.resolve(), name)
    files = tuple(sorted((name, path) for path, name in found.items()))
    return Source(spec=spec, files=files, text_field=text_field, held_out=held_out)


def _digest(document: Document) -> bytes:
    return hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()


def _split_small(documents: list[Document], held_out: float) -> dict[Split, list[Document]]:
    """Split a corpus too small for chance: both sides get something if `held_out` is above 0.

    A single document is cut before its end; of several, those with the smallest hashes are held
    out.
    """
    if held_out == 0:
        return {"train": documents, "held_out": []}
    if len(documents) > 1:
        by_hash = sorted(documents, key=_digest)
        num_held_out = min(max(1, round(held_out * len(documents))), len(documents) - 1)
        held = set(map(id, by_hash[:num_held_out]))
        return {
            "train": [d for d in documents if id(d) not in held],
            "held_out": [d for d in documents if id(d) in held],
        }
    (only,) = documents
    cut = only.text.rfind("\n", 0, int(len(only.text) * (1 - held_out))) + 1
    cut = cut or int(len(only.text) * (1 - held_out))
    parts = (Document(only.name, only.text[:cut]), Document(f"{only.name} (end)", only.text[cut:]))
    return {"train": [p for p in parts[:1] if p.text], "held_out": [p for p in parts[1:] if p.text]}


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = ((path.relative_to(root), path) for path in root.rglob("*.py"))
    return [
        (name.as_posix(), path) for name, path in paths if SKIPPED_FOLDERS.isdisjoint(name.parts)
    ]


def _find_files(part: str) -> list[tuple[str, Path]]:
    if not part:
        raise DataError("a data source is empty; give a file, folder or glob")
    path = Path(part).expanduser()
    if path.is_dir():
        inside = ((item.relative_to(path), item) for item in path.rglob("*") if suffix_of(item))
        files = [
            (name.as_posix(), item)
            for name, item in inside
            if item.is_file() and not any(part.startswith(".") for part in name.parts)
        ]
    elif path.is_file():
        files = [(path.name, path)] if suffix_of(path) else []
    else:
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
        if not matches:
            raise DataError(f"data source {part!r} does not exist; give a file, folder or glob")
        files = [(item.as_posix(), item) for item in matches if item.is_file() and suffix_of(item)]
    if not files:
        raise DataError(f"no usable file in {part!r}; supported: {', '.join(EXTENSIONS)}")
    return files
