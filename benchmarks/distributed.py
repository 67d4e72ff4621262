"""What ranks gain and what they exchange: a training step on 1 and P, LASP+ beside LASP, bytes.

    python benchmarks/distributed.py [--only scaling prefill lasp traffic] [--quick]
    torchrun --nproc-per-node 8 benchmarks/distributed.py

Started plainly, it starts gloo processes of one thread each on this machine: 2 for the training
step and the prompt, 4 for the rest. Started by torchrun it takes that job's ranks for everything;
with GPUs that means NCCL, a GPU per rank and bf16.

- scaling: forward, loss, backward and the sum of gradients over one row of 32,768 tokens that form
  one document, on rank 0 alone and on all ranks, in turn in one run.
- prefill: a prompt of as many tokens through the engine's runner, on rank 0 alone and on all ranks,
  which share the prompt and its keys and values.
- lasp: the attention operator alone, forward and backward. Between gloo processes messages are
  delayed, which is an emulation of links: nothing arrives sooner than the delay after it was sent,
  and the bandwidth is that of memory. With NCCL the links are the machine's own.
- traffic: bytes that a rank receives for one lightning layer, counted, beside the formula.

Loss, gradients, logits and both operators are compared with one process before anything is timed.
Writes results/<device>/distributed.json; --quick runs small sizes and writes nothing.
"""

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import RESULTS, device_name, machine_facts, ratio
from lasp import Lasp
from ranks import (
    Values,
    all_ranks,
    dtype_on,
    model_of,
    over_ranks,
    say,
    together,
    within_tolerance,
)
from shared_prompt import prefill
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from linnet import ops
from linnet.model import Model, preset
from linnet.ops import cross_entropy, load_balancing_loss
from linnet.ops.cross_entropy import IGNORE
from linnet.parallel import collectives, exchange
from linnet.parallel.balance import share_stats
from linnet.parallel.collectives import Pending
from linnet.parallel.context import ContextParallel
from linnet.parallel.exchange import StateExchange
from linnet.parallel.sequence import LightningAcrossRanks
from linnet.parallel.split import split_row
from linnet.parallel.traffic import Traffic
from linnet.train.machine import describe_machine

GLOO_RANKS = {"scaling": 2, "prefill": 2, "lasp": 4, "traffic": 4}
SPLITS = {"contiguous": False, "balanced": True}
AUX_COEFFICIENT = 0.01
DELAYS_MS = (0.0, 5.0, 20.0)
HEADS, HEAD_DIM, LASP_TOKENS = 2, 64, 2048
TRAFFIC_TOKENS = (4096, 8192, 16_384, 32_768)
TIMEOUT = timedelta(hours=1)  # ranks wait while one of them computes alone

Row = tuple[Tensor, Tensor, Tensor]
"""Tokens [1, T], targets [1, T] and the offsets of the documents."""


def main() -> None:
    """Measure in processes of our own, or as one rank of a job."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=GLOO_RANKS, default=list(GLOO_RANKS))
    parser.add_argument("--preset", default="nano", help="of the training step and the prompt")
    parser.add_argument("--tokens", type=int, default=32_768, help="of the row, and of the prompt")
    parser.add_argument("--pairs", type=int, default=5, help="of training steps, and of prompts")
    parser.add_argument("--repeats", type=int, default=20, help="of the operators, per delay")
    parser.add_argument("--quick", action="store_true", help="small sizes; writes nothing")
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.pairs, args.repeats = 2048, 2, 3
    if "TORCHELASTIC_RUN_ID" in os.environ:
        as_job_rank(args)
        return
    torch.set_num_threads(1)  # as in each of the processes
    values: Values = {"machine": machine_facts(1), "backend": "gloo", "threads_per_process": 1}
    for part in args.only:
        values[part] = in_processes(part, args)
        save(values, device_name(), args.quick)


def as_job_rank(args: argparse.Namespace) -> None:
    """Measure as one rank of a job that torchrun started."""
    local_rank = int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=TIMEOUT)
    name, machine = device_name(), dict(describe_machine(dtype_on(device)))
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name()
        name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
        machine |= {"gpu": gpu, "num_gpus": dist.get_world_size()}
    values: Values = {"machine": machine, "backend": backend}
    for part in args.only:
        values[part] = measure(part, device, args)
        if dist.get_rank() == 0:
            save(values, name, args.quick)
    dist.barrier()
    dist.destroy_process_group()


def in_processes(part: str, args: argparse.Namespace) -> Values:
    """Measure a part in gloo processes of one thread each."""
    with tempfile.TemporaryDirectory() as folder:
        num_ranks = GLOO_RANKS[part]
        spawn(_process, (num_ranks, part, Path(folder), args), nprocs=num_ranks)
        return json.loads((Path(folder) / "values.json").read_text())


def _process(rank: int, num_ranks: int, part: str, folder: Path, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group(
        "gloo", init_method=store, rank=rank, world_size=num_ranks, timeout=TIMEOUT
    )
    values = measure(part, torch.device("cpu"), args)
    if rank == 0:
        (folder / "values.json").write_text(json.dumps(values))
    dist.barrier()
    dist.destroy_process_group()


def measure(part: str, device: torch.device, args: argparse.Namespace) -> Values:
    """Return the values of one part; the same work on all ranks, figures of rank 0."""
    functions = {
        "scaling": scaling,
        "prefill": prefill,
        "lasp": lasp_plus_against_lasp,
        "traffic": traffic,
    }
    return {"ranks": dist.get_world_size(), **functions[part](device, args)}


def save(values: Values, device: str, is_quick: bool) -> None:
    """Write what there is so far; parts that were not measured stay as they were."""
    if is_quick:
        print(json.dumps(values, indent=2))
        return
    path = RESULTS / device / "distributed.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | values, indent=2) + "\n")
    print(f"wrote {path}", flush=True)


# --- the training step ---


def scaling(device: torch.device, args: argparse.Namespace) -> Values:
    """Time a training step on rank 0 alone and on all ranks, in both splits."""
    difference = check_model(args.preset, device)
    say(f"loss and gradients agree with one process to {difference:.1e}")
    dtype = dtype_on(device)
    row = one_document(args.tokens, preset(args.preset).vocab_size, device)
    alone = model_of(args.preset, dtype, device)
    shared = {name: parallel_model(args.preset, dtype, device, x) for name, x in SPLITS.items()}
    sides: dict[str, Callable[[], object]] = {
        "one": lambda: dist.get_rank() or step(alone, None, row),
        **{name: partial(step, *pair, row) for name, pair in shared.items()},
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    busy_s: dict[str, list[float]] = {name: [] for name in sides}
    for pair in range(args.pairs + 1):
        for name, side in sides.items():
            start = time.process_time()
            seconds[name].append(together(side, device))
            busy_s[name].append(over_ranks(time.process_time() - start, device))
        latest = ", ".join(f"{name} {times[-1]:.2f} s" for name, times in seconds.items())
        say(f"{f'pair {pair} of {args.pairs}' if pair else 'warm-up'}: {latest}")
    return {
        "model": args.preset,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": args.tokens,
        "documents": 1,
        "largest_relative_difference": difference,
        "processor_s_is": "processor time of the busiest rank; what it waits for does not count",
        "one_processor_s": statistics.median(busy_s["one"][1:]),
        **{
            name: ratio(seconds[name][1:], seconds["one"][1:])
            | {"ours_processor_s": statistics.median(busy_s[name][1:])}
            for name in SPLITS
        },
    }


def step(model: Model, parallel: ContextParallel | None, row: Row) -> Tensor:
    """Run one training step but for the optimizer, and return this rank's part of the loss."""
    model.zero_grad()
    tokens, targets, cu_seqlens = row
    num_targets = int((targets != IGNORE).sum())
    if parallel is None:
        hidden, stats = model.hidden_states(tokens, cu_seqlens.to(tokens.device))
    else:
        shard = parallel.shard(*row)
        targets = shard.targets
        hidden, stats = model.hidden_states(shard.tokens, shard.cu_seqlens, shard.positions)
        stats = share_stats(stats, shard.tokens.shape[1], parallel.group)
    nll = cross_entropy(hidden[0], model.lm_head.weight, targets[0]) / num_targets
    aux = torch.stack([load_balancing_loss(s.load, s.probability) for s in stats]).mean()
    loss = nll + AUX_COEFFICIENT * aux
    loss.backward()
    if parallel is not None:
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=parallel.group)
        # Each rank has the value of the whole row's balancing loss.
        loss = nll + AUX_COEFFICIENT * aux / parallel.size
    return loss.detach()


def parallel_model(
    name: str, dtype: torch.dtype, device: torch.device, is_balanced: bool
) -> tuple[Model, ContextParallel]:
    """Return the same, with rows over all ranks."""
    model, parallel = model_of(name, dtype, device), ContextParallel(all_ranks(), is_balanced)
    parallel.apply(model)
    return model, parallel


def one_document(length: int, vocab_size: int, device: torch.device) -> Row:
    """Return a row of random tokens."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(vocab_size, (1, length), generator=generator)
    targets = tokens.roll(-1, 1)
    targets[0, -1] = IGNORE
    return tokens.to(device), targets.to(device), torch.tensor([0, length])


def check_model(name: str, device: torch.device) -> float:
    """Return the largest relative difference of loss and gradients from one process, in fp32.

    Raises:
        SystemExit: it is too large for anything to be timed.
    """
    length = 1000
    tokens, targets, _ = one_document(length, preset(name).vocab_size, device)
    row = tokens, targets, torch.tensor([0, length // 3, length // 2, length])
    alone = model_of(name, torch.float32, device)
    expected = step(alone, None, row)
    worst = 0.0
    for is_balanced in SPLITS.values():
        model, parallel = parallel_model(name, torch.float32, device, is_balanced)
        loss = step(model, parallel, row)
        dist.all_reduce(loss)
        worst = max(worst, abs(float(loss / expected) - 1))
        for own, whole in zip(model.parameters(), alone.parameters(), strict=True):
            assert own.grad is not None and whole.grad is not None
            size = whole.grad.norm().clamp(min=1e-3)
            worst = max(worst, float((own.grad - whole.grad).norm() / size))
    return within_tolerance(worst, device)


# --- the operators ---


def lasp_plus_against_lasp(device: torch.device, args: argparse.Namespace) -> Values:
    """Time both operators, forward and backward, at each delay."""
    dtype, length = dtype_on(device), LASP_TOKENS
    lasp, lasp_plus = Lasp(all_ranks()), LightningAcrossRanks(StateExchange(all_ranks()))
    difference = check_operators((lasp, lasp_plus), device)
    say(f"both operators agree with one process to {difference:.1e}")
    inputs = operator_inputs(length, dtype, device)
    hops = dist.get_world_size() - 1
    rows = []
    is_emulated = device.type == "cpu"
    for delay_ms in DELAYS_MS if is_emulated else (0.0,):
        seconds: dict[str, list[float]] = {"lasp": [], "lasp_plus": [], "lasp_plus_ring": []}
        sides = (
            ("lasp", lasp, 1),
            ("lasp_plus", lasp_plus, 1),
            ("lasp_plus_ring", lasp_plus, hops),
        )
        for _ in range(args.repeats + 1):
            for name, attend, hops_of_gather in sides:
                with links(delay_ms / 1e3, hops_of_gather):
                    run = partial(forward_backward, attend, inputs, length)
                    seconds[name].append(together(run, device))
        row: Values = {"delay_ms": delay_ms}
        for name in ("lasp_plus", "lasp_plus_ring") if delay_ms else ("lasp_plus",):
            row[name] = ratio(seconds[name][1:], seconds["lasp"][1:])
        rows.append(row)
        say(
            f"delay {delay_ms:g} ms: LASP {1e3 * row['lasp_plus']['theirs_s']:.1f} ms, "
            f"LASP+ {1e3 * row['lasp_plus']['ours_s']:.1f} ms"
        )
    return {
        "emulation": is_emulated,
        "what_is_emulated": (
            f"links: a message arrives no sooner than the delay after it was sent; ranks are "
            f"processes on {os.cpu_count()} cores, so all of them at once compute slower than one"
            if is_emulated
            else None
        ),
        "lasp_plus_is": "an all-gather that takes one delay, every rank sending to all others",
        "lasp_plus_ring_is": f"an all-gather in a ring, which takes {hops} delays",
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": length,
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "largest_relative_difference": difference,
        "rows": rows,
    }


def operator_inputs(length: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return this rank's part of q, k, v and of the gradient, [1, T_r, H, K] each, and decays."""
    own = split_row([0, length], dist.get_world_size()).tokens(dist.get_rank())
    return [*(x[:, own] for x in whole_inputs(length, dtype, device)), slopes(device)]


def whole_inputs(length: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return q, k, v and the gradient of the whole row, the same on all ranks."""
    generator = torch.Generator().manual_seed(2)
    shape = (1, length, HEADS, HEAD_DIM)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4)]


def slopes(device: torch.device) -> Tensor:
    """Return [H] slopes of heads with a long memory, whose states reach over ranks."""
    return 2.0 ** -torch.arange(8.0, 8 + HEADS, device=device)


def forward_backward(attend: Callable[..., Any], inputs: list[Tensor], length: int) -> list[Tensor]:
    """Return the output and the gradients of q, k and v."""
    q, k, v, grad, decay = inputs
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    cu_seqlens = torch.tensor([0, length])
    o, _ = attend(*leaves, decay, cu_seqlens=cu_seqlens, return_state=False, activation="silu")
    return [o.detach(), *torch.autograd.grad(o, leaves, grad)]


def check_operators(sides: tuple[Callable[..., Any], ...], device: torch.device) -> float:
    """Return the largest difference from one process, relative to the largest value, in fp32."""
    length = 1000
    q, k, v, grad = whole_inputs(length, torch.float32, device)

    def alone(*args: Any, cu_seqlens: Tensor, **kwargs: Any) -> Any:
        return ops.lightning_attention(*args, cu_seqlens=cu_seqlens.to(device), **kwargs)

    expected = forward_backward(alone, [q, k, v, grad, slopes(device)], length)
    own = split_row([0, length], dist.get_world_size()).tokens(dist.get_rank())
    worst = 0.0
    for attend in sides:
        found = forward_backward(attend, operator_inputs(length, torch.float32, device), length)
        for part, whole in zip(found, expected, strict=True):
            worst = max(worst, float((part - whole[:, own]).abs().max() / whole.abs().max()))
    return within_tolerance(worst, device)


@contextmanager
def links(delay_s: float, hops_of_gather: int) -> Iterator[None]:
    """Delay what crosses ranks, the clock being common to the processes of one machine.

    A message carries the time at which it was sent, so that computing meanwhile counts.
    """
    if not delay_s:
        yield
        return
    receive, send, all_gather = collectives.receive, collectives.send, collectives.all_gather

    def stamp() -> Tensor:
        return torch.tensor([time.monotonic()], dtype=torch.float64)

    def delayed_send(x: Tensor, rank: int, group: dist.ProcessGroup) -> None:
        send(stamp(), rank, group)
        send(x, rank, group)

    def delayed_receive(into: Tensor, rank: int, group: dist.ProcessGroup) -> None:
        sent = stamp()
        receive(sent, rank, group)
        receive(into, rank, group)
        sleep_until(float(sent) + delay_s)

    def delayed_all_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
        sent, gathered = all_gather(stamp(), group), all_gather(x, group)

        def arrived(result: Tensor) -> Tensor:
            sleep_until(float(sent.wait().max()) + delay_s * hops_of_gather)
            return result

        return gathered.then(arrived)

    collectives.send, collectives.receive = delayed_send, delayed_receive
    exchange.all_gather = delayed_all_gather
    try:
        yield
    finally:
        collectives.send, collectives.receive = send, receive
        exchange.all_gather = all_gather


def sleep_until(moment_s: float) -> None:
    """Sleep until a time of `time.monotonic`."""
    time.sleep(max(0.0, moment_s - time.monotonic()))


# --- bytes ---


def traffic(device: torch.device, args: argparse.Namespace) -> Values:
    """Count what a rank receives for one lightning layer."""
    lengths = TRAFFIC_TOKENS[:1] if args.quick else TRAFFIC_TOKENS
    formula = (dist.get_world_size() - 1) * HEADS * HEAD_DIM**2 * 4
    rows = []
    for length in lengths:
        attend = LightningAcrossRanks(StateExchange(all_ranks()))
        q, k, v, grad, decay = operator_inputs(length, dtype_on(device), device)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        with Traffic() as forward:
            o, _ = attend(q, k, v, decay, cu_seqlens=torch.tensor([0, length]), return_state=False)
        with Traffic() as backward:
            o.backward(grad)
        counted = {"forward_bytes": forward.total, "backward_bytes": backward.total}
        rows.append({"tokens": length, **counted, "formula_bytes": formula})
        say(f"{length:,} tokens: {forward.total:,} + {backward.total:,} of {formula:,} bytes each")
    return {
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "formula": "(P - 1) H K V 4 bytes, received by a rank in each direction",
        "rows": rows,
    }


if __name__ == "__main__":
    main()
