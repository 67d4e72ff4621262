"""How sequences are laid out in blocks of chunks, so that each product is one batched call.

Rows are chunks. Step i holds chunk i of every sequence that is long enough, the longest sequence
first, so all that one step needs of the states is a slice. Consecutive steps form a `Block`, as
many as fit the memory bound; its products are batched, only the states go step by step.
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


class Packing(NamedTuple):
    """Where the rows of a block of packed documents lie in the token axis."""

    token_index: Tensor  # [rows * C] token of each place; places past a chunk's end repeat its last
    counts: Tensor | None  # [rows] tokens per chunk, None when all chunks are full
    places: Tensor | None  # [n] places that hold a token of their own, None when all do


class Block(NamedTuple):
    """The rows of consecutive steps."""

    steps: list[tuple[slice, slice]]  # rows of each step, and the sequences they belong to
    rows: int
    length: int  # tokens of a row; C except at the end of sequences of one length
    start: int  # first token of every sequence here, without packing
    packing: Packing | None


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
    budget = max(1, BLOCK_ELEMENTS // (per_token * CHUNK_LEN))  # rows in a block
    if cu_seqlens is None:
        return Sequences(None, list(_even_blocks(batch, length, budget)), batch)
    bounds = torch.tensor(document_bounds(cu_seqlens, length), dtype=torch.int64).view(-1, 2)
    starts, lengths = bounds[:, 0], bounds.diff()[:, 0]
    order = torch.argsort(lengths, descending=True, stable=True)
    blocks = list(_packed_blocks(starts[order], lengths[order], budget, q.device))
    return Sequences(order.to(q.device), blocks, len(bounds))


def _even_blocks(batch: int, length: int, budget: int) -> Iterator[Block]:
    """Yield the blocks of `batch` sequences of one length."""
    full = length // CHUNK_LEN if batch else 0
    per_block = max(1, budget // max(1, batch))
    for first in range(0, full, per_block):
        yield _even_block(batch, min(per_block, full - first), CHUNK_LEN, first * CHUNK_LEN)
    rest = length - full * CHUNK_LEN
    if batch and rest:
        yield _even_block(batch, 1, rest, full * CHUNK_LEN)


def _even_block(batch: int, num_steps: int, length: int, start: int) -> Block:
    steps = [(slice(i * batch, (i + 1) * batch), slice(0, batch)) for i in range(num_steps)]
    return Block(steps, num_steps * batch, length, start, None)


def _packed_blocks(
    starts: Tensor, lengths: Tensor, budget: int, device: torch.device
) -> Iterator[Block]:
    """Yield the blocks of packed documents; `starts` and `lengths` [N], longest first."""
    num_chunks = (lengths + CHUNK_LEN - 1) // CHUNK_LEN
    total_steps = int(num_chunks[0]) if len(num_chunks) else 0
    active = (num_chunks > torch.arange(total_steps)[:, None]).sum(1).tolist()  # per step
    steps: list[tuple[slice, slice]] = []
    chunks: list[tuple[int, int]] = []  # (sequence, step) of each row
    for step, num in enumerate(active):
        first = 0
        while first < num:
            last = min(num, first + budget - len(chunks))
            steps.append((slice(len(chunks), len(chunks) + last - first), slice(first, last)))
            chunks += [(sequence, step) for sequence in range(first, last)]
            first = last
            if len(chunks) == budget:
                yield _packed_block(steps, chunks, starts, lengths, device)
                steps, chunks = [], []
    if chunks:
        yield _packed_block(steps, chunks, starts, lengths, device)


def _packed_block(
    steps: list[tuple[slice, slice]],
    chunks: list[tuple[int, int]],
    starts: Tensor,
    lengths: Tensor,
    device: torch.device,
) -> Block:
    sequence, step = torch.tensor(chunks).unbind(1)  # [rows] each
    counts = (lengths[sequence] - step * CHUNK_LEN).clamp(max=CHUNK_LEN)
    first = starts[sequence] + step * CHUNK_LEN
    position = torch.arange(CHUNK_LEN)
    # A short chunk repeats its own last token, so that no other sequence is ever read.
    index = (first[:, None] + torch.minimum(position, counts[:, None] - 1)).flatten()
    packing = Packing(index.to(device), None, None)
    if bool((counts < CHUNK_LEN).any()):
        places = (position < counts[:, None]).flatten().nonzero()[:, 0]
        packing = Packing(index.to(device), counts.to(device), places.to(device))
    return Block(steps, len(chunks), CHUNK_LEN, 0, packing)


def gather_rows(x: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """Return the rows of a block as [rows, H, length, channels], contiguous, owned, in `dtype`."""
    out = x.new_empty(block.rows, x.shape[2], block.length, x.shape[3], dtype=dtype)
    if block.packing is None:
        span = _span(x, block)
        out.view(span.shape).copy_(span)
    else:
        rows = x[0].index_select(0, block.packing.token_index)
        out.copy_(rows.unflatten(0, (block.rows, block.length)).transpose(1, 2))
    return out


def scatter_rows(target: Tensor, rows: Tensor, block: Block) -> None:
    """Write [rows, H, length, channels] to the tokens they belong to."""
    if block.packing is None:
        span = _span(target, block)
        span.copy_(rows.view(span.shape))
        return
    values = rows.transpose(1, 2).to(target.dtype).flatten(0, 1)  # [rows * length, H, channels]
    index, _, places = block.packing
    if places is not None:
        index, values = index[places], values.index_select(0, places)
    target[0].index_copy_(0, index, values)


def _span(x: Tensor, block: Block) -> Tensor:
    """Return the tokens of a block without packing, viewed [steps, B, H, length, channels]."""
    num_steps = len(block.steps)
    span = x[:, block.start : block.start + num_steps * block.length]
    return span.unflatten(1, (num_steps, block.length)).permute(1, 0, 3, 2, 4)


def sorted_states(q: Tensor, v: Tensor, state: Tensor | None, plan: Sequences) -> Tensor:
    """Return a copy of the states [N, H, K, V], or zeros, in the order of the plan."""
    dtype = wide_dtype(q.dtype)
    if state is None:
        return q.new_zeros(plan.num, q.shape[2], q.shape[3], v.shape[3], dtype=dtype)
    # A copy, which the scan may write to.
    return state.to(dtype, copy=True) if plan.order is None else state.to(dtype)[plan.order]


def unsorted_states(state: Tensor, plan: Sequences) -> Tensor:
    """Return the states in the caller's order."""
    if plan.order is None:
        return state
    result = torch.empty_like(state)
    result[plan.order] = state
    return result
