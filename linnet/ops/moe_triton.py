"""The expert products of `moe.py` on a GPU: one launch for all experts, and no wait for the host.

Rows are sorted by expert and `offsets` stay on the GPU, so the host does not know how many rows an
expert has. It launches as many tiles as there can be at most; a small kernel computes from the
offsets which expert and rows each tile has. Rows behind the last expert's (slots dropped over
capacity) give zeros.

Triton is imported at the first call; `unsupported_reason` tells without an error whether it can
serve. On the CPU it runs in Triton's interpreter, for tests (TRITON_INTERPRET=1).
"""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

MAP_BLOCK = 128
"""Tiles per program of the kernel that maps tiles to experts."""

SWIGLU_BLOCK = 1024

MANY_ROWS = 96
"""Rows per expert from which weights in another dtype are converted once, before the product."""


class TileConfig(NamedTuple):
    """The tile of one program: rows by output channels, in steps over what is summed."""

    rows: int
    columns: int
    step: int
    num_warps: int
    num_stages: int


def tile_config(
    rows_per_expert: int, columns: int, dtype: torch.dtype, device: torch.device
) -> TileConfig:
    """Return the fixed configuration of a product with so many rows per expert on average."""
    if dtype == torch.float32:
        # Full fp32 products keep their operands in registers.
        return TileConfig(32, 64, 16, 4, 2)
    if rows_per_expert < 48:
        return TileConfig(16 if rows_per_expert < 12 else 32, 128, 64, 4, 3)
    if rows_per_expert < MANY_ROWS or columns < 256:
        return TileConfig(64, 128, 64, 4, 3)
    if not _is_data_center_gpu(device):
        return TileConfig(128, 128, 32, 8, 3)
    return TileConfig(128, 256, 64, 8, 3)


@functools.cache
def _is_data_center_gpu(device: torch.device) -> bool:
    """Return whether a program may take 144 KiB of shared memory; other GPUs have 100."""
    if device.type != "cuda":
        return True
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0), (10, 3))


def unsupported_reason(x: Tensor, weights: Tensor) -> str | None:
    """Return why the Triton products cannot take these inputs, None if they can.

    Args:
        x: [R, D] rows.
        weights: [E, N, D] of any expert product.
    """
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if x.dtype not in dtypes or weights.dtype not in dtypes:
        names = ", ".join(map(str, dtypes))
        return f"rows and weights must be {names}; got {x.dtype} and {weights.dtype}"
    if x.device != weights.device:
        return f"rows lie on {x.device}, weights on {weights.device}"
    if not _is_installed():
        return "Triton is not installed; pip install 'linnet[gpu]'"
    if x.device.type == "cuda":
        return None
    if x.device.type != "cpu":
        return f"the kernels run on CUDA devices; got tensors on {x.device}"
    if isinstance(kernels().rows_kernel, kernels().triton.JITFunction):
        return "tensors on the CPU need Triton's interpreter (TRITON_INTERPRET=1)"
    return None


@torch.library.custom_op("linnet::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of each expert by its weight, with gradients.

    Args:
        x: [R, D] rows sorted by expert, fp32, bf16 or fp16.
        weights: [E, N, D]; rounded to `x.dtype` on load.
        offsets: [E + 1] int32 or int64 first row of each expert, rising from 0 to at most R; on a
            GPU their values are cut to that range, not checked.

    Returns:
        [R, N] in `x.dtype`, accumulated in fp32; zeros in rows of no expert.

    Raises:
        ValueError: arguments that do not fit, or that `unsupported_reason` names.
    """
    _check(x, weights, offsets)
    return _rows_product(x, weights, offsets)


@grouped_linear.register_fake
def _(x, weights, offsets):
    return x.new_empty(x.shape[0], weights.shape[1])


@torch.library.custom_op("linnet::grouped_linear_backward", mutates_args=())
def _backward_op(
    grad: Tensor, x: Tensor, weights: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor]:
    grad_x = _rows_product(grad, weights.transpose(1, 2), offsets)
    return grad_x, _weight_grad(grad, x, weights, offsets)


@_backward_op.register_fake
def _(grad, x, weights, offsets):
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _save_inputs(ctx, inputs, output) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):
    return *_backward_op(grad, *ctx.saved_tensors), None


grouped_linear.register_autograd(_backward, setup_context=_save_inputs)


def ffn_forward(x: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Return each expert's SwiGLU of its rows, and the pre-activations for `ffn_backward`.

    Args:
        x: [R, D] rows sorted by expert.
        gate_up: [E, 2F, D].
        down: [E, D, F].
        offsets: as in `grouped_linear`.

    Returns:
        y [R, D] and hidden [R, 2F], in `x.dtype`.

    Raises:
        ValueError: arguments that do not fit, or that `unsupported_reason` names.
    """
    _check(x, gate_up, offsets)
    hidden = _rows_product(x, gate_up, offsets)
    activated = hidden.new_empty(hidden.shape[0], down.shape[2])
    _check(activated, down, offsets)
    _launch_elementwise("swiglu_kernel", hidden, activated)
    return _rows_product(activated, down, offsets), hidden


def ffn_backward(
    grad: Tensor, x: Tensor, hidden: Tensor, gate_up: Tensor, down: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gate_up and down, each in the dtype of its tensor.

    Args:
        grad: [R, D] gradient of y.
        x, gate_up, down, offsets: as in `ffn_forward`.
        hidden: [R, 2F] from `ffn_forward`.
    """
    _check(x, gate_up, offsets)
    grad_activated = _rows_product(grad, down.transpose(1, 2), offsets)
    hidden = hidden.contiguous()
    grad_hidden, activated = torch.empty_like(hidden), torch.empty_like(grad_activated)
    _launch_elementwise("swiglu_backward_kernel", grad_activated, hidden, grad_hidden, activated)
    grad_x = _rows_product(grad_hidden, gate_up.transpose(1, 2), offsets)
    grad_down = _weight_grad(grad, activated, down, offsets)
    return grad_x, _weight_grad(grad_hidden, x, gate_up, offsets), grad_down


def _rows_product(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return x W_e^T for the rows of each expert; x [R, D], weights [E, N, D] in any strides."""
    num_rows, num_experts, columns = x.shape[0], weights.shape[0], weights.shape[1]
    y = x.new_empty(num_rows, columns)
    if not y.numel():
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    rows_per_expert = num_rows // max(1, num_experts)
    if rows_per_expert >= MANY_ROWS:
        weights = weights.to(x.dtype)
    config = tile_config(rows_per_expert, columns, x.dtype, x.device)
    num_tiles = num_rows // config.rows + num_experts + 1
    tiles = torch.empty(3, num_tiles, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        kernels().tile_map_kernel[(-(-num_tiles // MAP_BLOCK),)](
            offsets.to(x.device).contiguous(),
            tiles,
            num_rows,
            num_tiles,
            num_experts,
            BLOCK_R=config.rows,
            BLOCK=MAP_BLOCK,
        )
        kernels().rows_kernel[(num_tiles * -(-columns // config.columns),)](
            x,
            weights,
            y,
            tiles,
            num_tiles,
            num_experts,
            x.stride(0),
            *weights.stride(),
            y.stride(0),
            N=columns,
            D=x.shape[1],
            BLOCK_R=config.rows,
            BLOCK_N=config.columns,
            BLOCK_D=config.step,
            GROUP=8,
            DTYPE=_product_dtype(x),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    return y


def _weight_grad(grad: Tensor, x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Return grad_e^T x_e of each expert's rows, [E, N, D] in the dtype of `weights`."""
    num_experts, rows, columns = weights.shape[0], grad.shape[1], x.shape[1]
    out = weights.new_empty(num_experts, rows, columns)
    if not out.numel():
        return out
    grad = grad if grad.stride(1) == 1 else grad.contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    is_small = x.dtype == torch.float32
    block = 32 if is_small else 128
    grid = num_experts * -(-rows // block) * -(-columns // block)
    with torch.cuda.device_of(x):
        kernels().weight_grad_kernel[(grid,)](
            grad,
            x,
            out,
            offsets.to(x.device).contiguous(),
            x.shape[0],
            grad.stride(0),
            x.stride(0),
            N=rows,
            D=columns,
            BLOCK_R=16 if is_small else 64,
            BLOCK_N=block,
            BLOCK_D=block,
            DTYPE=_product_dtype(x),
            num_warps=4 if is_small else 8,
            num_stages=3,
        )
    return out


def _launch_elementwise(name: str, *tensors: Tensor) -> None:
    """Launch a kernel over the rows of [R, F] activations, the last of `tensors`."""
    num_rows, width = tensors[-1].shape
    if not num_rows * width:
        return
    with torch.cuda.device_of(tensors[-1]):
        getattr(kernels(), name)[(num_rows * -(-width // SWIGLU_BLOCK),)](
            *tensors, F=width, BLOCK=SWIGLU_BLOCK
        )


@functools.cache
def kernels() -> ModuleType:
    """Import the kernels, and Triton with them, when they are first needed."""
    return importlib.import_module("linnet.ops.moe_triton_kernels")


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _product_dtype(x: Tensor) -> Any:  # Any: a type of triton, which may be absent
    # The interpreter has no bf16 products.
    dtype = torch.float32 if x.device.type == "cpu" else x.dtype
    return getattr(kernels().tl, str(dtype).removeprefix("torch."))


def _check(x: Tensor, weights: Tensor, offsets: Tensor) -> None:
    if x.ndim != 2 or weights.ndim != 3 or weights.shape[2] != x.shape[1]:
        raise ValueError(
            f"weights {tuple(weights.shape)} do not fit rows {tuple(x.shape)}: "
            "expected [E, N, D] and [R, D]"
        )
    if offsets.shape != (weights.shape[0] + 1,) or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"offsets {tuple(offsets.shape)} {offsets.dtype} must be {weights.shape[0] + 1} "
            "integers, one more than experts"
        )
    if reason := unsupported_reason(x, weights):
        raise ValueError(f"the Triton expert products cannot run: {reason}")
    if offsets.device.type == "cpu":
        bounds = offsets.tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > len(x):
            raise ValueError(f"offsets must rise from 0 to at most R = {len(x)}; got {bounds}")
