"""linnet against transformers on one model and the same weights: training, prefill, decode.

    python benchmarks/bench_94m.py [--dtype bfloat16] [--pairs 5]

Both run in one process, in turn. The model is the preset `bench-94m` with whole-head rotary and
transformers' slopes, since its class has no other. Logits are compared in fp32 before anything is
timed. Peak memory is that of a process that runs one side alone.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import compare, machine_facts, write_result

from linnet.model import Model, preset
from linnet.model.init import initialize
from linnet.model.weights import build_model, load_model
from linnet.ops import cross_entropy

BATCH, LENGTH, PREFILL, CONTEXT, STEPS = 4, 1024, 8192, 256, 16


def main() -> None:
    """Run the comparison, or one side's memory measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
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
    path = write_result(f"bench_94m_{args.dtype}", values)
    print(json.dumps(values, indent=2))
    print(f"wrote {path}")


def run(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Check, then time all three modes."""
    agreement = logit_difference(folder)
    if agreement > 1e-4:
        raise SystemExit(f"logits differ by {agreement}; nothing is timed before they agree")
    ours, theirs = load_ours(folder, args.dtype), load_theirs(folder, args.dtype)
    values: dict[str, Any] = {
        "model": "bench-94m",
        "dtype": args.dtype,
        "fp32_logit_difference": agreement,
        "machine": machine_facts(args.threads),
    }
    values["training"] = per_second(
        compare(training_step(ours), their_training_step(theirs), args.pairs), BATCH * LENGTH
    )
    ours.eval(), theirs.eval()
    tokens = random_tokens(1, PREFILL)
    with torch.inference_mode():
        values["prefill"] = per_second(
            compare(
                lambda: ours(tokens, cache=ours.new_cache(), logits_to_keep=1),
                lambda: theirs(tokens, use_cache=True, logits_to_keep=1),
                args.pairs,
            ),
            PREFILL,
        )
        values["decode"] = per_second(
            compare(decode_loop(ours), their_decode_loop(theirs), args.pairs), STEPS
        )
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


def decode_loop(model: Model) -> Callable[[], None]:
    """Return a loop of greedy steps after a prefill that is done once."""
    cache = model.new_cache()
    model(random_tokens(1, CONTEXT), cache=cache, logits_to_keep=1)
    start = cache.snapshot()

    def loop() -> None:
        cache.restore(start)
        token = torch.tensor([[1]])
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
