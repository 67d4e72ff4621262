"""Tensor parallelism of attention: each rank has some of the heads, and all tokens.

Projections to heads are cut by rows, projections from heads by columns. What enters is on all ranks
and each finds a part of its gradient; what leaves is a part of the sum. Lightning attention has a
norm over all heads: its mean square is summed over the ranks, forward and backward.
"""

import itertools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from linnet.model.attention import LightningAttention, SoftmaxAttention
from linnet.model.layers import RMSNorm
from linnet.ops.matmul import wide
from linnet.parallel.collectives import all_gather, all_reduce


def share_heads(attention: LightningAttention | SoftmaxAttention, group: dist.ProcessGroup) -> None:
    """Let an attention layer, whose parameters are cut already, work on this rank's heads.

    Args:
        attention: to be changed in place.
        group: the ranks that share its heads.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    if isinstance(attention, LightningAttention):
        attention.num_heads //= size
        own = slice(rank * attention.num_heads, (rank + 1) * attention.num_heads)
        attention.keep_heads(own)
        attention.add_module("norm", RMSNormAcrossRanks(attention.norm, group))
    attention.register_forward_pre_hook(lambda _, args: (_Enter.apply(args[0], group), *args[1:]))
    attention.register_forward_hook(lambda _, args, y: _Leave.apply(y, group))


def own_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's share of tokens [T, ...] that all ranks have; some may get one more.

    In the backward pass every rank has the gradient of all tokens.
    """
    return _Share.apply(x, group)


def all_tokens(x: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    """Return the tokens [T, ...] of all ranks from each one's share: the reverse of `own_tokens`.

    In the backward pass each rank takes the gradient of its share: what follows must be the same
    computation on all ranks.
    """
    return _Collect.apply(x, num_tokens, group)


def share_bounds(num_tokens: int, size: int) -> list[int]:
    """Return where each rank's share of tokens begins, and the end."""
    return [rank * num_tokens // size for rank in range(size + 1)]


class RMSNormAcrossRanks(nn.Module):
    """RMSNorm over channels of which each rank has some; stands in for `RMSNorm`."""

    def __init__(self, norm: RMSNorm, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.eps, self.group = norm.weight, norm.eps, group

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalize [..., size / ranks] by the mean square over all ranks."""
        y = _Normalize.apply(x, self.eps, self.group)
        y = y * wide(self.weight)
        if gate is not None:
            y = y * torch.sigmoid(wide(gate))
        return y.to(x.dtype)


class _Normalize(torch.autograd.Function):
    """x / sqrt(mean over all ranks of x^2 + eps), wide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, group: dist.ProcessGroup) -> Tensor:
        width = x.shape[-1] * dist.get_world_size(group)
        square = all_reduce(wide(x).square().sum(-1, keepdim=True), group)
        inverse = (square / width + eps).rsqrt()
        ctx.group, ctx.width = group, width
        ctx.save_for_backward(x, inverse)
        return wide(x) * inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        x, inverse = ctx.saved_tensors
        normed = wide(x) * inverse
        projection = all_reduce((grads[0] * normed).sum(-1, keepdim=True), ctx.group) / ctx.width
        return ((grads[0] - normed * projection) * inverse).to(x.dtype), None, None


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0], ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.num_tokens = group, len(x)
        return _share_of(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _collected(grads[0], ctx.num_tokens, ctx.group), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _collected(x, num_tokens, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _share_of(grads[0], ctx.group), None, None


def _share_of(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    bounds = share_bounds(len(x), dist.get_world_size(group))
    rank = dist.get_rank(group)
    return x[bounds[rank] : bounds[rank + 1]].clone()


def _collected(x: Tensor, num_tokens: int, group: dist.ProcessGroup) -> Tensor:
    size = dist.get_world_size(group)
    bounds = share_bounds(num_tokens, size)
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    padded = x.new_zeros(max(lengths), *x.shape[1:])
    padded[: len(x)] = x
    gathered = all_gather(padded, group).wait().view(size, *padded.shape)
    return torch.cat([part[:length] for part, length in zip(gathered, lengths, strict=True)])
