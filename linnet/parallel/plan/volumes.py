"""What each rank receives from others, in bytes: the formulas of what `linnet.parallel` does.

Each is checked against the bytes that `linnet.parallel.traffic.Traffic` counts on real processes.
"""

from dataclasses import dataclass

from linnet.model.config import ModelConfig
from linnet.parallel.layout import Layout
from linnet.parallel.plan.shape import BF16, FP32, Stage

TOKEN_GROUPS = 2
"""Parts in which tokens go to their experts, unless there are few."""


@dataclass(frozen=True, slots=True)
class Volume:
    """One kind of exchange over a stretch of work."""

    name: str
    axis: str
    """Whose ranks exchange, as in `group_of`."""
    num_bytes: float
    """That each rank receives."""
    calls: float
    is_ring: bool = True
    """False for an all-to-all."""

    def times(self, factor: float) -> "Volume":
        """Return the volume of so many repetitions."""
        return Volume(
            self.name, self.axis, self.num_bytes * factor, self.calls * factor, self.is_ring
        )


def group_of(layout: Layout, axis: str) -> tuple[int, int]:
    """Return (size, stride in the world) of the group of an axis."""
    dense = {"tp": (layout.tp, 1), "cp": (layout.cp, layout.tp)}
    fsdp = layout.dp_shard * layout.cp
    return {
        **dense,
        "fsdp": (fsdp, layout.tp),
        "dp_replicate": (layout.dp_replicate, fsdp * layout.tp),
        "etp": (layout.etp, 1),
        "ep": (layout.ep, layout.etp),
        "edp": (layout.edp, layout.etp * layout.ep),
        "experts": (layout.ep * layout.etp, 1),
        "pp": (layout.pp, layout.ranks_per_stage),
    }[axis]


def state_bytes(config: ModelConfig, tp: int = 1) -> int:
    """Return the bytes of a rank's heads of one layer's fp32 state [H, K, V]."""
    return FP32 * config.inner_size * config.head_dim // tp


def lasp_bytes(config: ModelConfig, layout: Layout, is_balanced: bool = False) -> int:
    """Return what LASP+ gathers in one layer, in one direction: every other rank's states."""
    return (layout.cp - 1) * state_bytes(config, layout.tp) * (2 if is_balanced else 1)


def keys_bytes(config: ModelConfig, layout: Layout, tokens: float, itemsize: int = BF16) -> float:
    """Return the keys and values of a rank's `tokens` in one softmax layer."""
    return 2 * config.num_key_value_heads * config.head_dim / layout.tp * tokens * itemsize


def key_exchange_bytes(
    config: ModelConfig, layout: Layout, tokens: float, itemsize: int = BF16
) -> float:
    """Return what ring or gather brings in one softmax layer, forward, for one long document.

    Backward is twice that: keys and values again, and the gradients of both.
    """
    return (layout.cp - 1) * keys_bytes(config, layout, tokens, itemsize)


def shared_tokens(layout: Layout, tokens: float) -> float:
    """Return the tokens that a rank sends to experts: tp ranks share theirs out."""
    return tokens / layout.tp


def attention_reduce_bytes(
    config: ModelConfig, layout: Layout, tokens: float, itemsize: int = BF16
) -> float:
    """Return what tp sums over the outputs of one attention layer, or its input's gradients."""
    return 2 * (layout.tp - 1) / layout.tp * tokens * config.hidden_size * itemsize


def norm_reduce_bytes(layout: Layout, tokens: float) -> float:
    """Return what tp sums for the norm in lightning attention: one fp32 number per token."""
    return 2 * (layout.tp - 1) / layout.tp * tokens * FP32


def collect_bytes(
    config: ModelConfig, layout: Layout, tokens: float, itemsize: int = BF16
) -> float:
    """Return what tp gathers after the experts of one layer, or before them in the gradients."""
    return (layout.tp - 1) / layout.tp * tokens * config.hidden_size * itemsize


def dispatch_bytes(
    config: ModelConfig, layout: Layout, tokens: float, itemsize: int = BF16
) -> float:
    """Return what ep brings in one layer to the experts and back, for evenly routed tokens."""
    rows = shared_tokens(layout, tokens) * config.num_experts_per_tok
    return 2 * (layout.ep - 1) / layout.ep * rows * config.hidden_size * itemsize


def widen_bytes(config: ModelConfig, layout: Layout, tokens: float, itemsize: int = BF16) -> float:
    """Return what etp gathers and reduces in one layer, for evenly routed tokens."""
    rows = shared_tokens(layout, tokens) * config.num_experts_per_tok
    return 2 * (layout.etp - 1) * rows * config.hidden_size * itemsize


def counts_bytes(config: ModelConfig, layout: Layout, num_groups: int = 1) -> int:
    """Return the gathered int64 counts of rows per expert."""
    return 8 * (layout.ep * layout.etp - 1) * num_groups * config.num_local_experts


def answers_bytes(config: ModelConfig, layout: Layout, queries: float) -> float:
    """Return what comes back for `queries` from pages that cp ranks share, in one softmax layer."""
    row = (config.inner_size + config.num_attention_heads) / layout.tp * FP32
    return (layout.cp - 1) * queries * row


def split_chunk_bytes(
    config: ModelConfig, layout: Layout, tokens: float, itemsize: int = BF16
) -> tuple[float, float]:
    """Return what a rank's `tokens` of a chunk bring in one softmax layer; pages do not travel.

    Returns:
        New keys and values; and if there is a past, queries and their answers.
    """
    others = layout.cp - 1
    queries = others * tokens * config.inner_size / layout.tp * itemsize
    new = others * keys_bytes(config, layout, tokens, itemsize)
    return new, queries + answers_bytes(config, layout, tokens)


def layer_volumes(
    config: ModelConfig,
    stage: Stage,
    layout: Layout,
    tokens: float,
    is_balanced: bool = False,
    num_groups: int = TOKEN_GROUPS,
) -> tuple[Volume, ...]:
    """Return the exchanges of the layers of a stage, forward, but for keys and values.

    Args:
        config: of the model.
        stage: its layers.
        layout: of the ranks.
        tokens: of this rank in the dense cut.
        is_balanced: whether each rank holds an early and a late piece of a row.
        num_groups: parts in which tokens go to their experts.
    """
    layers, lightning = stage.num_layers, stage.num_lightning
    reduce = attention_reduce_bytes(config, layout, tokens) * layers
    norm = norm_reduce_bytes(layout, tokens) * lightning
    collect = collect_bytes(config, layout, tokens) * layers
    states = lasp_bytes(config, layout, is_balanced) * lightning
    dispatch = dispatch_bytes(config, layout, tokens) * layers
    widen = widen_bytes(config, layout, tokens) * layers
    counts = counts_bytes(config, layout, num_groups) * layers
    moves = 2 * layers * num_groups
    kinds = (
        Volume("tensor parallel sums", "tp", reduce + norm, layers + lightning),
        Volume("tokens after experts", "tp", collect, layers),
        Volume("LASP+ states", "cp", states, lightning),
        Volume("expert all-to-all", "ep", dispatch, moves, is_ring=False),
        Volume("expert width", "etp", widen, moves),
        Volume("expert counts", "experts", counts, layers),
    )
    return tuple(volume for volume in kinds if volume.num_bytes)
