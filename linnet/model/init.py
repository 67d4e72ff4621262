"""Initial weights: Xavier with DeepNorm gains (MiniMax-01, section 2.1; DeepNet).

The paper's beta = (8 L)^(-1/4) is the gain of the feed-forward, value and output projections; query
and key projections have gain 1. Embedding and LM head are normal with `initializer_range`.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from linnet.model.attention import LightningAttention
from linnet.model.config import ModelConfig
from linnet.model.transformer import Block, Model


@torch.no_grad()
def initialize(model: Model, generator: torch.Generator | None = None) -> Model:
    """Fill all parameters in place and return the model.

    Args:
        model: on a real device.
        generator: source of randomness, on the model's device; torch's global one if None.
    """
    std = model.config.initializer_range
    model.embed_tokens.weight.normal_(0, std, generator=generator)
    model.lm_head.weight.normal_(0, std, generator=generator)
    model.norm.weight.fill_(1)
    for block in model.layers:
        _initialize_block(block, _gain(model.config), generator)
    return model


@torch.no_grad()
def initial_parts(
    config: ModelConfig, generator: torch.Generator
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yield what `initialize` would fill a model with, without holding more than a block of it.

    Args:
        config: of the model.
        generator: on the CPU.

    Yields:
        The prefix of the names, "" or "layers.0." and so on, and the fp32 tensors by their names.
    """
    shape, std = (config.vocab_size, config.hidden_size), config.initializer_range
    yield (
        "",
        {
            "embed_tokens.weight": torch.empty(shape).normal_(0, std, generator=generator),
            "lm_head.weight": torch.empty(shape).normal_(0, std, generator=generator),
            "norm.weight": torch.ones(config.hidden_size),
        },
    )
    for layer in range(config.num_hidden_layers):
        block = Block(config, layer)
        _initialize_block(block, _gain(config), generator)
        yield f"layers.{layer}.", {name: p.detach() for name, p in block.named_parameters()}


def _gain(config: ModelConfig) -> float:
    return (8 * config.num_hidden_layers) ** -0.25 if config.postnorm else 1.0


def _initialize_block(block: Block, gain: float, generator: torch.Generator | None) -> None:
    block.input_layernorm.weight.fill_(1)
    block.post_attention_layernorm.weight.fill_(1)
    attention = block.self_attn
    if isinstance(attention, LightningAttention):
        attention.norm.weight.fill_(1)
        by_head = attention.qkv_proj.weight.unflatten(0, (attention.num_heads, 3, -1))
        inner = attention.num_heads * attention.head_dim
        for part, part_gain in enumerate((1.0, 1.0, gain)):
            _xavier(by_head[:, part], by_head.shape[-1], inner, part_gain, generator)
        _xavier_matrix(attention.output_gate.weight, 1.0, generator)
        _xavier_matrix(attention.out_proj.weight, gain, generator)
    else:
        _xavier_matrix(attention.q_proj.weight, 1.0, generator)
        _xavier_matrix(attention.k_proj.weight, 1.0, generator)
        _xavier_matrix(attention.v_proj.weight, gain, generator)
        _xavier_matrix(attention.o_proj.weight, gain, generator)
    moe = block.block_sparse_moe
    _xavier_matrix(moe.gate.weight, 1.0, generator)
    # fan_out of W1 and W3 is F each, though they are stored as one [2F, D] matrix.
    width, hidden = moe.experts.down.shape[2], moe.experts.down.shape[1]
    _xavier(moe.experts.gate_up, hidden, width, gain, generator)
    _xavier(moe.experts.down, width, hidden, gain, generator)
    if block.shared_mlp is not None and block.coefficient is not None:
        for linear in (block.shared_mlp.gate_proj, block.shared_mlp.up_proj):
            _xavier_matrix(linear.weight, gain, generator)
        _xavier_matrix(block.shared_mlp.down_proj.weight, gain, generator)
        _xavier_matrix(block.coefficient.weight, 1.0, generator)


def _xavier_matrix(weight: Tensor, gain: float, generator: torch.Generator | None) -> None:
    _xavier(weight, weight.shape[1], weight.shape[0], gain, generator)


def _xavier(
    weight: Tensor, fan_in: int, fan_out: int, gain: float, generator: torch.Generator | None
) -> None:
    weight.normal_(0, gain * math.sqrt(2 / (fan_in + fan_out)), generator=generator)
