"""How ranks that all read the same tokens share a model, as inference needs it.

Attention heads are cut over tp and experts over ep x etp, across all ranks. Ranks with the same
heads (the axis dp_shard of the layout) share long chunks of tokens, and each page of keys and
values (`linnet.parallel.spread_pages`). Every rank has the embedding, the norms and the LM head.
"""

import math
from dataclasses import replace

from linnet.errors import ConfigError
from linnet.model.config import ModelConfig
from linnet.model.paged import PAGE_SIZE
from linnet.parallel.layout import Layout


def inference_layout(
    config: ModelConfig,
    world_size: int,
    *,
    tp: int | None = None,
    ep: int | None = None,
    etp: int | None = None,
    cp: int | None = None,
) -> Layout:
    """Return how ranks share a model that all of them feed with the same tokens.

    Args:
        config: of the whole model.
        world_size: ranks.
        tp: ranks that share the heads; None for as many as divide them.
        ep: ranks that share the experts; None for as many as divide them.
        etp: ranks that share the width of each expert; None for what ep leaves, if it divides it.
        cp: ranks that share sequences, with the same heads; None for what tp leaves.

    Returns:
        Where `dp_shard` counts the ranks with the same heads.

    Raises:
        ConfigError: the axes do not multiply to the ranks or divide the model; says the arithmetic.
    """
    if tp is None:
        ranks = world_size // cp if cp and not world_size % cp else world_size
        tp = math.gcd(ranks, config.num_attention_heads, config.num_key_value_heads)
    if ep is None:
        ep = math.gcd(world_size // max(1, etp or 1), config.num_local_experts)
    if etp is None:
        etp = math.gcd(world_size // max(1, ep), config.intermediate_size)
    if cp is not None:
        Layout.for_world(world_size, dp_shard=1, cp=cp, tp=tp)  # its error speaks of cp
    layout = Layout.for_world(world_size, tp=tp, ep=ep, etp=etp)
    layout.check_model(config)
    if layout.dp_shard > PAGE_SIZE:
        raise ConfigError(
            f"{layout.dp_shard} ranks ({world_size} / tp = {tp}) cannot share pages of {PAGE_SIZE} "
            "tokens"
        )
    return layout


def local_config(config: ModelConfig, layout: Layout) -> ModelConfig:
    """Return the config with the heads that one rank has, for its states, keys and values."""
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // layout.tp,
        num_key_value_heads=config.num_key_value_heads // layout.tp,
    )
