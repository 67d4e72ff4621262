"""The mixture-of-experts sublayer (MiniMax-01, section 2.1), with the optional shared expert.

`dispatch` moves tokens to the experts and back, and `admit` drops what is over their capacity;
`linnet.parallel` replaces both from outside.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet import ops
from linnet.model.config import ModelConfig
from linnet.model.layers import Linear
from linnet.ops.moe import Routing


class RouterStats(NamedTuple):
    """What one layer's router did with the tokens of one forward pass."""

    load: Tensor
    """[E] fp32 slots per token that each expert was asked for; sums to top-k."""
    probability: Tensor
    """[E] fp32 mean routing probability; carries the gradient of the balancing loss."""
    dropped: Tensor
    """Scalar int64: slots over capacity."""
    entropy: Tensor
    """Scalar fp32, nats: mean entropy of the routing probabilities of a token."""

    @classmethod
    def of(cls, routing: Routing) -> "RouterStats":
        """Summarize a routing."""
        load, probability = ops.expert_means(routing)
        p = routing.probabilities.detach()
        entropy = -torch.xlogy(p, p).sum(-1).mean() if len(p) else p.new_zeros(())
        kept = routing.kept
        dropped = load.new_zeros((), dtype=torch.int64) if kept is None else (~kept).sum()
        return cls(load, probability, dropped, entropy)


def dispatch_locally(x: Tensor, routing: Routing, experts: "Experts") -> Tensor:
    """Apply the routed `experts` to tokens [T, D] and add up the weighted results."""
    return ops.routed_ffn(x, routing, experts.gate_up, experts.down)


def admit_alone(routing: Routing, capacity_factor: float) -> Routing:
    """Drop the slots over the capacity of these tokens."""
    (num_tokens, top_k), num_experts = routing.experts.shape, routing.probabilities.shape[1]
    capacity = ops.expert_capacity(num_tokens, num_experts, top_k, capacity_factor)
    return ops.admit(routing, capacity)


class Experts(nn.Module):
    """The weights of all experts: `gate_up` [E, 2F, D] stacks w1 and w3, `down` [E, D, F] is w2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, width, hidden = config.num_local_experts, config.intermediate_size, config.hidden_size
        self.gate_up = nn.Parameter(torch.empty(num, 2 * width, hidden))
        self.down = nn.Parameter(torch.empty(num, hidden, width))

    def forward(self, x: Tensor, routing: Routing, dispatch: "Dispatch") -> Tensor:
        """Apply the routed experts to tokens [T, D]: within a call the weights are there."""
        return dispatch(x, routing, self)


Dispatch = Callable[[Tensor, Routing, Experts], Tensor]
"""The signature of `dispatch_locally`."""


class MixtureOfExperts(nn.Module):
    """Router and experts. The router runs in fp32 and, with a capacity, drops slots in training."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.capacity_factor = config.capacity_factor
        self.gate = Linear(config.hidden_size, config.num_local_experts)
        self.experts = Experts(config)
        self.dispatch: Dispatch = dispatch_locally
        self.admit = admit_alone

    def forward(self, x: Tensor) -> tuple[Tensor, RouterStats | None]:
        """Map x [B, T, D] to [B, T, D]; statistics are gathered in training mode only."""
        tokens = x.flatten(0, -2)
        logits = ops.router_logits(tokens, self.gate.weight)
        routing = ops.route(logits, self.top_k)
        if self.capacity_factor is not None and self.training:  # inference never drops a token
            routing = self.admit(routing, self.capacity_factor)
        y = self.experts(tokens, routing, self.dispatch)
        return y.view_as(x), RouterStats.of(routing) if self.training else None


class SharedExpert(nn.Module):
    """A SwiGLU feed-forward that every token passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.shared_intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.shared_intermediate_size)
        self.down_proj = Linear(config.shared_intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
