"""Norms and activations in one pass over memory. Rows are fp32 or bf16, arithmetic is fp32."""

import ctypes

import torch
from torch import Tensor

from linnet.ops.native import pointer
from linnet.ops.native.arguments import Matrix, call, dense_rows, fields, matrix


class _NormArgs(ctypes.Structure):
    _fields_ = (
        *fields(Matrix, "x", "gate", "y", "grad", "grad_x", "grad_gate"),
        *fields(ctypes.c_void_p, "weight", "inverse", "grad_weight"),
        *fields(ctypes.c_int64, "rows", "dim"),
        ("eps", ctypes.c_float),
        ("num_threads", ctypes.c_int32),
    )


class _SwigluArgs(ctypes.Structure):
    _fields_ = (
        *fields(Matrix, "hidden", "activated", "grad_activated", "grad_hidden"),
        ("dots", ctypes.c_void_p),
        *fields(ctypes.c_int64, "rows", "width"),
        ("num_threads", ctypes.c_int32),
    )


def norm(
    x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return `rms_norm(x) * weight (* sigmoid(gate))` in `x.dtype` and 1 / rms, [rows] fp32.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.
        gate: [..., D] or None.
    """
    rows, gates = dense_rows(x), None if gate is None else dense_rows(gate)
    weight = weight.float().contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    inverse = torch.empty(len(rows))
    args = _NormArgs(x=matrix(rows), gate=matrix(gates), y=matrix(y.view(rows.shape)), eps=eps)
    args.weight, args.inverse = pointer(weight), pointer(inverse)
    args.rows, args.dim = rows.shape
    args.num_threads = torch.get_num_threads()
    call("linnet_norm", args)
    return y, inverse


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, gate: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the gradients of x, weight (fp32) and gate; arguments as of `norm`."""
    rows, gates = dense_rows(x), None if gate is None else dense_rows(gate)
    grads, weight = dense_rows(grad), weight.float().contiguous()
    grad_x = torch.empty(rows.shape, dtype=x.dtype)
    grad_gate = None if gates is None else torch.empty(gates.shape, dtype=gates.dtype)
    grad_weight = torch.empty(len(weight))
    args = _NormArgs(
        x=matrix(rows),
        gate=matrix(gates),
        grad=matrix(grads),
        grad_x=matrix(grad_x),
        grad_gate=matrix(grad_gate),
    )
    args.weight, args.inverse = pointer(weight), pointer(inverse)
    args.grad_weight = pointer(grad_weight)
    args.rows, args.dim = rows.shape
    args.num_threads = torch.get_num_threads()
    call("linnet_norm_backward", args)
    return grad_x.view(x.shape), grad_weight, None if grad_gate is None else grad_gate.view(x.shape)


def swiglu(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `silu(gate) * up` of the halves of hidden [R, 2F], as [R, F] in `dtype`."""
    activated = torch.empty(len(hidden), hidden.shape[1] // 2, dtype=dtype)
    args = _SwigluArgs(hidden=matrix(hidden), activated=matrix(activated))
    args.rows, args.width = activated.shape
    args.num_threads = torch.get_num_threads()
    call("linnet_swiglu", args)
    return activated


def swiglu_backward(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the backward pass of an expert needs of its activation.

    Args:
        grad: [R, F] gradient of `swiglu(hidden)`.
        hidden: [R, 2F].

    Returns:
        The gradient of hidden [R, 2F], the activations again [R, F] (both in `grad.dtype`), and
        `activations . grad` of each row, [R] fp32.
    """
    grad_hidden = torch.empty(hidden.shape, dtype=grad.dtype)
    activated = torch.empty(grad.shape, dtype=grad.dtype)
    dots = torch.empty(len(grad))
    args = _SwigluArgs(
        hidden=matrix(hidden),
        activated=matrix(activated),
        grad_activated=matrix(grad),
        grad_hidden=matrix(grad_hidden),
    )
    args.dots = pointer(dots)
    args.rows, args.width = grad.shape
    args.num_threads = torch.get_num_threads()
    call("linnet_swiglu_backward", args)
    return grad_hidden, activated, dots
