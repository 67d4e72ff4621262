"""How parameters are named, cut and typed on disk: the published names, and transformers' own.

published       ...block_sparse_moe.experts.{e}.w1/w2/w3.weight, no buffers
transformers    the same, or experts stacked as mlp.experts.gate_up_proj / down_proj, and the
                decay tables of its lightning layers, which are recomputed here and ignored
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from linnet.model.transformer import Model

FP32_PARAMETERS = ("block_sparse_moe.gate.weight", "lm_head.weight")
"""Endings of the parameters that stay fp32 in memory whatever dtype is asked for."""

DECAY_TABLE = re.compile(
    r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
)


@dataclass(frozen=True)
class Entry:
    """One tensor on disk and the part of a parameter that it is."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()
    """Where in the parameter the tensor lies; () is all of it."""


def layout_of(model: Model, names: Iterable[str]) -> list[Entry]:
    """Return the layout that a checkpoint with these tensor names has."""
    is_stacked = any(".mlp.experts." in name for name in names)
    return _stacked_layout(model) if is_stacked else disk_layout(model)


def disk_layout(model: Model) -> list[Entry]:
    """Return the tensors of a published checkpoint of this model, in the published order."""
    entries = []
    width = model.config.intermediate_size
    gate, up = slice(0, width), slice(width, 2 * width)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        disk = _published_name(name)
        if name.endswith("experts.gate_up"):
            for expert in range(shape[0]):
                stem = f"{disk.removesuffix('.gate_up')}.{expert}"
                one = (width, shape[2])
                entries.append(Entry(f"{stem}.w1.weight", name, one, (expert, gate)))
                entries.append(Entry(f"{stem}.w3.weight", name, one, (expert, up)))
        elif name.endswith("experts.down"):
            for expert in range(shape[0]):
                stem = f"{disk.removesuffix('.down')}.{expert}"
                entries.append(Entry(f"{stem}.w2.weight", name, shape[1:], (expert,)))
        else:
            entries.append(Entry(disk, name, shape))
    return entries


def _stacked_layout(model: Model) -> list[Entry]:
    """Return the tensors of transformers' module tree, where the experts of a layer are stacked."""
    stacked = {"experts.gate_up": "experts.gate_up_proj", "experts.down": "experts.down_proj"}
    entries = []
    for name, parameter in model.named_parameters():
        disk = _published_name(name).replace(".block_sparse_moe.", ".mlp.")
        for ours, theirs in stacked.items():
            if disk.endswith(ours):
                disk = disk.removesuffix(ours) + theirs
        entries.append(Entry(disk, name, tuple(parameter.shape)))
    return entries


def disk_dtype(parameter: str, storage: torch.dtype) -> torch.dtype:
    """Return the dtype of a parameter on disk when the embedding is saved as `storage`."""
    is_router = parameter.endswith("block_sparse_moe.gate.weight")
    return torch.float32 if is_router and storage.itemsize < 4 else storage


def _published_name(parameter: str) -> str:
    return parameter if parameter == "lm_head.weight" else f"model.{parameter}"
