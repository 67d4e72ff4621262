"""What a model costs: parameters, bytes, FLOPs, cache. Arithmetic on the config, no tensors.

A multiply-add is two FLOPs; norms, activations and the softmax itself are not counted.
"""

from dataclasses import dataclass

from linnet.model.config import LIGHTNING, SOFTMAX, ModelConfig

PUBLISHED_BLOCK_LEN = 256
"""Block length B of the published kernels, for the within-block part of lightning attention."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The figures that `linnet info` prints."""

    params_total: int
    params_active: int
    """Parameters that one token passes, without embedding and LM head."""
    checkpoint_bytes: int
    """bf16 with fp32 routers, as published."""
    kv_bytes_per_token: int
    """bf16 keys and values of all softmax layers."""
    state_bytes: int
    """fp32 states of all lightning layers, per sequence, whatever its length."""


def cost_of(config: ModelConfig) -> Cost:
    """Count parameters and bytes."""
    expert = 3 * config.hidden_size * config.intermediate_size
    num_layers = config.num_hidden_layers
    gates = config.hidden_size * config.num_local_experts * num_layers
    norms = config.hidden_size * (2 * num_layers + 1)
    attention = sum(attention_params(config, kind) for kind in config.attn_type_list)
    shared = 0
    if config.shared_intermediate_size:
        one = 3 * config.hidden_size * config.shared_intermediate_size + config.hidden_size
        shared = one * num_layers
    common = attention + gates + norms + shared
    total = common + expert * config.num_local_experts * num_layers
    total += 2 * config.vocab_size * config.hidden_size
    num_softmax = sum(kind == SOFTMAX for kind in config.attn_type_list)
    state_elements = config.inner_size * config.head_dim * (num_layers - num_softmax)
    return Cost(
        params_total=total,
        params_active=common + expert * config.num_experts_per_tok * num_layers,
        checkpoint_bytes=2 * total + 2 * gates,
        kv_bytes_per_token=2 * 2 * config.num_key_value_heads * config.head_dim * num_softmax,
        state_bytes=4 * state_elements,
    )


def attention_params(config: ModelConfig, kind: int) -> int:
    """Return the parameters of one attention sublayer, its inner norm included."""
    hidden, inner = config.hidden_size, config.inner_size
    if kind == LIGHTNING:
        return 5 * hidden * inner + inner
    return 2 * hidden * inner + 2 * hidden * config.num_key_value_heads * config.head_dim


def forward_flops(config: ModelConfig, length: int) -> int:
    """Return the FLOPs of one forward pass over a sequence of `length` tokens, LM head included.

    Lightning layers cost 4 K V per head and token for the state and 2 (K + V) per pair within a
    block of 256; softmax layers 2 (K + V) per head and visible pair.
    """
    inner, head_dim = config.inner_size, config.head_dim
    weights = cost_of(config).params_active + config.vocab_size * config.hidden_size
    num_softmax = sum(kind == SOFTMAX for kind in config.attn_type_list)
    num_lightning = config.num_hidden_layers - num_softmax
    full, rest = divmod(length, PUBLISHED_BLOCK_LEN)
    pairs_in_blocks = full * _causal_pairs(PUBLISHED_BLOCK_LEN) + _causal_pairs(rest)
    lightning = 4 * inner * head_dim * length + 4 * inner * pairs_in_blocks
    softmax = 4 * inner * _causal_pairs(length)
    return 2 * weights * length + num_lightning * lightning + num_softmax * softmax


def prefill_flops(config: ModelConfig, length: int) -> int:
    """Return the FLOPs of taking in `length` tokens up to the logits of the last.

    Of the others the last layer computes keys and values, or its state, and no more.
    """
    hidden, inner = config.hidden_size, config.inner_size
    feed_forward = 3 * hidden * config.intermediate_size * config.num_experts_per_tok
    feed_forward += hidden * (config.num_local_experts + 1)  # the router and a norm
    if config.shared_intermediate_size:
        feed_forward += 3 * hidden * config.shared_intermediate_size + hidden
    # Of softmax attention the projections of queries and outputs, of lightning gate and outputs.
    unread = feed_forward + 2 * hidden * inner + config.vocab_size * hidden
    skipped = 2 * unread * (length - 1)
    if config.attn_type_list[-1] == SOFTMAX:
        skipped += 4 * inner * (_causal_pairs(length) - length)
    return forward_flops(config, length) - skipped


def training_flops(config: ModelConfig, length: int) -> int:
    """Return the FLOPs of forward and backward over a sequence, without recomputation."""
    return 3 * forward_flops(config, length)


def decode_flops(config: ModelConfig, position: int) -> int:
    """Return the FLOPs of the token at `position` when all before it are cached."""
    inner = config.inner_size
    weights = cost_of(config).params_active + config.vocab_size * config.hidden_size
    num_softmax = sum(kind == SOFTMAX for kind in config.attn_type_list)
    num_lightning = config.num_hidden_layers - num_softmax
    attention = num_lightning * 4 * inner * config.head_dim
    return 2 * weights + attention + num_softmax * 4 * inner * (position + 1)


def _causal_pairs(length: int) -> int:
    return length * (length + 1) // 2


@dataclass(frozen=True, kw_only=True)
class GenerationCurve:
    """FLOPs of generating n tokens as MiniMax-M1 counts them (figure 1, right): a n + b n^2."""

    per_token: int
    per_pair: int

    def flops(self, num_tokens: int) -> int:
        """Return the FLOPs of generating `num_tokens`."""
        return self.per_token * num_tokens + self.per_pair * num_tokens**2


def m1_generation_curve(config: ModelConfig) -> GenerationCurve:
    """Return the curve of MiniMax-M1 by the count that its report's figure follows.

    The figure's coefficients come out to all printed digits if one counts: chosen experts,
    projections and LM head, no routers and no norms; one layer in ten as softmax attention (8 of
    80, though the model has 10) and the others as lightning; (H K)^2 multiply-adds per lightning
    layer for its state; and per pair of tokens H (K + 2 V) in a softmax layer.
    """
    hidden, inner = config.hidden_size, config.inner_size
    num_softmax = config.num_hidden_layers // 10
    num_lightning = config.num_hidden_layers - num_softmax
    experts = 3 * hidden * config.intermediate_size * config.num_experts_per_tok
    macs = (
        config.num_hidden_layers * experts
        + num_lightning * (5 * hidden * inner + inner**2)
        + num_softmax * attention_params(config, SOFTMAX)
        + config.vocab_size * hidden
    )
    return GenerationCurve(per_token=2 * macs, per_pair=num_softmax * 3 * inner)


def r1_generation_curve() -> GenerationCurve:
    """Return DeepSeek-R1's curve by the same count, from its published shape.

    61 layers of latent attention (128 heads; query rank 1536, key/value rank 512, 128 + 64 key and
    128 value channels) and feed-forwards 9 x 2048 wide (the dense ones are 18432 wide, the same);
    three feed-forwards more than there are layers make the figure's coefficient.
    """
    hidden, heads, layers = 7168, 128, 61
    attention = (
        hidden * 1536 + 1536 * heads * 192 + hidden * 576 + 512 * heads * 256 + heads * 128 * hidden
    )
    feed_forward = 3 * hidden * 9 * 2048
    macs = layers * attention + (layers + 3) * feed_forward + 129_280 * hidden
    return GenerationCurve(per_token=2 * macs, per_pair=layers * heads * (192 + 2 * 128))
