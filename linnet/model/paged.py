"""The memory of many sequences in one place: slots of lightning states, pages of keys and values.

The tensors are made once and never grow. Which sequence owns which slot and pages is decided
elsewhere (`linnet.infer`); here are the tensors, and the view of them that one forward pass takes.
"""

import itertools
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from linnet.model.config import SOFTMAX, ModelConfig
from linnet.ops import continue_softmax_attention
from linnet.ops.matmul import wide_dtype
from linnet.ops.native.decode import KEY_BLOCK

PAGE_SIZE = KEY_BLOCK
"""Tokens in a page of keys and values."""

SEGMENT_PAGES = 512
"""Pages of a past that are gathered at a time."""


@dataclass(slots=True)
class Row:
    """Where one sequence lies."""

    slot: int
    """Of its lightning states."""
    pages: array = field(default_factory=lambda: array("q"))
    """int64 numbers of the pages that hold its keys and values, in order."""
    length: int = 0
    """Tokens taken in."""

    def pages_for(self, num_tokens: int) -> int:
        """Return how many pages are missing for so many more tokens."""
        return max(0, pages_of(self.length + num_tokens) - len(self.pages))


def pages_of(num_tokens: int) -> int:
    """Return how many pages hold so many tokens."""
    return -(-num_tokens // PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class Extract:
    """A sequence's states and keys/values taken out of the memory, in tensors of their own."""

    length: int
    states: tuple[Tensor, ...]
    """[H, K, K] fp32 of each lightning layer."""
    keys: tuple[Tensor, ...]
    """[pages * PAGE_SIZE, G, K] of each softmax layer; what lies beyond `length` means nothing."""
    values: tuple[Tensor, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return sum(x.nbytes for x in (*self.states, *self.keys, *self.values))


class PagedMemory:
    """States and keys/values of many sequences.

    Args:
        config: of the model.
        num_slots: sequences and snapshots that can hold states.
        num_pages: of `PAGE_SIZE` tokens, in each softmax layer.
        dtype: of keys and values: the model's compute dtype.
        device: where the model is.
        page_len: tokens of each page that are kept here; the others are elsewhere.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        num_pages: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        page_len: int = PAGE_SIZE,
    ) -> None:
        heads, dim, groups = (
            config.num_attention_heads,
            config.head_dim,
            config.num_key_value_heads,
        )
        self.kinds = config.attn_type_list
        self.num_slots, self.num_pages, self.page_len = num_slots, num_pages, page_len
        self.dtype, self.device = dtype, torch.device(device)
        # Not zeroed: the pages of memory that no sequence has used are not taken from the machine.
        self.states: list[Tensor | None] = [
            None
            if kind == SOFTMAX
            else torch.empty(num_slots, heads, dim, dim, device=device, dtype=wide_dtype(dtype))
            for kind in self.kinds
        ]
        """[slots, H, K, K] fp32 (fp64 of an fp64 model) of each lightning layer."""
        self.keys, self.values = (
            [
                torch.empty(num_pages, page_len, groups, dim, device=device, dtype=dtype)
                if kind == SOFTMAX
                else None
                for kind in self.kinds
            ]
            for _ in range(2)
        )
        """[pages, page_len, G, K] of each softmax layer."""

    def clear(self, slot: int) -> None:
        """Set the states of a slot to those of an empty sequence."""
        for state in self._lightning():
            state[slot] = 0

    def copy_slot(self, source: int, target: int) -> None:
        """Copy the states of one slot to another."""
        for state in self._lightning():
            state[target] = state[source]

    def copy_page(self, source: int, target: int) -> None:
        """Copy the keys and values of one page to another."""
        for tensor in self._softmax():
            tensor[target] = tensor[source]

    def write(self, layer: int, pages: Tensor, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Put keys and values [1, T, G, K] into places [T] of pages [T]."""
        keys, values = self._layer(layer)
        keys[pages, places], values[pages, places] = k[0], v[0]

    def past(self, layer: int, row: Row, num_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield keys and values [1, S, G, K] of a row, from a bounded number of pages each.

        Args:
            layer: a softmax layer.
            row: the sequence.
            num_tokens: of its first tokens that are kept here.
        """
        keys, values = self._layer(layer)
        segment = SEGMENT_PAGES * self.page_len
        for start in range(0, num_tokens, segment):
            first = start // self.page_len
            stop = min(num_tokens, start + segment)
            pages = _indices(row.pages[first : -(-stop // self.page_len)]).to(keys.device)
            k, v = (x.index_select(0, pages).flatten(0, 1)[None] for x in (keys, values))
            yield k[:, : stop - start], v[:, : stop - start]

    def take_out(self, row: Row) -> Extract:
        """Return a copy of what a sequence has."""
        pages = _indices(row.pages[: pages_of(row.length)])
        gathered = [
            tensor.index_select(0, pages.to(tensor.device)).flatten(0, 1)
            for tensor in self._softmax()
        ]
        states = tuple(state[row.slot].clone() for state in self._lightning())
        half = len(gathered) // 2
        return Extract(row.length, states, tuple(gathered[:half]), tuple(gathered[half:]))

    def put_back(self, extract: Extract, row: Row) -> None:
        """Fill the slot and pages of a row, which has enough of them, and set its length."""
        for state, own in zip(self._lightning(), extract.states, strict=True):
            state[row.slot] = own
        pages = _indices(row.pages[: pages_of(extract.length)])
        for tensor, own in zip(self._softmax(), (*extract.keys, *extract.values), strict=True):
            tensor[pages.to(tensor.device)] = own.unflatten(0, (-1, PAGE_SIZE)).to(tensor.device)
        row.length = extract.length

    def _layer(self, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None and values is not None
        return keys, values

    def _lightning(self) -> Iterator[Tensor]:
        return (state for state in self.states if state is not None)

    def _softmax(self) -> Iterator[Tensor]:
        return (tensor for tensor in (*self.keys, *self.values) if tensor is not None)


class PackedRows:
    """Several sequences of a paged memory with their new tokens side by side in one forward pass.

    Keys and values are written as the layers run, beyond the length of each sequence, where nobody
    reads them until `commit` counts the tokens.

    Args:
        memory: where they lie.
        rows: the sequences, each with pages for its new tokens.
        lengths: how many new tokens each has.
        num_wanted: of how many of its last new tokens the hidden states are read; None for all.
    """

    def __init__(
        self,
        memory: PagedMemory,
        rows: Sequence[Row],
        lengths: Sequence[int],
        device: torch.device,
        num_wanted: Sequence[int] | None = None,
    ) -> None:
        self._memory, self._rows, self._lengths = memory, rows, lengths
        self._num_wanted = lengths if num_wanted is None else num_wanted
        self._bounds = list(itertools.accumulate(lengths, initial=0))
        self.wanted: Tensor | None = None
        """[W] int64 indices of the new tokens whose hidden states are read; None for all."""
        if sum(self._num_wanted) < self._bounds[-1]:
            parts = [
                torch.arange(stop - n, stop)
                for stop, n in zip(self._bounds[1:], self._num_wanted, strict=True)
            ]
            self.wanted = torch.cat(parts).to(device)
        self.cu_seqlens = torch.tensor(self._bounds, device=device)
        """[N + 1] int64 offsets of the sequences' new tokens."""
        positions = [
            torch.arange(row.length, row.length + n) for row, n in zip(rows, lengths, strict=True)
        ]
        self._positions = torch.cat(positions).to(device)
        pages = [
            _indices(row.pages)[row_positions // PAGE_SIZE]
            for row, row_positions in zip(rows, positions, strict=True)
        ]
        self._pages, self._places = torch.cat(pages).to(device), self._positions % PAGE_SIZE
        self._slots = torch.tensor([row.slot for row in rows], device=device)
        self._new_states: dict[int, Tensor] = {}

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Return the positions [1, T] of the new tokens."""
        return self._positions[None]

    def state(self, layer: int) -> Tensor | None:
        """Return the states [N, H, K, K] from which the new tokens start."""
        states = self._memory.states[layer]
        assert states is not None
        return states[self._slots]

    def set_state(self, layer: int, state: Tensor) -> None:
        """Keep the states after the new tokens until `commit`."""
        self._new_states[layer] = state

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, attend: Callable[..., Tensor]
    ) -> Tensor:
        """Write keys and values [1, T, G, K], and attend sequence by sequence."""
        self._memory.write(layer, self._pages, self._places, k, v)
        parts = []
        for row, own_q, own_k, own_v in self.asking(q, k, v):
            if row.length:
                # Tokens before the first query are all of its past.
                first = own_k.shape[1] - own_q.shape[1]
                past = itertools.chain(
                    self._memory.past(layer, row, row.length),
                    [(own_k[:, :first], own_v[:, :first])] if first else [],
                )
                parts.append(
                    continue_softmax_attention(own_q, own_k[:, first:], own_v[:, first:], past)
                )
            else:
                parts.append(attend(own_q, own_k, own_v))
        return torch.cat(parts, 1) if parts else q

    def asking(
        self, q: Tensor, k: Tensor, v: Tensor
    ) -> Iterator[tuple[Row, Tensor, Tensor, Tensor]]:
        """Yield the sequences with queries, and their own part of q [1, W, H, K], k and v."""
        is_whole = q.shape[1] == k.shape[1]
        counts = self._lengths if is_whole else self._num_wanted
        spans = zip(
            self._rows, q.split(list(counts), 1), itertools.pairwise(self._bounds), strict=True
        )
        for row, own_q, (start, stop) in spans:
            if own_q.shape[1]:
                yield row, own_q, k[:, start:stop], v[:, start:stop]

    def commit(self, keep: Sequence[bool]) -> None:
        """Replace the states and count the tokens of the sequences that keep them.

        Args:
            keep: one claim per sequence.
        """
        kept = [n for n, is_kept in enumerate(keep) if is_kept]
        if not kept:
            return
        index = torch.tensor(kept, device=self._slots.device)
        slots = self._slots[index]
        for layer, new in self._new_states.items():
            states = self._memory.states[layer]
            assert states is not None
            states[slots] = new if len(kept) == len(keep) else new[index]
        for n in kept:
            self._rows[n].length += self._lengths[n]


def _indices(pages: array) -> Tensor:
    return torch.from_numpy(np.array(pages, dtype=np.int64))
