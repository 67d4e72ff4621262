import pytest
import torch

from linnet.ops import norm, rms_norm

FP64 = 1e-12
FP32 = 1e-6
BF16 = 4e-3


def written_out(x, weight, eps):
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight


@pytest.fixture
def make_inputs(generator):
    def make(shape, dtype=torch.float64, weight_dtype=None):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
        return {"x": x.to(dtype), "weight": weight.to(weight_dtype or dtype)}

    return make


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 64), (2, 7, 3, 65)], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm_matches_the_formula(shape, eps, make_inputs, assert_agrees):
    assert_agrees(
        lambda **x: rms_norm(**x, eps=eps),
        lambda **x: written_out(**x, eps=eps),
        make_inputs(shape),
        FP64,
    )


@pytest.mark.parametrize(
    ("dtype", "weight_dtype", "tolerance"),
    [
        (torch.float32, torch.float32, FP32),
        (torch.bfloat16, torch.bfloat16, BF16),
        (torch.bfloat16, torch.float32, BF16),
    ],
    ids=["fp32", "bf16", "bf16_with_fp32_weight"],
)
def test_narrow_inputs_stay_close_to_fp64(
    dtype, weight_dtype, tolerance, make_inputs, assert_agrees
):
    assert_agrees(
        lambda **x: rms_norm(**x, eps=1e-5),
        lambda **x: written_out(**x, eps=1e-5),
        make_inputs((64, 200), dtype, weight_dtype),
        tolerance,
    )


@pytest.mark.parametrize("needs_grad", [False, True], ids=["inference", "training"])
def test_bf16_is_rounded_once(needs_grad, make_inputs):
    inputs = make_inputs((50, 300), torch.bfloat16)
    exact = written_out(**{name: x.double() for name, x in inputs.items()}, eps=1e-5)
    y = rms_norm(inputs["x"].requires_grad_(needs_grad), inputs["weight"], eps=1e-5).detach()
    assert y.dtype == torch.bfloat16
    # A second rounding would move one value in four; fp32 noise decides a tie now and then.
    assert float((y == exact.bfloat16()).float().mean()) > 0.999


def test_rows_of_zeros_stay_zero_with_finite_gradients(make_inputs):
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x, torch.ones(8), eps=1e-6)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(2, 8))
    torch.testing.assert_close(x.grad, torch.full((2, 8), 1e3))


def test_eps_stands_inside_the_root():
    y = rms_norm(torch.full((1, 4), 2.0), torch.ones(4), eps=12.0)
    torch.testing.assert_close(y, torch.full((1, 4), 0.5))


def test_graph_keeps_x_and_one_number_per_row(make_inputs):
    inputs = {name: x.requires_grad_() for name, x in make_inputs((32, 64)).items()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        rms_norm(**inputs, eps=1e-5)
    inputs_at = {x.data_ptr() for x in inputs.values()}
    assert [x.numel() for x in kept if x.data_ptr() not in inputs_at] == [32]


def test_a_weight_of_another_width_is_refused():
    with pytest.raises(ValueError, match=r"weight \(1,\) does not fit x \(2, 8\)"):
        rms_norm(torch.ones(2, 8), torch.ones(1), eps=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_single_row_is_normalized_as_many_are(dtype, generator):
    x = torch.randn(2, 48, generator=generator).to(dtype)
    weight = torch.rand(48, generator=generator).to(dtype)
    with torch.no_grad():
        together = rms_norm(x, weight, 1e-5)
        apart = torch.cat([rms_norm(row[None], weight, 1e-5) for row in x])
    torch.testing.assert_close(apart, together, atol=1e-6, rtol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("native", [False, True], ids=["torch", "native"])
def test_gate_and_backend_match_the_formula(gated, native, make_inputs, assert_agrees, monkeypatch):
    calls = []
    takes = norm.takes
    monkeypatch.setattr(
        norm, "takes", lambda *x: bool(native and takes(*x) and (calls.append(1) or True))
    )
    inputs = make_inputs((40, 65), torch.float32)
    if gated:
        inputs["gate"] = inputs["x"].flip(0)

    def written(x, weight, gate=None):
        y = written_out(x, weight, 1e-5)
        return y if gate is None else y * torch.sigmoid(gate)

    assert_agrees(lambda **x: rms_norm(**x, eps=1e-5), written, inputs, FP32)
    assert len(calls) == (2 if native else 0)  # forward and backward


def test_a_gate_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"gate \(2, 4\) torch.float32 does not fit x \(2, 8\)"):
        rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5, torch.ones(2, 4))
