"""The planner's volumes are the bytes that real processes receive."""

import dataclasses
from array import array

import pytest
import torch
import torch.distributed as dist

from linnet.model.attention import Context, LightningAttention, SoftmaxAttention
from linnet.model.config import LIGHTNING
from linnet.model.moe import Experts, dispatch_locally
from linnet.model.paged import PagedMemory, Row
from linnet.model.presets import preset
from linnet.ops import cross_entropy, rotary_tables, softmax_attention
from linnet.ops.moe import Routing
from linnet.parallel.apply import ParallelModel
from linnet.parallel.exchange import StateExchange
from linnet.parallel.expert import ExpertsAcrossRanks
from linnet.parallel.filling import FromSeed
from linnet.parallel.layout import Layout
from linnet.parallel.mesh import Mesh
from linnet.parallel.plan.shape import stages_of
from linnet.parallel.plan.training_volumes import replica_volumes, sharding_volumes
from linnet.parallel.plan.volumes import (
    answers_bytes,
    attention_reduce_bytes,
    collect_bytes,
    counts_bytes,
    dispatch_bytes,
    key_exchange_bytes,
    lasp_bytes,
    norm_reduce_bytes,
    split_chunk_bytes,
    widen_bytes,
)
from linnet.parallel.ring_attention import SoftmaxAcrossRanks
from linnet.parallel.sequence import LightningAcrossRanks
from linnet.parallel.split import split_row
from linnet.parallel.spread_pages import PageShare, SplitRow, SpreadRows
from linnet.parallel.tensor import share_heads
from linnet.parallel.traffic import Traffic

FP32 = 4
LENGTH = 96
CONFIG = dataclasses.replace(
    preset("nano"),
    hidden_size=16,
    intermediate_size=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    rotary_dim=4,
)


def received(forward, *inputs):
    """Return what a rank receives forward and backward, by kind."""
    with Traffic() as there:
        y = forward(*inputs)
    with Traffic() as back:
        y.sum().backward()
    return dict(there.received), dict(back.received)


def states(group, is_balanced):
    own = split_row([0, LENGTH], dist.get_world_size(group), is_balanced).lengths(
        dist.get_rank(group)
    )
    shape = (1, sum(own), CONFIG.num_attention_heads, CONFIG.head_dim)
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    attend = LightningAcrossRanks(StateExchange(group, "all_gather"), is_balanced)
    slopes = torch.ones(CONFIG.num_attention_heads)
    return received(
        lambda: attend(q, k, v, slopes, cu_seqlens=torch.tensor([0, LENGTH]), return_state=False)[0]
    )


def keys(group, mode):
    tokens = LENGTH // dist.get_world_size(group)
    heads = (CONFIG.num_attention_heads, CONFIG.num_key_value_heads, CONFIG.num_key_value_heads)
    q, k, v = (torch.randn(1, tokens, n, CONFIG.head_dim, requires_grad=True) for n in heads)
    attend = SoftmaxAcrossRanks(group, mode)
    there, back = received(lambda: attend(q, k, v, cu_seqlens=torch.tensor([0, LENGTH])))
    return sum(there.values()), sum(back.values())


def pages(group):
    """Return what one softmax layer receives for a chunk after others, and for one token."""
    share = PageShare(group)
    config = dataclasses.replace(CONFIG, num_hidden_layers=2, attn_type_list=(1, 0))
    memory = PagedMemory(config, 1, 4, torch.float32, page_len=share.page_len)
    row = Row(0, array("q", range(4)), length=64)
    counted = []
    for tokens in (LENGTH, 1):
        if tokens == 1:
            rows, length = SpreadRows(share, memory, [row], [1], memory.device, [1]), 1
        else:
            rows = SplitRow(share, memory, row, tokens, num_wanted=1)
            length = LENGTH // share.size
        counts = (config.num_attention_heads, *[config.num_key_value_heads] * 2)
        q, k, v = (torch.randn(1, length, n, config.head_dim) for n in counts)
        with Traffic() as traffic:
            rows.attend(0, q, k, v, softmax_attention)
        counted.append(traffic.total)
    return tuple(counted)


def heads(group, kind):
    part = dataclasses.replace(
        CONFIG,
        num_attention_heads=CONFIG.num_attention_heads // dist.get_world_size(group),
        num_key_value_heads=CONFIG.num_key_value_heads // dist.get_world_size(group),
    )
    attention = (LightningAttention if kind == LIGHTNING else SoftmaxAttention)(part, 0)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter)
    if kind == LIGHTNING:  # `share_heads` takes the whole model's slopes and number of heads
        attention._slopes = torch.ones(CONFIG.num_attention_heads)
        attention.decay = torch.ones(CONFIG.num_attention_heads)
        attention.num_heads = CONFIG.num_attention_heads
    share_heads(attention, group)
    x = torch.randn(1, LENGTH, CONFIG.hidden_size, requires_grad=True)
    rotary = rotary_tables(torch.arange(LENGTH)[None], CONFIG.rotary_dim, 1e4)
    return received(attention, x, Context(rotary, None, None))


def experts(group, axes, num_groups):
    """Route evenly: every expert gets as many tokens of each rank as any other."""
    layout = Layout.for_world(dist.get_world_size(group), **axes)
    mesh = Mesh(layout, dist.get_process_group_ranks(group))
    num = CONFIG.num_local_experts
    local = Experts(
        dataclasses.replace(
            CONFIG,
            num_local_experts=num // layout.ep,
            intermediate_size=CONFIG.intermediate_size // layout.etp,
            num_experts_per_tok=1,
        )
    )
    torch.nn.init.normal_(local.gate_up)
    torch.nn.init.normal_(local.down)
    chosen = torch.stack((torch.arange(LENGTH) % num, (torch.arange(LENGTH) + 1) % num), 1)
    weights = torch.full(chosen.shape, 0.5, requires_grad=True)
    routing = Routing(chosen, weights, torch.full((LENGTH, num), 1 / num), None)
    x = torch.randn(LENGTH, CONFIG.hidden_size, requires_grad=True)
    dispatch = ExpertsAcrossRanks(mesh, num, num_groups, dispatch_locally)
    return received(dispatch, x, routing, local)


def shards(group, axes):
    layout = Layout.for_world(dist.get_world_size(group), **axes)
    mesh = Mesh(layout, dist.get_process_group_ranks(group))
    parallel = ParallelModel(preset("nano"), mesh, FromSeed(0))
    model = parallel.model.train()
    tokens = torch.arange(32)[None]

    def loss():
        hidden, _ = model.hidden_states(tokens)
        return cross_entropy(hidden[0], model.lm_head.weight, tokens[0])

    return received(loss)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("is_balanced", [False, True], ids=["in order", "balanced"])
def test_states_of_lasp_are_as_many_bytes_as_planned(ranks, size, is_balanced):
    planned = {"all_gather": lasp_bytes(CONFIG, Layout(cp=size), is_balanced)}
    assert ranks(states, size, is_balanced) == [(planned, planned)] * size


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("mode", ["ring", "gather"])
def test_keys_of_a_long_document_are_as_many_bytes_as_planned(ranks, size, mode):
    planned = key_exchange_bytes(CONFIG, Layout(cp=size), LENGTH // size, FP32)
    assert ranks(keys, size, mode) == [(planned, 2 * planned)] * size


@pytest.mark.parametrize("size", [2, 4])
def test_chunks_and_tokens_of_inference_are_as_many_bytes_as_planned(ranks, size):
    layout = Layout(cp=size)
    chunk = sum(split_chunk_bytes(CONFIG, layout, LENGTH // size, FP32))
    expected = chunk, answers_bytes(CONFIG, layout, 1)
    assert ranks(pages, size) == [expected] * size


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("kind", [0, 1], ids=["lightning", "softmax"])
def test_sums_over_heads_are_as_many_bytes_as_planned(ranks, size, kind):
    layout = Layout(tp=size)
    planned = attention_reduce_bytes(CONFIG, layout, LENGTH, FP32)
    planned += norm_reduce_bytes(layout, LENGTH) * (kind == LIGHTNING)
    expected = {"all_reduce": planned}
    assert ranks(heads, size, kind) == [(expected, expected)] * size


@pytest.mark.parametrize(
    ("size", "axes"),
    [
        (4, {"ep": 4}),
        (4, {"ep": 2}),
        (2, {"etp": 2}),
        (4, {"etp": 4}),
        (4, {"ep": 2, "etp": 2}),
        (4, {"tp": 2, "ep": 2, "etp": 2}),
        (4, {"tp": 4, "ep": 4}),
    ],
    ids=lambda x: " ".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else str(x),
)
@pytest.mark.parametrize("num_groups", [1, 2])
def test_tokens_to_experts_are_as_many_bytes_as_planned(ranks, size, axes, num_groups):
    layout = Layout.for_world(size, **axes)
    moved = dispatch_bytes(CONFIG, layout, LENGTH, FP32)
    widened = widen_bytes(CONFIG, layout, LENGTH, FP32)
    collected = collect_bytes(CONFIG, layout, LENGTH, FP32)
    counts = counts_bytes(CONFIG, layout, num_groups)
    # tp ranks also gather the gradients of the two routing weights of each token.
    weights = (layout.tp - 1) / layout.tp * LENGTH * 2 * FP32
    # ETP gathers and reduces: one of each, forward and backward.
    there = {"all_to_all": moved, "reduce_scatter": widened / 2}
    there["all_gather"] = widened / 2 + collected + counts
    back = there | {"all_gather": widened / 2 + collected + weights}
    for seen, planned in zip(ranks(experts, size, axes, num_groups)[0], (there, back), strict=True):
        assert {k: v for k, v in seen.items() if v} == {k: v for k, v in planned.items() if v}


@pytest.mark.parametrize(
    ("size", "axes"), [(2, {}), (4, {}), (4, {"dp_replicate": 2})], ids=["2", "4", "2 x 2"]
)
def test_shards_are_as_many_bytes_as_planned(ranks, size, axes):
    config, layout = preset("nano"), Layout.for_world(size, **axes)
    (stage,) = stages_of(config, 1, 32)
    planned = sum(volume.num_bytes for volume in sharding_volumes(stage, layout, FP32))
    for there, back in ranks(shards, size, axes):
        kinds = ("all_gather", "reduce_scatter")
        seen = sum(there.get(kind, 0) + back.get(kind, 0) for kind in kinds)
        assert seen == pytest.approx(planned, rel=1e-3)
    replicas = sum(volume.num_bytes for volume in replica_volumes(stage, layout))
    assert back.get("all_reduce", 0) == pytest.approx(replicas, rel=1e-3)
