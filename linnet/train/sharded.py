"""Checkpoints of many ranks, and the ways between them and those of one process.

checkpoints/step_00000500/sharded/*.safetensors   model/<name>, exp_avg/<name>, exp_avg_sq/<name>
                          config.json             of the model
                          state.json              as in the checkpoints of one process
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from linnet.errors import CheckpointError
from linnet.parallel.apply import local_part
from linnet.parallel.checkpoint import SavedParts
from linnet.parallel.export import PREFIX
from linnet.parallel.placement import Box

SHARDED = "sharded"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"

Named = Mapping[str, nn.Parameter]
Boxes = Mapping[str, Box]


def is_sharded(checkpoint: Path) -> bool:
    """Return whether many ranks wrote it."""
    return (checkpoint / SHARDED).is_dir()


def parts_of(
    parameters: Named, boxes: Boxes, optimizer: torch.optim.AdamW
) -> dict[str, tuple[Tensor, Box]]:
    """Return this rank's weights and moments, by name in a checkpoint, and where they lie.

    Args:
        parameters: by name, sharded or not.
        boxes: by name.
        optimizer: of the parameters; without moments before its first step.
    """
    parts = {}
    for name, parameter in parameters.items():
        box, state = boxes[name], optimizer.state.get(parameter, {})
        parts[PREFIX + name] = (local_part(parameter.detach()).view(box.size), box)
        for key in MOMENTS:
            if key in state:
                parts[f"{key}/{name}"] = (local_part(state[key]).view(box.size), box)
    steps = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    if steps:
        parts[STEP] = (torch.tensor(steps[:1]), Box.of_whole((1,)))
    return parts


@torch.no_grad()
def load_parts(
    checkpoint: Path, parameters: Named, boxes: Boxes, optimizer: torch.optim.AdamW
) -> None:
    """Fill this rank's weights and moments from a sharded checkpoint.

    Raises:
        CheckpointError: it is damaged or of another model.
    """
    saved = SavedParts(checkpoint / SHARDED)
    if STEP in saved.names:
        step = torch.zeros(1)
        saved.read({STEP: (step, Box.of_whole((1,)))})
        begin_moments(parameters, optimizer, float(step))
    saved.read({n: part for n, part in parts_of(parameters, boxes, optimizer).items() if n != STEP})


def begin_moments(parameters: Named, optimizer: torch.optim.AdamW, step: float) -> None:
    """Give every parameter the moments that it has after a number of steps, to be filled."""
    for parameter in parameters.values():
        moments = {key: torch.zeros_like(parameter) for key in MOMENTS}
        optimizer.state[parameter] = {"step": torch.tensor(step), **moments}


@torch.no_grad()
def load_moments_of_one(
    file: Path, parameters: Named, boxes: Boxes, optimizer: torch.optim.AdamW
) -> None:
    """Fill this rank's moments from the `optimizer.safetensors` of one process.

    Raises:
        CheckpointError: it is damaged or of another model.
    """
    try:
        with safe_open(file, framework="pt") as saved:
            names = set(saved.keys())
            steps = [name for name in names if name.startswith("step/")]
            if not steps:
                return
            begin_moments(parameters, optimizer, float(saved.get_tensor(steps[0])))
            for name, parameter in parameters.items():
                for key in MOMENTS:
                    if f"{key}/{name}" not in names:
                        raise CheckpointError(f"{file} belongs to another model: no {key}/{name}")
                    whole = saved.get_tensor(f"{key}/{name}")
                    part = local_part(optimizer.state[parameter][key]).view(boxes[name].size)
                    part.copy_(boxes[name].take(whole))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from None
