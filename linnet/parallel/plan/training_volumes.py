"""What is trained, and what a rank receives for it: per micro-batch, and per step."""

from dataclasses import dataclass

from linnet.errors import ConfigError
from linnet.model.config import ModelConfig
from linnet.parallel.layout import Layout
from linnet.parallel.plan.shape import BF16, FP32, Gather, Stage
from linnet.parallel.plan.volumes import Volume, key_exchange_bytes, layer_volumes


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
    gather: Gather = "fp32"
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
