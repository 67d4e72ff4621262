"""Lightning attention: one public call over several implementations.

`reference.py` defines the operator. `native.py` (C++), `triton.py` (GPU) and `chunked.py` (torch)
take any length and give gradients; `operator.py` registers them and chooses. `recurrent.py` is the
single-token decode step. The README of this folder explains the operator.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops.documents import document_bounds
from linnet.ops.lightning_attention.checks import check_arguments, check_decay
from linnet.ops.lightning_attention.operator import forward, lightning_attention_op
from linnet.ops.lightning_attention.recurrent import decode_step
from linnet.ops.lightning_attention.reference import reference
from linnet.ops.matmul import wide, wide_dtype

__all__ = ["Activation", "Backend", "lightning_attention"]

Backend = Literal["native", "triton", "chunked", "recurrent", "reference"]
Activation = Literal["silu"]


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    return_state: bool = True,
    backend: Backend | None = None,
    activation: Activation | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with exponential decay, in time linear in T.

        o_t = sum_{j <= t} exp(-s (t - j)) (q_t . k_j) v_j + exp(-s (t + 1)) q_t S_0

    without scale and without denominator. Gradients flow to q, k, v and `initial_state`.

    Args:
        q: [B, T, H, K] queries, fp32, bf16, fp16 or fp64; any strides.
        k: [B, T, H, K] keys.
        v: [B, T, H, V] values.
        decay: [H] slopes s >= 0 with lambda = exp(-s), fp32 or fp64, without gradient; see
            `linnet.model.decay`.
        initial_state: [B, H, K, V] (or [N, H, K, V] with `cu_seqlens`), fp32 (fp64 for fp64
            inputs); zeros if None.
        cu_seqlens: [N + 1] int32 or int64 offsets of N documents packed along T (B = 1); the state
            starts at `initial_state[n]` at each, and no document sees another. Empty ones are fine.
        return_state: whether the final states are wanted.
        backend: "native" (C++, fp32 and bf16 on the CPU), "triton" (GPU), "chunked" (torch),
            "recurrent" (T = 1) or "reference"; None takes the fastest that can do it.
        activation: "silu" passes q, k and v through SiLU first; the backward pass keeps them as
            they are given.

    Returns:
        o: [B, T, H, V] in `v.dtype`, and the final states [B or N, H, K, V], fp32 (fp64 for fp64
        inputs), or None without `return_state`.

    Raises:
        ValueError: shapes, dtypes or offsets that do not fit, a negative slope (on the CPU), or a
            backend that cannot do it.

    Reference: MiniMax-01, section 2.2.
    """
    check_arguments(q, k, v, decay, initial_state, cu_seqlens)
    if activation not in (None, *get_args(Activation)):
        raise ValueError(f"activation {activation!r} is neither None nor 'silu'")
    needs_grad = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, initial_state)
    )
    if backend is None:
        is_step = q.shape[1] == 1 and cu_seqlens is None and not needs_grad
        backend = "recurrent" if is_step else None
    if backend in (None, "native", "triton", "chunked"):
        implementation = backend or "auto"
        is_plain = type(q) is Tensor and not needs_grad and not torch.compiler.is_compiling()
        o, state = (forward if is_plain else lightning_attention_op)(
            q, k, v, decay, initial_state, cu_seqlens, implementation, activation == "silu"
        )
        return o, state if return_state else None
    if activation == "silu":
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    if backend == "recurrent":
        o, state = _one_step(q, k, v, decay, initial_state, cu_seqlens)
    elif backend == "reference":
        check_decay(decay)
        if cu_seqlens is not None:
            document_bounds(cu_seqlens, q.shape[1])
        o, state = reference(wide(q), wide(k), wide(v), decay, initial_state, cu_seqlens)
        o = o.to(v.dtype)
    else:
        raise ValueError(
            f"backend {backend!r} is none of {', '.join(map(repr, get_args(Backend)))}"
        )
    return o, state if return_state else None


def _one_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if q.shape[1] != 1 or cu_seqlens is not None:
        packed = "" if cu_seqlens is None else " with cu_seqlens"
        raise ValueError(
            f"backend 'recurrent' takes one token per row; got T = {q.shape[1]}{packed}"
        )
    check_decay(decay)
    if initial_state is None:
        shape = (q.shape[0], q.shape[2], q.shape[3], v.shape[3])
        initial_state = q.new_zeros(shape, dtype=wide_dtype(q.dtype))
    return decode_step(q, k, v, decay, initial_state)
