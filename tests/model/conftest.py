"""Tiny models with weights large enough that every part of them shows in the logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from linnet.model import Model, ModelConfig

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layernorm_full_attention_alpha": 1.7,
    "layernorm_linear_attention_alpha": 1.3,
    "layernorm_mlp_alpha": 1.5,
    "layernorm_mlp_beta": 0.9,
}


def make_config(pattern: str = "LLLS", **changes: Any) -> ModelConfig:
    """Return a tiny config; `pattern` names the layers, L lightning and S softmax."""
    kinds = tuple("LS".index(letter) for letter in pattern)
    values = {**TINY, "num_hidden_layers": len(pattern), "attn_type_list": kinds, **changes}
    return ModelConfig(**values)


def make_model(config: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Model:
    """Return a model in eval mode whose products neither vanish nor grow from layer to layer."""
    model = Model(config, compute_dtype=dtype)
    randomize(model, seed)
    return model.to(dtype).eval()


@torch.no_grad()
def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Fill all parameters: matrices by their fan-in, scales around 1, embeddings with std 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            parameter.copy_(1 + 0.2 * noise)
        elif "embed_tokens" in name:
            parameter.copy_(noise)
        else:
            parameter.copy_(noise * 1.2 / parameter.shape[-1] ** 0.5)


@pytest.fixture
def tiny_config() -> Callable[..., ModelConfig]:
    return make_config


@pytest.fixture
def tiny_model() -> Callable[..., Model]:
    """Build a tiny model from a pattern and changes to its config."""

    def build(pattern: str = "LLLS", dtype: torch.dtype = torch.float32, **changes: Any) -> Model:
        return make_model(make_config(pattern, **changes), dtype)

    return build


@pytest.fixture
def fill() -> Callable[..., None]:
    return randomize
