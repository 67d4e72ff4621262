"""What arguments lightning attention takes."""

import math

import torch
from torch import Tensor

from linnet.ops.documents import check_offsets
from linnet.ops.matmul import wide_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError for shapes or dtypes that do not fit; reads no values."""
    if q.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: "
            "expected q, k [B, T, H, K] and v [B, T, H, V]"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype not in DTYPES:
        raise ValueError(
            f"q, k, v must share one of {', '.join(map(str, DTYPES))}; "
            f"got {q.dtype}, {k.dtype}, {v.dtype}"
        )
    if decay.shape != q.shape[2:3]:
        raise ValueError(f"decay {tuple(decay.shape)} must be [H] = ({q.shape[2]},)")
    # bf16 turns a slope of 1/256 into another head: exp(-s) has to be exact over many tokens.
    if decay.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"decay must be torch.float32 or torch.float64; got {decay.dtype}")
    if decay.requires_grad and torch.is_grad_enabled():
        raise ValueError("decay gets no gradient; pass decay.detach()")
    num_sequences = q.shape[0]
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, q.shape[0])
        num_sequences = cu_seqlens.shape[0] - 1
    if initial_state is None:
        return
    expected = (num_sequences, q.shape[2], q.shape[3], v.shape[3])
    if tuple(initial_state.shape) != expected:
        raise ValueError(f"initial_state {tuple(initial_state.shape)} must be {expected}")
    if initial_state.dtype != wide_dtype(q.dtype):
        raise ValueError(
            f"initial_state is {initial_state.dtype}; for {q.dtype} inputs it must be "
            f"{wide_dtype(q.dtype)}, because a narrower state drifts"
        )


def check_decay(decay: Tensor) -> None:
    """Raise ValueError for slopes that are negative or not finite.

    On a GPU the values are not read, because that would wait for the device; nor under a tracer,
    where there are none.
    """
    if decay.device.type != "cpu" or torch.compiler.is_compiling():
        return
    for head, slope in enumerate(decay.tolist()):
        if not 0 <= slope < math.inf:
            raise ValueError(f"decay must be finite slopes s >= 0; head {head} has {slope}")
