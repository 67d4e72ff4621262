"""The Triton kernels on this machine's GPU: right first, then how fast, then a whole model.

    python benchmarks/gpu.py --only attention decode --repeats 20

Writes benchmarks/results/<gpu>/gpu.json. Nothing is timed unless the configurations that linnet
ships agree with the reference in fp64. Times are those of CUDA events on random data, the sides in
turn, and their ratios are taken pair by pair. The roofline is this GPU's own: a large copy and a
large bf16 product, measured in the same run. The parts:

    configurations  errors, dK and dV among them, and times for other warps, stages and blocks
    attention       forward and backward against flash attention, fla and transformers
    decode          decode, verify, commit, norm and gate against torch
    experts         grouped products against a loop in torch
    model           training steps of a 1.2B hybrid at 32K tokens
"""

import argparse
import functools
import itertools
import json
import re
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from gpu_checks import (
    CONFIGS,
    DEVICE,
    DRAFT,
    attempt,
    check_scan,
    check_shipped,
    configured,
    loop_product,
    make_qkv,
)
from harness import RESULTS
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from linnet.model import Model, ModelConfig
from linnet.model.cost import cost_of, training_flops
from linnet.model.decay import layer_slopes
from linnet.model.init import initialize
from linnet.ops import cross_entropy, lightning_attention, moe_triton, rms_norm
from linnet.ops.lightning_attention import triton as attention
from linnet.ops.lightning_attention import triton_decode as decoding
from linnet.ops.lightning_attention.recurrent import decode_step
from linnet.train.machine import describe_machine

PARTS = ("configurations", "attention", "decode", "experts", "model")

SHAPES = [  # B, T, H, K = V
    (1, 8192, 64, 128),
    (1, 32_768, 64, 128),
    (4, 4096, 64, 128),
    (1, 32_768, 16, 128),
    (8, 2048, 16, 128),
    (8, 1024, 8, 64),
    (1, 32_768, 24, 64),
]
EAGER_TOKENS = 8192  # transformers' loop is timed up to that many tokens
DECODE_BATCHES = (1, 16, 64, 256)
DECODE_HEADS, DECODE_DIM = 64, 128
EXPERTS = [(65_536, 8, 1536, 1536), (16_384, 32, 6144, 9216), (64, 32, 6144, 9216)]  # R, E, D, F
MODEL_LENGTH = 32_768
MODEL = {
    "vocab_size": 32_768,
    "hidden_size": 1536,
    "intermediate_size": 1536,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "attn_type_list": tuple(int((layer + 1) % 8 == 0) for layer in range(16)),
    "rotary_dim": 64,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "layernorm_full_attention_alpha": 2.4,
    "layernorm_linear_attention_alpha": 2.4,
    "layernorm_mlp_alpha": 2.4,
    "max_position_embeddings": MODEL_LENGTH,
}


def main() -> None:
    """Check and time the chosen parts, and write the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help="parts to run"
    )
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each side")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA GPU; torch sees none")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    path = RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") / "gpu.json"
    values: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    values["machine"] = machine(name)
    limits = values["machine"]["copy_bytes_per_s"], values["machine"]["bf16_flops_per_s"]
    parts = {
        "checks": check_shipped,
        "configurations": lambda: try_configurations(args.repeats, limits),
        "attention": lambda: [time_shape(*shape, args.repeats, limits) for shape in SHAPES],
        "decode": lambda: time_decode(args.repeats, limits),
        "experts": lambda: time_experts(args.repeats, limits),
        "model": lambda: time_model(limits[1]),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in ("checks", *(part for part in PARTS if part in args.only)):
        values[part] = parts[part]()
        print(json.dumps({part: values[part]}, indent=2), flush=True)
        # After every part, so that a crash in a later one loses nothing.
        path.write_text(json.dumps(values, indent=2) + "\n")
        if part == "checks":
            refuse_wrong_results(values[part])
    print(f"wrote {path}")


def refuse_wrong_results(rows: list[dict[str, Any]]) -> None:
    """Exit if a shipped configuration is wrong."""
    if wrong := [row for row in rows if not row["worst_error"] <= row["tolerance"]]:
        sys.exit(f"nothing is timed before the kernels are right: {json.dumps(wrong, indent=2)}")


def machine(name: str) -> dict[str, Any]:
    """Return what the GPU is and its two limits."""
    import triton

    size = 2**31 if DEVICE == "cuda" else 2**16
    source = torch.randn(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    copy_ms = min(times([lambda: target.copy_(source)], 10)[0])
    side = 8192 if DEVICE == "cuda" else 64
    a, b = (torch.randn(side, side, device=DEVICE).bfloat16() for _ in range(2))
    product_ms = min(times([lambda: a @ b], 10)[0])
    return {
        **describe_machine(torch.bfloat16),
        "gpu": name,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "copy_bytes_per_s": 2 * source.nbytes / copy_ms * 1e3,
        "bf16_flops_per_s": 2 * side**3 / product_ms * 1e3,
    }


def times(calls: list[Callable[[], object]], repeats: int, warmup: int = 3) -> list[list[float]]:
    """Call each in turn and return their times in ms, [calls][repeats]."""
    for _, call in itertools.product(range(warmup), calls):
        call()
    marks = [[_marked(call) for call in calls] for _ in range(repeats)]
    torch.cuda.synchronize()
    return [[a.elapsed_time(b) for a, b in column] for column in zip(*marks, strict=True)]


def _marked(call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return start, end


def summary(
    ours: list[float], flops: float, num_bytes: float, limits: tuple[float, float]
) -> dict[str, float]:
    """Return the median time of a kernel and what share of the roofline it reaches."""
    ms = statistics.median(ours)
    floor_ms = max(num_bytes / limits[0], flops / limits[1]) * 1e3
    return {
        "ms": ms,
        "ms_min": min(ours),
        "ms_max": max(ours),
        "tflops": flops / ms / 1e9,
        "gb_per_s": num_bytes / ms / 1e6,
        "share_of_roofline": floor_ms / ms,
    }


def ratios(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Return their median time, and median and spread of theirs / ours."""
    pairs = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {
        "ms": statistics.median(theirs),
        "speedup": statistics.median(pairs),
        "speedup_min": min(pairs),
        "speedup_max": max(pairs),
    }


def rotating(call: Callable[..., object], inputs: list[tuple]) -> Callable[[], object]:
    """Return a function that takes the next of several inputs at each call, none from cache."""
    endless = itertools.cycle(inputs)
    return lambda: call(*next(endless))


def slopes(heads: int) -> Tensor:
    """Return the slopes of layer 0 on the GPU."""
    return layer_slopes(0, 80, heads).to(DEVICE)


# Lightning attention


def try_configurations(repeats: int, limits: tuple[float, float]) -> list[dict[str, Any]]:
    """Return errors and times of every configuration, at K = V = 64 and 128."""
    rows = []
    for dim, (block_v, warps, stages) in itertools.product((64, 128), CONFIGS):
        shape = next(shape for shape in SHAPES if shape[3] == dim)
        row = {"shape": shape, "block_v": block_v, "num_warps": warps, "num_stages": stages}
        with configured(min(block_v, dim), warps, stages):
            row |= attempt(lambda dim=dim: check_scan(torch.bfloat16, dim, dim))
            row |= attempt(lambda shape=shape: time_ours(*shape, repeats, limits))
        rows.append(row)
    return rows


def attention_cost(batch: int, length: int, heads: int, dim: int) -> tuple[float, float]:
    """Return FLOPs and bytes of a bf16 forward pass; a backward pass is 2.5 and 7/4 of them."""
    tokens = batch * length * heads
    return tokens * (4 * 64 * dim + 4 * dim * dim), tokens * 4 * dim * 2


def time_ours(
    batch: int, length: int, heads: int, dim: int, repeats: int, limits: tuple[float, float]
) -> dict[str, Any]:
    """Time our forward and backward kernels alone."""
    decay, sets = slopes(heads), input_sets(batch, length, heads, dim)
    flops, num_bytes = attention_cost(batch, length, heads, dim)
    forward = rotating(lambda q, k, v: attention.forward(q, k, v, decay, None, None), sets)
    backward = rotating(
        lambda q, k, v: attention.backward(v, None, q, k, v, decay, None, None), sets
    )
    forward_ms, backward_ms = times([forward, backward], repeats)
    return {
        "forward": summary(forward_ms, flops, num_bytes, limits),
        "backward": summary(backward_ms, 2.5 * flops, 1.75 * num_bytes, limits),
    }


def input_sets(batch: int, length: int, heads: int, dim: int) -> list[tuple]:
    """Return several q, k, v of one shape, more together than a cache holds."""
    size = 3 * batch * length * heads * dim * 2
    count = max(2, min(16, 2**28 // size))
    return [make_qkv(batch, length, heads, dim, dim, torch.bfloat16) for _ in range(count)]


def time_shape(
    batch: int, length: int, heads: int, dim: int, repeats: int, limits: tuple[float, float]
) -> dict[str, Any]:
    """Time one shape against every peer that is there."""
    decay, sets = slopes(heads), input_sets(batch, length, heads, dim)
    row: dict[str, Any] = {"shape": (batch, length, heads, dim), "dtype": "bfloat16"}
    row |= time_ours(batch, length, heads, dim, repeats, limits)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return lightning_attention(q, k, v, decay, backend="triton")[0]

    qkv = [(torch.cat(three, -1),) for three in sets[:2]]

    def on_load(x: Tensor) -> object:
        return attention.forward(*x.split(dim, -1), decay, None, None, silu=True)

    fused = rotating(on_load, qkv)

    def apart(x: Tensor) -> object:
        return attention.forward(*F.silu(x).split(dim, -1), decay, None, None)

    row["silu before"] = ratios(*times([fused, rotating(apart, qkv)], repeats))
    for name, (peer, arrange) in peers(heads, dim, length, decay).items():
        theirs = [tuple(arrange(x) for x in three) for three in sets]
        pair = [rotating(ours, sets), rotating(peer, theirs)]
        both = [rotating(with_backward(ours), sets), rotating(with_backward(peer), theirs)]
        row[name] = attempt(
            lambda pair=pair, both=both: {
                "forward": ratios(*times(pair, repeats)),
                "forward and backward": ratios(*times(both, repeats)),
            }
        )
    return row


def with_backward(call: Callable[..., Tensor]) -> Callable[..., object]:
    """Return `call` followed by its backward pass, on leaves of its own."""

    def run(*inputs: Tensor) -> object:
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = call(*leaves)
        return torch.autograd.grad(o, leaves, o.detach())

    return run


def peers(
    heads: int, dim: int, length: int, decay: Tensor
) -> dict[str, tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]]:
    """Return other implementations: a function of q, k, v, and how they must be laid out."""

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    found = {"torch flash attention": (flash, lambda x: x.transpose(1, 2).contiguous())}
    try:
        from fla.ops.simple_gla import chunk_simple_gla
    except ImportError:
        pass
    else:
        found["flash-linear-attention"] = (
            lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=-decay, scale=1)[0],
            lambda x: x,
        )
    if length <= EAGER_TOKENS:
        found["transformers loop"] = (eager_loop(heads, dim), lambda x: x)
    return found


def eager_loop(heads: int, dim: int) -> Callable[..., Tensor]:
    """Return the attention loop of transformers' layer, its projections and norm taken out."""
    from transformers.models.minimax.configuration_minimax import MiniMaxConfig
    from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

    config = MiniMaxConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=dim,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
    )
    layer = MiniMaxLightningAttention(config, 0)
    for name in ("qkv_proj", "norm", "out_proj", "act_fn"):
        setattr(layer, name, nn.Identity())
    layer = layer.to(DEVICE, torch.bfloat16)
    opened = torch.full((), 100.0, device=DEVICE, dtype=torch.bfloat16)
    layer.output_gate = _Constant(opened)  # its sigmoid is 1

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return layer(torch.cat((q, k, v), -1).flatten(2), None, None)[0]

    return run


class _Constant(nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return self.value


# Decoding


@torch.no_grad()
def time_decode(repeats: int, limits: tuple[float, float]) -> list[dict[str, Any]]:
    """Time a decode step, drafts and the norm, at several batch sizes."""
    return [attempt(lambda b=b: time_batch(b, repeats, limits)) for b in DECODE_BATCHES]


def time_batch(batch: int, repeats: int, limits: tuple[float, float]) -> dict[str, Any]:
    """Time one batch size; the pool is larger than the cache, and slots change at every call."""
    heads, dim, decay = DECODE_HEADS, DECODE_DIM, slopes(DECODE_HEADS)
    num_slots = max(64, 2 * batch)
    pool = torch.randn(num_slots, heads, dim, dim, device=DEVICE)
    qkv = make_qkv(batch, DRAFT, heads, dim, dim, torch.bfloat16)
    token = [x[:, :1] for x in qkv]
    orders = [torch.randperm(num_slots, device=DEVICE)[:batch] for _ in range(8)]
    accepted = torch.randint(1, DRAFT + 1, (batch,), device=DEVICE)
    decode = rotating(
        lambda slots: decoding.decode_slots(*token, decay, pool, slots), [(s,) for s in orders]
    )

    def unfused(slots: Tensor) -> None:
        _, pool[slots] = decode_step(*token, decay, pool[slots])

    calls = [
        decode,
        rotating(unfused, [(s,) for s in orders]),
        graphed(lambda: decoding.decode_slots(*token, decay, pool, orders[0])),
        rotating(lambda s: decoding.verify_slots(*qkv, decay, pool, s), [(s,) for s in orders]),
        rotating(
            lambda s: decoding.commit_slots(*qkv[1:], decay, pool, s, accepted),
            [(s,) for s in orders],
        ),
    ]
    ours, torch_ms, graph_ms, verify_ms, commit_ms = times(calls, repeats)
    state = batch * heads * dim * dim
    return {
        "batch": batch,
        "heads": heads,
        "dim": dim,
        "decode": summary(ours, 4 * state, 8 * state, limits),
        "decode in a graph, one set of slots": summary(graph_ms, 4 * state, 8 * state, limits),
        "torch": ratios(ours, torch_ms),
        f"verify {DRAFT}": summary(verify_ms, 4 * state * DRAFT, 4 * state, limits),
        f"commit up to {DRAFT}": summary(commit_ms, 2 * state * DRAFT, 8 * state, limits),
        "norm and gate": time_norm(batch, heads * dim, repeats),
    }


def time_norm(rows: int, width: int, repeats: int) -> dict[str, float]:
    """Time the fused norm and gate against separate operators."""
    x, gate = (torch.randn(rows, width, device=DEVICE).bfloat16() for _ in range(2))
    weight = torch.randn(width, device=DEVICE).bfloat16()
    fused, apart = times(
        [
            lambda: decoding.rms_norm_sigmoid_gate(x, gate, weight, 1e-6),
            lambda: rms_norm(x, weight, 1e-6) * torch.sigmoid(gate),
        ],
        repeats,
    )
    return {"ours_ms": statistics.median(fused), **ratios(fused, apart)}


def graphed(call: Callable[[], object]) -> Callable[[], object]:
    """Return `call` as a CUDA graph, without the time of the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


# Experts


def time_experts(repeats: int, limits: tuple[float, float]) -> list[dict[str, Any]]:
    """Time SwiGLU experts, forward and backward, against one product per expert."""
    rows = []
    for shape in EXPERTS:
        rows.append(attempt(lambda shape=shape: time_ffn(*shape, repeats, limits)))
        torch.cuda.empty_cache()
    return rows


def time_ffn(
    num_rows: int, experts: int, dim: int, width: int, repeats: int, limits: tuple[float, float]
) -> dict[str, Any]:
    """Time one shape; the rows are spread over the experts at random."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    counts = torch.bincount(torch.randint(0, experts, (num_rows,)), minlength=experts)
    bounds = [0, *counts.cumsum(0).tolist()]
    offsets = torch.tensor(bounds, device=DEVICE)
    x, grad = random(num_rows, dim), random(num_rows, dim)
    gate_up, down = random(experts, 2 * width, dim) / dim**0.5, random(experts, dim, width)
    hidden = moe_triton.ffn_forward(x, gate_up, down, offsets)[1]
    product = loop_product(bounds)

    def loop() -> Tensor:
        gate, up = product(x, gate_up, offsets).chunk(2, -1)
        return product(F.silu(gate) * up, down, offsets)

    def loop_backward() -> object:
        leaves = [t.detach().requires_grad_() for t in (x, gate_up, down)]
        gate, up = product(leaves[0], leaves[1], offsets).chunk(2, -1)
        y = product(F.silu(gate) * up, leaves[2], offsets)
        return torch.autograd.grad(y, leaves, grad)

    def ours_backward() -> object:
        y, kept = moe_triton.ffn_forward(x, gate_up, down, offsets)
        return moe_triton.ffn_backward(grad, x, kept, gate_up, down, offsets), y

    forward = functools.partial(moe_triton.ffn_forward, x, gate_up, down, offsets)
    backward = functools.partial(moe_triton.ffn_backward, grad, x, hidden, gate_up, down, offsets)
    ours, theirs, alone, both, their_both = times(
        [forward, loop, backward, ours_backward, loop_backward], repeats
    )
    flops = 6 * num_rows * dim * width
    weight_bytes = gate_up.nbytes + down.nbytes
    row_bytes = 2 * x.nbytes + 3 * hidden.nbytes  # x, y; hidden twice, activations twice
    return {
        "rows": num_rows,
        "experts": experts,
        "dim": dim,
        "width": width,
        "forward": summary(ours, flops, weight_bytes + row_bytes, limits),
        "backward": summary(alone, 2 * flops, 2 * weight_bytes + 2 * row_bytes, limits),
        "torch loop": {
            "forward": ratios(ours, theirs),
            "forward and backward": ratios(both, their_both),
        },
    }


# A whole model


def time_model(peak: float, steps: int = 5) -> dict[str, Any]:
    """Time training steps, optimizer included, of a hybrid of a billion parameters.

    MFU counts the FLOPs of forward and backward as `linnet.model.cost` does, over the measured
    rate of a large bf16 product.
    """
    config = ModelConfig(**MODEL)
    with torch.device(DEVICE):
        model = Model(config, compute_dtype=torch.bfloat16).to(DEVICE)
    initialize(model, torch.Generator(DEVICE).manual_seed(0)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    length = config.max_position_embeddings
    batches = itertools.cycle(
        [torch.randint(config.vocab_size, (1, length + 1), device=DEVICE) for _ in range(4)]
    )

    def step() -> None:
        tokens = next(batches)
        hidden, _ = model.hidden_states(tokens[:, :-1])
        loss = cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, tokens[0, 1:])
        (loss / length).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    torch.cuda.reset_peak_memory_stats()
    (measured,) = times([step], steps, warmup=2)
    seconds = statistics.median(measured) / 1e3
    flops = training_flops(config, length)
    return {
        "params": cost_of(config).params_total,
        "params_active": cost_of(config).params_active,
        "tokens": length,
        "parameters": "float32",
        "activations": "bfloat16",
        "ms": seconds * 1e3,
        "ms_min": min(measured),
        "ms_max": max(measured),
        "tokens_per_s": length / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu_of_measured_peak": flops / seconds / peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
    }


if __name__ == "__main__":
    main()
