"""Causal softmax attention with grouped key/value heads (MiniMax-01, section 2: every 8th layer).

The products and the softmax are torch's `scaled_dot_product_attention`; this file decides what is
visible to whom: causal from the end of the keys (so that a chunk continues a cache), and packed
documents that do not see each other.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops.attention_parts import attend_own, attend_past, join
from linnet.ops.documents import check_offsets, document_bounds
from linnet.ops.matmul import product_dtype

QUERY_BLOCK = 512
"""Rows of the explicit mask that a continued chunk builds at a time, to bound its size."""


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attend causally; query t of T sees keys 0 .. S - T + t.

    Args:
        q: [B, T, H, K] queries.
        k: [B, S, G, K] keys, S >= T, H a multiple of G; the last T belong to the queries.
        v: [B, S, G, V] values.
        cu_seqlens: [N + 1] integer offsets of packed documents; needs B = 1 and S = T.
        scale: factor on q . k; 1/sqrt(K) by default.

    Returns:
        [B, T, H, V] in `v.dtype`.

    Raises:
        ValueError: shapes, dtypes or offsets that do not fit together.
    """
    _check(q, k, v, cu_seqlens)
    dtype = product_dtype(q.dtype, q.device)
    heads_first = [x.to(dtype).transpose(1, 2) for x in (q, k, v)]  # [B, H or G, T or S, .]
    if cu_seqlens is None:
        o = _attend(*heads_first, scale=scale)
    else:
        parts = [
            _attend(*(x[:, :, start:stop] for x in heads_first), scale=scale)
            for start, stop in document_bounds(cu_seqlens, q.shape[1])
            if stop > start
        ]
        o = torch.cat(parts, 2) if parts else heads_first[0].new_zeros(1, q.shape[2], 0, v.shape[3])
    return o.transpose(1, 2).to(v.dtype)


@torch.no_grad()
def continue_softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Iterable[tuple[Tensor, Tensor]],
    scale: float | None = None,
) -> Tensor:
    """Attend to earlier keys that come in segments, and causally to the tokens' own.

    On the CPU one segment is in memory at a time, so that a paged or huge past is never gathered
    whole. Without gradients.

    Args:
        q: [B, T, H, K] queries.
        k: [B, T, G, K] keys of the same tokens.
        v: [B, T, G, V] their values.
        past: (keys [B, S, G, K], values [B, S, G, V]) of earlier tokens, S > 0, in any number.
        scale: factor on q . k; 1/sqrt(K) by default.

    Returns:
        [B, T, H, V] in `v.dtype`.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
    """
    _check(q, k, v, None)
    if q.device.type != "cpu" or q.shape[3] != v.shape[3]:
        keys, values = (torch.cat(x, 1) for x in zip(*past, (k, v), strict=True))
        return softmax_attention(q, keys, values, scale=scale)
    dtype = product_dtype(q.dtype, q.device)
    queries, own_k, own_v = (x.to(dtype).transpose(1, 2) for x in (q, k, v))
    part = attend_own(queries, own_k, own_v, scale)
    for segment in past:
        keys, values = (x.to(dtype).transpose(1, 2) for x in segment)
        part = join(attend_past(queries, keys, values, scale), part)
    return part[0].transpose(1, 2).to(v.dtype)


def softmax_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Same contract as `softmax_attention`, written out with the full T x S matrix."""
    _check(q, k, v, cu_seqlens)
    num_queries, num_keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    query_pos = torch.arange(num_keys - num_queries, num_keys, device=q.device)
    key_pos = torch.arange(num_keys, device=q.device)
    visible = key_pos <= query_pos[:, None]  # [T, S]
    if cu_seqlens is not None:
        document = torch.bucketize(key_pos, cu_seqlens[1:].to(key_pos.dtype), right=True)
        visible = visible & (document[:, None] == document)
    scores = torch.einsum("bthk,bshk->bhts", q, k) * factor
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("bhts,bshv->bthv", weights, v)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    if (
        not q.ndim == k.ndim == v.ndim == 4
        or q.shape[0] != k.shape[0]
        or k.shape[:3] != v.shape[:3]
        or q.shape[3] != k.shape[3]
    ):
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit: "
            "expected q [B, T, H, K], k [B, S, G, K], v [B, S, G, V]"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v must share a dtype; got {q.dtype}, {k.dtype}, {v.dtype}")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} key heads")
    if k.shape[1] < q.shape[1]:
        raise ValueError(f"{k.shape[1]} keys are fewer than {q.shape[1]} queries")
    if cu_seqlens is not None:
        check_offsets(cu_seqlens, q.shape[0])
        if q.shape[1] != k.shape[1]:
            raise ValueError(
                f"cu_seqlens needs as many keys as queries; got {k.shape[1]} and {q.shape[1]}"
            )


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attend within one sequence; q [B, H, T, K], k [B, G, S, K], v [B, G, S, V]."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    grouped = {"scale": scale, "enable_gqa": q.shape[1] != k.shape[1]}
    if num_queries == num_keys:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, **grouped)
    if num_queries == 1:
        return F.scaled_dot_product_attention(q, k, v, **grouped)
    past = num_keys - num_queries
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and q.shape[3] == v.shape[3] and not needs_grad:
        return _continue_chunk(q, k, v, past, scale)
    key_pos = torch.arange(num_keys, device=q.device)
    parts = []
    for start in range(0, num_queries, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_queries)
        query_pos = past + torch.arange(start, stop, device=q.device)
        seen = past + stop
        mask = key_pos[:seen] <= query_pos[:, None]
        keys, values = k[:, :, :seen], v[:, :, :seen]
        block = q[:, :, start:stop]
        parts.append(F.scaled_dot_product_attention(block, keys, values, attn_mask=mask, **grouped))
    return torch.cat(parts, 2)


def _continue_chunk(q: Tensor, k: Tensor, v: Tensor, past: int, scale: float | None) -> Tensor:
    """Attend to the past without a mask, to the chunk causally, and join the two by their sums."""
    before = attend_past(q, k[:, :, :past], v[:, :, :past], scale)
    return join(before, attend_own(q, k[:, :, past:], v[:, :, past:], scale))[0]
