"""The structures of the C++ decode step (src/decode.h), and the call."""

import ctypes

import torch
from torch import Tensor

from linnet.ops.native import library, pointer
from linnet.ops.native.arguments import fields

KEY_BLOCK = 64
"""Keys that the kernel takes at a time, one after the other in memory."""

WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class Weight(ctypes.Structure):
    """A matrix [rows, columns], contiguous; int8 has one fp32 scale per row."""

    _fields_ = (*fields(ctypes.c_void_p, "data", "scale"), ("type", ctypes.c_int64))

    @classmethod
    def of(cls, tensor: Tensor, scale: Tensor | None = None) -> "Weight":
        """Describe a tensor, which has to outlive the result."""
        return cls(tensor.data_ptr(), pointer(scale), WEIGHT_TYPES[tensor.dtype])


class Norm(ctypes.Structure):
    """Mirrors `Norm`."""

    _fields_ = (("weight", Weight), ("eps", ctypes.c_float))


class Layer(ctypes.Structure):
    """Mirrors `DecodeLayer`."""

    _fields_ = (
        *fields(Norm, "input_norm", "post_norm"),
        ("inputs", Weight * 3),
        ("inner_norm", Norm),
        ("output", Weight),
        ("slopes", ctypes.c_void_p),
        *fields(Weight, "router", "gate_up", "down"),
        *fields(Weight, "shared_gate", "shared_up", "shared_down", "coefficient"),
        *fields(ctypes.c_float, "alpha", "beta", "mlp_alpha", "mlp_beta"),
        ("is_postnorm", ctypes.c_int64),
    )


class Model(ctypes.Structure):
    """Mirrors `DecodeModel`."""

    _fields_ = (
        ("layers", ctypes.POINTER(Layer)),
        ("embedding", Weight),
        ("final_norm", Norm),
        ("lm_head", Weight),
        ("inverse_frequency", ctypes.c_void_p),
        *fields(ctypes.c_int64, "num_layers", "vocab_size", "hidden_size"),
        *fields(ctypes.c_int64, "num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
        *fields(ctypes.c_int64, "num_experts", "top_k", "expert_width", "shared_width"),
        ("kv_is_half", ctypes.c_int64),
    )


class _Step(ctypes.Structure):
    """Mirrors `DecodeStep`."""

    _fields_ = (
        ("model", ctypes.POINTER(Model)),
        *fields(ctypes.c_void_p, "tokens", "lengths", "memory", "pages"),
        ("page_size", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        *fields(ctypes.c_int64, "batch_size", "num_threads"),
    )


def run(
    model: Model,
    tokens: Tensor,
    lengths: int,
    memory: int,
    logits: Tensor | None,
    pages: int = 0,
    page_size: int = 0,
) -> None:
    """Advance every row by one token.

    Rows may have different lengths. An interrupt finds all of the step done or nothing: lengths are
    counted up before the call returns.

    Args:
        model: whose tensors are alive.
        tokens: [B, 1] int64 contiguous, within the vocabulary.
        lengths: address of [B] int64 counts of the tokens that each row has taken in.
        memory: address of [L, B, 2] addresses: a state [H, K, K] fp32 and 0, or keys and values
            [capacity, G, K] with room for one token more; with pages [pages, page_size, G, K].
        logits: [B, 1, vocab] fp32 to be filled; None if they are not wanted.
        pages: address of [B] addresses of int64 tables, of the pages that hold a row's tokens.
        page_size: tokens in a page, a multiple of `KEY_BLOCK`.

    Raises:
        MemoryError: nothing has changed then.
    """
    step = _Step(
        ctypes.pointer(model),
        tokens.data_ptr(),
        lengths,
        memory,
        pages,
        page_size,
        pointer(logits),
        tokens.shape[0],
        torch.get_num_threads(),
    )
    kernels = library()
    assert kernels is not None
    if kernels.linnet_decode_step(ctypes.byref(step)):
        raise MemoryError("no memory for a decode step")
