"""The original LASP (arXiv 2404.02882), to measure LASP+ against: states go from rank to rank.

Each rank receives the state that the earlier tokens left, attends with it to its own tokens, and
only then sends its state on, as in the published code (`lasp/lasp_naive.py` of OpenNLPLab/LASP).
So one rank computes at a time, and in the backward pass in the other direction. A row is one
document that all ranks share.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from linnet import ops
from linnet.ops.lightning_attention import Activation, Backend
from linnet.ops.matmul import wide_dtype
from linnet.parallel import collectives
from linnet.parallel.split import split_row


class Lasp:
    """Takes the place of a lightning layer's `attend`, as `LightningAcrossRanks` does.

    Args:
        group: the ranks that hold the row, in its order.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
        backend: Backend | None = None,
        activation: Activation | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments as of `ops.lightning_attention`, but for the rank's part of the row.

        Args:
            q, k: [1, T_r, H, K] of this rank's tokens.
            v: [1, T_r, H, V].
            decay: [H] slopes.
            initial_state: must be None.
            cu_seqlens: [0, T] of the whole row.
            return_state: must be False.
            backend: of the part within the rank.
            activation: "silu" to apply it to q, k and v.

        Raises:
            ValueError: several documents, a state, or tokens that are not this rank's share.
        """
        if cu_seqlens is None or len(cu_seqlens) != 2 or initial_state is not None or return_state:
            raise ValueError("LASP takes a row of one document, and neither takes nor gives states")
        own = sum(split_row(cu_seqlens, self.size).lengths(self.rank))
        if q.shape[:2] != (1, own):
            raise ValueError(f"rank {self.rank} holds {own} tokens; got {tuple(q.shape[:2])}")
        # Autograd runs the three in the opposite order: the last one receives, the first one sends.
        entering = _FromBefore.apply(q, v.shape[3], self)
        o, leaving = ops.lightning_attention(
            q, k, v, decay, entering, backend=backend, activation=activation
        )
        return _ToAfter.apply(o, leaving, self), None

    def receive(self, into: Tensor, rank: int) -> None:
        """Fill a state with what a rank sends; beyond the row's ends it stays as it is."""
        if 0 <= rank < self.size:
            collectives.receive(into, rank, self.group)

    def send(self, state: Tensor, rank: int) -> None:
        """Send a state to a rank, if there is one."""
        if 0 <= rank < self.size:
            collectives.send(state, rank, self.group)


class _FromBefore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, value_dim: int, lasp: Lasp) -> Tensor:
        ctx.lasp = lasp
        state = q.new_zeros(1, *q.shape[2:], value_dim, dtype=wide_dtype(q.dtype))
        lasp.receive(state, lasp.rank - 1)
        return state

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.lasp.send(grads[0], ctx.lasp.rank - 1)
        return None, None, None


class _ToAfter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Tensor, state: Tensor, lasp: Lasp) -> Tensor:
        ctx.lasp = lasp
        ctx.shape, ctx.dtype = state.shape, state.dtype
        lasp.send(state, lasp.rank + 1)
        return o.view_as(o)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        state = grads[0].new_zeros(ctx.shape, dtype=ctx.dtype)
        ctx.lasp.receive(state, ctx.lasp.rank + 1)
        return grads[0], state, None
