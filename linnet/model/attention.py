"""The two attention sublayers (MiniMax-01, section 2.2; SPEC 1.1 and 2.1).

Each holds its operator in `attend`, which `linnet.parallel` replaces from outside.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from linnet import ops
from linnet.model.config import ModelConfig
from linnet.model.decay import layer_slopes
from linnet.model.layers import Linear, RMSNorm

Attend = Callable[..., Tensor]
"""The signature of `ops.softmax_attention`."""


class Memory(Protocol):
    """What earlier tokens left behind, for the tokens of one forward pass that continue them."""

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return the positions [1, T] of the new tokens."""
        ...

    def state(self, layer: int) -> Tensor | None:
        """Return the lightning states [B or N, H, K, V] of a layer; None for zeros."""
        ...

    def set_state(self, layer: int, state: Tensor) -> None:
        """Replace them."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Keep the keys and values of a softmax layer, and attend to them and all before them.

        The queries may be those of `Context.wanted` alone.
        """
        ...


class Context(NamedTuple):
    """What the sublayers of one forward pass share."""

    rotary: tuple[Tensor, Tensor]
    """cos, sin of the positions, each [1, T, rotary_dim / 2] fp32."""
    cache: Memory | None
    cu_seqlens: Tensor | None
    forms_norms_again: bool = False
    """Whether the backward pass forms the results of norms again instead of keeping them."""
    wanted: Tensor | None = None
    """[W] indices of the tokens whose outputs are read; None for all. The last of each sequence."""

    def pick(self, x: Tensor) -> Tensor:
        """Return x [B, T, ...] of the wanted tokens alone."""
        return x if self.wanted is None else x.index_select(1, self.wanted)


class LightningAttention(nn.Module):
    """silu(q, k, v) -> lightning attention -> RMSNorm over all heads -> sigmoid gate -> projection.

    The rows of `qkv_proj` are interleaved by head: [q_h, k_h, v_h] for h = 0, 1, ... No positions,
    no scale; the slopes are a buffer that no checkpoint holds.
    """

    decay: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        inner = config.inner_size
        self.qkv_proj = Linear(config.hidden_size, 3 * inner)
        self.output_gate = Linear(config.hidden_size, inner)
        self.norm = RMSNorm(inner, config.lightning_norm_eps)
        self.out_proj = Linear(inner, config.hidden_size)
        rule = config.slope_rule
        self._slopes = layer_slopes(layer, config.num_hidden_layers, self.num_heads, rule)
        self.register_buffer("decay", self._slopes, persistent=False)
        self.attend = ops.lightning_attention

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        # fp32 whatever `model.to(...)` asks for: bf16 rounds exp(-s) to three digits.
        self.decay = self._slopes.to(self.decay.device)
        return self

    def keep_heads(self, heads: slice) -> None:
        """Keep the slopes of some heads alone."""
        self._slopes = self._slopes[heads]
        self.decay = self.decay[heads]

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix tokens; x [B, T, D] normed input of the layer -> [B, T or W, D]."""
        qkv = self.qkv_proj(x).unflatten(-1, (self.num_heads, 3 * self.head_dim))
        q, k, v = qkv.split(self.head_dim, -1)  # [B, T, H, K] each
        cache = context.cache
        o, state = self.attend(
            q,
            k,
            v,
            self.decay,
            initial_state=None if cache is None else cache.state(self.layer),
            cu_seqlens=context.cu_seqlens,
            return_state=cache is not None,
            activation="silu",
        )
        if cache is not None:
            assert state is not None
            cache.set_state(self.layer, state)
        o, gate = context.pick(o).flatten(-2), self.output_gate(context.pick(x))
        gated = self.norm(o, gate)
        if not context.forms_norms_again:
            return self.out_proj(gated)
        with ops.recomputed(gated, lambda: self.norm(o, gate)):
            return self.out_proj(gated)


class SoftmaxAttention(nn.Module):
    """Grouped-query causal attention with partial rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.inner_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(config.inner_size, config.hidden_size)
        self.attend = ops.softmax_attention

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """Mix tokens; x [B, T, D] normed input of the layer -> [B, T or W, D]."""
        projections = (self.q_proj(context.pick(x)), self.k_proj(x), self.v_proj(x))
        # [B, T or W, H, K] and twice [B, T, G, K]
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)) for y in projections)
        q = ops.apply_rotary(q, *(context.pick(table) for table in context.rotary))
        k = ops.apply_rotary(k, *context.rotary)
        if context.cache is None:
            o = self.attend(q, k, v, cu_seqlens=context.cu_seqlens)
        else:
            o = context.cache.attend(self.layer, q, k, v, self.attend)
        return self.o_proj(o.flatten(-2))
