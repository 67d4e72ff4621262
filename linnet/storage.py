"""Files and folders that appear whole or not at all, whenever the process or the disk gives up."""

import ctypes
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder to fill; on success it becomes `target`, on failure it vanishes.

    Args:
        target: where the folder goes; where it points, if it is a link.
        overwrite: whether a folder that is there may be replaced, with all that it holds.

    Raises:
        CheckpointError: `target` exists and may not be replaced, or the disk refuses.
    """
    target = target.resolve()
    if target.exists() and not target.is_dir():
        raise CheckpointError(f"{target} is a file; choose another name for the folder")
    if target.exists() and not overwrite and any(target.iterdir()):
        raise CheckpointError(f"{target} exists; choose another name or ask to overwrite it")
    staging = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
        publish_folder(staging, target)
    except (OSError, CheckpointError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise CheckpointError(
            f"cannot save {target}: {reason}; what was there is untouched"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def publish_folder(staging: Path, target: Path) -> None:
    """Bring a filled folder to the disk and give it its name, in one step where the system can.

    Args:
        staging: beside `target`.
        target: replaced if it is there.

    Raises:
        OSError: the disk refuses.
    """
    for path in sorted(staging.rglob("*")):
        _sync(path)
    _move_into_place(staging, target)


def _move_into_place(staging: Path, target: Path) -> None:
    """Make `staging` the folder `target`; what was there is left in `staging` or deleted."""
    if not target.exists():
        staging.rename(target)
    elif not _exchange(staging, target):
        # In two steps: a kill between them leaves the old folder under its `.old` name.
        previous = staging.with_suffix(".old")
        target.rename(previous)
        try:
            staging.rename(target)
        except OSError:
            previous.rename(target)
            raise
        shutil.rmtree(previous, ignore_errors=True)
    _sync_folder(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step, where system and file system can; return whether they did."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # Linux
    if rename is None:
        return False
    working_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    paths = working_folder, os.fsencode(one), working_folder, os.fsencode(other)
    return rename(*paths, exchange) == 0


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
