"""AdamW over fp32 master weights (MiniMax-01, section 4.2: betas 0.9 and 0.95, decay 0.1)."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from linnet.model.transformer import Model
from linnet.train.recipe import OptimSection


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimSection) -> torch.optim.AdamW:
    """Return AdamW with decay on matrices and none on norms."""
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=True
    )


def optimizer_tensors(model: Model, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Return the optimizer's moments and step counts by parameter name, as `exp_avg/<name>` etc."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value
    return tensors


def restore_optimizer(
    model: Model, optimizer: torch.optim.AdamW, tensors: dict[str, Tensor]
) -> None:
    """Put back what `optimizer_tensors` returned."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        optimizer.state[parameters[name]][kind] = value


def clip_gradients(model: Model, max_norm: float) -> float:
    """Scale all gradients to a joint norm of at most `max_norm` (0: leave them); return the norm.

    A norm that is not finite leaves the gradients as they are, for the caller to discard.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    total = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = float(total)
    if 0 < max_norm < norm < float("inf"):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return norm
