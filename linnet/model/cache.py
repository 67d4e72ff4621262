"""What a sequence leaves behind: fp32 states of lightning layers, keys/values of softmax layers.

States are never modified in place and key/value buffers are only written past what any snapshot
sees, so a snapshot copies nothing and `restore` is an exact rollback.
"""

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
        self.length = 0
        """Tokens that each sequence has taken in."""
        self._states: list[Tensor | None] = [None] * num_layers
        self._buffers: list[_Buffer | None] = [None] * num_layers

    def state(self, layer: int) -> Tensor | None:
        """Return the lightning state [B, H, K, V] of a layer, None before the first token."""
        return self._states[layer]

    def set_state(self, layer: int, state: Tensor) -> None:
        """Replace the lightning state of a layer."""
        self._states[layer] = state

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add keys and values [B, T, G, K] after the `length` tokens there, and return all of them.

        The returned views are valid until the next `append`.
        """
        start, stop = self.length, self.length + k.shape[1]
        buffer = self._buffers[layer]
        if buffer is None or buffer.used != start or buffer.k.shape[1] < stop:
            buffer = self._buffers[layer] = _grown(buffer, start, stop, k, v)
        buffer.k[:, start:stop] = k
        buffer.v[:, start:stop] = v
        buffer.used = stop
        return buffer.k[:, :stop], buffer.v[:, :stop]

    def advance(self, num_tokens: int) -> None:
        """Count `num_tokens` that all layers have now taken in."""
        self.length += num_tokens

    def snapshot(self) -> Snapshot:
        """Remember this moment, without copying."""
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
        self.length = snapshot.length
        self._states = list(snapshot.states)
        self._buffers = list(snapshot.buffers)

    @property
    def num_bytes(self) -> int:
        """Bytes held, spare capacity included."""
        states = sum(s.nbytes for s in self._states if s is not None)
        return states + sum(b.k.nbytes + b.v.nbytes for b in self._buffers if b is not None)


def _grown(buffer: _Buffer | None, start: int, stop: int, k: Tensor, v: Tensor) -> _Buffer:
    """Return a new buffer with room for `stop` tokens and the first `start` of the old one."""
    capacity = max(MIN_CAPACITY, stop)
    if buffer is not None:
        capacity = max(capacity, 2 * start)
    shape = (k.shape[0], capacity, *k.shape[2:])
    # Ordinary tensors even in inference mode, so that a cache can be continued outside of it.
    with torch.inference_mode(False):
        new_k = torch.empty(shape, dtype=k.dtype, device=k.device)
        new_v = torch.empty((*shape[:3], v.shape[3]), dtype=v.dtype, device=v.device)
    if buffer is not None:
        new_k[:, :start] = buffer.k[:, :start]
        new_v[:, :start] = buffer.v[:, :start]
    return _Buffer(new_k, new_v, start)
