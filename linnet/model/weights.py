"""Checkpoint folders: published tensor names on disk, read lazily, checked strictly, written whole.

A folder holds `config.json`, one `model.safetensors` or shards with an index, and the tokenizer's
files if there are any. Both dialects of names are read:

    published       ...block_sparse_moe.experts.{e}.w1/w2/w3.weight, no buffers
    transformers    the same, or experts stacked as mlp.experts.gate_up_proj / down_proj, and the
                    decay tables of its lightning layers, which are recomputed here and ignored
"""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from linnet.config import nearest
from linnet.errors import CheckpointError, ConfigError
from linnet.model.config import Dialect, ModelConfig
from linnet.model.decay import layer_slopes
from linnet.model.init import initialize
from linnet.model.presets import PRESETS, preset
from linnet.model.transformer import Model
from linnet.storage import atomic_folder
from linnet.text import Tokenizer

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5 * 10**9
INDEX_NAME = "model.safetensors.index.json"

FP32_PARAMETERS = ("block_sparse_moe.gate.weight", "lm_head.weight")
"""Endings of the parameters that stay fp32 in memory whatever dtype is asked for."""

_DECAY_TABLE = re.compile(
    r"model\.layers\.\d+\.self_attn\.(slope_rate|query_decay|key_decay|diagonal_decay)"
)


@dataclass(frozen=True)
class Entry:
    """One tensor on disk and the part of a parameter that it is."""

    name: str
    parameter: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()
    """Where in the parameter the tensor lies; () is all of it."""


def disk_layout(model: Model) -> list[Entry]:
    """Return the tensors of a published checkpoint of this model, in the published order."""
    entries = []
    width = model.config.intermediate_size
    gate, up = slice(0, width), slice(width, 2 * width)
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape)
        disk = name if name == "lm_head.weight" else f"model.{name}"
        if name.endswith("experts.gate_up"):
            for expert in range(shape[0]):
                stem = f"{disk.removesuffix('.gate_up')}.{expert}"
                one = (width, shape[2])
                entries.append(Entry(f"{stem}.w1.weight", name, one, (expert, gate)))
                entries.append(Entry(f"{stem}.w3.weight", name, one, (expert, up)))
        elif name.endswith("experts.down"):
            for expert in range(shape[0]):
                stem = f"{disk.removesuffix('.down')}.{expert}"
                entries.append(Entry(f"{stem}.w2.weight", name, shape[1:], (expert,)))
        else:
            entries.append(Entry(disk, name, shape))
    return entries


def load_model(
    source: str | Path,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Model:
    """Load a checkpoint folder of any dialect, or build a preset with random weights.

    Args:
        source: a folder, or the name of a preset.
        dtype: of the parameters and activations; router and LM head are fp32 always.
        device: where the parameters go; "meta" builds the shape alone.
        seed: of the random weights of a preset.

    Returns:
        The model in eval mode, with `tokenizer` set if the folder has one.

    Raises:
        CheckpointError: a tensor is missing, extra, misshapen, not finite, or a file is damaged.
        ConfigError: the config or the preset's name is wrong.
    """
    target = resolve_dtype(dtype)
    folder = Path(source)
    if not folder.is_dir():
        if folder.exists():
            raise CheckpointError(f"{folder} is a file; pass the folder that holds config.json")
        if str(source) not in PRESETS and ("/" in str(source) or "\\" in str(source)):
            raise CheckpointError(f"model folder {str(source)!r} does not exist")
        model = build_model(preset(str(source)), target, device)
        if model.device.type != "meta":
            initialize(model, torch.Generator(model.device).manual_seed(seed))
        return model.eval()
    model = build_model(ModelConfig.from_folder(folder), target, device)
    if model.device.type != "meta":
        read_weights(model, folder)
    if (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file():
        model.tokenizer = Tokenizer.load(folder)
        if model.tokenizer.vocab_size > model.config.vocab_size:
            raise CheckpointError(
                f"{folder}: the tokenizer has {model.tokenizer.vocab_size} ids, the model "
                f"vocab_size {model.config.vocab_size}; they do not belong together"
            )
    return model.eval()


def build_model(config: ModelConfig, dtype: torch.dtype, device: str | torch.device) -> Model:
    """Return a model with uninitialized parameters: `dtype`, but router and LM head fp32."""
    with torch.device("meta"):
        model = Model(config, compute_dtype=dtype)
    for name, parameter in model.named_parameters():
        keeps_fp32 = name.endswith(FP32_PARAMETERS) and dtype != torch.float64
        parameter.data = torch.empty(
            parameter.shape, dtype=torch.float32 if keeps_fp32 else dtype, device=device
        )
    for layer, block in enumerate(model.layers):
        if hasattr(block.self_attn, "decay") and torch.device(device).type != "meta":
            # Building on the meta device left the slopes without values.
            block.self_attn.decay = _slopes(config, layer).to(device)
    return model


def save_model(
    model: Model, folder: str | Path, dialect: Dialect = "linnet", overwrite: bool = False
) -> None:
    """Write config, weights and tokenizer; the folder appears whole or not at all.

    The weights keep the dtype of the parameters, but the LM head takes that of the embedding, and
    the router is fp32 except in the transformers dialect (both as the published checkpoints).

    Args:
        model: to be saved.
        folder: to be created.
        dialect: of `config.json`; "transformers" also gives all tensors one dtype.
        overwrite: whether an existing folder may be replaced.

    Raises:
        CheckpointError: the folder exists, or the disk refuses (nothing saved before is lost).
        ConfigError: the dialect cannot express this model, or is unknown.
    """
    if dialect not in get_args(Dialect):
        raise ConfigError(f"unknown dialect {dialect!r}{nearest(dialect, get_args(Dialect))}")
    config = model.config.to_dict(dialect)
    storage = model.embed_tokens.weight.dtype
    config["torch_dtype"] = str(storage).removeprefix("torch.")
    with atomic_folder(Path(folder), overwrite) as staging:
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _write_shards(model, staging, storage, dialect)
        if model.tokenizer is not None:
            model.tokenizer.save(staging)


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of a name such as "bfloat16".

    Raises:
        ConfigError: no such floating dtype.
    """
    names = ("float32", "bfloat16", "float16", "float64")
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype not in names:
        raise ConfigError(f"dtype {dtype!r} is not supported{nearest(dtype, names)}")
    return getattr(torch, dtype)


def _slopes(config: ModelConfig, layer: int) -> Tensor:
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    return layer_slopes(layer, layers, heads, config.slope_rule)


class _Shards:
    """The tensors of a checkpoint folder, found by header and read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[str, Any] = {}
        for file in self._files():
            handle = self._handle(file)
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                self.file_of[name] = file
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """Return one tensor in its dtype on disk."""
        try:
            return self._handle(self.file_of[name]).get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{self.file_of[name]}: cannot read {name}: {error}") from None

    def _files(self) -> list[str]:
        index = self.folder / INDEX_NAME
        if not index.is_file():
            return ["model.safetensors"]
        try:
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(f"{index} is not a valid index of shards") from None
        if bad := [f for f in files if not isinstance(f, str) or Path(f).name != f]:
            raise CheckpointError(f"{index} names {bad[0]!r}, which is no file of this folder")
        return files

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{path} is damaged or cut short ({error}); fetch or save it again"
                ) from None
        return self._open[file]


@torch.no_grad()
def read_weights(model: Model, folder: Path) -> None:
    """Copy a folder's tensors into the parameters of a model, one tensor at a time.

    Raises:
        CheckpointError: a tensor is missing, extra, misshapen or not finite, or a file is damaged.
    """
    shards = _Shards(folder)
    layout = _match(model, shards, folder)
    parameters = dict(model.named_parameters())
    for entry in layout:
        tensor = shards.read(entry.name)
        if not tensor.isfinite().all():
            count = int((~tensor.isfinite()).sum())
            raise CheckpointError(f"{folder}: {entry.name} has {count} values that are NaN or inf")
        parameters[entry.parameter][entry.index or ...].copy_(tensor)


def _match(model: Model, shards: _Shards, folder: Path) -> list[Entry]:
    """Return the entries to read, after checking that names and shapes fit exactly."""
    layout = disk_layout(model)
    if any(".mlp.experts." in name for name in shards.shapes):
        layout = _stacked_layout(model)
    wanted = {entry.name: entry.shape for entry in layout}
    found = {n: s for n, s in shards.shapes.items() if not _DECAY_TABLE.fullmatch(n)}
    if missing := sorted(wanted.keys() - found.keys()):
        raise CheckpointError(_listing(folder, "lacks", missing))
    if extra := sorted(found.keys() - wanted.keys()):
        raise CheckpointError(_listing(folder, "has unexpected", extra))
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(found[name])}; the config asks for {list(shape)}"
            )
    return layout


def _stacked_layout(model: Model) -> list[Entry]:
    """Return the tensors of transformers' module tree, where the experts of a layer are stacked."""
    stacked = {"experts.gate_up": "experts.gate_up_proj", "experts.down": "experts.down_proj"}
    entries = []
    for name, parameter in model.named_parameters():
        disk = name if name == "lm_head.weight" else f"model.{name}"
        disk = disk.replace(".block_sparse_moe.", ".mlp.")
        for ours, theirs in stacked.items():
            if disk.endswith(ours):
                disk = disk.removesuffix(ours) + theirs
        entries.append(Entry(disk, name, tuple(parameter.shape)))
    return entries


def _listing(folder: Path, verb: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{folder} {verb} tensors: {', '.join(names[:3])}{more}"


def _write_shards(model: Model, folder: Path, storage: torch.dtype, dialect: Dialect) -> None:
    parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
    shards = list(_plan_shards(model, storage, dialect))
    weight_map: dict[str, str] = {}
    total = 0
    for number, entries in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for entry in entries:
            value = parameters[entry.parameter].detach()[entry.index or ...]
            dtype = disk_dtype(entry.parameter, storage, dialect)
            tensors[entry.name] = value.to("cpu", dtype).contiguous()
            weight_map[entry.name] = file
            total += tensors[entry.name].nbytes
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"writing {file} failed: {error}") from None
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def disk_dtype(parameter: str, storage: torch.dtype, dialect: Dialect) -> torch.dtype:
    """Return the dtype of a parameter on disk when the embedding is saved as `storage`."""
    is_gate = parameter.endswith("block_sparse_moe.gate.weight")
    if is_gate and dialect != "transformers" and storage.itemsize < 4:
        return torch.float32
    return storage


def _plan_shards(model: Model, storage: torch.dtype, dialect: Dialect) -> Iterator[list[Entry]]:
    shard: list[Entry] = []
    size = 0
    for entry in disk_layout(model):
        itemsize = disk_dtype(entry.parameter, storage, dialect).itemsize
        num_bytes = torch.Size(entry.shape).numel() * itemsize
        if shard and size + num_bytes > MAX_SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += num_bytes
    yield shard
