"""Which rank this process is, as the launcher says: torchrun, Ray Train, or Slurm.

Only environment variables are read: RANK, WORLD_SIZE and LOCAL_RANK, or Slurm's, and MASTER_ADDR
and MASTER_PORT, which PyTorch reads itself.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from linnet.errors import ConfigError

_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among others.

    Attributes:
        rank: its number.
        world_size: of all.
        local_rank: its number on this machine.
        restarts: how often the launcher has started all of them anew.
        node_size: processes on this machine.
    """

    rank: int
    world_size: int
    local_rank: int
    restarts: int = 0
    node_size: int = 1


def launched(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return what the launcher says; None for a process on its own.

    Raises:
        ConfigError: the variables are there in part, or are no numbers.
    """
    if "MASTER_ADDR" not in environment:
        return None
    for names in _NAMES:
        if names[0] in environment:
            break
    else:
        return None
    try:
        rank, world_size = int(environment[names[0]]), int(environment[names[1]])
        local_rank = int(environment.get(names[2], rank))
        restarts = int(environment.get("TORCHELASTIC_RESTART_COUNT", 0))
        node_size = int(environment.get(names[3], 1))
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{names[0]} is set, but not as a launcher does: {error}") from None
    if not 0 <= rank < world_size:
        raise ConfigError(f"{names[0]} is {rank} of {names[1]} {world_size}")
    if world_size == 1:
        return None
    if environment.get("MASTER_PORT") == "0":
        # PyTorch would wait at it until the timeout.
        raise ConfigError("MASTER_PORT is 0, where nobody meets; torchrun --standalone finds one")
    return Launch(rank, world_size, local_rank, restarts, node_size)


def lost_contact(error: BaseException) -> str | None:
    """Return what an error says of a rank that is gone or silent; None if it is something else."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        for sign in _SIGNS:
            if sign in text:
                return sign.lower()
        cause = cause.__cause__ or cause.__context__
    return None


_SIGNS = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Connection refused",
    "Timed out waiting",
    "Socket Timeout",
    "timed out after",
    "Watchdog caught collective operation timeout",
    "wait timeout",
)


CONNECT_TIMEOUT_S = 600.0
"""Machines start at different times, whatever the patience of a step may be."""


def connect(launch: Launch) -> torch.device:
    """Join the other processes; return the device of this one.

    Raises:
        ConfigError: they cannot be reached.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", launch.local_rank)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
        size = launch.world_size
        try:
            store, _, _ = next(rendezvous("env://", launch.rank, size, timeout=timeout))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                # torchrun's store outlives a restart, with the addresses of those that died.
                store=PrefixStore(f"linnet/{launch.restarts}", store),
                rank=launch.rank,
                world_size=size,
                timeout=timeout,
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"cannot join the {launch.world_size} ranks at MASTER_ADDR "
                f"{os.environ.get('MASTER_ADDR')}: {str(error).splitlines()[0]}"
            ) from None
    return device


def disconnect(launch: Launch | None) -> None:
    """Leave the other processes; what follows is done without them."""
    if launch is not None and dist.is_initialized():
        dist.destroy_process_group()
