"""What a sequence leaves behind: fp32 states of lightning layers, keys/values of softmax layers.

Only a state that nobody else can see is modified in place, and key/value buffers are only written
past what any snapshot sees, so a snapshot copies nothing and `restore` is an exact rollback.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_CAPACITY = 256
"""Tokens that a fresh key/value buffer has room for; it doubles when full."""


class _Buffer:
    """Keys and values [B, capacity, G, K]; `used` is how far anyone has written."""

    def __init__(self, k: Tensor, v: Tensor, used: int) -> None:
        self.k, self.v, self.used = k, v, used


@dataclass(frozen=True)
class Snapshot:
    """The state of a `Cache` at one moment; made by `Cache.snapshot`."""

    length: int
    batch_size: int
    states: tuple[Tensor | None, ...]
    buffers: tuple[_Buffer | None, ...]


class Cache:
    """Per-layer states and keys/values of `batch_size` sequences of equal length.

    Args:
        num_layers: layers of the model.
        batch_size: sequences that advance together.
    """

    def __init__(self, num_layers: int, batch_size: int = 1) -> None:
        self.batch_size = batch_size
        self.lengths = array("q", [0] * max(1, batch_size))
        """[B] int64 tokens that each sequence has taken in; the native step counts them up."""
        self._states: list[Tensor | None] = [None] * num_layers
        self._is_owned = [False] * num_layers
        """Whether the state of a layer was made here and shown to nobody."""
        self._buffers: list[_Buffer | None] = [None] * num_layers

    @property
    def length(self) -> int:
        """Tokens that each sequence has taken in."""
        return self.lengths[0]

    def state(self, layer: int) -> Tensor | None:
        """Return the lightning state [B, H, K, V] of a layer, None before the first token."""
        self._is_owned[layer] = False
        return self._states[layer]

    def set_state(self, layer: int, state: Tensor) -> None:
        """Replace the lightning state of a layer."""
        self._is_owned[layer] = False
        self._states[layer] = state

    def own_state(self, layer: int, shape: tuple[int, ...]) -> Tensor:
        """Return the state of a layer to be overwritten: a copy first, if anyone else may see it.

        Args:
            layer: which.
            shape: (H, K, V), of the zeros that an empty cache starts from.
        """
        state = self._states[layer]
        if state is not None and self._is_owned[layer]:
            return state
        # An ordinary tensor even in inference mode, as in `_grown`.
        with torch.inference_mode(False):
            if state is None:
                own = torch.zeros((self.batch_size, *shape), device="cpu", dtype=torch.float32)
            else:
                own = torch.empty(state.shape, dtype=state.dtype, device=state.device)
        if state is not None:
            own.copy_(state)
        self._states[layer], self._is_owned[layer] = own, True
        return own

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return the positions [1, T] of the next tokens."""
        return torch.arange(self.length, self.length + num_tokens, device=device)[None]

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]
    ) -> Tensor:
        """Append keys and values [B, T, G, K]; attend to all with the last queries [B, W, H, K]."""
        keys, values = self.append(layer, k, v)
        return attend(q, keys, values) if q.shape[1] else q

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, T, G, K] after the `length` tokens there, and return all of them.

        The returned views are valid until the next `append`.
        """
        start, stop = self.length, self.length + k.shape[1]
        all_k, all_v = self.reserve(layer, k.shape[1], k, v)
        all_k[:, start:stop] = k
        all_v[:, start:stop] = v
        return all_k[:, :stop], all_v[:, :stop]

    def reserve(self, layer: int, num_tokens: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, capacity, G, K] of a layer with room for more tokens.

        Args:
            layer: which.
            num_tokens: to be written after the `length` tokens there.
            k, v: [.., .., G, K] of the dtype and sizes that new buffers get.
        """
        start, stop = self.length, self.length + num_tokens
        buffer = self._buffers[layer]
        if (
            buffer is None
            or buffer.used != start
            or buffer.k.shape[1] < stop
            or buffer.k.dtype != k.dtype
        ):
            buffer = self._buffers[layer] = _grown(buffer, start, stop, self.batch_size, k, v)
        buffer.used = stop
        return buffer.k, buffer.v

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` that all layers have now taken in."""
        self._set_length(self.length + num_tokens)

    def snapshot(self) -> Snapshot:
        """Remember this moment, without copying."""
        self._is_owned = [False] * len(self._states)
        return Snapshot(self.length, self.batch_size, tuple(self._states), tuple(self._buffers))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back (or forward) to a snapshot, exactly; it may come from another cache of the model.

        Raises:
            ValueError: the snapshot has other layers or another batch size.
        """
        if (len(snapshot.states), snapshot.batch_size) != (len(self._states), self.batch_size):
            raise ValueError(
                f"the snapshot has {len(snapshot.states)} layers and {snapshot.batch_size} "
                f"sequences; this cache {len(self._states)} and {self.batch_size}"
            )
        self._set_length(snapshot.length)
        self._states = list(snapshot.states)
        self._is_owned = [False] * len(self._states)
        self._buffers = list(snapshot.buffers)

    def _set_length(self, length: int) -> None:
        for row in range(len(self.lengths)):
            self.lengths[row] = length

    @property
    def num_bytes(self) -> int:
        """Bytes held, spare capacity included."""
        states = sum(s.nbytes for s in self._states if s is not None)
        return states + sum(b.k.nbytes + b.v.nbytes for b in self._buffers if b is not None)


def _grown(
    buffer: _Buffer | None, start: int, stop: int, batch_size: int, k: Tensor, v: Tensor
) -> _Buffer:
    """Return a new buffer with room for `stop` tokens and the first `start` of the old one."""
    capacity = max(MIN_CAPACITY, stop)
    if buffer is not None:
        capacity = max(capacity, 2 * start)
    shape = (batch_size, capacity, *k.shape[2:])
    # Ordinary tensors even in inference mode, so that a cache can be continued outside of it.
    with torch.inference_mode(False):
        new_k = torch.empty(shape, dtype=k.dtype, device=k.device)
        new_v = torch.empty((*shape[:3], v.shape[3]), dtype=v.dtype, device=v.device)
    if buffer is not None:
        new_k[:, :start] = buffer.k[:, :start]
        new_v[:, :start] = buffer.v[:, :start]
    return _Buffer(new_k, new_v, start)
