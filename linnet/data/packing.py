"""Packing documents end to end, without padding.

A document of L tokens has L - 1 inputs, its last token being only a target. It is cut in *pieces*
of at most `seq_len` inputs; a piece is a sequence of its own, so nothing is remembered across
pieces, and each token but a document's first is a target exactly once.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from linnet.data.shards import TokenStore
from linnet.errors import ConfigError

GOLDEN_RATIO = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class PackedBatch:
    """Several sequences laid end to end.

    Attributes:
        tokens: [1, T] int64.
        targets: [1, T] int64, the token that follows each; -100 where there is none to predict.
        cu_seqlens: [N + 1] int32, where each sequence starts, then T.
        num_targets: number of targets that are not -100.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    cu_seqlens: torch.Tensor
    num_targets: int


@dataclass(frozen=True)
class Pieces:
    """All pieces of some documents.

    Attributes:
        starts: [P] int64, position of each piece's first input in the store's stream of tokens.
        lengths: [P] int64, number of its inputs.
    """

    starts: np.ndarray
    lengths: np.ndarray


def check_lengths(batch_tokens: int, seq_len: int) -> None:
    """Raise ConfigError unless 1 <= seq_len <= batch_tokens."""
    if not 1 <= seq_len <= batch_tokens:
        raise ConfigError(
            f"seq_len is {seq_len} and batch_tokens {batch_tokens}; expected "
            "1 <= seq_len <= batch_tokens, since a sequence lies within one batch"
        )


def cut_pieces(store: TokenStore, seq_len: int, documents: np.ndarray | None = None) -> Pieces:
    """Cut documents, [D] int64 indices or all of them, in pieces of at most `seq_len` inputs."""
    if documents is None:
        documents = np.arange(store.num_documents)
    first = store.offsets[documents]
    num_inputs = store.offsets[documents + 1] - first - 1
    per_document = -(-num_inputs // seq_len)
    before = np.repeat(np.cumsum(per_document) - per_document, per_document)
    within = (np.arange(per_document.sum()) - before) * seq_len
    lengths = np.minimum(seq_len, np.repeat(num_inputs, per_document) - within)
    return Pieces(np.repeat(first, per_document) + within, lengths)


def gather(store: TokenStore, starts: np.ndarray, lengths: np.ndarray) -> PackedBatch:
    """Read runs of inputs, given by [N] starts and lengths, and lay them end to end."""
    ends = np.cumsum(lengths)
    positions = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])
    return PackedBatch(
        tokens=torch.from_numpy(store.take(positions))[None],
        targets=torch.from_numpy(store.take(positions + 1))[None],
        cu_seqlens=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
        num_targets=len(positions),
    )


@dataclass(frozen=True)
class HeldOutSet:
    """Documents to measure a model on, in batches that cover every target once.

    Iterating over it gives the batches, each time anew.

    Attributes:
        store: where the documents lie.
        documents: [D] int64, indices of the documents, ascending.
        batch_tokens: most tokens a batch holds.
        seq_len: most tokens a sequence holds.
    """

    store: TokenStore
    documents: np.ndarray
    batch_tokens: int
    seq_len: int

    def __iter__(self) -> Iterator[PackedBatch]:
        pieces = cut_pieces(self.store, self.seq_len, self.documents)
        ends = np.cumsum(pieces.lengths)
        first = 0
        while first < len(ends):
            filled = ends[first] - pieces.lengths[first]
            last = int(np.searchsorted(ends, filled + self.batch_tokens, side="right"))
            yield gather(self.store, pieces.starts[first:last], pieces.lengths[first:last])
            first = last

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the documents' texts: what bits per byte divides by."""
        return int(self.store.document_bytes[self.documents].sum())

    @property
    def num_targets(self) -> int:
        """Number of tokens that are predicted, summed over all batches."""
        return int((np.diff(self.store.offsets)[self.documents] - 1).sum())


def evaluation_batches(
    store: TokenStore, batch_tokens: int, seq_len: int, max_tokens: int | None = None
) -> HeldOutSet:
    """Return the documents to evaluate on, as batches in order, without shuffling or padding.

    Args:
        store: the held-out documents.
        batch_tokens: most tokens a batch holds; pieces are never cut to fill one.
        seq_len: most tokens a sequence holds.
        max_tokens: take whole documents, evenly spread, of at most this many tokens together (one
            document at least); all of them by default.

    Raises:
        ConfigError: `seq_len` does not fit in `batch_tokens`.
    """
    check_lengths(batch_tokens, seq_len)
    documents = np.arange(store.num_documents)
    if max_tokens is not None:
        # Multiples of the golden ratio modulo 1: any first few are evenly spread over the store.
        order = np.argsort((documents + 1) * GOLDEN_RATIO % 1)
        total = np.cumsum(np.diff(store.offsets)[order])
        documents = np.sort(order[: max(1, np.searchsorted(total, max_tokens, side="right"))])
    return HeldOutSet(store, documents, batch_tokens, seq_len)
