"""In which dtype a product runs, and a linear map that keeps its parameters in their own dtype.

bf16 products are fast where the hardware multiplies bf16 (AMX, AVX-512-BF16, GPUs) and several
times slower than fp32 where it does not, because they are emulated. So the operands of a bf16
product are widened to fp32 on such machines: the result is rounded once instead of at every partial
sum.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops.native import products
from linnet.ops.native.arguments import takes


@functools.cache
def cpu_has_native_bf16() -> bool:
    """Return whether this CPU multiplies bf16 in hardware (AMX or AVX-512-BF16)."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities:
        return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    # torch 2.11 has no public query.
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def product_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype in which to multiply tensors of `dtype` on `device`."""
    is_half = dtype in (torch.bfloat16, torch.float16)
    if is_half and device.type == "cpu" and not (dtype == torch.bfloat16 and cpu_has_native_bf16()):
        return torch.float32
    return dtype


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of states, statistics and losses: fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """Return `x` in fp32, or unchanged if it is fp64."""
    return x.to(wide_dtype(x.dtype))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` in the dtype of `x`, whatever the dtype of the weight.

    With fp32 master weights and bf16 activations the weight is rounded to bf16 for the product and
    its gradient comes back in fp32; neither copy is kept for the backward pass.

    Args:
        x: [..., D] activations.
        weight: [N, D] parameter.

    Returns:
        [..., N] in `x.dtype`.
    """
    dtype = product_dtype(x.dtype, x.device)
    if x.dtype == weight.dtype == dtype:
        return F.linear(x, weight)
    if dtype != x.dtype and x.shape[:-1].numel() <= 4 and x.dtype == weight.dtype:
        # A few rows are bound by reading the weight: widening a copy would double the traffic.
        return F.linear(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, dtype, x.dtype)
    return _forward(x, weight.to(x.dtype), dtype)


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` in fp32, operands and result; the backward pass keeps `x` as it is.

    fp32: with bf16 logits, ties and near-ties choose other experts than in inference.

    Args:
        x: [T, D] tokens.
        weight: [E, D] router.

    Returns:
        [T, E] fp32 (fp64 for fp64 tokens).
    """
    dtype = wide_dtype(x.dtype)
    return _Linear.apply(x, weight, dtype, dtype)


def _forward(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiply in `dtype`; x and weight share another one, which the result has too."""
    if x.dtype != dtype == torch.float32 and takes(x, weight):
        return products.linear(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)


class _Linear(torch.autograd.Function):
    """`linear` whose casts are redone in the backward pass instead of stored."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, dtype: torch.dtype, rounding: torch.dtype
    ) -> Tensor:
        """Multiply in `dtype` operands that are rounded to `rounding` first, as the result is."""
        ctx.save_for_backward(x, weight)
        ctx.dtypes = dtype, rounding
        if x.dtype == rounding:
            return _forward(x, weight.to(rounding), dtype)
        return F.linear(x.to(dtype), weight.to(rounding).to(dtype)).to(rounding)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        dtype, rounding = ctx.dtypes
        wide = grad.to(dtype)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (wide @ weight.to(rounding).to(dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = wide.reshape(-1, wide.shape[-1])
            grad_weight = (rows.T @ x.reshape(-1, x.shape[-1]).to(dtype)).to(weight.dtype)
        return grad_x, grad_weight, None, None
