"""On a GPU these tests run the compiled kernels, elsewhere Triton's interpreter, on small sizes."""

import importlib.util
import itertools
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from linnet.ops import moe_triton
from linnet.ops.moe import swiglu_ffn_reference

pytest.importorskip("triton")


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FP32 = 2e-6
BF16 = 8e-3
DIM, WIDTH = 20, 24

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUPPORT = load(Path(__file__).parent / "triton_interpreter.py")
KERNELS = SUPPORT.load_kernels("linnet.ops.moe_triton_kernels")

OFFSETS = {
    "no_rows": [0, 0, 0],
    "one_row": [0, 0, 1, 1],
    "empty_experts": [0, 0, 33, 33, 40, 40],
    "whole_tiles": [0, 32, 64],
    "uneven": [0, 5, 70, 71],
    "one_expert": [0, 10],
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if DEVICE == "cuda":
        yield
        return
    monkeypatch.setattr(moe_triton, "kernels", lambda: KERNELS)
    with SUPPORT.repaired_interpreter():
        yield


@pytest.fixture
def make_inputs(generator):
    def make(rows, experts, dtype=torch.float32, weight_dtype=None):
        def random(*shape):
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        return {
            "x": random(rows, DIM).to(dtype),
            "gate_up": (random(experts, 2 * WIDTH, DIM) / 4).to(weight_dtype or dtype),
            "down": (random(experts, DIM, WIDTH) / 4).to(weight_dtype or dtype),
        }

    return make


def product(offsets):
    return lambda x, gate_up: moe_triton.grouped_linear(
        x.to(DEVICE), gate_up.to(DEVICE), offsets.to(DEVICE)
    ).cpu()


def per_expert(offsets, function):
    """Apply `function` to the rows and weights of each expert; zeros for the other rows."""

    def run(x, *weights):
        parts = [
            function(x[start:stop], *(w[expert] for w in weights))
            for expert, (start, stop) in enumerate(itertools.pairwise(offsets.tolist()))
        ]
        rest = parts[0].new_zeros(len(x) - int(offsets[-1]), parts[0].shape[1])
        return torch.cat([*parts, rest])

    return run


def plain_product(offsets):
    run = per_expert(offsets, lambda x, w: x @ w.T)
    return lambda x, gate_up: run(x, gate_up)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
def test_grouped_linear_matches_loop(offsets, dtype, make_inputs, assert_agrees):
    inputs = make_inputs(offsets[-1], len(offsets) - 1)
    del inputs["down"]
    offsets = torch.tensor(offsets, dtype=dtype)
    assert_agrees(product(offsets), plain_product(offsets), inputs, FP32)


def test_rows_of_no_expert_give_zeros(make_inputs, assert_agrees):
    inputs = make_inputs(50, 2)
    del inputs["down"]
    offsets = torch.tensor([0, 3, 13])
    assert_agrees(product(offsets), plain_product(offsets), inputs, FP32)
    inputs["x"][13:] = float("nan")
    assert torch.count_nonzero(product(offsets)(**inputs)[13:]) == 0


def test_weights_in_another_dtype_are_rounded(make_inputs, assert_agrees):
    for rows in (40, 200):  # read as they are, and converted once
        inputs = make_inputs(rows, 2, torch.bfloat16, torch.float32)
        del inputs["down"]
        offsets = torch.tensor([0, 7, rows])
        assert_agrees(product(offsets), plain_product(offsets), inputs, BF16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ffn_matches_reference(dtype, make_inputs, assert_agrees):
    offsets = torch.tensor([0, 5, 5, 40])
    tolerance = FP32 if dtype == torch.float32 else BF16
    reference = per_expert(offsets, swiglu_ffn_reference)
    errors = assert_agrees(
        lambda x, gate_up, down: Ffn.apply(x, gate_up, down, offsets),
        lambda x, gate_up, down: reference(x, gate_up, down),
        make_inputs(42, 3, dtype),
        tolerance,
    )
    print({name: f"{error:.1e}" for name, error in errors.items()})


class Ffn(torch.autograd.Function):
    """`ffn_forward` and `ffn_backward` as `grouped_ffn` uses them."""

    @staticmethod
    def forward(ctx, *inputs):
        x, gate_up, down, offsets = (t.to(DEVICE) for t in inputs)
        y, hidden = moe_triton.ffn_forward(x, gate_up, down, offsets)
        ctx.save_for_backward(x, hidden, gate_up, down, offsets)
        return y.cpu()

    @staticmethod
    def backward(ctx, grad):
        grads = moe_triton.ffn_backward(grad.to(DEVICE), *ctx.saved_tensors)
        return *(g.cpu() for g in grads), None


def test_a_poisoned_expert_touches_no_other(make_inputs):
    inputs = make_inputs(40, 3)
    offsets = torch.tensor([0, 10, 25, 40])
    results = []
    for value in (1.0, float("nan")):
        leaves = {name: x.clone() for name, x in inputs.items() if name != "down"}
        leaves["x"][10:25] = value
        leaves["gate_up"][1] = value
        leaves = {name: x.requires_grad_() for name, x in leaves.items()}
        with np.errstate(invalid="ignore"):
            y = product(offsets)(**leaves)
            y.sum().backward()
        kept = torch.cat((torch.arange(10), torch.arange(25, 40)))
        results.append([y[kept], leaves["x"].grad[kept], leaves["gate_up"].grad[::2]])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_every_configuration_matches_loop(make_inputs, assert_agrees, monkeypatch):
    configs = {
        moe_triton.tile_config(rows, 512, torch.bfloat16, torch.device("cpu"))
        for rows in (1, 20, 50, 1000)
    }
    assert len(configs) == 4
    inputs = make_inputs(70, 2)
    del inputs["down"]
    offsets = torch.tensor([0, 1, 70])
    if DEVICE == "cuda":
        inputs = {name: x.bfloat16() for name, x in inputs.items()}
    for config in configs:
        monkeypatch.setattr(moe_triton, "tile_config", lambda *args, config=config: config)
        tolerance = FP32 if DEVICE == "cpu" else BF16
        assert_agrees(product(offsets), plain_product(offsets), inputs, tolerance)


def test_unsupported_inputs_are_named(monkeypatch):
    x, weights = torch.zeros(2, 3, device=DEVICE), torch.zeros(1, 4, 3, device=DEVICE)
    assert moe_triton.unsupported_reason(x, weights) is None
    assert "torch.float64" in moe_triton.unsupported_reason(x.double(), weights)
    if DEVICE == "cpu":
        fake = types.SimpleNamespace(triton=types.SimpleNamespace(JITFunction=int), rows_kernel=1)
        monkeypatch.setattr(moe_triton, "kernels", lambda: fake)
        assert "TRITON_INTERPRET=1" in moe_triton.unsupported_reason(x, weights)
    monkeypatch.setattr(moe_triton, "_is_installed", lambda: False)
    assert "pip install 'linnet[gpu]'" in moe_triton.unsupported_reason(x, weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(4, 5)}, r"\[E, N, D\] and \[R, D\]"),
        ({"offsets": torch.tensor([0, 4])}, r"offsets \(2,\)"),
        ({"offsets": torch.tensor([0.0, 2.0, 4.0])}, "torch.float32 must be 3 integers"),
        ({"offsets": torch.tensor([0, 3, 2])}, "must rise from 0"),
        ({"offsets": torch.tensor([1, 3, 4])}, "must rise from 0"),
        ({"offsets": torch.tensor([0, 3, 5])}, "to at most R = 4"),
        ({"x": torch.zeros(4, 3).double()}, "cannot run: rows and weights must be"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {
        "x": torch.zeros(4, 3),
        "weights": torch.zeros(2, 6, 3),
        "offsets": torch.tensor([0, 1, 4]),
    } | changes
    arguments = {name: x if name == "offsets" else x.to(DEVICE) for name, x in arguments.items()}
    with pytest.raises(ValueError, match=message):
        moe_triton.grouped_linear(*arguments.values())


def test_custom_ops_pass_opcheck(make_inputs):
    x, weights, _ = make_inputs(4, 2).values()
    x, weights = x.to(DEVICE).requires_grad_(), weights.to(DEVICE).requires_grad_()
    offsets = torch.tensor([0, 1, 4], device=DEVICE)
    torch.library.opcheck(moe_triton.grouped_linear, (x, weights, offsets))
    grad = torch.ones(4, 2 * WIDTH, device=DEVICE)
    args = (grad, x.detach(), weights.detach(), offsets)
    torch.library.opcheck(moe_triton._backward_op, args)
