"""Causal softmax attention over a packed row that is split over ranks, without padding.

Within a rank every document attends to itself. Beyond that, only the first document of a piece goes
on from earlier pieces, and all its tokens there see all of it that came before: so what crosses
ranks needs no mask, and pieces that share no document exchange nothing (MiniMax-01, section 3.2.1,
has the same in steps of varlen kernels, on documents padded to the ranks).

Two ways to move keys and values, equal but for rounding:

- `gather`: all of them in one collective; gradients come back in one reduction.
- `ring`: from rank to rank while each attends to what it holds, only as far as documents reach;
  gradients travel along and go home at the end. One visiting part is in memory at a time.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from linnet.ops.attention_parts import (
    Part,
    attend_own,
    attend_past,
    join,
    own_gradients,
    past_gradients,
)
from linnet.ops.matmul import product_dtype
from linnet.parallel.collectives import all_gather, exchange, reduce_scatter
from linnet.parallel.split import SequenceSplit, split_row

Exchange = Literal["gather", "ring"]


class SoftmaxAcrossRanks:
    """Takes the place of a softmax layer's `attend`.

    Args:
        group: the ranks that hold the row, in its order.
        mode: how keys and values are moved.
        is_balanced: whether each rank holds an early and a late piece.
    """

    def __init__(
        self, group: dist.ProcessGroup, mode: Exchange = "ring", is_balanced: bool = False
    ) -> None:
        self.group, self.mode, self.is_balanced = group, mode, is_balanced
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attend; arguments as of `ops.softmax_attention`, but for the rank's part of the row.

        Args:
            q: [1, T_r, H, K] of this rank's tokens.
            k: [1, T_r, G, K].
            v: [1, T_r, G, K].
            cu_seqlens: offsets of the documents in the whole row, the same on all ranks.
            scale: factor on q . k; 1/sqrt(K) by default.

        Raises:
            ValueError: no offsets, or tokens that are not this rank's share.
        """
        if cu_seqlens is None:
            raise ValueError("softmax attention across ranks needs cu_seqlens")
        split = split_row(cu_seqlens, self.size, self.is_balanced)
        own = sum(split.lengths(self.rank))
        if q.shape[:2] != (1, own):
            raise ValueError(
                f"rank {self.rank} of {self.size} holds {own} of {split.num_tokens} tokens; got "
                f"{tuple(q.shape[:2])}"
            )
        return _Attend.apply(q, k, v, _Row(self, split, scale))


@dataclass(frozen=True, slots=True)
class _Row:
    """What forward and backward of one call share."""

    attend: SoftmaxAcrossRanks
    split: SequenceSplit
    scale: float | None


@dataclass(frozen=True, slots=True)
class _Visit:
    """Queries [q_start, q_stop) of this rank see keys [start, stop) of a visiting rank's tokens."""

    q_start: int
    q_stop: int
    start: int
    stop: int


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, row: _Row) -> Tensor:
        dtype = product_dtype(q.dtype, q.device)
        queries, keys, values = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
        o, log_sum = _within(queries, keys, values, row)
        for rank, theirs in _visitors(torch.stack((k[0], v[0])), row):
            visits = _visits(row.split, row.attend.rank, rank)
            key, value = (x.to(dtype).transpose(0, 1)[None] for x in theirs) if visits else (k, v)
            for visit in visits:
                mine, seen = slice(visit.q_start, visit.q_stop), slice(visit.start, visit.stop)
                part = attend_past(
                    queries[:, :, mine], key[:, :, seen], value[:, :, seen], row.scale
                )
                joined = join(part, (o[:, :, mine], log_sum[:, :, mine]))
                o[:, :, mine], log_sum[:, :, mine] = joined
        ctx.row = row
        ctx.save_for_backward(q, k, v, o, log_sum)
        return o.transpose(1, 2).to(v.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, o, log_sum = ctx.saved_tensors
        row: _Row = ctx.row
        grad = grads[0].to(o.dtype).transpose(1, 2).contiguous()
        queries, keys, values = (x.to(o.dtype).transpose(1, 2) for x in (q, k, v))
        dq, dk, dv = _within_gradients(grad, queries, keys, values, (o, log_sum), row)
        home = _HomewardGradients(torch.stack((k[0], v[0])), row, o.dtype)
        for rank, theirs, theirs_grad in home:
            visits = _visits(row.split, row.attend.rank, rank)
            key, value = (x.to(o.dtype).transpose(0, 1)[None] for x in theirs)
            for visit in visits:
                mine, seen = slice(visit.q_start, visit.q_stop), slice(visit.start, visit.stop)
                dq_part, *dkv = past_gradients(
                    grad[:, :, mine],
                    queries[:, :, mine],
                    key[:, :, seen],
                    value[:, :, seen],
                    (o[:, :, mine], log_sum[:, :, mine]),
                    row.scale,
                )
                dq[:, :, mine] += dq_part
                for total, part in zip(theirs_grad, dkv, strict=True):
                    total[seen] += part[0].transpose(0, 1)
        dk_home, dv_home = home.result()
        dk, dv = dk.transpose(1, 2)[0] + dk_home, dv.transpose(1, 2)[0] + dv_home
        return dq.transpose(1, 2).to(q.dtype), dk[None].to(k.dtype), dv[None].to(v.dtype), None


def _documents(row: _Row) -> Iterator[slice]:
    offsets = row.split.local_offsets(row.attend.rank).tolist()
    for start, stop in itertools.pairwise(offsets):
        yield slice(start, stop)


def _within(q: Tensor, k: Tensor, v: Tensor, row: _Row) -> Part:
    """Attend within each document, or part of one, of this rank."""
    parts = [
        attend_own(q[:, :, own], k[:, :, own], v[:, :, own], row.scale) for own in _documents(row)
    ]
    return torch.cat([o for o, _ in parts], 2), torch.cat([log_sum for _, log_sum in parts], 2)


def _within_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Part, row: _Row
) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for own in _documents(row):
        own_grad, own_q, own_k, own_v = (x[:, :, own] for x in (grad, q, k, v))
        own_whole = (whole[0][:, :, own], whole[1][:, :, own])
        parts.append(own_gradients(own_grad, own_q, own_k, own_v, own_whole, row.scale))
    dq, dk, dv = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return dq, dk, dv


def _visits(split: SequenceSplit, rank: int, visitor: int) -> list[_Visit]:
    """Return which of a rank's queries see which of a visitor's keys; a rank may visit itself."""
    result, q_base = [], 0
    for number, piece in zip(split.numbers(rank), split.own(rank), strict=True):
        base = 0
        for source, theirs in zip(split.numbers(visitor), split.own(visitor), strict=True):
            start = max(piece.first_document, theirs.start)
            if source < number and start < theirs.stop:
                q_stop = q_base + piece.first_stop - piece.start
                first = base + start - theirs.start
                result.append(_Visit(q_base, q_stop, first, base + len(theirs)))
            base += len(theirs)
        q_base += len(piece)
    return result


def _reach(split: SequenceSplit) -> int:
    """Return how many ranks back documents reach, over all ranks; 0 if none crosses."""
    ranks = range(split.num_ranks)
    return max(
        (rank - visitor) % split.num_ranks
        for rank in ranks
        for visitor in ranks
        if rank == visitor or _visits(split, rank, visitor)
    )


def _padded(x: Tensor, split: SequenceSplit) -> Tensor:
    """Return x [2, T_r, G, K] with as many tokens as the rank that holds the most."""
    most = max(sum(split.lengths(rank)) for rank in range(split.num_ranks))
    return torch.cat((x, x.new_zeros(2, most - x.shape[1], *x.shape[2:])), 1)


def _visitors(own: Tensor, row: _Row) -> Iterator[tuple[int, Tensor]]:
    """Yield the keys and values [2, T_s, G, K] of each rank that documents reach, one at a time."""
    attend, split = row.attend, row.split
    reach = _reach(split)
    if not reach:
        yield attend.rank, own
        return
    held = _padded(own, split)
    if attend.mode == "gather":
        pending = all_gather(held[None], attend.group)
        yield attend.rank, own
        gathered = pending.wait()
        for rank in range(attend.size):
            if rank != attend.rank:
                yield rank, gathered[rank][:, : sum(split.lengths(rank))]
        return
    coming = exchange(held, attend.rank + 1, attend.rank - 1, attend.group)
    yield attend.rank, own
    for step in range(1, reach + 1):
        held = coming.wait()
        if step < reach:  # on its way while this one is attended to
            coming = exchange(held, attend.rank + 1, attend.rank - 1, attend.group)
        rank = (attend.rank - step) % attend.size
        yield rank, held[:, : sum(split.lengths(rank))]


class _HomewardGradients:
    """Yields visiting keys and values with a place for their gradients, and brings those home."""

    def __init__(self, own: Tensor, row: _Row, dtype: torch.dtype) -> None:
        self._own, self._row, self._dtype = own, row, dtype
        self._result = torch.zeros_like(own, dtype=dtype)

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        return self._gathered() if self._row.attend.mode == "gather" else self._in_a_ring()

    def result(self) -> Tensor:
        """Return [2, T_r, G, K]: what all queries elsewhere add to this rank's gradients."""
        return self._result

    def _gathered(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        attend, split = self._row.attend, self._row.split
        if not _reach(split):
            yield attend.rank, self._own, self._result
            return
        shape = _padded(self._own, split).shape
        totals = self._own.new_zeros(attend.size, *shape, dtype=self._dtype)
        for rank, theirs in _visitors(self._own, self._row):
            yield rank, theirs, totals[rank][:, : theirs.shape[1]]
        own = reduce_scatter(totals, attend.group).wait()
        self._result = own[0][:, : self._own.shape[1]]

    def _in_a_ring(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        attend, split = self._row.attend, self._row.split
        total = None
        for step, (rank, theirs) in enumerate(_visitors(self._own, self._row)):
            if step == 0:
                yield rank, theirs, self._result
                total = torch.zeros_like(_padded(self._own, split), dtype=self._dtype)
                continue
            assert total is not None
            if step > 1:  # the gradients follow their keys
                total = exchange(total, attend.rank + 1, attend.rank - 1, attend.group).wait()
            yield rank, theirs, total[:, : theirs.shape[1]]
        if reach := _reach(split):
            assert total is not None
            home = exchange(total, attend.rank - reach, attend.rank + reach, attend.group).wait()
            self._result = self._result + home[:, : self._own.shape[1]]
