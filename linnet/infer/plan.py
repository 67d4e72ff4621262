"""The memory that an engine will use, decided before it starts from what is free."""

from dataclasses import dataclass
from pathlib import Path

import torch

from linnet.errors import MemoryPlanError
from linnet.model.config import SOFTMAX, ModelConfig
from linnet.model.paged import PAGE_SIZE, SEGMENT_PAGES, pages_of
from linnet.model.transformer import Model
from linnet.ops.matmul import product_dtype, wide_dtype

SHARE_OF_FREE = 0.8
"""Of the free bytes, unless the caller names bytes."""

MAX_SNAPSHOTS = 256
SHARE_OF_SNAPSHOTS = 0.25
"""Most of the memory that slots for cached prefixes may take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """Bytes by purpose."""

    free_bytes: int
    """What was free when the plan was made, with the weights already loaded."""
    budget_bytes: int
    """What the engine may use of it."""
    workspace_bytes: int
    """Of one step: activations, logits, the part of a past that is gathered."""
    slot_bytes: int
    """fp32 states of one sequence."""
    num_slots: int
    page_bytes: int
    """Keys and values of what is here of `PAGE_SIZE` tokens, in all softmax layers."""
    num_pages: int
    max_model_len: int

    @property
    def state_bytes(self) -> int:
        """Bytes of all states."""
        return self.slot_bytes * self.num_slots

    @property
    def kv_bytes(self) -> int:
        """Bytes of all keys and values."""
        return self.page_bytes * self.num_pages

    @property
    def total_bytes(self) -> int:
        """What the engine uses when all of it is used."""
        return self.workspace_bytes + self.state_bytes + self.kv_bytes

    def __str__(self) -> str:
        return (
            f"{_gib(self.total_bytes)} of {_gib(self.free_bytes)} free: "
            f"{self.num_slots} states x {_gib(self.slot_bytes)}, "
            f"{self.num_pages * PAGE_SIZE:,} tokens of keys and values {_gib(self.kv_bytes)}, "
            f"workspace {_gib(self.workspace_bytes)}; requests up to {self.max_model_len:,} tokens"
        )


def make_plan(
    model: Model,
    *,
    max_sequences: int,
    chunk_tokens: int,
    max_model_len: int | None = None,
    memory_bytes: int | None = None,
    config: ModelConfig | None = None,
    free: int | None = None,
    num_parts: int = 1,
) -> MemoryPlan:
    """Divide memory between states, keys and values, and workspace.

    Args:
        model: loaded.
        max_sequences: that run at once.
        chunk_tokens: most new tokens of one step.
        max_model_len: tokens of one request that must fit; None for the config's, or what fits.
        memory_bytes: to use; None for a share of what is free.
        config: with the heads that are here; None for the model's.
        free: bytes; None for what this process may still take.
        num_parts: ranks that share each page.

    Raises:
        MemoryPlanError: it does not fit; the message has the numbers.
    """
    config = config or model.config
    free = free_bytes(model.device) if free is None else free
    budget = int(SHARE_OF_FREE * free) if memory_bytes is None else memory_bytes
    workspace = workspace_bytes(model, config, max_sequences, chunk_tokens, num_parts)
    slot = slot_bytes(config, model.compute_dtype)
    page = page_bytes(config, model.compute_dtype, num_parts)
    needed = pages_of(max_model_len) if max_model_len else 1
    # Room for the longest request comes before room for kept prefixes.
    spare = budget - workspace - max_sequences * slot - needed * page
    most = min(spare, int(SHARE_OF_SNAPSHOTS * (budget - workspace)))
    num_slots = max_sequences + max(1, min(MAX_SNAPSHOTS, most // max(1, slot)))
    rest = budget - workspace - num_slots * slot
    wanted = max_model_len or config.max_position_embeddings
    most_pages = (max_sequences + 1) * pages_of(wanted)
    num_pages = min(rest // page, most_pages) if page else most_pages
    if rest < 0 or num_pages < needed:
        raise MemoryPlanError(
            f"{max_sequences} sequences of {_gib(slot)} states and "
            f"{needed * PAGE_SIZE:,} tokens of {_gib(page / PAGE_SIZE)} keys and values and a "
            f"workspace of {_gib(workspace)} need "
            f"{_gib(workspace + num_slots * slot + needed * page)}; {_gib(budget)} may be used of "
            f"{_gib(free)} free. Allow fewer sequences or shorter requests"
        )
    return MemoryPlan(
        free_bytes=free,
        budget_bytes=budget,
        workspace_bytes=workspace,
        slot_bytes=slot,
        num_slots=num_slots,
        page_bytes=page,
        num_pages=num_pages,
        max_model_len=min(wanted, num_pages * PAGE_SIZE),
    )


def slot_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return the bytes of the states of one sequence: fp32, or fp64 of an fp64 model."""
    num_lightning = sum(kind != SOFTMAX for kind in config.attn_type_list)
    per_layer = config.num_attention_heads * config.head_dim**2
    return wide_dtype(dtype).itemsize * num_lightning * per_layer


def page_bytes(config: ModelConfig, dtype: torch.dtype, num_parts: int = 1) -> int:
    """Return the bytes of a rank's part of a page of keys and values in all softmax layers."""
    num_softmax = sum(kind == SOFTMAX for kind in config.attn_type_list)
    per_token = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return -(-PAGE_SIZE // num_parts) * num_softmax * per_token


def workspace_bytes(
    model: Model, config: ModelConfig, max_sequences: int, chunk_tokens: int, num_parts: int = 1
) -> int:
    """Return an upper estimate of the bytes that one step allocates beside the memory."""
    dtype = model.compute_dtype
    wide = product_dtype(dtype, model.device).itemsize
    kv = config.num_key_value_heads * config.head_dim
    expert_rows = config.num_experts_per_tok * (
        3 * config.intermediate_size + 2 * config.hidden_size
    )
    per_token = 12 * config.hidden_size + 8 * config.inner_size + expert_rows
    attending = 4 * (config.hidden_size + config.inner_size)
    segment = 2 * SEGMENT_PAGES * PAGE_SIZE * kv * (dtype.itemsize + wide)
    # Each rank finds something for each query in its part of the pages.
    answers = 0 if num_parts == 1 else (num_parts + 1) * (config.inner_size + config.head_dim) * 4
    logits = 3 * max_sequences * config.vocab_size * 4
    states = 2 * max_sequences * slot_bytes(config, dtype)
    # The experts do not run while a past is gathered.
    layer = max(
        chunk_tokens * per_token * wide, chunk_tokens * (attending * wide + answers) + segment
    )
    return layer + logits + states


def free_bytes(device: torch.device) -> int:
    """Return the bytes that a process may still take, on the CPU within its control group."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _meminfo("MemAvailable")
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return free
    return free if limit == "max" else min(free, int(limit) - used)


def _meminfo(key: str) -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import os

    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _gib(num_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
