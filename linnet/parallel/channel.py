"""Messages from one rank to all others: what they are to do next, in JSON and never in pickles."""

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

HEAD_BYTES = 4096
"""Shorter messages take one broadcast, longer ones two."""

_LENGTH_BYTES = 8


class Channel:
    """Messages from the first rank of a group to the others.

    All ranks make it; then the first calls `send` as often as each of the others `receive`. A rank
    that waits for a message gives up after the timeout of the group, or as soon as the first rank
    has ended.

    Args:
        group: with a backend for tensors on the CPU.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.is_sender = dist.get_rank(group) == 0

    def send(self, message: Any) -> None:  # Any: whatever JSON holds
        """Send a message to all other ranks."""
        content = json.dumps(message, separators=(",", ":")).encode()
        packed = len(content).to_bytes(_LENGTH_BYTES, "little") + content
        packed += bytes(max(0, HEAD_BYTES - len(packed)))
        tensor = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        self._broadcast(tensor[:HEAD_BYTES])
        if len(tensor) > HEAD_BYTES:
            self._broadcast(tensor[HEAD_BYTES:])

    def receive(self) -> Any:  # Any: as above
        """Return the next message.

        Raises:
            RuntimeError: the first rank has ended, or sent nothing for too long.
        """
        head = self._broadcast(torch.empty(HEAD_BYTES, dtype=torch.uint8))
        packed = head.numpy().tobytes()
        length = int.from_bytes(packed[:_LENGTH_BYTES], "little")
        missing = _LENGTH_BYTES + length - HEAD_BYTES
        if missing > 0:
            rest = self._broadcast(torch.empty(missing, dtype=torch.uint8))
            packed += rest.numpy().tobytes()
        return json.loads(packed[_LENGTH_BYTES : _LENGTH_BYTES + length])

    def _broadcast(self, tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, group=self._group, group_src=0)
        return tensor


def ranks_where(claim: bool, group: dist.ProcessGroup) -> list[int]:
    """Return, on all ranks of a group, those where the claim is true."""
    claims = [torch.zeros(1, dtype=torch.uint8) for _ in range(dist.get_world_size(group))]
    dist.all_gather(claims, torch.tensor([claim], dtype=torch.uint8), group=group)
    return [rank for rank, one in enumerate(claims) if one]
