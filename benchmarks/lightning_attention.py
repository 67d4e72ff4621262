"""The operator alone: `linnet.lightning_attention` against the loop of transformers' layer.

    python benchmarks/lightning_attention.py [--lengths 8192 32768] [--pairs 5]

bf16, one sequence, 16 heads, K = V = 128, both on the same interleaved q, k, v and the same slopes,
in one process, in turn. Their loop runs unmodified inside their layer: its projection and
activation are identities there, and its norm ends the call, so that nothing after the loop is
timed. Outputs and gradients of both are compared with the fp64 reference before anything is timed.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from harness import alone, compare, machine_facts, write_result
from torch import Tensor, nn

from linnet import lightning_attention
from linnet.model.decay import layer_slopes
from linnet.ops.lightning_attention.reference import blockwise, reference

HEADS, DIM, NUM_LAYERS = 16, 128, 8
BLOCK_LEN = 64  # of the count of FLOPs
CHECK_LEN = 1000  # crosses their blocks of 256 and ends within one
TOLERANCE = 5e-3  # of ours: inputs, outputs and gradients are bf16, sums are fp32
# Tensors [T, H, K] that a side holds at its peak in forward + backward. Theirs keeps its blocks and
# builds a gradient as long as the input for each of them.
HELD = {"linnet": 12, "transformers": 40}

Attend = Callable[[Tensor], Tensor]
"""Maps qkv [B, T, 3 H K], interleaved by head, to outputs [B, T, H K]."""


def main() -> None:
    """Check, time every length and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768])
    parser.add_argument("--pairs", type=int, help="default: 5 up to 8192 tokens, 2 above")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    decay = layer_slopes(0, NUM_LAYERS, HEADS, "transformers")
    sides = {"linnet": our_operator(decay), "transformers": their_loop(decay)}
    errors = {name: errors_of(side, decay) for name, side in sides.items()}
    if not max(errors["linnet"].values()) <= TOLERANCE:
        raise SystemExit(f"nothing is timed before linnet's errors are small: {errors['linnet']}")
    machine = machine_facts(args.threads)
    rows = []
    for length in args.lengths:
        for mode in ("forward", "forward_backward"):
            pairs = args.pairs or (5 if length <= 8192 else 2)
            rows.append(time_length(sides, mode, length, pairs, machine))
            print(json.dumps(rows[-1], indent=2), flush=True)
    values = {
        "heads": HEADS,
        "head_dim": DIM,
        "dtype": "bfloat16",
        "errors_against_fp64": {"tokens": CHECK_LEN, **errors},
        "machine": machine,
        "rows": rows,
    }
    print(f"wrote {write_result('lightning_attention', values)}")


def our_operator(decay: Tensor) -> Attend:
    """Return linnet's operator."""

    def attend(qkv: Tensor) -> Tensor:
        return lightning_attention(*split(qkv), decay)[0].flatten(-2)

    return attend


def their_loop(decay: Tensor) -> Attend:
    """Return the loop of transformers' layer, with our slopes."""
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=HEADS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    layer = MiniMaxLightningAttention(config, 0)
    layer.slope_rate = decay[:, None, None]
    layer.query_decay, layer.key_decay, layer.diagonal_decay = layer.decay_factors(layer.slope_rate)
    layer.qkv_proj, layer.act_fn, layer.norm = nn.Identity(), nn.Identity(), _End()
    layer = layer.to(torch.bfloat16)  # decay tables too, as in a bf16 model of theirs

    def attend(qkv: Tensor) -> Tensor:
        try:
            layer(qkv, None, None)
        except _Reached as reached:
            return reached.output
        raise AssertionError("transformers' layer did not call its norm")

    return attend


class _Reached(Exception):
    def __init__(self, output: Tensor) -> None:
        self.output = output


class _End(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise _Reached(x)


def with_backward(attend: Attend) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return a function of qkv and the upstream gradient that gives output and gradient."""

    def run(qkv: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
        leaf = qkv.detach().requires_grad_()
        o = attend(leaf)
        return o.detach(), torch.autograd.grad(o, leaf, upstream)[0]

    return run


def errors_of(attend: Attend, decay: Tensor) -> dict[str, float]:
    """Return relative errors in the norm, of the outputs and of each gradient."""
    qkv, upstream = random_inputs(CHECK_LEN)

    def exact(x: Tensor) -> Tensor:
        return reference(*split(x), decay, form=blockwise)[0].flatten(-2)

    o, grad = with_backward(attend)(qkv, upstream)
    exact_o, exact_grad = with_backward(exact)(qkv.double(), upstream.double())
    errors = {"o": relative_error(o, exact_o)}
    for name, x, y in zip(("dq", "dk", "dv"), split(grad), split(exact_grad), strict=True):
        errors[name] = relative_error(x, y)
    return errors


def time_length(
    sides: dict[str, Attend], mode: str, length: int, pairs: int, machine: dict[str, Any]
) -> dict[str, Any]:
    """Time one length in one mode; a side that has too little memory is skipped, and says so."""
    qkv, upstream = random_inputs(length)
    row: dict[str, Any] = {"mode": mode, "tokens": length}

    def call(name: str) -> Callable[[], object]:
        if mode == "forward":
            return torch.no_grad()(lambda: sides[name](qkv))
        run = with_backward(sides[name])
        return lambda: run(qkv, upstream)

    missing = {name: line for name in sides if (line := memory_missing(name, mode, length))}
    if missing:
        row["skipped"] = missing
        print("\n".join(missing.values()), flush=True)
    if "linnet" in missing:
        return row
    if missing:
        row |= alone(call("linnet"), pairs)
    else:
        row |= compare(call("linnet"), call("transformers"), pairs)
        row["theirs_ms"] = 1e3 * row["theirs_s"]
    flops, num_bytes = cost(mode, length)
    return row | {
        "ours_ms": 1e3 * row["ours_s"],
        "floor_ms": 1e3 * flops / machine["matmul_peak_flops"],
        "gflop_per_s": flops / row["ours_s"] / 1e9,
        "share_of_limit": flops / row["ours_s"] / machine["matmul_peak_flops"],
        "limit": "matmul peak",
        "bytes_per_s": num_bytes / row["ours_s"],
    }


def cost(mode: str, length: int) -> tuple[float, float]:
    """Return FLOPs, with blocks of 64 counted causally, and bytes of q, k, v, o in bf16.

    A backward pass has five products for every two of the forward pass, and moves seven tensors
    for its four.
    """
    flops = length * HEADS * (2 * BLOCK_LEN * DIM + 4 * DIM * DIM)
    num_bytes = 4 * length * HEADS * DIM * 2
    return (flops, num_bytes) if mode == "forward" else (3.5 * flops, 2.75 * num_bytes)


def memory_missing(name: str, mode: str, length: int) -> str | None:
    """Return why a side cannot run here, None if it can."""
    held = 8 if mode == "forward" else HELD[name]
    needed, available = held * length * HEADS * DIM * 2, psutil.virtual_memory().available
    if needed < available:
        return None
    return (
        f"{name}, {mode} of {length} tokens: skipped, needs about {needed / 1e9:.1f} GB of memory "
        f"and {available / 1e9:.1f} GB are available"
    )


def split(qkv: Tensor) -> tuple[Tensor, ...]:
    """Return q, k, v, each [B, T, H, K]."""
    return qkv.unflatten(-1, (HEADS, 3 * DIM)).split(DIM, -1)


def random_inputs(length: int) -> tuple[Tensor, Tensor]:
    """Return qkv after SiLU, as the model makes it, and an upstream gradient, bf16."""
    generator = torch.Generator().manual_seed(length)
    qkv = F.silu(torch.randn(1, length, 3 * HEADS * DIM, generator=generator))
    return qkv.bfloat16(), torch.randn(1, length, HEADS * DIM, generator=generator).bfloat16()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|."""
    return float((actual.double() - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
