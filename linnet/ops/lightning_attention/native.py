"""Lightning attention through the C++ kernels of `linnet.ops.native`, forward and backward.

Same chunked form as `chunked.py`, in one pass per head with the state in cache; it reads strided
q, k, v where they lie and saves only them for the backward pass.
"""

import ctypes

import torch
from torch import Tensor

from linnet.ops.documents import document_bounds
from linnet.ops.lightning_attention.checks import check_decay
from linnet.ops.native import library, pointer

MAX_HEAD_DIM = 256
"""Largest K or V: the buffers of one head are meant to stay in the L2 cache."""


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("silu", ctypes.c_int32),
    )


class _Args(ctypes.Structure):
    """Mirrors `LightningArgs` of lightning.h."""

    _fields_ = (
        *((name, _Rows) for name in ("q", "k", "v", "o", "grad_q", "grad_k", "grad_v")),
        *(
            (name, ctypes.c_void_p)
            for name in (
                "decay",
                "initial_state",
                "final_state",
                "grad_state",
                "starts",
                "lengths",
                "batch_rows",
            )
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("num_sequences", "num_heads", "key_dim", "value_dim")
        ),
        ("is_bf16", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
    )


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the native kernels cannot take these tensors, None if they can."""
    del k  # of the shape and dtype of q
    if q.device.type != "cpu":
        return f"it runs on the CPU, not on {q.device.type}"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"it takes float32 and bfloat16, not {str(q.dtype).removeprefix('torch.')}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"head dims up to {MAX_HEAD_DIM}, not K = {q.shape[3]}, V = {v.shape[3]}"
    if library() is None:
        return "its C++ kernels are not there"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return o and the final states; arguments as in `linnet.lightning_attention`.

    With `silu`, q, k and v pass through SiLU as they are read.
    """
    check_decay(decay)
    q, k, v = (_with_dense_heads(x) for x in (q, k, v))
    o = torch.empty(v.shape, dtype=v.dtype)
    sequences = _sequences(q, cu_seqlens)
    state = _empty_state(q, v, sequences)
    name = "linnet_lightning_forward"
    _call(name, (q, k, v), silu, o, decay, sequences, initial_state, state)
    return o, state


def backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v (after SiLU, with `silu`) and the initial states."""
    q, k, v, grad_o = (_with_dense_heads(x) for x in (q, k, v, grad_o))
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    sequences = _sequences(q, cu_seqlens)
    grad_initial = _empty_state(q, v, sequences)
    _call(
        "linnet_lightning_backward",
        (q, k, v),
        silu,
        grad_o,
        decay,
        sequences,
        initial_state,
        grad_initial,
        (grad_q, grad_k, grad_v),
        grad_state,
    )
    return grad_q, grad_k, grad_v, grad_initial


def _call(
    name: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    silu: bool,
    o: Tensor,
    decay: Tensor,
    sequences: Tensor,
    initial_state: Tensor | None,
    final_state: Tensor,
    grads: tuple[Tensor, ...] = (),
    grad_state: Tensor | None = None,
) -> None:
    q, _, v = qkv
    decay = decay.float().contiguous()
    initial_state, grad_state = (
        None if x is None else x.contiguous() for x in (initial_state, grad_state)
    )
    starts, lengths, batch_rows = sequences
    args = _Args(
        *(_rows(x, silu) for x in qkv),
        _rows(o),
        *(_rows(x) for x in grads or (None, None, None)),
        pointer(decay),
        pointer(initial_state),
        pointer(final_state),
        pointer(grad_state),
        pointer(starts),
        pointer(lengths),
        pointer(batch_rows),
        sequences.shape[1],
        q.shape[2],
        q.shape[3],
        v.shape[3],
        q.dtype == torch.bfloat16,
        torch.get_num_threads(),
    )
    kernels = library()
    assert kernels is not None
    getattr(kernels, name)(ctypes.byref(args))


def _rows(x: Tensor | None, silu: bool = False) -> _Rows:
    return _Rows() if x is None else _Rows(x.data_ptr(), *x.stride()[:3], silu)


def _with_dense_heads(x: Tensor) -> Tensor:
    """Return `x` with its last dimension contiguous, as the kernels read it."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _sequences(q: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Return [3, N] int64: first token, length and batch row of each sequence."""
    if cu_seqlens is None:
        rows = torch.arange(q.shape[0])
        return torch.stack((torch.zeros_like(rows), torch.full_like(rows, q.shape[1]), rows))
    bounds = document_bounds(cu_seqlens, q.shape[1])
    starts = torch.tensor([start for start, _ in bounds], dtype=torch.int64)
    lengths = torch.tensor([stop - start for start, stop in bounds], dtype=torch.int64)
    return torch.stack((starts, lengths, torch.zeros_like(starts)))


def _empty_state(q: Tensor, v: Tensor, sequences: Tensor) -> Tensor:
    shape = (sequences.shape[1], q.shape[2], q.shape[3], v.shape[3])
    return q.new_empty(shape, dtype=torch.float32)
