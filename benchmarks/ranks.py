"""What the benchmarks of several ranks share: one clock, one verdict, the same model."""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from linnet.model import Model, preset
from linnet.model.init import initialize
from linnet.train.machine import compute_dtype

CPU_TOLERANCE = 1e-5  # fp32
GPU_TOLERANCE = 1e-2  # fp32 tensors whose products run on tensor cores

Values = dict[str, Any]  # Any: as written to JSON


def dtype_on(device: torch.device) -> torch.dtype:
    """Return the dtype of activations: bf16 where the device multiplies it in hardware."""
    return torch.bfloat16 if device.type == "cuda" else compute_dtype("auto")


def say(text: str) -> None:
    """Print on one rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def model_of(name: str, dtype: torch.dtype, device: torch.device) -> Model:
    """Return the preset with the same random weights on all ranks."""
    model = initialize(Model(preset(name), dtype), torch.Generator().manual_seed(0))
    return model.to(device).train()


def within_tolerance(difference: float, device: torch.device) -> float:
    """Return the largest difference of all ranks, or stop all of them."""
    worst = over_ranks(difference, device)
    if not worst <= (CPU_TOLERANCE if device.type == "cpu" else GPU_TOLERANCE):
        raise SystemExit(f"results differ by {worst} from one process; nothing is timed")
    return worst


def all_ranks() -> dist.ProcessGroup:
    """Return the group of all ranks."""
    group = dist.group.WORLD
    assert group is not None
    return group


def over_ranks(value: float, device: torch.device) -> float:
    """Return the largest value of all ranks."""
    largest = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest)


def together(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds from when all ranks start to when all of them are done."""
    dist.barrier()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - start
