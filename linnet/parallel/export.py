"""From a sharded checkpoint to a model folder of published names, without ever holding the model.

The files of the folder are shared out to the ranks; each reads what its files hold, one tensor at a
time.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from linnet.model.config import Dialect, ModelConfig
from linnet.model.layout import Entry
from linnet.model.transformer import Model
from linnet.model.weights import plan_shards, write_index, write_shard
from linnet.parallel.checkpoint import SavedParts
from linnet.parallel.placement import Box

PREFIX = "model/"
"""Before the names of parameters in a sharded checkpoint."""


def export_files(
    saved: SavedParts,
    config: ModelConfig,
    folder: Path,
    storage: torch.dtype,
    rank: int = 0,
    num_ranks: int = 1,
    dialect: Dialect = "linnet",
) -> None:
    """Write this rank's files of a model folder; rank 0 writes the config and the index too.

    Args:
        saved: a checkpoint.
        config: of the model.
        folder: to be filled, the same for all ranks.
        storage: dtype of the weights on disk; routers are fp32.
        rank: of this process.
        num_ranks: among which the files are shared out.
        dialect: of `config.json`.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model.
        OSError: the disk refuses.
    """
    with torch.device("meta"):
        shards = plan_shards(Model(config), storage)
    for number in range(rank, len(shards), num_ranks):
        write_shard(folder, shards, number, storage, lambda entry: _read(saved, config, entry))
    if rank == 0:
        values = config.to_dict(dialect)
        values["torch_dtype"] = str(storage).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        write_index(folder, shards, storage)


def _read(saved: SavedParts, config: ModelConfig, entry: Entry) -> Tensor:
    box = _box_of(config, entry)
    tensor = torch.empty(box.size)
    saved.read({PREFIX + entry.parameter: (tensor, box)})
    return tensor.view(entry.shape)


def _box_of(config: ModelConfig, entry: Entry) -> Box:
    """Return where a tensor on disk lies in its parameter."""
    if not entry.index:
        return Box.of_whole(entry.shape)
    experts, expert = config.num_local_experts, entry.index[0]
    assert isinstance(expert, int)
    if len(entry.index) == 1:
        return Box((experts, *entry.shape), (expert, 0, 0), (1, *entry.shape))
    half = entry.index[1]
    assert isinstance(half, slice)
    both = int(half.start) // config.intermediate_size
    return Box((experts, 2, *entry.shape), (expert, both, 0, 0), (1, 1, *entry.shape))
