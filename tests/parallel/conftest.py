"""Four gloo processes that are started once, and run functions of the tests on 1 to 4 ranks."""

import io
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

MOST = 4
TIMEOUT_S = 40


def _work(rank: int, port: int, connection: Connection) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, MOST, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=MOST)
    groups = {size: dist.new_group(list(range(size))) for size in range(1, MOST + 1)}
    while (task := connection.recv()) is not None:
        function, size, args = task
        try:
            answer = (function(groups[size], *args), None) if rank < size else (None, None)
        except Exception:
            answer = (None, traceback.format_exc())
        buffer = io.BytesIO()
        torch.save(answer, buffer)
        connection.send_bytes(buffer.getvalue())
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[..., list[Any]]]:
    """Return `run(function, size, *args)`: what `function(group, *args)` returns on each rank."""
    context = mp.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, MOST, is_master=True, wait_for_workers=False)
    pairs = [context.Pipe() for _ in range(MOST)]
    processes = [
        context.Process(target=_work, args=(rank, store.port, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pairs)
    ]
    for process in processes:
        process.start()
    ends = [ours for ours, _ in pairs]

    def run(function: Callable[..., Any], size: int, *args: Any) -> list[Any]:
        for end in ends:
            end.send((function, size, args))
        answers = []
        for rank, end in enumerate(ends):
            if not end.poll(TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer in {TIMEOUT_S} s")
            answers.append(torch.load(io.BytesIO(end.recv_bytes()), weights_only=False))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        return [result for result, _ in answers[:size]]

    yield run
    for end in ends:
        end.send(None)
    for process in processes:
        process.join(20)
        process.kill()


@pytest.fixture
def assert_equal_parts() -> Callable[..., None]:
    """Compare what each rank has, (its places, outputs and gradients), with that of the whole."""

    def check(results: list[Any], expected: list[torch.Tensor], tolerance: float) -> None:
        for own, parts in results:
            for name, part, whole in zip(("o", "dq", "dk", "dv"), parts, expected, strict=True):
                error = (part - whole[:, own]).abs().max().item()
                assert error < tolerance, (name, error)

    return check
