"""Named configurations, from one that trains in minutes on two cores to the published models."""

from pathlib import Path
from typing import TypedDict

from linnet.config import nearest
from linnet.errors import CheckpointError, ConfigError
from linnet.model.config import ModelConfig

BUNDLED = "bundled"
"""Names the small trained model that comes with the package."""


def model_folder(source: str | Path) -> Path:
    """Return the folder that `source` names: a path, or the bundled model's if it is its name."""
    is_bundled = str(source) == BUNDLED and not Path(source).is_dir()
    return Path(__file__).parents[1] / BUNDLED if is_bundled else Path(source)


def config_of(source: str | Path) -> ModelConfig:
    """Return the configuration of a model folder, or of a preset if no folder has that name.

    Raises:
        CheckpointError: `source` is a file, or a path that does not exist.
        ConfigError: the folder's config is wrong, or no preset has this name.
    """
    name, folder = str(source), model_folder(source)
    if folder.is_dir():
        return ModelConfig.from_folder(folder)
    if name in PRESETS:
        return PRESETS[name]
    if folder.exists():
        raise CheckpointError(f"{name!r} is a file; pass the folder that holds config.json")
    if folder.name != name:
        raise CheckpointError(f"model folder {name!r} does not exist")
    raise ConfigError(f"{name!r} is neither a model folder nor a preset{nearest(name, PRESETS)}")


def preset(name: str) -> ModelConfig:
    """Return a named configuration.

    Raises:
        ConfigError: no preset has this name; the message gives the nearest one.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]


def hybrid(num_layers: int, period: int = 8) -> tuple[int, ...]:
    """Return the published layer pattern: every `period`-th layer is softmax attention."""
    return tuple(int((layer + 1) % period == 0) for layer in range(num_layers))


def deepnorm_alpha(num_layers: int) -> float:
    """Return (2 L)^(1/4), the weight of the residual (MiniMax-01, section 2.1)."""
    return (2 * num_layers) ** 0.25


class _Alphas(TypedDict):
    layernorm_full_attention_alpha: float
    layernorm_linear_attention_alpha: float
    layernorm_mlp_alpha: float


def _deepnorm(num_layers: int) -> _Alphas:
    alpha = deepnorm_alpha(num_layers)
    return {
        "layernorm_full_attention_alpha": alpha,
        "layernorm_linear_attention_alpha": alpha,
        "layernorm_mlp_alpha": alpha,
    }


_MINIMAX = ModelConfig(
    vocab_size=200_064,
    hidden_size=6144,
    intermediate_size=9216,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=128,
    attn_type_list=hybrid(80),
    rotary_dim=64,
    rope_theta=10_000_000.0,
    num_local_experts=32,
    num_experts_per_tok=2,
    max_position_embeddings=10_240_000,
    **_deepnorm(80),
)

PRESETS: dict[str, ModelConfig] = {
    "nano": ModelConfig(
        vocab_size=4096,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        attn_type_list=hybrid(8),
        rotary_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=2048,
        **_deepnorm(8),
    ),
    "tiny": ModelConfig(
        vocab_size=8192,
        hidden_size=384,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        attn_type_list=hybrid(8),
        rotary_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        **_deepnorm(8),
    ),
    "small": ModelConfig(
        vocab_size=32_768,
        hidden_size=768,
        intermediate_size=1024,
        num_hidden_layers=16,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        attn_type_list=hybrid(16),
        rotary_dim=32,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=8192,
        **_deepnorm(16),
    ),
    "bench-94m": ModelConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        attn_type_list=hybrid(8),
        rotary_dim=32,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=32_768,
        layernorm_full_attention_alpha=3.5566,
        layernorm_linear_attention_alpha=3.5566,
        layernorm_mlp_alpha=3.5566,
    ),
    "minimax-text-01": _MINIMAX,
    "minimax-m1": _MINIMAX,
}
