"""The expert feed-forward of routed tokens on one device, from tokens to their weighted sums.

Where the C++ kernels are, tokens without gradients take one native call. With gradients the
products are torch's and everything between them is native; the backward pass keeps the tokens and
the pre-activations of the experts, and forms rows, activations and slot results again. Elsewhere
the parts of `moe.py` are put together.
"""

import torch
from torch import Tensor

from linnet.ops.matmul import product_dtype
from linnet.ops.moe import (
    Grouping,
    Routing,
    combine_rows,
    experts_with_rows,
    few_tokens_ffn,
    gather_rows,
    group_by_expert,
    grouped_ffn,
    rows_by_slot,
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
    is_native = takes(*inputs)
    if not needs_grad and is_native and product_dtype(x.dtype, x.device) == torch.float32:
        same = gate_up.dtype == down.dtype == x.dtype
        pair = (gate_up, down) if same else (gate_up.to(x.dtype), down.to(x.dtype))
        return products.experts_ffn(x, routing.experts, routing.weights, *pair)
    grouping = group_by_expert(routing, num_experts)
    if is_native:
        return _RoutedFFN.apply(x, routing.weights, gate_up, down, grouping)
    rows = gather_rows(x, grouping, routing.experts.shape[1])
    y = grouped_ffn(rows, gate_up, down, grouping.offsets)
    return combine_rows(y, grouping, routing.weights)


class _RoutedFFN(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, grouping: Grouping
    ) -> Tensor:
        dtype, top_k = product_dtype(x.dtype, x.device), weights.shape[1]
        hidden = x.new_empty(len(grouping.slots), gate_up.shape[1])
        y = x.new_empty(len(grouping.slots), x.shape[1])
        for expert, rows in experts_with_rows(grouping.offsets, len(y), len(down)):
            tokens = grouping.slots[rows] // top_k
            hidden[rows] = x[tokens].to(dtype) @ weight_in(gate_up, expert, x, dtype).T
            activated = elementwise.swiglu(hidden[rows], dtype)
            y[rows] = activated @ weight_in(down, expert, x, dtype).T
        ctx.save_for_backward(x, weights, gate_up, down, hidden, *grouping)
        by_slot = rows_by_slot(y, grouping.slots, grouping.rows).view(*weights.shape, x.shape[1])
        return torch.bmm(weights[:, None].to(y.dtype), by_slot)[:, 0]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weights, gate_up, down, hidden, *parts = ctx.saved_tensors
        grouping = Grouping(*parts)
        dtype, top_k = product_dtype(x.dtype, x.device), weights.shape[1]
        slot_weights = weights.reshape(-1)[grouping.slots]  # [R]
        grad_rows, dots = x.new_empty(len(hidden), x.shape[1]), torch.empty(len(hidden))
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        for expert, rows in experts_with_rows(grouping.offsets, len(hidden), len(down)):
            tokens = grouping.slots[rows] // top_k
            grad_y = grad[tokens].to(dtype).mul_(slot_weights[rows, None].to(dtype))
            grad_activated = grad_y @ weight_in(down, expert, x, dtype)
            grad_hidden, activated, dots[rows] = elementwise.swiglu_backward(
                grad_activated, hidden[rows]
            )
            grad_down[expert] = grad_y.T @ activated
            grad_gate_up[expert] = grad_hidden.T @ x[tokens].to(dtype)
            grad_rows[rows] = grad_hidden @ weight_in(gate_up, expert, x, dtype)
        # d loss / d w = grad . y = (W2^T grad) . activated, here with w grad for grad. A weight
        # that underflowed to 0 gets none: its probability, the next factor, is 0 as well.
        dots = torch.where(slot_weights != 0, dots / slot_weights, 0)
        grad_weights = torch.zeros_like(weights).view(-1)
        grad_weights[grouping.slots] = dots.to(weights.dtype)
        by_slot = rows_by_slot(grad_rows, grouping.slots, grouping.rows)
        grad_x = sum(by_slot.view(*weights.shape, x.shape[1]).unbind(1))
        return grad_x, grad_weights.view_as(weights), grad_gate_up, grad_down, None
