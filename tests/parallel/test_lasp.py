"""The original LASP, which benchmarks compare with, against one process."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from linnet.ops.lightning_attention.reference import reference
from linnet.parallel.split import split_row

LASP = Path(__file__).parents[2] / "benchmarks" / "lasp.py"
HEADS, KEY, VALUE = 3, 5, 4


def lasp_of(group):
    spec = importlib.util.spec_from_file_location("lasp", LASP)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Lasp(group)


def inputs(length, dtype):
    generator = torch.Generator().manual_seed(1)
    tensors = [
        torch.randn(1, length, HEADS, size, generator=generator, dtype=torch.float64).to(dtype)
        for size in (KEY, KEY, VALUE, VALUE)
    ]
    return *tensors, torch.tensor([0.0, 0.03, 1.5])


def whole(length, dtype):
    q, k, v, upstream, decay = inputs(length, dtype)
    q, k, v = leaves = [x.requires_grad_() for x in (q, k, v)]
    silu = torch.nn.functional.silu
    o, _ = reference(silu(q), silu(k), silu(v), decay)
    o.backward(upstream)
    return [o.detach(), *(x.grad for x in leaves)]


def on_rank(group, length, dtype):
    own = split_row([0, length], dist.get_world_size(group)).tokens(dist.get_rank(group))
    q, k, v, upstream, decay = inputs(length, dtype)
    q, k, v = leaves = [x[:, own].clone().requires_grad_() for x in (q, k, v)]
    offsets = torch.tensor([0, length])
    o, _ = lasp_of(group)(q, k, v, decay, cu_seqlens=offsets, return_state=False, activation="silu")
    o.backward(upstream[:, own])
    return own, [o.detach(), *(x.grad for x in leaves)]


def refusal(group, offsets, return_state):
    q, k, v, _, decay = inputs(8, torch.float32)
    with pytest.raises(ValueError) as error:
        lasp_of(group)(q, k, v, decay, cu_seqlens=torch.tensor(offsets), return_state=return_state)
    return str(error.value)


@pytest.mark.parametrize("length", [4, 63, 130])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_are_those_of_the_whole(ranks, assert_equal_parts, size, length):
    results = ranks(on_rank, size, length, torch.float64)
    assert_equal_parts(results, whole(length, torch.float64), 1e-12)


def test_fp32_stays_within_its_rounding(ranks, assert_equal_parts):
    expected = whole(1000, torch.float32)
    scale = max(float(x.abs().max()) for x in expected)
    assert_equal_parts(ranks(on_rank, 4, 1000, torch.float32), expected, 1e-5 * scale)


@pytest.mark.parametrize(
    ("offsets", "return_state", "message"),
    [([0, 3, 8], False, "one document"), ([0, 8], True, "states"), ([0, 9], False, "got")],
    ids=["two documents", "a state", "another length"],
)
def test_what_it_does_not_take_is_refused(ranks, offsets, return_state, message):
    assert message in ranks(refusal, 1, offsets, return_state)[0]
