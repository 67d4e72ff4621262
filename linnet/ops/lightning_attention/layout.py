"""How sequences are laid out in blocks of chunks, so that each product is one batched call.

Step i holds chunk i of every sequence that is long enough, the longest sequence first, so all that
one step needs of the states is a leading slice. Runs of steps with the same number of sequences
form a `Block`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linnet.ops.documents import document_bounds
from linnet.ops.matmul import wide_dtype

CHUNK_LEN = 64
"""C: smaller chunks do less work inside a chunk, larger ones touch the state less often."""

BLOCK_ELEMENTS = 2**21
"""Bound on the elements of the largest temporary of a block (scores or states)."""


class Block(NamedTuple):
    """`steps` consecutive chunk steps of `active` sequences, as rows of tokens."""

    steps: int
    active: int
    length: int  # tokens of the longest chunk; C except at the end of short inputs
    start: int  # first token of every sequence here, when `token_index` is None
    token_index: Tensor | None  # [steps * active, length] in the packed token axis
    counts: Tensor | None  # [steps * active] tokens per chunk, None when all chunks are full


class Sequences(NamedTuple):
    """The sequences of one call, longest first."""

    order: Tensor | None  # [N] permutation that sorts them, None when they all have one length
    blocks: list[Block]
    num: int


def plan_blocks(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Sequences:
    """Lay out the rows of a batch, or the documents that `cu_seqlens` packs into one row."""
    batch, length, heads, key_dim = q.shape
    # The scores take H * C elements per token, the states H * K * V / C.
    per_token = max(1, heads) * max(CHUNK_LEN, key_dim * v.shape[3] // CHUNK_LEN)
    budget = max(1, BLOCK_ELEMENTS // (per_token * CHUNK_LEN))  # chunks in a block
    if cu_seqlens is None:
        return Sequences(None, list(_even_blocks(batch, length, budget)), batch)
    bounds = torch.tensor(document_bounds(cu_seqlens, length), dtype=torch.int64).view(-1, 2)
    starts, lengths = bounds[:, 0], bounds.diff()[:, 0]
    order = torch.argsort(lengths, descending=True, stable=True)
    blocks = list(_uneven_blocks(starts[order], lengths[order], budget, q.device))
    return Sequences(order.to(q.device), blocks, len(bounds))


def _even_blocks(batch: int, length: int, budget: int) -> Iterator[Block]:
    """Yield the blocks of `batch` sequences of one length."""
    full = length // CHUNK_LEN if batch else 0
    per_block = max(1, budget // max(1, batch))
    for step in range(0, full, per_block):
        steps = min(per_block, full - step)
        yield Block(steps, batch, CHUNK_LEN, step * CHUNK_LEN, None, None)
    rest = length - full * CHUNK_LEN
    if batch and rest:
        yield Block(1, batch, rest, full * CHUNK_LEN, None, None)


def _uneven_blocks(
    starts: Tensor, lengths: Tensor, budget: int, device: torch.device
) -> Iterator[Block]:
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
        short = None if is_full else counts.to(device)
        yield Block(steps, active, CHUNK_LEN, 0, index.to(device), short)
        step += steps


def gather_rows(x: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """Return the rows of a block as [rows, H, length, channels], contiguous, owned, in `dtype`."""
    heads, channels = x.shape[2:]
    if block.token_index is None:
        span = x[:, block.start : block.start + block.steps * block.length]
        rows = span.unflatten(1, (block.steps, block.length)).permute(1, 0, 3, 2, 4)
    else:
        rows = x[0].index_select(0, block.token_index.flatten())
        shape = (block.steps, block.active, block.length)
        rows = rows.unflatten(0, shape).transpose(2, 3)
    out = x.new_empty(block.steps * block.active, heads, block.length, channels, dtype=dtype)
    out.view(block.steps, block.active, *out.shape[1:]).copy_(rows)
    return out


def scatter_rows(target: Tensor, rows: Tensor, block: Block) -> None:
    """Write [rows, H, length, channels] to the tokens they belong to."""
    if block.token_index is None:
        span = target[:, block.start : block.start + block.steps * block.length]
        span = span.unflatten(1, (block.steps, block.length)).permute(1, 0, 3, 2, 4)
        span.copy_(rows.view(span.shape))
        return
    values = rows.transpose(1, 2).to(target.dtype)  # [rows, length, H, channels]
    if block.counts is None:
        target[0][block.token_index] = values
        return
    is_token = token_mask(block)
    target[0][block.token_index[is_token]] = values[is_token]


def token_mask(block: Block) -> Tensor:
    """Return [rows, length] booleans: which rows of short chunks are real tokens."""
    assert block.counts is not None
    return torch.arange(block.length, device=block.counts.device) < block.counts[:, None]


def advance_states(state: Tensor, last: Tensor, block: Block) -> Tensor:
    """Return `state` [N, H, K, V] with its first `active` sequences replaced."""
    return last if block.active == len(state) else torch.cat((last, state[block.active :]))


def sorted_states(q: Tensor, v: Tensor, state: Tensor | None, plan: Sequences) -> Tensor:
    """Return the initial states [N, H, K, V], or zeros, in the order of the plan."""
    dtype = wide_dtype(q.dtype)
    if state is None:
        return q.new_zeros(plan.num, q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    state = state.to(dtype)
    return state if plan.order is None else state[plan.order]


def unsorted_states(state: Tensor, plan: Sequences) -> Tensor:
    """Return the states in the caller's order."""
    if plan.order is None:
        # A copy: not the input itself, nor a view that keeps all states of a block alive.
        return state.clone()
    result = torch.empty_like(state)
    result[plan.order] = state
    return result
