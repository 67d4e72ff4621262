import pytest
import torch
from transformers.models.minimax.modeling_minimax import load_balancing_loss_func

from linnet import ops
from linnet.ops import matmul, moe
from linnet.ops.moe import Routing, moe_reference, swiglu_ffn_reference

FP64 = 1e-12
FP32 = 1e-6
BF16 = 8e-3
EXPERTS, DIM, WIDTH = 5, 6, 7


@pytest.fixture
def make_inputs(generator):
    def make(tokens, dtype=torch.float64, weight_dtype=None):
        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return {
            "x": random(tokens, DIM).to(dtype),
            "logits": random(tokens, EXPERTS).to(
                torch.float64 if dtype == torch.float64 else torch.float32
            ),
            "gate_up": random(EXPERTS, 2 * WIDTH, DIM).to(weight_dtype or dtype),
            "down": random(EXPERTS, DIM, WIDTH).to(weight_dtype or dtype),
        }

    return make


def grouped(top_k, capacity=None):
    """The model's way: sort by expert, one product per expert, combine."""

    def run(x, logits, gate_up, down):
        routing = ops.route(logits, top_k, capacity)
        grouping = ops.group_by_expert(routing, EXPERTS)
        rows = ops.gather_rows(x, grouping, top_k)
        y = ops.grouped_ffn(rows, gate_up, down, grouping.offsets)
        return ops.combine_rows(y, grouping, routing.weights)

    return run


def written_out(top_k, capacity=None):
    return lambda x, logits, gate_up, down: moe_reference(
        x, ops.route(logits, top_k, capacity), gate_up, down
    )


def token_by_token(x, routing, gate_up, down):
    """The layer once more, as a loop over tokens and choices, for the reference itself."""
    rows = []
    for t in range(len(x)):
        y = torch.zeros_like(x[t])
        for choice, expert in enumerate(routing.experts[t]):
            y = y + routing.weights[t, choice] * swiglu_ffn_reference(
                x[t], gate_up[expert], down[expert]
            )
        rows.append(y)
    return torch.stack(rows)


def test_reference_matches_a_loop_over_tokens(make_inputs):
    inputs = make_inputs(9)
    routing = ops.route(inputs.pop("logits"), 2, capacity=3)
    torch.testing.assert_close(
        moe_reference(routing=routing, **inputs), token_by_token(routing=routing, **inputs)
    )


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("tokens", [0, 1, 33])
def test_dropless_matches_reference(tokens, top_k, make_inputs, assert_agrees):
    assert_agrees(grouped(top_k), written_out(top_k), make_inputs(tokens), FP64)


@pytest.mark.parametrize("capacity", [0, 1, 5, 100])
@pytest.mark.parametrize("top_k", [1, 2])
def test_dropping_matches_reference(capacity, top_k, make_inputs, assert_agrees):
    assert_agrees(grouped(top_k, capacity), written_out(top_k, capacity), make_inputs(33), FP64)


@pytest.mark.parametrize("native", [False, True], ids=["widened", "native"])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, FP32),
        (torch.bfloat16, torch.bfloat16, BF16),
        (torch.bfloat16, torch.float32, BF16),
    ],
    ids=["fp32", "bf16", "bf16_with_fp32_weights"],
)
def test_narrow_inputs_stay_close_to_fp64(
    dtype, weight_dtype, tolerance, native, make_inputs, assert_agrees, monkeypatch
):
    monkeypatch.setattr(matmul, "cpu_has_native_bf16", lambda: native)
    inputs = make_inputs(64, dtype, weight_dtype)
    errors = assert_agrees(grouped(2), written_out(2), inputs, tolerance)
    print(dtype, native, {name: f"{error:.1e}" for name, error in errors.items()})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_routing_is_a_softmax_renormalized_over_the_best(dtype, generator):
    logits = torch.randn(20, EXPERTS, generator=generator).to(dtype)
    routing = ops.route(logits, 2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    probabilities = logits.to(wide).softmax(-1)
    assert routing.weights.dtype == routing.probabilities.dtype == wide
    assert torch.equal(routing.probabilities, probabilities)
    assert torch.equal(routing.experts, probabilities.sort(-1, descending=True)[1][:, :2])
    # The same as a softmax over the chosen logits alone.
    chosen = logits.to(wide).gather(1, routing.experts).softmax(-1)
    torch.testing.assert_close(routing.weights, chosen)


def test_ties_choose_distinct_experts_with_equal_weights():
    routing = ops.route(torch.zeros(7, EXPERTS), 3)
    assert all(len(set(experts)) == 3 for experts in routing.experts.tolist())
    torch.testing.assert_close(routing.weights, torch.full((7, 3), 1 / 3))


def test_extreme_logits_give_finite_weights():
    routing = ops.route(torch.tensor([[1e4, -1e4, -float("inf"), 0.0, 0.0]]), 2)
    assert routing.weights.tolist() == [[1.0, 0.0]]


def test_first_choices_are_served_first_and_earlier_tokens_before_later():
    # Expert 0 is the first choice of tokens 1 and 2, and the second choice of token 0.
    logits = torch.tensor([[1.0, 2.0, 0.0], [2.0, 0.0, 1.0], [2.0, 1.0, 0.0]])
    kept = {capacity: ops.route(logits, 2, capacity).kept.tolist() for capacity in (1, 2, 3)}
    # Slots in order of service: t0->1, t1->0, t2->0, t0->0, t1->2, t2->1.
    assert kept[1] == [[True, False], [True, True], [False, False]]
    assert kept[2] == [[True, False], [True, True], [True, True]]
    assert kept[3] == [[True, True], [True, True], [True, True]]


def test_dropped_slots_have_weight_zero_and_are_in_no_row(make_inputs):
    inputs = make_inputs(33)
    routing = ops.route(inputs["logits"], 2, capacity=4)
    free = ops.route(inputs["logits"], 2)
    dropped = int((~routing.kept).sum())
    demand = torch.bincount(routing.experts.flatten(), minlength=EXPERTS)
    assert dropped == int((demand - 4).clamp(min=0).sum()) > 0
    assert torch.equal(routing.weights, free.weights * routing.kept)
    grouping = ops.group_by_expert(routing, EXPERTS)
    assert len(grouping.slots) == 66 - dropped
    assert grouping.offsets.diff().tolist() == demand.clamp(max=4).tolist()


def test_a_token_whose_slots_are_all_dropped_gets_nothing(make_inputs):
    inputs = make_inputs(4)
    inputs["logits"] = inputs["logits"][:1].expand(4, -1)
    y = grouped(2, capacity=1)(**inputs)
    assert torch.equal(y[1:], torch.zeros(3, DIM, dtype=torch.float64))
    assert (y[0] != 0).all()


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "factor", "capacity"),
    [(64, 8, 2, 1.0, 16), (65, 8, 2, 1.0, 17), (100, 10, 1, 1.1, 11), (1, 32, 1, 1.0, 1)],
)
def test_capacity_is_rounded_up(tokens, experts, top_k, factor, capacity):
    assert ops.expert_capacity(tokens, experts, top_k, factor) == capacity


def test_idle_experts_are_not_read_and_get_no_gradient(make_inputs):
    inputs = make_inputs(12)
    idle = 3
    inputs["logits"][:, idle] = -100
    expected = grouped(2)(**inputs)
    inputs["gate_up"][idle] = float("nan")
    inputs["down"][idle] = float("nan")
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    y = grouped(2)(**leaves)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    for name in ("gate_up", "down"):
        assert torch.equal(leaves[name].grad[idle], torch.zeros_like(leaves[name][idle]))
        assert (leaves[name].grad[:idle] != 0).any()
    for name, leaf in leaves.items():
        assert leaf.grad.isfinite().all(), name


def test_rows_are_sorted_by_expert_and_then_by_token():
    experts = torch.tensor([[2, 0], [0, 1], [2, 1]])
    routing = Routing(experts, torch.ones(3, 2), torch.ones(3, 4) / 4, None)
    grouping = ops.group_by_expert(routing, 4)
    assert grouping.slots.tolist() == [1, 2, 3, 5, 0, 4]
    assert grouping.offsets.tolist() == [0, 2, 4, 6, 6]
    assert grouping.slots[grouping.rows].tolist() == list(range(6))


def test_non_contiguous_rows_match_reference(make_inputs, assert_agrees):
    inputs = make_inputs(DIM)
    offsets = torch.tensor([0, 1, 1, 4, 4, 6])

    def by_expert(x, gate_up, down):
        bounds = offsets.tolist()
        parts = [
            swiglu_ffn_reference(x.T[bounds[e] : bounds[e + 1]], gate_up[e], down[e])
            for e in range(EXPERTS)
        ]
        return torch.cat(parts)

    del inputs["logits"]
    assert_agrees(
        lambda x, gate_up, down: ops.grouped_ffn(x.T, gate_up, down, offsets),
        by_expert,
        inputs,
        FP64,
    )


def test_grouped_ffn_passes_opcheck(make_inputs):
    inputs = make_inputs(6, torch.float32)
    x, gate_up, down = (inputs[name].requires_grad_() for name in ("x", "gate_up", "down"))
    offsets = torch.tensor([0, 1, 1, 4, 4, 6])
    for rows in (x, inputs["x"].detach().T.contiguous().T.requires_grad_()):
        torch.library.opcheck(moe._grouped_ffn, (rows, gate_up, down, offsets))
    x, gate_up, down = (y.detach() for y in (x, gate_up, down))
    hidden = torch.randn(6, 2 * WIDTH)
    torch.library.opcheck(moe._grouped_ffn_backward, (x, x, hidden, gate_up, down, offsets))


def test_compiled_grouped_ffn_equals_eager(make_inputs, assert_agrees):
    inputs = make_inputs(6)
    del inputs["logits"]
    offsets = torch.tensor([0, 1, 1, 4, 4, 6])
    compiled = torch.compile(ops.grouped_ffn, fullgraph=True, backend="aot_eager")
    assert_agrees(
        lambda **x: compiled(**x, offsets=offsets),
        lambda x, gate_up, down: torch.cat(
            [
                swiglu_ffn_reference(x[a:b], gate_up[e], down[e])
                for e, a, b in ((0, 0, 1), (2, 1, 4), (4, 4, 6))
            ]
        ),
        inputs,
        FP64,
    )


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 1, 2, 3, 6], "6 numbers from 0 to R = 6"),
        ([0, 1, 2, 3, 4, 5], "R = 6; got"),
        ([1, 1, 2, 3, 4, 6], "from 0"),
        ([0, 3, 2, 3, 4, 6], "must not decrease"),
    ],
)
def test_offsets_that_do_not_cover_the_rows_are_refused(offsets, message, make_inputs):
    inputs = make_inputs(6)
    del inputs["logits"]
    with pytest.raises(ValueError, match=message):
        ops.grouped_ffn(**inputs, offsets=torch.tensor(offsets))


def test_weights_that_do_not_fit_are_refused(make_inputs):
    inputs = make_inputs(6)
    offsets = torch.tensor([0, 1, 1, 4, 4, 6])
    with pytest.raises(ValueError, match=r"down \(5, 7, 6\)"):
        ops.grouped_ffn(inputs["x"], inputs["gate_up"], inputs["down"].mT, offsets)


@pytest.mark.parametrize("top_k", [0, EXPERTS + 1])
def test_more_choices_than_experts_are_refused(top_k):
    with pytest.raises(ValueError, match=f"cannot choose {top_k} experts"):
        ops.route(torch.zeros(3, EXPERTS), top_k)


@pytest.mark.parametrize("top_k", [1, 2])
def test_even_load_gives_the_documented_losses(top_k):
    experts = torch.arange(8 * top_k).view(8, top_k) % 4
    routing = Routing(experts, torch.ones(8, top_k), torch.full((8, 4), 0.25), None)
    load, probability = ops.expert_means(routing)
    paper = ops.load_balancing_loss(load, probability)
    torch.testing.assert_close(paper, torch.tensor(top_k / 16))
    other = ops.load_balancing_loss(load, probability, "transformers")
    torch.testing.assert_close(other, torch.tensor(float(top_k)))


@pytest.mark.parametrize("padded", [False, True], ids=["all_tokens", "with_padding"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_balancing_loss_equals_that_of_transformers(top_k, padded, generator):
    logits = torch.randn(2, 15, 8, generator=generator).requires_grad_()
    mask = torch.ones(2, 15, dtype=torch.int64)
    mask[1, :6] = 0
    expected = load_balancing_loss_func((logits.view(30, 8),), 8, top_k, mask if padded else None)
    (expected_grad,) = torch.autograd.grad(expected, logits)
    routing = ops.route(logits.view(30, 8), top_k, capacity=1)  # counted before dropping
    means = ops.expert_means(routing, mask.view(30) == 1 if padded else None)
    loss = ops.load_balancing_loss(*means, "transformers")
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)
    paper = ops.load_balancing_loss(*means, "paper")
    torch.testing.assert_close(paper * 64, loss)


def test_balancing_loss_of_no_tokens_is_zero():
    means = ops.expert_means(ops.route(torch.zeros(0, 4), 2))
    assert ops.load_balancing_loss(*means).item() == 0


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="'papers' is none of"):
        ops.load_balancing_loss(torch.ones(4), torch.ones(4), "papers")  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_few_tokens_are_computed_as_many_are(num_tokens, generator):
    x = torch.randn(num_tokens, 8, generator=generator, dtype=torch.float64)
    gate_up = torch.randn(4, 12, 8, generator=generator, dtype=torch.float64)
    down = torch.randn(4, 8, 6, generator=generator, dtype=torch.float64)
    routing = ops.route(torch.randn(num_tokens, 4, generator=generator, dtype=torch.float64), 2)
    expected = moe_reference(x, routing, gate_up, down)
    torch.testing.assert_close(ops.few_tokens_ffn(x, routing, gate_up, down), expected)
