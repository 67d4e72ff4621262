"""The training loss of one packed batch, and the held-out measure of a model."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from linnet.data import PackedBatch
from linnet.model.moe import RouterStats
from linnet.model.transformer import Model
from linnet.ops import cross_entropy, load_balancing_loss
from linnet.ops.cross_entropy import IGNORE
from linnet.ops.moe import Normalization


class BatchLoss(NamedTuple):
    """The loss of one forward pass, in parts."""

    nll: Tensor
    """Scalar fp32, nats: negative log-likelihood summed over the targets."""
    aux: Tensor
    """Scalar fp32: load-balancing loss, averaged over layers, without its coefficient."""
    router: list[RouterStats]
    """Per layer."""


def batch_loss(model: Model, batch: PackedBatch, normalization: Normalization) -> BatchLoss:
    """Run the model on a packed batch, in training mode."""
    hidden, router = model.hidden_states(batch.tokens, cu_seqlens=batch.cu_seqlens)
    nll = _target_nll(model, hidden[0], batch)
    losses = [load_balancing_loss(s.load, s.probability, normalization) for s in router]
    return BatchLoss(nll, torch.stack(losses).mean(), router)


@torch.no_grad()
def held_out_nll(model: Model, batches: Iterable[PackedBatch]) -> float:
    """Return the negative log-likelihood of all targets together, in nats."""
    was_training = model.training
    model.eval()
    total = 0.0
    for batch in batches:
        hidden, _ = model.hidden_states(batch.tokens, cu_seqlens=batch.cu_seqlens)
        total += float(_target_nll(model, hidden[0], batch))
    model.train(was_training)
    return total


def _target_nll(model: Model, hidden: Tensor, batch: PackedBatch) -> Tensor:
    """Return the summed loss from hidden states [T, D]; positions without a target cost nothing."""
    targets = batch.targets[0]
    if batch.num_targets < len(targets):
        learned = targets != IGNORE
        hidden, targets = hidden[learned], targets[learned]
    return cross_entropy(hidden, model.lm_head.weight, targets)
