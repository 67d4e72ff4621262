"""What a pipeline stage holds and multiplies: parameters by how they are cut, FLOPs by part.

The parts add up to `linnet.model.cost.forward_flops` and `cost_of(...).params_total`.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from linnet.model.config import LIGHTNING, SOFTMAX, ModelConfig
from linnet.model.cost import PUBLISHED_BLOCK_LEN, attention_params
from linnet.parallel.stages import stage_bounds

BF16, FP32 = 2, 4
"""Bytes of an element."""

Gather = Literal["bf16", "fp32"]
GATHER_BYTES: dict[Gather, int] = {"bf16": BF16, "fp32": FP32}
"""Of an element of the weights that FSDP gathers; LM head, embedding and final norm are fp32."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Layers and parameters of one pipeline stage, of which each rank holds its part."""

    num_lightning: int
    num_softmax: int
    attention: int
    """Parameters of attention: cut over tp."""
    whole: int
    """Routers, norms and shared experts: on every tp rank."""
    experts: int
    """Cut over ep and etp."""
    embedding: int
    head: int
    """On every tp rank in training, cut over tp in serving."""
    last_kind: int
    """Attention of its last layer."""

    @property
    def num_layers(self) -> int:
        """Layers of both kinds."""
        return self.num_lightning + self.num_softmax

    def dense(self, tp: int) -> float:
        """Return the parameters of attention, routers and norms that one of `tp` ranks has."""
        return self.attention / tp + self.whole

    @property
    def params(self) -> int:
        """All parameters."""
        return self.attention + self.whole + self.experts + self.embedding + self.head


@lru_cache(maxsize=256)
def stages_of(config: ModelConfig, pp: int, length: int) -> tuple[Stage, ...]:
    """Cut the layers into `pp` runs, as `linnet.parallel.stages` does for sequences of `length`."""
    bounds = stage_bounds(config, pp, length) if pp > 1 else [0, config.num_hidden_layers]
    return tuple(_stage(config, start, stop) for start, stop in itertools.pairwise(bounds))


def _stage(config: ModelConfig, start: int, stop: int) -> Stage:
    kinds = config.attn_type_list[start:stop]
    hidden, num_layers = config.hidden_size, stop - start
    whole = (config.num_local_experts + 2) * hidden * num_layers
    if config.shared_intermediate_size:
        whole += (3 * config.shared_intermediate_size + 1) * hidden * num_layers
    is_last = stop == config.num_hidden_layers
    vocab = config.vocab_size * hidden
    return Stage(
        num_lightning=sum(kind == LIGHTNING for kind in kinds),
        num_softmax=sum(kind == SOFTMAX for kind in kinds),
        attention=sum(attention_params(config, kind) for kind in kinds),
        whole=whole + (hidden if is_last else 0),
        experts=expert_params(config) * config.num_local_experts * num_layers,
        embedding=vocab if start == 0 else 0,
        head=vocab if is_last else 0,
        last_kind=kinds[-1],
    )


def expert_params(config: ModelConfig) -> int:
    """Return the parameters of one expert: three matrices [F, D]."""
    return 3 * config.hidden_size * config.intermediate_size


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of a forward pass over one sequence, by what computes them."""

    attention: float
    whole: float
    experts: float
    lightning: float
    softmax: float
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


@lru_cache(maxsize=1024)
def forward_parts(config: ModelConfig, stage: Stage, length: int) -> Flops:
    """Return the FLOPs of a whole sequence of `length` tokens in a stage, on all its ranks."""
    inner, full, rest = config.inner_size, *divmod(length, PUBLISHED_BLOCK_LEN)
    in_blocks = full * _pairs(PUBLISHED_BLOCK_LEN) + _pairs(rest)
    chosen = config.num_experts_per_tok / config.num_local_experts
    per_layer = 4 * inner * (config.head_dim * length + in_blocks)
    return Flops(
        attention=2 * stage.attention * length,
        whole=2 * stage.whole * length,
        experts=2 * stage.experts * chosen * length,
        lightning=stage.num_lightning * per_layer,
        softmax=stage.num_softmax * 4 * inner * _pairs(length),
        head=2 * stage.head * length,
    )


def prefill_parts(config: ModelConfig, stage: Stage, length: int) -> Flops:
    """Return the same up to the logits of the last token: the last layer is hardly computed.

    Of the tokens before the last one it leaves keys and values, or its state, and no more; see
    `linnet.model.cost.prefill_flops`.
    """
    whole = forward_parts(config, stage, length)
    if not stage.head:
        return whole
    unread = 1 - 1 / length
    softmax = whole.softmax
    if stage.last_kind == SOFTMAX:
        softmax -= 4 * config.inner_size * (_pairs(length) - length)
    return dataclasses.replace(
        whole,
        attention=whole.attention - 4 * config.hidden_size * config.inner_size * (length - 1),
        experts=whole.experts * (1 - unread / stage.num_layers),
        softmax=softmax,
        head=2.0 * stage.head,
    )


def softmax_twin(config: ModelConfig) -> ModelConfig:
    """Return the same model with softmax attention in every layer, to compare with."""
    return dataclasses.replace(config, attn_type_list=(SOFTMAX,) * config.num_hidden_layers)


def _pairs(length: int) -> int:
    return length * (length + 1) // 2
