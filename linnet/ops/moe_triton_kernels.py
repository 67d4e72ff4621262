"""Triton kernels of the expert products; `moe_triton.py` launches them. Needs the extra `gpu`.

Legend of layouts as in `moe.py`: R rows sorted by expert, E experts, D and N input and output
channels of one product, F expert width. Products accumulate in fp32.
"""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportGeneralTypeIssues=false
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _expert_rows(expert, offsets, num_rows):
    """Return the first row of an expert and the one after its last, cut to the rows there are."""
    start = tl.minimum(tl.maximum(tl.load(offsets + expert).to(tl.int32), 0), num_rows)
    stop = tl.minimum(tl.maximum(tl.load(offsets + expert + 1).to(tl.int32), start), num_rows)
    return start, stop


@triton.jit(do_not_specialize=["num_rows", "num_tiles"])
def tile_map_kernel(
    offsets,  # [E + 1]
    tiles,  # [3, num_tiles] int32: expert, first row, row after the last
    num_rows,
    num_tiles,
    num_experts,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cut the rows of each expert into tiles of BLOCK_R, for BLOCK tiles.

    The rows behind the last expert's get tiles of "expert" E; tiles that nobody needs have no rows.
    """
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    owner = tl.full([BLOCK], 0, tl.int32) + num_experts
    first = tl.full([BLOCK], 0, tl.int32)
    last = tl.full([BLOCK], 0, tl.int32)
    stop = num_rows * 0
    end = num_rows * 0  # tiles so far
    for expert in range(0, num_experts + 1):
        start = stop
        stop = stop * 0 + num_rows
        if expert < num_experts:
            stop = tl.load(offsets + expert + 1).to(tl.int32)
        stop = tl.minimum(tl.maximum(stop, start), num_rows)
        begin = end
        end = begin + (stop - start + BLOCK_R - 1) // BLOCK_R
        is_here = (tile >= begin) & (tile < end)
        owner = tl.where(is_here, expert, owner)
        first = tl.where(is_here, start + (tile - begin) * BLOCK_R, first)
        last = tl.where(is_here, stop, last)
    inside = tile < num_tiles
    tl.store(tiles + tile, owner, mask=inside)
    tl.store(tiles + num_tiles + tile, first, mask=inside)
    tl.store(tiles + 2 * num_tiles + tile, last, mask=inside)


@triton.jit(do_not_specialize=["num_tiles"])
def rows_kernel(
    x,  # [R, D]
    weights,  # [E, N, D], any strides
    y,  # [R, N]
    tiles,  # [3, num_tiles] of `tile_map_kernel`
    num_tiles,
    num_experts,
    x_r,
    w_e,
    w_n,
    w_d,
    y_r,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    DTYPE: tl.constexpr,  # of the operands
):
    """Write one tile of y = x W^T; rows of no expert get zeros."""
    # Programs that run together share tiles of both operands: GROUP tiles of rows by all of N.
    blocks: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    group = program // (GROUP * blocks)
    size = tl.minimum(num_tiles - group * GROUP, GROUP)
    within = program % (GROUP * blocks)
    tile, block = group * GROUP + within % size, within // size

    expert = tl.load(tiles + tile)
    row = tl.load(tiles + num_tiles + tile) + tl.arange(0, BLOCK_R)
    is_row = (row < tl.load(tiles + 2 * num_tiles + tile))[:, None]
    column = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = (column < N)[None, :]
    channel = tl.arange(0, BLOCK_D)
    row = row.to(tl.int64)
    x += row[:, None] * x_r + channel[None, :]
    weights += expert.to(tl.int64) * w_e
    weights += channel.to(tl.int64)[:, None] * w_d + column.to(tl.int64)[None, :] * w_n
    total = tl.full([BLOCK_R, BLOCK_N], 0.0, tl.float32)
    for d in range(0, tl.where(expert < num_experts, D, 0), BLOCK_D):
        is_channel = channel < D - d
        a = tl.load(x + d, mask=is_row & is_channel[None, :], other=0.0)
        b = tl.load(
            weights + tl.cast(d, tl.int64) * w_d, mask=is_channel[:, None] & is_column, other=0.0
        )
        total = tl.dot(a.to(DTYPE), b.to(DTYPE), total, input_precision="ieee")
    place = y + row[:, None] * y_r + column[None, :]
    tl.store(place, total.to(y.dtype.element_ty), mask=is_row & is_column)


@triton.jit(do_not_specialize=["num_rows"])
def weight_grad_kernel(
    grad,  # [R, N]
    x,  # [R, D]
    grad_weights,  # [E, N, D], contiguous
    offsets,  # [E + 1]
    num_rows,
    grad_r,
    x_r,
    N: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Write one tile of an expert's grad^T x; zeros for an expert without rows."""
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    rest = tl.program_id(0)
    block_d, rest = rest % blocks_d, rest // blocks_d
    block_n, expert = rest % blocks_n, rest // blocks_n
    start, stop = _expert_rows(expert, offsets, num_rows)

    column_n = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column_d = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    is_n, is_d = column_n < N, column_d < D
    place = tl.arange(0, BLOCK_R)
    total = tl.full([BLOCK_N, BLOCK_D], 0.0, tl.float32)
    for first in range(start, stop, BLOCK_R):
        row = (first + place).to(tl.int64)
        is_row = first + place < stop
        # Read transposed, not transposed after reading.
        a_place = grad + row[None, :] * grad_r + column_n[:, None]
        a = tl.load(a_place, mask=is_n[:, None] & is_row[None, :], other=0.0)
        b_place = x + row[:, None] * x_r + column_d[None, :]
        b = tl.load(b_place, mask=is_row[:, None] & is_d[None, :], other=0.0)
        total = tl.dot(a.to(DTYPE), b.to(DTYPE), total, input_precision="ieee")
    out = grad_weights + (expert.to(tl.int64) * N + column_n[:, None]) * D + column_d[None, :]
    total = total.to(grad_weights.dtype.element_ty)
    tl.store(out, total, mask=is_n[:, None] & is_d[None, :])


@triton.jit
def swiglu_kernel(hidden, activated, F: tl.constexpr, BLOCK: tl.constexpr):
    """Write silu(gate) * up of one row's [gate | up] [2F], BLOCK channels, rounded once."""
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(hidden + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    y = gate / (1.0 + tl.exp2(gate * -LOG2E)) * up
    tl.store(activated + row * F + column, y.to(activated.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad,  # [R, F] gradient of silu(gate) * up
    hidden,  # [R, 2F]
    grad_hidden,  # [R, 2F]
    activated,  # [R, F], computed again
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of gate and up, and silu(gate) * up, of one row and BLOCK channels."""
    blocks: tl.constexpr = (F + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = column < F
    gate = tl.load(hidden + row * 2 * F + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden + row * 2 * F + F + column, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * F + column, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp2(gate * -LOG2E))
    silu = gate * sigmoid
    # silu' = sigmoid (1 + gate (1 - sigmoid)) = sigmoid + silu (1 - sigmoid)
    grad_gate = upstream * up * (sigmoid + silu * (1.0 - sigmoid))
    dtype = activated.dtype.element_ty
    place = grad_hidden + row * 2 * F + column
    tl.store(place, grad_gate.to(dtype), mask=inside)
    tl.store(place + F, (upstream * silu).to(dtype), mask=inside)
    tl.store(activated + row * F + column, (silu * up).to(dtype), mask=inside)
