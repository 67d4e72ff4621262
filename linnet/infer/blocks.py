"""Who owns which slot and which pages of a paged memory."""

from array import array
from collections.abc import Iterable

from linnet.infer.ranks import Memory
from linnet.model.paged import PAGE_SIZE, Row, pages_of


class Blocks:
    """Counts the owners of every page, and hands out what is free.

    A page may have several owners: sequences and cached prefixes that begin alike. Nobody writes
    into a page below its own length, so sharing needs no copy except of a page that is not full.

    Args:
        memory: whose slots and pages these are.
    """

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self._free_slots = list(range(memory.num_slots))[::-1]
        self._free_pages = array("q", range(memory.num_pages - 1, -1, -1))
        self._owners = array("l", bytes(8 * memory.num_pages))

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody owns."""
        return len(self._free_pages)

    @property
    def num_free_slots(self) -> int:
        """Slots that nobody owns."""
        return len(self._free_slots)

    def take_slot(self) -> int | None:
        """Return a slot whose states mean nothing yet, None if all are taken."""
        return self._free_slots.pop() if self._free_slots else None

    def give_slot(self, slot: int) -> None:
        """Take a slot back."""
        self._free_slots.append(slot)

    def extend(self, row: Row, num_tokens: int) -> bool:
        """Give a row the pages for so many more tokens: all, or none if there are too few."""
        missing = row.pages_for(num_tokens)
        if missing > len(self._free_pages):
            return False
        for _ in range(missing):
            page = self._free_pages.pop()
            self._owners[page] = 1
            row.pages.append(page)
        return True

    def share(self, pages: Iterable[int]) -> None:
        """Count one more owner of pages that have one."""
        for page in pages:
            self._owners[page] += 1

    def give_pages(self, pages: Iterable[int]) -> None:
        """Count one owner less; a page without any is free."""
        for page in pages:
            self._owners[page] -= 1
            if not self._owners[page]:
                self._free_pages.append(page)

    def give_row(self, row: Row) -> None:
        """Take everything back that a row owns."""
        self.give_slot(row.slot)
        self.give_pages(row.pages)

    def continue_from(self, row: Row, slot: int, pages: array, length: int) -> bool:
        """Let an empty row, which owns a slot, start from a prefix that another owner keeps.

        Args:
            row: without pages.
            slot: that holds the states after the prefix.
            pages: that hold its keys and values.
            length: its tokens.

        Returns:
            False if the one page that has to be copied is not free; nothing has changed then.
        """
        num_full = length // PAGE_SIZE
        is_partial = num_full < pages_of(length)
        if is_partial and not self._free_pages:
            return False
        self.share(pages[:num_full])
        row.pages = pages[:num_full]
        if is_partial:
            row.length = num_full * PAGE_SIZE
            self.extend(row, 1)
            self.memory.copy_page(pages[num_full], row.pages[-1])
        self.memory.copy_slot(slot, row.slot)
        row.length = length
        return True
