"""The three parameter holders that the parts of the model share."""

import torch
import torch.nn.functional as F
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


class Embedding(nn.Module):
    """One vector of `size` channels per token id."""

    def __init__(self, vocab_size: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Look up ids [B, T] int64 -> [B, T, size]."""
        return F.embedding(tokens, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm with a learned scale over `size` channels."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        """Normalize [..., size], and multiply by `sigmoid(gate)` if there is a gate."""
        return rms_norm(x, self.weight, self.eps, gate)
