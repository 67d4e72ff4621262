"""Which sequences run, and which of their tokens the next step takes in.

Every step takes one token of each sequence that is generating, and a bounded number of prompt
tokens. Of the prompts the shortest come first, so that none waits for a million tokens, but the
oldest always gets a part, so that it does not wait for ever. Memory is taken for whole prompts when
they start. What is generated may run out of it: then kept prefixes go first, and after them the
sequence that came last is parked, to be continued without computing anything again.
"""

import time
from array import array
from collections import Counter
from collections.abc import Iterator

import numpy as np

from linnet.infer.blocks import Blocks
from linnet.infer.lookup import propose
from linnet.infer.prefix_cache import Match, PrefixCache
from linnet.infer.runner import Chunk
from linnet.infer.sequence import Sequence
from linnet.model.paged import PAGE_SIZE, Row, pages_of

HEADROOM = 64
"""Tokens beyond its prompt for which a sequence gets pages when it starts."""

FIRST_DISTANCE = 4096
"""Where the first prefix within a long prompt is kept; the next ones at twice the length each."""

LONG_PROMPT = 2048
DISTANCES_TO_END = (64, 512)
"""Of prefixes within a long prompt: another question about the same text ends otherwise."""

SHARE_OF_OLDEST = 4
"""The oldest prompt gets at least this fraction, one in so many, of the prompt tokens of a step."""

MAX_PASSED = 64
"""How often a request that finds no room may be overtaken by later ones."""

ALONE = 4
"""Factor on a step's prompt tokens while nothing is generating that would wait for them."""


class Scheduler:
    """The waiting and the running sequences, and the memory they share.

    Args:
        blocks: slots and pages.
        prefixes: kept ones; None to keep none.
        max_sequences: that run at once.
        chunk_tokens: prompt tokens in a step while others generate.
        turn_ids: tokens that end a turn of a chat.
        speculative_tokens: guesses to verify per sequence and step.
        park_bytes: most memory that preempted sequences may keep outside of the pages; 0 for none.
    """

    def __init__(
        self,
        blocks: Blocks,
        prefixes: PrefixCache | None,
        *,
        max_sequences: int,
        chunk_tokens: int,
        turn_ids: frozenset[int] = frozenset(),
        speculative_tokens: int = 0,
        park_bytes: int = 0,
    ) -> None:
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self._blocks, self._prefixes = blocks, prefixes
        self._max_sequences, self._chunk_tokens = max_sequences, chunk_tokens
        self._speculative_tokens, self._park_bytes = speculative_tokens, park_bytes
        self._turn_ids = turn_ids
        self._passed: Counter[int] = Counter()

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait, behind those of its priority that came before it."""
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda other: (-other.priority, other.arrival))

    def admit(self) -> list[Sequence]:
        """Start waiting sequences while there is room, and return them."""
        started = []
        for sequence in list(self.waiting):
            if len(self.running) >= self._max_sequences:
                break
            if self._start(sequence):
                self.waiting.remove(sequence)
                self.running.append(sequence)
                self._passed.pop(sequence.arrival, None)
                started.append(sequence)
            elif self._passed[sequence.arrival] >= MAX_PASSED:
                break
            else:
                self._passed[sequence.arrival] += 1
        return started

    def release(self, sequence: Sequence, keep: bool) -> None:
        """Take back what a sequence has, if it has anything.

        Args:
            sequence: running or waiting.
            keep: whether what it has taken in is worth to be found again.
        """
        if sequence in self.running:
            self.running.remove(sequence)
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        self._passed.pop(sequence.arrival, None)
        if sequence.row is not None:
            if keep and self._prefixes is not None:
                self._prefixes.keep(sequence.tokens, sequence.row, to_disk=True)
            self._blocks.give_row(sequence.row)
        sequence.row = sequence.parked = None

    def plan(self) -> Iterator[tuple[Sequence, Chunk]]:
        """Yield the chunks of the next step; sequences that have no room for theirs are parked."""
        prompts = [sequence for sequence in self.running if self._is_prompt(sequence)]
        steps = [sequence for sequence in self.running if not self._is_prompt(sequence)]
        budget = self._chunk_tokens * (1 if steps else ALONE)
        for sequence in sorted(steps, key=_rank):
            # Making room for one may have parked another.
            if sequence.row is not None and self._has_room(sequence):
                yield sequence, self._step_chunk(sequence)
        for sequence, num_tokens in self._shares(prompts, budget):
            yield sequence, self._prompt_chunk(sequence, num_tokens)

    def mark(self, sequence: Sequence) -> None:
        """Keep the prefix of a sequence if it is at one of its marks."""
        while sequence.marks and sequence.marks[0] <= sequence.length:
            mark = sequence.marks.pop(0)
            if mark == sequence.length and self._prefixes is not None and sequence.row:
                is_end = mark == sequence.num_prompt - 1
                self._prefixes.keep(sequence.tokens, sequence.row, to_disk=is_end)

    def _start(self, sequence: Sequence) -> bool:
        memory = self._blocks.memory
        wanted = min(len(sequence.tokens) + HEADROOM, memory.num_pages * PAGE_SIZE)
        if pages_of(wanted) > memory.num_pages - self._owned():
            return False
        slot = self._take_slot()
        if slot is None:
            return False
        row = Row(slot)
        if sequence.parked is None:
            self._start_from_prefix(sequence, row)
        if not self._reserve(row, wanted):
            self._blocks.give_row(row)
            return False
        if sequence.parked is not None:
            memory.put_back(sequence.parked, row)
            sequence.parked = None
        sequence.row = row
        sequence.started_s = sequence.started_s or time.monotonic()
        return True

    def _reserve(self, row: Row, num_tokens: int) -> bool:
        """Give a row the pages for so many tokens in all, evicting kept prefixes for them."""
        missing = num_tokens - row.length
        return self._make_room(row.pages_for(missing)) and self._blocks.extend(row, missing)

    def _owned(self) -> int:
        """Return how many pages the running sequences have, shared ones counted once."""
        pages = [other.row.pages for other in self.running if other.row]
        return len(np.unique(np.concatenate(pages))) if pages else 0

    def _start_from_prefix(self, sequence: Sequence, row: Row) -> None:
        match, prefixes = Match(), self._prefixes
        if prefixes is not None and not sequence.wants_prompt_logprobs:
            match = prefixes.find(sequence.tokens)
            self._make_room(prefixes.pages_to_start(match))
            if prefixes.start(row, match):
                prefixes.hits += 1
                if not sequence.num_generated:
                    sequence.cached = row.length
            else:
                prefixes.misses["not kept" if match.digest is None else "no room"] += 1
        elif prefixes is not None:
            prefixes.misses["prompt logprobs"] += 1
        if not row.length:
            self._blocks.memory.clear(row.slot)
        sequence.marks = self._marks(sequence, match, row.length)

    def _marks(self, sequence: Sequence, match: Match, start: int) -> list[int]:
        """Return where a prompt that starts at a length is to stop, for its prefix to be kept."""
        last = sequence.num_prompt - 1
        marks = {last}
        if self._prefixes is not None:
            turns = [n + 1 for n in _places(sequence.tokens, self._turn_ids) if n < last]
            marks |= {match.junction or last, *turns[:1], *turns[-2:-1]}
            if last >= LONG_PROMPT:
                marks |= {last - distance for distance in DISTANCES_TO_END}
            distance = FIRST_DISTANCE
            while distance < last:
                marks.add(distance)
                distance *= 2
        return sorted(mark for mark in marks if start < mark <= last)

    def _take_slot(self) -> int | None:
        slot = self._blocks.take_slot()
        while slot is None and self._prefixes is not None and self._prefixes.evict():
            slot = self._blocks.take_slot()
        return slot

    def _make_room(self, num_pages: int) -> bool:
        """Evict kept prefixes until so many pages are free; False if that is not enough."""
        while self._blocks.num_free_pages < num_pages:
            if self._prefixes is None or not self._prefixes.evict():
                return False
        return True

    def _is_prompt(self, sequence: Sequence) -> bool:
        is_replay = sequence.num_pending <= 2 * self._speculative_tokens + 1
        return sequence.length < sequence.num_prompt - 1 or not is_replay

    def _has_room(self, sequence: Sequence) -> bool:
        """Find pages for what a sequence may take in, parking others or, at last, itself."""
        assert sequence.row is not None
        num_tokens = sequence.num_pending + self._speculative_tokens
        while not self._make_room(sequence.row.pages_for(num_tokens)):
            last = max(self.running, key=_rank)
            self._park(last)
            if last is sequence:
                return False
        return self._blocks.extend(sequence.row, num_tokens)

    def _park(self, sequence: Sequence) -> None:
        assert sequence.row is not None
        self.preemptions += 1
        if self._park_bytes:
            parked = [other.parked.num_bytes for other in self.waiting if other.parked]
            extract = self._blocks.memory.take_out(sequence.row)
            if sum(parked) + extract.num_bytes <= self._park_bytes:
                sequence.parked = extract
        # Otherwise all is computed again, from its tokens.
        self._blocks.give_row(sequence.row)
        sequence.row = None
        self.running.remove(sequence)
        self.add(sequence)

    def _step_chunk(self, sequence: Sequence) -> Chunk:
        assert sequence.row is not None
        pending = sequence.tokens[sequence.length :]
        # What a draft left behind is taken in before the next one is tried.
        if self._speculative_tokens and len(pending) == 1:
            room = sequence.max_tokens - sequence.num_generated - 1
            sequence.draft = propose(sequence.tokens, min(self._speculative_tokens, room))
        draft = sequence.draft
        return Chunk(
            sequence.row, pending + array("i", draft), 1 + len(draft), is_draft=bool(draft)
        )

    def _shares(self, prompts: list[Sequence], budget: int) -> Iterator[tuple[Sequence, int]]:
        """Divide the prompt tokens of a step."""
        if not prompts:
            return
        ordered = sorted(prompts, key=lambda other: (-other.priority, other.num_pending))
        oldest = min(prompts, key=lambda other: other.arrival)
        shares = {oldest.arrival: min(self._limit(oldest), max(1, budget // SHARE_OF_OLDEST))}
        budget -= shares[oldest.arrival]
        for sequence in ordered:
            extra = min(budget, self._limit(sequence) - shares.get(sequence.arrival, 0))
            if extra > 0:
                shares[sequence.arrival] = shares.get(sequence.arrival, 0) + extra
                budget -= extra
        for sequence in ordered:
            if share := shares.get(sequence.arrival):
                yield sequence, share

    def _limit(self, sequence: Sequence) -> int:
        """Return how many tokens a prompt can take in at most, up to where its prefix is kept."""
        stop = next((mark for mark in sequence.marks if mark > sequence.length), None)
        if stop is None:
            stop = len(sequence.tokens)
        limit = min(stop, len(sequence.tokens)) - sequence.length
        return min(limit, self._max_sequences) if sequence.wants_prompt_logprobs else limit

    def _prompt_chunk(self, sequence: Sequence, num_tokens: int) -> Chunk:
        assert sequence.row is not None
        start = sequence.length
        stop = start + num_tokens
        is_last = stop == len(sequence.tokens)
        num_logits = num_tokens if sequence.wants_prompt_logprobs else int(is_last)
        return Chunk(sequence.row, sequence.tokens[start:stop], num_logits)


def _rank(sequence: Sequence) -> tuple[int, int]:
    """Return an order in which later ones give way first."""
    return -sequence.priority, sequence.arrival


def _places(tokens: array, wanted: frozenset[int]) -> list[int]:
    """Return where any of the wanted ids occurs."""
    return np.flatnonzero(np.isin(np.array(tokens), list(wanted))).tolist()
