"""Prefixes on disk: written in the background, found again after a restart, bounded in bytes.

Files belong to one model: they lie in a folder named by a fingerprint of its config and weights.
A file appears whole or not at all, and one that cannot be read is deleted and computed again.
"""

import hashlib
import json
import logging
import os
import queue
import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from linnet.errors import CheckpointError
from linnet.infer.ranks import Memory
from linnet.model.paged import PAGE_SIZE, Extract, Row, pages_of
from linnet.model.transformer import Model
from linnet.storage import write_atomic

FORMAT = 1
"""Version of the files, part of the fingerprint."""

MAX_UNWRITTEN = 4
"""Prefixes that may wait for the disk; more are not kept there."""

_log = logging.getLogger(__name__)


class Spill:
    """The prefixes of one model in a folder.

    Args:
        folder: made if needed; other models' prefixes may lie beside.
        model: whose prefixes these are.
        max_bytes: the least recently used files beyond that are deleted.

    Raises:
        OSError: the folder cannot be made or read.
    """

    def __init__(self, folder: Path, model: Model, max_bytes: int) -> None:
        self._folder = folder / fingerprint(model)
        self._folder.mkdir(parents=True, exist_ok=True)
        for left_over in self._folder.glob(".*.tmp"):
            left_over.unlink(missing_ok=True)
        self._max_bytes = max_bytes
        self._sizes: dict[str, int] = {}
        """Bytes of each file, the least recently used first."""
        self._lengths: Counter[int] = Counter()
        files = [path for path in self._folder.iterdir() if _length_of(path.name) is not None]
        for path in sorted(files, key=lambda path: path.stat().st_mtime):
            self._note(path.name, path.stat().st_size)
        self._unwritten: set[str] = set()
        """Names that wait for the disk."""
        self._lock = threading.Lock()
        self._work: queue.Queue[tuple[str, Extract] | None] = queue.Queue(MAX_UNWRITTEN)
        self._writer = threading.Thread(target=self._write_all, name="linnet-spill", daemon=True)
        self._writer.start()

    def lengths(self) -> Iterable[int]:
        """Return the lengths of which there are prefixes."""
        with self._lock:
            return list(self._lengths)

    def has(self, length: int, digest: bytes) -> bool:
        """Return whether a prefix is there."""
        return _name(length, digest) in self._sizes

    def store(self, digest: bytes, row: Row, memory: Memory) -> None:
        """Copy what a row has, and write it in the background, unless the disk is far behind."""
        name = _name(row.length, digest)
        if name in self._sizes or name in self._unwritten or self._work.full():
            return
        self._unwritten.add(name)
        with suppress(queue.Full):
            self._work.put_nowait((name, memory.take_out(row)))

    def load(self, length: int, digest: bytes) -> Extract | None:
        """Read a prefix; None if it is gone or damaged."""
        name = _name(length, digest)
        path = self._folder / name
        try:
            extract = _read(path, length)
            os.utime(path)
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            _log.warning("the cached prefix %s cannot be read and is dropped: %s", path, error)
            with self._lock:
                self._forget(name)
            return None
        with self._lock:
            if name in self._sizes:
                self._sizes[name] = self._sizes.pop(name)
        return extract

    def close(self) -> None:
        """Write what waits, and end."""
        self._work.put(None)
        self._writer.join()

    def _write_all(self) -> None:
        while (item := self._work.get()) is not None:
            name, extract = item
            self._unwritten.discard(name)
            tensors = {}
            for kind in ("states", "keys", "values"):
                for n, tensor in enumerate(getattr(extract, kind)):
                    own = tensor if kind == "states" else tensor[: extract.length]
                    tensors[f"{kind}.{n}"] = own.cpu().contiguous()
            content = save(tensors)
            try:
                write_atomic(self._folder / name, content)
            except CheckpointError as error:
                _log.warning("a prefix is not kept on disk: %s", error)
                continue
            with self._lock:
                self._note(name, len(content))
                self._trim()

    def _note(self, name: str, size: int) -> None:
        if name not in self._sizes:
            self._lengths[_length_of(name) or 0] += 1
        self._sizes[name] = size

    def _trim(self) -> None:
        total = sum(self._sizes.values())
        for name in list(self._sizes):
            if total <= self._max_bytes:
                return
            total -= self._sizes[name]
            self._forget(name)

    def _forget(self, name: str) -> None:
        if self._sizes.pop(name, None) is not None:
            length = _length_of(name) or 0
            self._lengths[length] -= 1
            if not self._lengths[length]:
                del self._lengths[length]
        with suppress(OSError):
            (self._folder / name).unlink()


def fingerprint(model: Model) -> str:
    """Return a name that two models share only if they compute the same.

    Of large tensors only the ends and the middle are looked at.
    """
    hasher = hashlib.sha256()
    facts = {"format": FORMAT, "dtype": str(model.compute_dtype), "config": asdict(model.config)}
    hasher.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        middle = flat.shape[0] // 2
        for part in (flat[:512], flat[middle : middle + 512], flat[-512:]):
            hasher.update(part.contiguous().view(torch.uint8).cpu().numpy().tobytes())
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    return hasher.hexdigest()[:32]


def _name(length: int, digest: bytes) -> str:
    return f"{length}-{digest.hex()}.safetensors"


def _length_of(name: str) -> int | None:
    length, dash, rest = name.partition("-")
    is_ours = dash and length.isdecimal() and rest.endswith(".safetensors")
    return int(length) if is_ours else None


def _read(path: Path, length: int) -> Extract:
    parts: dict[str, list[torch.Tensor]] = {"states": [], "keys": [], "values": []}
    with safe_open(path, "pt") as file:
        names = sorted(file.keys(), key=lambda name: int(name.partition(".")[2]))
        for name in names:
            parts[name.partition(".")[0]].append(file.get_tensor(name))
    room = pages_of(length) * PAGE_SIZE - length
    for kind in ("keys", "values"):
        if any(len(tensor) != length for tensor in parts[kind]):
            raise ValueError(f"it does not hold {length} tokens")
        parts[kind] = [
            torch.nn.functional.pad(tensor, (0, 0, 0, 0, 0, room)) for tensor in parts[kind]
        ]
    return Extract(length, *(tuple(parts[kind]) for kind in ("states", "keys", "values")))
