"""Next-token loss from hidden states, without ever holding all logits.

MiniMax-M1, section 3.2: the LM head runs in fp32 (hidden states and weight both), because bf16
logits make training and inference probabilities disagree. With a vocabulary of 200,064 the logits
of 8,192 tokens would take 6.5 GB, so they are formed, used and dropped a chunk of tokens at a time.
"""

import torch
from torch import Tensor

from linnet.ops.matmul import wide

IGNORE = -100
"""Target value of a position that carries no loss."""

CHUNK_ELEMENTS = 2**21
"""Logits formed at a time ..."""

MIN_CHUNK_TOKENS = 128
"""... unless these are fewer tokens, for which the product would be inefficient."""


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Return the summed negative log-likelihood of `targets`, in nats.

    Both gradients are formed in the forward pass, one chunk of logits at a time.

    Args:
        hidden: [T, D] final hidden states.
        weight: [vocab, D] LM head.
        targets: [T] int64 token ids; `IGNORE` (-100) marks positions without a target.

    Returns:
        Scalar fp32 sum over the positions with a target (fp64 for fp64 input).

    Raises:
        ValueError: shapes that do not fit, or a target outside the vocabulary.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)} do not fit"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets {tuple(targets.shape)} do not fit hidden {tuple(hidden.shape)}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64; got {targets.dtype}")
    outside = targets[((targets < 0) & (targets != IGNORE)) | (targets >= weight.shape[0])]
    if len(outside):
        raise ValueError(
            f"target {int(outside[0])} outside a vocabulary of {weight.shape[0]}; "
            f"positions without a target carry {IGNORE}"
        )
    return _CrossEntropy.apply(hidden, weight, targets)


def lm_head(hidden: Tensor, weight: Tensor) -> Tensor:
    """Return fp32 logits `hidden @ weight.T`, both operands widened first.

    Args:
        hidden: [..., D].
        weight: [vocab, D].

    Returns:
        [..., vocab] fp32 (fp64 for fp64 input).
    """
    return torch.nn.functional.linear(wide(hidden), wide(weight))


def cross_entropy_reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Same contract as `cross_entropy`, from the full [T, vocab] logits."""
    logits = lm_head(hidden, weight)
    return torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        wide_weight = wide(weight)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(wide_weight) if wants_weight else None
        total = wide_weight.new_zeros(())
        chunk = max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS // max(1, weight.shape[0]))
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            x = wide(hidden[rows])
            logits = x @ wide_weight.T
            loss, grad_logits = _chunk_loss(logits, targets[rows], wants_hidden or wants_weight)
            total += loss
            if grad_hidden is not None:
                grad_hidden[rows] = (grad_logits @ wide_weight).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(grad_logits.T, x)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        # `grad` stays fp32: rounded to bf16 it would scale every gradient by a wrong factor.
        # The larger product is in place, so a second backward pass is an error.
        scaled_hidden = None if grad_hidden is None else grad_hidden * grad
        scaled_weight = None if grad_weight is None else grad_weight.mul_(grad)
        return scaled_hidden, scaled_weight, None


def _chunk_loss(logits: Tensor, targets: Tensor, wants_grad: bool) -> tuple[Tensor, Tensor]:
    """Return the summed loss of one chunk and d loss / d logits, in the memory of the logits."""
    valid = targets != IGNORE
    safe = targets.clamp(min=0)[:, None]
    log_sum = torch.logsumexp(logits, -1)
    losses = log_sum - logits.gather(1, safe)[:, 0]
    loss = torch.where(valid, losses, 0).sum()
    if not wants_grad:
        return loss, logits
    probabilities = logits.sub_(log_sum[:, None]).exp_()
    probabilities.scatter_add_(1, safe, -torch.ones_like(safe, dtype=logits.dtype))
    return loss, probabilities.mul_(valid[:, None])
