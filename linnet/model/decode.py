"""One token for each row of a cache as a single native call: no Python between the products."""

import ctypes
from operator import is_
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from linnet.model.cache import Cache
from linnet.model.config import SOFTMAX
from linnet.model.decode_table import DecodeTable
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
    decoder = _decoders.get(model)
    if decoder is None or not decoder.table.is_current():
        decoder = _decoders[model] = _Decoder(model)
    if decoder.table.native is None or (memory := decoder.memory_of(cache)) is None:
        return None
    shape = (tokens.shape[0], int(wants_logits), model.config.vocab_size)
    logits = torch.empty(shape, dtype=torch.float32, device="cpu")
    lengths, _ = cache.lengths.buffer_info()
    output = logits if wants_logits else None
    native.run(decoder.table.native, tokens.contiguous(), lengths, memory, output)
    return logits


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

    def memory_of(self, cache: Cache) -> ctypes.Array | None:
        """Return the addresses of what a cache holds, with room for a token; None if unfit."""
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
        return memory.addresses

    def _is_fit(self, tensor: Tensor) -> bool:
        if tensor.shape[1:] == self._state_shape:
            is_fit = tensor.dtype == torch.float32
        else:
            is_fit = tensor.shape[2:] == self._kv_shape and tensor.dtype == self._no_keys.dtype
        return is_fit and tensor.is_cpu and tensor.is_contiguous()


_decoders: WeakKeyDictionary["Model", _Decoder] = WeakKeyDictionary()
