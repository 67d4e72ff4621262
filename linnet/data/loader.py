"""The training stream: an endless, shuffled, exactly resumable sequence of packed windows.

An epoch permutes all pieces of all documents and lays them end to end; epochs follow each other
without a seam, and the stream is cut in windows of `batch_tokens`. Window i is a function of the
store, the seed and i alone, and goes to rank i % world_size, so a run may resume on another number
of ranks and read what it would have read.
"""

from collections.abc import Mapping
from typing import Self

import numpy as np

from linnet.data.packing import PackedBatch, check_lengths, cut_pieces, gather
from linnet.data.shards import TokenStore
from linnet.errors import ConfigError, DataError


class Loader:
    """An endless iterator over this rank's windows.

    A piece that a window's end cuts goes on in the next window as a sequence of its own.
    """

    def __init__(
        self,
        store: TokenStore,
        batch_tokens: int,
        seq_len: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Start at window 0.

        Args:
            store: the training documents.
            batch_tokens: tokens of a window, exactly.
            seq_len: most tokens of a sequence.
            seed: of the shuffling.
            rank: which data-parallel process this is.
            world_size: how many there are.

        Raises:
            ConfigError: `seq_len` does not fit in `batch_tokens`, or `rank` in `world_size`.
        """
        check_lengths(batch_tokens, seq_len)
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; expected 0 <= rank < world_size={world_size}")
        self._store = store
        self._settings = {
            "seed": seed,
            "seq_len": seq_len,
            "batch_tokens": batch_tokens,
            "store": store.fingerprint,
        }
        self._seed = seed
        self._batch_tokens = batch_tokens
        self._rank = rank
        self._world_size = world_size
        self._pieces = cut_pieces(store, seq_len)
        self._epoch_tokens = int(self._pieces.lengths.sum())
        self._position = 0
        self._shuffled: tuple[int, np.ndarray, np.ndarray] | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PackedBatch:
        window = self._position + self._rank
        self._position += self._world_size
        return gather(self._store, *self._runs(window * self._batch_tokens, self._batch_tokens))

    @property
    def epoch(self) -> int:
        """How many times all documents have been read."""
        return self._position * self._batch_tokens // self._epoch_tokens

    @property
    def epoch_tokens(self) -> int:
        """Input tokens of one epoch, which is the number of its targets."""
        return self._epoch_tokens

    def state_dict(self) -> dict[str, int | str]:
        """Return where the stream is, counted in windows of all ranks together."""
        return {"epoch": self.epoch, "position": self._position, **self._settings}

    def load_state_dict(self, state: Mapping[str, int | str]) -> None:
        """Go on where `state` was taken, on any number of ranks.

        Raises:
            DataError: the state belongs to another stream.
        """
        for key, value in self._settings.items():
            if state.get(key) != value:
                raise DataError(
                    f"the saved data position has {key}={state.get(key)!r}, this run {value!r}; "
                    "resume with the same data and settings, or start anew"
                )
        self._position = int(state["position"])

    def _runs(self, start: int, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Return starts and lengths, [N] each, of the runs that fill part of the endless stream."""
        starts: list[np.ndarray] = []
        lengths: list[np.ndarray] = []
        while num_tokens:
            epoch, start_in_epoch = divmod(start, self._epoch_tokens)
            stop_in_epoch = min(start_in_epoch + num_tokens, self._epoch_tokens)
            order, ends = self._shuffle(epoch)
            first = np.searchsorted(ends, start_in_epoch, side="right")
            last = np.searchsorted(ends, stop_in_epoch, side="left") + 1
            chosen = order[first:last]
            begins = ends[first:last] - self._pieces.lengths[chosen]
            cut_begins = np.maximum(begins, start_in_epoch)
            starts.append(self._pieces.starts[chosen] + cut_begins - begins)
            lengths.append(np.minimum(ends[first:last], stop_in_epoch) - cut_begins)
            num_tokens -= stop_in_epoch - start_in_epoch
            start += stop_in_epoch - start_in_epoch
        return np.concatenate(starts), np.concatenate(lengths)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of all pieces in an epoch and where each ends in it, [P] both."""
        if self._shuffled is None or self._shuffled[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            order = generator.permutation(len(self._pieces.lengths))
            self._shuffled = (epoch, order, np.cumsum(self._pieces.lengths[order]))
        return self._shuffled[1:]
