"""Timing as ratios: both sides in turn in one process, the median of pairs, written as JSON."""

import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from linnet.ops.matmul import cpu_has_native_bf16
from linnet.train.machine import describe_machine, matmul_peak_flops

RESULTS = Path(__file__).parent / "results"


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], pairs: int, warmup: int = 1
) -> dict[str, float]:
    """Time two functions alternately.

    Returns:
        Median seconds of each side, and the median, smallest and largest of theirs / ours.
    """
    for _ in range(warmup):
        ours()
        theirs()
    ours_s, theirs_s = [], []
    for _ in range(pairs):
        ours_s.append(_seconds(ours))
        theirs_s.append(_seconds(theirs))
    return ratio(ours_s, theirs_s)


def ratio(ours_s: list[float], theirs_s: list[float]) -> dict[str, float]:
    """Return the medians of seconds in pairs, and the median, smallest and largest ratio."""
    ratios = [b / a for a, b in zip(ours_s, theirs_s, strict=True)]
    return {
        "ours_s": statistics.median(ours_s),
        "theirs_s": statistics.median(theirs_s),
        "speedup": statistics.median(ratios),
        "speedup_min": min(ratios),
        "speedup_max": max(ratios),
        "pairs": len(ratios),
    }


def alone(ours: Callable[[], object], repeats: int, warmup: int = 1) -> dict[str, float]:
    """Time one function, where the other side cannot run; keys as `compare` has them."""
    for _ in range(warmup):
        ours()
    seconds = [_seconds(ours) for _ in range(repeats)]
    return {
        "ours_s": statistics.median(seconds),
        "ours_s_min": min(seconds),
        "ours_s_max": max(seconds),
        "pairs": repeats,
    }


def device_name() -> str:
    """Return a folder name for this machine: its processor and what it multiplies in hardware."""
    cpu = str(describe_machine(torch.float32)["cpu"]).lower()
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\(r\)|\(tm\)|processor|cpu|@", " ", cpu)).strip("-")
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    features = [name for name in ("avx512_f", "avx512_bf16", "amx_bf16") if capabilities.get(name)]
    return "-".join([slug, *(feature.replace("_", "") for feature in features)])


def machine_facts(threads: int) -> dict[str, Any]:
    """Return what a reader needs to judge the figures, with limits measured in this run."""
    facts: dict[str, Any] = dict(describe_machine(torch.bfloat16))
    facts["threads"] = threads
    facts["native_bf16"] = cpu_has_native_bf16()
    facts["matmul_peak_flops_fp32"] = matmul_peak_flops(torch.float32, 2048, 16)
    peaks = [facts["matmul_peak_flops_fp32"]]
    if facts["native_bf16"]:
        facts["matmul_peak_flops_bf16"] = matmul_peak_flops(torch.bfloat16, 2048, 16)
        peaks.append(facts["matmul_peak_flops_bf16"])
    facts["matmul_peak_flops"] = max(peaks)
    facts["copy_bytes_per_s"] = _copy_rate()
    facts["read_bytes_per_s"] = _read_rate()
    return facts


def write_result(name: str, values: dict[str, Any]) -> Path:
    """Write `results/<device>/<name>.json` and return its path."""
    path = RESULTS / device_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2) + "\n")
    return path


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _copy_rate() -> float:
    source = torch.randn(2**24)
    target = torch.empty_like(source)
    best = min(_seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / best


def _read_rate() -> float:
    source = torch.ones(2**26)  # 256 MB: more than any cache holds
    best = min(_seconds(source.sum) for _ in range(5))
    return source.nbytes / best
