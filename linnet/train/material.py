"""What a run trains on, as the trainer sees it: a stream of batches and held-out measures."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from linnet.data import PackedBatch
from linnet.text import Tokenizer


class BatchStream(Protocol):
    """An endless sequence of batches that can go on where it stood."""

    def __next__(self) -> PackedBatch:
        """Return the next batch."""
        ...

    def state_dict(self) -> dict[str, Any]:  # Any: JSON
        """Return where the stream is."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        ...


class EveryNth:
    """Every n-th batch of a stream: each of n readers gets its own, whatever n is."""

    def __init__(self, stream: BatchStream, place: int, size: int) -> None:
        self._stream, self._place, self._size = stream, place, size

    def __next__(self) -> PackedBatch:
        batches = [next(self._stream) for _ in range(self._size)]
        return batches[self._place]

    def state_dict(self) -> dict[str, Any]:
        """Return where the whole stream is."""
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken, by any number of readers."""
        self._stream.load_state_dict(state)


class HeldOut(Protocol):
    """Batches to measure a model on, each time the same."""

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of what is predicted: what bits per byte divides by."""
        ...

    @property
    def num_targets(self) -> int:
        """Number of tokens that are predicted."""
        ...

    def __iter__(self) -> Iterator[PackedBatch]:
        """Return the batches, anew."""
        ...


@dataclass(frozen=True)
class Sample:
    """A held-out prompt for the report.

    Attributes:
        name: what it is.
        prompt: ids that the model is to continue.
        truth: the ids that follow.
    """

    name: str
    prompt: list[int]
    truth: list[int]


@dataclass(frozen=True, kw_only=True)
class Material:
    """What one run trains on and measures with.

    Attributes:
        tokenizer: of the ids.
        stream: training batches.
        held_out: for the measurements while training.
        final_held_out: for the last one.
        baselines: gives the bits per byte of other ways to predict `final_held_out`, by name.
        samples: gives held-out prompts, at most as many as it is told.
    """

    tokenizer: Tokenizer
    stream: BatchStream
    held_out: HeldOut
    final_held_out: HeldOut
    baselines: Callable[[], dict[str, float]]
    samples: Callable[[int], list[Sample]]
