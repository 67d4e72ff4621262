"""The machine a run is on: what it is, its matmul peak, and how much memory the process holds."""

import ctypes
import os
import platform
import time
from pathlib import Path
from typing import Literal

import torch

from linnet.ops.matmul import product_dtype

LARGE_TENSOR_BYTES = 4 << 20
"""From this size on, a freed tensor's memory goes back to the system in training."""

_M_MMAP_THRESHOLD = -3  # of <malloc.h>


def compute_dtype(choice: Literal["auto", "float32", "bfloat16"]) -> torch.dtype:
    """Return the dtype to compute in; "auto" is bf16 where this CPU multiplies it in hardware."""
    if choice == "auto":
        return product_dtype(torch.bfloat16, torch.device("cpu"))
    return getattr(torch, choice)


def matmul_peak_flops(dtype: torch.dtype, size: int = 1024, repeats: int = 8) -> float:
    """Measure the matmul rate in FLOPs per second, the best of several products.

    Args:
        dtype: of the operands; multiplied as `linnet.ops.linear` would.
        size: rows and columns of the square operands.
        repeats: products to time.
    """
    wide = product_dtype(dtype, torch.device("cpu"))
    a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(wide)
    fastest_s = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, a)
        fastest_s = min(fastest_s, time.perf_counter() - start)
    return 2 * size**3 / fastest_s


def describe_machine(dtype: torch.dtype) -> dict[str, str | int]:
    """Return what a reader of a report wants to know about where the numbers come from."""
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def return_freed_tensors() -> None:
    """Let the allocator give large tensors back to the system as soon as they are freed.

    glibc keeps blocks of up to 32 MiB for later ones, of other sizes in training, so that holes add
    up: the peak of a step falls by a tenth. Other allocators are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_TENSOR_BYTES)


def resident_bytes() -> int:
    """Return the memory that this process holds, 0 where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
