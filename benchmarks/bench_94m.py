"""linnet against transformers on one model and the same weights: training, prefill, decode.

    python benchmarks/bench_94m.py [--dtype bfloat16] [--pairs 5] [--lengths 2048 8192 32768]

Both run in one process, in turn. The model is the preset `bench-94m` with whole-head rotary and
transformers' slopes, since its class has no other. Logits are compared in fp32 before anything is
timed. Peak memory is that of a process that runs one side alone.

Each row says what share of this machine's limit linnet reaches. For training and prefill that is
the rate of a large product, with FLOPs as `linnet.model.cost` counts them; for decode the rate of
reading memory, with the bytes of the weights that a step needs.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, compare, device_name, machine_facts, write_result

from linnet.model import Model, preset
from linnet.model.config import SOFTMAX
from linnet.model.cost import prefill_flops, training_flops
from linnet.model.init import initialize
from linnet.model.weights import build_model, load_model
from linnet.ops import cross_entropy
from linnet.train.machine import return_freed_tensors

BATCH, LENGTH, PREFILL, CONTEXT, STEPS = 4, 1024, 8192, 256, 16
LENGTHS = (2048, 8192, 32_768)
SEQUENCES = 16
PARTS = ("training", "prefill", "prefill_lengths", "decode", "decode_16", "decode_int8", "memory")
TRAINING_PAIRS, PAIRS = 3, 5  # a pair of training steps takes half a minute


def main() -> None:
    """Run the comparison, or one side's memory measurement."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--pairs", type=int, help="default: 3 of training, 5 of everything else")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="of prefill alone")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, help="the rest of the file stays"
    )
    parser.add_argument("--memory-of", choices=("linnet", "transformers"))
    parser.add_argument("--folder")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(peak_memory(args.memory_of, args.folder, args.dtype)))
        return
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder) / "model")
        values = run(Path(folder) / "model", args)
    name = f"bench_94m_{args.dtype}"
    path = RESULTS / device_name() / f"{name}.json"
    if len(args.only) < len(PARTS) and path.exists():
        values = json.loads(path.read_text()) | values
    path = write_result(name, values)
    print(json.dumps(values, indent=2))
    print(f"wrote {path}")


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Check, then time every mode."""
    agreement = logit_difference(folder)
    if agreement > 1e-4:
        raise SystemExit(f"logits differ by {agreement}; nothing is timed before they agree")
    ours, theirs = load_ours(folder, args.dtype), load_theirs(folder, args.dtype)
    machine = machine_facts(args.threads)
    values: dict[str, Any] = {
        "model": "bench-94m",
        "dtype": args.dtype,
        "fp32_logit_difference": agreement,
        "machine": machine,
    }
    if "training" in args.only:
        values["training"] = time_training(ours, theirs, args.pairs or TRAINING_PAIRS, machine)
    ours.eval(), theirs.eval()
    pairs = args.pairs or PAIRS
    timers = {
        "prefill": lambda: time_prefill(ours, theirs, pairs, machine),
        "prefill_lengths": lambda: time_lengths(ours, args.lengths, pairs, machine),
        "decode": lambda: time_decode(ours, theirs, pairs, machine),
        "decode_16": lambda: time_sequences(ours, pairs, machine),
        "decode_int8": lambda: time_int8(int8(folder, args.dtype), ours, theirs, pairs, machine),
    }
    with torch.inference_mode():
        for part, timer in timers.items():
            if part in args.only:
                values[part] = timer()
    return values | (compare_memory(folder, args) if "memory" in args.only else {})


def time_int8(
    small: Model, ours: Model, theirs: Any, pairs: int, machine: dict[str, Any]
) -> dict[str, Any]:  # Any: transformers is untyped here
    """Time greedy steps with int8 weights, and compare their logits."""
    difference = relative_logit_difference(small, ours)
    row = time_decode(small, theirs, pairs, machine)
    return {**row, "relative_logit_difference": difference}


def time_training(
    ours: Model, theirs: Any, pairs: int, machine: dict[str, Any]
) -> dict[str, Any]:  # Any: transformers is untyped here
    """Time forward and backward passes."""
    row = per_second(
        compare(training_step(ours), their_training_step(theirs), pairs), BATCH * LENGTH
    )
    flops = training_flops(ours.config, LENGTH) / LENGTH
    return row | of_products(flops * row["ours_tokens_per_s"], machine)


def time_prefill(
    ours: Model, theirs: Any, pairs: int, machine: dict[str, Any]
) -> dict[str, Any]:  # Any: transformers is untyped here
    """Time one prompt from an empty cache to the logits of its last token."""
    tokens = random_tokens(1, PREFILL)
    row = per_second(
        compare(
            lambda: ours(tokens, cache=ours.new_cache(), logits_to_keep=1),
            lambda: theirs(tokens, use_cache=True, logits_to_keep=1),
            pairs,
        ),
        PREFILL,
    )
    return row | of_products(prefill_flops(ours.config, PREFILL) / row["ours_s"], machine)


def time_lengths(
    model: Model, lengths: list[int], repeats: int, machine: dict[str, Any]
) -> dict[str, Any]:
    """Time our prefill alone at several lengths, in turn, with the softmax layers' operator apart.

    `flatness` is the slowest over the fastest length's tokens/s outside of that operator.
    """
    prefill_seconds(model, min(lengths))  # warm-up
    seconds: dict[int, list[tuple[float, float]]] = {length: [] for length in lengths}
    for _, (length, runs) in itertools.product(range(repeats), seconds.items()):
        runs.append(prefill_seconds(model, length))
    rows = []
    for length, runs in seconds.items():
        total_s, softmax_s = (statistics.median(column) for column in zip(*runs, strict=True))
        row = {
            "tokens": length,
            "ours_s": total_s,
            "ours_s_min": min(total for total, _ in runs),
            "ours_s_max": max(total for total, _ in runs),
            "ours_tokens_per_s": length / total_s,
            "softmax_share": softmax_s / total_s,
            "tokens_per_s_without_softmax": length / (total_s - softmax_s),
        }
        flops = prefill_flops(model.config, length)
        rows.append(row | of_products(flops / total_s, machine))
    speeds = [row["tokens_per_s_without_softmax"] for row in rows]
    return {"repeats": repeats, "rows": rows, "flatness": min(speeds) / max(speeds)}


def prefill_seconds(model: Model, length: int) -> tuple[float, float]:
    """Return the seconds of one prefill, and of the softmax layers' operator within it."""
    tokens, spent = random_tokens(1, length), [0.0]
    layers = [
        layer.self_attn
        for layer, kind in zip(model.layers, model.config.attn_type_list, strict=True)
        if kind == SOFTMAX
    ]
    originals = [layer.attend for layer in layers]
    for layer, attend in zip(layers, originals, strict=True):
        layer.attend = timed(attend, spent)
    start = time.perf_counter()
    model(tokens, cache=model.new_cache(), logits_to_keep=1)
    total_s = time.perf_counter() - start
    for layer, attend in zip(layers, originals, strict=True):
        layer.attend = attend
    return total_s, spent[0]


def timed(function: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """Return `function`, adding its seconds to `spent[0]`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = function(*args, **kwargs)
        spent[0] += time.perf_counter() - start
        return result

    return run


def time_decode(
    ours: Model, theirs: Any, pairs: int, machine: dict[str, Any]
) -> dict[str, Any]:  # Any: transformers is untyped here
    """Time greedy steps of one sequence."""
    row = per_second(compare(decode_loop(ours), their_decode_loop(theirs), pairs), STEPS)
    return row | of_reading(weight_bytes(ours, 1), row["ours_s"], machine)


def time_sequences(model: Model, pairs: int, machine: dict[str, Any]) -> dict[str, Any]:
    """Time greedy steps of sixteen sequences against one sequence of the same model."""
    row = compare(decode_loop(model, SEQUENCES), decode_loop(model), pairs)
    return {
        "sequences": SEQUENCES,
        "ours_tokens_per_s": SEQUENCES * STEPS / row["ours_s"],
        "one_sequence_tokens_per_s": STEPS / row["theirs_s"],
        "ours_s": row["ours_s"],
        "one_sequence_s": row["theirs_s"],
        **{f"speedup{end}": SEQUENCES * row[f"speedup{end}"] for end in ("", "_min", "_max")},
        "pairs": pairs,
        **of_reading(weight_bytes(model, SEQUENCES), row["ours_s"], machine),
    }


def int8(folder: Path, dtype: str) -> Model:
    """Return linnet's model with int8 weights."""
    from linnet.model.quantize import quantize_int8

    return quantize_int8(load_ours(folder, dtype))


def of_products(flops_per_s: float, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the share of the measured rate of a large product."""
    share = flops_per_s / machine["matmul_peak_flops"]
    return {"share_of_limit": share, "limit": "matmul peak"}


def of_reading(step_bytes: float, seconds: float, machine: dict[str, Any]) -> dict[str, Any]:
    """Return the share of the measured rate of reading memory; above 1 a cache holds weights."""
    share = step_bytes * STEPS / seconds / machine["read_bytes_per_s"]
    return {"weight_bytes_per_step": step_bytes, "share_of_limit": share, "limit": "memory reads"}


def weight_bytes(model: Model, num_rows: int) -> float:
    """Return the bytes of the weights that one step of `num_rows` tokens reads.

    Of the experts that is the expected number if each token chooses at random.
    """
    config = model.config
    missed = (1 - config.num_experts_per_tok / config.num_local_experts) ** num_rows
    total = 0.0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith("embed_tokens"):
            total += tensor.nbytes * (1 - missed if ".experts." in name else 1)
    return total


def compare_memory(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the peak memory of training on each side, in a process of its own."""
    values: dict[str, Any] = {}
    for side in ("linnet", "transformers"):
        command = [sys.executable, __file__, "--memory-of", side, "--folder", str(folder)]
        command += ["--dtype", args.dtype, "--threads", str(args.threads)]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        values[f"training_peak_bytes_{side}"] = json.loads(output)
    memory = values["training_peak_bytes_linnet"], values["training_peak_bytes_transformers"]
    values["training_memory_ratio"] = memory[0]["peak"] / memory[1]["peak"]
    values["training_memory_ratio_above_weights"] = memory[0]["above"] / memory[1]["above"]
    return values


def save_weights(folder: Path) -> None:
    """Write random weights that both sides read."""
    base = preset("bench-94m")
    config = dataclasses.replace(base, rotary_dim=base.head_dim, slope_rule="transformers")
    model = build_model(config, torch.float32, "cpu")
    initialize(model, torch.Generator().manual_seed(0)).save(folder, dialect="transformers")


def load_ours(folder: Path | str, dtype: str) -> Model:
    """Return linnet's model."""
    return load_model(folder, dtype=dtype)


def load_theirs(folder: Path | str, dtype: str) -> Any:  # Any: transformers is untyped here
    """Return transformers' model, with the decay tables that no checkpoint needs to hold."""
    from transformers import AutoConfig, MiniMaxForCausalLM

    config = AutoConfig.from_pretrained(folder)
    model = MiniMaxForCausalLM(config)
    reference = load_model(folder, dtype="float32")
    weights = {}
    for name, value in reference.named_parameters():
        name = name if name == "lm_head.weight" else f"model.{name}"
        name = name.replace("block_sparse_moe", "mlp")
        name = name.replace("experts.gate_up", "experts.gate_up_proj")
        weights[name.replace("experts.down", "experts.down_proj")] = value
    missing, extra = model.load_state_dict(weights, strict=False)
    assert not extra and all("decay" in name or "slope_rate" in name for name in missing)
    return model.to(getattr(torch, dtype)).eval()


def logit_difference(folder: Path) -> float:
    """Return the largest difference of fp32 logits over a prefill that crosses blocks."""
    tokens = random_tokens(1, 600)
    with torch.inference_mode():
        ours = load_ours(folder, "float32")(tokens)
        theirs = load_theirs(folder, "float32")(tokens, use_cache=False).logits
    return float((ours - theirs).abs().max())


def relative_logit_difference(model: Model, exact: Model) -> float:
    """Return how far the logits of two of our models are apart, as a share of their norm."""
    tokens = random_tokens(1, 600)
    expected = exact(tokens)
    return float((model(tokens) - expected).norm() / expected.norm())


def training_step(model: Model) -> Callable[[], None]:
    """Return one forward and backward pass over B = 4, T = 1024."""
    model.train()
    tokens = random_tokens(BATCH, LENGTH + 1)

    def step() -> None:
        hidden, _ = model.hidden_states(tokens[:, :-1])
        targets = tokens[:, 1:].reshape(-1)
        loss = cross_entropy(hidden.flatten(0, 1), model.lm_head.weight, targets)
        (loss / len(targets)).backward()
        model.zero_grad(set_to_none=True)

    return step


def their_training_step(model: Any) -> Callable[[], None]:  # Any: transformers is untyped here
    """Return the same pass with transformers."""
    model.train()
    tokens = random_tokens(BATCH, LENGTH)

    def step() -> None:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return step


def decode_loop(model: Model, batch: int = 1) -> Callable[[], None]:
    """Return a loop of greedy steps after a prefill that is done once."""
    cache = model.new_cache(batch)
    model(random_tokens(batch, CONTEXT), cache=cache, logits_to_keep=1)
    start = cache.snapshot()

    def loop() -> None:
        cache.restore(start)
        token = torch.ones(batch, 1, dtype=torch.int64)
        for _ in range(STEPS):
            token = model(token, cache=cache, logits_to_keep=1)[:, -1].argmax(-1, keepdim=True)

    return loop


def their_decode_loop(model: Any) -> Callable[[], None]:  # Any: transformers is untyped here
    """Return the same loop with transformers; its cache cannot go back, so it grows."""
    output = model(random_tokens(1, CONTEXT), use_cache=True, logits_to_keep=1)
    past = output.past_key_values
    position = CONTEXT

    def loop() -> None:
        nonlocal past, position
        token = torch.tensor([[1]])
        for _ in range(STEPS):
            # Positions are given: its cache counts none when layer 0 is a lightning layer.
            output = model(
                token, past_key_values=past, position_ids=torch.tensor([[position]]), use_cache=True
            )
            past, position = output.past_key_values, position + 1
            token = output.logits[:, -1].argmax(-1, keepdim=True)

    return loop


def peak_memory(side: str, folder: str, dtype: str) -> dict[str, int]:
    """Return the peak bytes of three training steps, in all and above the loaded weights."""
    if side == "linnet":
        return_freed_tensors()  # as `linnet train` does
        step = training_step(load_ours(folder, dtype))
    else:
        step = their_training_step(load_theirs(folder, dtype))
    before = _status_bytes("VmRSS")
    for _ in range(3):
        step()
    peak = _status_bytes("VmHWM")
    return {"peak": peak, "above": peak - before}


def per_second(values: dict[str, float], tokens: int) -> dict[str, float]:
    """Add tokens per second to a comparison."""
    speeds = {f"{side}_tokens_per_s": tokens / values[f"{side}_s"] for side in ("ours", "theirs")}
    return speeds | values


def random_tokens(batch: int, length: int) -> torch.Tensor:
    """Return [batch, length] ids."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, preset("bench-94m").vocab_size, (batch, length), generator=generator)


def _status_bytes(key: str) -> int:
    # Not ru_maxrss, which starts at what the parent process held.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main()
