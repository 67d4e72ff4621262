"""The model's configuration, named by the keys of the published `config.json`, in four dialects.

    minimax_m1, minimax_text_01   as published (model_type also "MiniMaxM1", "MiniMaxText01")
    minimax                       transformers' class: other names, and the whole head turns
    minimax_vl_01                 the published dialect under `text_config`
    linnet                        the published names plus the fields marked "linnet only"

Reading is strict: an unknown key, a missing one or a contradiction is a `ConfigError` naming it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from linnet.config import build, nearest
from linnet.errors import ConfigError
from linnet.model.decay import SlopeRule, layer_slopes

Dialect = Literal["linnet", "minimax_m1", "minimax_text_01", "transformers"]

LIGHTNING, SOFTMAX = 0, 1

MAX_TENSOR_ELEMENTS = 2**48
"""A config with a larger tensor is a mistake; the largest published one has 2^31."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Shape and constants of one model.

    Raises:
        ConfigError: values that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Width F of one expert."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    """Key/value heads of the softmax layers; lightning layers have one per query head."""
    head_dim: int
    attn_type_list: tuple[int, ...]
    """Per layer: 0 lightning attention, 1 softmax attention."""
    rotary_dim: int
    """Channels of each head that turn, in softmax layers."""
    rope_theta: float = 10_000.0
    num_local_experts: int
    num_experts_per_tok: int
    shared_intermediate_size: int = 0
    """Width of the shared expert; 0 for none."""
    shared_moe_mode: Literal["sigmoid"] = "sigmoid"
    postnorm: bool = True
    """True: the residual is the normed input (DeepNorm); False: the raw one (pre-norm)."""
    layernorm_full_attention_alpha: float = 1.0
    layernorm_full_attention_beta: float = 1.0
    layernorm_linear_attention_alpha: float = 1.0
    layernorm_linear_attention_beta: float = 1.0
    layernorm_mlp_alpha: float = 1.0
    layernorm_mlp_beta: float = 1.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 8192
    """Tokens; a statement about training, not a limit that is enforced."""
    initializer_range: float = 0.02
    router_aux_loss_coef: float = 0.001
    """Kept for the files; training takes its own from the recipe."""
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    """One id, or several that all end a completion."""
    lightning_norm_eps: float = 1e-6
    """linnet only: eps of the norm inside lightning attention, which published code hard-codes."""
    slope_rule: SlopeRule = "published"
    """linnet only: the decay slopes' formula."""
    capacity_factor: float | None = None
    """linnet only: slots per expert in training over an even share; None never drops a token."""

    def __post_init__(self) -> None:
        self._check_numbers()
        if len(self.attn_type_list) != self.num_hidden_layers:
            raise ConfigError(
                f"attn_type_list has {len(self.attn_type_list)} entries for "
                f"num_hidden_layers {self.num_hidden_layers}"
            )
        if bad := set(self.attn_type_list) - {LIGHTNING, SOFTMAX}:
            raise ConfigError(f"attn_type_list holds {sorted(bad)}; 0 is lightning, 1 is softmax")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads {self.num_attention_heads} is no multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.rotary_dim % 2 or self.rotary_dim > self.head_dim:
            raise ConfigError(
                f"rotary_dim {self.rotary_dim} must be even and at most head_dim {self.head_dim}"
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds "
                f"num_local_experts {self.num_local_experts}"
            )

    def _check_numbers(self) -> None:
        """Check each number alone, and that no tensor is absurdly large."""
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if type(value) is int and value < (0 if name in _MAY_BE_ZERO else 1):
                raise ConfigError(f"{name} is {value}; it must be positive")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name} is {value}; it must be finite")
            if isinstance(value, float) and name in _POSITIVE and value <= 0:
                raise ConfigError(f"{name} is {value}; it must be positive")
        largest = max(
            self.vocab_size * self.hidden_size,
            3 * self.hidden_size * self.inner_size,
            2 * self.num_local_experts * self.hidden_size * self.intermediate_size,
            self.hidden_size * self.shared_intermediate_size,
        )
        if largest > MAX_TENSOR_ELEMENTS:
            raise ConfigError(f"these sizes make a tensor of {largest:.0e} elements; check them")

    @property
    def inner_size(self) -> int:
        """Width of all heads together, H * K; not the hidden size in published models."""
        return self.num_attention_heads * self.head_dim

    def residual_factors(self, layer: int) -> tuple[float, float]:
        """Return (alpha, beta) of the attention sublayer of `layer`."""
        if self.attn_type_list[layer] == SOFTMAX:
            return self.layernorm_full_attention_alpha, self.layernorm_full_attention_beta
        return self.layernorm_linear_attention_alpha, self.layernorm_linear_attention_beta

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "ModelConfig":
        """Read a parsed `config.json` of any dialect.

        Raises:
            ConfigError: unknown dialect or key, missing key, wrong type or contradiction.
        """
        kind = mapping.get("model_type")
        if kind in _VISION_TYPES:
            text = mapping.get("text_config")
            if not isinstance(text, Mapping):
                raise ConfigError(f"model_type {kind!r} needs a 'text_config' section")
            return cls.from_dict({"model_type": "minimax_text_01", **_without_type(text)})
        if kind == "minimax":
            return build(cls, _from_transformers(mapping))
        if kind in _PUBLISHED_TYPES:
            return build(cls, _from_published(mapping))
        if kind == "linnet":
            return build(cls, _drop_fixed(mapping))
        known = [*_PUBLISHED_TYPES, *_VISION_TYPES, "minimax", "linnet"]
        raise ConfigError(f"model_type {kind!r} is unknown{nearest(str(kind), known)}")

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelConfig":
        """Read `config.json` of a checkpoint folder."""
        path = Path(folder) / "config.json"
        try:
            mapping = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path} not found; a model folder holds a config.json") from None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(mapping, dict):
            raise ConfigError(f"{path} holds a {type(mapping).__name__}; expected an object")
        return cls.from_dict(mapping)

    def to_dict(self, dialect: Dialect = "linnet") -> dict[str, Any]:
        """Return the `config.json` of a dialect.

        Raises:
            ConfigError: the dialect cannot express this model.
        """
        values = {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }
        if dialect == "linnet":
            return {"model_type": "linnet", **values}
        if self.lightning_norm_eps != 1e-6:
            raise ConfigError(f"lightning_norm_eps is fixed at 1e-6 in the {dialect!r} dialect")
        rule: SlopeRule = "transformers" if dialect == "transformers" else "published"
        if not self._slopes_agree(rule):
            raise ConfigError(
                f"the {dialect!r} dialect has other decay slopes for this model "
                f"(slope_rule {self.slope_rule!r}); save it as 'linnet'"
            )
        for key in ("lightning_norm_eps", "slope_rule", "capacity_factor"):
            del values[key]
        if dialect == "transformers":
            return _to_transformers(values)
        camel = {"minimax_m1": "MiniMaxM1", "minimax_text_01": "MiniMaxText01"}[dialect]
        return {
            "architectures": [f"{camel}ForCausalLM"],
            "model_type": dialect,
            **values,
            **_FIXED,
        }

    def _slopes_agree(self, rule: SlopeRule) -> bool:
        """Whether another rule gives this model the same slopes to fp32 precision."""
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        return all(
            layer_slopes(layer, layers, heads, self.slope_rule).allclose(
                layer_slopes(layer, layers, heads, rule), rtol=1e-5, atol=0
            )
            for layer, kind in enumerate(self.attn_type_list)
            if kind == LIGHTNING
        )


_PUBLISHED_TYPES = ("minimax_m1", "minimax_text_01", "MiniMaxM1", "MiniMaxText01")
_VISION_TYPES = ("minimax_vl_01", "MiniMaxVL01")

_MAY_BE_ZERO = ("shared_intermediate_size", "bos_token_id", "eos_token_id", "rotary_dim")
_POSITIVE = ("rope_theta", "rms_norm_eps", "lightning_norm_eps", "capacity_factor")

# Keys whose only supported value is the published one.
_FIXED: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "router_jitter_noise": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

# Keys that describe files, tokenizers or the caller's habits, not the model.
_BOOKKEEPING = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "auto_map",
        "block_size",
        "dtype",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

_RENAMED = {
    "full_attn_alpha_factor": "layernorm_full_attention_alpha",
    "full_attn_beta_factor": "layernorm_full_attention_beta",
    "linear_attn_alpha_factor": "layernorm_linear_attention_alpha",
    "linear_attn_beta_factor": "layernorm_linear_attention_beta",
    "mlp_alpha_factor": "layernorm_mlp_alpha",
    "mlp_beta_factor": "layernorm_mlp_beta",
}
_LAYER_TYPES = {"linear_attention": LIGHTNING, "full_attention": SOFTMAX}

# What a published config must say itself: a default would silently give another model.
_REQUIRED_PUBLISHED = ("rope_theta", "postnorm", *_RENAMED.values())


def _without_type(mapping: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in mapping.items() if key != "model_type"}


def _drop_fixed(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Check the keys that have one supported value and drop them and the bookkeeping."""
    for key, expected in _FIXED.items():
        found = mapping.get(key, expected)
        if found != expected:
            raise ConfigError(f"{key} is {found!r}; linnet supports {expected!r}")
    return {k: v for k, v in mapping.items() if k not in _FIXED and k not in _BOOKKEEPING}


def _from_published(mapping: Mapping[str, Any]) -> dict[str, Any]:
    values = _drop_fixed(mapping)
    for key in ("lightning_norm_eps", "slope_rule", "capacity_factor"):
        if key in values:
            raise ConfigError(f"{key!r} is no key of the published dialect; use 'linnet'")
    for key in _REQUIRED_PUBLISHED:
        if key not in values:
            raise ConfigError(f"missing key {key!r}: a published config states it")
    return values


def _from_transformers(mapping: Mapping[str, Any]) -> dict[str, Any]:
    values = _drop_fixed(mapping)
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if values.get("head_dim") is None and isinstance(hidden, int) and isinstance(heads, int):
        values["head_dim"] = hidden // max(1, heads)
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    layer_types = values.pop("layer_types", None)
    if not isinstance(layer_types, list):
        raise ConfigError("missing key 'layer_types': the dialect's default is not 7:1")
    if bad := [kind for kind in layer_types if kind not in list(_LAYER_TYPES)]:
        raise ConfigError(f"layer_types holds {bad[0]!r}; known: {sorted(_LAYER_TYPES)}")
    values["attn_type_list"] = [_LAYER_TYPES[kind] for kind in layer_types]
    for theirs, ours in _RENAMED.items():
        values[ours] = values.pop(theirs, 1.0)
    _read_rope(values)
    values["slope_rule"] = "transformers"
    return values


def _read_rope(values: dict[str, Any]) -> None:
    """Replace transformers' `rope_parameters` by `rope_theta` and `rotary_dim`, in place."""
    rope = values.pop("rope_parameters", None) or {}
    if not isinstance(rope, Mapping):
        raise ConfigError(f"rope_parameters is {rope!r}; expected an object")
    rope = dict(rope)
    if rope.pop("rope_type", "default") != "default":
        raise ConfigError("rope_parameters: only rope_type 'default' is supported")
    values["rope_theta"] = rope.pop("rope_theta", values.get("rope_theta", 1_000_000.0))
    # transformers' class turns the whole head whatever the file says; a file that says otherwise
    # was written for the published code, and its weights were trained that way.
    fraction = rope.pop("partial_rotary_factor", 1.0)
    if not isinstance(fraction, (int, float)) or not 0 <= fraction <= 1:
        raise ConfigError(f"partial_rotary_factor is {fraction!r}; expected a number in [0, 1]")
    if isinstance(values.get("head_dim"), int):
        values.setdefault("rotary_dim", int(values["head_dim"] * fraction))
    if rope:
        raise ConfigError(f"unknown keys in rope_parameters: {sorted(rope)}")


def _to_transformers(values: dict[str, Any]) -> dict[str, Any]:
    if values["rotary_dim"] != values["head_dim"]:
        raise ConfigError(
            f"transformers' class turns whole heads; this model turns {values['rotary_dim']} of "
            f"{values['head_dim']} channels and would give other logits there"
        )
    if not values.pop("postnorm") or values.pop("shared_intermediate_size"):
        raise ConfigError("transformers' class has neither postnorm=false nor a shared expert")
    for key in ("rotary_dim", "shared_moe_mode"):
        del values[key]
    names = {kind: name for name, kind in _LAYER_TYPES.items()}
    layer_types = [names[kind] for kind in values.pop("attn_type_list")]
    rope = {"rope_theta": values.pop("rope_theta"), "rope_type": "default"}
    for theirs, ours in _RENAMED.items():
        values[theirs] = values.pop(ours)
    return {
        "architectures": ["MiniMaxForCausalLM"],
        "model_type": "minimax",
        **values,
        "layer_types": layer_types,
        "rope_parameters": rope,
        **_FIXED,
    }
