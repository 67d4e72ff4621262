"""Checkpoints of many ranks, written in the background, and the finished model."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from linnet.errors import CheckpointError
from linnet.parallel.apply import ParallelModel
from linnet.parallel.checkpoint import SavedParts, Writing, save_parts
from linnet.parallel.export import export_files
from linnet.parallel.filling import FromFolder
from linnet.storage import publish_folder
from linnet.text import Tokenizer
from linnet.train.checkpoint import (
    Progress,
    check_same_model,
    drop_old,
    note_random_state,
    read_progress,
    set_random_state,
)
from linnet.train.sharded import SHARDED, is_sharded, load_moments_of_one, load_parts, parts_of


class _Saving(NamedTuple):
    """A checkpoint that is being written."""

    files: Writing
    staging: Path
    target: Path
    keep_last: int


class RankFiles:
    """What a rank writes and reads; folders appear under their names when they are whole.

    Args:
        parallel: the model.
        optimizer: of its parameters.
        group: all ranks, used for nothing else while a checkpoint is written.
    """

    def __init__(
        self, parallel: ParallelModel, optimizer: torch.optim.AdamW, group: dist.ProcessGroup
    ) -> None:
        self.parallel, self.optimizer, self._group = parallel, optimizer, group
        self._is_main = dist.get_rank(group) == 0
        self._saving: _Saving | None = None

    def save(self, folder: Path, progress: Progress, keep_last: int) -> None:
        """Begin to write a checkpoint; the one before must have its name first."""
        self.finish_saving()
        note_random_state(progress)
        target = folder / f"step_{progress.step:08d}"
        staging = folder / f".{target.name}.tmp"
        if self._is_main:
            shutil.rmtree(staging, ignore_errors=True)
            (staging / SHARDED).mkdir(parents=True)
            (staging / "config.json").write_text(json.dumps(self.parallel.config.to_dict()) + "\n")
            state = json.dumps(dataclasses.asdict(progress), indent=2) + "\n"
            (staging / "state.json").write_text(state)
        dist.barrier(self._group)
        parts = parts_of(self.parallel.parameters, self.parallel.boxes, self.optimizer)
        files = save_parts(staging / SHARDED, parts, self._group)
        self._saving = _Saving(files, staging, target, keep_last)

    def is_saving(self) -> bool:
        """Return whether a checkpoint has no name yet, the same on all ranks."""
        return self._saving is not None

    def is_written(self) -> bool:
        """Return whether this rank knows that its files are written, or cannot be."""
        return self._saving is not None and self._saving.files.done()

    def finish_saving(self) -> None:
        """Give a checkpoint its name when it is written."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.files.wait()
        if self._is_main:
            try:
                publish_folder(saving.staging, saving.target)
                drop_old(saving.target.parent, saving.keep_last)
            except OSError as error:
                raise CheckpointError(f"cannot save {saving.target}: {error}") from None

    @torch.no_grad()
    def load(self, checkpoint: Path) -> Progress:
        """Go on from a checkpoint, of any number of processes."""
        progress = read_progress(checkpoint)
        parameters, boxes = self.parallel.parameters, self.parallel.boxes
        if is_sharded(checkpoint):
            check_same_model(checkpoint, self.parallel.config)
            load_parts(checkpoint, parameters, boxes, self.optimizer)
        else:
            check_same_model(checkpoint / "model", self.parallel.config)
            for _, tensors in FromFolder(checkpoint / "model").parts(self.parallel.config, boxes):
                for name, tensor in tensors.items():
                    self.parallel.local(name).copy_(tensor)
            file = checkpoint / "optimizer.safetensors"
            load_moments_of_one(file, parameters, boxes, self.optimizer)
        set_random_state(progress)
        return progress

    def export(self, folder: Path, tokenizer: Tokenizer) -> None:
        """Write the finished model: each rank some of its files, from parts on disk."""
        self.finish_saving()
        staging = folder.with_name(f".{folder.name}.tmp")
        parts = folder.with_name(f".{folder.name}.parts")
        if self._is_main:
            for path in (staging, parts):
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)
        dist.barrier(self._group)
        weights = parts_of(self.parallel.parameters, self.parallel.boxes, self.optimizer)
        weights = {name: part for name, part in weights.items() if name.startswith("model/")}
        save_parts(parts, weights, self._group).wait()
        rank, size = dist.get_rank(), dist.get_world_size()
        export_files(SavedParts(parts), self.parallel.config, staging, torch.float32, rank, size)
        dist.barrier(self._group)
        if self._is_main:
            tokenizer.save(staging)
            publish_folder(staging, folder)
            shutil.rmtree(staging, ignore_errors=True)
            shutil.rmtree(parts, ignore_errors=True)
        dist.barrier(self._group)
