"""Prefixes whose states and keys/values are kept for requests that begin alike.

A prefix of a hybrid model can be continued only where both are known: the keys and values of all
its tokens, and the lightning states after its last one. So an entry holds a copy of the states at
one length and owns the pages up to there; a request continues the longest entry that its tokens
begin with. Entries are few and placed by the scheduler: the ends of prompts and turns, the places
where prompts have parted, and growing distances within long prompts.
"""

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from linnet.infer.blocks import Blocks
from linnet.infer.spill import Spill
from linnet.model.paged import PAGE_SIZE, Row, pages_of

MIN_TOKENS = 16
"""Shorter prefixes are computed again sooner than they are found."""

MIN_SPILL_TOKENS = 256
"""Shorter ones are not worth a file."""

MAX_SEEN = 1 << 16
"""Page boundaries of earlier prompts that are remembered, to notice where later ones part."""


@dataclass(frozen=True, slots=True)
class _Entry:
    length: int
    slot: int
    pages: array


@dataclass(frozen=True, slots=True)
class Match:
    """What the cache knows of a prompt."""

    length: int = 0
    """Tokens of the longest kept prefix."""
    digest: bytes | None = None
    """Its name; None if there is none."""
    junction: int | None = None
    """A length up to which an earlier prompt was the same, longer than what is kept."""


class PrefixCache:
    """Finds, keeps and evicts prefixes, the least recently used first.

    Args:
        blocks: of the memory that entries share with running sequences.
        spill: where long prefixes are written to and found again, if anywhere.
    """

    def __init__(self, blocks: Blocks, spill: Spill | None = None) -> None:
        self._blocks, self._spill = blocks, spill
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self._seen: OrderedDict[bytes, None] = OrderedDict()
        self.hits = 0
        self.misses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, tokens: Sequence[int]) -> Match:
        """Return the longest kept prefix that leaves at least one token, and where prompts parted.

        Args:
            tokens: of a request.
        """
        limit = len(tokens) - 1
        on_disk = self._spill.lengths() if self._spill else ()
        boundaries = range(PAGE_SIZE, limit + 1, PAGE_SIZE)
        lengths = sorted({*self._lengths, *on_disk, *boundaries})
        found, junction = Match(), None
        for length, digest in _digests(tokens, [n for n in lengths if n <= limit]):
            if digest in self._entries or (self._spill and self._spill.has(length, digest)):
                found = Match(length, digest)
            if length % PAGE_SIZE == 0:
                if digest in self._seen:
                    junction = length
                self._remember(digest)
        if junction is not None and junction < found.length + 2 * PAGE_SIZE:
            junction = None
        if found.digest in self._entries:
            # Used last, so that making room for the one that found it does not evict it.
            self._entries.move_to_end(found.digest)
        return Match(found.length, found.digest, junction)

    def pages_to_start(self, match: Match) -> int:
        """Return how many free pages `start` needs: one for an entry in memory, which is shared."""
        if match.digest is None:
            return 0
        return 1 if match.digest in self._entries else pages_of(match.length)

    def start(self, row: Row, match: Match) -> bool:
        """Let an empty row continue a match; False if it is gone or there is no room."""
        if match.digest is None:
            return False
        entry = self._entries.get(match.digest)
        if entry is not None:
            return self._blocks.continue_from(row, entry.slot, entry.pages, entry.length)
        return self._start_from_disk(row, match.length, match.digest)

    def _start_from_disk(self, row: Row, length: int, digest: bytes) -> bool:
        if self._spill is None or not self._blocks.extend(row, length):
            return False
        extract = self._spill.load(length, digest)
        if extract is None:
            self._blocks.give_pages(row.pages)
            row.pages = array("q")
            return False
        self._blocks.memory.put_back(extract, row)
        return True

    def keep(self, tokens: Sequence[int], row: Row, to_disk: bool = False) -> None:
        """Keep the prefix that a row has taken in, if there is room.

        Args:
            tokens: of which the first `row.length` are the prefix.
            row: its sequence, which goes on.
            to_disk: whether to write it as well, where prefixes are written.
        """
        length = row.length
        if length < MIN_TOKENS:
            return
        ((_, digest),) = _digests(tokens, [length])
        if self._spill and to_disk and length >= MIN_SPILL_TOKENS:
            self._spill.store(digest, row, self._blocks.memory)
        if digest in self._entries:
            self._entries.move_to_end(digest)
            return
        while (slot := self._blocks.take_slot()) is None:
            if not self.evict():
                return
        self._blocks.memory.copy_slot(row.slot, slot)
        pages = row.pages[: pages_of(length)]
        self._blocks.share(pages)
        self._entries[digest] = _Entry(length, slot, pages)
        self._lengths[length] += 1

    def evict(self) -> bool:
        """Drop the least recently used entry; False if there is none."""
        if not self._entries:
            return False
        _, entry = self._entries.popitem(last=False)
        self._lengths[entry.length] -= 1
        if not self._lengths[entry.length]:
            del self._lengths[entry.length]
        self._blocks.give_slot(entry.slot)
        self._blocks.give_pages(entry.pages)
        return True

    def _remember(self, digest: bytes) -> None:
        self._seen[digest] = None
        self._seen.move_to_end(digest)
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)


def _digests(tokens: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, bytes]]:
    """Return each of the ascending lengths with a name of that many first tokens."""
    data = memoryview(np.asarray(tokens, dtype=np.int32).tobytes())
    hasher, result, done = hashlib.blake2b(digest_size=16), [], 0
    for length in lengths:
        hasher.update(data[4 * done : 4 * length])
        done = length
        result.append((length, hasher.copy().digest()))
    return result
