"""The slope policy: which head of which layer forgets how fast (MiniMax-01 code; SPEC 1.2).

    s[l, h] = 2^(-8 (h + 1) / H) * (1 - l / (L - 1) + 1e-5)

Layer 0 forgets fastest, the last layer hardly at all; softmax layers consume an index too. Slopes
are fixed: neither learned nor stored in checkpoints.
"""

import math
from typing import Literal

import torch
from torch import Tensor

SlopeRule = Literal["published", "transformers", "level"]
"""`transformers` divides by (L - 1 + 1e-5) and ignores that H may be no power of two. `level` does
without the layer, so that the last ones of a small model can still tell one token from the next."""


def head_slopes(num_heads: int, rule: SlopeRule = "published") -> list[float]:
    """Return the base slope of each head, in the order of the heads.

    They fall geometrically. For a head count that is no power of two the published rule is ALiBi's:
    the slopes of the largest power of two below it, then every other slope of twice that power.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    if power == num_heads or rule == "transformers":
        return [2.0 ** (-8 * (h + 1) / num_heads) for h in range(num_heads)]
    return head_slopes(power) + head_slopes(2 * power)[::2][: num_heads - power]


def layer_slopes(
    layer: int, num_layers: int, num_heads: int, rule: SlopeRule = "published"
) -> Tensor:
    """Return the slopes s of one layer, [H] fp32.

    Args:
        layer: index among all layers, softmax ones included.
        num_layers: L.
        num_heads: H.
        rule: whose formula.
    """
    if rule == "level":
        factor = 1.0
    elif rule == "transformers":
        factor = 1 - layer / (num_layers - 1 + 1e-5) + 1e-5
    else:
        factor = 1 - layer / max(1, num_layers - 1) + 1e-5
    slopes = [slope * factor for slope in head_slopes(num_heads, rule)]
    # On the CPU by name: they have values even in a model that is built on the meta device.
    return torch.tensor(slopes, dtype=torch.float64, device="cpu").float()
