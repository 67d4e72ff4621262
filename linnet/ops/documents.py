"""Documents packed along the token axis, and where each begins."""

import itertools

import torch
from torch import Tensor


def check_offsets(cu_seqlens: Tensor, batch_size: int) -> None:
    """Raise ValueError unless shape and dtype of `cu_seqlens` [N + 1] fit a packed batch of one."""
    if cu_seqlens.ndim != 1 or not len(cu_seqlens):
        raise ValueError(f"cu_seqlens must be [N + 1] offsets; got shape {tuple(cu_seqlens.shape)}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64; got {cu_seqlens.dtype}")
    if batch_size != 1:
        raise ValueError(f"cu_seqlens needs B = 1; got B = {batch_size}")


def document_bounds(cu_seqlens: Tensor, num_tokens: int) -> list[tuple[int, int]]:
    """Return (start, stop) of each document.

    Args:
        cu_seqlens: [N + 1] integer offsets.
        num_tokens: T, where the last document must end.

    Raises:
        ValueError: offsets that do not rise from 0 to T.
    """
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != num_tokens:
        raise ValueError(
            f"cu_seqlens must run from 0 to T = {num_tokens}; got {offsets[0]} to {offsets[-1]}"
        )
    bounds = list(itertools.pairwise(offsets))
    for n, (start, stop) in enumerate(bounds):
        if stop < start:
            raise ValueError(
                f"cu_seqlens must not decrease; entries {n} and {n + 1} are {start}, {stop}"
            )
    return bounds
