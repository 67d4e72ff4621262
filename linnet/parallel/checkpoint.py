"""Tensors of which each rank has a part, written and read by PyTorch's distributed checkpoint.

The files are safetensors, with where each part lies in their headers: nothing is pickled. Any
number of ranks, cut in any way, can read what others wrote; each reads what its own parts overlap.
Writing may go on in the background, from copies.
"""

import warnings
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save

from linnet.errors import CheckpointError
from linnet.parallel.placement import Box

Parts = Mapping[str, tuple[Tensor, Box]]
"""By name: what this rank has, shaped as the box, and where it lies in the whole."""


class Writing:
    """Files that are being written."""

    def __init__(self, folder: Path, files: "Future[Any]") -> None:
        self._folder, self._files = folder, files

    def done(self) -> bool:
        """Return whether all ranks have written theirs, or failed."""
        return self._files.done()

    def wait(self) -> None:
        """Return when the files of all ranks are written.

        Raises:
            CheckpointError: a file of any rank cannot be written.
        """
        try:
            self._files.result()
        except (CheckpointException, SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"cannot write {self._folder}: {_reason(error)}") from None


def save_parts(folder: Path, parts: Parts, group: dist.ProcessGroup) -> Writing:
    """Begin to write copies of the parts of all ranks; each rank of the group calls this.

    Args:
        folder: to be filled; the same for all ranks.
        parts: of this rank; parts that several ranks have are written once.
        group: the ranks, used for nothing else until all is written.
    """
    state = {name: _Part.of(*part) for name, part in parts.items() if part[0].numel()}
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    files = async_save(state, storage_writer=writer, process_group=group, async_stager=_CopyParts())
    return Writing(folder, cast("Future[Any]", files))


class SavedParts:
    """What was saved by any number of ranks, cut in any way.

    Args:
        folder: that `save_parts` filled.

    Attributes:
        names: of the tensors.

    Raises:
        CheckpointError: a file is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._reader = _Reader(str(folder))
        try:
            self._metadata = self._reader.read_metadata()
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder} is damaged: {_reason(error)}") from None
        self.names = set(self._metadata.state_dict_metadata)
        if not self.names:
            raise CheckpointError(f"{folder} is empty or missing")

    def read(self, parts: Parts) -> None:
        """Fill tensors in place with their parts of what was saved; no rank waits for another.

        Raises:
            CheckpointError: something is missing, damaged or of another shape.
        """
        _check(self.folder, self._metadata, parts)
        state = {name: _Part.of(*part) for name, part in parts.items() if part[0].numel()}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it reads without the others
                load(state, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, SafetensorError, OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.folder} is damaged: {_reason(error)}") from None


class _Reader(HuggingFaceStorageReader):
    """Reads the headers once, not at each call."""

    _known: Metadata | None = None

    def read_metadata(self) -> Metadata:
        """Return what is in the files."""
        if self._known is None:
            self._known = super().read_metadata()
        return self._known


def _check(folder: Path, metadata: Metadata, parts: Parts) -> None:
    for name, (_, box) in parts.items():
        saved = metadata.state_dict_metadata.get(name)
        if not isinstance(saved, TensorStorageMetadata):
            raise CheckpointError(f"{folder} lacks {name}")
        if tuple(saved.size) != box.whole:
            raise CheckpointError(
                f"{folder}: {name} has shape {list(saved.size)}; expected {list(box.whole)}"
            )
        if sum(chunk.sizes.numel() for chunk in saved.chunks) != saved.size.numel():
            raise CheckpointError(f"{folder} lacks parts of {name}: the file of a rank is missing")


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"rank {rank}: {failure}"
    return str(error)


class _Part(Tensor):
    """A tensor that tells the checkpoint where it lies in a larger one."""

    box: Box
    own: Tensor

    @classmethod
    def of(cls, values: Tensor, box: Box) -> "_Part":
        part = values.detach().as_subclass(cls)
        part.box, part.own = box, values.detach()
        return part

    def size(self, dim: int | None = None) -> Any:  # type: ignore[override]
        """Return the size of the whole, which the reader compares."""
        return torch.Size(self.box.whole) if dim is None else self.box.whole[dim]

    def _chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size(self.box.start), torch.Size(self.box.size))

    def __create_write_items__(self, fqn: str, _object: object) -> list[WriteItem]:
        data = TensorWriteData(
            chunk=self._chunk(),
            properties=TensorProperties.create_from_tensor(self.own),
            size=torch.Size(self.box.whole),
        )
        index = MetadataIndex(fqn, torch.Size(self.box.start))
        return [WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]

    def __get_tensor_shard__(self, _index: MetadataIndex) -> Tensor:
        return self.own


class _CopyParts(AsyncStager):
    """Copies all parts at once: training goes on changing the originals."""

    _synchronize_after_execute = False

    def stage(self, state_dict: dict[str, Any], **_options: Any) -> dict[str, Any]:
        """Return copies on the CPU."""
        return {
            name: _Part.of(part.own.to("cpu", copy=True), part.box)
            for name, part in state_dict.items()
        }

    def close(self) -> None:
        """Nothing is kept."""
