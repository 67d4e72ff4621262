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
    CHUNK_LEN,
    Block,
    gather_rows,
    plan_blocks,
    scatter_rows,
    sorted_states,
    unsorted_states,
)
from linnet.ops.matmul import product_dtype


class _Tables(NamedTuple):
    """Decay factors of one call."""

    powers: Tensor  # [H, C + 2], entry n = exp(-s n), the last one 0; in the dtype of the state
    diagonal: Tensor  # [H, C, C], in the dtype of the products


class _Decays(NamedTuple):
    """Decay factors of one block, in the dtype of the state unless stated."""

    q: Tensor  # [H, length, 1]
    k: Tensor  # [1 or rows, H, length, 1]
    diagonal: Tensor  # [H, length, length], in the dtype of the products
    step: Tensor  # [1 or rows, H, 1, 1]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return o and the final states; arguments as in `linnet.lightning_attention`."""
    # Here and not in the public call, where a tracer would have no values to look at.
    check_decay(decay)
    plan = plan_blocks(q, v, cu_seqlens)
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    state = sorted_states(q, v, initial_state, plan)
    dtype = product_dtype(q.dtype, q.device)
    tables = _tables(decay, dtype, state.dtype)
    for block in plan.blocks:
        decays = _decays(tables, block)
        queries, keys, values = (gather_rows(x, block, dtype) for x in (q, k, v))
        before = _scan(keys * decays.k, values, decays.step, state, block.steps).to(dtype)
        scores = _bmm(queries, keys.mT).mul_(decays.diagonal)
        out = _baddbmm(_bmm(queries.mul_(decays.q), before), scores, values)
        scatter_rows(o, out, block)
    return o, unsorted_states(state, plan)


def backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the initial states."""
    plan = plan_blocks(q, v, cu_seqlens)
    dtype = product_dtype(q.dtype, q.device)
    grad_q, grad_k, grad_v = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    state = sorted_states(q, v, initial_state, plan)
    tables = _tables(decay, dtype, state.dtype)
    for block in plan.blocks:
        decays = _decays(tables, block)
        keys, values, grads = (gather_rows(x, block, dtype) for x in (k, v, grad_o))
        before = _scan(keys * decays.k, values, decays.step, state, block.steps).to(dtype)
        scores = _bmm(grads, values.mT).mul_(decays.diagonal)
        inter = _bmm(grads, before.mT).mul_(decays.q)
        scatter_rows(grad_q, _baddbmm(inter, scores, keys), block)
    carry = sorted_states(q, v, grad_state, plan)
    for block in reversed(plan.blocks):
        decays = _decays(tables, block)
        queries, keys, values, grads = (gather_rows(x, block, dtype) for x in (q, k, v, grad_o))
        if block.packing is not None and block.packing.counts is not None:
            # Keys see the gradients of later places, so those past a chunk's end must be 0.
            grads.masked_fill_(_is_past_end(block), 0)
        steps = block.steps[::-1]
        after = _scan(queries * decays.q, grads, decays.step, carry, steps).to(dtype)
        scores = _bmm(values, grads.mT).mul_(decays.diagonal.mT)
        inter = _bmm(values, after.mT).mul_(decays.k)
        scatter_rows(grad_k, _baddbmm(inter, scores, queries), block)
        scores = _bmm(keys, queries.mT, out=scores).mul_(decays.diagonal.mT)
        inter = _bmm(keys, after).mul_(decays.k)
        scatter_rows(grad_v, _baddbmm(inter, scores, grads), block)
    return grad_q, grad_k, grad_v, unsorted_states(carry, plan)


def _tables(decay: Tensor, dtype: torch.dtype, carry_dtype: torch.dtype) -> _Tables:
    # fp32 at least: exp(-s n) is close to 1 on slow heads, where bf16 has three digits. Only the
    # largest factor is rounded to the dtype of the products, for speed; see
    # `test_bf16_stays_close_to_fp64`.
    position = torch.arange(CHUNK_LEN + 1, device=decay.device)
    powers = torch.exp(-decay.to(carry_dtype)[:, None] * position)
    powers = torch.nn.functional.pad(powers, (0, 1))
    distance = position[1:, None] - position[1:]
    diagonal = powers[:, distance.clamp(min=0)].tril_()
    return _Tables(powers, diagonal.to(dtype))


def _decays(tables: _Tables, block: Block) -> _Decays:
    powers, length = tables.powers, block.length
    q_decay = powers[:, 1 : length + 1, None]
    diagonal = tables.diagonal[:, :length, :length]
    if block.packing is None or block.packing.counts is None:
        k_decay = powers[None, :, :length, None].flip(2)
        return _Decays(q_decay, k_decay, diagonal, powers[None, :, length, None, None])
    counts = block.packing.counts
    position = torch.arange(1, length + 1, device=counts.device)
    remaining = counts[:, None] - position  # [rows, length]
    remaining = torch.where(remaining < 0, powers.shape[1] - 1, remaining)
    by_place = powers.T.index_select(0, remaining.flatten()).view(*remaining.shape, -1)
    step_decay = powers.T.index_select(0, counts)[..., None, None]
    return _Decays(q_decay, by_place.transpose(1, 2)[..., None], diagonal, step_decay)


def _is_past_end(block: Block) -> Tensor:
    """Return [rows, 1, length, 1] booleans: places of short chunks that hold no token."""
    assert block.packing is not None and block.packing.counts is not None
    counts = block.packing.counts
    is_past = torch.arange(block.length, device=counts.device) >= counts[:, None]
    return is_past[:, None, :, None]


def _scan(
    left: Tensor,
    right: Tensor,
    step_decay: Tensor,
    state: Tensor,
    steps: list[tuple[slice, slice]],
) -> Tensor:
    """Advance `state` [N, H, K, V] in place by `left^T right` of each row, step after step.

    Returns:
        [rows, H, K, V]: the state that each row found.
    """
    # In the dtype of the state, not of the products: a bf16 result would round every contribution.
    added = _bmm(left.to(state.dtype).mT, right.to(state.dtype))
    found = torch.empty_like(added)
    for rows, sequences in steps:
        current = state[sequences]
        found[rows] = current
        decay = step_decay if len(step_decay) == 1 else step_decay[rows]
        torch.addcmul(added[rows], current, decay, out=current)
    return found


def _bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply [rows, H, M, K] by [rows, H, K, N]."""
    flat = None if out is None else out.flatten(0, 1)
    product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=flat)
    return product.view(*a.shape[:2], *product.shape[1:])


def _baddbmm(addend: Tensor, a: Tensor, b: Tensor) -> Tensor:
    flat = addend.flatten(0, 1)
    return flat.baddbmm_(a.flatten(0, 1), b.flatten(0, 1)).view(addend.shape)
