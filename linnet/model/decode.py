"""One token for each row of a cache as a single native call: no Python between the products."""

import ctypes
from array import array
from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from linnet.model.cache import Cache
from linnet.model.config import SOFTMAX
from linnet.model.decode_table import DecodeTable
from linnet.model.paged import PAGE_SIZE, PagedMemory, Row
from linnet.ops.native import decode as native
from linnet.ops.native import library

if TYPE_CHECKING:
    from linnet.model.transformer import Model


def decode_step(model: "Model", tokens: Tensor, cache: Cache, wants_logits: bool) -> Tensor | None:
    """Advance every row of a cache by one token, if the native kernels can.

    Args:
        model: any; the step runs without gradients.
        tokens: [B, T] int64, within the vocabulary.
        cache: of B rows; its states are overwritten where nobody else can see them. If the call
            fails, it stays as it was.
        wants_logits: whether to run the LM head.

    Returns:
        Logits [B, 1, vocab] fp32, or [B, 0, vocab] if they are not wanted; None if the tokens, the
        model or the machine need the torch path, and nothing has happened then.
    """
    if torch.compiler.is_compiling() or model.training or not _is_step(tokens):
        return None
    if library() is None:
        return None
    decoder = _decoder_of(model)
    if decoder.table.native is None or (memory := decoder.memory_of(cache)) is None:
        return None
    shape = (tokens.shape[0], int(wants_logits), model.config.vocab_size)
    logits = torch.empty(shape, dtype=torch.float32, device="cpu")
    lengths, _ = cache.lengths.buffer_info()
    output = logits if wants_logits else None
    native.run(decoder.table.native, tokens.contiguous(), lengths, memory, output)
    return logits


def decode_rows(
    model: "Model", tokens: Sequence[int], memory: PagedMemory, rows: Sequence[Row]
) -> Tensor | None:
    """Advance sequences of a paged memory by one token each, if the native kernels can.

    Args:
        model: in eval mode.
        tokens: one id per row, within the vocabulary.
        memory: where the rows lie.
        rows: each with a page for its new token. Their states are overwritten; counting their
            tokens is left to the caller.

    Returns:
        Logits [B, 1, vocab] fp32; None if the machine or the model need the torch path, and nothing
        has happened then.
    """
    table = _table_of(model, memory)
    if table is None:
        return None
    batch = len(rows)
    logits = torch.empty(batch, 1, model.config.vocab_size, dtype=torch.float32, device="cpu")
    lengths = array("q", [row.length for row in rows])
    pages = array("q", [row.pages.buffer_info()[0] for row in rows])
    addresses = _addresses(memory, [row.slot for row in rows])
    native.run(
        table,
        torch.tensor(tokens, dtype=torch.int64)[:, None],
        lengths.buffer_info()[0],
        addresses.ctypes.data,
        logits,
        pages.buffer_info()[0],
        PAGE_SIZE,
    )
    return logits


def _table_of(model: "Model", memory: PagedMemory) -> native.Model | None:
    if model.training or library() is None:
        return None
    decoder = _decoder_of(model)
    config = model.config
    is_fit = memory.device.type == "cpu" and memory.kinds == config.attn_type_list
    if not is_fit or memory.dtype != model.compute_dtype:
        return None
    return decoder.table.native


def _addresses(memory: PagedMemory, slots: Sequence[int]) -> np.ndarray:
    """Return [L, B, 2] addresses of the rows' states, or of all keys and values of a layer."""
    addresses = np.zeros((len(memory.kinds), len(slots), 2), dtype=np.int64)
    for layer, (state, keys, values) in enumerate(
        zip(memory.states, memory.keys, memory.values, strict=True)
    ):
        if state is not None:
            step = state.stride(0) * state.element_size()
            addresses[layer, :, 0] = state.data_ptr() + np.array(slots) * step
        elif keys is not None and values is not None:
            addresses[layer] = keys.data_ptr(), values.data_ptr()
    return addresses


def _is_step(tokens: Tensor) -> bool:
    return type(tokens) is Tensor and tokens.is_cpu and tokens.shape[1] == 1 and len(tokens) > 0


class _Memory:
    """The addresses of a cache's tensors, row by row, as the kernels take them."""

    def __init__(self, tensors: list[tuple[Tensor, ...]]) -> None:
        self._tensors = [tensor for pair in tensors for tensor in pair]
        self.addresses = (ctypes.c_void_p * (2 * sum(len(pair[0]) for pair in tensors)))()
        at = 0
        for pair in tensors:
            for row in range(len(pair[0])):
                for place, tensor in enumerate(pair):
                    step = tensor.stride(0) * tensor.element_size()
                    self.addresses[at + place] = tensor.data_ptr() + row * step
                at += 2

    def holds(self, tensors: list[tuple[Tensor, ...]]) -> bool:
        """Return whether these are the tensors that the addresses were taken from."""
        return all(map(is_, self._tensors, (tensor for pair in tensors for tensor in pair)))


class _Decoder:
    """The table of one model, and the addresses of each of its caches."""

    def __init__(self, model: "Model") -> None:
        self.table = DecodeTable(model)
        self._memories: WeakKeyDictionary[Cache, _Memory] = WeakKeyDictionary()
        config = model.config
        self._kinds = config.attn_type_list
        self._state_shape = (config.num_attention_heads, config.head_dim, config.head_dim)
        self._kv_shape = (config.num_key_value_heads, config.head_dim)
        self._no_keys = torch.empty(1, 0, *self._kv_shape, dtype=model.compute_dtype, device="cpu")

    def memory_of(self, cache: Cache) -> int | None:
        """Return where the tensors' addresses are, with room for a token; None if unfit."""
        tensors = [
            cache.reserve(layer, 1, self._no_keys, self._no_keys)
            if kind == SOFTMAX
            else (cache.own_state(layer, self._state_shape),)
            for layer, kind in enumerate(self._kinds)
        ]
        memory = self._memories.get(cache)
        if memory is None or not memory.holds(tensors):
            if not all(self._is_fit(tensor) for pair in tensors for tensor in pair):
                return None
            memory = self._memories[cache] = _Memory(tensors)
        return ctypes.addressof(memory.addresses)

    def _is_fit(self, tensor: Tensor) -> bool:
        if tensor.shape[1:] == self._state_shape:
            is_fit = tensor.dtype == torch.float32
        else:
            is_fit = tensor.shape[2:] == self._kv_shape and tensor.dtype == self._no_keys.dtype
        return is_fit and tensor.is_cpu and tensor.is_contiguous()


def _decoder_of(model: "Model") -> _Decoder:
    decoder = _decoders.get(model)
    if decoder is None or not decoder.table.is_current():
        decoder = _decoders[model] = _Decoder(model)
    return decoder


_decoders: WeakKeyDictionary["Model", _Decoder] = WeakKeyDictionary()
