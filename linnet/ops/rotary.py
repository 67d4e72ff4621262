"""Partial rotary position embedding (MiniMax-01, section 2: RoPE on half of each head).

The first `rotary_dim` of the K channels turn, in the NeoX pairing (channel i with channel
i + rotary_dim/2); the others carry no position.
"""

import torch
from torch import Tensor

from linnet.ops.matmul import wide


def rotary_tables(positions: Tensor, rotary_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the given positions.

    Args:
        positions: [...] integer positions, in tokens.
        rotary_dim: number of channels that turn; even.
        theta: base of the geometric frequencies.

    Returns:
        cos, sin: [..., rotary_dim / 2] fp32.

    Raises:
        ValueError: `rotary_dim` is odd or negative.
    """
    if rotary_dim < 0 or rotary_dim % 2:
        raise ValueError(f"rotary_dim must be even, as channels turn in pairs; got {rotary_dim}")
    # fp32: bf16 cannot tell neighboring positions apart beyond 256.
    angles = positions[..., None].float() * inverse_frequency(rotary_dim, theta, positions.device)
    return angles.cos(), angles.sin()


def inverse_frequency(rotary_dim: int, theta: float, device: torch.device) -> Tensor:
    """Return the angle per position of each pair of channels, [rotary_dim / 2] fp32."""
    exponent = torch.arange(0, rotary_dim, 2, dtype=torch.float32, device=device)
    return 1.0 / (theta ** (exponent / rotary_dim))


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the first `2 * cos.shape[-1]` channels of each head.

    Args:
        x: [B, T, H, K] queries or keys.
        cos, sin: [B or 1, T, rotary_dim / 2] from `rotary_tables`.

    Returns:
        [B, T, H, K] in `x.dtype`.

    Raises:
        ValueError: the tables turn more channels than a head has, or are not for T positions.
    """
    half = cos.shape[-1]
    if 2 * half > x.shape[-1]:
        raise ValueError(f"rotary_dim {2 * half} exceeds the head dim {x.shape[-1]}")
    if cos.shape != sin.shape or cos.shape[-2] != x.shape[1]:
        raise ValueError(
            f"cos {tuple(cos.shape)}, sin {tuple(sin.shape)} are not the tables of "
            f"{x.shape[1]} positions"
        )
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [B, T, 1, rotary_dim / 2]
    first, second = wide(x[..., :half]), wide(x[..., half : 2 * half])
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
    if 2 * half == x.shape[-1]:
        return turned
    return torch.cat((turned, x[..., 2 * half :]), -1)
