"""Triton kernels of lightning attention; `triton.py` launches them. Needs the extra `gpu`.

`scan_kernel` is the forward pass and all three gradients (MiniMax-01, section 2.2, algorithms 1 and
2, with decay). With lambda = exp(-s) it computes, forwards in time,

    out_t = sum_{j <= t} lambda^(t-j) (q_t . k_j) v_j + lambda^(t+1) q_t S      -> o, dq

or backwards in time, from the last token m - 1 down,

    out_t = sum_{j >= t} lambda^(j-t) (q_t . k_j) v_j + lambda^(m-1-t) q_t R    -> dk, dv

because dQ is that sum over (dO, V, K), dK over (V, dO, Q) and dV over (K, Q, dO). S (or R) stays in
fp32 registers, [K, BLOCK_V] per program, so no program needs another one's sums and no state of a
chunk is written. Every exponent is -s times a count of tokens, never a ratio.

Within a chunk of C tokens, counted in the direction of the scan, a = 0..m-1:

    out = ((q k^T) * lambda^(a-b)) v + lambda^(a + 1 - REVERSE) * (q S)
    S  <- lambda^m S + (k * lambda^(m - 1 - b + REVERSE))^T v

`tl.trans` is applied to loaded values only: Triton before 3.7.1 miscompiles the transpose of an
accumulator on Hopper (flash-linear-attention issue 640).
"""

# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportCallIssue=false
# pyright: reportOptionalMemberAccess=false, reportOptionalOperand=false
# pyright: reportGeneralTypeIssues=false
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
STEEPEST = tl.constexpr(1e4)  # exp(-s) is 0 in fp32 long before; keeps s times a count finite


@triton.jit
def _expm1(x):
    """Return exp(x) - 1 for x <= 0, to full relative accuracy near 0.

    A state that is multiplied by a rounded exp(x) drifts: on slow heads all errors have one sign.
    """
    z = tl.maximum(x, -0.5)
    series = 1.0 + z / 7.0 * (1.0 + z / 8.0)
    series = 1.0 + z / 4.0 * (1.0 + z / 5.0 * (1.0 + z / 6.0 * series))
    series = z * (1.0 + z / 2.0 * (1.0 + z / 3.0 * series))
    return tl.where(x > -0.5, series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def _silu(x):
    """Return silu(x), computed in fp32 and rounded to the dtype of x, as torch does."""
    wide = x.to(tl.float32)
    return (wide / (1.0 + tl.exp2(wide * -LOG2E))).to(x.dtype)


@triton.jit
def _bounds(sequence, offsets, lengths, length):
    """Return the first token of a sequence and the one after its last.

    Offsets are cut to the tensor: the host does not read them, and no offset may cause a read
    outside of it.
    """
    start = sequence * 0
    stop = start + length
    if offsets is not None:
        start = tl.minimum(tl.maximum(tl.load(offsets + sequence).to(tl.int32), 0), length)
        stop = tl.minimum(tl.maximum(tl.load(offsets + sequence + 1).to(tl.int32), start), length)
    if lengths is not None:
        stop = tl.minimum(tl.maximum(tl.load(lengths + sequence).to(tl.int32), 0), length)
    return start, stop


@triton.jit
def _segment(index, count, num_segments, C: tl.constexpr):
    """Return the first place of a segment of `count` tokens, and how many it has."""
    chunks = (count + C - 1) // C
    size = (chunks + num_segments - 1) // num_segments * C
    first = tl.minimum(index * size, count)
    return first, tl.minimum(size, count - first)


@triton.jit(do_not_specialize=["length", "num_sequences", "num_slots", "num_segments"])
def scan_kernel(
    q,  # [B, T, H, K], None with o
    k,  # [B, T, H, K]
    v,  # [B, T, H, V]
    o,  # [B, T, H, V]; None: only the carry is wanted
    decay,  # [H] slopes
    carry_in,  # [N, segments, H, K, V] fp32, or the pool [slots, 1, H, K, V]; None: zeros
    carry_out,  # the same; None: not wanted; may be carry_in when there is one segment
    offsets,  # [N + 1] of packed documents, or None
    lengths,  # [B] tokens of each row, or None
    slots,  # [B] where in the pool each row's carry is, or None; out of range: the row is skipped
    length,  # T
    num_sequences,
    num_slots,
    num_segments,
    heads,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    o_b,
    o_t,
    o_h,
    in_n,
    in_g,
    in_h,
    in_k,
    in_v,
    out_n,
    out_g,
    out_h,
    out_k,
    out_v,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,  # >= K
    BLOCK_V: tl.constexpr,
    C: tl.constexpr,
    REVERSE: tl.constexpr,  # 0 or 1
    SILU: tl.constexpr,
    DTYPE: tl.constexpr,  # of the operands of products
    PRECISION: tl.constexpr,  # of fp32 products
):
    """Scan one segment of one sequence and head, for BLOCK_V columns of v."""
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    rest = tl.program_id(0)
    block, rest = rest % blocks, rest // blocks
    head, rest = rest % heads, rest // heads
    segment, sequence = rest % num_segments, rest // num_segments

    start, stop = _bounds(sequence, offsets, lengths, length)
    carry_index = sequence
    if slots is not None:
        carry_index = tl.load(slots + sequence).to(tl.int64)
        is_known = (carry_index >= 0) & (carry_index < num_slots)
        stop = tl.where(is_known, stop, start)
    first, count = _segment(segment, stop - start, num_segments, C)

    # 64-bit from here on: a tensor of 262K tokens with 64 heads of 128 has 2^31 elements.
    batch = sequence.to(tl.int64)
    if offsets is not None:
        batch = batch * 0
    head = head.to(tl.int64)
    token = (start + first).to(tl.int64)
    direction: tl.constexpr = 1 - 2 * REVERSE
    if REVERSE:
        token = (stop - 1 - first).to(tl.int64)
    k += batch * k_b + token * k_t + head * k_h
    v += batch * v_b + token * v_t + head * v_h

    a = tl.arange(0, C)
    rows = a.to(tl.int64)[:, None] * direction
    columns_k = tl.arange(0, BLOCK_K)
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    is_k = (columns_k < K)[None, :]
    is_v = (columns_v < V)[None, :]
    k_tile = rows * k_t + columns_k[None, :]
    v_tile = rows * v_t + columns_v[None, :]

    slope = tl.minimum(tl.load(decay + head).to(tl.float32), STEEPEST)
    rate = -slope * LOG2E
    if o is not None:
        q += batch * q_b + token * q_t + head * q_h
        o += batch * o_b + token * o_t + head * o_h
        q_tile = rows * q_t + columns_k[None, :]
        o_tile = rows * o_t + columns_v[None, :]
        gap = a[:, None] - a[None, :]
        # The exponent is cut, because exp2 of what the mask drops may overflow.
        diagonal = tl.exp2(rate * tl.maximum(gap, 0).to(tl.float32))
        diagonal = tl.where(gap >= 0, diagonal, 0.0)
        into = tl.exp2(rate * (a + (1 - REVERSE)).to(tl.float32))

    carry_tile = columns_k.to(tl.int64)[:, None]
    is_carry = (columns_k < K)[:, None] & is_v
    state = tl.full([BLOCK_K, BLOCK_V], 0.0, tl.float32)
    if slots is not None:
        is_carry = is_carry & is_known
    if carry_in is not None:
        carry_in += carry_index.to(tl.int64) * in_n + segment.to(tl.int64) * in_g + head * in_h
        tile = carry_tile * in_k + columns_v.to(tl.int64)[None, :] * in_v
        state = tl.load(carry_in + tile, mask=is_carry, other=0.0)

    for chunk in range(0, (count + C - 1) // C):
        left = count - chunk * C
        held = tl.minimum(left, C)
        inside = (a < left)[:, None]
        ahead = tl.cast(chunk * (C * direction), tl.int64)
        keys = tl.load(k + ahead * k_t + k_tile, mask=inside & is_k, other=0.0)
        values = tl.load(v + ahead * v_t + v_tile, mask=inside & is_v, other=0.0)
        if SILU:
            keys, values = _silu(keys), _silu(values)
        keys, values = keys.to(DTYPE), values.to(DTYPE)
        if o is not None:
            queries = tl.load(q + ahead * q_t + q_tile, mask=inside & is_k, other=0.0)
            if SILU:
                queries = _silu(queries)
            queries = queries.to(DTYPE)
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * diagonal
            # Decays multiply fp32 results; the operands q and k of these products stay exact.
            out = tl.dot(queries, state.to(DTYPE), input_precision=PRECISION) * into[:, None]
            out = tl.dot(scores.to(DTYPE), values, out, input_precision=PRECISION)
            out = out.to(o.dtype.element_ty)
            tl.store(o + ahead * o_t + o_tile, out, mask=inside & is_v)
        # A short chunk decays by the tokens it holds; places past its end hold zeros.
        until = tl.exp2(rate * tl.maximum(held - 1 - a + REVERSE, 0).to(tl.float32))
        decayed = (tl.trans(keys).to(tl.float32) * until[None, :]).to(DTYPE)
        state += state * _expm1(-slope * held.to(tl.float32))
        state = tl.dot(decayed, values, state, input_precision=PRECISION)

    if carry_out is not None:
        carry_out += carry_index.to(tl.int64) * out_n + segment.to(tl.int64) * out_g + head * out_h
        tile = carry_tile * out_k + columns_v.to(tl.int64)[None, :] * out_v
        tl.store(carry_out + tile, state, mask=is_carry)

    if o is not None and offsets is not None:
        # Tokens behind the last document belong to none; they must not stay unwritten.
        is_last = (sequence == num_sequences - 1) & (segment == num_segments - 1)
        for tail in range(tl.where(is_last, stop, length), length, C):
            behind = o + (tl.cast(tail, tl.int64) - token) * o_t
            behind = behind + a.to(tl.int64)[:, None] * o_t + columns_v[None, :]
            zeros = tl.full([C, BLOCK_V], 0.0, o.dtype.element_ty)
            tl.store(behind, zeros, mask=(a < length - tail)[:, None] & is_v)


@triton.jit(do_not_specialize=["length", "num_segments"])
def chain_kernel(
    carries,  # [N, segments, H, K * V] fp32; what each segment adds -> what each segment finds
    carry_in,  # [N, H, K, V] fp32 or None
    carry_out,  # [N, H, K, V] fp32 or None
    decay,
    offsets,
    length,
    num_segments,
    heads,
    in_n,
    in_h,
    in_k,
    in_v,
    out_n,
    out_h,
    out_k,
    out_v,
    K: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Carry the state of one sequence and head from segment to segment, for BLOCK elements."""
    blocks: tl.constexpr = (K * V + BLOCK - 1) // BLOCK
    rest = tl.program_id(0)
    block, rest = rest % blocks, rest // blocks
    head, sequence = rest % heads, rest // heads
    start, stop = _bounds(sequence, offsets, None, length)
    slope = tl.minimum(tl.load(decay + head).to(tl.float32), STEEPEST)

    element = block * BLOCK + tl.arange(0, BLOCK)
    inside = element < K * V
    row, column = (element // V).to(tl.int64), (element % V).to(tl.int64)
    sequence, head = sequence.to(tl.int64), head.to(tl.int64)
    state = tl.full([BLOCK], 0.0, tl.float32)
    if carry_in is not None:
        carry_in += sequence * in_n + head * in_h
        state = tl.load(carry_in + row * in_k + column * in_v, mask=inside, other=0.0)
    carries += (sequence * num_segments * heads + head) * (K * V)
    for segment in range(0, num_segments):
        _, count = _segment(segment, stop - start, num_segments, C)
        place = carries + element
        added = tl.load(place, mask=inside, other=0.0)
        tl.store(place, state, mask=inside)
        state += state * _expm1(-slope * count.to(tl.float32)) + added
        carries += heads * K * V
    if carry_out is not None:
        carry_out += sequence * out_n + head * out_h
        tl.store(carry_out + row * out_k + column * out_v, state, mask=inside)


@triton.jit(do_not_specialize=["num_slots"])
def decode_kernel(
    q,  # [B, H, K]
    k,  # [B, H, K]
    v,  # [B, H, V]
    o,  # [B, H, V], contiguous
    decay,
    pool,  # [slots, H, K, V] fp32, read and written
    slots,  # [B]; out of range: the row is skipped and gives zeros
    num_slots,
    heads,
    q_b,
    q_h,
    k_b,
    k_h,
    v_b,
    v_h,
    pool_n,
    pool_h,
    pool_k,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SILU: tl.constexpr,
):
    """Advance one row and head by one token, for BLOCK_V columns of the state."""
    blocks: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V
    rest = tl.program_id(0)
    block, rest = rest % blocks, rest // blocks
    head, row = (rest % heads).to(tl.int64), (rest // heads).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    is_known = (slot >= 0) & (slot < num_slots)

    columns_k = tl.arange(0, BLOCK_K)
    columns_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    is_k = (columns_k < K) & is_known
    is_v = (columns_v < V) & is_known
    query = tl.load(q + row * q_b + head * q_h + columns_k, mask=is_k, other=0.0)
    key = tl.load(k + row * k_b + head * k_h + columns_k, mask=is_k, other=0.0)
    value = tl.load(v + row * v_b + head * v_h + columns_v, mask=is_v, other=0.0)
    if SILU:
        query, key, value = _silu(query), _silu(key), _silu(value)
    query, key, value = query.to(tl.float32), key.to(tl.float32), value.to(tl.float32)

    place = pool + slot * pool_n + head * pool_h
    place = place + columns_k.to(tl.int64)[:, None] * pool_k + columns_v[None, :]
    is_state = is_k[:, None] & is_v[None, :]
    state = tl.load(place, mask=is_state, other=0.0)
    slope = tl.minimum(tl.load(decay + head).to(tl.float32), STEEPEST)
    state += state * _expm1(-slope)
    # (q . k) v apart: read back from the state, its rounding errors would not share one factor.
    past = tl.reduce(query[:, None] * state, 0, tl.standard._sum_combine)
    out = past + tl.reduce(query * key, 0, tl.standard._sum_combine) * value
    tl.store(place, state + key[:, None] * value[None, :], mask=is_state)
    out_place = o + (row * heads + head) * V + columns_v
    tl.store(out_place, out.to(o.dtype.element_ty), mask=columns_v < V)


@triton.jit
def norm_gate_kernel(
    x,  # [R, W]
    gate,  # [R, W]
    weight,  # [W]
    out,  # [R, W], contiguous
    eps,
    x_r,
    gate_r,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write one row of RMSNorm(x) * weight * sigmoid(gate), in fp32 and rounded once."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < W
    wide = tl.load(x + row * x_r + column, mask=inside, other=0.0).to(tl.float32)
    opening = tl.load(gate + row * gate_r + column, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    square = tl.reduce(wide * wide, 0, tl.standard._sum_combine) / W
    inverse = 1.0 / tl.sqrt(square + eps)
    y = wide * inverse * scale / (1.0 + tl.exp2(opening * -LOG2E))
    tl.store(out + row * W + column, y.to(out.dtype.element_ty), mask=inside)
