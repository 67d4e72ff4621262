"""The time of a training step on a layout, and what each rank holds meanwhile."""

from dataclasses import dataclass
from functools import lru_cache

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
from linnet.parallel.plan.shape import FP32, GATHER_BYTES, Stage, forward_parts, stages_of
from linnet.parallel.plan.training_memory import Microbatch, sharded_params, training_memory
from linnet.parallel.plan.training_volumes import (
    TrainingChoice,
    TrainingJob,
    microbatch_volumes,
    replica_volumes,
    sharding_volumes,
)
from linnet.parallel.plan.volumes import Volume

BATCH_TOLERANCE = 0.25
"""Tokens of a step may differ so much from what was asked, if rows do not divide them."""

SOFTMAX_BACKWARD = 2.5
"""Over forward: the scores are formed again."""


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


@dataclass(frozen=True, slots=True)
class _Turn:
    """Forward and backward of one micro-batch in one stage."""

    stage: Stage
    parts: dict[str, float]
    volumes: tuple[Volume, ...]
    exchange_s: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


def _turn(
    config: ModelConfig,
    stage: Stage,
    layout: Layout,
    job: TrainingJob,
    choice: TrainingChoice,
    num_micro: int,
    cluster: Cluster,
    efficiency: Efficiency,
) -> _Turn:
    compute = compute_seconds(config, stage, layout, job, choice, cluster, efficiency)
    # Stages of a pipeline keep their weights gathered for the whole step.
    per_micro = 1 / num_micro if layout.pp > 1 else 1.0
    sharding = sharding_volumes(stage, layout, GATHER_BYTES[job.gather])
    volumes = microbatch_volumes(config, stage, layout, job, choice)
    volumes += tuple(volume.times(per_micro) for volume in sharding)
    exchange_s = exchange_seconds(volumes, layout, cluster, efficiency)
    exposed = exposed_seconds(exchange_s, compute, efficiency)
    return _Turn(stage, compute | exposed, volumes, exchange_s)


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
    turn = max(
        (
            _turn(config, stage, layout, job, choice, num_micro, cluster, efficiency)
            for stage in {stages[0], stages[len(stages) // 2], stages[-1]}
        ),
        key=lambda turn: turn.seconds,
    )
    replicas = replica_volumes(turn.stage, layout)
    replicas_s = exchange_seconds(replicas, layout, cluster, efficiency)
    parts = {name: value * num_micro for name, value in turn.parts.items()} | replicas_s
    if layout.pp > 1:
        parts[BUBBLE] = (layout.pp - 1) * turn.seconds
    # Reads parameter, gradient and two moments, writes all but the gradient.
    touched = sharded_params(turn.stage, layout) * 7 * FP32
    parts["optimizer"] = touched / (cluster.device.hbm_gbs * 1e9 * efficiency.hbm)
    total_s = sum(parts.values())
    tokens = num_micro * layout.num_rows * choice.sequences * job.context
    peak = layout.world_size * cluster.device.tflops * 1e12
    return Phase(
        name="step",
        parts=parts,
        volumes=(*(volume.times(num_micro) for volume in turn.volumes), *replicas),
        exchange_s={k: v * num_micro for k, v in turn.exchange_s.items()} | replicas_s,
        tokens_per_s=tokens / total_s,
        mfu=_flops_per_token(config, job.context) * tokens / (total_s * peak),
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
        "experts": flops.experts * heads * passes / (peak * efficiency.experts * balance),
        "lightning attention": lightning * heads * passes / (peak * efficiency.lightning),
        "softmax attention": softmax / (peak * efficiency.softmax),
        "LM head and loss, fp32": flops.head * row * 3 / head_peak,
    }
