"""How many ranks each axis of parallelism has: one world, cut twice (MiniMax-01, equations 15, 16).

    dense    world = pp * dp_replicate * dp_shard * cp * tp     attention, norms, embedding, LM head
    sparse   world = pp * edp * ep * etp                        experts

Ranks count the last axis fastest in both, so tp and etp lie within a node. `edp` follows from the
others. Each rank holds tokens of its own in the sparse cut: tp ranks share theirs out.
"""

import math
from dataclasses import dataclass, fields

from linnet.errors import ConfigError
from linnet.model.config import ModelConfig

DENSE_AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
SPARSE_AXES = ("pp", "edp", "ep", "etp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Sizes of the axes.

    Raises:
        ConfigError: the experts' axes do not divide the dense ones; says the arithmetic.
    """

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Replicas of the sharded weights."""
    dp_shard: int = 1
    """Ranks with rows of their own over which weights are sharded (FSDP), together with cp."""
    cp: int = 1
    """Ranks that share each row of tokens."""
    tp: int = 1
    """Ranks that share the heads of attention."""
    ep: int = 1
    """Ranks that share the experts."""
    etp: int = 1
    """Ranks that share the width of each expert."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ConfigError(
                    f"{field.name} is {getattr(self, field.name)}; an axis has at least 1 rank"
                )
        if self.ranks_per_stage % (self.ep * self.etp):
            raise ConfigError(
                f"dp_replicate*dp_shard*cp*tp = {self.ranks_per_stage} ranks per stage "
                f"({self.dp_replicate}*{self.dp_shard}*{self.cp}*{self.tp}) are no multiple of "
                f"ep*etp = {self.ep}*{self.etp} = {self.ep * self.etp}"
            )

    @classmethod
    def for_world(cls, world_size: int, dp_shard: int = -1, **sizes: int) -> "Layout":
        """Return the layout of `world_size` ranks; a dp_shard of -1 takes the ranks that are left.

        Raises:
            ConfigError: the sizes do not multiply to the world; says the arithmetic.
        """
        others = math.prod(sizes.get(axis, 1) for axis in DENSE_AXES if axis != "dp_shard")
        product = "*".join(f"{a}={sizes[a]}" for a in DENSE_AXES if sizes.get(a, 1) != 1)
        if dp_shard == -1:
            if others < 1 or world_size % others:
                raise ConfigError(
                    f"{world_size} ranks cannot be cut: {product} = {others} does not divide "
                    f"{world_size}"
                )
            dp_shard = world_size // others
        layout = cls(dp_shard=dp_shard, **sizes)
        if layout.world_size != world_size:
            raise ConfigError(
                f"{product or 1} * dp_shard={dp_shard} = {layout.world_size} ranks; "
                f"{world_size} were started"
            )
        return layout

    @property
    def ranks_per_stage(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.pp * self.ranks_per_stage

    @property
    def edp(self) -> int:
        """Ranks with the same part of the experts, over which that part is sharded."""
        return self.ranks_per_stage // (self.ep * self.etp)

    @property
    def num_rows(self) -> int:
        """Rows of tokens that are read at a time."""
        return self.dp_replicate * self.dp_shard

    def check_model(self, config: ModelConfig) -> None:
        """Refuse a model whose parts the axes do not divide.

        Raises:
            ConfigError: what does not divide what.
        """
        parts = (
            ("tp", self.tp, "num_attention_heads", config.num_attention_heads),
            ("tp", self.tp, "num_key_value_heads", config.num_key_value_heads),
            ("ep", self.ep, "num_local_experts", config.num_local_experts),
            ("etp", self.etp, "intermediate_size", config.intermediate_size),
        )
        for axis, size, key, value in parts:
            if value % size:
                raise ConfigError(f"{axis} = {size} does not divide {key} = {value}")
        if self.pp > config.num_hidden_layers:
            raise ConfigError(
                f"pp = {self.pp} stages need a layer each; num_hidden_layers is "
                f"{config.num_hidden_layers}"
            )

    def __str__(self) -> str:
        sizes = {axis: getattr(self, axis) for axis in (*DENSE_AXES, "edp", "ep", "etp")}
        return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "one rank"
