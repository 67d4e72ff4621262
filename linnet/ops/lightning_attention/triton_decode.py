"""Decoding with lightning attention on a GPU: states in a pool, one slot per running sequence.

`decode_slots` advances states by a token, in place. For speculative decoding `verify_slots` gives
the outputs of several draft tokens and writes no state, then `commit_slots` advances each state by
the tokens that were accepted; both are the scan of `triton.py` with fp32 operands.
`rms_norm_sigmoid_gate` is what the layer does with the outputs. Inference only.
"""

import torch
from torch import Tensor

from linnet.ops.lightning_attention.triton import (
    LaunchConfig,
    check_inputs,
    device_reason,
    kernels,
    launch_scan,
    power_of_two,
    product,
    with_contiguous_channels,
)

MAX_NORM_WIDTH = 32_768
"""Elements of a row that `rms_norm_sigmoid_gate` holds in registers."""


def decode_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    fused_silu: bool = False,
) -> Tensor:
    """Advance each row's state by one token, in place in a pool of states.

    Args:
        q, k: [B, 1, H, K]; views of an interleaved projection are fine.
        v: [B, 1, H, V].
        decay: [H] slopes.
        pool: [slots, H, K, V] fp32, last dim contiguous; modified.
        slots: [B] int32 or int64 place of each row's state; -1 (any number outside of the pool)
            skips the row. A slot must not occur twice.
        fused_silu: apply silu to q, k and v on load.

    Returns:
        o [B, 1, H, V] in `v.dtype`, zeros for skipped rows.

    Raises:
        ValueError: arguments that do not fit, or that `unsupported_reason` names.
    """
    if q.ndim == 4 and q.shape[1] != 1:
        raise ValueError(f"decode_slots takes one token per row; got T = {q.shape[1]}")
    _check_slots(q, k, v, decay, pool, slots)
    return _decode_op(q, k, v, decay, pool, slots, fused_silu)


@torch.library.custom_op("linnet::lightning_decode_slots", mutates_args=("pool",))
def _decode_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    fused_silu: bool,
) -> Tensor:
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    batch, _, heads, key_dim = q.shape
    value_dim = v.shape[3]
    q, k, v = with_contiguous_channels(q), with_contiguous_channels(k), with_contiguous_channels(v)
    # 16 KiB of state per program keep enough loads in flight also for a batch of one.
    block_v = min(32, power_of_two(value_dim))
    grid = batch * heads * -(-value_dim // block_v)
    if not grid:
        return o
    with torch.cuda.device_of(q):
        kernels().decode_kernel[(grid,)](
            q,
            k,
            v,
            o,
            decay.contiguous(),
            pool,
            slots.contiguous(),
            pool.shape[0],
            heads,
            *(stride for x in (q, k, v) for stride in (x.stride(0), x.stride(2))),
            *pool.stride()[:3],
            K=key_dim,
            V=value_dim,
            BLOCK_K=power_of_two(key_dim),
            BLOCK_V=block_v,
            SILU=fused_silu,
            num_warps=4,
        )
    return o


@_decode_op.register_fake
def _(q, k, v, decay, pool, slots, fused_silu):
    return v.new_empty(v.shape)


def verify_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    lengths: Tensor | None = None,
    fused_silu: bool = False,
) -> Tensor:
    """Return the outputs of draft tokens that follow each row's state, and leave the state alone.

    Args:
        q, k: [B, M, H, K] draft tokens.
        v: [B, M, H, V].
        decay, pool, slots, fused_silu: as in `decode_slots`; products are as exact as fp32.
        lengths: [B] int32 or int64 tokens of each row; M if None. Later places are not read.

    Returns:
        o [B, M, H, V] in `v.dtype`, zeros past a row's length and in skipped rows.

    Raises:
        ValueError: arguments that do not fit, or that `unsupported_reason` names.
    """
    _check_slots(q, k, v, decay, pool, slots, lengths)
    return _verify_op(q, k, v, decay, pool, slots, lengths, fused_silu)


@torch.library.custom_op("linnet::lightning_verify_slots", mutates_args=())
def _verify_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    lengths: Tensor | None,
    fused_silu: bool,
) -> Tensor:
    o = torch.zeros_like(v, memory_format=torch.contiguous_format)
    _scan_slots(q, k, v, o, decay, pool, None, slots, lengths, fused_silu)
    return o


@_verify_op.register_fake
def _(q, k, v, decay, pool, slots, lengths, fused_silu):
    return v.new_empty(v.shape)


def commit_slots(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    accepted: Tensor,
    fused_silu: bool = False,
) -> None:
    """Advance each row's state by the tokens that were accepted after `verify_slots`.

    Args:
        k: [B, M, H, K] draft tokens, as in `verify_slots`.
        v: [B, M, H, V].
        decay, pool, slots, fused_silu: as in `decode_slots`; `pool` is modified.
        accepted: [B] int32 or int64 tokens to keep of each row, 0 to M.

    Raises:
        ValueError: arguments that do not fit, or that `unsupported_reason` names.
    """
    _check_slots(k, k, v, decay, pool, slots, accepted)
    _commit_op(k, v, decay, pool, slots, accepted, fused_silu)


@torch.library.custom_op("linnet::lightning_commit_slots", mutates_args=("pool",))
def _commit_op(
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    accepted: Tensor,
    fused_silu: bool,
) -> None:
    _scan_slots(None, k, v, None, decay, pool, pool, slots, accepted, fused_silu)


@_commit_op.register_fake
def _(k, v, decay, pool, slots, accepted, fused_silu):
    return None


def _scan_slots(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    o: Tensor | None,
    decay: Tensor,
    pool: Tensor,
    pool_out: Tensor | None,
    slots: Tensor,
    lengths: Tensor | None,
    silu: bool,
) -> None:
    if not k.shape[0] * k.shape[2]:
        return
    # fp32 operands: rounding to bf16 would put into the state what decoding does not.
    has_full_products = product(k.dtype, k.device) == (torch.float32, "ieee")
    launch_scan(
        None if q is None else with_contiguous_channels(q),
        with_contiguous_channels(k),
        with_contiguous_channels(v),
        o,
        pool.unsqueeze(1),
        None if pool_out is None else pool_out.unsqueeze(1),
        config=LaunchConfig(16, min(32, power_of_two(v.shape[3])), 4, 1),
        decay=decay.contiguous(),
        num_sequences=k.shape[0],
        lengths=None if lengths is None else lengths.contiguous(),
        slots=slots.contiguous(),
        silu=silu,
        precision="ieee" if has_full_products else "tf32x3",
    )


@torch.library.custom_op("linnet::rms_norm_sigmoid_gate", mutates_args=())
def rms_norm_sigmoid_gate(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `rms_norm(x, weight, eps) * sigmoid(gate)`, rounded once; no gradients.

    Args:
        x: [..., W] outputs of all heads, W = H V.
        gate: [..., W], before the sigmoid.
        weight: [W] scale.
        eps: added to the mean square.

    Returns:
        [..., W] in `x.dtype`.

    Raises:
        ValueError: shapes that do not fit, more than 32,768 channels, or no GPU.
    """
    width = x.shape[-1]
    if gate.shape != x.shape or weight.shape != (width,):
        raise ValueError(
            f"x {tuple(x.shape)}, gate {tuple(gate.shape)}, weight {tuple(weight.shape)} do not "
            "fit: expected [..., W], [..., W], [W]"
        )
    if not 1 <= width <= MAX_NORM_WIDTH:
        raise ValueError(f"W = {width} is outside of 1 .. {MAX_NORM_WIDTH}; use rms_norm")
    if reason := device_reason(x.device):
        raise ValueError(f"rms_norm_sigmoid_gate cannot run: {reason}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    rows, gates = x.reshape(-1, width), gate.reshape(-1, width)
    if not len(rows):
        return out
    rows, gates = with_contiguous_channels(rows), with_contiguous_channels(gates)
    block = power_of_two(width)
    with torch.cuda.device_of(x):
        kernels().norm_gate_kernel[(len(rows),)](
            rows,
            gates,
            weight.contiguous(),
            out,
            eps,
            rows.stride(0),
            gates.stride(0),
            W=width,
            BLOCK=block,
            num_warps=min(16, max(4, block // 1024)),
        )
    return out


@rms_norm_sigmoid_gate.register_fake
def _(x, gate, weight, eps):
    return x.new_empty(x.shape)


def _check_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    pool: Tensor,
    slots: Tensor,
    lengths: Tensor | None = None,
) -> None:
    check_inputs(q, k, v, decay, None, None)
    batch, _, heads, key_dim = q.shape
    expected = (heads, key_dim, v.shape[3])
    if pool.ndim != 4 or pool.shape[1:] != expected or pool.dtype != torch.float32:
        raise ValueError(
            f"pool {tuple(pool.shape)} {pool.dtype} must be [slots, H, K, V] with "
            f"(H, K, V) = {expected}, in torch.float32"
        )
    if pool.stride(3) != 1:
        raise ValueError(
            f"pool is modified in place; its last dim must be contiguous: {pool.stride()}"
        )
    for name, index in (("slots", slots), ("lengths", lengths)):
        if index is None:
            continue
        if index.shape != (batch,) or index.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"{name} {tuple(index.shape)} {index.dtype} must be [B] = ({batch},) integers"
            )
