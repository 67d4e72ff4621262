"""Gloo worlds of 1 to 4 processes that run functions of the tests, each started once, when needed.

A world stays: PyTorch remembers meshes by their ranks, with the groups of the first.
"""

import faulthandler
import io
import multiprocessing as mp
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT_S = 120
PRELOADED = ["linnet.train.ranks", "linnet.infer", "linnet.infer.ranks", "linnet.parallel.loading"]
"""What takes seconds to import, once instead of once per process."""


def _work(rank: int, size: int, port: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    while (task := connection.recv()) is not None:
        function, args = task
        faulthandler.dump_traceback_later(TIMEOUT_S - 5)
        try:
            answer = (function(dist.group.WORLD, *args), None)
        except Exception:
            answer = (None, traceback.format_exc())
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        connection.send_bytes(buffer.getvalue())
        faulthandler.cancel_dump_traceback_later()
    dist.barrier()
    dist.destroy_process_group()


class _World:
    def __init__(self, size: int) -> None:
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        pairs = [context.Pipe() for _ in range(size)]
        self._ends = [ours for ours, _ in pairs]
        self._processes = [
            context.Process(target=_work, args=(rank, size, self._store.port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            process.start()

    def run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> list[Any]:
        for end in self._ends:
            end.send((function, args))
        answers = []
        for rank, end in enumerate(self._ends):
            if not end.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer in {TIMEOUT_S} s")
            answers.append(torch.load(io.BytesIO(end.recv_bytes()), weights_only=False))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        return [result for result, _ in answers]

    def end(self) -> None:
        for end in self._ends:
            end.send(None)
        for process in self._processes:
            process.join(20)
            process.kill()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """Return `run(function, size, *args)`: what `function(group, *args)` returns on each rank."""
    worlds: dict[int, _World] = {}

    def run(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        if size not in worlds:
            worlds[size] = _World(size)
        try:
            return worlds[size].run(function, args)
        except TimeoutError:
            worlds.pop(size).end()
            raise

    yield run
    for world in worlds.values():
        world.end()


@pytest.fixture
def assert_equal_parts() -> Callable[..., None]:
    """Compare what each rank has, (its places, outputs and gradients), with that of the whole."""

    def check(results: list[Any], expected: list[torch.Tensor], tolerance: float) -> None:
        for own, parts in results:
            for name, part, whole in zip(("o", "dq", "dk", "dv"), parts, expected, strict=True):
                error = (part - whole[:, own]).abs().max().item()
                assert error < tolerance, (name, error)

    return check
