"""The keys and values of one sequence over ranks, and attention to all of them.

Each rank keeps an equal share, in blocks, and no keys are ever gathered whole. Without a mask the
order of keys does not matter, so who keeps which is free: earlier tokens are seen by every new one.
New tokens come in two forms:

- replicated: every rank has all of them (decoding). Each attends to its share of the earlier keys,
  and one gather of outputs and log-sums joins the shares: its bytes do not depend on the length.
- split: every rank has its own part (prefill). What is smaller goes round the ring: the keys, or
  the queries, whose outputs then come straight home (pass-KV and pass-Q of arXiv 2411.01783).
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from linnet.ops.attention_parts import Part, attend_own, attend_past, join
from linnet.ops.matmul import product_dtype, wide
from linnet.parallel.collectives import Pending, all_gather, exchange

BLOCK_LEN = 4096
"""Tokens for which a rank makes room at a time."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How the tokens of one forward pass are kept by the ranks.

    Attributes:
        held: tokens whose keys each rank had before.
        lengths: new tokens whose keys each rank keeps: neighbors, in the order of the ranks.
    """

    held: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, held: tuple[int, ...], num_tokens: int) -> "Shares":
        """Deal out new tokens evenly; the ranks with the fewest tokens get those left over."""
        base, rest = divmod(num_tokens, len(held))
        fewest = sorted(range(len(held)), key=lambda rank: (held[rank], rank))[:rest]
        return cls(held, tuple(base + (rank in fewest) for rank in range(len(held))))

    @property
    def bounds(self) -> list[int]:
        """[P + 1] where the part of each rank starts among the new tokens, and their number."""
        return list(itertools.accumulate(self.lengths, initial=0))

    @property
    def after(self) -> tuple[int, ...]:
        """Tokens of each rank after the pass."""
        return tuple(map(sum, zip(self.held, self.lengths, strict=True)))

    def part(self, rank: int) -> slice:
        """Return which of the new tokens a rank keeps."""
        return slice(*self.bounds[rank : rank + 2])

    def seen(self, holder: int, reader: int) -> int:
        """Return how many keys of one rank all new tokens of another see."""
        return self.held[holder] + (self.lengths[holder] if holder < reader else 0)


class KeyBlocks:
    """A rank's share of the keys and values of one layer, [tokens, 2, G, K] in blocks.

    Blocks are added and never moved: doubling a buffer would need three times its memory.
    """

    def __init__(self, block_len: int = BLOCK_LEN) -> None:
        self.block_len = block_len
        self._blocks: list[Tensor] = []

    def write(self, start: int, k: Tensor, v: Tensor, room: int) -> None:
        """Put keys and values [1, T, G, K] at `start` and after.

        Args:
            start: tokens that are kept before them.
            k, v: to be written; T may be 0.
            room: tokens for which there are blocks afterwards, at least start + T.
        """
        while len(self._blocks) * self.block_len < room:
            shape = (self.block_len, 2, *k.shape[2:])
            # Ordinary tensors even in inference mode: they outlive the call.
            with torch.inference_mode(False):
                self._blocks.append(torch.empty(shape, dtype=k.dtype, device=k.device))
        new = torch.stack((k[0], v[0]), 1)
        for block, base in zip(self._blocks, itertools.count(0, self.block_len), strict=False):
            low, high = max(start, base), min(start + len(new), base + self.block_len)
            if low < high:
                block[low - base : high - base] = new[low - start : high - start]

    def until(self, stop: int) -> Iterator[Tensor]:
        """Yield the first `stop` tokens, [n, 2, G, K] of each block."""
        for block, base in zip(self._blocks, range(0, stop, self.block_len), strict=False):
            yield block[: stop - base]


class SpreadAttention:
    """Attends to keys and values that are spread over the ranks of a group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def replicated(
        self, q: Tensor, k: Tensor, v: Tensor, keys: KeyBlocks, shares: Shares
    ) -> Tensor:
        """Attend with new tokens that every rank has; the result is the same on all, bit by bit.

        Args:
            q: [1, W, H, K] queries of the last W new tokens.
            k: [1, T, G, K] keys of all of them.
            v: [1, T, G, K].
            keys: this rank's share, with the new tokens that are its own already in it.
            shares: who keeps what.

        Returns:
            [1, W, H, K] in `v.dtype`.
        """
        queries = q.transpose(1, 2)
        whole = _attend_new(queries, k, v)
        if any(shares.held):
            own = _attend_past(queries, keys.until(shares.held[self.rank]))
            # [P, H, W, K + 1]; every rank joins them in one order.
            for theirs in all_gather(_packed(own), self.group).wait().split(1):
                whole = join(_unpacked(theirs), whole)
        return whole[0].transpose(1, 2).to(v.dtype)

    def split(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: KeyBlocks,
        shares: Shares,
        num_queries: int,
    ) -> Tensor:
        """Attend with the new tokens of this rank to all tokens before them.

        Args:
            q: [1, W, H, K] queries of the last W tokens of the part.
            k: [1, T_r, G, K] keys of the part.
            v: [1, T_r, G, K].
            keys: this rank's share, the part already in it, with room for the longest share.
            shares: who keeps what.
            num_queries: the largest W of all ranks.

        Returns:
            [1, W, H, K] in `v.dtype`.
        """
        queries = q.transpose(1, 2)
        part = _attend_new(queries, k, v)
        if shares.held[self.rank]:
            part = join(_attend_past(queries, keys.until(shares.held[self.rank])), part)
        _, num_heads, _, dim = queries.shape
        key_bytes = max(shares.after) * 2 * k.shape[2] * dim * k.element_size()
        answer_bytes = (dim + 1) * part[1].element_size()
        query_bytes = num_queries * num_heads * (dim * q.element_size() + answer_bytes)
        if key_bytes <= query_bytes:
            part = self._pass_keys(queries, part, keys, shares)
        else:
            part = self._pass_queries(queries, part, keys, shares, num_queries)
        return part[0].transpose(1, 2).to(v.dtype)

    def _pass_keys(self, q: Tensor, part: Part, keys: KeyBlocks, shares: Shares) -> Part:
        """Join to a part what the queries [1, H, W, K] see of the keys of all other ranks."""
        base = 0
        # Every rank sends as much of each block as the longest share has.
        for block in keys.until(max(shares.after)):
            for rank, visiting in self._visitors(block):
                seen = shares.seen(rank, self.rank) - base
                if seen > 0:
                    part = join(_attend_past(q, [visiting[:seen]]), part)
            base += len(block)
        return part

    def _pass_queries(
        self, q: Tensor, part: Part, keys: KeyBlocks, shares: Shares, num_queries: int
    ) -> Part:
        """Join to a part what the other ranks find for the queries [1, H, W, K] in their keys."""
        length, home = q.shape[2], None
        padded = F.pad(q, (0, 0, 0, num_queries - length))
        for step, (rank, visiting) in enumerate(self._visitors(padded), 1):
            answer = _packed(_attend_past(visiting, keys.until(shares.seen(self.rank, rank))))
            if home is not None:
                part = join(_unpacked(home.wait()[:, :, :length]), part)
            home = exchange(answer, self.rank - step, self.rank + step, self.group)
        return part if home is None else join(_unpacked(home.wait()[:, :, :length]), part)

    def _visitors(self, own: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the tensor of each other rank, one at a time; all are of one shape."""
        coming: Pending | None = None
        for step in range(1, self.size):
            own = own if coming is None else coming.wait()
            coming = exchange(own, self.rank + 1, self.rank - 1, self.group)
            if step > 1:  # attended to while it travels on
                yield (self.rank - step + 1) % self.size, own
        if coming is not None:
            yield (self.rank + 1) % self.size, coming.wait()


def _attend_new(q: Tensor, k: Tensor, v: Tensor) -> Part:
    """Attend causally with the last queries [1, H, W, K] to k, v [1, T, G, K]; a wide part."""
    dtype = product_dtype(q.dtype, q.device)
    q, k, v = q.to(dtype), k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
    first = k.shape[2] - q.shape[2]
    part = attend_own(q, k[:, :, first:], v[:, :, first:])
    if first:  # tokens before the first query are all of its past
        part = join(attend_past(q, k[:, :, :first], v[:, :, :first]), part)
    return _wide(part)


def _attend_past(q: Tensor, blocks: Iterable[Tensor]) -> Part:
    """Attend with queries [1, H, W, K] to all keys of blocks [n, 2, G, K]; a wide part."""
    dtype = product_dtype(q.dtype, q.device)
    q, part = q.to(dtype), None
    for block in blocks:
        k, v = (x.transpose(0, 1)[None] for x in block.to(dtype).unbind(1))  # [1, G, n, K]
        found = _wide(attend_past(q, k, v))
        part = found if part is None else join(found, part)
    if part is None:  # no keys: nothing, with a sum of 0
        part = _wide((torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"))))
    return part


def _wide(part: Part) -> Part:
    """Return a part in fp32 (fp64 for fp64), in which parts of many ranks are joined."""
    return wide(part[0]), wide(part[1])


def _packed(part: Part) -> Tensor:
    return torch.cat((part[0], part[1][..., None]), -1)  # [1, H, W, K + 1]


def _unpacked(x: Tensor) -> Part:
    return x[..., :-1], x[..., -1]
