"""Lightning attention: one public call over several implementations.

`reference.py` defines the operator, `chunked.py` is the torch path for any length with gradients,
`recurrent.py` the single-token decode step. The README of this folder explains the operator.
"""

from typing import Literal

import torch
from torch import Tensor

from linnet.ops.lightning_attention.chunked import lightning_attention_chunked, state_dtype
from linnet.ops.lightning_attention.recurrent import decode_step
from linnet.ops.lightning_attention.reference import reference

__all__ = ["Backend", "lightning_attention", "state_dtype"]

Backend = Literal["chunked", "recurrent", "reference"]


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with exponential decay, in time linear in T.

        o_t = sum_{j <= t} exp(-s (t - j)) (q_t . k_j) v_j + exp(-s (t + 1)) q_t S_0

    without scale and without denominator. Gradients flow to q, k, v and `initial_state`.

    Args:
        q: [B, T, H, K] queries, fp32, bf16, fp16 or fp64; any strides.
        k: [B, T, H, K] keys.
        v: [B, T, H, V] values.
        decay: [H] slopes s >= 0 with lambda = exp(-s); see `linnet.model.decay`.
        initial_state: [B, H, K, V] (or [N, H, K, V] with `cu_seqlens`) fp32; zeros if None.
        cu_seqlens: [N + 1] int32 or int64 offsets of N documents packed along T (B = 1); the state
            starts at `initial_state[n]` at each, and no document sees another. Empty ones are fine.
        return_state: whether the final states are wanted.
        backend: "chunked", "recurrent" (T = 1, no gradients) or "reference"; None chooses.

    Returns:
        o: [B, T, H, V] in `v.dtype`, and the final states [B or N, H, K, V], fp32 (fp64 for fp64
        inputs), or None without `return_state`.

    Raises:
        ValueError: shapes, dtypes or offsets that do not fit, or a backend that cannot do it.

    Reference: MiniMax-01, section 2.2.
    """
    _check(q, k, v, decay, initial_state, cu_seqlens)
    if backend is None:
        needs_grad = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (q, k, v, initial_state)
        )
        is_step = q.shape[1] == 1 and cu_seqlens is None and not needs_grad
        backend = "recurrent" if is_step else "chunked"
    if backend == "chunked":
        o, state = lightning_attention_chunked(q, k, v, decay, initial_state, cu_seqlens)
    elif backend == "recurrent":
        if q.shape[1] != 1 or cu_seqlens is not None:
            raise ValueError(
                f"backend 'recurrent' takes one token per sequence; got T={q.shape[1]}"
            )
        if initial_state is None:
            shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
            initial_state = q.new_zeros(shape, dtype=state_dtype(q.dtype))
        o, state = decode_step(q, k, v, decay, initial_state)
    elif backend == "reference":
        wide = state_dtype(q.dtype)
        start = None if initial_state is None else initial_state.to(wide)
        o, state = reference(q.to(wide), k.to(wide), v.to(wide), decay, start, cu_seqlens)
        o = o.to(v.dtype)
    else:
        raise ValueError(f"backend {backend!r} is none of 'chunked', 'recurrent', 'reference'")
    return o, state if return_state else None


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: "
            "expected q, k [B, T, H, K] and v [B, T, H, V]"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v must share a float dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if decay.shape != q.shape[2:3]:
        raise ValueError(f"decay {tuple(decay.shape)} must be [H] = ({q.shape[2]},)")
    num_sequences = q.shape[0]
    if cu_seqlens is not None:
        if q.shape[0] != 1:
            raise ValueError(f"cu_seqlens needs B = 1; got B = {q.shape[0]}")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
            raise ValueError(f"cu_seqlens must be [N + 1] integers; got {tuple(cu_seqlens.shape)}")
        num_sequences = cu_seqlens.shape[0] - 1
    expected = (num_sequences, q.shape[2], q.shape[3], v.shape[3])
    if initial_state is not None and tuple(initial_state.shape) != expected:
        raise ValueError(f"initial_state {tuple(initial_state.shape)} must be {expected}")
