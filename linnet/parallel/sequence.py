"""LASP+: lightning attention over a row that is split over ranks (MiniMax-01, section 3.2.2).

Each rank computes the state that its tokens would leave behind, the states travel in one exchange
whose size does not depend on the length, and meanwhile each rank attends within its own tokens.
What the earlier tokens add is one product per token of a document that came from the left:

    o_i = intra_i + exp(-s (i + 1)) q_i KV,   i counted from the start of the piece

Documents may cross ranks in every way: a state is carried on only within its document.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet import ops
from linnet.ops.lightning_attention import Activation, Backend
from linnet.parallel.collectives import Pending
from linnet.parallel.exchange import StateExchange
from linnet.parallel.split import Piece, SequenceSplit, split_row


class LightningAcrossRanks:
    """Takes the place of a lightning layer's `attend`.

    Args:
        exchange: how states travel; its group holds the row.
        is_balanced: whether each rank holds an early and a late piece.
    """

    def __init__(self, exchange: StateExchange, is_balanced: bool = False) -> None:
        self.exchange, self.is_balanced = exchange, is_balanced

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
            cu_seqlens: offsets of the documents in the whole row, the same on all ranks.
            return_state: must be False.
            backend: of the part within the rank.
            activation: "silu" to apply it to q, k and v.

        Raises:
            ValueError: no offsets, a state, or tokens that are not this rank's share.
        """
        if cu_seqlens is None or initial_state is not None or return_state:
            raise ValueError(
                "lightning attention across ranks needs cu_seqlens, and neither takes nor returns "
                "states"
            )
        group = self.exchange
        split = split_row(cu_seqlens, group.size, self.is_balanced)
        lengths = split.lengths(group.rank)
        if sum(lengths) != q.shape[1]:
            raise ValueError(
                f"rank {group.rank} of {group.size} holds {sum(lengths)} of {split.num_tokens} "
                f"tokens; got {q.shape[1]}"
            )
        if activation == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        pieces = split.own(group.rank)
        moving = _Moving(self.exchange, decay, split)
        states = torch.stack(
            [
                piece_state(own_k, own_v, decay, piece)
                for own_k, own_v, piece in zip(
                    k[0].split(lengths), v[0].split(lengths), pieces, strict=True
                )
            ]
        )
        sent = _Send.apply(states, moving)
        offsets = split.local_offsets(group.rank).to(q.device)
        o, _ = ops.lightning_attention(
            q, k, v, decay, cu_seqlens=offsets, return_state=False, backend=backend
        )
        entering = _Receive.apply(sent, moving)
        return o + _from_before(q[0], entering, decay, pieces, o.dtype)[None], None


def piece_state(k: Tensor, v: Tensor, decay: Tensor, piece: Piece) -> Tensor:
    """Return the state [H, K, V] fp32 (fp64 for fp64) that the last document of a piece leaves.

    Args:
        k: [n, H, K] keys of the piece.
        v: [n, H, V] values.
        decay: [H] slopes.
        piece: where it lies.
    """
    wide = torch.promote_types(k.dtype, torch.float32)
    own = slice(piece.last_start - piece.start, None)
    k, v = k[own].to(wide), v[own].to(wide)
    ages = torch.arange(len(k) - 1, -1, -1, device=k.device, dtype=wide)
    weights = torch.exp(-ages[:, None] * decay.to(wide))  # [n, H]
    return torch.einsum("nhk,nhv->hkv", k * weights[..., None], v)


def _from_before(
    q: Tensor, entering: Tensor, decay: Tensor, pieces: Sequence[Piece], dtype: torch.dtype
) -> Tensor:
    """Return [T_r, H, V]: what the states that enter each piece add to its tokens."""
    parts = []
    wide = entering.dtype
    for own_q, state, piece in zip(q.split(list(map(len, pieces))), entering, pieces, strict=True):
        num_seen = piece.first_stop - piece.start
        ages = torch.arange(1, num_seen + 1, device=q.device, dtype=wide)
        weights = torch.exp(-ages[:, None] * decay.to(wide))
        seen = own_q[:num_seen].to(wide) * weights[..., None]
        parts.append(torch.einsum("nhk,hkv->nhv", seen, state).to(dtype))
        parts.append(own_q.new_zeros(len(piece) - num_seen, *parts[-1].shape[1:], dtype=dtype))
    return torch.cat(parts)


class _Moving:
    """One exchange of states, and later the one of their gradients."""

    def __init__(self, exchange: StateExchange, decay: Tensor, split: SequenceSplit) -> None:
        self._exchange, self._decay, self._split = exchange, decay, split
        self._pending: Pending | None = None

    def start(self, states: Tensor, reverse: bool) -> None:
        self._pending = self._exchange.start(states, self._decay, self._split, reverse)

    def wait(self) -> Tensor:
        assert self._pending is not None
        pending, self._pending = self._pending, None
        return pending.wait()


class _Send(torch.autograd.Function):
    """Starts the exchange; `_Receive` ends it, and what lies between runs meanwhile.

    In the backward pass the two change places: autograd runs the later one first, then the part
    within the rank, then this one.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, moving: _Moving) -> Tensor:
        ctx.moving = moving
        moving.start(states.detach(), reverse=False)
        return states.new_empty(states.shape).zero_()

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor, None]:
        return ctx.moving.wait(), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, moving: _Moving) -> Tensor:
        ctx.moving = moving
        del sent  # it only says that this comes later
        return moving.wait()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        ctx.moving.start(grad, reverse=True)
        return torch.zeros_like(grad), None
