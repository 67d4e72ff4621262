"""A plan in words: what fits, how fast it is, what limits it, and what would change that."""

from collections.abc import Mapping, Sequence

from linnet.model.config import SOFTMAX, ModelConfig
from linnet.model.cost import cost_of, prefill_flops
from linnet.parallel.plan.estimate import BUBBLE, Estimate, Phase
from linnet.parallel.plan.hardware import GIB, Cluster
from linnet.parallel.plan.search import Plans, gpus_needed
from linnet.parallel.plan.serving_memory import ServingJob
from linnet.parallel.plan.shape import softmax_twin

WORDS = {
    "attention projections": "the projections of attention, routers and norms",
    "experts": "the products of the experts",
    "lightning attention": "the core of lightning attention",
    "softmax attention": "the core of softmax attention, whose work grows with the square of the "
    "length",
    "LM head and loss, fp32": "the LM head in fp32, without tensor cores",
    "tensor parallel sums": "the sums over tp, behind which nothing can run",
    "tokens after experts": "the gathering of tokens over tp after the experts",
    "expert all-to-all": "the all-to-all to the experts and back",
    "expert width": "gather and reduction over the width of experts (etp)",
    "LASP+ states": "the states that lightning layers gather",
    "keys and values": "keys and values that cross cp ranks",
    "FSDP weights and gradients": "gathering weights and reducing gradients (FSDP)",
    "gradients of replicas": "the sum of gradients over replicas",
    "optimizer": "the optimizer",
    BUBBLE: "pipeline stages that wait for the first and last micro-batches",
}
DECODE_WORDS = {
    "attention projections": "reading the weights of attention and LM head",
    "experts": "reading the weights of the chosen experts",
    "softmax attention": "reading the keys and values of all earlier tokens",
    "lightning attention": "reading and writing the lightning states",
}


def headline(model: str, cluster: Cluster, plans: Plans) -> str:
    """Return the answer in one sentence or two."""
    context = tokens_text(plans.job.context)
    if not plans.best:
        return f"{cluster} do not hold {model} at {context} tokens." + _shortfall(plans)
    best = plans.best[0]
    memory = f"{gib(best.needed_bytes)} of {gib(best.usable_bytes)} usable GiB per GPU"
    if isinstance(plans.job, ServingJob):
        prefill, decode = best.phases
        each = "" if plans.job.sequences == 1 else f"{plans.job.sequences} x "
        return (
            f"{cluster} hold {each}{context} tokens of {model} with {plans.job.weights} weights: "
            f"{best.layout}, {memory}; the first token after {time_text(prefill.seconds)}, then "
            f"{rate_text(decode.tokens_per_s)} tokens/s. The prompt is limited by "
            f"{limit_text(prefill)}; generation by {limit_text(decode)}."
        )
    step = best.phases[0]
    return (
        f"{cluster} train {model} at {context} tokens: {best.layout}, {memory}; "
        f"{rate_text(step.tokens_per_s)} tokens/s, {time_text(step.seconds)} per step of "
        f"{best.choices['tokens per step']} tokens, MFU {step.mfu:.1%}. Limited by "
        f"{limit_text(step)}."
    )


def reasons(config: ModelConfig, cluster: Cluster, tried: Sequence[Plans]) -> list[str]:
    """Return why: what did not fit, what breaks first, what to change.

    Args:
        config: of the model.
        cluster: its GPUs.
        tried: searches, the last of which is the answer.
    """
    plans = tried[-1]
    lines = []
    for failed in tried[:-1]:
        assert isinstance(failed.job, ServingJob)
        if failed.smallest is None:
            continue
        lines.append(f"{failed.job.weights} weights do not fit." + _shortfall(failed))
    if not plans.best:
        return [*lines, _what_would_help(config, cluster, plans)]
    best = plans.best[0]
    if isinstance(plans.job, ServingJob):
        lines += _serving_reasons(config, plans.job, best)
    else:
        lines += _training_reasons(best)
    second = next((e for e in plans.best if e.layout != best.layout), None)
    if second is not None:
        lines.append(
            f"{plans.num_seen:,} plans were compared, {len(plans.best):,} fit; the next layout, "
            f"{second.layout}, takes {second.cost_s / best.cost_s - 1:.1%} longer."
        )
    return lines


def _serving_reasons(config: ModelConfig, job: ServingJob, best: Estimate) -> list[str]:
    kv, states = best.memory["keys and values"], best.memory["lightning states"]
    room = best.usable_bytes - best.needed_bytes
    lines = []
    if kv:
        most = int(job.context * (1 + room / kv))
        lines.append(
            f"Memory breaks first at {most:,} tokens on this layout: keys and values grow by "
            f"{kv / job.context:,.0f} bytes per token and GPU, the lightning states stay at "
            f"{states / GIB:.2f} GiB whatever the length."
        )
        if job.keys == "bf16":
            longer = int(job.context * (room + kv) / (kv / 2))
            lines.append(
                f"fp8 keys and values (--kv fp8) would hold {longer:,} tokens and read half as "
                "much per token."
            )
    twin = softmax_twin(config)
    if twin != config:
        share = cost_of(twin).kv_bytes_per_token / max(1, cost_of(config).kv_bytes_per_token)
        work = prefill_flops(twin, job.context) / prefill_flops(config, job.context)
        lines.append(
            f"With softmax attention in all {config.num_hidden_layers} layers, keys and values "
            f"would take {gib(kv * share)} GiB per GPU ({share:.1f} times), and the prompt "
            f"{work:.1f} times the FLOPs."
        )
    prefill, decode = best.phases
    lines.append(f"To answer sooner: {_remedy(prefill)}. To generate faster: {_remedy(decode)}.")
    return lines


def _training_reasons(best: Estimate) -> list[str]:
    step = best.phases[0]
    largest = max(best.memory, key=lambda part: best.memory[part])
    lines = [
        f"Of the memory {largest} take most, {gib(best.memory[largest])} of "
        f"{gib(best.needed_bytes)} GiB; {gib(best.usable_bytes - best.needed_bytes)} GiB are free."
    ]
    hidden = sum(step.exchange_s.values()) - sum(
        seconds for part, seconds in step.parts.items() if part in step.exchange_s
    )
    hidden -= step.parts.get("FSDP weights and gradients", 0.0)
    lines.append(
        f"Exchanges take {time_text(sum(step.exchange_s.values()))} per step, of which "
        f"{time_text(max(0.0, hidden))} run behind computing."
    )
    head = step.parts.get("LM head and loss, fp32", 0.0) / step.seconds
    if head > 0.1:
        lines.append(
            f"The LM head in fp32 takes {head:.0%} of the step: it runs without tensor cores, for "
            "the agreement of training and generation (MiniMax-M1, section 3.2)."
        )
    if best.choices["recompute"] == "full":
        lines.append("Blocks are computed again in the backward pass, else activations do not fit.")
    lines.append(f"To train faster: {_remedy(step)}.")
    return lines


def _remedy(phase: Phase) -> str:
    """Return what shortens the part that limits."""
    return {
        "softmax attention": "more GPUs share it by heads and tokens"
        if phase.name != "decode"
        else "more GPUs share the keys, or fp8 halves them",
        "experts": "more GPUs share the experts"
        if phase.name != "decode"
        else "a larger etp spreads the chosen experts over more memories",
        "attention projections": "a larger tp or more GPUs share them",
        "LM head and loss, fp32": "a GPU with more fp32",
        BUBBLE: "more micro-batches: a larger --batch-tokens",
        "FSDP weights and gradients": "longer rows per rank, or a larger ep",
        "expert all-to-all": "an ep within a node, or a faster network",
        "expert width": "a smaller etp",
        "tensor parallel sums": "a smaller tp, or faster links within a node",
    }.get(phase.limit, "faster links")


def _what_would_help(config: ModelConfig, cluster: Cluster, plans: Plans) -> str:
    if plans.smallest is None:
        return "No layout divides this model, length and batch over these GPUs: change one of them."
    if not isinstance(plans.job, ServingJob):
        return "What would help: more GPUs, a shorter context, recomputation (--recompute full)."
    options = []
    needed = gpus_needed(config, cluster.device, plans.job)
    if needed is not None:
        options.append(f"{needed:,} x {cluster.device.name}")
    if plans.job.weights != "int8":
        options.append("int8 weights (--weights int8)")
    if plans.job.keys != "fp8" and any(kind == SOFTMAX for kind in config.attn_type_list):
        options.append("fp8 keys and values (--kv fp8)")
    options.append("a shorter context or fewer sequences")
    return "What would help: " + ", ".join(options) + "."


def _shortfall(plans: Plans) -> str:
    """Return the arithmetic of the layout that comes nearest."""
    if plans.smallest is None:
        return ""
    near = plans.smallest
    return (
        f" The nearest layout, {near.layout}, needs {gib(near.needed_bytes)} GiB per GPU of "
        f"{gib(near.usable_bytes)} usable: {memory_text(near.memory)}."
    )


def limit_text(phase: Phase) -> str:
    """Return what limits a phase, with its share."""
    words = {**WORDS, **DECODE_WORDS} if phase.name == "decode" else WORDS
    share = phase.parts[phase.limit] / phase.seconds
    return f"{words.get(phase.limit, phase.limit)} ({share:.0%})"


def memory_text(memory: Mapping[str, float]) -> str:
    """Return the parts of a memory in GiB, the largest first."""
    parts = sorted(memory.items(), key=lambda item: -item[1])
    return ", ".join(f"{name} {gib(size)}" for name, size in parts if size >= 0.05 * GIB)


def gib(num_bytes: float) -> str:
    """Return GiB with one decimal."""
    return f"{num_bytes / GIB:,.1f}"


def tokens_text(num_tokens: int) -> str:
    """Return 4M for 4,194,304, 128K for 131,072, and others in full."""
    for unit, size in (("M", 2**20), ("K", 2**10)):
        if num_tokens >= size and num_tokens % (size // 4) == 0:
            return f"{num_tokens / size:g}{unit}"
    return f"{num_tokens:,}"


def rate_text(per_s: float) -> str:
    """Return a rate with a decimal if it is small."""
    return f"{per_s:,.1f}" if per_s < 1000 else f"{per_s:,.0f}"


def time_text(seconds: float) -> str:
    """Return a time with a unit that suits it."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} us"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms"
    if seconds < 180:
        return f"{seconds:.1f} s"
    if seconds < 3 * 3600:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
