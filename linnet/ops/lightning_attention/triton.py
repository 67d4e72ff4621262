"""Lightning attention on a GPU: what `triton_kernels.py` computes, behind `operator.py`.

The forward pass and each gradient are one scan (see the head of `triton_kernels.py`), so the
backward pass saves q, k, v and the initial state alone, adds nothing up across programs and gives
the same bits at every run. A scan is cut into segments only where sequences, heads and blocks of V
are too few to fill the GPU: the states of the segments come first, from k and v alone, then all
segments run at once.

Nothing here waits for the GPU, so the values of slopes and offsets are checked on the CPU only.
Triton is imported at the first call; `unsupported_reason` tells without an error whether it can
serve. On the CPU it runs in Triton's interpreter, for tests (TRITON_INTERPRET=1).
"""

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from linnet.ops.documents import document_bounds
from linnet.ops.lightning_attention.checks import check_arguments, check_decay

MAX_HEAD_DIM = 128
"""The state of a head has to fit in the registers of one program."""

MIN_SEGMENT = 512
"""Tokens below which a segment is not worth its state."""


class LaunchConfig(NamedTuple):
    """How a scan is cut into programs."""

    chunk_len: int
    block_v: int
    num_warps: int
    num_stages: int


def launch_config(
    key_dim: int, value_dim: int, dtype: torch.dtype, silu: bool = False
) -> LaunchConfig:
    """Return the fixed configuration for a scan over [T, K] keys and [T, V] values."""
    block = power_of_two(value_dim)
    is_wide = max(power_of_two(key_dim), block) > 64
    if dtype == torch.float32:
        # Full fp32 products keep their operands in registers.
        return LaunchConfig(16, min(32, block), 4, 1)
    if dtype == torch.float16:
        return LaunchConfig(32, min(32, block), 4, 2)
    # With silu, q, k and v pass through registers as well: 4 warps would spill them.
    return LaunchConfig(64, min(64, block), 8 if silu and is_wide else 4, 2 if is_wide else 3)


def unsupported_reason(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return why the Triton operators cannot take these inputs, None if they can.

    Args:
        q, k: [B, T, H, K].
        v: [B, T, H, V].
    """
    sizes = (q.shape[-1], k.shape[-1], v.shape[-1])
    if min(sizes) < 1 or max(sizes) > MAX_HEAD_DIM:
        return f"head sizes K = {sizes[1]}, V = {sizes[2]} are outside of 1 .. {MAX_HEAD_DIM}"
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in dtypes:
        return f"q, k, v must share one of {', '.join(map(str, dtypes))}; got {q.dtype}"
    if not q.device == k.device == v.device:
        return f"q, k, v lie on {q.device}, {k.device}, {v.device}; expected one device"
    return device_reason(q.device)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    silu: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return outputs and final states; arguments and results as in `linnet.lightning_attention`.

    Heads of at most 128, in fp32 (full fp32 products), bf16, or fp16 (tf32 products, because the
    state leaves the range of fp16). On a GPU neither slopes nor offsets are checked; tokens behind
    the last document give zeros.

    Args:
        q, k, v, decay, initial_state, cu_seqlens: as there, in any strides.
        silu: apply silu to q, k and v on load.

    Raises:
        ValueError: arguments that do not fit, or that `unsupported_reason` names.
    """
    check_inputs(q, k, v, decay, initial_state, cu_seqlens)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    state = _new_states(q, v, cu_seqlens)
    _scan(q, k, v, o, decay, cu_seqlens, initial_state, state, silu=silu)
    return o, state


def backward(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the initial state.

    Args:
        grad_o: [B, T, H, V] gradient of the outputs, in `v.dtype`.
        grad_state: [B or N, H, K, V] fp32 gradient of the final states; zeros if None.
        q, k, v, decay, initial_state, cu_seqlens: as in `forward`.
    """
    check_inputs(q, k, v, decay, initial_state, cu_seqlens)
    grad_q, grad_k, grad_v = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)
    )
    carry = _new_states(q, v, cu_seqlens)
    scan = functools.partial(_scan, decay=decay, offsets=cu_seqlens)
    initial_t = None if initial_state is None else initial_state.mT
    grad_state_t = None if grad_state is None else grad_state.mT
    # dQ sums (dO, V, K) over the past, from S^T; dK and dV sum over the future, from R^T and R.
    scan(grad_o, v, k, grad_q, carry_in=initial_t)
    scan(v, grad_o, q, grad_k, carry_in=grad_state_t, reverse=True)
    scan(k, q, grad_o, grad_v, carry_in=grad_state, carry_out=carry, reverse=True)
    return grad_q, grad_k, grad_v, carry


def _scan(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    decay: Tensor,
    offsets: Tensor | None,
    carry_in: Tensor | None,
    carry_out: Tensor | None = None,
    reverse: bool = False,
    silu: bool = False,
) -> None:
    """Scan [B, T, H, K] queries and keys and [B, T, H, V] values; fill `out` and `carry_out`."""
    num_sequences = keys.shape[0] if offsets is None else offsets.shape[0] - 1
    if not num_sequences * keys.shape[2]:
        out.zero_()
        return
    decay = decay.to(keys.device).contiguous()
    offsets = None if offsets is None else offsets.to(keys.device).contiguous()
    config = launch_config(keys.shape[3], values.shape[3], keys.dtype, silu)
    num_segments = _num_segments(keys, values, num_sequences, config)
    launch = functools.partial(
        launch_scan,
        config=config,
        decay=decay,
        offsets=offsets,
        num_sequences=num_sequences,
        num_segments=num_segments,
        reverse=reverse,
        silu=silu,
    )
    queries, keys, values = (
        with_contiguous_channels(queries),
        with_contiguous_channels(keys),
        with_contiguous_channels(values),
    )
    if num_segments == 1:
        ends = (None if carry is None else carry.unsqueeze(1) for carry in (carry_in, carry_out))
        launch(queries, keys, values, out, *ends)
        return
    heads, key_dim, value_dim = keys.shape[2], keys.shape[3], values.shape[3]
    shape = (num_sequences, num_segments, heads, key_dim, value_dim)
    carries = keys.new_empty(shape, dtype=torch.float32)
    launch(None, keys, values, None, None, carries)
    block = 1024
    grid = num_sequences * heads * -(-key_dim * value_dim // block)
    with torch.cuda.device_of(keys):
        kernels().chain_kernel[(grid,)](
            carries,
            carry_in,
            carry_out,
            decay,
            offsets,
            keys.shape[1],
            num_segments,
            heads,
            *_strides(carry_in, 4),
            *_strides(carry_out, 4),
            K=key_dim,
            V=value_dim,
            C=config.chunk_len,
            BLOCK=block,
        )
    launch(queries, keys, values, out, carries, None)


def launch_scan(
    queries: Tensor | None,
    keys: Tensor,
    values: Tensor,
    out: Tensor | None,
    carry_in: Tensor | None,
    carry_out: Tensor | None,
    *,
    config: LaunchConfig,
    decay: Tensor,
    num_sequences: int,
    offsets: Tensor | None = None,
    lengths: Tensor | None = None,
    slots: Tensor | None = None,
    num_segments: int = 1,
    reverse: bool = False,
    silu: bool = False,
    precision: Literal["ieee", "tf32", "tf32x3"] | None = None,
) -> None:
    """Launch `scan_kernel`, neither splitting nor checking anything.

    Carries are [N, segments, H, K, V], or the pool as [slots, 1, H, K, V]. With a `precision` the
    operands of all products are fp32.
    """
    heads, key_dim, value_dim = keys.shape[2], keys.shape[3], values.shape[3]
    dtype, default = product(keys.dtype, keys.device)
    if precision is not None:
        dtype = torch.float32
    blocks = -(-value_dim // config.block_v)
    with torch.cuda.device_of(keys):
        kernels().scan_kernel[(num_sequences * num_segments * heads * blocks,)](
            queries,
            keys,
            values,
            out,
            decay,
            carry_in,
            carry_out,
            offsets,
            lengths,
            slots,
            keys.shape[1],
            num_sequences,
            0 if carry_in is None else carry_in.shape[0],
            num_segments,
            heads,
            *_strides(queries, 3),
            *_strides(keys, 3),
            *_strides(values, 3),
            *_strides(out, 3),
            *_strides(carry_in, 5),
            *_strides(carry_out, 5),
            K=key_dim,
            V=value_dim,
            BLOCK_K=power_of_two(key_dim),
            BLOCK_V=config.block_v,
            C=config.chunk_len,
            REVERSE=int(reverse),
            SILU=silu,
            DTYPE=_language_dtype(dtype),
            PRECISION=precision or default,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


@functools.cache
def kernels() -> ModuleType:
    """Import the kernels, and Triton with them, when they are first needed."""
    return importlib.import_module("linnet.ops.lightning_attention.triton_kernels")


@functools.cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def device_reason(device: torch.device) -> str | None:
    """Return why Triton cannot run on a device, None if it can."""
    if not _is_installed():
        return "Triton is not installed; pip install 'linnet[gpu]'"
    if device.type == "cuda":
        return None
    if device.type != "cpu":
        return f"the kernels run on CUDA devices; got tensors on {device}"
    if isinstance(kernels().scan_kernel, kernels().triton.JITFunction):
        return "tensors on the CPU need Triton's interpreter (TRITON_INTERPRET=1)"
    return None


def check_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Raise ValueError for arguments of the operator that the kernels cannot take."""
    check_arguments(q, k, v, decay, initial_state, cu_seqlens)
    if reason := unsupported_reason(q, k, v):
        raise ValueError(f"the Triton kernels of lightning attention cannot run: {reason}")
    check_decay(decay)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        document_bounds(cu_seqlens, q.shape[1])


def _new_states(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    num = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(num, q.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)


def _num_segments(keys: Tensor, values: Tensor, num_sequences: int, config: LaunchConfig) -> int:
    """Return into how many segments to cut each sequence, so that every processor has work."""
    programs = num_sequences * keys.shape[2] * -(-values.shape[3] // config.block_v)
    processors = _num_processors(keys.device)
    if programs >= processors:
        return 1
    tokens = keys.shape[0] * keys.shape[1] // num_sequences  # per sequence, on average
    return max(1, min(-(-2 * processors // programs), tokens // MIN_SEGMENT))


def _num_processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def product(dtype: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype of the operands of products and the precision of fp32 ones."""
    if dtype == torch.float32 or device.type == "cpu":  # the interpreter has no bf16 products
        return torch.float32, "ieee"
    # A state summed over a long text leaves fp16's range; tf32 has its digits and fp32's range.
    return (torch.float32, "tf32") if dtype == torch.float16 else (dtype, "ieee")


def _language_dtype(dtype: torch.dtype) -> Any:  # Any: a type of triton, which may be absent
    return getattr(kernels().tl, str(dtype).removeprefix("torch."))


def with_contiguous_channels(x: Tensor) -> Tensor:
    """Return `x`, copied if its channels are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()[:count]


def power_of_two(size: int) -> int:
    """Return the smallest block of at least 16 that holds `size`; tensor cores take no smaller."""
    return max(16, 1 << (size - 1).bit_length())
