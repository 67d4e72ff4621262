"""RMSNorm (MiniMax-01, section 2: all norms of the model are RMSNorm), statistics in fp32.

With a gate it is the end of a lightning attention layer: `rms_norm(o) * sigmoid(gate)`.
"""

import torch
from torch import Tensor

from linnet.ops.matmul import wide
from linnet.ops.native import elementwise
from linnet.ops.native.arguments import takes


def rms_norm(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None = None) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight (* sigmoid(gate))`, in fp32 and rounded once.

    Args:
        x: [..., D] activations; keeps only `x`, `gate` and one fp32 number per row for the
            backward pass.
        weight: [D] scale.
        eps: added to the mean square.
        gate: [..., D] of the dtype of `x`, before its sigmoid; None leaves the factor out.

    Returns:
        [..., D] in `x.dtype`.

    Raises:
        ValueError: a weight of another width, or a gate of another shape.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)}")
    if gate is not None and (gate.shape, gate.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"gate {tuple(gate.shape)} {gate.dtype} does not fit x {tuple(x.shape)} {x.dtype}"
        )
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, gate)
    ):
        return _RMSNorm.apply(x, weight, eps, gate)
    return _forward(x, weight, eps, gate)[0]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> Tensor:
        y, inverse = _forward(x, weight, eps, gate)
        ctx.save_for_backward(x, weight, inverse, gate)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight, inverse, gate = ctx.saved_tensors
        if takes(x, weight, grad):
            grads = elementwise.norm_backward(grad, x, weight, inverse, gate)
        else:
            grads = _backward(grad, x, weight, inverse, gate)
        return grads[0], grads[1].to(weight.dtype), None, grads[2]


def _forward(x: Tensor, weight: Tensor, eps: float, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the result and 1 / rms of each row, [rows]."""
    if takes(x, weight):
        return elementwise.norm(x, weight, eps, gate)
    x_wide = wide(x)
    # One pass without a squared copy of x.
    norm = torch.linalg.vector_norm(x_wide, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # [..., 1]
    y = (x_wide * inverse).mul_(weight)
    if gate is not None:
        y *= torch.sigmoid(wide(gate))
    return y.to(x.dtype), inverse.flatten()


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, gate: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    inverse = inverse.view(*x.shape[:-1], 1)
    normed = wide(x) * inverse
    grad, grad_gate = wide(grad), None
    if gate is not None:
        sigmoid = torch.sigmoid(wide(gate))
        grad_gate = (grad * normed * wide(weight) * sigmoid * (1 - sigmoid)).to(gate.dtype)
        grad = grad * sigmoid
    grad_weight = (grad * normed).reshape(-1, x.shape[-1]).sum(0)
    scaled = grad * wide(weight)
    projection = (scaled * normed).mean(-1, keepdim=True)
    grad_x = scaled.sub_(normed.mul_(projection)).mul_(inverse)
    return grad_x.to(x.dtype), grad_weight, grad_gate
