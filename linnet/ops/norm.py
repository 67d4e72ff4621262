"""RMSNorm (MiniMax-01, section 2: all norms of the model are RMSNorm), statistics in fp32."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`, computed in fp32 and rounded once.

    Args:
        x: [..., D] activations; keeps only `x` and one fp32 number per row for the backward pass.
        weight: [D] scale.
        eps: added to the mean square.

    Returns:
        [..., D] in `x.dtype`.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _RMSNorm.apply(x, weight, eps)
    return _normalize(x, weight, eps)[0]


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normalize(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    # One pass without a squared copy of x.
    mean_square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    inverse = mean_square.add_(eps).rsqrt_()  # [..., 1]
    return (wide * inverse).mul_(_wide(weight)).to(x.dtype), inverse


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _normalize(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, inverse = ctx.saved_tensors
        normed = _wide(x) * inverse
        wide = _wide(grad)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            per_row = (wide * normed).reshape(-1, x.shape[-1])
            grad_weight = per_row.sum(0).to(weight.dtype)
        scaled = wide * _wide(weight)
        projection = (scaled * normed).mean(-1, keepdim=True)
        grad_x = scaled.sub_(normed.mul_(projection)).mul_(inverse)
        return grad_x.to(x.dtype), grad_weight, None
