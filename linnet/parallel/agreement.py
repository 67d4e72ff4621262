"""Ranks that should have the same, and whether they do: cheap hashes, gathered."""

import hashlib
import json
import zlib
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from linnet.errors import ConfigError, DataError


def agree_on_config(config: Mapping[str, Any]) -> None:
    """Compare the configurations of all ranks, section by section.

    Raises:
        ConfigError: (on every rank) some differ; says where, and which ranks.
    """
    own = {key: _digest(value) for key, value in sorted(config.items())}
    gathered = _gather(torch.tensor([_digest(own), *own.values()]))
    if (gathered[:, 0] == gathered[0, 0]).all():
        return
    for column, key in enumerate(own, 1):
        values = gathered[:, column]
        if (values != values[0]).any():
            others = (values != values[0]).nonzero().flatten().tolist()
            raise ConfigError(
                f"ranks {_list(others)} have another {key!r} than rank 0; start all with the same "
                "recipe and the same version of linnet"
            )


def agree_on_rows(tokens: Tensor, row: int, step: int, group: dist.ProcessGroup) -> None:
    """Compare the tokens of ranks that should read the same row.

    Args:
        tokens: [..., T] int64 of this rank, before any split.
        row: which row of a step it is.
        step: for the message.
        group: all ranks.

    Raises:
        DataError: (on every rank) some differ; says which.
    """
    digest = zlib.crc32(tokens.cpu().contiguous().numpy().tobytes())
    gathered = _gather(torch.tensor([row, digest]), group)
    for number in gathered[:, 0].unique().tolist():
        ranks = (gathered[:, 0] == number).nonzero().flatten()
        digests = gathered[ranks, 1]
        if (digests != digests[0]).any():
            others = ranks[digests != digests[0]].tolist()
            raise DataError(
                f"step {step}: ranks {_list(others)} read other tokens of row {number} than rank "
                f"{int(ranks[0])}; their data differ"
            )


def _gather(own: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Return [ranks, ...], with zeros after the entries of ranks that have fewer."""
    most = torch.tensor([len(own)])
    dist.all_reduce(most, op=dist.ReduceOp.MAX, group=group)
    padded = torch.zeros(int(most), dtype=torch.int64)
    padded[: len(own)] = own
    result = [torch.empty_like(padded) for _ in range(dist.get_world_size(group))]
    dist.all_gather(result, padded, group=group)
    return torch.stack(result)


def _digest(value: object) -> int:
    text = json.dumps(value, sort_keys=True, default=str).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


def _list(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
