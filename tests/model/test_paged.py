"""Sequences in a paged memory: the same logits as the whole, whatever the pieces and neighbors."""

import copy
from array import array

import pytest
import torch

from linnet.model.decode import decode_rows
from linnet.model.paged import PAGE_SIZE, PackedRows, PagedMemory, Row
from linnet.ops import lm_head
from linnet.ops.native import library

CPU = torch.device("cpu")
TOLERANCE = 1e-4


class Sequences:
    """Rows of a memory whose pages are handed out in a shuffled order."""

    def __init__(self, model, num_rows, num_pages=40):
        self.model = model
        self.memory = PagedMemory(model.config, num_rows + 1, num_pages, torch.float32)
        order = torch.randperm(num_pages, generator=torch.Generator().manual_seed(3))
        self.free = order.tolist()
        self.rows = [Row(slot) for slot in range(num_rows)]
        for row in self.rows:
            self.memory.clear(row.slot)

    def extend(self, row, num_tokens):
        row.pages.extend(self.free.pop() for _ in range(row.pages_for(num_tokens)))

    def packed(self, pieces, keep=True, num_wanted=None):
        """Take in pieces, {number of the row: tokens [1, T]}, and return the logits of each."""
        rows, tokens = [self.rows[n] for n in pieces], list(pieces.values())
        lengths = [piece.shape[1] for piece in tokens]
        for row, length in zip(rows, lengths, strict=True):
            self.extend(row, length)
        packed = PackedRows(self.memory, rows, lengths, CPU, num_wanted)
        hidden = self.model.continue_packed(torch.cat(tokens, 1), packed)
        packed.commit([keep] * len(rows))
        logits = lm_head(hidden, self.model.lm_head.weight).detach()
        return dict(zip(pieces, logits.split(num_wanted or lengths, 1), strict=True))

    def step(self, tokens):
        """Take in one token each, {number of the row: id}, with the native step."""
        rows = [self.rows[n] for n in tokens]
        for row in rows:
            self.extend(row, 1)
        logits = decode_rows(self.model, list(tokens.values()), self.memory, rows)
        assert logits is not None
        for row in rows:
            row.length += 1
        return dict(zip(tokens, logits.split(1), strict=True))


def tokens_of(length, seed=1):
    return torch.randint(61, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["LLLS", "SLS", "LL", "SS"])
def model(request, tiny_model):
    return tiny_model(request.param)


@pytest.mark.parametrize("piece", [1, 63, 64, 65, 1000])
def test_pieces_of_any_size_give_the_logits_of_the_whole(model, piece):
    tokens, sequences = tokens_of(200), Sequences(model, 1)
    parts = [sequences.packed({0: part})[0] for part in tokens.split(piece, 1)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=TOLERANCE, rtol=0)


def test_neighbors_of_other_lengths_change_nothing(model):
    all_tokens = [tokens_of(length, seed) for seed, length in enumerate((300, 130, 7))]
    sequences = Sequences(model, 3)
    got = [[], [], []]
    for sizes in ((64, 1, 3), (1, 63, 1), (100, 65, 1), (130, 0, 1), (5, 1, 1)):
        pieces = {}
        for n, size in enumerate(sizes):
            start = sequences.rows[n].length
            if size:
                pieces[n] = all_tokens[n][:, start : start + size]
        for n, logits in sequences.packed(pieces).items():
            got[n].append(logits)
    for tokens, parts in zip(all_tokens, got, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=TOLERANCE, rtol=0)


def test_wanted_logits_are_those_of_the_whole(model):
    all_tokens = [tokens_of(length, seed) for seed, length in enumerate((300, 230, 140))]
    sequences = Sequences(model, 3)
    for sizes, wanted in (
        ((64, 100, 3), [0, 0, 0]),
        ((63, 1, 65), [2, 1, 0]),
        ((130, 64, 1), [0, 64, 1]),
        ((43, 65, 71), [1, 1, 71]),
    ):
        starts = [row.length for row in sequences.rows]
        pieces = {
            n: tokens[:, start : start + size]
            for n, (tokens, start, size) in enumerate(zip(all_tokens, starts, sizes, strict=True))
        }
        for n, logits in sequences.packed(pieces, num_wanted=wanted).items():
            stop = starts[n] + sizes[n]
            with torch.no_grad():
                whole = model(all_tokens[n])[:, stop - wanted[n] : stop]
            torch.testing.assert_close(logits, whole, atol=TOLERANCE, rtol=0)


@pytest.mark.skipif(library() is None, reason="no native kernels on this machine")
def test_native_steps_continue_packed_pieces(model):
    all_tokens = [tokens_of(length, seed) for seed, length in enumerate((150, 70, 5))]
    sequences = Sequences(model, 3)
    got = [
        [logits]
        for logits in sequences.packed(
            {n: tokens[:, : tokens.shape[1] - 4] for n, tokens in enumerate(all_tokens)}
        ).values()
    ]
    for back in (4, 3, 2, 1):
        step = {n: int(tokens[0, -back]) for n, tokens in enumerate(all_tokens)}
        for n, logits in sequences.step(step).items():
            got[n].append(logits)
    for tokens, parts, row in zip(all_tokens, got, sequences.rows, strict=True):
        assert row.length == tokens.shape[1]
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(parts, 1), model(tokens), atol=TOLERANCE, rtol=0)


def test_tokens_that_are_not_committed_leave_no_trace(model):
    tokens, sequences = tokens_of(90), Sequences(model, 1)
    sequences.packed({0: tokens[:, :70]})
    sequences.packed({0: tokens_of(9, seed=5)}, keep=False)
    assert sequences.rows[0].length == 70
    logits = sequences.packed({0: tokens[:, 70:]})[0]
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens)[:, 70:], atol=TOLERANCE, rtol=0)


def test_what_was_taken_out_continues_elsewhere(model):
    tokens, sequences = tokens_of(100), Sequences(model, 2)
    sequences.packed({0: tokens[:, :70]})
    extract = sequences.memory.take_out(sequences.rows[0])
    sequences.packed({0: tokens[:, 70:]})
    other = sequences.rows[1]
    sequences.extend(other, extract.length)
    sequences.memory.put_back(extract, other)
    logits = sequences.packed({1: tokens[:, 70:]})[1]
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens)[:, 70:], atol=TOLERANCE, rtol=0)


def test_copied_slot_and_page_continue_a_prefix(model):
    tokens, sequences = tokens_of(100), Sequences(model, 2)
    sequences.packed({0: tokens[:, :70]})
    one, other = sequences.rows
    sequences.memory.copy_slot(one.slot, other.slot)
    other.pages = array("q", [one.pages[0], sequences.free.pop()])
    sequences.memory.copy_page(one.pages[1], other.pages[1])
    other.length = 70
    sequences.packed({0: tokens_of(20, seed=9)})
    logits = sequences.packed({1: tokens[:, 70:]})[1]
    with torch.no_grad():
        torch.testing.assert_close(logits, model(tokens)[:, 70:], atol=TOLERANCE, rtol=0)


def test_half_precision_memory_follows_the_whole(tiny_model):
    model, tokens = tiny_model("LLLS", torch.bfloat16), tokens_of(100)
    sequences = Sequences(model, 1)
    sequences.memory = PagedMemory(model.config, 2, 40, torch.bfloat16)
    sequences.memory.clear(0)
    parts = [sequences.packed({0: part})[0] for part in tokens.split(33, 1)]
    with torch.no_grad():
        whole, exact = model(tokens), copy.deepcopy(model).float()
        exact.compute_dtype = torch.float32
        errors = [(logits - exact(tokens)).norm() for logits in (torch.cat(parts, 1), whole)]
    assert errors[0] < 1.2 * errors[1]


def test_page_holds_whole_key_blocks():
    assert PAGE_SIZE % 64 == 0
