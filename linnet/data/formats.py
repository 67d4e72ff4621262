"""Reading the texts of one file, whatever its format, without holding more than one in memory."""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

from linnet.errors import DataError

PLAIN = (".txt", ".py", ".md", ".rst", ".txt.gz")
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
EXTENSIONS = PLAIN + JSON_LINES + PARQUET


def suffix_of(path: Path) -> str | None:
    """Return the supported extension that `path` ends with, the longest one, or None."""
    matching = [suffix for suffix in EXTENSIONS if path.name.lower().endswith(suffix)]
    return max(matching, key=len, default=None)


def read_texts(path: Path, text_field: str) -> Iterator[tuple[int | None, str]]:
    """Yield the record number (None for a file that is one text) and text of each record.

    Raises:
        UnicodeDecodeError: a plain text file is not UTF-8.
        DataError: the file is damaged, unreadable or lacks `text_field`.
    """
    suffix = suffix_of(path)
    try:
        if suffix in PARQUET:
            yield from _read_parquet(path, text_field)
        elif suffix in JSON_LINES:
            yield from _read_json_lines(path, text_field)
        else:
            with _open(path) as file:
                yield None, file.read().decode("utf-8")
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}; replace or remove it") from None


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else open(path, "rb")


def _read_json_lines(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    if path.name.lower().endswith(".zst"):
        yield from _read_zstandard_lines(path, text_field)
        return
    with _open(path) as file:
        yield from _parse_lines(path, file, text_field)


def _read_zstandard_lines(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{str(path)!r} needs zstandard; pip install 'linnet[data]'") from None
    try:
        with open(path, "rb") as packed:
            reader = zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True)
            yield from _parse_lines(path, io.BufferedReader(reader), text_field)
    except zstandard.ZstdError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}; replace or remove it") from None


def _parse_lines(
    path: Path, lines: io.BufferedIOBase, text_field: str
) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{str(path)!r} line {number} is not JSON: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{str(path)!r} line {number} has no text field {text_field!r}; found: {keys}; "
                "set text_field"
            )
        yield number, record[text_field]


def _read_parquet(path: Path, text_field: str) -> Iterator[tuple[int, str]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{str(path)!r} needs pyarrow; pip install 'linnet[data]'") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        column = (
            file.schema_arrow.field(text_field) if text_field in file.schema_arrow.names else None
        )
        if column is None or not (
            pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
        ):
            raise DataError(
                f"{str(path)!r} has no text column {text_field!r}; found: "
                f"{', '.join(file.schema_arrow.names)}; set text_field"
            )
        row = 0
        for batch in file.iter_batches(batch_size=256, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield row, text or ""
                row += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{str(path)!r} is not a readable parquet file: {error}") from None
