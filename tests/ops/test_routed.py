import pytest
import torch

from linnet import ops
from linnet.ops import matmul, routed
from linnet.ops.moe import moe_reference
from linnet.ops.native import products

FP64 = 1e-12
FP32 = 1e-6
BF16 = 8e-3
EXPERTS, DIM, WIDTH = 5, 24, 40


@pytest.fixture
def make_inputs(generator):
    def make(tokens, dtype=torch.float32, weight_dtype=None, dim=DIM, width=WIDTH):
        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return {
            "x": random(tokens, dim).to(dtype),
            "logits": random(tokens, EXPERTS).to(wide),
            "gate_up": random(EXPERTS, 2 * width, dim).to(weight_dtype or dtype) / dim**0.5,
            "down": random(EXPERTS, dim, width).to(weight_dtype or dtype) / width**0.5,
        }

    return make


def op(top_k=2, capacity=None):
    return lambda x, logits, gate_up, down: ops.routed_ffn(
        x, ops.route(logits, top_k, capacity), gate_up, down
    )


def written_out(top_k=2, capacity=None):
    return lambda x, logits, gate_up, down: moe_reference(
        x, ops.route(logits, top_k, capacity), gate_up, down
    )


@pytest.mark.parametrize("tokens", [0, 1, 33, 300])
@pytest.mark.parametrize(
    ("dtype", "top_k", "tolerance"),
    [
        # Not fp32 with top-1: the gradient of its logits is 0, and all that is left is rounding.
        (torch.float64, 1, FP64),
        (torch.float64, 2, FP64),
        (torch.float32, 2, FP32),
        (torch.float32, EXPERTS, FP32),
    ],
)
def test_routed_matches_reference(tokens, top_k, dtype, tolerance, make_inputs, assert_agrees):
    inputs = make_inputs(tokens, dtype)
    assert_agrees(op(top_k), written_out(top_k), inputs, tolerance)
    with torch.no_grad():
        wide = {name: x.double() for name, x in inputs.items()}
        expected = written_out(top_k)(**wide)
        torch.testing.assert_close(
            op(top_k)(**inputs).double(), expected, rtol=10 * tolerance, atol=10 * tolerance
        )


@pytest.mark.parametrize(("dim", "width"), [(1, 1), (64, 128), (33, 65)])
def test_any_widths_match_reference(dim, width, make_inputs, assert_agrees):
    inputs = make_inputs(50, dim=dim, width=width)
    assert_agrees(op(), written_out(), inputs, FP32)
    with torch.no_grad():
        torch.testing.assert_close(op()(**inputs), written_out()(**inputs))


@pytest.mark.parametrize("capacity", [1, 5, 100])
def test_dropping_matches_reference(capacity, make_inputs, assert_agrees):
    assert_agrees(op(2, capacity), written_out(2, capacity), make_inputs(33), FP32)


@pytest.mark.parametrize("native", [False, True], ids=["widened", "native_bf16"])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_bf16_stays_close_to_fp64(native, weight_dtype, make_inputs, assert_agrees, monkeypatch):
    monkeypatch.setattr(matmul, "cpu_has_native_bf16", lambda: native)
    inputs = make_inputs(64, torch.bfloat16, weight_dtype)
    assert_agrees(op(), written_out(), inputs, BF16)
    with torch.no_grad():
        expected = written_out()(**{name: x.double() for name, x in inputs.items()})
        error = (op()(**inputs) - expected).norm() / expected.norm()
        assert error <= BF16


def test_more_tokens_than_one_part_match_reference(make_inputs):
    inputs = make_inputs(9000, dim=8, width=8)
    with torch.no_grad():
        torch.testing.assert_close(op()(**inputs), written_out()(**inputs))


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
def test_tokens_take_one_native_call(needs_grad, make_inputs, monkeypatch):
    calls, kernel = [], products.experts_ffn
    monkeypatch.setattr(products, "experts_ffn", lambda *args: calls.append(1) or kernel(*args))
    inputs = {name: x.requires_grad_(needs_grad) for name, x in make_inputs(50).items()}
    op()(**inputs)
    assert len(calls) == 1


def test_without_kernels_the_result_is_the_same(make_inputs, monkeypatch):
    inputs = make_inputs(50)
    expected = op()(**inputs)
    monkeypatch.setattr(routed, "takes", lambda *tensors: False)
    torch.testing.assert_close(op()(**inputs), expected)


def test_graph_keeps_tokens_and_preactivations(make_inputs):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(200).items()}
    routing = ops.route(inputs["logits"], 2)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        ops.routed_ffn(inputs["x"], routing, inputs["gate_up"], inputs["down"])
    known = {x.untyped_storage().data_ptr() for x in (*inputs.values(), routing.weights)}
    extra = {
        x.untyped_storage().data_ptr(): x.nbytes
        for x in kept
        if x.is_floating_point() and x.untyped_storage().data_ptr() not in known
    }
    assert sum(extra.values()) == 200 * 2 * 2 * WIDTH * 4


def test_a_token_with_nan_touches_no_other(make_inputs):
    inputs = make_inputs(50)
    routing = ops.route(inputs["logits"], 2)
    with torch.no_grad():
        clean = ops.routed_ffn(inputs["x"], routing, inputs["gate_up"], inputs["down"])
        inputs["x"][7] = float("nan")
        dirty = ops.routed_ffn(inputs["x"], routing, inputs["gate_up"], inputs["down"])
    kept = torch.arange(50) != 7
    assert torch.equal(dirty[kept], clean[kept])
    assert dirty[7].isnan().all()


def test_weights_that_do_not_fit_are_named(make_inputs):
    inputs = make_inputs(5)
    routing = ops.route(inputs["logits"], 2)
    with pytest.raises(ValueError, match=r"gate_up \(5, 80, 24\), down \(5, 40, 24\) do not fit"):
        ops.routed_ffn(inputs["x"], routing, inputs["gate_up"], inputs["down"].mT)
