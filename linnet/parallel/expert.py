"""Expert parallelism: tokens travel to the ranks that have their experts, and back.

    EP    a rank has some of the experts; rows go to their expert's rank by all-to-all
    ETP   a rank has a part of each expert's width; the ranks of an ETP group gather each other's
          rows, each computes its part of all, and a reduce-scatter adds the parts up
    EDP   ranks with the same part of the same experts; their gradients are summed (by FSDP)

Tokens may be cut in groups: while one group's experts are computed the rows of the next are on
their way. EP and ETP have process groups of their own, so their exchanges overlap each other too,
in the backward pass as well (MiniMax-01, section 3.1).

All ranks of an EP x ETP block know all counts from one gather of [groups, E] numbers, hence what
each will receive; no row carries its expert's number.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from linnet.model.moe import Dispatch, Experts
from linnet.ops import admit, count_choices, expert_capacity
from linnet.ops.moe import Grouping, Routing, combine_rows, gather_rows, group_by_expert
from linnet.parallel.collectives import Pending, all_gather, all_to_all, reduce_scatter
from linnet.parallel.mesh import Mesh
from linnet.parallel.tensor import all_tokens, own_tokens, share_bounds
from linnet.parallel.transfer import Transfer, begin, finish


class ExpertsAcrossRanks:
    """Takes the place of a layer's `dispatch`.

    Args:
        mesh: of the ranks.
        num_experts: of the whole layer.
        num_groups: in which tokens are cut so that exchanges overlap with computing.
        local: applies this rank's experts to rows.
    """

    def __init__(self, mesh: Mesh, num_experts: int, num_groups: int, local: Dispatch) -> None:
        self.mesh, self.num_groups, self.local = mesh, num_groups, local
        self.num_experts = num_experts
        self.ep, self.etp, self.tp = mesh.size("ep"), mesh.size("etp"), mesh.size("tp")
        self.received = 0
        """Rows that this rank's experts had in the last call, those of its ETP group included."""

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """Apply the routed experts to tokens [T, D] and add up the weighted results."""
        if self.ep == self.etp == self.tp == 1:
            self.received = routing.experts.numel()
            return self.local(x, routing, experts)
        num_tokens = len(x)
        if self.tp > 1:  # the tokens are on all of these ranks; each sends some
            x, routing = self._own(x, routing)
        parts = self._cut(x, routing)
        counts = self._counts([grouping for _, grouping, _ in parts])
        flights = [
            _Flight(self, gather_rows(rows, grouping, routing.experts.shape[1]), counts[:, n])
            for n, (rows, grouping, _) in enumerate(parts)
        ]
        self.received = sum(flight.num_rows for flight in flights)
        outputs = self._fly(flights, experts)
        y = torch.cat(
            [
                combine_rows(rows, grouping, weights)
                for rows, (_, grouping, weights) in zip(outputs, parts, strict=True)
            ]
        )
        return y if self.tp == 1 else all_tokens(y, num_tokens, self.mesh.group("tp"))

    def _own(self, x: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        group = self.mesh.group("tp")
        bounds = share_bounds(len(x), self.tp)
        rank = self.mesh.rank("tp")
        own = slice(bounds[rank], bounds[rank + 1])
        kept = None if routing.kept is None else routing.kept[own]
        return own_tokens(x, group), Routing(
            routing.experts[own],
            own_tokens(routing.weights, group),
            routing.probabilities[own],
            kept,
        )

    def _cut(self, x: Tensor, routing: Routing) -> list[tuple[Tensor, Grouping, Tensor]]:
        """Return tokens, their slots by expert and their weights, of each group of tokens."""
        bounds = share_bounds(len(x), self.num_groups)
        parts = []
        for start, stop in itertools.pairwise(bounds):
            own = slice(start, stop)
            kept = None if routing.kept is None else routing.kept[own]
            part = Routing(routing.experts[own], routing.weights[own], routing.probabilities, kept)
            parts.append((x[own], group_by_expert(part, self.num_experts), part.weights))
        return parts

    def _counts(self, groupings: list[Grouping]) -> Tensor:
        """Return [ep, groups, etp, E] int64: rows of every rank of the block for each expert."""
        own = torch.stack([grouping.offsets.diff() for grouping in groupings])
        gathered = all_gather(own[None], self.mesh.group("experts")).wait()
        return gathered.view(self.ep, self.etp, *own.shape).transpose(1, 2).cpu()

    def _fly(self, flights: list["_Flight"], experts: Experts) -> list[Tensor]:
        """Send all groups out, compute each when it is there, and bring all back."""
        stages = (_Flight.send, _Flight.gather, lambda f: f.compute(experts), _Flight.send_back)
        # In each tick every flight is one stage further than the next one.
        for tick in range(len(flights) + len(stages) - 1):
            for n, stage in enumerate(stages):
                if 0 <= tick - n < len(flights):
                    stage(flights[tick - n])
        return [flight.land() for flight in flights]


class _Flight:
    """The rows of one group of tokens, from their rank to their experts and back."""

    def __init__(self, ranks: ExpertsAcrossRanks, rows: Tensor, counts: Tensor) -> None:
        """Plan it.

        Args:
            ranks: where to.
            rows: [R, D] of this rank, sorted by expert.
            counts: [ep, etp, E] rows of every rank of the block for each expert.
        """
        self.ranks, self.x = ranks, rows
        mesh, per_rank = ranks.mesh, ranks.num_experts // ranks.ep
        ep_rank, etp_rank = mesh.rank("ep"), mesh.rank("etp")
        own = slice(ep_rank * per_rank, (ep_rank + 1) * per_rank)
        sent = counts[ep_rank, etp_rank].view(ranks.ep, per_rank).sum(1).tolist()
        arriving = counts[:, :, own]  # [ep, etp, E / ep]
        received = arriving[:, etp_rank].sum(1).tolist()
        group = mesh.group("ep")
        self._out = Transfer(
            lambda x: all_to_all(x, sent, received, group),
            lambda grad: all_to_all(grad, received, sent, group),
        )
        self._home = Transfer(self._out.back, self._out.there)
        numbers = torch.arange(per_rank)
        self._experts = [
            torch.cat([numbers.repeat_interleave(one) for one in arriving[:, member]])
            for member in range(ranks.etp)
        ]
        """Of each rank of the ETP group: the local expert of each row that arrives there."""
        self.num_rows = sum(map(len, self._experts))
        self._etp_rank = etp_rank

    def send(self) -> None:
        """Start towards the experts' ranks."""
        if self.ranks.ep > 1:
            self.x = begin(self.x, self._out)

    def gather(self) -> None:
        """Arrive, and start to gather what arrived at the other ranks of the ETP group."""
        if self.ranks.ep > 1:
            self.x = finish(self.x, self._out)
        if self.ranks.etp > 1:
            group = self.ranks.mesh.group("etp")
            lengths = [len(experts) for experts in self._experts]
            self._widen = Transfer(
                lambda x: all_gather(_padded(x, max(lengths))[None], group).then(
                    lambda rows: _joined(rows, lengths)
                ),
                lambda grad: self._summed(grad, lengths, group),
            )
            self._narrow = Transfer(self._widen.back, self._widen.there)
            self.x = begin(self.x, self._widen)

    def _summed(self, x: Tensor, lengths: list[int], group: dist.ProcessGroup) -> Pending:
        parts = torch.stack([_padded(part, max(lengths)) for part in x.split(lengths)])
        own = lengths[self._etp_rank]
        return reduce_scatter(parts, group).then(lambda rows: rows[0, :own])

    def compute(self, experts: Experts) -> None:
        """Apply this rank's experts, or its part of each."""
        if self.ranks.etp > 1:
            self.x = finish(self.x, self._widen)
        chosen = torch.cat(self._experts).to(self.x.device)[:, None]
        ones = torch.ones(chosen.shape, dtype=torch.float32, device=self.x.device)
        self.x = self.ranks.local(self.x, Routing(chosen, ones, ones, None), experts)
        if self.ranks.etp > 1:
            self.x = begin(self.x, self._narrow)

    def send_back(self) -> None:
        """Start homeward."""
        if self.ranks.etp > 1:
            self.x = finish(self.x, self._narrow)
        if self.ranks.ep > 1:
            self.x = begin(self.x, self._home)

    def land(self) -> Tensor:
        """Return the results [R, D] of this rank's rows."""
        return finish(self.x, self._home) if self.ranks.ep > 1 else self.x


@dataclass
class GlobalRouter:
    """Takes the place of a layer's `admit`: one capacity for the tokens of all ranks.

    The counts of all ranks are gathered, and every rank admits what the global capacity leaves it
    (MiniMax-01, section 2.1). First choices are served before second ones, and within a choice the
    ranks in an order that turns by one with each step: the last ranks, which hold the last tokens
    of rows, would otherwise always be the ones to lose.

    Attributes:
        group: the ranks that hold different tokens.
        first: the rank that is served first.
    """

    group: dist.ProcessGroup
    first: int = 0

    def __call__(self, routing: Routing, capacity_factor: float) -> Routing:
        """Drop the slots over the capacity of all ranks' tokens together."""
        size, rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        counts = all_gather(count_choices(routing)[None], self.group).wait()  # [P, k, E]
        # The counts also tell how many tokens there are: each has one first choice.
        total = int(counts[:, 0].sum())
        order = [(self.first + place) % size for place in range(size)]
        before = counts[order[: order.index(rank)]].sum(0)
        every = counts.sum(0)
        served_before = every.cumsum(0) - every + before
        top_k, num_experts = every.shape
        capacity = expert_capacity(total, num_experts, top_k, capacity_factor)
        return admit(routing, capacity, served_before)


def _padded(x: Tensor, length: int) -> Tensor:
    return torch.cat((x, x.new_zeros(length - len(x), *x.shape[1:])))


def _joined(rows: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([part[:length] for part, length in zip(rows, lengths, strict=True)])
