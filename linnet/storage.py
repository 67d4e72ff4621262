"""Files and folders that appear whole or not at all, whenever the process or the disk gives up."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linnet.errors import CheckpointError


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`; a reader sees the old file or the new one, never a part.

    Raises:
        CheckpointError: the file cannot be written (the old one stays).
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder to fill; on success it becomes `target`, on failure it vanishes.

    Raises:
        CheckpointError: `target` exists and `overwrite` is not set, or the disk refuses.
    """
    target = target.absolute()
    if target.exists() and not overwrite and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists; choose another name or ask to overwrite it")
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in sorted(staging.rglob("*")):
            _sync(path)
        _move_into_place(staging, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot save {target}: {error.strerror or error}; what was there is untouched"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move_into_place(staging: Path, target: Path) -> None:
    previous = None
    if target.exists():
        previous = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        target.rename(previous)
    try:
        staging.rename(target)
    except OSError:
        if previous is not None:
            previous.rename(target)
        raise
    _sync_folder(target.parent)
    if previous is not None:
        shutil.rmtree(previous, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir():
        _sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
