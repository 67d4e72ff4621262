"""Products with bf16 or fp32 weights in fp32 arithmetic, without widened copies, and the expert
feed-forward of many tokens in one call. No gradients."""

import ctypes

import torch
from torch import Tensor

from linnet.ops.native import pointer
from linnet.ops.native.arguments import Matrix, call, dense_rows, fields, matrix


class _LinearArgs(ctypes.Structure):
    _fields_ = (
        *fields(Matrix, "x", "y"),
        ("weight", ctypes.c_void_p),
        *fields(ctypes.c_int64, "rows", "channels", "depth"),
        *fields(ctypes.c_int32, "weight_is_bf16", "num_threads"),
    )


class _ExpertsArgs(ctypes.Structure):
    _fields_ = (
        *fields(Matrix, "x", "y", "hidden"),
        *fields(ctypes.c_void_p, "gate_up", "down", "experts", "weights"),
        *fields(ctypes.c_int64, "num_tokens", "top_k", "num_experts", "dim", "width"),
        *fields(ctypes.c_int32, "weights_are_bf16", "num_threads"),
    )


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T`: x [..., D], weight [N, D] -> [..., N] in `x.dtype`."""
    rows, weight = dense_rows(x), weight.contiguous()
    y = torch.empty(len(rows), weight.shape[0], dtype=x.dtype)
    args = _LinearArgs(matrix(rows), matrix(y), pointer(weight), len(rows), *weight.shape)
    args.weight_is_bf16 = weight.dtype == torch.bfloat16
    args.num_threads = torch.get_num_threads()
    call("linnet_linear", args)
    return y.view(*x.shape[:-1], len(weight))


def experts_ffn(
    x: Tensor,
    experts: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    hidden: Tensor | None = None,
) -> Tensor:
    """Return the weighted sum over each token's experts, which are read once.

    Args:
        x: [T, D] tokens.
        experts: [T, k] int64, -1 where a slot is dropped.
        weights: [T, k] fp32.
        gate_up, down: [E, 2F, D], [E, D, F] of one dtype.
        hidden: [T * k, 2F], takes the pre-activations of each slot, if given.

    Returns:
        [T, D] in `x.dtype`.
    """
    x, gate_up, down = dense_rows(x), gate_up.contiguous(), down.contiguous()
    experts, weights = experts.contiguous(), weights.float().contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    args = _ExpertsArgs(matrix(x), matrix(y), matrix(hidden))
    args.gate_up, args.down = pointer(gate_up), pointer(down)
    args.experts, args.weights = pointer(experts), pointer(weights)
    args.num_tokens, args.top_k = experts.shape
    args.num_experts, args.dim, args.width = down.shape
    args.weights_are_bf16 = gate_up.dtype == torch.bfloat16
    args.num_threads = torch.get_num_threads()
    call("linnet_experts", args)
    return y
