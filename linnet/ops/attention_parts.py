"""Softmax attention over part of the keys, and how parts are joined to the whole.

A part is the attention over some keys and the logarithm of the sum of its exponentials; two parts
are joined by the weights that these sums give. The backward pass of a part takes the output and the
sum of the *whole*, which make its probabilities those of the whole; so parts need no joining there.

Heads come first here: q [B, H, T, K], k [B, G, S, K], v [B, G, S, V].
"""

import torch
from torch import Tensor

from linnet.ops.matmul import wide

BLOCK_SCORES = 1 << 26
"""Scores that are formed at a time where no kernel returns the sums: 256 MiB in fp32."""

Part = tuple[Tensor, Tensor]
"""Attention [B, H, T, V] over some of the keys, and the log of its exponentials' sum [B, H, T]."""


def attend_past(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Part:
    """Attend to keys that all queries see."""
    batch, heads, length, _ = q.shape
    o, log_sum = _flash(_folded(q, k), k, v, False, scale)
    return o.reshape(batch, heads, length, -1), log_sum.reshape(batch, heads, length)


def attend_own(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Part:
    """Attend causally to the queries' own keys."""
    own_k, own_v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return _flash(q, own_k, own_v, True, scale)


def join(before: Part, within: Part) -> Part:
    """Return the attention over the keys of two parts."""
    share = torch.sigmoid(before[1] - within[1])[..., None]  # [B, H, T, 1]
    o = torch.lerp(within[0], before[0], share.to(within[0].dtype))
    return o, torch.logaddexp(before[1], within[1])


def past_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Part, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the keys of `attend_past` add to the gradients of q, k and v.

    Args:
        grad: [B, H, T, V] of the whole output.
        q, k, v: of the part.
        whole: the output and the log-sum over all keys.
        scale: as in the forward pass.
    """
    o, log_sum = whole
    grad, own_q, own_o = (_folded(x, k) for x in (grad, q, o))
    log_sum = log_sum.reshape(own_q.shape[:3])
    dq, dk, dv = _flash_backward(grad, own_q, k, v, (own_o, log_sum), False, scale)
    return dq.reshape(q.shape), dk, dv


def own_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Part, scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the keys of `attend_own` add to the gradients; arguments as `past_gradients`."""
    group = q.shape[1] // k.shape[1]
    own_k, own_v = (x.repeat_interleave(group, 1) for x in (k, v))
    dq, dk, dv = _flash_backward(grad, q, own_k, own_v, whole, True, scale)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _folded(x: Tensor, k: Tensor) -> Tensor:
    """Return x [B, H, T, C] as [B, G, H / G * T, C]: without a mask the order does not matter."""
    return x.reshape(x.shape[0], k.shape[1], -1, x.shape[3])


def _flash(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, scale: float | None) -> Part:
    if _has_kernel(q, v):
        o, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, scale=scale
        )
        return o, log_sum
    rows = max(1, BLOCK_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    parts = []
    for start in range(0, max(1, q.shape[2]), rows):
        scores = _scores(q[:, :, start : start + rows], k, is_causal, scale, start)
        log_sum = scores.logsumexp(-1)
        weights = torch.exp(scores - log_sum[..., None])
        parts.append(((weights @ v.to(weights.dtype)).to(v.dtype), log_sum))
    return torch.cat([o for o, _ in parts], 2), torch.cat([x for _, x in parts], 2)


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    whole: Part,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    o, log_sum = whole
    if _has_kernel(q, v):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, o, log_sum, 0.0, is_causal, scale=scale
        )
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    weights = torch.exp(_scores(q, k, is_causal, scale) - log_sum[..., None])
    own_grad, dtype = wide(grad), q.dtype
    through = own_grad @ wide(v).mT - (own_grad * wide(o)).sum(-1, keepdim=True)
    dscores = weights * through * factor
    gradients = dscores @ wide(k), dscores.mT @ wide(q), weights.mT @ own_grad
    return gradients[0].to(dtype), gradients[1].to(dtype), gradients[2].to(dtype)


def _scores(q: Tensor, k: Tensor, is_causal: bool, scale: float | None, start: int = 0) -> Tensor:
    """Return wide scores of queries, of which the first one has the place `start`."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = wide(q) @ wide(k).mT * factor
    if not is_causal:
        return scores
    visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(start)
    return scores.masked_fill(~visible, float("-inf"))


def _has_kernel(q: Tensor, v: Tensor) -> bool:
    return q.device.type == "cpu" and q.shape[3] == v.shape[3]
