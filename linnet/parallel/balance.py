"""Router statistics over all ranks, and how evenly experts and ranks are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from linnet.model.moe import RouterStats


def share_stats(
    stats: Sequence[RouterStats], num_tokens: int, group: dist.ProcessGroup
) -> list[RouterStats]:
    """Return the statistics of all ranks' tokens, with this rank's part of the gradient.

    The balancing losses that the ranks form from them have the gradients of the loss over all
    tokens in sum. One exchange for all layers.

    Args:
        stats: per layer, of this rank's tokens.
        num_tokens: of this rank.
        group: the ranks that hold different tokens.
    """
    own = [torch.cat((s.load, s.probability.detach(), s.entropy[None])) for s in stats]
    # fp64: counts of many tokens stay exact.
    sums = torch.stack(own).double() * num_tokens
    dropped = torch.stack([s.dropped for s in stats]).double()
    total = torch.cat((sums.flatten(), dropped, sums.new_tensor([num_tokens])))
    dist.all_reduce(total, group=group)
    sums, dropped = total[: sums.numel()].view_as(sums) / total[-1], total[sums.numel() : -1]
    share = num_tokens / float(total[-1])
    num_experts = stats[0].load.shape[0]
    result = []
    for own_stats, means, lost in zip(stats, sums.to(stats[0].load.dtype), dropped, strict=True):
        load, mean, entropy = means.split([num_experts, num_experts, 1])
        # The value is that of all tokens, the gradient that of this rank's.
        part = own_stats.probability * share
        probability = part + (mean - part.detach())
        result.append(RouterStats(load, probability, lost.round().long(), entropy[0]))
    return result


@dataclass(frozen=True, slots=True)
class Balance:
    """How evenly the tokens of one layer went to its experts and to the ranks that have them.

    Attributes:
        layer: its number.
        load: [E] slots per token of each expert.
        rows: [ranks] rows that the experts of each rank of a block had.
        dropped: slots over capacity.
        entropy: nats, mean over tokens.
    """

    layer: int
    load: Tensor
    rows: Tensor
    dropped: int
    entropy: float

    @property
    def load_max_over_mean(self) -> float:
        """The busiest expert's load over the mean."""
        return float(self.load.max() / self.load.mean())

    @property
    def rank_max_over_mean(self) -> float:
        """The busiest rank's rows over the mean; a step waits for that rank."""
        rows = self.rows.double()
        return float(rows.max() / rows.mean().clamp(min=1))

    @property
    def num_idle(self) -> int:
        """Experts that had nothing to do."""
        return int((self.load == 0).sum())


def gather_rows(received: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Return [ranks, layers] int64: the rows that each rank's experts had in each layer."""
    own = torch.tensor(list(received))
    result = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(result, own, group=group)
    return torch.stack(result)


def balance_table(balances: Sequence[Balance]) -> str:
    """Return a table of text, a line per layer."""
    lines = ["layer  expert max/mean  idle  dropped  entropy  rank max/mean  rows per rank"]
    for b in balances:
        rows = " ".join(str(int(n)) for n in b.rows)
        lines.append(
            f"{b.layer:5d}  {b.load_max_over_mean:15.2f}  {b.num_idle:4d}  {b.dropped:7d}  "
            f"{b.entropy:7.3f}  {b.rank_max_over_mean:13.2f}  {rows}"
        )
    return "\n".join(lines) + "\n"
