"""One decode step of lightning attention: the state decays, takes in k v^T, and is read by q.

Inference only; the arithmetic is fp32 whatever the dtype of q, k and v, because a bf16 state drifts
by several percent within a few hundred tokens on the slow heads.
"""

import torch
from torch import Tensor


def decode_step(
    q: Tensor, k: Tensor, v: Tensor, decay: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """Advance every sequence by one token.

    Args:
        q, k: [B, 1, H, K].
        v: [B, 1, H, V].
        decay: [H] slopes.
        initial_state: [B, H, K, V] fp32; not modified.

    Returns:
        o [B, 1, H, V] in `v.dtype` and the new state.
    """
    dtype = initial_state.dtype
    query, key, value = q[:, 0].to(dtype), k[:, 0].to(dtype), v[:, 0].to(dtype)
    # S + (lambda - 1) S and not lambda S: on slow heads lambda rounds to the slope of another head,
    # and the error of every step has the same sign.
    loss = torch.expm1(-decay.to(dtype))[:, None, None]
    decayed = torch.addcmul(initial_state, initial_state, loss)
    state = torch.addcmul(decayed, key.unsqueeze(-1), value.unsqueeze(-2))
    # (q . k) v apart: read back from the state, its rounding errors would not share one factor.
    past = torch.matmul(query.unsqueeze(-2), decayed).squeeze(-2)  # [B, H, V]
    o = torch.addcmul(past, (query * key).sum(-1, keepdim=True), value)
    return o.unsqueeze(1).to(v.dtype), state
