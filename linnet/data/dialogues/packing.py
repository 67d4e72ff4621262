"""Laying whole sequences end to end: batches without padding, and none is ever cut.

A window takes the sequence that has waited longest, then again and again the longest one that still
fits. Which source comes next is decided by who is furthest behind its share of all tokens, so the
mixture is right from the first windows on. All of this is deterministic and resumes exactly.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import numpy as np
import torch

from linnet.data.dialogues.encoding import Example
from linnet.data.packing import PackedBatch
from linnet.errors import ConfigError, DataError
from linnet.ops.cross_entropy import IGNORE
from linnet.text import Tokenizer

WAITING = 24
"""Sequences to choose from: enough to fill windows well, few enough to hold."""


class ExampleSource(Protocol):
    """An endless sequence of examples; each is a function of its index alone."""

    fingerprint: str
    """Equal for sources that give the same examples."""

    def example(self, index: int) -> Example:
        """Return one example."""
        ...


@dataclass(frozen=True)
class Share:
    """A source and its part of the tokens.

    Attributes:
        source: where examples come from.
        weight: relative to the other sources.
    """

    source: ExampleSource
    weight: float


class Mixer:
    """Draws examples so that each source keeps its share of the tokens.

    Attributes:
        drawn: examples taken from each source.
        tokens: inputs taken from each source.
    """

    def __init__(self, shares: Sequence[Share]) -> None:
        """Begin at the first example of every source.

        Raises:
            ConfigError: there is no source, or a weight is not positive.
        """
        if not shares or not all(0 < share.weight < float("inf") for share in shares):
            raise ConfigError("the mixture needs at least one source, and positive weights")
        self.shares = tuple(shares)
        self.drawn = [0] * len(shares)
        self.tokens = [0] * len(shares)

    def draw(self) -> tuple[int, int, Example]:
        """Return the next example, with its source and its index there."""
        behind = [
            tokens / share.weight for tokens, share in zip(self.tokens, self.shares, strict=True)
        ]
        place = behind.index(min(behind))
        index = self.drawn[place]
        example = self.shares[place].source.example(index)
        self.drawn[place] += 1
        self.tokens[place] += len(example)
        return place, index, example


class MixLoader:
    """An endless iterator over windows of at most `batch_tokens` inputs."""

    def __init__(self, shares: Sequence[Share], batch_tokens: int) -> None:
        """Begin with the first examples.

        Args:
            shares: the mixture.
            batch_tokens: most inputs of a window.

        Raises:
            ConfigError: the mixture is empty or has a weight that is not positive.
        """
        self._mixer = Mixer(shares)
        self._batch_tokens = batch_tokens
        self._settings = {
            "batch_tokens": batch_tokens,
            "mix": [[share.source.fingerprint, share.weight] for share in shares],
        }
        self._waiting: list[tuple[int, int, Example]] = []

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> PackedBatch:
        room, taken = self._batch_tokens, []
        while True:
            self._refill()
            fitting = [place for place, item in enumerate(self._waiting) if len(item[2]) <= room]
            if not fitting:
                return pack(taken)
            # The longest that fits fills best; the oldest goes first, so that none waits for ever.
            best = 0 if not taken else max(fitting, key=lambda place: len(self._waiting[place][2]))
            example = self._waiting.pop(best)[2]
            taken.append(example)
            room -= len(example)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream is."""
        return {
            "drawn": list(self._mixer.drawn),
            "tokens": list(self._mixer.tokens),
            "waiting": [[place, index] for place, index, _ in self._waiting],
            **self._settings,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            DataError: the state belongs to another mixture.
        """
        for key, value in self._settings.items():
            if state.get(key) != value:
                raise DataError(
                    f"the saved data position has {key}={state.get(key)!r}, this run {value!r}; "
                    "resume with the same data and settings, or start anew"
                )
        self._mixer.drawn = list(state["drawn"])
        self._mixer.tokens = list(state["tokens"])
        sources = [share.source for share in self._mixer.shares]
        self._waiting = [(p, index, sources[p].example(index)) for p, index in state["waiting"]]

    def _refill(self) -> None:
        while len(self._waiting) < WAITING:
            place, index, example = self._mixer.draw()
            if len(example) > self._batch_tokens:
                raise DataError(
                    f"a sequence has {len(example)} tokens; a batch holds {self._batch_tokens}"
                )
            self._waiting.append((place, index, example))


@dataclass(frozen=True)
class HeldOutExamples:
    """Examples to measure a model on, packed once.

    Attributes:
        examples: what was packed, in order.
        batches: windows that hold every example once.
        num_bytes: UTF-8 bytes of the targets' texts: what bits per byte divides by.
        num_targets: number of targets.
    """

    examples: tuple[Example, ...]
    batches: tuple[PackedBatch, ...]
    num_bytes: int
    num_targets: int

    def __iter__(self) -> Iterator[PackedBatch]:
        return iter(self.batches)


def held_out_examples(
    shares: Sequence[Share], tokenizer: Tokenizer, batch_tokens: int, max_tokens: int
) -> HeldOutExamples:
    """Draw the first examples of a mixture for measuring, in batches.

    Args:
        shares: the mixture, of sources that training does not read.
        tokenizer: to count the bytes of targets.
        batch_tokens: most inputs of a batch.
        max_tokens: inputs to stop at; at least one example of each source is drawn.
    """
    mixer = Mixer(shares)
    examples: list[Example] = []
    while sum(mixer.tokens) < max_tokens or not all(mixer.drawn):
        examples.append(mixer.draw()[2])
    batches: list[PackedBatch] = []
    group: list[Example] = []
    for example in examples:
        if group and sum(map(len, group)) + len(example) > batch_tokens:
            batches.append(pack(group))
            group = []
        group.append(example)
    batches.append(pack(group))
    targets = np.concatenate([example.tokens[example.is_target] for example in examples])
    num_bytes = sum(len(tokenizer.token_bytes(int(token))) for token in targets)
    return HeldOutExamples(tuple(examples), tuple(batches), num_bytes, len(targets))


def pack(examples: Sequence[Example]) -> PackedBatch:
    """Lay examples end to end; a position whose next token is not learned has the target -100."""
    targets = [np.where(e.is_target[1:], e.tokens[1:], IGNORE) for e in examples]
    ends = np.cumsum([len(example) for example in examples])
    return PackedBatch(
        tokens=torch.from_numpy(np.concatenate([e.tokens[:-1] for e in examples]))[None],
        targets=torch.from_numpy(np.concatenate(targets))[None],
        cu_seqlens=torch.from_numpy(np.concatenate(([0], ends)).astype(np.int32)),
        num_targets=sum(int(example.is_target.sum()) for example in examples),
    )
