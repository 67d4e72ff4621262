"""LASP+ against one process: outputs and every gradient, wherever documents meet the cuts."""

import pytest
import torch
import torch.distributed as dist

from linnet.ops.lightning_attention.reference import reference
from linnet.parallel.exchange import Nodes, StateExchange
from linnet.parallel.sequence import LightningAcrossRanks
from linnet.parallel.split import split_row

HEADS, KEY, VALUE, LENGTH = 3, 5, 4, 48
ROWS = {
    "one document over all ranks": [0, 48],
    "border on every cut": [0, 12, 24, 36, 48],
    "borders beside the cuts": [0, 11, 25, 37, 48],
    "many within a rank": [0, 3, 5, 6, 10, 48],
    "tiny ones around a cut": [0, 30, 31, 32, 48],
    "empty ones": [0, 0, 10, 10, 24, 24, 48, 48],
    "one token at each end": [0, 1, 47, 48],
}


def inputs(dtype=torch.float64, length=LENGTH):
    generator = torch.Generator().manual_seed(1)
    q, k, v, upstream = (
        torch.randn(1, length, HEADS, size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (KEY, KEY, VALUE, VALUE)
    )
    return q, k, v, upstream, torch.tensor([0.0, 0.03, 1.5])


def whole(offsets, activation, dtype=torch.float64):
    q, k, v, upstream, decay = inputs(dtype, offsets[-1])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    active = [torch.nn.functional.silu(x) if activation else x for x in leaves]
    o, _ = reference(*active, decay, cu_seqlens=torch.tensor(offsets))
    o.backward(upstream)
    return [o.detach(), *(x.grad for x in leaves)]


def on_rank(group, offsets, mode, is_balanced, activation, dtype=torch.float64):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    nodes = None
    if mode == "two_level":
        pairs = [dist.new_group([n, n + 1]) for n in range(0, 4, 2)]
        across = [dist.new_group([n, n + 2]) for n in range(2)]
        nodes = Nodes(2, pairs[rank // 2], across[rank % 2])
    split = split_row(offsets, size, is_balanced)
    q, k, v, upstream, decay = inputs(dtype, offsets[-1])
    own = split.tokens(rank)
    leaves = [x[:, own].clone().requires_grad_() for x in (q, k, v)]
    attend = LightningAcrossRanks(StateExchange(group, mode, nodes), is_balanced)
    o, _ = attend(
        *leaves,
        decay,
        cu_seqlens=torch.tensor(offsets),
        return_state=False,
        activation="silu" if activation else None,
    )
    o.backward(upstream[:, own])
    return own, [o.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("offsets", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("mode", "is_balanced"), [("all_gather", 0), ("all_gather", 1), ("ring", 0)]
)
def test_parts_are_those_of_the_whole(ranks, assert_equal_parts, offsets, size, mode, is_balanced):
    results = ranks(on_rank, size, offsets, mode, bool(is_balanced), False)
    assert_equal_parts(results, whole(offsets, False), 1e-12)


@pytest.mark.parametrize("offsets", ROWS.values(), ids=ROWS)
def test_two_levels_are_one(ranks, assert_equal_parts, offsets):
    assert_equal_parts(
        ranks(on_rank, 4, offsets, "two_level", False, True), whole(offsets, True), 1e-12
    )


@pytest.mark.parametrize("offsets", [[0, 4], [0, 1, 2, 3, 4], [0, 2, 7]])
def test_ranks_with_a_token_or_two(ranks, assert_equal_parts, offsets):
    assert_equal_parts(
        ranks(on_rank, 4, offsets, "all_gather", False, True), whole(offsets, True), 1e-12
    )


@pytest.mark.parametrize(("mode", "is_balanced"), [("all_gather", True), ("ring", False)])
def test_fp32_stays_within_its_rounding(ranks, assert_equal_parts, mode, is_balanced):
    offsets = [0, 100, 700, 1000]
    results = ranks(on_rank, 4, offsets, mode, is_balanced, True, torch.float32)
    expected = [x.float() for x in whole(offsets, True)]
    scale = max(float(x.abs().max()) for x in expected)
    assert_equal_parts(results, expected, 1e-5 * scale)


def test_split_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="a row of 3 tokens cannot be split into 4 pieces"):
        split_row([0, 3], 2, True)


@pytest.mark.parametrize("offsets", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("is_balanced", [False, True])
def test_split_covers_the_row_once_and_counts_positions(offsets, is_balanced):
    split = split_row(offsets, 3, is_balanced)
    places = torch.cat([split.tokens(rank) for rank in range(3)])
    assert sorted(places.tolist()) == list(range(LENGTH))
    positions = torch.cat([split.positions(rank)[0] for rank in range(3)])
    for place, position in zip(places.tolist(), positions.tolist(), strict=True):
        assert position == place - max(offset for offset in offsets if offset <= place)
