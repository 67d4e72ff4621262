"""What the argument structures of the kernels share, and how one is called."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from linnet.ops.native import library

DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels read and write; they compute in fp32."""


class Matrix(ctypes.Structure):
    """Mirrors `Matrix` of panels.h: rows of numbers, the stride in elements."""

    _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("is_bf16", ctypes.c_int32))


def fields(kind: Any, *names: str) -> tuple[tuple[str, Any], ...]:
    """Return fields of one ctypes kind (any class that ctypes takes)."""
    return tuple((name, kind) for name in names)


def matrix(x: Tensor | None) -> Matrix:
    """Describe a [rows, columns] tensor with dense rows; None is a null pointer."""
    if x is None:
        return Matrix()
    assert x.stride(1) == 1 or x.shape[1] <= 1
    return Matrix(x.data_ptr(), x.stride(0), x.dtype == torch.bfloat16)


def dense_rows(x: Tensor) -> Tensor:
    """Return [..., D] as [rows, D] with dense rows, without a copy where possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def takes(*tensors: Tensor) -> bool:
    """Return whether the kernels are there and read these tensors.

    Only plain ones: what is traced, faked or spread over ranks has no memory to point at.
    """
    return (
        not torch.compiler.is_compiling()
        and all(
            type(x) in (Tensor, torch.nn.Parameter) and x.dtype in DTYPES and x.device.type == "cpu"
            for x in tensors
        )
        and library() is not None
    )


def call(name: str, args: ctypes.Structure) -> None:
    """Run a kernel."""
    kernels = library()
    assert kernels is not None
    getattr(kernels, name)(ctypes.byref(args))
