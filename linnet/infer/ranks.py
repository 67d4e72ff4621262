"""The engine over several ranks: rank 0 decides, and the others repeat what its model does.

Rank 0 has the scheduler, the kept prefixes, the sampling and the requests. Its memory and runner,
`LedMemory` and `LedRunner`, do their work at once and note it; the notes go to the other ranks in
one message with each step, where `follow` repeats them on that rank's heads, experts and share of
the pages. The ranks meet within the model; rank 0 alone reads logits.

The order of the notes is all that keeps the memories alike: slots, pages and lengths are decided on
rank 0 and named in the message.
"""

import socket
import time
import zlib
from array import array
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from linnet.errors import EngineError
from linnet.infer.plan import free_bytes
from linnet.infer.runner import Chunk, Runner, Step
from linnet.infer.spread_runner import SpreadRunner
from linnet.model.paged import Extract, PagedMemory, Row
from linnet.model.transformer import Model
from linnet.parallel.channel import Channel
from linnet.parallel.inference import local_config
from linnet.parallel.spread_pages import PageShare

if TYPE_CHECKING:
    from linnet.parallel.mesh import Mesh

HEARTBEAT_S = 10.0
"""An idle rank 0 tells the others so often that it is there; far below any timeout of a group."""


class EngineRanks:
    """The ranks under one engine; all of them make it, with their parts of the model.

    Args:
        model: from `linnet.parallel.loading.load_parallel`.
        mesh: of its ranks; they are the whole of the group that the engine uses.

    Attributes:
        config: of the model as one rank sees it.
        free_bytes: the least that any rank may call its own.
    """

    def __init__(self, model: Model, mesh: "Mesh") -> None:
        self.model = model
        self.config, self._layout = local_config(model.config, mesh.layout), mesh.layout
        self._share = PageShare(mesh.group("dp_shard"))
        group = mesh.group("world")
        self.free_bytes = _least_free_bytes(model.device, group)
        self._channel = Channel(group)
        self._notes: list[Any] = []  # Any: a name and its arguments
        self._last_sent_s = time.monotonic()
        self.is_open = self._channel.is_sender
        """Whether the other ranks wait for messages of this one."""

    def __str__(self) -> str:
        layout = self._layout
        sizes = {"tp": layout.tp, "cp": self.num_parts, "ep": layout.ep, "etp": layout.etp}
        axes = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
        return f"{layout.world_size}: {axes}; memory is that of each"

    @property
    def num_parts(self) -> int:
        """Ranks that share a long chunk of tokens, and every page."""
        return self._share.size

    def new_memory(self, num_slots: int, num_pages: int, dtype: torch.dtype) -> PagedMemory:
        """Return what this rank keeps of a paged memory."""
        sizes = (num_slots, num_pages, dtype, self.model.device, self._share.page_len)
        return PagedMemory(self.config, *sizes)

    def new_runner(self, memory: PagedMemory, reads_logits: bool = True) -> Runner:
        """Return what runs this rank's part of each step."""
        if self._share.size == 1:
            return Runner(self.model, memory, reads_logits)
        return SpreadRunner(self.model, memory, self._share, reads_logits)

    def note(self, *order: Any) -> None:  # Any: as above
        """Let the other ranks do something before they do what is sent next."""
        self._notes.append(order)

    def send(self, *order: Any) -> None:  # Any: as above
        """Let the other ranks do what was noted, then this.

        Raises:
            EngineError: they no longer listen.
        """
        if not self.is_open:
            raise EngineError("the ranks of this engine are no longer in step; start them again")
        notes, self._notes = [*self._notes, order], []
        try:
            self._channel.send(notes)
        except RuntimeError as error:
            self.is_open = False
            raise EngineError(f"another rank has ended: {error}") from error
        self._last_sent_s = time.monotonic()

    def keep_waiting(self) -> None:
        """Tell the other ranks now and then that there is nothing to do."""
        if self.is_open and time.monotonic() - self._last_sent_s > HEARTBEAT_S:
            self.send("wait")

    def abandon(self) -> None:
        """Send nothing any more: some ranks have done what others have not."""
        self.is_open = False

    def close(self) -> None:
        """Let the other ranks go, if they are there."""
        if self.is_open:
            self._notes.clear()
            with suppress(EngineError):
                self.send("end")
            self.is_open = False

    def follow(self) -> None:
        """Do on this rank, any but the first, what the engine of rank 0 does, until it ends.

        Raises:
            EngineError: rank 0 ended without a word.
        """
        follower = _Follower(self)
        while True:
            try:
                orders = self._channel.receive()
            except RuntimeError as error:
                raise EngineError(f"rank 0 has ended, or is silent for too long: {error}") from None
            for name, *arguments in orders:
                if name == "end":
                    return
                follower.orders[name](*arguments)


class LedMemory:
    """The paged memory of rank 0, with the interface of `PagedMemory` that the engine uses.

    Args:
        ranks: to which its changes are told.
        num_slots, num_pages, dtype: as of `PagedMemory`, on every rank.
    """

    def __init__(
        self, ranks: EngineRanks, num_slots: int, num_pages: int, dtype: torch.dtype
    ) -> None:
        ranks.send("begin", num_slots, num_pages)
        self._ranks = ranks
        self.own = ranks.new_memory(num_slots, num_pages, dtype)
        self.num_slots, self.num_pages = num_slots, num_pages

    def clear(self, slot: int) -> None:
        """Set the states of a slot to those of an empty sequence."""
        self._ranks.note("clear", slot)
        self.own.clear(slot)

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the states of one slot to another."""
        self._ranks.note("copy_slot", source, target)
        self.own.copy_slot(source, target)

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys and values of one page to another."""
        self._ranks.note("copy_page", source, target)
        self.own.copy_page(source, target)

    def take_out(self, row: Row) -> Extract:
        """Refuse: no rank has all of a sequence."""
        raise NotImplementedError("sequences are not taken out of the memory of several ranks")

    def put_back(self, extract: Extract, row: Row) -> None:
        """Refuse: no rank has all of a sequence."""
        raise NotImplementedError("sequences are not put into the memory of several ranks")


Memory = PagedMemory | LedMemory
"""What an engine keeps its sequences in."""


class LedRunner:
    """The runner of rank 0, with the interface of `Runner`; the other ranks run each step as well.

    Args:
        ranks: the others.
        memory: of the engine.
    """

    def __init__(self, ranks: EngineRanks, memory: LedMemory) -> None:
        self._ranks, self._own = ranks, ranks.new_runner(memory.own)

    def run(self, chunks: Sequence[Chunk]) -> "LedStep":
        """Run one step; see `Runner.run`.

        Raises:
            EngineError: the ranks are no longer in step.
        """
        self._ranks.send("run", [_packed(chunk) for chunk in chunks])
        try:
            return LedStep(self._ranks, self._own.run(chunks))
        except BaseException:
            self._ranks.abandon()
            raise


class LedStep:
    """A step of all ranks, with the interface of `Step`."""

    def __init__(self, ranks: EngineRanks, own: Step) -> None:
        self._ranks, self._own, self.logits = ranks, own, own.logits

    def commit(self, keep: Sequence[bool]) -> None:
        """Let each sequence have its tokens, or forget those of a draft; see `Step.commit`."""
        self._ranks.note("commit", list(keep))
        self._own.commit(keep)


class _Follower:
    """What another rank than 0 does, by the names of the orders."""

    def __init__(self, ranks: EngineRanks) -> None:
        self._ranks = ranks
        self.orders = {"begin": self._begin, "run": self._run, "wait": lambda: None}

    def _begin(self, num_slots: int, num_pages: int) -> None:
        ranks = self._ranks
        memory = ranks.new_memory(num_slots, num_pages, ranks.model.compute_dtype)
        self._runner = ranks.new_runner(memory, reads_logits=False)
        for change in (memory.clear, memory.copy_slot, memory.copy_page):
            self.orders[change.__name__] = change

    def _run(self, chunks: list[list[Any]]) -> None:  # Any: of `_packed`
        step = self._runner.run([_unpacked(*chunk) for chunk in chunks])
        self.orders["commit"] = step.commit


def _packed(chunk: Chunk) -> list[Any]:  # Any: what `_unpacked` takes
    row, tokens = chunk.row, list(chunk.tokens)
    pages = row.pages.tolist()
    return [row.slot, pages, row.length, tokens, chunk.num_logits, chunk.is_draft]


def _unpacked(
    slot: int, pages: list[int], length: int, tokens: list[int], num_logits: int, is_draft: bool
) -> Chunk:
    return Chunk(Row(slot, array("q", pages), length), tokens, num_logits, is_draft)


def _least_free_bytes(device: torch.device, group: dist.ProcessGroup) -> int:
    """Return the least of what each rank has free, where ranks share the memory of a machine."""
    machine = zlib.crc32(socket.gethostname().encode())
    own = torch.tensor([free_bytes(device), machine])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, own, group=group)
    facts = [tuple(fact.tolist()) for fact in every]
    if device.type != "cpu":
        return min(free for free, _ in facts)
    machines = [machine for _, machine in facts]
    return min(free // machines.count(machine) for free, machine in facts)
