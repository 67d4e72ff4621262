"""Bytes of one rank in training, by part, at their peak.

FSDP shards fp32 parameters, gradients and AdamW moments. It gathers a block before it is used and
the next one meanwhile, and frees it thereafter; embedding, LM head and final norm stay gathered, in
fp32, for the whole step, and so does the LM head's gradient from the loss on. The peak is in the
backward pass of a block, in the loss, or when the last gradients are reduced.

`scripts/check_plan_memory.py` compares this with torch's memory tracker at 2,048 ranks.
"""

from dataclasses import dataclass

from linnet.model.config import LIGHTNING, SOFTMAX, ModelConfig
from linnet.model.cost import attention_params
from linnet.ops.cross_entropy import CHUNK_ELEMENTS, MIN_CHUNK_TOKENS
from linnet.parallel.layout import Layout
from linnet.parallel.plan.shape import BF16, FP32, Stage, expert_params
from linnet.parallel.plan.volumes import keys_bytes, lasp_bytes, shared_tokens, state_bytes


@dataclass(frozen=True, slots=True)
class Microbatch:
    """What a rank computes at a time."""

    tokens: int
    """Of this rank in the dense cut."""
    recompute: bool
    """Whether a block's activations are formed again in the backward pass."""
    is_balanced: bool
    """Whether each rank holds an early and a late piece of a row."""
    in_flight: int = 1
    """Micro-batches whose activations a stage holds at once."""
    gather_bytes: int = BF16
    """Of an element of a block that FSDP gathers."""
    expert_balance: float = 1.0
    """Rows of the mean expert rank over those of the fullest."""


def sharded_params(stage: Stage, layout: Layout) -> float:
    """Return the parameters of a stage that one rank keeps."""
    dense = stage.dense(layout.tp) + stage.embedding + stage.head
    dense /= layout.dp_shard * layout.cp
    return dense + stage.experts / (layout.ep * layout.etp * layout.edp)


def training_memory(
    config: ModelConfig, stage: Stage, layout: Layout, batch: Microbatch
) -> dict[str, float]:
    """Return the bytes of each part on the fullest rank of a stage."""
    params = sharded_params(stage, layout)
    activations = kept_bytes(config, stage, layout, batch) * batch.in_flight
    sharded = {
        "parameters": FP32 * params,
        "gradients": FP32 * params,
        "AdamW moments": 2 * FP32 * params,
    }
    root = {"embedding and LM head": FP32 * (stage.embedding + 2 * stage.head)}
    moments = (
        {"activations kept": activations, **root, **_backward(config, stage, layout, batch)},
        {"activations kept": activations, **root, **_loss(config, stage, batch.tokens)},
        # Gradients of both, and once more as the buffer that is reduced; of the blocks nothing is
        # left but the last buffer.
        {
            "embedding and LM head": 2 * FP32 * (stage.embedding + stage.head),
            "unsharded blocks": FP32 * dense_params(config, stage, layout),
        },
    )
    return sharded | max(moments, key=lambda parts: sum(parts.values()))


def kept_bytes(config: ModelConfig, stage: Stage, layout: Layout, batch: Microbatch) -> float:
    """Return the activations of one micro-batch that wait for its backward pass."""
    if batch.recompute:
        return stage.num_layers * batch.tokens * config.hidden_size * BF16
    counts = {LIGHTNING: stage.num_lightning, SOFTMAX: stage.num_softmax}
    states = state_bytes(config, layout.tp) * stage.num_lightning * (layout.cp > 1)
    return states + sum(
        count * sum(activation_bytes(config, kind, layout, batch.tokens, batch.expert_balance))
        for kind, count in counts.items()
    )


def activation_bytes(
    config: ModelConfig, kind: int, layout: Layout, tokens: float, expert_balance: float = 1.0
) -> tuple[float, float]:
    """Return what one block keeps for its backward pass: (attention and residuals, expert rows).

    Norms are formed again in any case. Experts keep the rows received, the products of the first
    two matrices, and the results that came home.
    """
    inner = config.inner_size / layout.tp
    keys = config.num_key_value_heads * config.head_dim / layout.tp
    if kind == LIGHTNING:
        # q, k, v before SiLU, and behind it where the exchange needs them; output and gate.
        per_token = (3 + 3 * (layout.cp > 1) + 2) * inner * BF16
        per_token += 3 * inner * FP32 * (layout.tp > 1)  # the norm over all ranks is wide
    else:
        per_token = 3 * inner * BF16 + 3 * keys * BF16  # queries and keys also before they turn
    per_token += 2 * config.hidden_size * BF16
    rows = shared_tokens(layout, tokens) * config.num_experts_per_tok
    if layout.ep > 1:
        rows /= expert_balance
    per_row = (layout.etp + 1) * config.hidden_size + 2 * config.intermediate_size
    return per_token * tokens, per_row * rows * BF16


def dense_params(config: ModelConfig, stage: Stage, layout: Layout) -> float:
    """Return the parameters of the largest block, but for its experts, that a rank gathers."""
    kinds = [LIGHTNING] * (stage.num_lightning > 0) + [SOFTMAX] * (stage.num_softmax > 0)
    attention = max(attention_params(config, kind) for kind in kinds) / layout.tp
    return attention + stage.whole / stage.num_layers


def gathered_bytes(
    config: ModelConfig, stage: Stage, layout: Layout, gather_bytes: int = BF16
) -> float:
    """Return the most that FSDP holds of unsharded blocks and their gradients.

    Experts and the rest of a block are gathered and reduced one after the other: while the experts
    run backward, their block and the dense part of the next are there, and the dense gradients of
    the block before are on their way in fp32; then the experts' gradients are. A stage of a
    pipeline keeps all its blocks, and fp32 sums of their gradients.
    """
    if layout.dp_shard * layout.cp == layout.edp == 1:
        return 0.0
    experts = expert_params(config) * config.num_local_experts / (layout.ep * layout.etp)
    if layout.pp > 1:
        whole = stage.dense(layout.tp) + experts * stage.num_layers
        return whole * (gather_bytes + FP32) + FP32 * experts
    dense = dense_params(config, stage, layout)
    computing = 2 * dense + 2 * experts
    reducing = 2 * dense + experts
    return max(
        gather_bytes * computing + FP32 * dense,
        gather_bytes * reducing + FP32 * experts,
    )


def _backward(
    config: ModelConfig, stage: Stage, layout: Layout, batch: Microbatch
) -> dict[str, float]:
    """Return the bytes of the backward pass of the largest block, beside what is kept."""
    parts = {"unsharded blocks": gathered_bytes(config, stage, layout, batch.gather_bytes)}
    rows = shared_tokens(layout, batch.tokens) * config.num_experts_per_tok
    wide = max(
        rows * 2 * config.intermediate_size, 4 * batch.tokens * config.inner_size / layout.tp
    )
    again = 0.0
    if batch.recompute:
        kinds = [LIGHTNING] * (stage.num_lightning > 0) + [SOFTMAX] * (stage.num_softmax > 0)
        again = max(
            sum(activation_bytes(config, kind, layout, batch.tokens, batch.expert_balance))
            for kind in kinds
        )
    parts["one block's backward pass"] = wide * BF16 + again
    if layout.cp > 1 and stage.num_lightning:
        gathered = lasp_bytes(config, layout, batch.is_balanced)
        parts["gathered states"] = gathered + state_bytes(config, layout.tp)
    if layout.cp > 1 and stage.num_softmax:
        # Keys and values: those here, those on their way, and the gradients of both.
        parts["visiting keys and values"] = 4 * keys_bytes(config, layout, batch.tokens)
    return parts


def _loss(config: ModelConfig, stage: Stage, tokens: int) -> dict[str, float]:
    """Return the bytes of the loss: it runs while no block is gathered."""
    if not stage.head:
        return {}
    chunk = max(MIN_CHUNK_TOKENS, CHUNK_ELEMENTS // config.vocab_size)
    return {
        "logits of a chunk": 2 * FP32 * chunk * config.vocab_size,
        "hidden states of the loss": 2 * tokens * config.hidden_size * BF16,
    }
