"""All layouts of a cluster, estimated and ranked."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from linnet.config import nearest
from linnet.errors import ConfigError
from linnet.model.config import ModelConfig
from linnet.parallel.layout import Layout
from linnet.parallel.plan.estimate import Estimate
from linnet.parallel.plan.hardware import Cluster, Device, Efficiency
from linnet.parallel.plan.serving import estimate_serving
from linnet.parallel.plan.serving_memory import ServingJob, Weights
from linnet.parallel.plan.training import BATCH_TOLERANCE, estimate_training
from linnet.parallel.plan.training_volumes import TrainingChoice, TrainingJob

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
MOST_STAGES = 32
MOST_EXPERT_WIDTH = 8
SEQUENCES_PER_ROW = (1, 2, 4, 8)
MIN_PIECE_TOKENS = 1024
"""A rank with fewer tokens of a row does little but wait for the others."""

LADDER: tuple[Weights, ...] = ("bf16", "experts-int8", "int8")
"""What is tried when the weights' dtype is free: as little rounding as fits."""


@dataclass(frozen=True, slots=True)
class Plans:
    """What a search found."""

    job: TrainingJob | ServingJob
    best: tuple[Estimate, ...]
    """That fit, the fastest first."""
    smallest: Estimate | None
    """The one that needs the least memory of those that do not fit; None if all do."""
    num_seen: int


def search_training(
    config: ModelConfig,
    cluster: Cluster,
    job: TrainingJob,
    efficiency: Efficiency | None = None,
    recompute: bool | None = None,
    fixed: Mapping[str, int] | None = None,
) -> Plans:
    """Return the layouts on which a model trains fastest.

    Args:
        config: of the model.
        cluster: its GPUs.
        job: length and batch.
        efficiency: the assumptions; the defaults if None.
        recompute: whether blocks are formed again in the backward pass; None tries both.
        fixed: sizes of axes that are given.
    """
    efficiency = efficiency or Efficiency()
    estimates: list[Estimate] = []
    for layout in _training_layouts(config, cluster, job, fixed or {}):
        estimates += _best_choices(config, layout, job, cluster, efficiency, recompute)
    return _ranked(job, estimates)


def search_serving(
    config: ModelConfig,
    cluster: Cluster,
    job: ServingJob,
    efficiency: Efficiency | None = None,
    fixed: Mapping[str, int] | None = None,
) -> Plans:
    """Return the layouts on which a model answers soonest; arguments as of `search_training`."""
    efficiency = efficiency or Efficiency()
    estimates = [
        estimate_serving(config, layout, job, cluster, efficiency)
        for layout in _serving_layouts(config, cluster, job, fixed or {})
    ]
    return _ranked(job, estimates)


def search_any_weights(
    config: ModelConfig,
    cluster: Cluster,
    job: ServingJob,
    efficiency: Efficiency | None = None,
    fixed: Mapping[str, int] | None = None,
) -> list[Plans]:
    """Return what each dtype of weights gives, up to the first that fits."""
    tried = []
    for weights in LADDER:
        tried.append(
            search_serving(config, cluster, replace(job, weights=weights), efficiency, fixed)
        )
        if tried[-1].best:
            break
    return tried


def gpus_needed(
    config: ModelConfig,
    device: Device,
    job: ServingJob,
    efficiency: Efficiency | None = None,
    most: int = 1024,
) -> int | None:
    """Return the fewest GPUs, of 1, 2, 4, ... or whole nodes, that hold a job; None if too many."""
    count = 1
    while count <= most:
        if search_serving(config, Cluster(count, device), job, efficiency).best:
            return count
        per_node = device.gpus_per_node
        count = min(2 * count, per_node) if count < per_node else count + per_node
        if count > 16 * per_node:  # by powers of two from there
            count = 2 * (count - per_node)
    return None


def _ranked(job: TrainingJob | ServingJob, estimates: list[Estimate]) -> Plans:
    best = sorted((e for e in estimates if e.fits), key=lambda e: e.cost_s)
    failing = [e for e in estimates if not e.fits]
    smallest = min(failing, key=lambda e: e.needed_bytes) if failing else None
    return Plans(job, tuple(best), smallest, len(estimates))


def _best_choices(
    config: ModelConfig,
    layout: Layout,
    job: TrainingJob,
    cluster: Cluster,
    efficiency: Efficiency,
    recompute: bool | None,
) -> list[Estimate]:
    """Return the estimates of a layout that may be the best: others are not computed."""

    def estimate(sequences: int, again: bool, is_balanced: bool) -> Estimate | None:
        choice = TrainingChoice(sequences, again, is_balanced)
        return estimate_training(config, layout, job, choice, cluster, efficiency)

    result: list[Estimate] = []
    for sequences in SEQUENCES_PER_ROW:
        if layout.num_rows * sequences * job.context > job.batch_tokens * (1 + BATCH_TOLERANCE):
            break
        for again in (False, True) if recompute is None else (recompute,):
            found = estimate(sequences, again, is_balanced=layout.cp > 1)
            if found is None:
                continue
            result.append(found)
            if layout.cp > 1 and found.fits and found.phases[0].parts.get("LASP+ states"):
                # Twice the states travel in the balanced split, and some are waited for.
                result += filter(None, [estimate(sequences, again, is_balanced=False)])
            if found.fits:
                break  # to compute blocks twice only takes longer
        if layout.cp > 1:
            break  # documents that lie within a rank would need no cp
    return result


def _training_layouts(
    config: ModelConfig, cluster: Cluster, job: TrainingJob, fixed: Mapping[str, int]
) -> Iterator[Layout]:
    for pp, tp, cp in _dense(config, cluster, job.context, fixed):
        rows = cluster.num_gpus // (pp * tp * cp)
        if rows * job.context > job.batch_tokens * (1 + BATCH_TOLERANCE):
            continue
        node_rows = max(1, cluster.device.gpus_per_node // (tp * cp))
        # All weights over all ranks, or over a node's ranks and replicated between nodes.
        replicas = {1, rows // node_rows} if rows % node_rows == 0 else {1}
        if "dp_replicate" in fixed or "dp_shard" in fixed:
            replicas = set(_divisors(rows))
        for replicate in sorted(replicas):
            axes = {"pp": pp, "tp": tp, "cp": cp, "dp_replicate": replicate}
            axes["dp_shard"] = rows // replicate
            yield from _with_experts(config, cluster, axes, fixed, any_replicas=True)


def _serving_layouts(
    config: ModelConfig, cluster: Cluster, job: ServingJob, fixed: Mapping[str, int]
) -> Iterator[Layout]:
    for pp, tp, cp in _dense(config, cluster, job.context, fixed):
        replicate = cluster.num_gpus // (pp * tp * cp)
        if replicate > job.sequences:
            continue  # ranks without a sequence
        axes = {"pp": pp, "tp": tp, "cp": cp, "dp_replicate": replicate, "dp_shard": 1}
        yield from _with_experts(config, cluster, axes, fixed, any_replicas=False)


def _dense(
    config: ModelConfig, cluster: Cluster, context: int, fixed: Mapping[str, int]
) -> Iterator[tuple[int, int, int]]:
    """Yield sizes of pp, tp and cp that divide the world and the model."""
    heads = math.gcd(config.num_attention_heads, config.num_key_value_heads)
    most_stages = max(fixed.get("pp", 1), min(MOST_STAGES, config.num_hidden_layers))
    for pp in _divisors(cluster.num_gpus):
        if pp > most_stages or fixed.get("pp", pp) != pp:
            continue
        stage = cluster.num_gpus // pp
        for tp in _divisors(math.gcd(heads, stage)):
            if tp > cluster.device.gpus_per_node or fixed.get("tp", tp) != tp:
                continue
            for cp in _divisors(stage // tp):
                is_wanted = fixed.get("cp", cp) == cp
                if is_wanted and (cp == 1 or context // cp >= MIN_PIECE_TOKENS):
                    yield pp, tp, cp


def _with_experts(
    config: ModelConfig,
    cluster: Cluster,
    axes: dict[str, int],
    fixed: Mapping[str, int],
    any_replicas: bool,
) -> Iterator[Layout]:
    """Yield the layouts of some dense axes: all ways to spread the experts.

    Serving does not shard what edp ranks hold, so that more of them than replicas are a waste.
    """
    stage = axes["dp_replicate"] * axes["dp_shard"] * axes["cp"] * axes["tp"]
    for ep in _divisors(math.gcd(config.num_local_experts, stage)):
        for etp in _divisors(math.gcd(config.intermediate_size, stage // ep)):
            edp = stage // (ep * etp)
            if etp > min(MOST_EXPERT_WIDTH, cluster.device.gpus_per_node):
                continue
            if any_replicas and config.hidden_size % edp:
                continue
            if not any_replicas and axes["dp_replicate"] % edp:
                continue
            sizes = {**axes, "ep": ep, "etp": etp}
            if all(sizes[axis] == size for axis, size in fixed.items()):
                yield Layout(**sizes)


def check_fixed(fixed: Mapping[str, int]) -> None:
    """Refuse axes that no layout has.

    Raises:
        ConfigError: names the nearest one.
    """
    for axis in fixed:
        if axis not in AXES:
            raise ConfigError(f"{axis!r} is no axis{nearest(axis, AXES)}")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
