"""The engine against transformers on one model: throughput, a shared prefix, its own overhead.

    python benchmarks/serving.py [--requests 32] [--prompt 512] [--output 128]
    python benchmarks/serving.py --long 1048576 [--model bundled]
    python benchmarks/serving.py --cold-start

The model is the preset `bench-94m` with random weights, the same on both sides. transformers runs
its forward pass in a greedy loop, one prompt after the other (a few of them) and all in one batch:
less than what its `generate` does at each step. The second form takes one long prompt alone, and
sets the memory it took beside the engine's plan. The third starts `linnet serve` with the bundled
model a few times, and waits for the first token of an answer. Writes results/<device>/serving.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import torch
from bench_94m import load_ours, load_theirs, logit_difference, save_weights
from harness import RESULTS, device_name, machine_facts, write_result

from linnet.infer import Engine, EngineSettings, SamplingParams
from linnet.infer.updates import Update
from linnet.model import Model
from linnet.model.paged import pages_of
from linnet.model.weights import load_model

SINGLES = 3  # prompts that transformers runs one by one
SHARED, QUESTION = 8192, 32


def main() -> None:
    """Run one of the three measurements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--output", type=int, default=128, help="tokens of each answer")
    parser.add_argument("--repeats", type=int, default=3, help="of the engine's run")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--long", type=int, help="tokens of the one long prompt")
    parser.add_argument("--model", default="bundled", help="that takes the long prompt")
    parser.add_argument("--cold-start", action="store_true", help="time `linnet serve` alone")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    path = RESULTS / device_name() / "serving.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    values |= {"machine": machine_facts(args.threads)}
    if args.cold_start:
        values |= {"cold_start": cold_start(args.repeats)}
    elif args.long:
        values |= {"long_prompt": long_prompt(args)}
    else:
        values |= against_transformers(args)
    print(json.dumps(values, indent=2))
    print(f"wrote {write_result('serving', values)}")


def against_transformers(args: argparse.Namespace) -> dict[str, Any]:
    """Check that both sides compute the same, then time them."""
    with tempfile.TemporaryDirectory() as folder:
        save_weights(Path(folder) / "model")
        if (difference := logit_difference(Path(folder) / "model")) > 1e-4:
            raise SystemExit(f"logits differ by {difference}; nothing is timed before they agree")
        ours = load_ours(Path(folder) / "model", args.dtype)
        theirs = load_theirs(Path(folder) / "model", args.dtype)
    prompts = random_prompts(ours, args.requests, args.prompt)
    check_answers(ours, prompts[:2])
    runs = [throughput(ours, prompts, args.output) for _ in range(args.repeats)]
    speed = statistics.median(run["tokens_per_s"] for run in runs)
    singles = [their_tokens_per_s(theirs, [prompt], args.output) for prompt in prompts[:SINGLES]]
    batched = their_tokens_per_s(theirs, prompts, args.output)
    single = statistics.median(singles)
    return {
        "model": "bench-94m",
        "dtype": args.dtype,
        "fp32_logit_difference": difference,
        "requests": args.requests,
        "prompt_tokens": args.prompt,
        "output_tokens": args.output,
        "runs": runs,
        "tokens_per_s": speed,
        "transformers_one_by_one_tokens_per_s": single,
        "transformers_batched_tokens_per_s": batched,
        "speedup_over_one_by_one": speed / single,
        "speedup_over_batched": speed / batched,
        "overhead": statistics.median(run["overhead"] for run in runs),
        "prefix": shared_prefix(ours),
    }


def random_prompts(model: Model, count: int, length: int) -> list[list[int]]:
    """Return prompts that have nothing in common."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, length)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator).tolist()


def check_answers(model: Model, prompts: list[list[int]]) -> None:
    """Stop unless the engine's answers are those of a plain forward pass over all tokens."""
    model.float()
    model.compute_dtype, dtype = torch.float32, model.compute_dtype
    answers, _, _ = run_all(Engine(model), prompts, 16)
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        if logits.argmax(-1).tolist() != answer:
            raise SystemExit("the engine's answers are not those of the model; nothing is timed")
    model.to(dtype)
    model.compute_dtype = dtype


def throughput(model: Model, prompts: list[list[int]], output: int) -> dict[str, float]:
    """Time requests that come all at once."""
    engine = Engine(model, EngineSettings(max_sequences=len(prompts)))
    answers, seconds, first_s = run_all(engine, prompts, output)
    counters = engine.counters()
    return {
        "seconds": seconds,
        "tokens_per_s": sum(map(len, answers)) / seconds,
        "first_token_s_median": statistics.median(first_s),
        "steps": counters.steps_total,
        "overhead": 1 - counters.model_seconds_total / counters.step_seconds_total,
    }


def run_all(
    engine: Engine, prompts: list[list[int]], output: int
) -> tuple[list[list[int]], float, list[float]]:
    """Return all answers, the seconds until the last one, and those until each first token."""
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    answers: list[list[int]] = [[] for _ in prompts]
    first_s: list[float] = []
    done = threading.Semaphore(0)

    def listener(answer: list[int]):
        def on_update(update: Update) -> None:
            answer.extend(update.tokens)
            if update.usage is not None:
                if update.finish_reason == "error":
                    print(update.error, file=sys.stderr)
                first_s.append(update.usage.first_token_s or 0.0)
                done.release()

        return on_update

    engine.start()
    start = time.perf_counter()
    for prompt, answer in zip(prompts, answers, strict=True):
        engine.submit(prompt, params, listener(answer))
    for _ in prompts:
        done.acquire()
    seconds = time.perf_counter() - start
    engine.stop()
    return answers, seconds, first_s


@torch.inference_mode()
def their_tokens_per_s(
    model: Any, prompts: list[list[int]], output: int
) -> float:  # Any: transformers is untyped here
    """Return transformers' output tokens per second on one batch of prompts."""
    tokens = torch.tensor(prompts)
    start = time.perf_counter()
    result = model(tokens, use_cache=True, logits_to_keep=1)
    for position in range(tokens.shape[1], tokens.shape[1] + output - 1):
        token = result.logits[:, -1].argmax(-1, keepdim=True)
        # Positions are given: its cache counts none when layer 0 is a lightning layer.
        position_ids = torch.full_like(token, position)
        result = model(
            token,
            past_key_values=result.past_key_values,
            position_ids=position_ids,
            use_cache=True,
        )
    return len(prompts) * output / (time.perf_counter() - start)


def shared_prefix(model: Model) -> dict[str, float]:
    """Time two questions about the same long text."""
    (text,) = random_prompts(model, 1, SHARED)
    questions = random_prompts(model, 3, QUESTION)
    engine = Engine(model, EngineSettings(max_sequences=2, max_model_len=2 * SHARED))
    run_all(Engine(model), [questions[0]], 2)  # warm-up
    first_s = []
    for question in questions:
        _, _, (seconds,) = run_all_again(engine, [text + question], 2)
        first_s.append(seconds)
    return {
        "shared_tokens": SHARED,
        "question_tokens": QUESTION,
        "first_s": first_s[0],
        "second_s": first_s[1],
        "third_s": first_s[2],
        "speedup": first_s[0] / first_s[1],
    }


def run_all_again(
    engine: Engine, prompts: list[list[int]], output: int
) -> tuple[list[list[int]], float, list[float]]:
    """Run requests step by step on an engine that is to go on afterwards."""
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    updates: list[Update] = []
    start = time.perf_counter()
    for prompt in prompts:
        engine.submit(prompt, params, updates.append)
    while engine.step():
        pass
    seconds = time.perf_counter() - start
    ends = [update.usage for update in updates if update.usage is not None]
    tokens = [token for update in updates for token in update.tokens]
    return [tokens], seconds, [usage.first_token_s or 0.0 for usage in ends]


def long_prompt(args: argparse.Namespace) -> dict[str, Any]:
    """Take one long prompt with just the memory that it needs, and compare with the plan."""
    model = load_model(args.model, dtype=args.dtype if args.dtype == "float32" else "auto")
    (prompt,) = random_prompts(model, 1, args.long)
    with torch.inference_mode():
        model(torch.tensor([prompt[:512]]), cache=model.new_cache())  # what is loaded at first use
    length = args.long + 64
    free = Engine(model, EngineSettings(max_sequences=1, max_model_len=length)).plan
    needed = free.workspace_bytes + 2 * free.slot_bytes + pages_of(length) * free.page_bytes
    settings = EngineSettings(max_sequences=1, max_model_len=length, memory_bytes=needed)
    before = status_bytes("VmRSS")
    engine = Engine(model, settings)
    _, seconds, _ = run_all(engine, [prompt], 8)
    taken = status_bytes("VmHWM") - before
    return {
        "model": Path(args.model).name,
        "tokens": args.long,
        "seconds": seconds,
        "tokens_per_s": args.long / seconds,
        "planned_bytes": engine.plan.total_bytes,
        "planned_workspace_bytes": engine.plan.workspace_bytes,
        "taken_bytes": taken,
        "taken_over_planned": taken / engine.plan.total_bytes,
    }


def cold_start(repeats: int) -> dict[str, Any]:
    """Time `linnet serve` from the start of its process to the first token that a client reads."""
    runs = []
    for _ in range(repeats):
        start = time.perf_counter()
        command = [sys.executable, "-m", "linnet", "serve", "--port", "0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = iter(process.stdout.readline, "")
            address = next(line.split()[1] for line in lines if line.startswith("serving "))
            ready_s = time.perf_counter() - start
            read_first_token(address)
            runs.append({"ready_s": ready_s, "first_token_s": time.perf_counter() - start})
            process.terminate()
            process.communicate()
    return {
        "model": "bundled",
        "runs": runs,
        "first_token_s": statistics.median(run["first_token_s"] for run in runs),
    }


def read_first_token(address: str) -> None:
    """Ask a server and return at the first token of its answer."""
    body = {"messages": [{"role": "user", "content": "Hello"}], "stream": True}
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                if delta.get("content") or delta.get("reasoning_content"):
                    return
    raise SystemExit("the server's answer had no token")


def status_bytes(key: str) -> int:
    """Return a figure of this process's memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main()
