"""Operators: tensors in, tensors out. Each has a plain reference beside it.

Shape legend, used in every docstring of linnet:

    B batch   T tokens   S keys       D hidden        N packed sequences   C chunk length
    H query heads   G key/value heads   K key dim   V value dim   E experts   F expert width
"""

from linnet.ops.cross_entropy import cross_entropy, lm_head
from linnet.ops.lightning_attention import lightning_attention
from linnet.ops.matmul import linear, router_logits
from linnet.ops.moe import (
    admit,
    combine_rows,
    count_choices,
    expert_capacity,
    expert_means,
    few_tokens_ffn,
    gather_rows,
    group_by_expert,
    grouped_ffn,
    load_balancing_loss,
    route,
)
from linnet.ops.norm import rms_norm
from linnet.ops.recompute import recomputed
from linnet.ops.rotary import apply_rotary, rotary_tables
from linnet.ops.routed import routed_ffn
from linnet.ops.softmax_attention import continue_softmax_attention, softmax_attention

__all__ = [
    "admit",
    "apply_rotary",
    "combine_rows",
    "continue_softmax_attention",
    "count_choices",
    "cross_entropy",
    "expert_capacity",
    "expert_means",
    "few_tokens_ffn",
    "gather_rows",
    "group_by_expert",
    "grouped_ffn",
    "lightning_attention",
    "linear",
    "lm_head",
    "load_balancing_loss",
    "recomputed",
    "rms_norm",
    "rotary_tables",
    "route",
    "routed_ffn",
    "router_logits",
    "softmax_attention",
]
