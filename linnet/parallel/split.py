"""How a packed row is split over ranks, and which documents cross the cuts.

Every rank computes all of this from the offsets of the whole row; nothing is communicated. A rank
holds one piece of the row, or, balanced, the pieces r and 2P - 1 - r of twice as many: early tokens
see few keys in softmax attention and late ones many, so each rank gets some of both.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of the row that lie side by side on one rank, in positions of the whole row."""

    start: int
    stop: int
    first_document: int
    """Where the document of the first token starts, at `start` or before."""
    first_stop: int
    """Where that document ends within the piece."""
    last_start: int
    """Where the document of the last token starts within the piece."""

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def num_continued(self) -> int:
        """Tokens at the start of the piece whose document begins before it."""
        return self.first_stop - self.start if self.first_document < self.start else 0


@dataclass(frozen=True)
class SequenceSplit:
    """A packed row over `num_ranks` ranks.

    Attributes:
        offsets: [N + 1] offsets of the documents in the whole row.
        num_ranks: that hold it.
        is_balanced: whether a rank holds an early and a late piece.

    Raises:
        ValueError: there are fewer tokens than pieces.
    """

    offsets: tuple[int, ...]
    num_ranks: int
    is_balanced: bool = False

    def __post_init__(self) -> None:
        if self.num_tokens < self.num_pieces:
            raise ValueError(
                f"a row of {self.num_tokens} tokens cannot be split into {self.num_pieces} pieces; "
                "use fewer ranks or longer rows"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole row."""
        return self.offsets[-1]

    @property
    def num_pieces(self) -> int:
        """Pieces of the whole row."""
        return self.num_ranks * (2 if self.is_balanced else 1)

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """All pieces, in the order of their positions; their lengths differ by one at most."""
        bounds = [n * self.num_tokens // self.num_pieces for n in range(self.num_pieces + 1)]
        return tuple(map(self._piece, bounds, bounds[1:]))

    def _piece(self, start: int, stop: int) -> Piece:
        first = bisect_right(self.offsets, start)
        last = bisect_right(self.offsets, stop - 1)
        return Piece(
            start,
            stop,
            first_document=self.offsets[first - 1],
            first_stop=min(stop, self.offsets[first]),
            last_start=max(start, self.offsets[last - 1]),
        )

    def numbers(self, rank: int) -> tuple[int, ...]:
        """Return the numbers of the pieces that a rank holds."""
        return (rank, self.num_pieces - 1 - rank) if self.is_balanced else (rank,)

    def own(self, rank: int) -> tuple[Piece, ...]:
        """Return the pieces that a rank holds."""
        return tuple(self.pieces[number] for number in self.numbers(rank))

    def lengths(self, rank: int) -> list[int]:
        """Return the tokens of each piece of a rank."""
        return [len(piece) for piece in self.own(rank)]

    def tokens(self, rank: int) -> Tensor:
        """Return [T_r] int64 places in the whole row of a rank's tokens."""
        return torch.cat([torch.arange(piece.start, piece.stop) for piece in self.own(rank)])

    def positions(self, rank: int) -> Tensor:
        """Return [1, T_r] positions of a rank's tokens within their documents."""
        places = self.tokens(rank)
        starts = torch.tensor(self.offsets)
        return (places - starts[torch.bucketize(places, starts, right=True) - 1])[None]

    def local_offsets(self, rank: int) -> Tensor:
        """Return int32 offsets of the documents, and parts of some, among a rank's tokens."""
        result = [0]
        for piece in self.own(rank):
            base = result[-1] - piece.start
            inner = sorted({o for o in self.offsets if piece.start < o < piece.stop})
            result += [base + offset for offset in (*inner, piece.stop)]
        return torch.tensor(result, dtype=torch.int32)

    def distance(self, source: int, target: int) -> int | None:
        """Return the tokens between the end of a piece and the start of a later one.

        None if the document at the end of the first does not go on into the second.
        """
        before, after = self.pieces[source], self.pieces[target]
        if source >= target or after.first_document >= before.stop:
            return None
        return after.start - before.stop

    @cached_property
    def distances(self) -> Tensor:
        """[C, C] fp64: `distance` of each source (first index) and target; inf for none."""
        rows = [
            [self.distance(source, target) for target in range(self.num_pieces)]
            for source in range(self.num_pieces)
        ]
        return torch.tensor(
            [[float("inf") if d is None else d for d in row] for row in rows], dtype=torch.float64
        )


@lru_cache(maxsize=64)
def _split(offsets: tuple[int, ...], num_ranks: int, is_balanced: bool) -> SequenceSplit:
    return SequenceSplit(offsets, num_ranks, is_balanced)


def split_row(
    offsets: Tensor | Sequence[int], num_ranks: int, is_balanced: bool = False
) -> SequenceSplit:
    """Return the split of a row; those of the last rows are remembered."""
    values = offsets.tolist() if isinstance(offsets, Tensor) else offsets
    return _split(tuple(values), num_ranks, is_balanced)
