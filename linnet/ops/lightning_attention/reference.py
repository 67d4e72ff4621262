"""Lightning attention written out three ways, to be read and to test everything else against.

MiniMax-01, section 2.2, with the decay that its equations omit and its code applies:

    S_t = lambda S_{t-1} + k_t v_t^T        o_t = S_t^T q_t        lambda = exp(-s)

    o_t = sum_{j <= t} exp(-s (t - j)) (q_t . k_j) v_j + exp(-s (t + 1)) S_0^T q_t     (t from 0)

No scale, no denominator, no softmax. All three forms compute in the dtype of their inputs (fp64 for
an oracle) and share one signature; `reference` adds packed documents.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

Form = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Maps q, k, v, decay and the initial state to outputs and final state."""


def recurrent(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor):
    """Apply the recurrence token by token; shapes as in `reference`, `state` required."""
    ratio = torch.exp(-decay)[:, None, None]
    outputs = []
    for t in range(q.shape[1]):
        state = ratio * state + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    o = torch.stack(outputs, 1) if outputs else q.new_zeros(*q.shape[:3], v.shape[3])
    return o, state


def parallel(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor):
    """Form the whole T x T matrix of decayed products; shapes as in `reference`."""
    length = q.shape[1]
    t = torch.arange(length, device=q.device)
    distance = t[:, None] - t  # [T, T]
    weight = torch.exp(-decay[:, None, None] * distance.clamp(min=0)) * (distance >= 0)  # [H, T, T]
    scores = torch.einsum("bthk,bjhk->bhtj", q, k) * weight
    o = torch.einsum("bhtj,bjhv->bthv", scores, v)
    into = torch.exp(-decay * (t[:, None] + 1))  # [T, H]
    o = o + torch.einsum("bthk,bhkv->bthv", q, state) * into[:, :, None]
    left = torch.exp(-decay * (length - 1 - t)[:, None])  # [T, H]
    added = torch.einsum("bthk,bthv,th->bhkv", k, v, left)
    return o, torch.exp(-decay * length)[:, None, None] * state + added


def blockwise(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor, block_len: int = 256):
    """Apply `parallel` to blocks of `block_len` tokens, carrying the state between them."""
    outputs = []
    for start in range(0, q.shape[1], block_len):
        span = slice(start, start + block_len)
        o, state = parallel(q[:, span], k[:, span], v[:, span], decay, state)
        outputs.append(o)
    return (torch.cat(outputs, 1) if outputs else recurrent(q, k, v, decay, state)[0]), state


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    form: Form = parallel,
) -> tuple[Tensor, Tensor]:
    """Return outputs and final states of lightning attention.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
        decay: [H] slopes s >= 0.
        initial_state: [B, H, K, V], or [N, H, K, V] with `cu_seqlens`; zeros by default.
        cu_seqlens: [N + 1] offsets of packed documents (B = 1); the state starts afresh at each.
        form: `parallel`, `recurrent` or `blockwise`.

    Returns:
        o [B, T, H, V] and the states after the last token of each sequence.
    """
    decay = decay.to(q.dtype)
    num_sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    if initial_state is None:
        initial_state = q.new_zeros(num_sequences, q.shape[2], q.shape[3], v.shape[3])
    if cu_seqlens is None:
        return form(q, k, v, decay, initial_state)
    outputs, states = [q.new_zeros(1, 0, q.shape[2], v.shape[3])], []
    for n, bounds in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        span = slice(*bounds)
        o, state = form(q[:, span], k[:, span], v[:, span], decay, initial_state[n : n + 1])
        outputs.append(o)
        states.append(state)
    return torch.cat(outputs, 1), torch.cat(states) if states else initial_state
