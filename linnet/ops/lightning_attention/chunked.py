"""Lightning attention in chunks of C tokens, forward and backward, in plain torch products.

MiniMax-01, section 2.2, algorithms 1 and 2 (with decay). Within a chunk the T x T form, between
chunks the recurrence on the state. With local positions a = 1..m of a chunk that holds m tokens,
S the state before it and R the gradient of the state after it:

    O  = (Q * q_decay) S + (Q K^T * diag) V             q_decay[a] = exp(-s a)
    S <- exp(-s m) S + (K * k_decay)^T V                k_decay[a] = exp(-s (m - a))
    dQ = (dO V^T * diag) K + (dO S^T) * q_decay         diag[a, b] = exp(-s (a - b)), 0 if a < b
    dK = (dO V^T * diag)^T Q + (V R^T) * k_decay
    dV = (Q K^T * diag)^T dO + (K R) * k_decay
    R <- exp(-s m) R + (Q * q_decay)^T dO

Every exponent is -s times a count of tokens, never a ratio of two such factors, which would
overflow on steep heads. The backward pass saves q, k, v and the initial state alone and recomputes
the states: one scan forwards for dQ, one backwards for dK and dV.

The products run block by block, as `layout.py` arranges the chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from linnet.ops.lightning_attention.checks import check_decay
from linnet.ops.lightning_attention.layout import (
    Block,
    advance_states,
    gather_rows,
    plan_blocks,
    scatter_rows,
    sorted_states,
    token_mask,
    unsorted_states,
)
from linnet.ops.matmul import product_dtype, wide_dtype


class _Decays(NamedTuple):
    """Decay factors of one block, in the dtype of the state unless stated."""

    q: Tensor  # [H, length, 1]
    k: Tensor  # [1 or rows, H, length, 1]
    diagonal: Tensor  # [H, length, length], in the dtype of the products
    block: Tensor  # [1 or steps, 1 or active, H, 1, 1]


@torch.library.custom_op("linnet::lightning_attention", mutates_args=())
def lightning_attention_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Forward pass; arguments and results as in `linnet.lightning_attention`."""
    # Here and not in the public call, where a tracer would have no values to look at.
    check_decay(decay)
    plan = plan_blocks(q, v, cu_seqlens)
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    state = sorted_states(q, v, initial_state, plan)
    dtype = product_dtype(q.dtype, q.device)
    for block in plan.blocks:
        decays = _decays(block, decay, dtype, state.dtype)
        queries, keys, values = (gather_rows(x, block, dtype) for x in (q, k, v))
        states = _scan(keys * decays.k, values, decays.block, state, block)
        scores = _bmm(queries, keys.mT).mul_(decays.diagonal)
        before = states[:-1].reshape(-1, *states.shape[2:]).to(dtype)
        out = _baddbmm(_bmm(queries.mul_(decays.q), before), scores, values)
        scatter_rows(o, out, block)
        state = advance_states(state, states[-1], block)
    return o, unsorted_states(state, plan)


@lightning_attention_chunked.register_fake
def _(q, k, v, decay, initial_state, cu_seqlens):
    num = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(num, q.shape[2], q.shape[3], v.shape[3], dtype=wide_dtype(q.dtype))
    return v.new_empty(v.shape), state


@torch.library.custom_op("linnet::lightning_attention_backward", mutates_args=())
def _backward_op(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    plan = plan_blocks(q, v, cu_seqlens)
    dtype = product_dtype(q.dtype, q.device)
    grad_q, grad_k, grad_v = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    state = sorted_states(q, v, initial_state, plan)
    for block in plan.blocks:
        decays = _decays(block, decay, dtype, state.dtype)
        keys, values, grads = (gather_rows(x, block, dtype) for x in (k, v, grad_o))
        states = _scan(keys * decays.k, values, decays.block, state, block)
        before = states[:-1].reshape(-1, *states.shape[2:]).to(dtype)
        scores = _bmm(grads, values.mT).mul_(decays.diagonal)
        inter = _bmm(grads, before.mT).mul_(decays.q)
        scatter_rows(grad_q, _baddbmm(inter, scores, keys), block)
        state = advance_states(state, states[-1], block)
    carry = sorted_states(q, v, grad_state, plan)
    for block in reversed(plan.blocks):
        decays = _decays(block, decay, dtype, carry.dtype)
        queries, keys, values, grads = (gather_rows(x, block, dtype) for x in (q, k, v, grad_o))
        if block.counts is not None:
            # Keys see the gradients of later rows, so the repeated rows of a short chunk must be 0.
            grads.masked_fill_(~token_mask(block)[:, None, :, None], 0)
        carries = _reverse_scan(queries * decays.q, grads, decays.block, carry, block)
        after = carries[1:].reshape(-1, *carries.shape[2:]).to(dtype)
        scores = _bmm(values, grads.mT).mul_(decays.diagonal.mT)
        inter = _bmm(values, after.mT).mul_(decays.k)
        scatter_rows(grad_k, _baddbmm(inter, scores, queries), block)
        scores = _bmm(keys, queries.mT, out=scores).mul_(decays.diagonal.mT)
        inter = _bmm(keys, after).mul_(decays.k)
        scatter_rows(grad_v, _baddbmm(inter, scores, grads), block)
        carry = advance_states(carry, carries[0], block)
    return grad_q, grad_k, grad_v, unsorted_states(carry, plan)


@_backward_op.register_fake
def _(grad_o, grad_state, q, k, v, decay, initial_state, cu_seqlens):
    num = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(num, q.shape[2], q.shape[3], v.shape[3], dtype=wide_dtype(q.dtype))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), state


def _save_inputs(ctx, inputs, output) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_o: Tensor, grad_state: Tensor | None):
    q, k, v, decay, initial_state, cu_seqlens = ctx.saved_tensors
    grads = _backward_op(grad_o, grad_state, q, k, v, decay, initial_state, cu_seqlens)
    wants_state = initial_state is not None and ctx.needs_input_grad[4]
    return grads[0], grads[1], grads[2], None, grads[3] if wants_state else None, None


lightning_attention_chunked.register_autograd(_backward, setup_context=_save_inputs)


def _decays(block: Block, decay: Tensor, dtype: torch.dtype, carry_dtype: torch.dtype) -> _Decays:
    # fp32 at least: exp(-s n) is close to 1 on slow heads, where bf16 has three digits. Only the
    # largest factor is rounded to the dtype of the products, for speed; see
    # `test_bf16_stays_close_to_fp64`.
    slope = decay.to(carry_dtype)
    position = torch.arange(block.length + 1, device=decay.device)
    table = torch.exp(-slope[:, None] * position)  # [H, length + 1], entry n = exp(-s n)
    distance = position[1:, None] - position[1:]
    diagonal = table[:, distance.clamp(min=0)] * (distance >= 0)  # [H, length, length]
    if block.counts is None:
        k_decay = table[None, :, :-1].flip(-1)
        step_decay = table[:, -1].view(1, 1, -1, 1, 1)
    else:
        remaining = block.counts[:, None] - position[1:]  # [rows, length], negative past the end
        k_decay = table[:, remaining.clamp(min=0)] * (remaining >= 0)  # [H, rows, length]
        k_decay = k_decay.transpose(0, 1)
        step_decay = table[:, block.counts].T.reshape(block.steps, block.active, -1, 1, 1)
    return _Decays(table[:, 1:, None], k_decay[..., None], diagonal.to(dtype), step_decay)


def _scan(keys: Tensor, values: Tensor, step_decay: Tensor, state: Tensor, block: Block) -> Tensor:
    """Return the states before each step and after the last, [steps + 1, active, H, K, V]."""
    states = _contributions(keys, values, state, block, slice(1, None))
    states[0] = state[: block.active]
    for step in range(block.steps):
        states[step + 1].addcmul_(states[step], step_decay[min(step, len(step_decay) - 1)])
    return states


def _reverse_scan(
    queries: Tensor, grads: Tensor, step_decay: Tensor, carry: Tensor, block: Block
) -> Tensor:
    """Return the state gradients before each step and after the last, as `_scan` does."""
    carries = _contributions(queries, grads, carry, block, slice(None, -1))
    carries[-1] = carry[: block.active]
    for step in reversed(range(block.steps)):
        carries[step].addcmul_(carries[step + 1], step_decay[min(step, len(step_decay) - 1)])
    return carries


def _contributions(
    left: Tensor, right: Tensor, state: Tensor, block: Block, where: slice
) -> Tensor:
    """Return a [steps + 1, active, H, K, V] buffer with `left^T right` of each step at `where`."""
    states = state.new_empty(block.steps + 1, block.active, *state.shape[1:])
    # In the dtype of the state, not of the products: a bf16 result would round every contribution.
    left, right = left.to(state.dtype).flatten(0, 1), right.to(state.dtype).flatten(0, 1)
    torch.bmm(left.mT, right, out=states[where].view(-1, *state.shape[2:]))
    return states


def _bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply [rows, H, M, K] by [rows, H, K, N]."""
    flat = None if out is None else out.flatten(0, 1)
    product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=flat)
    return product.view(*a.shape[:2], *product.shape[1:])


def _baddbmm(addend: Tensor, a: Tensor, b: Tensor) -> Tensor:
    flat = addend.flatten(0, 1)
    return flat.baddbmm_(a.flatten(0, 1), b.flatten(0, 1)).view(addend.shape)
