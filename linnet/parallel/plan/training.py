"""The time of a training step on a layout, and what each rank holds meanwhile."""

from dataclasses import dataclass
from functools import lru_cache

from linnet.errors import ConfigError
from linnet.model.config import ModelConfig
from linnet.model.cost import training_flops
from linnet.parallel.layout import Layout
from linnet.parallel.plan.estimate import (
    BUBBLE,
    Estimate,
    Phase,
    exchange_seconds,
    exposed_seconds,
)
from linnet.parallel.plan.hardware import GIB, Cluster, Efficiency
from linnet.parallel.plan.shape import (
    BF16,
    FP32,
    GATHER_BYTES,
    Gather,
    Stage,
    forward_parts,
    stages_of,
)
from linnet.parallel.plan.training_memory import Microbatch, sharded_params, training_memory
from linnet.parallel.plan.volumes import Volume, key_exchange_bytes, layer_volumes

BATCH_TOLERANCE = 0.25
"""Tokens of a step may differ so much from what was asked, if rows do not divide them."""

SOFTMAX_BACKWARD = 2.5
"""Over forward: the scores are formed again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingJob:
    """What is to be trained.

    Raises:
        ConfigError: fewer tokens in a batch than in a sequence.
    """

    context: int
    """Tokens of a sequence; one document each, which is the worst case for attention."""
    batch_tokens: int
    """Of a step, over all ranks."""
    gather: Gather = "bf16"
    """Dtype in which FSDP gathers fp32 weights."""

    def __post_init__(self) -> None:
        if not 0 < self.context <= self.batch_tokens:
            raise ConfigError(
                f"a batch of {self.batch_tokens:,} tokens holds no sequence of {self.context:,}; "
                "raise --batch-tokens"
            )


@dataclass(frozen=True, slots=True)
class TrainingChoice:
    """What is chosen beside the layout."""

    sequences: int
    """Per row that a rank, or its cp ranks, computes at a time."""
    recompute: bool
    is_balanced: bool


def estimate_training(
    config: ModelConfig,
    layout: Layout,
    job: TrainingJob,
    choice: TrainingChoice,
    cluster: Cluster,
    efficiency: Efficiency,
) -> Estimate | None:
    """Return memory and time; None if the batch cannot be cut so."""
    row = choice.sequences * job.context
    num_micro = round(job.batch_tokens / (layout.num_rows * row))
    step_tokens = num_micro * layout.num_rows * row
    if not num_micro or abs(step_tokens / job.batch_tokens - 1) > BATCH_TOLERANCE:
        return None
    usable = cluster.device.memory_gib * GIB * efficiency.memory
    memory = _memory(config, layout, job, choice, num_micro, efficiency)
    choices = {
        "recompute": "full" if choice.recompute else "none",
        "row": f"{choice.sequences} x {job.context:,} tokens",
        "micro-batches": str(num_micro),
        "cp split": "none" if layout.cp == 1 else "balanced" if choice.is_balanced else "in order",
        "tokens per step": f"{step_tokens:,}",
    }
    estimate = Estimate(layout=layout, choices=choices, memory=memory, usable_bytes=usable)
    if not estimate.fits:
        return estimate
    phase = _step(config, layout, job, choice, num_micro, cluster, efficiency)
    return Estimate(
        layout=layout,
        choices=choices,
        memory=memory,
        usable_bytes=usable,
        phases=(phase,),
        cost_s=1 / phase.tokens_per_s,
    )


def _memory(
    config: ModelConfig,
    layout: Layout,
    job: TrainingJob,
    choice: TrainingChoice,
    num_micro: int,
    efficiency: Efficiency,
) -> dict[str, float]:
    """Return the parts of the fullest stage; each holds as many micro-batches as stages follow."""
    tokens = choice.sequences * job.context // layout.cp
    stages = stages_of(config, layout.pp, job.context)
    candidates = []
    for number in {0, min(1, layout.pp - 1), layout.pp - 1}:
        in_flight = min(layout.pp - number, num_micro)
        batch = Microbatch(
            tokens,
            choice.recompute,
            choice.is_balanced,
            in_flight,
            GATHER_BYTES[job.gather],
            efficiency.expert_balance,
        )
        candidates.append(training_memory(config, stages[number], layout, batch))
    return max(candidates, key=lambda parts: sum(parts.values()))


def _step(
    config: ModelConfig,
    layout: Layout,
    job: TrainingJob,
    choice: TrainingChoice,
    num_micro: int,
    cluster: Cluster,
    efficiency: Efficiency,
) -> Phase:
    """Return the step of the slowest stage."""
    stages = stages_of(config, layout.pp, job.context)
    slowest: tuple[float, Stage, dict[str, float], tuple[Volume, ...], dict[str, float]] | None
    slowest = None
    for stage in {stages[0], stages[len(stages) // 2], stages[-1]}:
        compute = compute_seconds(config, stage, layout, job, choice, cluster, efficiency)
        volumes = microbatch_volumes(config, stage, layout, job, choice)
        # Stages of a pipeline keep their weights gathered for the whole step.
        sharding = sharding_volumes(stage, layout, GATHER_BYTES[job.gather])
        per_micro = 1 / num_micro if layout.pp > 1 else 1.0
        volumes += tuple(volume.times(per_micro) for volume in sharding)
        exchange_s = exchange_seconds(volumes, layout, cluster, efficiency)
        exposed = exposed_seconds(exchange_s, compute, efficiency)
        parts = {**compute, **exposed}
        seconds = sum(parts.values())
        if slowest is None or seconds > slowest[0]:
            slowest = seconds, stage, parts, volumes, exchange_s
    assert slowest is not None
    seconds, stage, parts, volumes, exchange_s = slowest
    step = {name: value * num_micro for name, value in parts.items()}
    volumes = tuple(volume.times(num_micro) for volume in volumes)
    exchange_s = {name: value * num_micro for name, value in exchange_s.items()}
    replicas = replica_volumes(stage, layout)
    replicas_s = exchange_seconds(replicas, layout, cluster, efficiency)
    step |= replicas_s
    if layout.pp > 1:
        step[BUBBLE] = (layout.pp - 1) * seconds
    # Reads parameter, gradient and two moments, writes all but the gradient.
    touched = sharded_params(stage, layout) * 7 * FP32
    step["optimizer"] = touched / (cluster.device.hbm_gbs * 1e9 * efficiency.hbm)
    total_s = sum(step.values())
    tokens = num_micro * layout.num_rows * choice.sequences * job.context
    flops = _flops_per_token(config, job.context) * tokens
    return Phase(
        name="step",
        parts=step,
        volumes=(*volumes, *replicas),
        exchange_s={**exchange_s, **replicas_s},
        tokens_per_s=tokens / total_s,
        mfu=flops / (total_s * layout.world_size * cluster.device.tflops * 1e12),
    )


@lru_cache(maxsize=256)
def _flops_per_token(config: ModelConfig, length: int) -> float:
    return training_flops(config, length) / length


def compute_seconds(
    config: ModelConfig,
    stage: Stage,
    layout: Layout,
    job: TrainingJob,
    choice: TrainingChoice,
    cluster: Cluster,
    efficiency: Efficiency,
) -> dict[str, float]:
    """Return the seconds of forward and backward of one micro-batch on the slowest rank."""
    flops = forward_parts(config, stage, job.context)
    peak = cluster.device.tflops * 1e12
    row = choice.sequences / layout.cp
    heads = row / layout.tp
    passes = 3 + choice.recompute
    routed = row if layout.ep * layout.etp == 1 else heads
    balance = efficiency.expert_balance if layout.ep > 1 else 1.0
    lightning = flops.lightning
    if layout.cp > 1:  # the state of each piece, and what earlier pieces add
        per_token = 4 * config.inner_size * config.head_dim * stage.num_lightning
        lightning += per_token * job.context
    # In order, the last rank sees (2 P - 1) / P times the mean number of keys.
    skew = 1.0 if choice.is_balanced else 2 - 1 / layout.cp
    softmax = flops.softmax * heads * skew * (1 + SOFTMAX_BACKWARD + choice.recompute)
    dense = (flops.attention * heads + flops.whole * row) * passes
    head_peak = cluster.device.fp32_tflops * 1e12 * efficiency.head
    return {
        "attention projections": dense / (peak * efficiency.matmul),
        "experts": flops.experts * routed * passes / (peak * efficiency.experts * balance),
        "lightning attention": lightning * heads * passes / (peak * efficiency.lightning),
        "softmax attention": softmax / (peak * efficiency.softmax),
        "LM head and loss, fp32": flops.head * row * 3 / head_peak,
    }


def microbatch_volumes(
    config: ModelConfig, stage: Stage, layout: Layout, job: TrainingJob, choice: TrainingChoice
) -> tuple[Volume, ...]:
    """Return what a rank receives for one micro-batch, forward and backward."""
    tokens = choice.sequences * job.context / layout.cp
    passes = 2 + choice.recompute
    layers = layer_volumes(config, stage, layout, tokens, choice.is_balanced)
    volumes = [volume.times(passes) for volume in layers]
    if layout.cp > 1 and stage.num_softmax:
        keys = key_exchange_bytes(config, layout, tokens) * stage.num_softmax
        hops = (layout.cp - 1) * stage.num_softmax
        volumes.append(Volume("keys and values", "cp", keys, hops).times(passes + 1))
    if layout.pp > 1:
        boundary = 2 * tokens * config.hidden_size * BF16
        volumes.append(Volume("between stages", "pp", boundary, 2, is_ring=False))
    return tuple(volumes)


def sharding_volumes(stage: Stage, layout: Layout, itemsize: int = BF16) -> tuple[Volume, ...]:
    """Return what FSDP moves for one micro-batch, or for a step of a pipeline.

    Blocks are gathered forward and, unless a pipeline keeps them, backward; embedding and LM head
    once, in fp32. Gradients are reduced in fp32.

    Args:
        stage: whose parameters.
        layout: of the ranks.
        itemsize: bytes of an element of the gathered blocks.
    """
    gathers = 1 if layout.pp > 1 else 2
    per_element = gathers * itemsize + FP32
    root = (stage.embedding + stage.head) * 2 * FP32
    result = []
    for name, axis, size, full_bytes in (
        (
            "FSDP dense",
            "fsdp",
            layout.dp_shard * layout.cp,
            stage.dense(layout.tp) * per_element + root,
        ),
        (
            "FSDP experts",
            "edp",
            layout.edp,
            stage.experts / (layout.ep * layout.etp) * per_element,
        ),
    ):
        if size > 1:
            received = full_bytes * (size - 1) / size
            result.append(Volume(name, axis, received, (gathers + 1) * stage.num_layers))
    return tuple(result)


def replica_volumes(stage: Stage, layout: Layout) -> tuple[Volume, ...]:
    """Return the sum of dense gradients over replicas, once per step."""
    if layout.dp_replicate == 1:
        return ()
    dense = stage.dense(layout.tp) + stage.embedding + stage.head
    shard = dense / (layout.dp_shard * layout.cp)
    received = 2 * (layout.dp_replicate - 1) / layout.dp_replicate * shard * FP32
    return (Volume("gradients of replicas", "dp_replicate", received, stage.num_layers),)
