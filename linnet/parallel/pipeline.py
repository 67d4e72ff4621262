"""Pipeline parallelism: stages of layers, one forward and one backward at a time (1F1B).

The schedule is PyTorch's. It hands on activations only, so what else a micro-batch needs (offsets,
positions, targets) is given to all stages beforehand and looked up by the micro-batch's number. The
balancing losses of a stage's layers join the backward pass where its output leaves.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from linnet.model.attention import Context
from linnet.model.moe import RouterStats
from linnet.model.transformer import Model
from linnet.parallel.collectives import receive, send
from linnet.parallel.context import Shard

AuxLoss = Callable[[list[RouterStats], Shard], Tensor]
"""Gives the scaled auxiliary loss of some layers for one micro-batch."""


class Stage(nn.Module):
    """The layers of one stage, with the embedding before the first and the norm after the last.

    Attributes:
        shards: what each micro-batch is, set before a step.
        stats: of the routers, a list per micro-batch, gathered in training.
    """

    def __init__(self, model: Model, is_first: bool, is_last: bool) -> None:
        super().__init__()
        self.model, self.is_first, self.is_last = model, is_first, is_last
        self.shards: Sequence[Shard] = ()
        self.stats: list[list[RouterStats]] = []
        self.aux_loss: AuxLoss | None = None

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Run micro-batch `index` [1]; x is ids [1, T] in the first stage, [1, T, D] in others."""
        shard = self.shards[int(index)]
        context: Context = self.model.context(shard.positions, shard.cu_seqlens)
        y, stats = self.model.run_blocks(self.model.embed(x) if self.is_first else x, context)
        if self.is_last:
            y = self.model.norm(y)
        if self.training and self.aux_loss is not None:
            self.stats.append(stats)
            y = _Attach.apply(y, self.aux_loss(stats, shard))
        return y


class Pipeline:
    """Runs a stage's share of a step.

    Args:
        stage: of this rank, sharded or not.
        group: one rank of each stage, in their order.
        hidden_size: of the model.
        dtype: of the activations.
        nll: gives the loss of the last stage's output [1, T, D] and targets [1, T].
        aux_loss: of a stage's layers.
    """

    def __init__(
        self,
        stage: Stage,
        group: dist.ProcessGroup,
        hidden_size: int,
        dtype: torch.dtype,
        nll: Callable[[Tensor, Tensor], Tensor],
        aux_loss: AuxLoss,
    ) -> None:
        self.stage, self.group, self.nll = stage, group, nll
        self.hidden_size, self.dtype = hidden_size, dtype
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        stage.aux_loss = aux_loss
        self._schedules: dict[tuple[int, int], Schedule1F1B] = {}

    def run(self, shards: Sequence[Shard]) -> list[Tensor]:
        """Add up the gradients of several micro-batches; return their losses in the last stage.

        Raises:
            ValueError: fewer micro-batches than stages, or of different lengths.
        """
        lengths = {shard.tokens.shape[1] for shard in shards}
        if len(lengths) > 1:
            raise ValueError(f"micro-batches of {sorted(lengths)} tokens; stages want one length")
        self.stage.shards, self.stage.stats = shards, []
        schedule = self._schedule(len(shards), lengths.pop())
        inputs = (torch.cat([s.tokens for s in shards]),) if self.rank == 0 else ()
        arguments: dict[str, Any] = {"index": torch.arange(len(shards))}
        losses: list[Tensor] = []
        if self.rank == self.size - 1:
            arguments |= {"target": torch.cat([s.targets for s in shards]), "losses": losses}
        schedule.step(*inputs, return_outputs=False, **arguments)
        return losses

    @torch.no_grad()
    def evaluate(self, shard: Shard) -> Tensor | None:
        """Return the loss of one micro-batch in the last stage, None elsewhere."""
        self.stage.shards = (shard,)
        index = torch.zeros(1, dtype=torch.int64)
        shape = (*shard.tokens.shape, self.hidden_size)
        x = shard.tokens
        if self.rank:
            x = torch.empty(shape, dtype=self.dtype, device=shard.tokens.device)
            receive(x, self.rank - 1, self.group)
        y = self.stage(x, index)
        if self.rank < self.size - 1:
            send(y, self.rank + 1, self.group)
            return None
        return self.nll(y, shard.targets)

    def _schedule(self, num_micro_batches: int, length: int) -> Schedule1F1B:
        key = (num_micro_batches, length)
        if key not in self._schedules:
            hidden = torch.empty(1, length, self.hidden_size, dtype=self.dtype, device="meta")
            ids = torch.empty(1, length, dtype=torch.int64, device="meta")
            pipeline_stage = PipelineStage(
                self.stage,
                self.rank,
                self.size,
                next(self.stage.parameters()).device,
                input_args=(hidden.requires_grad_() if self.rank else ids,),
                output_args=(hidden.clone().requires_grad_(),),
                group=self.group,
            )
            self._schedules[key] = Schedule1F1B(
                pipeline_stage, num_micro_batches, loss_fn=self.nll, scale_grads=False
            )
        return self._schedules[key]


class _Attach(torch.autograd.Function):
    """The first argument, whose backward pass also begins one at the second, with gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (loss,) = ctx.saved_tensors
        return grads[0], torch.ones_like(loss)
