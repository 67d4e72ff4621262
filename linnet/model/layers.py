"""The two parameter holders that every part of the model uses."""

import torch
from torch import Tensor, nn

from linnet.ops import linear, rms_norm


class Linear(nn.Module):
    """Bias-free linear map whose result has the dtype of its input.

    Args:
        in_features, out_features: channels.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return linear(x, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale over `size` channels."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalize [..., size]."""
        return rms_norm(x, self.weight, self.eps)
