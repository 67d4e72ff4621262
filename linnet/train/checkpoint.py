"""Checkpoints of a run: everything needed to go on as if nothing had happened.

    checkpoints/step_00000500/model/                  a model folder that `linnet.load` reads
                              optimizer.safetensors   moments and step counts
                              state.json              step, tokens, data position, RNG, measurements

A checkpoint is filled under another name and renamed when it is whole and on the disk, so a kill at
any moment leaves the ones before it; the last `keep_last` and the best are kept.
"""

import base64
import json
import shutil
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from linnet.config import build
from linnet.errors import CheckpointError, ConfigError
from linnet.model.config import ModelConfig
from linnet.model.transformer import Model
from linnet.model.weights import read_weights
from linnet.parallel.placement import whole_box
from linnet.storage import atomic_folder
from linnet.train.optim import optimizer_tensors, restore_optimizer
from linnet.train.sharded import is_sharded, load_parts


@dataclass(kw_only=True)
class Progress:
    """Where a run stands; the mutable part of it that is neither weights nor moments."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    """Steps discarded for a non-finite loss or gradient, in all."""
    bits_per_byte: float | None = None
    """Last held-out measurement."""
    expert_load: list = field(default_factory=list)
    """[L, E] slots per token and expert, smoothed over about 50 steps."""
    seconds: float = 0.0
    """Spent training, over all sittings."""
    data: dict = field(default_factory=dict)
    """The loader's state."""
    rng: str = ""
    """torch's CPU generator, base64."""


def save_checkpoint(
    folder: Path,
    model: Model,
    optimizer: torch.optim.AdamW,
    progress: Progress,
    keep_last: int,
) -> Path:
    """Write a checkpoint under `folder` and drop the ones that are no longer wanted.

    Raises:
        CheckpointError: the disk refuses; the checkpoints before are untouched.
    """
    note_random_state(progress)
    target = folder / f"step_{progress.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_folder(target, overwrite=True) as staging:
        model.save(staging / "model")
        tensors = {k: v.contiguous() for k, v in optimizer_tensors(model, optimizer).items()}
        try:
            save_file(tensors, staging / "optimizer.safetensors")
        except SafetensorError as error:
            raise OSError(f"writing optimizer.safetensors failed: {error}") from None
        (staging / "state.json").write_text(json.dumps(asdict(progress), indent=2) + "\n")
    drop_old(folder, keep_last)
    return target


def load_checkpoint(folder: Path, model: Model, optimizer: torch.optim.AdamW) -> Progress:
    """Restore weights, moments and the random generator in place; return where the run stood.

    Raises:
        CheckpointError: a file is missing, damaged or belongs to another model.
    """
    progress = read_progress(folder)
    if is_sharded(folder):
        check_same_model(folder, model.config)
        parameters = dict(model.named_parameters())
        boxes = {name: whole_box(name, tuple(p.shape)) for name, p in parameters.items()}
        load_parts(folder, parameters, boxes, optimizer)
    else:
        check_same_model(folder / "model", model.config)
        read_weights(model, folder / "model")
        _load_moments(folder / "optimizer.safetensors", model, optimizer)
    set_random_state(progress)
    return progress


def _load_moments(file: Path, model: Model, optimizer: torch.optim.AdamW) -> None:
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
    names = {name for name, _ in model.named_parameters()}
    if any(key.split("/", 1)[-1] not in names for key in tensors):
        raise CheckpointError(f"{file} belongs to another model")
    restore_optimizer(model, optimizer, tensors)


def note_random_state(progress: Progress) -> None:
    """Write torch's CPU generator into `progress`."""
    progress.rng = base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode()


def set_random_state(progress: Progress) -> None:
    """Give torch's CPU generator the state that `progress` holds."""
    state = torch.frombuffer(bytearray(base64.b64decode(progress.rng)), dtype=torch.uint8)
    torch.set_rng_state(state)


def check_same_model(folder: Path, config: ModelConfig) -> None:
    """Refuse a folder whose config is another one.

    Raises:
        CheckpointError: names the keys that differ.
    """
    saved = ModelConfig.from_folder(folder)
    keys = [
        key.name for key in fields(config) if getattr(saved, key.name) != getattr(config, key.name)
    ]
    if keys:
        raise CheckpointError(
            f"{folder} is another model than the recipe's: {', '.join(keys)} differ; "
            "change the recipe back, or choose another name"
        )


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints under a folder, oldest first."""
    return sorted(path for path in folder.glob("step_*") if (path / "state.json").is_file())


def read_progress(checkpoint: Path) -> Progress:
    """Read the `state.json` of a checkpoint.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = checkpoint / "state.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return build(Progress, values)
    except (OSError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the fewest held-out bits per byte, if any was measured."""
    measured = [(read_progress(path).bits_per_byte, path) for path in list_checkpoints(folder)]
    known = [(bits, path) for bits, path in measured if bits is not None]
    return min(known)[1] if known else None


def drop_old(folder: Path, keep_last: int) -> None:
    """Delete the checkpoints that are neither among the last nor the best."""
    checkpoints = list_checkpoints(folder)
    kept = {*checkpoints[-keep_last:], best_checkpoint(folder)}
    for path in checkpoints:
        if path not in kept:
            # Renamed first: a half-deleted folder must not look like a checkpoint.
            doomed = path.with_name(f".{path.name}.old")
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    for leftover in folder.glob(".step_*"):
        shutil.rmtree(leftover, ignore_errors=True)
