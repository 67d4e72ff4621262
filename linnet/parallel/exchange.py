"""The states that cross ranks: each piece gets the decayed sum of the states before it.

With S_j the state that piece j would leave behind if nothing came before it, the state that enters
piece r is `sum over j < r of exp(-s d(j, r)) S_j`, where d counts the tokens between the two, over
the pieces whose last document goes on into r. That is linear in S, so the gradient is the same sum
with sources and targets exchanged, and one volume: (P - 1) states per rank, whatever the length.

Three ways to move them, equal but for rounding:

- `all_gather`: everyone gets all states in one collective (LASP+, MiniMax-01, section 3.2.2);
- `two_level`: all states within a node, and between nodes only each node's sum;
- `ring`: each rank adds its own to what it received and passes it on: the least volume, P - 1 hops.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from linnet.parallel.collectives import Pending, all_gather, receive, send
from linnet.parallel.split import SequenceSplit

Mode = Literal["all_gather", "two_level", "ring"]


@dataclass(frozen=True, slots=True)
class Nodes:
    """The two groups of a two-level exchange.

    Attributes:
        size: neighboring ranks in a node; it divides the number of ranks.
        within: the group of this rank's node.
        across: the group of the ranks that have this one's place in their nodes.
    """

    size: int
    within: dist.ProcessGroup
    across: dist.ProcessGroup


class StateExchange:
    """Moves states between the ranks of a group."""

    def __init__(
        self, group: dist.ProcessGroup, mode: Mode = "all_gather", nodes: Nodes | None = None
    ) -> None:
        """Choose the way.

        Args:
            group: the ranks that hold a row, in its order.
            mode: how states are moved.
            nodes: for `two_level`.

        Raises:
            ValueError: `two_level` without nodes, or nodes that do not divide the group.
        """
        self.group, self.mode, self.nodes = group, mode, nodes
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if mode == "two_level" and (nodes is None or self.size % nodes.size):
            raise ValueError(
                f"two_level needs nodes whose size divides the {self.size} ranks; got "
                f"{None if nodes is None else nodes.size}"
            )

    def start(self, states: Tensor, decay: Tensor, split: SequenceSplit, reverse: bool) -> Pending:
        """Begin to move the states of this rank's pieces.

        Args:
            states: [C, H, K, V] of this rank's pieces, in their order.
            decay: [H] slopes.
            split: of the row.
            reverse: from late to early pieces, for gradients.

        Returns:
            `wait()` gives what enters each of this rank's pieces, [C, H, K, V].
        """
        if self.mode != "all_gather" and split.is_balanced:
            raise ValueError(f"the balanced split exchanges states by all_gather, not {self.mode}")
        if self.mode == "two_level":
            return self._start_two_level(states, decay, split, reverse)
        if self.mode == "ring":
            return Pending(lambda: self._ring(states, decay, split, reverse))
        gathered = all_gather(states, self.group)  # [P * C, ...], rank by rank
        own = split.numbers(self.rank)
        order = [number for rank in range(self.size) for number in split.numbers(rank)]
        factors = carry_factors(split, decay, reverse)[order][:, list(own)]
        return gathered.then(lambda x: _combine(factors, x))

    def _start_two_level(
        self, states: Tensor, decay: Tensor, split: SequenceSplit, reverse: bool
    ) -> Pending:
        assert self.nodes is not None
        nodes, size = self.nodes, self.nodes.size
        node = self.rank // size
        inside = slice(node * size, (node + 1) * size)
        factors = carry_factors(split, decay, reverse)
        gathered = all_gather(states, nodes.within)

        def across(near: Tensor) -> Tensor:
            total = _combine(node_factors(split, decay, size, node, reverse), near)
            totals = all_gather(total, nodes.across).wait()
            entering = _combine(factors[inside, self.rank, None], near)
            far = far_factors(split, decay, size, self.rank, reverse)
            return entering + _combine(far, totals)

        return gathered.then(across)

    def _ring(self, states: Tensor, decay: Tensor, split: SequenceSplit, reverse: bool) -> Tensor:
        step = -1 if reverse else 1
        before, after = self.rank - step, self.rank + step
        entering = torch.zeros_like(states)
        if 0 <= before < self.size:
            receive(entering, before, self.group)
        if 0 <= after < self.size:
            # What leaves: what entered, decayed over this piece if its document runs through it.
            leaving = states + entering * _through(split, decay, self.rank).to(states.dtype)
            between = carry_factors(split, decay, reverse)[self.rank, after, :, None, None]
            send(leaving * between.to(states.dtype), after, self.group)
        return entering


def carry_factors(split: SequenceSplit, decay: Tensor, reverse: bool = False) -> Tensor:
    """Return [C, C, H]: the weight of one piece's state (first index) in what enters another."""
    distances = split.distances.T if reverse else split.distances
    distances = distances.to(decay.device)[..., None]
    slopes = decay.double()
    # A slope of 0 keeps a state for ever, but does not carry it into another document.
    weights = torch.exp(-torch.where(distances.isinf(), 0.0, distances) * slopes)
    return torch.where(distances.isinf(), 0.0, weights)


def node_factors(
    split: SequenceSplit, decay: Tensor, size: int, node: int, reverse: bool
) -> Tensor:
    """Return [size, 1, H]: the weights of a node's states in the state that leaves it."""
    end = node * size if reverse else (node + 1) * size - 1
    first = node * size
    factors = []
    for rank in range(first, first + size):
        if rank == end:
            factors.append(torch.ones_like(decay, dtype=torch.float64))
            continue
        source, target = (end, rank) if reverse else (rank, end)
        distance = split.distance(source, target)
        runs_through = distance is not None and _runs_through(split, end)
        length = 0 if distance is None else distance + len(split.pieces[end])
        weight = torch.exp(-decay.double() * length)
        factors.append(weight if runs_through else torch.zeros_like(weight))
    return torch.stack(factors)[:, None]


def far_factors(split: SequenceSplit, decay: Tensor, size: int, rank: int, reverse: bool) -> Tensor:
    """Return [nodes, 1, H]: the weights of what leaves each node in what enters a rank."""
    own, factors = rank // size, []
    for node in range(split.num_ranks // size):
        end = node * size if reverse else (node + 1) * size - 1
        source, target = (rank, end) if reverse else (end, rank)
        is_before = node > own if reverse else node < own
        distance = split.distance(source, target) if is_before else None
        weight = torch.exp(-decay.double() * (distance or 0))
        factors.append(torch.zeros_like(weight) if distance is None else weight)
    return torch.stack(factors)[:, None]


def _runs_through(split: SequenceSplit, piece: int) -> bool:
    return split.pieces[piece].first_stop == split.pieces[piece].stop


def _through(split: SequenceSplit, decay: Tensor, piece: int) -> Tensor:
    """Return [H, 1, 1]: what is left of a state after a piece; 0 if a document ends within it."""
    if not _runs_through(split, piece):
        return torch.zeros_like(decay)[:, None, None]
    return torch.exp(-decay.double() * len(split.pieces[piece]))[:, None, None]


def _combine(factors: Tensor, states: Tensor) -> Tensor:
    """Return sum over sources of factors [S, T, H] times states [S, H, K, V], as [T, H, K, V]."""
    return torch.einsum("sth,shkv->thkv", factors.to(states.dtype), states)
