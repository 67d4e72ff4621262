"""What a training run is: the sections of a recipe, with meaning, unit and default of every key."""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from linnet.config import apply_overrides, build, read_toml
from linnet.errors import ConfigError
from linnet.model.config import ModelConfig
from linnet.model.presets import preset
from linnet.ops.moe import Normalization
from linnet.parallel.layout import Layout


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """`[data]`: what to train on."""

    source: str = "stdlib"
    """"stdlib", a file, a folder, a glob, or several of these separated by commas."""
    text_field: str = "text"
    """Field of .jsonl and .parquet records that holds the text."""
    held_out: float = 0.05
    """Fraction of documents that are never trained on."""
    tokenizer: str | None = None
    """Folder or file of a tokenizer; None trains a byte-level BPE of the model's vocab_size."""
    folder: str | None = None
    """Where tokenized shards are kept; `data` in the run's folder if None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimSection:
    """`[optim]`: AdamW and its schedule (MiniMax-01, section 4.2)."""

    learning_rate: float = 2e-4
    """Peak, reached after the warm-up."""
    min_learning_rate: float = 3e-5
    """At the end of the decay."""
    warmup_steps: int = 500
    decay_fraction: float = 0.1
    """Part of all tokens, at the end, over which the rate falls exponentially."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices; norms are not decayed."""
    grad_clip: float = 1.0
    """Largest norm of all gradients together; 0 never clips."""
    aux_loss_coef: float = 0.01
    """Weight of the load-balancing loss, averaged over layers."""
    aux_loss_normalization: Normalization = "transformers"
    aux_loss_over: Literal["row", "ranks"] = "row"
    """Whose tokens count together for it: those of a row, so that the loss is the same on any
    number of ranks, or those of all rows that the ranks have at a time, as MiniMax counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """`[train]`: how long, how much at a time, and what to keep."""

    total_tokens: int
    """Tokens after which training ends."""
    batch_tokens: int
    """Tokens per optimizer step."""
    batch_warmup: tuple[tuple[int, int], ...] = ()
    """Smaller batches at first: [tokens seen, batch_tokens until then], ascending."""
    micro_batch_tokens: int
    """Tokens per forward and backward pass; divides every batch size."""
    seq_len: int
    """Longest sequence; longer documents are cut."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the computation; parameters are fp32. "auto" is bf16 where the hardware has it."""
    activation_recompute: bool = False
    """Recompute the activations of each block in the backward pass, to save memory."""
    threads: int | None = None
    """CPU threads; torch's default if None."""
    eval_every: int = 200
    """Steps between measurements on held-out text."""
    eval_tokens: int | None = 100_000
    """Held-out tokens per measurement (whole documents, the same each time); None takes all."""
    final_eval_tokens: int | None = 1_000_000
    """Held-out tokens of the last measurement, beside which the compressors are put; None: all."""
    save_every: int = 500
    """Steps between checkpoints; each is preceded by a measurement."""
    keep_last: int = 2
    """Checkpoints kept, besides the best one."""
    max_skipped_steps: int = 10
    """Consecutive steps with a non-finite loss or gradient after which training stops."""
    log_every: int = 1
    """Steps between lines of metrics."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelSection:
    """`[parallel]`: how many ranks are cut, when torchrun or another launcher starts several."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Replicas of the sharded weights."""
    dp_shard: int = -1
    """Ranks with rows of their own, over which weights are sharded; -1 takes all that are left."""
    cp: int = 1
    """Ranks that share each row of tokens."""
    tp: int = 1
    """Ranks that share the heads of attention."""
    ep: int = 1
    """Ranks that share the experts."""
    etp: int = 1
    """Ranks that share the width of each expert."""
    states: Literal["auto", "all_gather", "two_level", "ring"] = "auto"
    """How lightning states travel along a row: at once (LASP+), within nodes and then between
    them, or in a ring; "auto" takes the second where a row is on several whole nodes."""
    node_size: int | None = None
    """Ranks of a machine; what the launcher says if None."""
    keys: Literal["ring", "gather"] = "ring"
    """How keys and values travel along a row."""
    balanced: bool = False
    """Give each of the cp ranks an early and a late piece of a row."""
    token_groups: int = 2
    """Parts in which tokens go to their experts, so that exchanges overlap with computing."""
    check_every: int = 50
    """Steps between comparisons of what ranks read that should read the same."""
    timeout_s: float = 600.0
    """After which ranks that wait for another one give up."""

    def layout(self, world_size: int) -> Layout:
        """Return the layout for a number of ranks.

        Raises:
            ConfigError: the axes do not multiply to it; says the arithmetic.
        """
        axes = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")
        return Layout.for_world(world_size, **{axis: getattr(self, axis) for axis in axes})


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A whole run; `[model]` is a preset's name and any keys of `ModelConfig` to change.

    Raises:
        ConfigError: values that contradict each other.
    """

    name: str
    """Of the run; its folder is `out`/`name`."""
    out: str = "runs"
    seed: int = 0
    samples: int = 3
    """Held-out documents that the finished model continues, for the report."""
    train: TrainSection
    optim: OptimSection = field(default_factory=OptimSection)
    parallel: ParallelSection = field(default_factory=ParallelSection)
    data: DataSection = field(default_factory=DataSection)
    model: ModelConfig = field(default_factory=lambda: preset("nano"))

    def __post_init__(self) -> None:
        check_run(self.name, self.train, self.optim, self.parallel, self.samples)

    @property
    def folder(self) -> Path:
        """Where everything about the run is kept."""
        return Path(self.out) / self.name

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> "Recipe":
        """Build a recipe from the tables of a TOML file.

        Raises:
            ConfigError: an unknown key, a missing one, a wrong type or a contradiction.
        """
        mapping = dict(mapping)
        model = mapping.pop("model", {})
        if not isinstance(model, Mapping):
            raise ConfigError(f"'model' is a section; got {model!r}")
        changes = {key: value for key, value in model.items() if key != "preset"}
        base = dataclasses.asdict(preset(str(model.get("preset", "nano"))))
        recipe = build(cls, mapping)
        return dataclasses.replace(recipe, model=build(ModelConfig, {**base, **changes}, "model"))

    @classmethod
    def from_file(cls, path: str | Path, overrides: Iterable[str] = ()) -> "Recipe":
        """Read a TOML recipe and apply `a.b=c` overrides."""
        return cls.from_dict(apply_overrides(read_toml(path), overrides))

    def to_dict(self) -> dict[str, Any]:
        """Return the resolved recipe, every key of every section, as plain values."""
        return plain(dataclasses.asdict(self))


def check_run(
    name: str, train: TrainSection, optim: OptimSection, parallel: ParallelSection, samples: int
) -> None:
    """Check what the recipes of all kinds of runs share.

    Raises:
        ConfigError: values that contradict each other.
    """
    if not name or "/" in name or name.startswith("."):
        raise ConfigError(f"name {name!r} must be a plain folder name")
    positive = ("total_tokens", "eval_every", "save_every", "keep_last", "log_every")
    for key in (*positive, "max_skipped_steps"):
        if getattr(train, key) < 1:
            raise ConfigError(f"train.{key} is {getattr(train, key)}; it must be at least 1")
    for batch in (train.batch_tokens, *(size for _, size in train.batch_warmup)):
        if train.micro_batch_tokens < 1 or batch < 1 or batch % train.micro_batch_tokens:
            raise ConfigError(
                f"train: a batch of {batch} tokens is no multiple of "
                f"micro_batch_tokens {train.micro_batch_tokens}"
            )
    if list(train.batch_warmup) != sorted(train.batch_warmup):
        raise ConfigError("train.batch_warmup must be in ascending order of tokens")
    if not 1 <= train.seq_len <= train.micro_batch_tokens:
        raise ConfigError(
            f"train.seq_len {train.seq_len} must lie within "
            f"micro_batch_tokens {train.micro_batch_tokens}"
        )
    _check_optim(optim)
    if parallel.node_size is not None and parallel.node_size < 1:
        raise ConfigError(f"parallel.node_size is {parallel.node_size}; it must be at least 1")
    for key in ("token_groups", "check_every", "timeout_s"):
        if not getattr(parallel, key) > 0:
            raise ConfigError(f"parallel.{key} is {getattr(parallel, key)}; it must be positive")
    if train.threads is not None and train.threads < 1:
        raise ConfigError(f"train.threads is {train.threads}; it must be at least 1")
    if samples < 0:
        raise ConfigError(f"samples is {samples}; it must not be negative")


def _check_optim(optim: OptimSection) -> None:
    if not 0 < optim.min_learning_rate <= optim.learning_rate:
        raise ConfigError(
            f"optim: expected 0 < min_learning_rate <= learning_rate; got "
            f"{optim.min_learning_rate} and {optim.learning_rate}"
        )
    for key in ("warmup_steps", "weight_decay", "grad_clip", "aux_loss_coef"):
        if not getattr(optim, key) >= 0:
            raise ConfigError(f"optim.{key} is {getattr(optim, key)}; it must not be negative")
    if not 0 <= optim.beta1 < 1 or not 0 <= optim.beta2 < 1 or not optim.eps > 0:
        raise ConfigError("optim: expected beta1 and beta2 in [0, 1) and eps above 0")
    if not 0 <= optim.decay_fraction <= 1:
        raise ConfigError(f"optim.decay_fraction {optim.decay_fraction} is not in [0, 1]")


def plain(value: Any) -> Any:
    """Return nested tuples as lists, as JSON would read them back."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value
