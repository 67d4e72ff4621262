"""A long chunk of one sequence over ranks, in inference: each computes a part of it.

The lightning layers exchange states (LASP+ from the state before the chunk, MiniMax-01, section
3.2.2), the softmax layers keys and queries (`linnet.parallel.spread_pages`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from linnet import ops
from linnet.model.attention import LightningAttention
from linnet.model.transformer import Model
from linnet.ops.lightning_attention import Activation, Backend
from linnet.parallel.collectives import all_gather
from linnet.parallel.sequence import add_from_before
from linnet.parallel.spread_pages import SplitRow, in_order, padded


def run_split(model: Model, tokens: Sequence[int], row: SplitRow, num_wanted: int) -> Tensor:
    """Run this rank's part of a chunk; to be called on all ranks with the same tokens.

    Args:
        model: in eval mode; as before when the call returns, or fails.
        tokens: of the whole chunk.
        row: the sequence and the parts; the caller commits it.
        num_wanted: as of `row`.

    Returns:
        The normed hidden states [num_wanted, D] of the last tokens, the same on all ranks.

    Raises:
        ValueError: ids outside the vocabulary; on all ranks before any waits for another.
    """
    share, chunk = row.share, torch.tensor([list(tokens)], device=model.device)
    with _lightning_split(model, _LightningPart(share.group, row.bounds)):
        hidden = model.continue_part(chunk, row.part, row, row.wanted)  # [1, W, D]
    if not num_wanted:
        return hidden[0]
    every = all_gather(padded(hidden, max(row.num_read)), share.group).wait()
    return in_order(every, row.num_read)[-num_wanted:]


class _LightningPart:
    """Takes the place of a lightning layer's `attend` while each rank runs a part of a chunk.

    LASP+ from a state that all ranks have, to one that all ranks have; without gradients.

    Args:
        group: the ranks.
        bounds: [P + 1] where their parts start, and the end.
    """

    def __init__(self, group: dist.ProcessGroup, bounds: Sequence[int]) -> None:
        self._group, self._rank, self._bounds = group, dist.get_rank(group), bounds

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        decay: Tensor,
        initial_state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        return_state: bool = True,
        backend: Backend | None = None,
        activation: Activation | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend; arguments as of `ops.lightning_attention`, but q, k, v [1, T_r, H, .] of a part.

        The states before and after are those of the whole chunk.
        """
        assert cu_seqlens is None and initial_state is not None and return_state
        o, left = ops.lightning_attention(q, k, v, decay, backend=backend, activation=activation)
        assert left is not None
        coming = all_gather(left, self._group)
        # As if one more part ended where the chunk starts.
        states, ends = torch.cat((initial_state, coming.wait())), self._bounds  # [P + 1, H, K, V]
        before = self._rank + 1
        entering = _state_at(ends[self._rank], states[:before], ends[:before], decay)
        after = _state_at(ends[-1], states, ends, decay)
        add_from_before(o[0], q[0], entering, decay.to(left.dtype), activation == "silu")
        return o, after[None]


def _state_at(place: int, states: Tensor, ends: Sequence[int], decay: Tensor) -> Tensor:
    """Return the state [H, K, V] at a place of the chunk.

    Args:
        place: in tokens from the start of the chunk.
        states: [S, H, K, V] that parts before it leave behind.
        ends: where each part ends.
        decay: [H] slopes.
    """
    ages = torch.tensor([place - end for end in ends], device=decay.device, dtype=torch.float64)
    weights = torch.exp(-ages[:, None] * decay.double()).to(states.dtype)  # [S, H]
    return torch.einsum("sh,shkv->hkv", weights, states)


@contextmanager
def _lightning_split(model: Model, attend: _LightningPart) -> Iterator[None]:
    """Let the lightning layers know, for a while, that their tokens are a part of a chunk."""
    layers = [x.self_attn for x in model.layers if isinstance(x.self_attn, LightningAttention)]
    before = [layer.attend for layer in layers]
    try:
        for layer in layers:
            layer.attend = attend
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.attend = own
