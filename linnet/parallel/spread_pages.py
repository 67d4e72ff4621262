"""Pages of keys and values that ranks share, and attention to what lies on all of them.

Every rank keeps some tokens of each page, so pages have the same numbers everywhere, and no keys
that are kept ever move: without a mask the order of keys does not matter, so each rank attends to
its own with the queries of all, and the outputs are joined by their log-sums (the pass-Q of arXiv
2411.01783). Every rank has the lightning states whole.
"""

import itertools
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from linnet.model.attention import Attend
from linnet.model.paged import PAGE_SIZE, PackedRows, PagedMemory, Row
from linnet.ops.attention_parts import Part, attend_own, attend_past, join
from linnet.ops.matmul import product_dtype, wide
from linnet.parallel.collectives import all_gather, all_to_all
from linnet.parallel.tensor import share_bounds


class PageShare:
    """Which tokens of each page lie on this rank: every P-th of them.

    Args:
        group: the ranks that share the pages, no more than a page has tokens.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.page_len = len(range(self.rank, PAGE_SIZE, self.size))
        """Tokens of a page that this rank keeps."""

    def held(self, length: int) -> int:
        """Return how many of the first `length` tokens of a sequence this rank keeps."""
        pages, rest = divmod(length, PAGE_SIZE)
        return pages * self.page_len + len(range(self.rank, rest, self.size))

    def own(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return which offsets [T] in pages are kept here, as indices, and their places here."""
        index = (offsets % self.size == self.rank).nonzero()[:, 0]
        return index, offsets[index] // self.size


class SpreadRows(PackedRows):
    """Sequences in shared pages, with new tokens that every rank runs: decoding, short chunks.

    Args:
        share: of this rank.
        memory, rows, lengths, device, num_wanted: as of `PackedRows`.
    """

    def __init__(
        self,
        share: PageShare,
        memory: PagedMemory,
        rows: Sequence[Row],
        lengths: Sequence[int],
        device: torch.device,
        num_wanted: Sequence[int],
    ) -> None:
        super().__init__(memory, rows, lengths, device, num_wanted)
        self._share = share
        self._own, self._places = share.own(self._places)
        self._pages = self._pages[self._own]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Keep this rank's share of k, v [1, T, G, K]; attend with all queries [1, W, H, K]."""
        memory, share = self._memory, self._share
        memory.write(layer, self._pages, self._places, k[:, self._own], v[:, self._own])
        asking = [
            (row, own_q.transpose(1, 2), own_k, own_v)
            for row, own_q, own_k, own_v in self.asking(q, k, v)
        ]
        found = [
            _packed(_attend_past(own_q, memory.past(layer, row, share.held(row.length))))
            for row, own_q, _, _ in asking
            if row.length
        ]
        # [P, H, W, K + 1] of the sequences that have a past; meanwhile each sees its new tokens.
        coming = all_gather(torch.cat(found, 2), share.group) if found else None
        parts = [_attend_new(own_q, own_k, own_v) for _, own_q, own_k, own_v in asking]
        if coming is not None:
            widths = [own.shape[2] for own in found]
            of_ranks = iter(coming.wait().split(widths, 2))
            parts = [
                _joined(part, next(of_ranks).split(1)) if row.length else part
                for (row, *_), part in zip(asking, parts, strict=True)
            ]
        outputs = [part[0].transpose(1, 2).to(v.dtype) for part in parts]
        return torch.cat(outputs, 1) if outputs else q


class SplitRow:
    """One sequence in shared pages, of whose new tokens each rank runs a part: long chunks.

    Args:
        share: of this rank.
        memory: where the sequence lies.
        row: the sequence, with pages for the new tokens.
        num_tokens: new ones, at least one for each rank.
        num_wanted: of how many of the last ones the hidden states are read.
    """

    def __init__(
        self, share: PageShare, memory: PagedMemory, row: Row, num_tokens: int, num_wanted: int
    ) -> None:
        self.share, self._memory, self._row = share, memory, row
        self.bounds = share_bounds(num_tokens, share.size)
        """[P + 1] where the part of each rank starts among the new tokens, and their number."""
        self.lengths = [stop - start for start, stop in itertools.pairwise(self.bounds)]
        self.part = slice(*self.bounds[share.rank : share.rank + 2])
        """Those of this rank."""
        self.num_read = [num_wanted] * share.size if num_wanted <= 1 else self.lengths
        """Of how many tokens of its part each rank reads the hidden states. One for all: no rank
        may leave out the experts of the last layer, which might wait for it."""
        device = memory.device
        positions = torch.arange(row.length, row.length + num_tokens, device=device)
        self._own, self._places = share.own(positions % PAGE_SIZE)
        pages = torch.tensor(row.pages, device=device)
        self._pages = pages[positions[self._own] // PAGE_SIZE]
        self._positions = positions[None, self.part]
        self._new_states: dict[int, Tensor] = {}

    @property
    def wanted(self) -> Tensor:
        """[W] int64 indices of the tokens of the part whose hidden states are read: the last."""
        stop = self.part.stop - self.part.start
        first = stop - self.num_read[self.share.rank]
        return torch.arange(first, stop, device=self._positions.device)

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return the positions [1, T_r] of the tokens that run here."""
        return self._positions

    def state(self, layer: int) -> Tensor | None:
        """Return the state [1, H, K, K] of a layer before the chunk."""
        states = self._memory.states[layer]
        assert states is not None
        return states[self._row.slot][None]

    def set_state(self, layer: int, state: Tensor) -> None:
        """Keep the state [1, H, K, K] after the chunk until `commit`."""
        self._new_states[layer] = state

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Attend with the queries [1, W, H, K] of the part; k, v [1, T_r, G, K] are kept by all.

        Only new keys and values travel, and queries with what is found for them.
        """
        memory, share, row = self._memory, self.share, self._row
        longest = max(self.lengths)
        coming = all_gather(padded(torch.stack((k[0], v[0]), 1)[None], longest), share.group)
        # Of the last layer nobody reads more.
        is_last = layer == len(memory.kinds) - 1
        num_queries = max(self.num_read if is_last else self.lengths)
        found = None
        if row.length and num_queries:
            # [P, W, H, K] of all ranks, as heads of one sequence
            asked = all_gather(padded(q, num_queries), share.group).wait()
            part = _attend_past(
                asked.flatten(0, 1).transpose(0, 1)[None],
                memory.past(layer, row, share.held(row.length)),
            )
            answers = _packed(part)[0].transpose(0, 1).unflatten(0, (share.size, num_queries))
            each = [1] * share.size
            found = all_to_all(answers, each, each, share.group)  # [P, W, H, K + 1]
        every = in_order(coming.wait(), self.lengths)[None]
        memory.write(layer, self._pages, self._places, *every[:, self._own].unbind(2))
        if not num_queries:
            return q
        new_k, new_v = every[:, : self.part.stop].unbind(2)
        part = _attend_new(q.transpose(1, 2), new_k, new_v)
        if found is not None:
            part = _joined(part, found.wait()[:, : q.shape[1]].transpose(1, 2).split(1))
        return part[0].transpose(1, 2).to(v.dtype)

    def commit(self, keep: Sequence[bool]) -> None:
        """Replace the states and count the tokens, if they are kept."""
        if not all(keep):
            return
        for layer, new in self._new_states.items():
            states = self._memory.states[layer]
            assert states is not None
            states[self._row.slot] = new[0]
        self._row.length += self.bounds[-1]


def _attend_new(q: Tensor, k: Tensor, v: Tensor) -> Part:
    """Attend causally with the last queries [1, H, W, K] to k, v [1, T, G, K]; a wide part."""
    dtype = product_dtype(q.dtype, q.device)
    q, k, v = q.to(dtype), k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
    first = k.shape[2] - q.shape[2]
    part = attend_own(q, k[:, :, first:], v[:, :, first:])
    if first:  # tokens before the first query are all of its past
        part = join(attend_past(q, k[:, :, :first], v[:, :, :first]), part)
    return _wide(part)


def _attend_past(q: Tensor, segments: Iterable[tuple[Tensor, Tensor]]) -> Part:
    """Attend with queries [1, H, W, K] to all keys of segments [1, S, G, K]; a wide part."""
    dtype = product_dtype(q.dtype, q.device)
    q, part = q.to(dtype), None
    for k, v in segments:
        found = _wide(attend_past(q, k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)))
        part = found if part is None else join(found, part)
    if part is None:  # no keys: nothing, with a sum of 0
        part = _wide((torch.zeros_like(q), q.new_full(q.shape[:3], float("-inf"))))
    return part


def _joined(part: Part, of_ranks: Iterable[Tensor]) -> Part:
    """Join to a part what the ranks found, [1, H, W, K + 1] of each: everywhere in one order."""
    for found in of_ranks:
        part = join((found[..., :-1], found[..., -1]), part)
    return part


def _packed(part: Part) -> Tensor:
    return torch.cat((part[0], part[1][..., None]), -1)  # [1, H, W, K + 1]


def _wide(part: Part) -> Part:
    """Return a part in fp32 (fp64 for fp64), in which parts of many ranks are joined."""
    return wide(part[0]), wide(part[1])


def padded(x: Tensor, length: int) -> Tensor:
    """Return x [1, T, ...] with zeros up to a length that is the same on all ranks."""
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, length - x.shape[1]))


def in_order(parts: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return what the ranks have, padded to one length [P, T, ...], one after the other."""
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
