"""What a rank receives from others, counted where PyTorch hands tensors to the backend."""

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Traffic(TorchDispatchMode):
    """Counts collectives and messages while it is entered.

    Attributes:
        calls: number of each kind: all_gather, reduce_scatter, all_reduce,
            all_to_all, send, receive.
        received: bytes that this rank received by each; of a reduction those that a ring brings.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.received: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Bytes received in all."""
        return sum(self.received.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:  # Any: as PyTorch declares it
        kind = func._schema.name
        if kind.startswith("c10d::"):
            self._count(kind.removeprefix("c10d::"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, args: tuple[Any, ...]) -> None:
        if kind == "_allgather_base_":
            self._add("all_gather", args[0].nbytes - args[1].nbytes)
        elif kind == "_reduce_scatter_base_":
            self._add("reduce_scatter", args[1].nbytes - args[0].nbytes)
        elif kind == "alltoall_base_":
            rank = dist.ProcessGroup.unbox(args[2]).rank()
            kept = args[3][rank] * args[0][:1].nbytes if len(args[0]) else 0
            self._add("all_to_all", args[0].nbytes - kept)
        elif kind == "allreduce_":
            size = dist.ProcessGroup.unbox(args[1]).size()
            self._add("all_reduce", 2 * _nbytes(args[0]) * (size - 1) // size)
        elif kind == "recv_":
            self._add("receive", _nbytes(args[0]))
        elif kind == "send":
            self.calls["send"] += 1

    def _add(self, kind: str, num_bytes: int) -> None:
        self.calls[kind] += 1
        self.received[kind] += num_bytes


def _nbytes(tensors: list[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
