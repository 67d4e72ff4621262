"""Weights for a rank's part of a model, part by part, so that no rank ever holds all of it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from linnet.model.config import ModelConfig
from linnet.model.init import initial_parts
from linnet.model.layout import Entry
from linnet.model.transformer import Model
from linnet.model.weights import Shards
from linnet.parallel.placement import Box

Part = tuple[str, dict[str, Tensor]]
"""The prefix of the names of a part, "" or "layers.0.", and its tensors by full name."""


class Weights(Protocol):
    """Where weights come from."""

    def parts(self, config: ModelConfig, boxes: Mapping[str, Box]) -> Iterator[Part]:
        """Yield the boxes of a rank, those outside of the layers first, then layer by layer."""
        ...


class FromSeed:
    """The weights that `linnet.model.init.initialize` gives one process."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def parts(self, config: ModelConfig, boxes: Mapping[str, Box]) -> Iterator[Part]:
        """Yield the boxes of a rank."""
        generator = torch.Generator().manual_seed(self.seed)
        for prefix, whole in initial_parts(config, generator):
            own = {prefix + name: tensor for name, tensor in whole.items()}
            yield (
                prefix,
                {
                    name: boxes[name].take(tensor).clone()
                    for name, tensor in own.items()
                    if name in boxes
                },
            )


class FromFolder:
    """The weights of a checkpoint folder, read lazily.

    Args:
        folder: of any dialect.
        dtype: of the tensors that come out; None keeps that of the disk.

    Raises:
        CheckpointError: (while reading) a tensor is missing, extra, misshapen or not finite.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder, self.dtype = folder, dtype

    def parts(self, config: ModelConfig, boxes: Mapping[str, Box]) -> Iterator[Part]:
        """Yield the boxes of a rank."""
        shards = Shards(self.folder)
        with torch.device("meta"):
            layout = shards.match(Model(config))
        by_prefix: dict[str, list[Entry]] = {}
        for entry in layout:
            by_prefix.setdefault(prefix_of(entry.parameter), []).append(entry)
        for prefix, entries in sorted(by_prefix.items(), key=lambda item: _order(item[0])):
            own = [entry for entry in entries if entry.parameter in boxes]
            tensors = {
                name: torch.empty(boxes[name].size, dtype=self.dtype)
                for name in {entry.parameter for entry in own}
            }
            for entry in own:
                _read(shards, entry, boxes[entry.parameter], tensors[entry.parameter])
            yield prefix, tensors


def prefix_of(parameter: str) -> str:
    """Return the prefix of the part that a parameter belongs to."""
    pieces = parameter.split(".")
    return f"layers.{pieces[1]}." if pieces[0] == "layers" else ""


def _order(prefix: str) -> int:
    return int(prefix.split(".")[1]) + 1 if prefix else 0


def _read(shards: Shards, entry: Entry, box: Box, into: Tensor) -> None:
    """Read what a box wants of a tensor on disk."""
    fixed, index = _index_in(entry, box)
    place: list[int] = []
    for dim, number in enumerate(fixed):
        if not box.start[dim] <= number < box.start[dim] + box.size[dim]:
            return
        place.append(number - box.start[dim])
    ranges = zip(box.start[index:], box.size[index:], strict=True)
    wanted = tuple(slice(start, start + size) for start, size in ranges)
    if len(entry.shape) == len(wanted):
        shards.read(entry, into[tuple(place)], wanted)
    else:  # gate_up stacked on disk, as [E, 2F, D]
        whole = torch.empty(entry.shape, dtype=into.dtype)
        shards.read(entry, whole)
        into.copy_(box.take(whole))


def _index_in(entry: Entry, box: Box) -> tuple[list[int], int]:
    """Return the leading indices of an entry in its parameter as boxes see it, and their number."""
    fixed: list[int] = []
    for part in entry.index:
        # A slice of W1 or W3 in [E, 2F, D] is an index in [E, 2, F, D].
        fixed.append(part if isinstance(part, int) else int(part.start) // box.whole[2])
    return fixed, len(fixed)
