"""The collectives that linnet uses, in one form for all versions of PyTorch and both backends."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Pending:
    """A tensor that is on its way; `wait` once."""

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish = finish

    def wait(self) -> Tensor:
        """Return it when it is there."""
        return self._finish()

    def then(self, change: Callable[[Tensor], Tensor]) -> "Pending":
        """Return what `change` makes of it, later."""
        return Pending(lambda: change(self.wait()))


def all_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Begin to gather tensors of one shape [N, ...] along their first dimension, rank by rank."""
    x = x.contiguous()
    size = dist.get_world_size(group)
    # gloo takes the concatenated shape only, not the stacked one.
    result = torch.empty(size * x.shape[0], *x.shape[1:], dtype=x.dtype, device=x.device)
    # Renamed in PyTorch 2.13, where the old name warns.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return _arriving(result, gather(result, x, group=group, async_op=True))


def reduce_scatter(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Begin to sum tensors [P, ...] over the ranks; each gets its own entry [1, ...]."""
    x = x.contiguous()
    result = torch.empty_like(x[:1])
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return _arriving(result, scatter(result, x, group=group, async_op=True))


def all_to_all(
    x: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
) -> Pending:
    """Begin to send rows to each rank of a group, and to receive rows from each.

    Args:
        x: [sum(sent), ...] rows, those for the first rank first.
        sent: rows for each rank.
        received: rows from each rank.
        group: of all.

    Returns:
        `wait()` gives [sum(received), ...].
    """
    x = x.contiguous()
    result = x.new_empty(sum(received), *x.shape[1:])
    return _arriving(
        result, dist.all_to_all_single(result, x, received, sent, group=group, async_op=True)
    )


def all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum of a tensor over the ranks of a group, the same bits on all."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def send(x: Tensor, rank: int, group: dist.ProcessGroup) -> None:
    """Send a tensor to a rank of the group, and wait until it may be overwritten."""
    dist.send(x.contiguous(), group=group, group_dst=rank)


def receive(into: Tensor, rank: int, group: dist.ProcessGroup) -> None:
    """Fill a tensor with what a rank of the group sends."""
    dist.recv(into, group=group, group_src=rank)


def exchange(x: Tensor, target: int, source: int, group: dist.ProcessGroup) -> Pending:
    """Begin to send a tensor to one rank and to receive one of its shape from another.

    Args:
        x: what is sent; not to be changed before `wait`.
        target, source: ranks of the group, counted round.
        group: of all.
    """
    size = dist.get_world_size(group)
    x = x.contiguous()
    result = torch.empty_like(x)
    works = (
        dist.isend(x, group=group, group_dst=target % size),
        dist.irecv(result, group=group, group_src=source % size),
    )
    return _arriving(result, *works)


def _arriving(result: Tensor, *works: dist.Work | None) -> Pending:
    def finish() -> Tensor:
        for work in works:
            assert work is not None
            work.wait()
        return result

    return Pending(finish)
