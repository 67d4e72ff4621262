"""LASP+: lightning attention over a row that is split over ranks (MiniMax-01, section 3.2.2).

Each rank computes the state that its tokens would leave behind, the states travel in one exchange
whose size does not depend on the length, and meanwhile each rank attends within its own tokens.
What the earlier tokens add is one product per token of a document that came from the left:

    o_i = intra_i + exp(-s (i + 1)) q_i KV,   i counted from the start of the piece

Documents may cross ranks in every way: a state is carried on only within its document.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops.lightning_attention import Activation, Backend
from linnet.ops.lightning_attention.operator import backward_op, forward
from linnet.ops.matmul import wide, wide_dtype
from linnet.parallel.exchange import StateExchange
from linnet.parallel.split import Piece, SequenceSplit, split_row

BLOCK_ELEMENTS = 2**17
"""Elements of keys that are widened and weighted at a time on a CPU: what its cache holds."""

_Block = tuple[slice, slice, Tensor]
"""Tokens, heads and the weights [n, H, 1] of the tokens for these heads."""


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
            backend: "native", "triton" or "chunked" for the part within the rank.
            activation: "silu" to apply it to q, k and v.

        Raises:
            ValueError: no offsets, a state, tokens that are not this rank's share, or another
                backend or activation.
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
        if backend in ("recurrent", "reference") or activation not in (None, "silu"):
            raise ValueError(f"no backend {backend!r} with activation {activation!r} across ranks")
        row = _Row(self.exchange, split, backend or "auto", activation == "silu")
        return _Attend.apply(q, k, v, decay.to(wide_dtype(q.dtype)), row), None


@dataclass(frozen=True, slots=True)
class _Row:
    """What forward and backward of one call share."""

    exchange: StateExchange
    split: SequenceSplit
    backend: str
    silu: bool

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self.split.own(self.exchange.rank)

    def by_piece(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Yield views [n, H, .] of each piece's tokens in [1, T_r, H, .]."""
        lengths = [len(piece) for piece in self.pieces]
        return zip(*(x[0].split(lengths) for x in tensors), strict=True)


class _Attend(torch.autograd.Function):
    """Both directions start the exchange, do the part within the rank meanwhile, add what came."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, row: _Row) -> Tensor:
        states = [
            piece_state(own_k, own_v, decay, piece, row.silu)
            for (own_k, own_v), piece in zip(row.by_piece(k, v), row.pieces, strict=True)
        ]
        moving = row.exchange.start(torch.stack(states), decay, row.split, reverse=False)
        offsets = row.split.local_offsets(row.exchange.rank).to(q.device)
        o, _ = forward(q, k, v, decay, None, offsets, row.backend, row.silu)
        entering = moving.wait()
        parts = zip(row.by_piece(o, q), entering, row.pieces, strict=True)
        for (own_o, own_q), state, piece in parts:
            seen = slice(piece.num_continued)
            add_from_before(own_o[seen], own_q[seen], state, decay, row.silu)
        ctx.row = row
        ctx.save_for_backward(q, k, v, decay, offsets, entering)
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, decay, offsets, entering = ctx.saved_tensors
        row: _Row = ctx.row
        states = []
        for (own_q, grad), piece in zip(row.by_piece(q, grads[0]), row.pieces, strict=True):
            seen = slice(piece.num_continued)
            fading = _fading(own_q[seen], decay, backwards=False)
            states.append(_sum_of_products(own_q[seen], grad[seen], fading, (row.silu, False)))
        moving = row.exchange.start(torch.stack(states), decay, row.split, reverse=True)
        # With the states that came in known, the operator itself gives the whole gradient of q.
        initial = entering.new_zeros(len(offsets) - 1, *entering.shape[1:])
        initial[_first_documents(row, offsets)] = entering
        dq, dk, dv, _ = backward_op(
            grads[0], None, q, k, v, decay, initial, offsets, row.backend, row.silu
        )
        parts = zip(row.by_piece(dk, dv, k, v), moving.wait(), row.pieces, strict=True)
        for own, grad, piece in parts:
            own_dk, own_dv, own_k, own_v = (x[piece.last_start - piece.start :] for x in own)
            _add_through_state(own_dk, own_dv, own_k, own_v, grad, decay, row.silu)
        return dq, dk, dv, None, None


def _first_documents(row: _Row, offsets: Tensor) -> list[int]:
    """Return which local document each piece begins with."""
    starts = offsets.tolist()
    bases = itertools.accumulate(map(len, row.pieces[:-1]), initial=0)
    return [starts.index(base) for base in bases]


def piece_state(k: Tensor, v: Tensor, decay: Tensor, piece: Piece, silu: bool = False) -> Tensor:
    """Return the state [H, K, V] fp32 (fp64 for fp64) that the last document of a piece leaves.

    Args:
        k: [n, H, K] keys of the piece.
        v: [n, H, V] values.
        decay: [H] slopes.
        piece: where it lies.
        silu: whether to apply SiLU to k and v first.
    """
    own = slice(piece.last_start - piece.start, None)
    k, v = k[own], v[own]
    fading = _fading(k, decay.to(wide_dtype(k.dtype)), backwards=True)
    return _sum_of_products(k, v, fading, (silu, silu))


def _sum_of_products(
    a: Tensor, b: Tensor, fading: Iterator[_Block], silu: tuple[bool, bool]
) -> Tensor:
    """Return sum over tokens of their weights times a [n, H, K] b [n, H, V], as [H, K, V]."""
    total = a.new_zeros(*a.shape[1:], b.shape[2], dtype=wide_dtype(a.dtype))
    for *block, weights in fading:
        left = _active(a[*block], silu[0]).mul_(weights).permute(1, 2, 0)  # [H, K, n]
        right = _active(b[*block], silu[1]).transpose(0, 1)  # [H, n, V]
        total[block[1]].baddbmm_(left, right)
    return total


def add_from_before(o: Tensor, q: Tensor, state: Tensor, decay: Tensor, silu: bool) -> None:
    """Add to o [n, H, V] what the state gives that enters before the first of these tokens."""
    for *block, weights in _fading(q, decay, backwards=False):
        queries = _active(q[*block], silu).mul_(weights).transpose(0, 1)  # [H, n, K]
        o[*block] += torch.bmm(queries, state[block[1]]).transpose(0, 1)


def _add_through_state(
    dk: Tensor, dv: Tensor, k: Tensor, v: Tensor, grad: Tensor, decay: Tensor, silu: bool
) -> None:
    """Add to dk [n, H, K] and dv [n, H, V] what comes from the state after the last token."""
    for *block, weights in _fading(k, decay, backwards=True):
        own_grad = grad[block[1]]
        keys, values = (_active(x[*block], silu).mul_(weights).transpose(0, 1) for x in (k, v))
        through_k = torch.bmm(values, own_grad.mT).transpose(0, 1)
        through_v = torch.bmm(keys, own_grad).transpose(0, 1)
        for total, part, x in ((dk, through_k, k), (dv, through_v, v)):
            if silu:
                part = torch.ops.aten.silu_backward(part, wide(x[*block]))
            total[*block] += part


def _active(x: Tensor, silu: bool) -> Tensor:
    """Return a copy of x in fp32 (fp64 for fp64), after SiLU if there is one."""
    copy = x.to(wide_dtype(x.dtype), copy=True)
    return F.silu(copy, inplace=True) if silu else copy


def _fading(x: Tensor, decay: Tensor, backwards: bool) -> Iterator[_Block]:
    """Yield what a state, at the start of tokens or after them, has to do with each of them.

    Args:
        x: [n, H, K] of the tokens.
        decay: [H] slopes, fp32 (fp64 for fp64).
        backwards: whether the state is the one after the last token, and not before the first.

    Yields:
        Tokens, heads and weights exp(-s i) [n', H', 1]. On a CPU in blocks that its cache holds,
        without the heads whose state has faded away.
    """
    (length, num_heads), size = x.shape[:2], len(x)
    slopes, least = [0.0] * num_heads, torch.finfo(decay.dtype).eps ** 2
    if x.device.type == "cpu":
        slopes, size = decay.tolist(), max(1, BLOCK_ELEMENTS // x.shape[1:].numel())
    for near in range(0, length, size):
        far = min(near + size, length)
        heads = [head for head, slope in enumerate(slopes) if slope * near < -math.log(least)]
        if not heads:
            return
        span = slice(heads[0], heads[-1] + 1)
        ages = torch.arange(near, far, device=decay.device, dtype=decay.dtype)[:, None, None]
        ages, tokens = ages + 1, slice(near, far)
        if backwards:
            ages, tokens = (ages - 1).flip(0), slice(length - far, length - near)
        weights = torch.exp(-ages * decay[span, None])
        # Less changes no digit of a sum. Gradients are small themselves, and products that become
        # subnormal take a CPU a hundred times as long.
        yield tokens, span, F.threshold(weights, least, 0.0)
