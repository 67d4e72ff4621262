"""One long sequence over many ranks, in inference: sequence-parallel prefill, then decoding.

Every rank has all weights. Of what a sequence leaves behind, the lightning states are small and
replicated; keys and values grow with the length and are spread, each rank keeping an equal share.
A long chunk of tokens is split over the ranks (LASP+ from the state before it, MiniMax-01, section
3.2.2), and a short one, such as a token that was just drawn, runs on all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from linnet import ops
from linnet.model.attention import Attend, LightningAttention
from linnet.model.transformer import Model
from linnet.ops.lightning_attention import Activation, Backend
from linnet.parallel.collectives import all_gather
from linnet.parallel.spread_keys import BLOCK_LEN, KeyBlocks, Shares, SpreadAttention

MIN_PART_LEN = 16
"""Tokens per rank under which splitting a chunk costs more in states than it saves in products."""


class LongContext:
    """The memory of one sequence over the ranks of a group, and the model that reads it.

    All ranks call `extend` with the same tokens, and get the same logits bit by bit if their
    machines compute alike; where they do not, let one rank choose the tokens for all.

    Args:
        model: the same on all ranks; it may be used for other things between the calls.
        group: the ranks that share the sequence.
        min_part_len: a chunk of fewer tokens per rank is not split.
        block_len: tokens for whose keys a rank makes room at a time.

    Raises:
        ValueError: a length below 1.
    """

    def __init__(
        self,
        model: Model,
        group: dist.ProcessGroup,
        min_part_len: int = MIN_PART_LEN,
        block_len: int = BLOCK_LEN,
    ) -> None:
        if min_part_len < 1 or block_len < 1:
            raise ValueError(
                f"min_part_len is {min_part_len} and block_len {block_len}; both must be positive"
            )
        self.model, self.group = model, group
        self._min_part_len, self._block_len = min_part_len, block_len
        self._attention = SpreadAttention(group)
        self._held: tuple[int, ...] = (0,) * self._attention.size
        self._states: dict[int, Tensor] = {}
        self._keys: dict[int, KeyBlocks] = {}

    @property
    def num_tokens(self) -> int:
        """Tokens taken in."""
        return sum(self._held)

    @property
    def num_own_tokens(self) -> int:
        """Tokens whose keys and values this rank keeps; those of any two ranks differ by 1 most."""
        return self._held[self._attention.rank]

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that this rank keeps, without room to spare."""
        held = self.num_own_tokens
        return sum(block.nbytes for keys in self._keys.values() for block in keys.until(held))

    @property
    def state_bytes(self) -> int:
        """Bytes of the lightning states, which every rank has."""
        return sum(state.nbytes for state in self._states.values())

    @torch.no_grad()
    def extend(self, tokens: Tensor) -> Tensor:
        """Take in tokens: a chunk of the prompt of any size, or what was drawn.

        Args:
            tokens: [1, T] int64 ids, T > 0, the same on all ranks. If the call fails, the context
                stays as it was.

        Returns:
            Logits [1, 1, vocab] fp32 (fp64 of an fp64 model) of the last token.

        Raises:
            ValueError: no tokens, more than one row, or ids outside the vocabulary; on all ranks
                before any waits for another.
        """
        if tokens.ndim != 2 or tokens.shape[0] != 1 or not tokens.shape[1]:
            raise ValueError(
                f"a long context takes tokens [1, T] with T > 0; got {tuple(tokens.shape)}"
            )
        size, rank = self._attention.size, self._attention.rank
        shares = Shares.of(self._held, tokens.shape[1])
        is_split = tokens.shape[1] >= size * self._min_part_len
        part = shares.part(rank) if is_split else slice(0, tokens.shape[1])
        memory = _Pass(self, shares, part, is_split)
        # Each rank reads its last token, though one alone is needed: no rank may leave out the
        # experts of the last layer, which might wait for it.
        last = torch.tensor([part.stop - part.start - 1], device=tokens.device)
        with _lightning_split(self.model, self.group, shares) if is_split else nullcontext():
            hidden = self.model.continue_part(tokens, part, memory, last)[0]  # [1, D]
        if is_split:
            hidden = all_gather(hidden, self.group).wait()[-1:]
        logits = ops.lm_head(hidden[None], self.model.lm_head.weight)
        self._states.update(memory.new_states)
        self._held = shares.after
        return logits


class _Pass:
    """What one forward pass sees of the context; nothing counts until the context takes it over."""

    def __init__(self, context: LongContext, shares: Shares, part: slice, is_split: bool) -> None:
        self._context, self._shares, self._part = context, shares, part
        self._is_split = is_split
        self.new_states: dict[int, Tensor] = {}

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return the positions [1, T] of the tokens that this rank runs."""
        start = sum(self._shares.held) + self._part.start
        return torch.arange(start, start + num_tokens, device=device)[None]

    def state(self, layer: int) -> Tensor | None:
        """Return the state [1, H, K, V] of a layer before the chunk."""
        return self._context._states.get(layer)

    def set_state(self, layer: int, state: Tensor) -> None:
        """Keep the state after the chunk."""
        self.new_states[layer] = state

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Keep this rank's share of k, v [1, T, G, K] and attend with q [1, W, H, K]."""
        context, shares = self._context, self._shares
        attention, rank = context._attention, context._attention.rank
        keys = context._keys.setdefault(layer, KeyBlocks(context._block_len))
        own = slice(None) if self._is_split else shares.part(rank)
        keys.write(shares.held[rank], k[:, own], v[:, own], room=max(shares.after))
        if not self._is_split:
            return attention.replicated(q, k, v, keys, shares)
        # In the last layer each rank asks for one token. Its own tensors cannot tell it that of
        # the others: a part may be one token long anyway.
        is_last = layer == len(context.model.layers) - 1
        num_queries = 1 if is_last else max(shares.lengths)
        return attention.split(q, k, v, keys, shares, num_queries)


class _LightningPart:
    """Takes the place of a lightning layer's `attend` while each rank runs a part of a chunk.

    LASP+ from a state that all ranks have, to one that all ranks have; without gradients.
    """

    def __init__(self, group: dist.ProcessGroup, shares: Shares) -> None:
        self._group, self._rank, self._bounds = group, dist.get_rank(group), shares.bounds

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
        assert cu_seqlens is None and return_state
        o, left = ops.lightning_attention(q, k, v, decay, backend=backend, activation=activation)
        assert left is not None
        coming = all_gather(left, self._group)
        # Meanwhile: how much each query sees of what was before the part.
        ages = torch.arange(1, q.shape[1] + 1, device=q.device, dtype=left.dtype)
        weights = torch.exp(-ages[:, None] * decay.to(left.dtype))  # [T, H]
        queries = F.silu(q[0]) if activation == "silu" else q[0]
        # Denormal numbers would make the product several times slower on the CPU.
        queries = queries.to(left.dtype) * F.threshold(weights, 1e-30, 0.0)[..., None]
        states = coming.wait()  # [P, H, K, V]
        ends = self._bounds[1:]
        if initial_state is not None:  # as if one more part ended where the chunk starts
            states, ends = torch.cat((initial_state, states)), self._bounds
        start = self._bounds[self._rank]
        before = len([end for end in ends if end <= start])
        entering = _state_at(start, states[:before], ends[:before], decay)
        after = _state_at(self._bounds[-1], states, ends, decay)
        earlier = torch.einsum("nhk,hkv->nhv", queries, entering)
        return o + earlier.to(o.dtype)[None], after[None]


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
def _lightning_split(model: Model, group: dist.ProcessGroup, shares: Shares) -> Iterator[None]:
    """Let the lightning layers know, for a while, that their tokens are a part of a chunk."""
    attend = _LightningPart(group, shares)
    layers = [x.self_attn for x in model.layers if isinstance(x.self_attn, LightningAttention)]
    before = [layer.attend for layer in layers]
    try:
        for layer in layers:
            layer.attend = attend
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.attend = own
