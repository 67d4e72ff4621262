"""The time to the first token on a layout, and to each further one.

A prompt is taken in by chunks; with cp, keys and values that are kept do not move, and queries
travel (`linnet.parallel.spread_pages`).
"""

import math

from linnet.model.config import ModelConfig
from linnet.model.cost import decode_flops, prefill_flops
from linnet.parallel.layout import Layout
from linnet.parallel.plan.estimate import (
    BUBBLE,
    Estimate,
    Phase,
    exchange_seconds,
    exposed_seconds,
)
from linnet.parallel.plan.hardware import GIB, Cluster, Efficiency
from linnet.parallel.plan.serving_memory import ServingJob, serving_memory, weight_bytes
from linnet.parallel.plan.shape import (
    BF16,
    Flops,
    Stage,
    expert_params,
    prefill_parts,
    stages_of,
)
from linnet.parallel.plan.volumes import (
    Volume,
    answers_bytes,
    layer_volumes,
    shared_tokens,
    split_chunk_bytes,
)

REQUEST_TOKENS = 1024
"""Layouts are ranked by the time of a prompt and an answer of so many tokens."""


def estimate_serving(
    config: ModelConfig, layout: Layout, job: ServingJob, cluster: Cluster, efficiency: Efficiency
) -> Estimate:
    """Return the memory, and the times if it fits."""
    stages = stages_of(config, layout.pp, job.context)
    memory = max(
        (serving_memory(config, stage, layout, job) for stage in stages),
        key=lambda parts: sum(parts.values()),
    )
    usable = cluster.device.memory_gib * GIB * efficiency.memory
    choices = {
        "weights": job.weights,
        "keys and values": job.keys,
        "chunk": f"{min(job.chunk_tokens, job.context):,} tokens",
    }
    estimate = Estimate(layout=layout, choices=choices, memory=memory, usable_bytes=usable)
    if not estimate.fits:
        return estimate
    prefill = _prefill(config, layout, job, cluster, efficiency)
    decode = _decode(config, layout, job, cluster, efficiency)
    return Estimate(
        layout=layout,
        choices=choices,
        memory=memory,
        usable_bytes=usable,
        phases=(prefill, decode),
        cost_s=prefill.seconds + REQUEST_TOKENS * decode.seconds,
    )


def _prefill(
    config: ModelConfig, layout: Layout, job: ServingJob, cluster: Cluster, efficiency: Efficiency
) -> Phase:
    """Return the intake of one sequence up to its first new token."""
    num_chunks = math.ceil(job.context / job.chunk_tokens)
    slowest = None
    for stage in set(stages_of(config, layout.pp, job.context)):
        flops = prefill_parts(config, stage, job.context)
        read = weight_bytes(config, stage, layout, job.weights)
        compute = _prefill_seconds(flops, layout, read, num_chunks, cluster, efficiency)
        volumes = prefill_volumes(config, stage, layout, job, num_chunks)
        exchange_s = exchange_seconds(volumes, layout, cluster, efficiency)
        parts = compute | exposed_seconds(exchange_s, compute, efficiency)
        if slowest is None or sum(parts.values()) > sum(slowest[0].values()):
            slowest = parts, volumes, exchange_s
    assert slowest is not None
    parts, volumes, exchange_s = slowest
    if layout.pp > 1:  # chunks follow each other through the stages
        parts = {**parts, BUBBLE: sum(parts.values()) * (layout.pp - 1) / num_chunks}
    seconds = sum(parts.values())
    at_once = min(layout.dp_replicate, job.sequences)
    peak = layout.world_size * cluster.device.tflops * 1e12
    return Phase(
        name="prefill",
        parts=parts,
        volumes=volumes,
        exchange_s=exchange_s,
        tokens_per_s=at_once * job.context / seconds,
        mfu=at_once * prefill_flops(config, job.context) / (seconds * peak),
    )


def _prefill_seconds(
    flops: Flops,
    layout: Layout,
    read: dict[str, float],
    num_chunks: int,
    cluster: Cluster,
    efficiency: Efficiency,
) -> dict[str, float]:
    """Return the seconds of computing; a chunk takes at least as long as reading the weights."""
    peak = cluster.device.tflops * 1e12
    hbm = cluster.device.hbm_gbs * 1e9 * efficiency.hbm
    heads = layout.cp * layout.tp
    balance = efficiency.expert_balance if layout.ep > 1 else 1.0
    dense = flops.attention / heads + (flops.whole + flops.head / layout.tp) / layout.cp
    experts = flops.experts / heads / (peak * efficiency.experts * balance)
    return {
        "attention projections": max(
            dense / (peak * efficiency.matmul), num_chunks * read["other weights"] / hbm
        ),
        "experts": max(experts, num_chunks * read["expert weights"] / hbm),
        "lightning attention": flops.lightning / heads / (peak * efficiency.lightning),
        "softmax attention": flops.softmax / heads / (peak * efficiency.softmax),
    }


def prefill_volumes(
    config: ModelConfig, stage: Stage, layout: Layout, job: ServingJob, num_chunks: int
) -> tuple[Volume, ...]:
    """Return what a rank receives while one sequence is taken in."""
    chunk = job.context / num_chunks / layout.cp
    volumes = [v.times(num_chunks) for v in layer_volumes(config, stage, layout, chunk)]
    if layout.cp > 1 and stage.num_softmax:
        new, past = split_chunk_bytes(config, layout, chunk)
        moved = stage.num_softmax * (num_chunks * new + (num_chunks - 1) * past)
        calls = stage.num_softmax * (num_chunks + 2 * (num_chunks - 1))
        volumes.append(Volume("keys and values", "cp", moved, calls))
    if layout.pp > 1:
        boundary = chunk * config.hidden_size * BF16 * num_chunks
        volumes.append(Volume("between stages", "pp", boundary, num_chunks, is_ring=False))
    return tuple(volumes)


def _decode(
    config: ModelConfig, layout: Layout, job: ServingJob, cluster: Cluster, efficiency: Efficiency
) -> Phase:
    """Return one step that gives every sequence a token, at the end of its context."""
    sequences = math.ceil(job.sequences / layout.dp_replicate)
    parts: dict[str, float] = {}
    exchange_s: dict[str, float] = {}
    volumes: list[Volume] = []
    for stage in stages_of(config, layout.pp, job.context):  # one after the other
        compute = _decode_seconds(config, stage, layout, job, cluster, efficiency)
        own = [*layer_volumes(config, stage, layout, sequences, num_groups=1)]
        if layout.cp > 1 and stage.num_softmax:
            moved = answers_bytes(config, layout, sequences) * stage.num_softmax
            own.append(Volume("keys and values", "cp", moved, stage.num_softmax))
        if layout.pp > 1:
            row = sequences * config.hidden_size * BF16
            own.append(Volume("between stages", "pp", row, 1, is_ring=False))
        # The state stays on every cp rank: nothing of it travels.
        own = [volume for volume in own if volume.name != "LASP+ states"]
        stage_s = exchange_seconds(tuple(own), layout, cluster, efficiency)
        volumes += own
        for part, seconds in (compute | stage_s).items():
            parts[part] = parts.get(part, 0.0) + seconds
        for name, seconds in stage_s.items():
            exchange_s[name] = exchange_s.get(name, 0.0) + seconds
    seconds = sum(parts.values())
    peak = layout.world_size * cluster.device.tflops * 1e12
    return Phase(
        name="decode",
        parts=parts,
        volumes=_merged(volumes),
        exchange_s=exchange_s,
        tokens_per_s=job.sequences / seconds,
        mfu=job.sequences * decode_flops(config, job.context) / (seconds * peak),
    )


def _decode_seconds(
    config: ModelConfig,
    stage: Stage,
    layout: Layout,
    job: ServingJob,
    cluster: Cluster,
    efficiency: Efficiency,
) -> dict[str, float]:
    """Return the seconds of a token of each sequence: of reading, or of computing if longer."""
    sequences = math.ceil(job.sequences / layout.dp_replicate)
    memory = serving_memory(config, stage, layout, job)
    hbm = cluster.device.hbm_gbs * 1e9 * efficiency.hbm
    peak = cluster.device.tflops * 1e12
    held = config.num_local_experts / layout.ep
    together = sequences * layout.dp_replicate / layout.edp
    chance = config.num_experts_per_tok / config.num_local_experts
    # Of the fullest rank: at least one expert, at most all it holds.
    touched = max(1.0, held * (1 - (1 - chance) ** together))
    rows = shared_tokens(layout, sequences) * config.num_experts_per_tok
    expert_flops = 2 * expert_params(config) * stage.num_layers * rows
    keys_flops = 4 * config.inner_size / layout.tp * job.context / layout.cp * sequences
    dense = 2 * (stage.attention + stage.head) / layout.tp * sequences
    # The embedding is not read but for one row.
    other = memory["other weights"] - BF16 * stage.embedding / layout.tp
    return {
        "attention projections": max(other / hbm, dense / (peak * efficiency.matmul)),
        "experts": max(
            memory["expert weights"] * touched / held / hbm,
            expert_flops / (peak * efficiency.experts),
        ),
        "lightning attention": 2 * memory["lightning states"] / hbm,
        "softmax attention": max(
            memory["keys and values"] / hbm,
            keys_flops * stage.num_softmax / (peak * efficiency.softmax),
        ),
    }


def _merged(volumes: list[Volume]) -> tuple[Volume, ...]:
    """Add up the volumes of the same name, of stages that follow each other."""
    result: dict[str, Volume] = {}
    for volume in volumes:
        seen = result.get(volume.name)
        result[volume.name] = (
            volume
            if seen is None
            else Volume(
                volume.name,
                volume.axis,
                seen.num_bytes + volume.num_bytes,
                seen.calls + volume.calls,
                volume.is_ring,
            )
        )
    return tuple(result.values())
