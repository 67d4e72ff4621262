"""What crosses ranks, in bytes: LASP+ whatever the length, keys as far as documents go."""

import pytest
import torch
import torch.distributed as dist

from linnet.parallel.exchange import StateExchange
from linnet.parallel.ring_attention import SoftmaxAcrossRanks
from linnet.parallel.sequence import LightningAcrossRanks
from linnet.parallel.split import split_row
from linnet.parallel.traffic import Traffic

HEADS, DIM = 2, 8
STATE = HEADS * DIM * DIM * 4


def row(group, offsets, is_balanced=False):
    own = len(
        split_row(offsets, dist.get_world_size(group), is_balanced).tokens(dist.get_rank(group))
    )
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, own, HEADS, DIM, generator=generator).requires_grad_() for _ in range(3)]


def lightning_traffic(group, offsets, mode, is_balanced):
    attend = LightningAcrossRanks(StateExchange(group, mode), is_balanced)
    q, k, v = row(group, offsets, is_balanced)
    with Traffic() as forward:
        o, _ = attend(
            q, k, v, torch.ones(HEADS), cu_seqlens=torch.tensor(offsets), return_state=False
        )
    with Traffic() as backward:
        o.sum().backward()
    return dict(forward.received), dict(backward.received)


def softmax_traffic(group, offsets, mode):
    q, k, v = row(group, offsets)
    with Traffic() as forward:
        o = SoftmaxAcrossRanks(group, mode)(q, k, v, cu_seqlens=torch.tensor(offsets))
    with Traffic() as backward:
        o.sum().backward()
    return forward.total, backward.total


@pytest.mark.parametrize("length", [48, 480, 1920])
@pytest.mark.parametrize("size", [2, 4])
def test_states_are_all_that_is_gathered_whatever_the_length(ranks, length, size):
    expected = {"all_gather": (size - 1) * STATE}
    answers = ranks(lightning_traffic, size, [0, length // 3, length], "all_gather", False)
    assert answers == [(expected, expected)] * size
    twice = {"all_gather": 2 * (size - 1) * STATE}
    answers = ranks(lightning_traffic, size, [0, length // 3, length], "all_gather", True)
    assert answers == [(twice, twice)] * size


def test_a_ring_brings_each_rank_one_state(ranks):
    answers = ranks(lightning_traffic, 4, [0, 96], "ring", False)
    forward, backward = zip(*answers, strict=True)
    state = {"receive": STATE}
    assert list(forward) == [{}, state, state, state]
    assert [x.get("receive", 0) for x in backward] == [STATE, STATE, STATE, 0]


def test_keys_travel_as_far_as_documents_reach(ranks):
    keys = 2 * 24 * HEADS * DIM * 4  # keys and values of a rank's 24 tokens
    assert ranks(softmax_traffic, 4, [0, 24, 48, 72, 96], "ring") == [(0, 0)] * 4
    assert ranks(softmax_traffic, 4, [0, 24, 48, 72, 96], "gather") == [(0, 0)] * 4
    # From one rank to the next: the keys, and their gradients home.
    assert ranks(softmax_traffic, 4, [0, 30, 96], "ring")[0] == (2 * keys, 4 * keys)
    assert ranks(softmax_traffic, 4, [0, 30, 60, 84, 96], "ring") == [(keys, 2 * keys)] * 4
    assert ranks(softmax_traffic, 4, [0, 96], "gather") == [(3 * keys, 6 * keys)] * 4
