"""Checkpoint folders: published tensor names on disk, read lazily, checked strictly, written whole.

A folder holds `config.json`, one `model.safetensors` or shards with an index, and the tokenizer's
files if there are any. `layout.py` says which tensors those are.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from linnet.config import nearest
from linnet.errors import CheckpointError, ConfigError
from linnet.model.config import Dialect, ModelConfig
from linnet.model.init import initialize
from linnet.model.layout import (
    DECAY_TABLE,
    FP32_PARAMETERS,
    Entry,
    disk_dtype,
    disk_layout,
    layout_of,
)
from linnet.model.presets import config_of, model_folder
from linnet.model.quantize import Quantization, is_quantized, quantize_int8
from linnet.model.transformer import Model
from linnet.storage import atomic_folder
from linnet.text import Tokenizer

logger = logging.getLogger(__name__)

MAX_SHARD_BYTES = 5 * 10**9
INDEX_NAME = "model.safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


def load_model(
    source: str | Path,
    dtype: str | torch.dtype = "bfloat16",
    device: str | torch.device = "cpu",
    seed: int = 0,
    quantization: Quantization | None = None,
) -> Model:
    """Load a checkpoint folder of any dialect, or build a preset with random weights.

    Args:
        source: a folder, the name of a preset, or "bundled" for the model that comes with linnet.
        dtype: of the parameters and activations, "auto" for the one on disk; router and LM head
            are fp32 always.
        device: where the parameters go; "meta" builds the shape alone.
        seed: of the random weights of a preset.
        quantization: "int8" for inference with int8 weights; see `linnet.model.quantize`.

    Returns:
        The model in eval mode, with `tokenizer` set if the folder has one.

    Raises:
        CheckpointError: a tensor is missing, extra, misshapen, not finite, or a file is damaged.
        ConfigError: the config, the preset's name or the quantization is wrong.
    """
    if quantization is not None and quantization not in get_args(Quantization):
        raise ConfigError(f"quantization {quantization!r} is unknown; linnet has 'int8'")
    model = _load(source, dtype, device, seed)
    return model if quantization is None else quantize_int8(model)


def _load(
    source: str | Path, dtype: str | torch.dtype, device: str | torch.device, seed: int
) -> Model:
    config, folder = config_of(source), model_folder(source)
    if not folder.is_dir():
        model = build_model(config, resolve_dtype("float32" if dtype == "auto" else dtype), device)
        if model.device.type != "meta":
            logger.info("preset %r has no trained weights: random ones, seed %d", source, seed)
            initialize(model, torch.Generator(model.device).manual_seed(seed))
        return model.eval()
    shards = Shards(folder)
    target = shards.dtype() if dtype == "auto" else resolve_dtype(dtype)
    # Names and shapes first: a config that asks for more than there is must not allocate it.
    layout = shards.match(build_model(config, target, "meta"))
    model = build_model(config, target, device)
    if model.device.type != "meta":
        shards.copy_into(model, layout)
    model.tokenizer = _read_tokenizer(folder, config)
    return model.eval()


def build_model(config: ModelConfig, dtype: torch.dtype, device: str | torch.device) -> Model:
    """Return a model with uninitialized parameters: `dtype`, but router and LM head fp32.

    Raises:
        CheckpointError: the machine has less memory than the model needs.
    """
    with torch.device("meta"):
        model = Model(config, compute_dtype=dtype)
    if torch.device(device).type == "cpu":
        _check_memory(model, dtype)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            keeps_fp32 = f"{path}.{name}".endswith(FP32_PARAMETERS) and dtype != torch.float64
            own = torch.float32 if keeps_fp32 else dtype
            value = torch.empty(parameter.shape, dtype=own, device=device)
            setattr(module, name, nn.Parameter(value))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    return model


def save_model(
    model: Model, folder: str | Path, dialect: Dialect = "linnet", overwrite: bool = False
) -> None:
    """Write config, weights and tokenizer; the folder appears whole or not at all.

    The weights keep the dtype of the parameters, but the LM head takes that of the embedding and
    the router is fp32, both as in the published checkpoints.

    Args:
        model: to be saved.
        folder: to be created.
        dialect: of `config.json`.
        overwrite: whether an existing model folder may be replaced, with all that it holds.

    Raises:
        CheckpointError: the folder exists, the weights are int8, or the disk refuses (nothing
            saved before is lost).
        ConfigError: the dialect cannot express this model, or is unknown.
    """
    if is_quantized(model):
        raise CheckpointError("int8 weights are not saved; load the original folder and save that")
    if dialect not in get_args(Dialect):
        raise ConfigError(f"unknown dialect {dialect!r}{nearest(dialect, get_args(Dialect))}")
    target = Path(folder)
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise CheckpointError(f"{target} holds something other than a model; choose another name")
    config = model.config.to_dict(dialect)
    storage = model.embed_tokens.weight.dtype
    config["torch_dtype"] = str(storage).removeprefix("torch.")
    with atomic_folder(target, overwrite) as staging:
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        parameters: dict[str, nn.Parameter] = dict(model.named_parameters())
        shards = plan_shards(model, storage)
        for number in range(len(shards)):
            write_shard(
                staging,
                shards,
                number,
                storage,
                lambda entry: parameters[entry.parameter].detach()[entry.index or ...],
            )
        write_index(staging, shards, storage)
        if model.tokenizer is not None:
            model.tokenizer.save(staging)


@torch.no_grad()
def read_weights(model: Model, folder: Path) -> None:
    """Copy a folder's tensors into the parameters of a model, one tensor at a time.

    Raises:
        CheckpointError: a tensor is missing, extra, misshapen or not finite, or a file is damaged.
    """
    shards = Shards(folder)
    shards.copy_into(model, shards.match(model))


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Return the torch dtype of a name such as "bfloat16".

    Raises:
        ConfigError: no such floating dtype.
    """
    name = str(dtype).removeprefix("torch.")
    names = {str(known).removeprefix("torch."): known for known in _DTYPES.values()}
    if name not in names:
        raise ConfigError(f"dtype {name!r} is not supported{nearest(name, names)}")
    return names[name]


class Shards:
    """The tensors of a checkpoint folder, found by header and read one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[str, Any] = {}  # Any: safetensors' handles have no type
        for file in self._files():
            self._read_header(file)

    def dtype(self) -> torch.dtype:
        """Return the dtype of the embedding, which a checkpoint's `torch_dtype` repeats."""
        name = "model.embed_tokens.weight"
        if name not in self.file_of:
            raise CheckpointError(f"{self.folder} lacks tensors: {name}")
        return _DTYPES[self._handle(self.file_of[name]).get_slice(name).get_dtype()]

    def match(self, model: Model) -> list[Entry]:
        """Return the entries to read, after checking that names and shapes fit exactly."""
        layout = layout_of(model, self.shapes)
        wanted = {entry.name: entry.shape for entry in layout}
        found = {n: s for n, s in self.shapes.items() if not DECAY_TABLE.fullmatch(n)}
        if missing := sorted(wanted.keys() - found.keys()):
            raise CheckpointError(f"{self.folder} lacks tensors: {_some(missing)}")
        if extra := sorted(found.keys() - wanted.keys()):
            raise CheckpointError(f"{self.folder} has unexpected tensors: {_some(extra)}")
        for name, shape in wanted.items():
            if found[name] != shape:
                raise CheckpointError(
                    f"{self.folder}: {name} has shape {list(found[name])}; "
                    f"the config asks for {list(shape)}"
                )
        return layout

    @torch.no_grad()
    def copy_into(self, model: Model, layout: list[Entry]) -> None:
        """Fill the parameters that the layout names."""
        parameters = dict(model.named_parameters())
        for entry in layout:
            self.read(entry, parameters[entry.parameter][entry.index or ...])

    def read(self, entry: Entry, into: Tensor, ranges: tuple[slice, ...] = ()) -> None:
        """Copy a tensor, or a range of it, into one of that shape.

        Raises:
            CheckpointError: it cannot be read, or holds values that are not finite.
        """
        try:
            handle = self._handle(self.file_of[entry.name])
            into.copy_(handle.get_slice(entry.name)[ranges or ...])
        except SafetensorError as error:
            file = self.folder / self.file_of[entry.name]
            raise CheckpointError(f"{file}: cannot read {entry.name}: {error}") from None
        # After the cast: a value may be finite on disk and too large for `into`.
        if not (is_finite := into.isfinite()).all():
            count = into.numel() - int(is_finite.sum())
            raise CheckpointError(
                f"{self.folder}: {entry.name} has {count} values that are NaN or inf "
                f"as {str(into.dtype).removeprefix('torch.')}"
            )

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

    def _read_header(self, file: str) -> None:
        handle = self._handle(file)
        for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
            if name in self.file_of:
                raise CheckpointError(
                    f"{self.folder}: {name} is in {self.file_of[name]} and {file}"
                )
            part = handle.get_slice(name)
            if part.get_dtype() not in _DTYPES:
                raise CheckpointError(
                    f"{self.folder}: {name} is {part.get_dtype()}; linnet reads "
                    f"{', '.join(_DTYPES)} and no quantized weights"
                )
            self.file_of[name], self.shapes[name] = file, tuple(part.get_shape())

    def _handle(self, file: str) -> Any:  # Any: see `_open`
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
            except (SafetensorError, OSError, ValueError) as error:
                raise CheckpointError(
                    f"{path} is damaged or cut short ({error}); fetch or save it again"
                ) from None
        return self._open[file]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_memory(model: Model, dtype: torch.dtype) -> None:
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > installed:
        raise CheckpointError(
            f"the weights take {needed / 1e9:.0f} GB and this machine has {installed / 1e9:.0f}; "
            "pass device='meta' for the shape alone"
        )


def _read_tokenizer(folder: Path, config: ModelConfig) -> Tokenizer | None:
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        return None
    tokenizer = Tokenizer.load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} ids, the model "
            f"vocab_size {config.vocab_size}; they do not belong together"
        )
    return tokenizer


def plan_shards(model: Model, storage: torch.dtype) -> list[list[Entry]]:
    """Return the tensors of each file of a checkpoint folder of a model, which may be on meta."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in disk_layout(model):
        num_bytes = _disk_bytes(entry, storage)
        if shards[-1] and size + num_bytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += num_bytes
    return shards


def write_shard(
    folder: Path,
    shards: list[list[Entry]],
    number: int,
    storage: torch.dtype,
    value: Callable[[Entry], Tensor],
) -> None:
    """Write one file of a checkpoint folder.

    Args:
        folder: to hold it.
        shards: from `plan_shards`.
        number: of the file, from 0.
        storage: dtype of the embedding on disk.
        value: gives the tensor of an entry.

    Raises:
        OSError: the disk refuses.
    """
    file = _file_name(number, len(shards))
    tensors = {
        entry.name: value(entry).to("cpu", disk_dtype(entry.parameter, storage)).contiguous()
        for entry in shards[number]
    }
    try:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # it comes readable by its owner alone
    except SafetensorError as error:
        raise OSError(f"writing {file} failed: {error}") from None


def write_index(folder: Path, shards: list[list[Entry]], storage: torch.dtype) -> None:
    """Write the index of the files, if there are several."""
    if len(shards) == 1:
        return
    weight_map = {
        entry.name: _file_name(number, len(shards))
        for number, entries in enumerate(shards)
        for entry in entries
    }
    total = sum(_disk_bytes(entry, storage) for entries in shards for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _file_name(number: int, count: int) -> str:
    return (
        "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
    )


def _disk_bytes(entry: Entry, storage: torch.dtype) -> int:
    return torch.Size(entry.shape).numel() * disk_dtype(entry.parameter, storage).itemsize
