"""Lightning attention in chunks of C tokens, forward and backward, in plain torch products.

MiniMax-01, section 2.2, algorithms 1 and 2 (with decay). Within a chunk the T x T form, between
chunks the recurrence on the state. With local positions a = 1..m of a chunk that holds m tokens,
S the state before it and R the gradient of the state after it:

    O  = (Q * q_decay) S + (Q K^T * diag) V             q_decay[a] = exp(-s a)
    S <- exp(-s m) S + (K * k_decay)^T V                k_decay[a] = exp(-s (m - a))
    dQ = (dO V^T * diag) K + (dO S^T) * q_decay         diag[a, b] = exp(-s (a - b)) if a >= b else 0
    dK = (dO V^T * diag)^T Q + (V R^T) * k_decay
    dV = (Q K^T * diag)^T dO + (K R) * k_decay
    R <- exp(-s m) R + (Q * q_decay)^T dO

Every exponent is -s times a count of tokens, never a ratio of two such factors, which would
overflow on steep heads. The backward pass saves q, k, v and the initial state alone and recomputes
the states: one scan forwards for dQ, one backwards for dK and dV.

Chunks are laid out step by step: step i holds chunk i of every sequence that is long enough, the
longest sequence first, so all that one step needs of the states is a leading slice. Runs of steps
with the same number of sequences form a `_Block`, whose products are batched.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linnet.ops.matmul import product_dtype

CHUNK_LEN = 64
"""C: smaller chunks do less work inside a chunk, larger ones touch the state less often."""

BLOCK_ELEMENTS = 2**21
"""Bound on the elements of the largest temporary of a block (scores or states)."""


class _Block(NamedTuple):
    """`steps` consecutive chunk steps of `active` sequences, as rows of tokens."""

    steps: int
    active: int
    length: int  # tokens of the longest chunk; C except at the end of short inputs
    index: Tensor | None  # [steps * active, length] rows in the flat token axis, or None:
    start: int  # ... all sequences from this token on, `steps * length` tokens each
    counts: Tensor | None  # [steps * active] tokens per chunk, None when all chunks are full


class _Sequences(NamedTuple):
    """The sequences of one call, longest first."""

    order: Tensor | None  # [N] permutation that sorts them, None when they all have one length
    blocks: list[_Block]
    num: int


class _Decays(NamedTuple):
    """Decay factors of one block, in the dtype of the products."""

    q: Tensor  # [H, length, 1]
    k: Tensor  # [1 or rows, H, length, 1]
    diagonal: Tensor  # [H, length, length]
    block: Tensor  # [1 or steps, 1 or active, H, 1, 1], in the dtype of the state


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
    plan = _plan(q, cu_seqlens, max(q.shape[-1], v.shape[-1]))
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    state = _sorted_state(q, v, initial_state, plan)
    dtype = product_dtype(q.dtype, q.device)
    for block in plan.blocks:
        decays = _decays(block, decay, dtype, state.dtype)
        queries, keys, values = (_gather(x, block, dtype) for x in (q, k, v))
        states = _scan(keys * decays.k, values, decays.block, state, block)
        scores = _bmm(queries, keys.mT).mul_(decays.diagonal)
        before = states[:-1].reshape(-1, *states.shape[2:]).to(dtype)
        out = _baddbmm(_bmm(queries.mul_(decays.q), before), scores, values)
        _scatter(o, out, block)
        state = _advance(state, states[-1], block)
    return o, _unsorted_state(state, plan)


@lightning_attention_chunked.register_fake
def _(q, k, v, decay, initial_state, cu_seqlens):
    num = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(num, q.shape[2], q.shape[3], v.shape[3], dtype=state_dtype(q.dtype))
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
    plan = _plan(q, cu_seqlens, max(q.shape[-1], v.shape[-1]))
    dtype = product_dtype(q.dtype, q.device)
    grad_q, grad_k, grad_v = (
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    state = _sorted_state(q, v, initial_state, plan)
    for block in plan.blocks:
        decays = _decays(block, decay, dtype, state.dtype)
        keys, values, grads = (_gather(x, block, dtype) for x in (k, v, grad_o))
        states = _scan(keys * decays.k, values, decays.block, state, block)
        before = states[:-1].reshape(-1, *states.shape[2:]).to(dtype)
        scores = _bmm(grads, values.mT).mul_(decays.diagonal)
        inter = _bmm(grads, before.mT).mul_(decays.q)
        _scatter(grad_q, _baddbmm(inter, scores, keys), block)
        state = _advance(state, states[-1], block)
    carry = _sorted_state(q, v, grad_state, plan)
    for block in reversed(plan.blocks):
        decays = _decays(block, decay, dtype, carry.dtype)
        queries, keys, values, grads = (_gather(x, block, dtype) for x in (q, k, v, grad_o))
        if block.counts is not None:
            # Keys see the gradients of later rows, so the repeated rows of a short chunk must be 0.
            grads.masked_fill_(~_is_token(block)[:, None, :, None], 0)
        carries = _reverse_scan(queries * decays.q, grads, decays.block, carry, block)
        after = carries[1:].reshape(-1, *carries.shape[2:]).to(dtype)
        scores = _bmm(values, grads.mT).mul_(decays.diagonal.mT)
        inter = _bmm(values, after.mT).mul_(decays.k)
        _scatter(grad_k, _baddbmm(inter, scores, queries), block)
        scores = _bmm(keys, queries.mT, out=scores).mul_(decays.diagonal.mT)
        inter = _bmm(keys, after).mul_(decays.k)
        _scatter(grad_v, _baddbmm(inter, scores, grads), block)
        carry = _advance(carry, carries[0], block)
    return grad_q, grad_k, grad_v, _unsorted_state(carry, plan)


@_backward_op.register_fake
def _(grad_o, grad_state, q, k, v, decay, initial_state, cu_seqlens):
    num = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q.new_empty(num, q.shape[2], q.shape[3], v.shape[3], dtype=state_dtype(q.dtype))
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


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the state for inputs of `dtype`: fp32, or fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _plan(q: Tensor, cu_seqlens: Tensor | None, head_dim: int) -> _Sequences:
    batch, length, heads, _ = q.shape
    # The scores take heads * C per token, the states heads * head_dim^2 / C.
    per_token = heads * max(CHUNK_LEN, head_dim * head_dim // CHUNK_LEN)
    budget = max(1, BLOCK_ELEMENTS // (per_token * CHUNK_LEN))  # chunks in a block
    if cu_seqlens is None:
        return _Sequences(None, list(_even_blocks(batch, length, budget)), batch)
    bounds = cu_seqlens.tolist()
    lengths = torch.tensor(bounds).diff()
    order = torch.argsort(lengths, descending=True, stable=True)
    starts = torch.tensor(bounds[:-1], dtype=torch.int64)[order]
    blocks = list(_uneven_blocks(starts, lengths[order], budget, q.device))
    return _Sequences(order.to(q.device), blocks, len(bounds) - 1)


def _even_blocks(batch: int, length: int, budget: int) -> Iterator[_Block]:
    """Yield the blocks of `batch` sequences of one length."""
    full = length // CHUNK_LEN if batch else 0
    per_block = max(1, budget // max(1, batch))
    for step in range(0, full, per_block):
        steps = min(per_block, full - step)
        yield _Block(steps, batch, CHUNK_LEN, None, step * CHUNK_LEN, None)
    rest = length - full * CHUNK_LEN
    if batch and rest:
        yield _Block(1, batch, rest, None, full * CHUNK_LEN, None)


def _uneven_blocks(
    starts: Tensor, lengths: Tensor, budget: int, device: torch.device
) -> Iterator[_Block]:
    """Yield the blocks of packed sequences; `starts` and `lengths` [N], longest first."""
    num_chunks = (lengths + CHUNK_LEN - 1) // CHUNK_LEN
    total_steps = int(num_chunks[0]) if len(num_chunks) else 0
    position = torch.arange(CHUNK_LEN)
    step = 0
    while step < total_steps:
        active = int((num_chunks > step).sum())
        until = int(num_chunks[active - 1])  # the shortest active sequence ends here
        steps = min(until - step, max(1, budget // active))
        chunk = torch.arange(step, step + steps)[:, None] * CHUNK_LEN  # [steps, 1]
        counts = (lengths[:active] - chunk).clamp(max=CHUNK_LEN).flatten()  # [rows]
        first = (starts[:active] + chunk).flatten()
        # A short chunk repeats its own last token, so that no other sequence is ever read.
        index = first[:, None] + torch.minimum(position, counts[:, None] - 1)
        is_full = bool((counts == CHUNK_LEN).all())
        yield _Block(
            steps,
            active,
            CHUNK_LEN,
            index.to(device),
            0,
            None if is_full else counts.to(device),
        )
        step += steps


def _decays(block: _Block, decay: Tensor, dtype: torch.dtype, carry_dtype: torch.dtype) -> _Decays:
    # fp32 at least: exp(-s n) is close to 1 on slow heads, where bf16 has three digits.
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
    q_decay = table[:, 1:, None]
    return _Decays(q_decay.to(dtype), k_decay[..., None].to(dtype), diagonal.to(dtype), step_decay)


def _gather(x: Tensor, block: _Block, dtype: torch.dtype) -> Tensor:
    """Return the rows of a block as [rows, H, length, channels], contiguous, owned, in `dtype`."""
    batch, _, heads, channels = x.shape
    if block.index is None:
        span = x[:, block.start : block.start + block.steps * block.length]
        rows = span.unflatten(1, (block.steps, block.length)).permute(1, 0, 3, 2, 4)
    else:
        rows = x[0][block.index].unflatten(0, (block.steps, block.active)).transpose(2, 3)
    out = x.new_empty(block.steps * block.active, heads, block.length, channels, dtype=dtype)
    out.view(block.steps, block.active, *out.shape[1:]).copy_(rows)
    return out


def _scatter(target: Tensor, rows: Tensor, block: _Block) -> None:
    """Write [rows, H, length, channels] to the tokens they belong to."""
    if block.index is None:
        span = target[:, block.start : block.start + block.steps * block.length]
        span = span.unflatten(1, (block.steps, block.length)).permute(1, 0, 3, 2, 4)
        span.copy_(rows.view(span.shape))
        return
    values = rows.transpose(1, 2).to(target.dtype)  # [rows, length, H, channels]
    if block.counts is None:
        target[0][block.index] = values
        return
    is_token = _is_token(block)
    target[0][block.index[is_token]] = values[is_token]


def _is_token(block: _Block) -> Tensor:
    """Return [rows, length] booleans: which rows of short chunks are real tokens."""
    assert block.counts is not None
    return torch.arange(block.length, device=block.counts.device) < block.counts[:, None]


def _scan(keys: Tensor, values: Tensor, step_decay: Tensor, state: Tensor, block: _Block) -> Tensor:
    """Return the states before each step and after the last, [steps + 1, active, H, K, V]."""
    states = _contributions(keys, values, state, block, slice(1, None))
    states[0] = state[: block.active]
    for step in range(block.steps):
        states[step + 1].addcmul_(states[step], step_decay[min(step, len(step_decay) - 1)])
    return states


def _reverse_scan(
    queries: Tensor, grads: Tensor, step_decay: Tensor, carry: Tensor, block: _Block
) -> Tensor:
    """Return the state gradients before each step and after the last, as `_scan` does."""
    carries = _contributions(queries, grads, carry, block, slice(None, -1))
    carries[-1] = carry[: block.active]
    for step in reversed(range(block.steps)):
        carries[step].addcmul_(carries[step + 1], step_decay[min(step, len(step_decay) - 1)])
    return carries


def _contributions(
    left: Tensor, right: Tensor, state: Tensor, block: _Block, where: slice
) -> Tensor:
    """Return a [steps + 1, active, H, K, V] buffer with `left^T right` of each step at `where`."""
    states = state.new_empty(block.steps + 1, block.active, *state.shape[1:])
    # In the dtype of the state, not of the products: a bf16 result would round every contribution.
    left, right = left.to(state.dtype).flatten(0, 1), right.to(state.dtype).flatten(0, 1)
    torch.bmm(left.mT, right, out=states[where].view(-1, *state.shape[2:]))
    return states


def _advance(state: Tensor, last: Tensor, block: _Block) -> Tensor:
    """Return `state` [N, H, K, V] with its first `active` sequences replaced."""
    return last if block.active == len(state) else torch.cat((last, state[block.active :]))


def _sorted_state(q: Tensor, v: Tensor, state: Tensor | None, plan: _Sequences) -> Tensor:
    dtype = state_dtype(q.dtype)
    if state is None:
        return q.new_zeros(plan.num, q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    state = state.to(dtype)
    return state if plan.order is None else state[plan.order]


def _unsorted_state(state: Tensor, plan: _Sequences) -> Tensor:
    """Return the states in the caller's order, as a tensor that shares no memory with an input."""
    if plan.order is None:
        return state.clone() if not plan.blocks else state.contiguous()
    result = torch.empty_like(state)
    result[plan.order] = state
    return result


def _bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Multiply [rows, H, M, K] by [rows, H, K, N]."""
    flat = None if out is None else out.flatten(0, 1)
    product = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=flat)
    return product.view(*a.shape[:2], *product.shape[1:])


def _baddbmm(addend: Tensor, a: Tensor, b: Tensor) -> Tensor:
    flat = addend.flatten(0, 1)
    return flat.baddbmm_(a.flatten(0, 1), b.flatten(0, 1)).view(addend.shape)
