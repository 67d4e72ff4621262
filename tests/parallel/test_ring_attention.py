"""Softmax attention across ranks against one process: outputs and every gradient."""

import pytest
import torch
import torch.distributed as dist

from linnet.ops.softmax_attention import softmax_attention_reference
from linnet.parallel.ring_attention import SoftmaxAcrossRanks
from linnet.parallel.split import split_row

ROWS = {
    "one document over all ranks": [0, 48],
    "border on every cut": [0, 12, 24, 36, 48],
    "borders beside the cuts": [0, 11, 25, 37, 48],
    "many within a rank": [0, 3, 5, 6, 10, 48],
    "tiny ones around a cut": [0, 30, 31, 32, 48],
    "empty ones": [0, 0, 10, 10, 24, 24, 48, 48],
    "uneven shares": [0, 20, 45],
}


def inputs(length, groups, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shapes = ((4, 5), (groups, 5), (groups, 5), (4, 5))
    return [
        torch.randn(1, length, *shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in shapes
    ]


def whole(offsets, groups):
    q, k, v, upstream = inputs(offsets[-1], groups)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = softmax_attention_reference(*leaves, cu_seqlens=torch.tensor(offsets))
    o.backward(upstream)
    return [o.detach(), *(x.grad for x in leaves)]


def on_rank(group, offsets, mode, is_balanced, groups, dtype=torch.float64):
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    own = split_row(offsets, size, is_balanced).tokens(rank)
    q, k, v, upstream = inputs(offsets[-1], groups, dtype)
    leaves = [x[:, own].clone().requires_grad_() for x in (q, k, v)]
    attend = SoftmaxAcrossRanks(group, mode, is_balanced)
    o = attend(*leaves, cu_seqlens=torch.tensor(offsets))
    o.backward(upstream[:, own])
    return own, [o.detach(), *(x.grad for x in leaves)]


@pytest.mark.parametrize("offsets", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("is_balanced", [False, True], ids=["contiguous", "balanced"])
@pytest.mark.parametrize("mode", ["gather", "ring"])
def test_parts_are_those_of_the_whole(ranks, assert_equal_parts, offsets, size, is_balanced, mode):
    results = ranks(on_rank, size, offsets, mode, is_balanced, 2)
    assert_equal_parts(results, whole(offsets, 2), 1e-12)


@pytest.mark.parametrize("groups", [1, 4])
def test_shared_and_own_keys(ranks, assert_equal_parts, groups):
    offsets = [0, 7, 40]
    results = ranks(on_rank, 4, offsets, "ring", True, groups)
    assert_equal_parts(results, whole(offsets, groups), 1e-12)


def test_fp32_stays_within_its_rounding(ranks, assert_equal_parts):
    offsets = [0, 100, 700, 1000]
    results = ranks(on_rank, 4, offsets, "ring", True, 2, torch.float32)
    expected = [x.float() for x in whole(offsets, 2)]
    assert_equal_parts(results, expected, 1e-5)
