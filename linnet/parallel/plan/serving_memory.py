"""What is served, and the bytes that each rank holds for it, by part.

Weights are not sharded by FSDP; embedding and LM head are cut over tp, as serving engines do. Keys
and values are spread evenly over the cp ranks, states are kept on each of them.
"""

import math
from dataclasses import dataclass
from typing import Literal

from linnet.errors import ConfigError
from linnet.model.config import LIGHTNING, SOFTMAX, ModelConfig
from linnet.parallel.layout import Layout
from linnet.parallel.plan.shape import BF16, FP32, Stage, expert_params
from linnet.parallel.plan.training_memory import activation_bytes
from linnet.parallel.plan.volumes import keys_bytes, state_bytes

Weights = Literal["bf16", "int8", "experts-int8"]
KeysDtype = Literal["bf16", "fp8"]

WEIGHT_BYTES: dict[Weights, tuple[int, int]] = {
    "bf16": (2, 2),
    "experts-int8": (2, 1),
    "int8": (1, 1),
}
"""Bytes of an element of (attention, experts); embedding and LM head stay bf16, routers fp32."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServingJob:
    """What is to be served.

    Raises:
        ConfigError: a number is not positive.
    """

    context: int
    """Tokens of each sequence."""
    sequences: int = 1
    """That are in memory at once."""
    weights: Weights = "bf16"
    keys: KeysDtype = "bf16"
    chunk_tokens: int = 8192
    """Of a prompt that are taken in at a time."""

    def __post_init__(self) -> None:
        for name in ("context", "sequences", "chunk_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")

    @property
    def keys_itemsize(self) -> int:
        """Bytes of one element of keys and values."""
        return 2 if self.keys == "bf16" else 1


def serving_memory(
    config: ModelConfig, stage: Stage, layout: Layout, job: ServingJob
) -> dict[str, float]:
    """Return the bytes of each part on the fullest rank of a stage."""
    sequences = math.ceil(job.sequences / layout.dp_replicate)
    context = job.context * sequences / layout.cp
    itemsize = job.keys_itemsize
    return {
        **weight_bytes(config, stage, layout, job.weights),
        "keys and values": keys_bytes(config, layout, context, itemsize) * stage.num_softmax,
        "lightning states": state_bytes(config, layout.tp) * stage.num_lightning * sequences,
        "activations of a chunk": _chunk_bytes(config, stage, layout, job, sequences),
    }


def weight_bytes(
    config: ModelConfig, stage: Stage, layout: Layout, weights: Weights
) -> dict[str, float]:
    """Return the bytes of a rank's weights, scales included: of experts, and all others."""
    attention, experts = WEIGHT_BYTES[weights]
    parts = layout.ep * layout.etp
    per_row = 0
    if experts == 1:  # one fp32 scale per row of each matrix
        rows = 2 * config.intermediate_size / layout.etp + config.hidden_size
        per_row = FP32 * rows * config.num_local_experts / layout.ep * stage.num_layers
    others = attention * stage.attention / layout.tp + FP32 * stage.whole
    others += BF16 * (stage.embedding + stage.head) / layout.tp
    return {
        "expert weights": experts * stage.experts / parts + per_row,
        "other weights": others,
    }


def _chunk_bytes(
    config: ModelConfig, stage: Stage, layout: Layout, job: ServingJob, sequences: int
) -> float:
    """Return the bytes of the largest block's activations, logits, and one widened expert."""
    tokens = min(job.chunk_tokens, job.context) / layout.cp
    kinds = [LIGHTNING] * (stage.num_lightning > 0) + [SOFTMAX] * (stage.num_softmax > 0)
    # Attention and experts do not run at once, and hidden states cross both.
    largest = max(max(activation_bytes(config, kind, layout, tokens)) for kind in kinds)
    logits = 2 * FP32 * sequences * config.vocab_size * (stage.head > 0)
    widened = BF16 * expert_params(config) / layout.etp * (job.weights != "bf16")
    # Each rank holds the queries of all ranks, and fp32 answers three times.
    looked_up = 0.0
    if layout.cp > 1 and stage.num_softmax:
        looked_up = layout.cp * tokens * config.inner_size / layout.tp * (BF16 + 3 * FP32)
    return max(largest, looked_up) + 2 * tokens * config.hidden_size * BF16 + logits + widened
