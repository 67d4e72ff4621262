"""Are the Triton kernels right on this GPU? Every kernel against plain torch in fp64.

`gpu.py` runs these checks before it times anything.
"""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops import lightning_attention, moe_triton
from linnet.ops.lightning_attention import triton as attention
from linnet.ops.lightning_attention import triton_decode as decoding
from linnet.ops.lightning_attention.recurrent import decode_step
from linnet.ops.lightning_attention.reference import blockwise, reference

DEVICE = "cuda"
DRAFT = 5  # tokens that are verified at a time
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 3.5e-3, torch.float16: 1e-3}
CONFIGS = [(32, 4, 3), (64, 4, 2), (64, 4, 3), (64, 8, 2), (64, 8, 3), (128, 8, 2)]


def check_shipped() -> list[dict[str, Any]]:
    """Return the errors of all kernels in the configurations that linnet uses."""
    rows = []
    for dtype in TOLERANCES:
        sizes = [(64, 64), (128, 128), (96, 40)]
        if dtype == torch.bfloat16:
            sizes += [(16, 16), (32, 32), (64, 128), (128, 64)]
        rows += [check_scan(dtype, *size) for size in sizes]
        rows.append(check_scan(dtype, 64, 64, [0, 1, 1, 130, 330]))
    # Long enough to be cut into segments.
    rows += [check_scan(torch.bfloat16, 128, 128, ends) for ends in ([0, 3300], [0, 1500, 3300])]
    rows += [check_slots(torch.float32), check_slots(torch.bfloat16)]
    rows += [check_experts(dtype, rows) for dtype in TOLERANCES for rows in (7, 300, 5000)]
    return [*rows, check_norm(), check_long_tensors()]


class configured:
    """Use one configuration for every scan of bf16 inputs."""

    def __init__(self, block_v: int, num_warps: int, num_stages: int) -> None:
        self.config = attention.LaunchConfig(64, block_v, num_warps, num_stages)

    def __enter__(self) -> None:
        self.original = attention.launch_config
        attention.launch_config = lambda *args: self.config

    def __exit__(self, *exc: object) -> None:
        attention.launch_config = self.original


def attempt(call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return what `call` does, or why it failed: a configuration may need too much memory."""
    try:
        return call()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def check_scan(
    dtype: torch.dtype, key_dim: int, value_dim: int, documents: list[int] | None = None
) -> dict[str, Any]:
    """Return the errors of outputs and all gradients against the reference in fp64."""
    heads, length = 4, 330 if documents is None else documents[-1]
    decay = torch.tensor([0.5, 0.05, 1e-3, 6e-5], device=DEVICE)
    offsets = None if documents is None else torch.tensor(documents, device=DEVICE)
    states = 1 if documents is None else len(documents) - 1
    initial = torch.randn(states, heads, key_dim, value_dim, device=DEVICE)
    inputs = (*make_qkv(1, length, heads, key_dim, value_dim, dtype), initial)
    results, upstream = [], None
    for wide in (False, True):
        leaves = [(x.double() if wide else x.clone()).requires_grad_() for x in inputs]
        q, k, v, state = leaves
        if wide:
            outputs = reference(q, k, v, decay, state, offsets, blockwise)
        else:
            outputs = lightning_attention(q, k, v, decay, state, offsets, backend="triton")
        if upstream is None:
            upstream = [torch.randn_like(x) for x in outputs]
        grads = torch.autograd.grad(
            outputs, leaves, [g.to(o.dtype) for g, o in zip(upstream, outputs, strict=True)]
        )
        results.append([*outputs, *grads])
    names = ("o", "state", "dq", "dk", "dv", "dstate")
    errors = {name: error(*pair) for name, *pair in zip(names, *results, strict=True)}
    label = f"scan K={key_dim} V={value_dim}{f', packed as {documents}' if documents else ''}"
    return checked(label, dtype, errors, TOLERANCES[dtype])


def check_slots(dtype: torch.dtype) -> dict[str, Any]:
    """Return the errors of decode, verify and commit against the decode step in fp64."""
    pool = torch.randn(6, 4, 64, 64, device=DEVICE)
    decay = torch.tensor([0.5, 0.05, 1e-3, 6e-5], device=DEVICE)
    slots = torch.tensor([4, -1, 0], device=DEVICE)
    q, k, v = make_qkv(3, DRAFT, 4, 64, 64, dtype)
    carried, expected = pool[[4, 0, 0]].double(), []
    for t in range(DRAFT):
        token = (x[:, t : t + 1].double() for x in (q, k, v))
        o, carried = decode_step(*token, decay.double(), carried)
        expected.append(o)
    kept = [0, 2]  # row 1 is skipped
    wanted, state = torch.cat(expected, 1)[kept], carried[kept]
    verified = decoding.verify_slots(q, k, v, decay, pool, slots)
    committed, stepped = pool.clone(), pool.clone()
    accepted = torch.full((3,), DRAFT, device=DEVICE)
    decoding.commit_slots(k, v, decay, committed, slots, accepted)
    tokens = [[x[:, t : t + 1] for x in (q, k, v)] for t in range(DRAFT)]
    steps = [decoding.decode_slots(*token, decay, stepped, slots) for token in tokens]
    errors = {
        "verify": error(verified[kept], wanted),
        "commit": error(committed[[4, 0]], state),
        "decode": error(torch.cat(steps, 1)[kept], wanted),
        "decode state": error(stepped[[4, 0]], state),
        "other slots": error(stepped[[1, 2, 3, 5]], pool[[1, 2, 3, 5]]),
    }
    return checked("slots", dtype, errors, TOLERANCES[dtype])


def check_experts(dtype: torch.dtype, rows: int) -> dict[str, Any]:
    """Return the errors of the expert products and their gradients against torch in fp64."""
    experts, dim, width = 5, 256, 320
    cuts = sorted(torch.randint(0, rows + 1, (experts - 1,)).tolist())
    bounds = [0, *cuts, rows]
    offsets = torch.tensor(bounds, device=DEVICE)
    x = torch.randn(rows, dim, device=DEVICE).to(dtype)
    weights = (torch.randn(experts, width, dim, device=DEVICE) / dim**0.5).to(dtype)
    grad = torch.randn(rows, width, device=DEVICE).to(dtype)
    results = []
    for wide in (False, True):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in (x, weights)]
        product = loop_product(bounds) if wide else moe_triton.grouped_linear
        y = product(*leaves, offsets)
        results.append([y, *torch.autograd.grad(y, leaves, grad.to(y.dtype))])
    names = ("y", "dx", "dw")
    errors = {name: error(*pair) for name, *pair in zip(names, *results, strict=True)}
    return checked(f"experts, {rows} rows", dtype, errors, TOLERANCES[dtype])


def loop_product(bounds: list[int]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return one product per expert, in torch."""

    def product(x: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        spans = itertools.pairwise(bounds)
        return torch.cat([x[a:b] @ w.T for (a, b), w in zip(spans, weights, strict=True)])

    return product


def check_norm() -> dict[str, Any]:
    """Return the error of norm and gate in one kernel."""
    x, gate = (torch.randn(33, 6144, device=DEVICE).bfloat16() for _ in range(2))
    weight = torch.randn(6144, device=DEVICE)
    actual = decoding.rms_norm_sigmoid_gate(x, gate, weight, 1e-6)
    wide = x.double()
    normed = wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    errors = {"y": error(actual, normed * torch.sigmoid(gate.double()))}
    return checked("norm and gate", torch.bfloat16, errors, 3.5e-3)


def check_long_tensors() -> dict[str, Any]:
    """Return the errors of the end of tensors of more than 2^31 elements against the end alone."""
    heads, dim, length, end = 64, 128, 64 * 4200, 64 * 30
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < 60e9:
        return checked("more than 2^31 elements: skipped", torch.bfloat16, {"skipped": 0.0}, 0.0)
    # exp(-1) per token: nothing of the rest reaches the end.
    decay = torch.ones(heads, device=DEVICE)
    q, k, v = make_qkv(1, length, heads, dim, dim, torch.bfloat16)
    results = []
    for x in ((q, k, v), (q[:, -end:], k[:, -end:], v[:, -end:])):
        o, state = attention.forward(*x, decay, None, None)
        grads = attention.backward(x[2], None, *x, decay, None, None, False)[:3]
        results.append([state, *(y[:, -end // 2 :].clone() for y in (o, *grads))])
    names = ("state", "o", "dq", "dk", "dv")
    errors = {name: error(*pair) for name, *pair in zip(names, *results, strict=True)}
    return checked("more than 2^31 elements", torch.bfloat16, errors, 3.5e-3)


def error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|, with a norm of at least 0.1 below the line."""
    difference = (actual.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm().clamp(min=0.1))


def checked(
    label: str, dtype: torch.dtype, errors: dict[str, float], tolerance: float
) -> dict[str, Any]:
    """Return one row of the list of checks; NaN counts as infinitely wrong."""
    worst = max(e if e == e else float("inf") for e in errors.values())
    name = str(dtype).removeprefix("torch.")
    return {
        "check": label,
        "dtype": name,
        "tolerance": tolerance,
        "worst_error": worst,
        "errors": errors,
    }


def make_qkv(
    batch: int, length: int, heads: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k, v as the model makes them, after SiLU."""

    def random(channels: int) -> Tensor:
        return F.silu(torch.randn(batch, length, heads, channels, device=DEVICE)).to(dtype)

    return random(key_dim), random(key_dim), random(value_dim)
