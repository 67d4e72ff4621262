"""RMSNorm (MiniMax-01, section 2: all norms of the model are RMSNorm), statistics in fp32."""

import torch
from torch import Tensor

from linnet.ops.matmul import wide, wide_dtype


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`, computed in fp32 and rounded once.

    Args:
        x: [..., D] activations; keeps only `x` and one fp32 number per row for the backward pass.
        weight: [D] scale.
        eps: added to the mean square.

    Returns:
        [..., D] in `x.dtype`.

    Raises:
        ValueError: a weight of another width.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    if x.numel() == x.shape[-1] and x.device.type == "cpu" and x.dtype == weight.dtype:
        return _normalize_row(x, weight, eps)
    return _normalize(x, weight, eps)[0]


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x_wide = wide(x)
    # One pass without a squared copy of x.
    norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
    return (x_wide * inverse).mul_(weight).to(x.dtype), inverse


def _normalize_row(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize a single row in three calls: in decoding, calls cost more than arithmetic."""
    norm = float(torch.linalg.vector_norm(x, dtype=wide_dtype(x.dtype)))
    inverse = (norm * norm / x.shape[-1] + eps) ** -0.5
    # addcmul multiplies in fp32 and rounds once.
    return torch.addcmul(x.new_zeros(()), x, weight, value=inverse)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        normed = wide(x) * inverse
        grad = wide(grad)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            per_row = (grad * normed).reshape(-1, x.shape[-1])
            grad_weight = per_row.sum(0).to(weight.dtype)
        scaled = grad * wide(weight)
        projection = (scaled * normed).mean(-1, keepdim=True)
        grad_x = scaled.sub_(normed.mul_(projection)).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None
