"""Token shards: a corpus tokenized once, then read from memory-mapped files.

A store is a folder with token files, document boundaries and an index that says what they were
made from. It is built under another name and renamed when complete, so a killed build leaves
nothing that could be taken for whole; a file lock lets one process build while others wait.
"""

import fcntl
import json
import logging
import os
import shutil
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from rich.console import Console
from rich.progress import (
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from linnet.data.sources import Document, Source, Split
from linnet.errors import DataError
from linnet.text import Tokenizer

log = logging.getLogger(__name__)

INDEX = "index.json"
VERSION = 1
OFFSETS = "offsets.npy"
DOCUMENT_BYTES = "document_bytes.npy"
BATCH_BYTES = 2**20  # texts tokenized at once: enough for all cores, little to hold


class TokenStore:
    """Tokenized documents on disk, opened for reading.

    Attributes:
        fingerprint: what the store was made from: tokenizer, source and split.
        num_documents: number of documents.
        num_tokens: tokens of all documents, their begin and end tokens included.
        num_bytes: UTF-8 bytes of all texts.
        offsets: [num_documents + 1] int64, where each document starts in the stream of all tokens.
        document_bytes: [num_documents] int64, UTF-8 bytes of each text.
    """

    def __init__(self, folder: str | Path):
        """Open a store.

        Raises:
            DataError: the folder is no store, or one of its files is missing or truncated.
        """
        self.folder = Path(folder)
        index = _read_index(self.folder)
        dtype = np.dtype(index["dtype"])
        num_documents = index["num_documents"]
        self.fingerprint: str = index["fingerprint"]
        self.num_documents: int = num_documents
        self.num_tokens: int = index["num_tokens"]
        self.num_bytes: int = index["num_bytes"]
        self.offsets = _load_array(self.folder / OFFSETS, num_documents + 1)
        self.document_bytes = _load_array(self.folder / DOCUMENT_BYTES, num_documents)
        self._shards = [
            _map_shard(self.folder / name, dtype, num_tokens)
            for name, num_tokens in index["shards"]
        ]
        lengths = [num_tokens for _, num_tokens in index["shards"]]
        self._shard_starts = np.cumsum([0, *lengths[:-1]], dtype=np.int64)

    def document(self, index: int) -> np.ndarray:
        """Return the tokens of one document, [L] in the store's integer type."""
        return self.slice(index, 0, int(self.offsets[index + 1] - self.offsets[index]))

    def slice(self, document: int, start: int, stop: int) -> np.ndarray:
        """Return tokens `start` to `stop` of one document, a view of the file."""
        first = int(self.offsets[document])
        shard = int(np.searchsorted(self._shard_starts, first, side="right")) - 1
        first -= int(self._shard_starts[shard])
        return self._shards[shard][first + start : first + stop]

    def take(self, positions: np.ndarray) -> np.ndarray:
        """Return the tokens at [T] int64 positions of the stream of all tokens, as [T] int64."""
        tokens = np.empty(len(positions), dtype=np.int64)
        shards = np.searchsorted(self._shard_starts, positions, side="right") - 1
        for shard in np.flatnonzero(np.bincount(shards)):
            here = shards == shard
            tokens[here] = self._shards[shard][positions[here] - self._shard_starts[shard]]
        return tokens


def tokenize_source(
    source: Source,
    split: Split,
    tokenizer: Tokenizer,
    folder: str | Path,
    shard_tokens: int = 64 * 2**20,
    progress: bool = False,
) -> TokenStore:
    """Tokenize one split of a source into `folder/split`, or open what is already there.

    Every document is stored as its begin token, its text and its end token. A store made from
    other files or another tokenizer is built anew.

    Args:
        source: the corpus.
        split: which part of it.
        tokenizer: has tokens for the begin and end of a document.
        folder: the folder that holds a store per split.
        shard_tokens: tokens after which a new file begins; a document is never cut.
        progress: show a progress bar on standard error.

    Raises:
        DataError: the source or an existing store is damaged, or the tokenizer lacks the tokens.
    """
    if tokenizer.begin_of_document_id is None or tokenizer.end_of_document_id is None:
        raise DataError(
            "the tokenizer has no <begin_of_document> and <end_of_document> (or <|endoftext|>); "
            "add them before tokenizing documents"
        )
    target = Path(folder) / split
    target.parent.mkdir(parents=True, exist_ok=True)
    fingerprint = f"{source.fingerprint}-{split}-{tokenizer.fingerprint}"
    with _locked(target.with_name(f".{split}.lock")):
        # Opening it also makes sure that what will be replaced is a store, not any folder.
        if target.exists():
            store = TokenStore(target)
            if store.fingerprint == fingerprint:
                return store
            log.info("%s was made from other files or another tokenizer; building it anew", target)
        building, outdated = (target.with_name(f".{split}.{what}") for what in ("building", "old"))
        for leftover in (building, outdated):
            shutil.rmtree(leftover, ignore_errors=True)
        building.mkdir()
        with _Writer(building, tokenizer, shard_tokens) as writer:
            for documents in _batches(source.documents(split), progress):
                writer.add(documents)
        writer.finish(fingerprint, source.spec)
        _sync_folder(building)
        if target.exists():
            os.replace(target, outdated)
        os.replace(building, target)
        _sync_folder(target.parent)
        shutil.rmtree(outdated, ignore_errors=True)
    return TokenStore(target)


class _Writer:
    """Writes the files of a store; the index comes last."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int):
        self._folder = folder
        self._tokenizer = tokenizer
        self._shard_tokens = shard_tokens
        self._dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
        self._shards: list[list[Any]] = []  # Any: [file name, number of tokens], as in the index
        self._file: IO[bytes] | None = None
        self._offsets = array("q", [0])
        self._bytes = array("q")

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._close_shard()

    def add(self, documents: list[Document]) -> None:
        first, last = self._tokenizer.begin_of_document_id, self._tokenizer.end_of_document_id
        encoded = self._tokenizer.encode_batch([document.text for document in documents])
        for document, ids in zip(documents, encoded, strict=True):
            file = self._shard_with_room()
            np.array([first, *ids, last], dtype=self._dtype).tofile(file)
            self._shards[-1][1] += len(ids) + 2
            self._offsets.append(self._offsets[-1] + len(ids) + 2)
            self._bytes.append(len(document.text.encode("utf-8", "surrogatepass")))

    def finish(self, fingerprint: str, spec: str) -> None:
        for name, values in ((OFFSETS, self._offsets), (DOCUMENT_BYTES, self._bytes)):
            with open(self._folder / name, "wb") as file:
                np.save(file, np.array(values, dtype=np.int64))
                _sync(file)
        index = {
            "version": VERSION,
            "fingerprint": fingerprint,
            "source": spec,
            "dtype": self._dtype.name,
            "num_documents": len(self._bytes),
            "num_tokens": self._offsets[-1],
            "num_bytes": sum(self._bytes),
            "shards": self._shards,
        }
        with open(self._folder / INDEX, "wb") as file:
            file.write(json.dumps(index, indent=2).encode())
            _sync(file)

    def _shard_with_room(self) -> IO[bytes]:
        if self._file is None or self._shards[-1][1] >= self._shard_tokens:
            self._close_shard()
            name = f"tokens-{len(self._shards):05d}.bin"
            self._file = open(self._folder / name, "wb")  # noqa: SIM115 - closed by _close_shard
            self._shards.append([name, 0])
        return self._file

    def _close_shard(self) -> None:
        if self._file is not None:
            _sync(self._file)
            self._file.close()
            self._file = None


def _batches(documents: Iterable[Document], progress: bool) -> Iterator[list[Document]]:
    columns = (
        SpinnerColumn(),
        TextColumn("tokenizing"),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("{task.fields[documents]} documents"),
        TimeElapsedColumn(),
    )
    batch: list[Document] = []
    num_bytes = done = 0
    with Progress(*columns, console=Console(stderr=True), disable=not progress) as bar:
        task = bar.add_task("", total=None, documents=0)
        for document in documents:
            batch.append(document)
            num_bytes += len(document.text.encode("utf-8", "surrogatepass"))
            if num_bytes >= BATCH_BYTES:
                yield batch
                done += len(batch)
                bar.update(task, advance=num_bytes, documents=done)
                batch, num_bytes = [], 0
        yield batch
        bar.update(task, advance=num_bytes, documents=done + len(batch))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The lock goes with the process, so a killed build never blocks the next one.
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _read_index(folder: Path) -> dict[str, Any]:  # Any: a JSON file
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(
            f"{str(folder)!r} has no {INDEX}: it is not a token store; name another folder"
        ) from None
    except ValueError as error:
        raise DataError(
            f"{str(path)!r} is damaged ({error}); delete {str(folder)!r} to build it again"
        ) from None
    version = index.get("version") if isinstance(index, dict) else None
    if version != VERSION:
        raise DataError(
            f"{str(path)!r} has version {version!r}; expected {VERSION}; delete {str(folder)!r} if "
            "it is a token store, or name another folder"
        )
    return index


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.exists() else None
    if found != expected:
        what = "is missing" if found is None else f"has {found} bytes"
        raise DataError(
            f"{str(path)!r} {what}; expected {expected} bytes; delete {str(path.parent)!r} to "
            "build it again"
        )


def _map_shard(path: Path, dtype: np.dtype, num_tokens: int) -> np.ndarray:
    _check_size(path, num_tokens * dtype.itemsize)
    return np.memmap(path, dtype=dtype, mode="r", shape=(num_tokens,))


def _load_array(path: Path, length: int) -> np.ndarray:
    _check_size(path, 128 + 8 * length)  # NumPy's header of a one-dimensional array has 128 bytes
    return np.load(path, mmap_mode="r")
