import pytest
import torch

from linnet.ops import linear, matmul
from linnet.ops.matmul import product_dtype, wide

FP64 = 1e-12
FP32 = 1e-6
BF16 = 6e-3
DTYPES = {
    "fp64": (torch.float64, torch.float64, FP64),
    "fp32": (torch.float32, torch.float32, FP32),
    "fp32_with_bf16_weight": (torch.float32, torch.bfloat16, BF16),
    "bf16": (torch.bfloat16, torch.bfloat16, BF16),
    "bf16_with_fp32_weight": (torch.bfloat16, torch.float32, BF16),
    "fp16_with_fp32_weight": (torch.float16, torch.float32, BF16),
}


@pytest.mark.parametrize("shape", [(0, 33), (1, 33), (2, 7, 33)], ids=str)
@pytest.mark.parametrize(("dtype", "weight_dtype", "tolerance"), DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("native", [False, True], ids=["widened", "native"])
def test_linear_matches_reference(
    shape, dtype, weight_dtype, tolerance, native, generator, assert_agrees, monkeypatch
):
    monkeypatch.setattr(matmul, "cpu_has_native_bf16", lambda: native)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(20, 33, generator=generator, dtype=torch.float64).to(weight_dtype)
    assert_agrees(linear, lambda x, weight: x @ weight.T, {"x": x, "weight": weight}, tolerance)
    with torch.no_grad():
        y = linear(x, weight)
    assert y.dtype == dtype
    torch.testing.assert_close(y, linear(x, weight.clone().requires_grad_()).detach())


@pytest.mark.parametrize("native", [False, True], ids=["widened", "native"])
def test_graph_keeps_only_x_and_weight(native, generator, monkeypatch):
    monkeypatch.setattr(matmul, "cpu_has_native_bf16", lambda: native)
    x = torch.randn(2, 8, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(20, 16, generator=generator).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        linear(x, weight)
    assert {t.untyped_storage().data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}


def test_halves_are_widened_where_the_cpu_would_emulate_them(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(matmul, "cpu_has_native_bf16", lambda: False)
    assert product_dtype(torch.bfloat16, cpu) == torch.float32
    assert product_dtype(torch.bfloat16, gpu) == torch.bfloat16
    monkeypatch.setattr(matmul, "cpu_has_native_bf16", lambda: True)
    assert product_dtype(torch.bfloat16, cpu) == torch.bfloat16
    assert product_dtype(torch.float16, cpu) == torch.float32
    assert product_dtype(torch.float64, cpu) == torch.float64


def test_wide_keeps_fp64():
    assert wide(torch.ones(1).bfloat16()).dtype == torch.float32
    x = torch.ones(1).double()
    assert wide(x) is x
