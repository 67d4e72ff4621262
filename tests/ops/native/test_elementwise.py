"""The native norms and activations against the written-out formulas in fp64, at every level."""

import pytest
import torch
import torch.nn.functional as F

from linnet.ops import native
from linnet.ops.native import compiler, elementwise

FP32 = 1e-6
BF16 = 4e-3
LEVELS = [name for name, needed in compiler._REQUIRED.items() if needed <= compiler._cpu_features()]


@pytest.fixture(params=LEVELS, autouse=True)
def level(request, monkeypatch):
    monkeypatch.setenv("LINNET_CPU_LEVEL", request.param)
    native.library.cache_clear()
    yield request.param
    native.library.cache_clear()


@pytest.fixture
def random(generator):
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def error(actual, expected):
    return float((actual.double() - expected).norm() / expected.norm().clamp(min=1e-3))


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dim", [3, 5, 64, 1000])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)], ids=["fp32", "bf16"]
)
def test_norm_and_its_gradients(dtype, tolerance, dim, gated, random):
    x, gate, grad = (random(37, dim).to(dtype) for _ in range(3))
    weight = random(dim).float()
    gate = gate if gated else None
    leaves = [t.double().requires_grad_() for t in (x, weight, gate) if t is not None]
    wide_x, wide_weight = leaves[:2]
    expected = wide_x / torch.sqrt((wide_x * wide_x).mean(-1, keepdim=True) + 1e-5) * wide_weight
    if gated:
        expected = expected * torch.sigmoid(leaves[2])
    expected.backward(grad.double())
    y, inverse = elementwise.norm(x, weight, 1e-5, gate)
    grads = elementwise.norm_backward(grad, x, weight, inverse, gate)
    errors = [error(y, expected.detach())]
    errors += [error(g, leaf.grad) for g, leaf in zip(grads, leaves, strict=False)]
    assert max(errors) <= tolerance, errors


@pytest.mark.parametrize("width", [1, 5, 64, 77])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)], ids=["fp32", "bf16"]
)
def test_swiglu_and_its_gradients(dtype, tolerance, width, random):
    hidden, grad = (4 * random(300, 2 * width)).to(dtype), random(300, width).to(dtype)
    leaf = hidden.double().requires_grad_()
    gate, up = leaf.chunk(2, -1)
    expected = F.silu(gate) * up
    expected.backward(grad.double())
    grad_hidden, activated, dots = elementwise.swiglu_backward(grad, hidden)
    assert error(elementwise.swiglu(hidden, dtype), expected.detach()) <= tolerance
    assert error(activated, expected.detach()) <= tolerance
    assert error(grad_hidden, leaf.grad) <= tolerance
    assert error(dots, (expected.detach() * grad.double()).sum(-1)) <= FP32


def test_exp_is_right_over_the_whole_range():
    # silu(x) / x is a sigmoid: exp of everything from deep underflow to overflow.
    gate = torch.cat((torch.linspace(-120, 120, 9999), torch.tensor([0.0, 1e30, -1e30])))
    hidden = torch.stack((gate, torch.ones_like(gate)), -1)
    actual = elementwise.swiglu(hidden, torch.float32)[:, 0]
    expected = F.silu(gate.double())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-30)


def test_values_that_are_no_numbers_stay_so():
    hidden = torch.tensor([[float("nan"), 1.0], [1.0, float("nan")], [float("inf"), 1.0]])
    values = elementwise.swiglu(hidden, torch.bfloat16)[:, 0].tolist()
    assert values[0] != values[0] and values[1] != values[1] and values[2] == float("inf")


def test_the_gradient_of_the_weight_is_the_same_in_every_run(random):
    x, grad, weight = random(999, 64).float(), random(999, 64).float(), random(64).float()
    _, inverse = elementwise.norm(x, weight, 1e-5)
    runs = [elementwise.norm_backward(grad, x, weight, inverse)[1] for _ in range(3)]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
