"""The record of a training run: one JSON line per step, and the same numbers for TensorBoard.

`metrics.jsonl` is the source of truth; reports and tests read it back with `read_metrics`. It has
to survive a kill at any moment, so every line is flushed, a torn last line is ignored when reading,
and resuming at step S first rewrites the file without that line and without the steps after S: the
history of a run that was interrupted ten times reads like that of a run that never was.

Names are flat and carry their unit: `train/loss` (nats per token), `eval/bits_per_byte`,
`train/tokens_per_s`, `moe/layer_00/load_max_over_mean`, `memory/rss_bytes`.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from linnet.errors import DataError
from linnet.storage import write_atomic

METRICS_FILE = "metrics.jsonl"

# JSON has no NaN or infinity. They are written as these strings and read back as floats, so that
# the file stays valid for every other reader and a diverged run can still be looked at.
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

_log = logging.getLogger(__name__)


class MetricsWriter:
    """Append metrics to `metrics.jsonl`, and to TensorBoard where it is installed."""

    def __init__(
        self, folder: str | Path, *, tensorboard: bool = True, resume_step: int | None = None
    ) -> None:
        """Open the record of a run.

        Args:
            folder: the run's folder; created when missing.
            tensorboard: also write scalars to `folder/tensorboard`.
            resume_step: the step of the checkpoint that training continues from; later lines are
                dropped. None starts a new history, and keeps an older one that lies in the folder
                as `metrics.previous.jsonl`.

        Raises:
            DataError: the history to resume is damaged before its last line.
            CheckpointError: the history to resume cannot be rewritten.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        earlier_s = 0.0
        if resume_step is not None:
            earlier_s = _truncate(path, resume_step)
        elif path.exists():
            path.replace(folder / "metrics.previous.jsonl")
        # Time spent before the interruption counts, the time between does not.
        self._start_s = time.monotonic() - earlier_s
        self._file = path.open("a", encoding="utf-8")
        first_step = 0 if resume_step is None else resume_step + 1
        self._tensorboard = _open_tensorboard(folder, first_step) if tensorboard else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics` for `step`.

        Args:
            step: the optimizer step that the numbers belong to.
            metrics: flat names such as `train/loss`; anything that `float()` accepts.

        Raises:
            ValueError: a metric is named `step` or `time_s`, which every line has already.
        """
        values = {name: float(value) for name, value in metrics.items()}
        if reserved := {"step", "time_s"} & values.keys():
            raise ValueError(f"metric name {min(reserved)!r} is taken; use a name like train/loss")
        time_s = round(time.monotonic() - self._start_s, 3)
        line = {"step": int(step), "time_s": time_s}
        line |= {name: _encode(value) for name, value in values.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in values.items():
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the files; closing twice is allowed."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(folder: str | Path) -> list[dict[str, float]]:
    """Return the lines of a run's `metrics.jsonl`, oldest first; empty when there is none.

    Args:
        folder: the run's folder.

    Returns:
        One mapping per line, with `step` (int), `time_s` and the metrics of that step. A last line
        that was torn by a kill is left out.

    Raises:
        DataError: a line other than the last is not a JSON object.
    """
    path = Path(folder) / METRICS_FILE
    if not path.exists():
        return []
    # A kill can tear a line inside a character, hence bytes: only the last line may fail to decode.
    lines = path.read_bytes().split(b"\n")
    last = max((number for number, line in enumerate(lines) if line.strip()), default=-1)
    rows = []
    for number, line in enumerate(lines[: last + 1]):
        try:
            rows.append(_decode(line))
        except (ValueError, KeyError):
            if number == last:
                break
            raise DataError(
                f"{path} line {number + 1} is not a metrics line; delete that line to go on"
            ) from None
    return rows


def _truncate(path: Path, last_step: int) -> float:
    """Drop a torn line and the steps after `last_step`; return the time of the last line kept."""
    rows = [row for row in read_metrics(path.parent) if row["step"] <= last_step]
    lines = [{name: _encode(value) for name, value in row.items()} for row in rows]
    write_atomic(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))
    return rows[-1]["time_s"] if rows else 0.0


def _encode(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _decode(line: bytes) -> dict[str, float]:
    row = json.loads(line)
    if not isinstance(row, dict) or not {"step", "time_s"} <= row.keys():
        raise ValueError("not a metrics line")
    return {
        name: _NON_FINITE[value] if isinstance(value, str) else value for name, value in row.items()
    }


def _open_tensorboard(folder: Path, first_step: int) -> Any:  # SummaryWriter has no stubs
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        _log.warning(
            "tensorboard is not installed; metrics go to %s only (pip install 'linnet[train]')",
            METRICS_FILE,
        )
        return None
    # purge_step hides what an interrupted or earlier run wrote from this step on.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)
