"""Experts over ranks: exact in fp64, capacity of all ranks together, rows counted."""

import pytest
import torch
import torch.distributed as dist

from linnet.model.moe import dispatch_locally
from linnet.ops import admit, route, routed_ffn
from linnet.ops.moe import Routing
from linnet.parallel.expert import ExpertsAcrossRanks, GlobalRouter
from linnet.parallel.layout import Layout
from linnet.parallel.mesh import Mesh
from linnet.parallel.traffic import Traffic

NUM_EXPERTS, TOP_K, HIDDEN, WIDTH = 4, 2, 8, 12
LENGTHS = [13, 0, 7, 12]
"""Tokens of each rank; one has none and must still take part."""


class OwnExperts:
    def __init__(self, gate_up, down):
        self.gate_up, self.down = gate_up, down


def inputs():
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "x": (sum(LENGTHS), HIDDEN),
        "logits": (sum(LENGTHS), NUM_EXPERTS),
        "gate_up": (NUM_EXPERTS, 2, WIDTH, HIDDEN),
        "down": (NUM_EXPERTS, HIDDEN, WIDTH),
    }
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }


def whole(capacity=None):
    t = inputs()
    routing = route(t["logits"], TOP_K, capacity)
    y = routed_ffn(t["x"], routing, t["gate_up"].flatten(1, 2), t["down"])
    y.square().sum().backward()
    return y.detach(), {name: value.grad for name, value in t.items()}


def on_rank(group, sizes, num_groups):
    layout = Layout.for_world(dist.get_world_size(group), **sizes)
    mesh = Mesh(layout)
    t = inputs()
    rank = dist.get_rank(group)
    own = slice(sum(LENGTHS[:rank]), sum(LENGTHS[: rank + 1]))
    experts, width = NUM_EXPERTS // layout.ep, WIDTH // layout.etp
    mine = slice(mesh.rank("ep") * experts, (mesh.rank("ep") + 1) * experts)
    part = slice(mesh.rank("etp") * width, (mesh.rank("etp") + 1) * width)
    weights = OwnExperts(t["gate_up"][mine, :, part].flatten(1, 2), t["down"][mine][:, :, part])
    dispatch = ExpertsAcrossRanks(mesh, NUM_EXPERTS, num_groups, dispatch_locally)
    with Traffic() as traffic:
        y = dispatch(t["x"][own], route(t["logits"][own], TOP_K), weights)
    forward = dict(traffic.received)
    y.square().sum().backward()
    for name in ("gate_up", "down", "x", "logits"):
        if t[name].grad is None:  # a rank without tokens
            t[name].grad = torch.zeros_like(t[name])
        dist.all_reduce(t[name].grad, group=group)
    return own, y.detach(), {n: v.grad for n, v in t.items()}, dispatch.received, forward


@pytest.mark.parametrize("sizes", [{"ep": 4}, {"ep": 2}, {"etp": 4}, {"ep": 2, "etp": 2}])
@pytest.mark.parametrize("num_groups", [1, 2, 5])
def test_output_and_gradients_are_those_of_one_process(ranks, sizes, num_groups):
    expected, gradients = whole()
    for own, y, own_gradients, _, _ in ranks(on_rank, 4, sizes, num_groups):
        torch.testing.assert_close(y, expected[own], rtol=1e-12, atol=1e-12)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                own_gradients[name], gradient, rtol=1e-12, atol=1e-11, msg=name
            )


@pytest.mark.parametrize("num_groups", [1, 3])
def test_rows_and_bytes_are_those_of_the_routing(ranks, num_groups):
    """Each slot whose expert is elsewhere travels there and back once: 2 S D bytes."""
    chosen = route(inputs()["logits"], TOP_K).experts
    results = ranks(on_rank, 4, {"ep": 4}, num_groups)
    for rank, (own, _, _, received, bytes_received) in enumerate(results):
        assert received == int((chosen == rank).sum())
        there = int((chosen == rank).sum()) - int((chosen[own] == rank).sum())
        back = chosen[own].numel() - int((chosen[own] == rank).sum())
        assert bytes_received["all_to_all"] == (there + back) * HIDDEN * 8


def admitted(group, first, factor):
    t = inputs()
    rank = dist.get_rank(group)
    own = slice(sum(LENGTHS[:rank]), sum(LENGTHS[: rank + 1]))
    routing = GlobalRouter(group, first)(route(t["logits"][own].detach(), TOP_K), factor)
    return routing.kept


@pytest.mark.parametrize("first", [0, 1, 3])
@pytest.mark.parametrize("capacity", [5, 10, 14])
def test_global_capacity_is_that_of_one_process_whose_tokens_begin_with_the_first_rank(
    ranks, first, capacity
):
    logits = inputs()["logits"].detach()
    parts = list(logits.split(LENGTHS))
    turned = torch.cat(parts[first:] + parts[:first])
    kept = admit(route(turned, TOP_K), capacity).kept
    lengths = LENGTHS[first:] + LENGTHS[:first]
    expected = list(kept.split(lengths))
    expected = expected[len(LENGTHS) - first :] + expected[: len(LENGTHS) - first]
    factor = capacity * NUM_EXPERTS / (TOP_K * len(logits))
    for own, wanted in zip(ranks(admitted, 4, first, factor), expected, strict=True):
        assert torch.equal(own, wanted)


def test_capacity_is_never_exceeded_and_never_wasted():
    routing = route(torch.randn(40, NUM_EXPERTS, generator=torch.Generator().manual_seed(2)), TOP_K)
    limited: Routing = admit(routing, 12)
    for expert in range(NUM_EXPERTS):
        asked = int((routing.experts == expert).sum())
        assert int(((limited.experts == expert) & limited.kept).sum()) == min(asked, 12)
