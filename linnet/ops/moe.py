"""Mixture-of-experts routing and expert products (MiniMax-01, section 2.1 and SPEC of its code).

    y = sum_i w_i FFN_i(x)        FFN(x) = W2 (silu(W1 x) * W3 x)
    w = the top-k of softmax(x W_gate), divided by their sum

Legend of layouts: T tokens, S = T * k slots (token t takes slots t*k .. t*k + k - 1), R <= S rows
sorted by expert (dropped slots are in no row), D hidden, F expert width, E experts.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops import moe_triton
from linnet.ops.matmul import linear, product_dtype, wide

Normalization = Literal["paper", "transformers"]


class Routing(NamedTuple):
    """Where each token goes and with which weight."""

    experts: Tensor
    """[T, k] int64 expert of each slot, best first."""
    weights: Tensor
    """[T, k] fp32 weights; 1 in sum over k before dropping, 0 for dropped slots."""
    probabilities: Tensor
    """[T, E] fp32 softmax over all experts."""
    kept: Tensor | None
    """[T, k] bool, False for slots over capacity; None when nothing can be dropped."""


class Grouping(NamedTuple):
    """Slots sorted by expert."""

    slots: Tensor
    """[R] int64 slot of each row."""
    rows: Tensor
    """[S] int64 row of each slot (0 for dropped slots, whose weight is 0)."""
    offsets: Tensor
    """[E + 1] int64 first row of each expert."""


def route(logits: Tensor, top_k: int, capacity: int | None = None) -> Routing:
    """Choose `top_k` experts per token.

    Args:
        logits: [T, E] router outputs; the softmax runs in fp32 (fp64 for fp64).
        top_k: experts per token.
        capacity: most slots an expert takes; None is dropless. First choices are served before
            second ones, and within a choice earlier tokens before later ones (GShard's order).

    Returns:
        The routing; weights are renormalized over the chosen experts, and drop to 0 over capacity.

    Raises:
        ValueError: fewer experts than `top_k`.
    """
    if logits.ndim != 2 or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"cannot choose {top_k} experts per token from [T, E] = {tuple(logits.shape)}"
        )
    probabilities = wide(logits).softmax(-1)
    top, experts = probabilities.topk(top_k, -1)
    weights = top / top.sum(-1, keepdim=True)
    routing = Routing(experts, weights, probabilities, None)
    return routing if capacity is None else admit(routing, capacity)


def count_choices(routing: Routing) -> Tensor:
    """Return [k, E] int64: how many tokens have each expert as first, second, ... choice."""
    num_experts = routing.probabilities.shape[1]
    flat = (
        routing.experts
        + torch.arange(routing.experts.shape[1], device=routing.experts.device)[None] * num_experts
    )
    counts = torch.bincount(flat.reshape(-1), minlength=flat.shape[1] * num_experts)
    return counts.view(-1, num_experts)


def admit(routing: Routing, capacity: int, served_before: Tensor | None = None) -> Routing:
    """Drop the slots over an expert's capacity; their weights become 0.

    Args:
        routing: dropless.
        capacity: most slots an expert takes.
        served_before: [k, E] int64, for each choice and expert, the slots that come before the
            first of these tokens; None: those of the earlier choices, and no other tokens.
    """
    if served_before is None:
        counts = count_choices(routing)
        served_before = counts.cumsum(0) - counts
    hits = F.one_hot(routing.experts.T, routing.probabilities.shape[1])  # [k, T, E]
    places = hits.cumsum(1) + served_before[:, None]  # from 1
    place = (places * hits).sum(-1).T  # [T, k]
    kept = place <= capacity
    return routing._replace(weights=routing.weights * kept, kept=kept)


def expert_capacity(num_tokens: int, num_experts: int, top_k: int, factor: float) -> int:
    """Return the slots per expert for a capacity factor (1 = exactly enough under even load)."""
    # The margin keeps a product like 1.1 * 10 = 11.000000000000002 from rounding up.
    return max(1, math.ceil(num_tokens * top_k * factor / num_experts - 1e-6))


def group_by_expert(routing: Routing, num_experts: int) -> Grouping:
    """Sort the kept slots by expert, stably."""
    flat = routing.experts.reshape(-1)
    if routing.kept is not None:
        flat = torch.where(routing.kept.reshape(-1), flat, num_experts)  # dropped slots sort last
    order = torch.argsort(flat, stable=True)
    # Nothing here waits for a GPU as long as no slot can be dropped.
    borders = torch.arange(num_experts + 1, device=flat.device)
    offsets = torch.searchsorted(flat[order], borders)
    slots = order if routing.kept is None else order[: int(offsets[-1])]
    rows = torch.zeros_like(flat)
    rows[slots] = torch.arange(len(slots), device=flat.device)
    return Grouping(slots, rows, offsets)


def gather_rows(x: Tensor, grouping: Grouping, top_k: int) -> Tensor:
    """Return the token of each row: [T, D] -> [R, D]."""
    return _GatherRows.apply(x, grouping.slots, grouping.rows, top_k)


def combine_rows(y: Tensor, grouping: Grouping, weights: Tensor) -> Tensor:
    """Return the weighted sum of each token's rows: [R, D], [T, k] -> [T, D]."""
    return _CombineRows.apply(y, weights, grouping.slots, grouping.rows)


@torch.library.custom_op("linnet::grouped_ffn", mutates_args=())
def _grouped_ffn(
    x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    if x.is_cuda and moe_triton.unsupported_reason(x, gate_up) is None:
        return moe_triton.ffn_forward(x, gate_up, down, offsets)
    dtype = product_dtype(x.dtype, x.device)
    hidden = x.new_empty(x.shape[0], gate_up.shape[1])
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for expert, rows in _experts_with_rows(offsets, len(x), len(gate_up)):
        _multiply(x[rows].to(dtype), weight_in(gate_up, expert, x, dtype).T, hidden[rows])
        activated = _swiglu(hidden[rows].to(dtype))
        _multiply(activated, weight_in(down, expert, x, dtype).T, y[rows])
    return y, hidden


@_grouped_ffn.register_fake
def _(x, gate_up, down, offsets):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[0], gate_up.shape[1])


@torch.library.custom_op("linnet::grouped_ffn_backward", mutates_args=())
def _grouped_ffn_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if x.is_cuda and moe_triton.unsupported_reason(x, gate_up) is None:
        return moe_triton.ffn_backward(grad, x, hidden, gate_up, down, offsets)
    dtype = product_dtype(x.dtype, x.device)
    grad_x = torch.empty_like(x)
    grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
    for expert, rows in _experts_with_rows(offsets, len(x), len(gate_up)):
        wide = grad[rows].to(dtype)
        gate, up = hidden[rows].to(dtype).chunk(2, -1)
        sigmoid = torch.sigmoid(gate)
        silu = gate * sigmoid
        _multiply(wide.T, silu * up, grad_down[expert])
        grad_activated = wide @ weight_in(down, expert, x, dtype)
        grad_up = grad_activated * silu
        # silu' = sigmoid (1 + gate (1 - sigmoid)) = sigmoid + silu (1 - sigmoid)
        grad_gate = grad_activated.mul_(up).mul_(sigmoid + silu * (1 - sigmoid))
        grad_hidden = torch.cat((grad_gate, grad_up), -1)
        _multiply(grad_hidden.T, x[rows].to(dtype), grad_gate_up[expert])
        _multiply(grad_hidden, weight_in(gate_up, expert, x, dtype), grad_x[rows])
    return grad_x, grad_gate_up, grad_down


@_grouped_ffn_backward.register_fake
def _(grad, x, hidden, gate_up, down, offsets):
    return torch.empty_like(x), torch.empty_like(gate_up), torch.empty_like(down)


def _save(ctx, inputs, output) -> None:
    x, gate_up, down, offsets = inputs
    ctx.save_for_backward(x, output[1], gate_up, down, offsets)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, grad: Tensor, _grad_hidden):
    x, hidden, gate_up, down, offsets = ctx.saved_tensors
    return *_grouped_ffn_backward(grad.contiguous(), x, hidden, gate_up, down, offsets), None


_grouped_ffn.register_autograd(_backward, setup_context=_save)


def grouped_ffn(x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor) -> Tensor:
    """Apply each expert's SwiGLU to its own rows; experts without rows are not read.

    Args:
        x: [R, D] rows sorted by expert.
        gate_up: [E, 2F, D]; the first F output channels are W1 (gate), the others W3 (up).
        down: [E, D, F] W2.
        offsets: [E + 1] int64 first row of each expert, the last R.

    Returns:
        [R, D] in `x.dtype`. The backward pass keeps `x` and the [R, 2F] pre-activations.

    Raises:
        ValueError: weights that do not fit the rows, or offsets that do not cover them.
    """
    num_experts, width, dim = down.shape[0], down.shape[2], x.shape[1]
    if gate_up.shape != (num_experts, 2 * width, dim) or down.shape[1] != dim:
        raise ValueError(
            f"gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)} do not fit rows "
            f"{tuple(x.shape)}: expected [E, 2F, D], [E, D, F], [R, D]"
        )
    return _grouped_ffn(x, gate_up, down, offsets)[0]


def few_tokens_ffn(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Return what grouping, `grouped_ffn` and combining would, slot by slot, without gradients.

    For a handful of tokens, as in decoding: sorting them costs more than reading the weights.

    Args:
        x: [T, D] tokens.
        routing: from `route`.
        gate_up, down: as in `grouped_ffn`.

    Returns:
        [T, D] in `x.dtype`.
    """
    rows = []
    for row, chosen, weights in zip(
        x.split(1), routing.experts.tolist(), routing.weights, strict=True
    ):
        hidden = torch.cat([linear(row, gate_up[expert]) for expert in chosen])  # [k, 2F]
        activated = _swiglu(hidden).split(1)
        parts = [linear(a, down[expert]) for a, expert in zip(activated, chosen, strict=True)]
        rows.append(weights[None].to(x.dtype) @ torch.cat(parts))
    return torch.cat(rows) if len(rows) > 1 else rows[0]


def swiglu_ffn_reference(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Apply one SwiGLU feed-forward: x [T, D], gate_up [2F, D], down [D, F]."""
    return _swiglu(x @ gate_up.T) @ down.T


def moe_reference(x: Tensor, routing: Routing, gate_up: Tensor, down: Tensor) -> Tensor:
    """Same result as grouping, `grouped_ffn` and combining: every expert sees every token."""
    every = torch.stack(
        [swiglu_ffn_reference(x, g, d) for g, d in zip(gate_up, down, strict=True)], 1
    )
    chosen = every.gather(1, routing.experts[..., None].expand(-1, -1, x.shape[1]))  # [T, k, D]
    return (chosen * routing.weights[..., None].to(x.dtype)).sum(1)


def load_balancing_loss(
    load: Tensor, probability: Tensor, normalization: Normalization = "paper"
) -> Tensor:
    """Return the auxiliary loss that evens out the experts' load, without its coefficient.

    With f_i the mean number of slots that a token gives to expert i (so that sum_i f_i = k) and m_i
    the mean probability of expert i, both from `expert_means`:

        paper          (1/E) sum_i f_i m_i      MiniMax-01, section 2.1; k / E^2 under even load
        transformers      E  sum_i f_i m_i      k under even load

    Args:
        load: [E] f, without gradient.
        probability: [E] m.
        normalization: which of the two.

    Returns:
        Scalar fp32.

    Raises:
        ValueError: another normalization.
    """
    if normalization not in get_args(Normalization):
        raise ValueError(f"normalization {normalization!r} is none of {get_args(Normalization)}")
    total = (load * probability).sum()
    num_experts = probability.shape[0]
    return total / num_experts if normalization == "paper" else total * num_experts


def expert_means(routing: Routing, is_token: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return f and m of `load_balancing_loss`; only m carries a gradient.

    Args:
        routing: from `route`; load is counted before any slot is dropped.
        is_token: [T] bool, False for padding, which counts in neither mean; None counts all.

    Returns:
        Two [E] fp32 tensors.
    """
    experts, probabilities = routing.experts, routing.probabilities
    if is_token is not None:
        experts, probabilities = experts[is_token], probabilities[is_token]
    num_tokens = max(1, experts.shape[0])
    counts = torch.bincount(experts.reshape(-1), minlength=probabilities.shape[1])
    return counts.to(probabilities.dtype) / num_tokens, probabilities.sum(0) / num_tokens


def _experts_with_rows(
    offsets: Tensor, num_rows: int, num_experts: int
) -> Iterator[tuple[int, slice]]:
    """Yield each expert that has rows, and its rows.

    Raises:
        ValueError: offsets [E + 1] that do not rise from 0 to `num_rows`.
    """
    bounds = offsets.tolist()
    if len(bounds) != num_experts + 1 or bounds[0] != 0 or bounds[-1] != num_rows:
        raise ValueError(
            f"offsets must be {num_experts + 1} numbers from 0 to R = {num_rows}; got {bounds}"
        )
    for expert, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop < start:
            raise ValueError(f"offsets must not decrease; got {bounds}")
        if stop > start:
            yield expert, slice(start, stop)


def weight_in(weights: Tensor, expert: int, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix of one expert, rounded to the dtype of `x`, in the dtype of products."""
    return weights[expert].to(x.dtype).to(dtype)


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Write the product of two matrices to `out`, rounded to its dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)


def _swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, -1)
    return F.silu(gate) * up


class _GatherRows(torch.autograd.Function):
    """Index by a permutation, whose backward is an index again instead of a scatter."""

    @staticmethod
    def forward(ctx, x: Tensor, slots: Tensor, rows: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(slots, rows)
        ctx.top_k = top_k
        return x.index_select(0, slots // top_k)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        slots, rows = ctx.saved_tensors
        by_slot = _rows_by_slot(grad, slots, rows)
        return sum(by_slot.view(-1, ctx.top_k, grad.shape[1]).unbind(1)), None, None, None


class _CombineRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, weights: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(y, weights, slots, rows)
        by_slot = _rows_by_slot(y, slots, rows).view(*weights.shape, y.shape[1])
        return torch.bmm(weights[:, None].to(y.dtype), by_slot)[:, 0]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        y, weights, slots, rows = ctx.saved_tensors
        top_k = weights.shape[1]
        grad_y = grad.index_select(0, slots // top_k)
        grad_y *= weights.reshape(-1)[slots, None].to(grad.dtype)
        by_slot = _rows_by_slot(y, slots, rows).view(*weights.shape, y.shape[1])
        grad_weights = torch.bmm(by_slot, grad[..., None])[..., 0].to(weights.dtype)
        return grad_y, grad_weights, None, None


def _rows_by_slot(y: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """Return [S, D]: the row of each slot, 0 for dropped slots; see `Grouping`."""
    if len(slots) == len(rows):
        return y.index_select(0, rows)
    by_slot = y.new_zeros(len(rows), y.shape[1])
    by_slot[slots] = y
    return by_slot
