"""A model over lengths, and beside it the same model with softmax attention in every layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from linnet.model.config import ModelConfig
from linnet.model.cost import forward_flops
from linnet.parallel.plan.hardware import Cluster, Efficiency
from linnet.parallel.plan.search import (
    gpus_needed,
    search_any_weights,
    search_serving,
    search_training,
)
from linnet.parallel.plan.serving_memory import ServingJob, Weights
from linnet.parallel.plan.shape import softmax_twin
from linnet.parallel.plan.training_volumes import TrainingJob

LENGTHS = tuple(2**power for power in range(13, 23))
"""8K to 4M tokens."""

STAGES = tuple(1024 * length for length in (8, 32, 128, 512, 1024))
"""Lengths of training, from pretraining to the last extension (MiniMax-01, table 6)."""

TRAINING_GPUS = 2048
TRAINING_TOKENS = 32 * 2**20
"""Per step, the first batch of MiniMax-01 in which rows of 1M tokens keep 2,048 GPUs busy."""


@dataclass(frozen=True, slots=True)
class ServingPoint:
    """One sequence of some length, each figure on its best layout; None for what does not fit."""

    length: int
    memory_bytes: float
    """Of the fullest GPU, on the layout that needs least."""
    first_token_s: float | None
    tokens_per_s: float | None
    num_gpus: int | None
    """The fewest that hold it."""
    flops_per_token: float
    """Forward, mean over the sequence."""


@dataclass(frozen=True, slots=True)
class TrainingPoint:
    """Training at some length; None if no layout holds it."""

    length: int
    tokens_per_s: float | None
    mfu: float | None


@dataclass(frozen=True, slots=True)
class Curves:
    """All points of one model."""

    name: str
    serving: tuple[ServingPoint, ...]
    training: tuple[TrainingPoint, ...]


def both_curves(
    config: ModelConfig,
    cluster: Cluster,
    training: Cluster,
    efficiency: Efficiency,
    lengths: Sequence[int] = LENGTHS,
    stages: Sequence[int] = STAGES,
) -> tuple[Weights, list[Curves]]:
    """Return the dtype of the weights in serving, and the curves of the model and its twin.

    The dtype is the one with the least rounding with which the model's longest sequence fits, the
    same at all lengths.

    Args:
        config: of the model.
        cluster: on which it is served.
        training: on which it is trained.
        efficiency: the assumptions.
        lengths: of served sequences.
        stages: lengths of training.
    """
    tried = search_any_weights(config, cluster, ServingJob(context=max(lengths)), efficiency)
    job = tried[-1].job
    assert isinstance(job, ServingJob)
    models = {"hybrid": config, "softmax only": softmax_twin(config)}
    return job.weights, [
        Curves(
            name,
            tuple(
                _serving_point(model, cluster, replace(job, context=length), efficiency)
                for length in lengths
            ),
            tuple(_training_point(model, training, length, efficiency) for length in stages),
        )
        for name, model in models.items()
    ]


def _serving_point(
    config: ModelConfig, cluster: Cluster, job: ServingJob, efficiency: Efficiency
) -> ServingPoint:
    plans = search_serving(config, cluster, job, efficiency)
    seen = [*plans.best, *([plans.smallest] if plans.smallest else [])]
    return ServingPoint(
        length=job.context,
        memory_bytes=min((e.needed_bytes for e in seen), default=math.nan),
        first_token_s=min((e.phases[0].seconds for e in plans.best), default=None),
        tokens_per_s=max((e.phases[1].tokens_per_s for e in plans.best), default=None),
        num_gpus=gpus_needed(config, cluster.device, job, efficiency),
        flops_per_token=forward_flops(config, job.context) / job.context,
    )


def _training_point(
    config: ModelConfig, cluster: Cluster, length: int, efficiency: Efficiency
) -> TrainingPoint:
    job = TrainingJob(context=length, batch_tokens=max(length, TRAINING_TOKENS))
    # Of the many layouts those without pipeline and replicas: the others are hardly ever better.
    fixed = {"pp": 1, "dp_replicate": 1, "tp": 1}
    plans = search_training(config, cluster, job, efficiency, fixed=fixed)
    step = plans.best[0].phases[0] if plans.best else None
    return TrainingPoint(length, step.tokens_per_s if step else None, step.mfu if step else None)
