"""The loss of a rank's rows, as its part of the loss of all rows of a step."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from linnet.model.moe import RouterStats
from linnet.ops import cross_entropy, load_balancing_loss
from linnet.ops.cross_entropy import IGNORE
from linnet.parallel.apply import ParallelModel
from linnet.parallel.balance import share_stats
from linnet.parallel.context import Shard
from linnet.train.recipe import OptimSection


class RowLoss:
    """Scales what the rows of a step add to its loss.

    Args:
        parallel: the model.
        optim: weight, normalization and extent of the balancing loss.

    Attributes:
        num_targets: of all rows of all ranks.
        aux: this rank's part of the balancing loss so far, without its coefficient.
    """

    def __init__(self, parallel: ParallelModel, optim: OptimSection) -> None:
        self.parallel, self.optim = parallel, optim
        self.num_targets = 1.0
        self.aux = 0.0
        self._shares: list[float] = []
        self._number = 0
        axis = "cp" if optim.aux_loss_over == "row" else "tokens"
        self._group = parallel.mesh.group(axis)

    def begin(self, num_targets: Sequence[int], add_up: Callable[[Tensor], Tensor]) -> None:
        """Begin a step.

        Args:
            num_targets: of this rank's rows.
            add_up: gives the sum of a tensor over all ranks.
        """
        layout = self.parallel.mesh.layout
        own = torch.tensor(num_targets, dtype=torch.float64)
        together = add_up(own) * layout.num_rows / layout.world_size
        self.num_targets = float(together.sum())
        # What a row's balancing loss weighs, or that of the rows which the ranks have at a time.
        weighs = own if self.optim.aux_loss_over == "row" else together
        self._shares = (weighs / self.num_targets).tolist()
        self._number, self.aux = 0, 0.0

    def nll(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of tokens, over the targets of the step.

        Args:
            hidden: [1, T, D] that the LM head reads.
            targets: [1, T].
        """
        learned = targets[0] != IGNORE
        weight = self.parallel.model.lm_head.weight
        return cross_entropy(hidden[0][learned], weight, targets[0][learned]) / self.num_targets

    def scaled_aux(self, stats: list[RouterStats], shard: Shard) -> Tensor:
        """Return this rank's part of the next row's balancing loss, of the layers that it has."""
        shared = share_stats(stats, shard.tokens.shape[1], self._group)
        normalization = self.optim.aux_loss_normalization
        losses = [load_balancing_loss(s.load, s.probability, normalization) for s in shared]
        aux = torch.stack(losses).sum() / self.parallel.config.num_hidden_layers
        share = self._shares[self._number]
        self._number += 1
        self.aux += float(aux.detach()) * share / dist.get_world_size(self._group)
        return self.optim.aux_loss_coef * share * aux
