"""The expert feed-forward of routed tokens on one device, from tokens to their weighted sums.

Where the C++ kernels are, tokens without gradients take one native call. With gradients the
backward pass keeps the tokens and the pre-activations of the experts, and forms the rest again.
Elsewhere the parts of `moe.py` are put together.

Slots: token t has the slots t*k .. t*k + k - 1, S = T*k in all.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from linnet.ops.matmul import product_dtype
from linnet.ops.moe import (
    Routing,
    combine_rows,
    few_tokens_ffn,
    gather_rows,
    group_by_expert,
    grouped_ffn,
    weight_in,
)
from linnet.ops.native import elementwise, products
from linnet.ops.native.arguments import takes

FEW_SLOTS = 4
"""Tokens times experts per token up to which sorting them is not worth it."""


def routed_ffn(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return sum_i w_i W2_i (silu(W1_i x) * W3_i x) over each token's experts i.

    Args:
        x: [T, D] tokens.
        routing: from `route`; dropped slots add nothing.
        gate_up: [E, 2F, D], W1 above W3.
        down: [E, D, F] W2.

    Returns:
        [T, D] in `x.dtype`. Gradients flow to x, the weights of the routing, and the experts.

    Raises:
        ValueError: weights that do not fit the tokens.
    """
    num_experts, dim, width = down.shape
    if gate_up.shape != (num_experts, 2 * width, dim) or x.shape[1:] != (dim,):
        raise ValueError(
            f"gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)} do not fit tokens "
            f"{tuple(x.shape)}: expected [E, 2F, D], [E, D, F], [T, D]"
        )
    inputs = (x, routing.weights, gate_up, down)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    if not needs_grad and 0 < routing.experts.numel() <= FEW_SLOTS:
        return few_tokens_ffn(x, routing, gate_up, down)
    if takes(*inputs):
        if needs_grad or product_dtype(x.dtype, x.device) != torch.float32:
            return _RoutedFFN.apply(x, routing.weights, gate_up, down, _slot_experts(routing))
        return _native_ffn(x, routing.weights, gate_up, down, _slot_experts(routing))
    grouping = group_by_expert(routing, num_experts)
    rows = gather_rows(x, grouping, routing.experts.shape[1])
    y = grouped_ffn(rows, gate_up, down, grouping.offsets)
    return combine_rows(y, grouping, routing.weights)


def _slot_experts(routing: Routing) -> Tensor:
    """Return [T, k] int64 expert of each slot, -1 for dropped slots."""
    if routing.kept is None:
        return routing.experts
    return torch.where(routing.kept, routing.experts, -1)


def _native_ffn(
    x: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    experts: Tensor,
    hidden: Tensor | None = None,
) -> Tensor:
    # Rounded as the activations are, so that training and inference multiply the same numbers.
    gate_up, down = gate_up.to(x.dtype), down.to(x.dtype)
    return products.experts_ffn(x, experts, weights, gate_up, down, hidden)


def _torch_ffn(
    x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor, hidden: Tensor
) -> Tensor:
    dtype = product_dtype(x.dtype, x.device)
    y = x.new_zeros(experts.numel(), x.shape[1])
    for expert, slots in _slots_by_expert(experts, len(down)):
        hidden[slots] = (
            x[slots // experts.shape[1]].to(dtype) @ weight_in(gate_up, expert, x, dtype).T
        )
        activated = elementwise.swiglu(hidden[slots], dtype)
        y[slots] = activated @ weight_in(down, expert, x, dtype).T
    return torch.bmm(weights[:, None].to(y.dtype), y.view(*experts.shape, -1))[:, 0]


def _slots_by_expert(experts: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Yield each expert that has slots, and these [n] int64."""
    flat = experts.flatten()
    order = torch.argsort(flat, stable=True)
    # Dropped slots, -1, come first.
    counts = torch.bincount(flat + 1, minlength=num_experts + 1).tolist()
    for expert, slots in enumerate(order.split(counts), -1):
        if expert >= 0 and len(slots):
            yield expert, slots


class _RoutedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, experts: Tensor
    ) -> Tensor:
        hidden = x.new_empty(experts.numel(), gate_up.shape[1])
        ctx.save_for_backward(x, weights, gate_up, down, experts, hidden)
        is_wide = product_dtype(x.dtype, x.device) == torch.float32
        ffn = _native_ffn if is_wide else _torch_ffn
        return ffn(x, weights, gate_up, down, experts, hidden)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weights, gate_up, down, experts, hidden = ctx.saved_tensors
        dtype, top_k = product_dtype(x.dtype, x.device), experts.shape[1]
        slot_weights = weights.flatten()
        grad_slots, dots = x.new_zeros(len(hidden), x.shape[1]), torch.zeros(len(hidden))
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for expert, slots in _slots_by_expert(experts, len(down)):
            tokens = slots // top_k
            grad_y = grad[tokens].to(dtype).mul_(slot_weights[slots, None].to(dtype))
            grad_activated = grad_y @ weight_in(down, expert, x, dtype)
            grad_hidden, activated, dots[slots] = elementwise.swiglu_backward(
                grad_activated, hidden[slots]
            )
            grad_down[expert] = grad_y.T @ activated
            grad_gate_up[expert] = grad_hidden.T @ x[tokens].to(dtype)
            grad_slots[slots] = (grad_hidden @ weight_in(gate_up, expert, x, dtype)).to(x.dtype)
        # d loss / d w = grad . y = (W2^T grad) . activated, here with w grad for grad. A weight
        # that underflowed to 0 gets none: its probability, the next factor, is 0 as well.
        dots = torch.where(slot_weights != 0, dots / slot_weights, 0)
        grad_x = sum(grad_slots.view(*experts.shape, x.shape[1]).unbind(1))
        return grad_x, dots.view_as(weights).to(weights.dtype), grad_gate_up, grad_down, None
