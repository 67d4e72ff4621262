import subprocess
import sys

import pytest
import torch

from linnet.ops import cross_entropy, lm_head
from linnet.ops.cross_entropy import IGNORE, cross_entropy_reference

FP64 = 1e-12
FP32 = 1e-6
BF16 = 3e-3
VOCAB, DIM = 50, 12
MODULE = cross_entropy.__globals__


@pytest.fixture(params=["one_chunk", "chunks_of_8"])
def chunks(request, monkeypatch):
    if request.param == "chunks_of_8":
        monkeypatch.setitem(MODULE, "MIN_CHUNK_TOKENS", 1)
        monkeypatch.setitem(MODULE, "CHUNK_ELEMENTS", 8 * VOCAB)


@pytest.fixture
def make_inputs(generator):
    def make(tokens, ignored=0, dtype=torch.float64, weight_dtype=None):
        hidden = torch.randn(tokens, DIM, generator=generator, dtype=torch.float64)
        weight = torch.randn(VOCAB, DIM, generator=generator, dtype=torch.float64)
        targets = torch.randint(VOCAB, (tokens,), generator=generator)
        targets[torch.randperm(tokens, generator=generator)[:ignored]] = IGNORE
        return {"hidden": hidden.to(dtype), "weight": weight.to(weight_dtype or dtype)}, targets

    return make


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize(
    ("tokens", "ignored"), [(0, 0), (1, 0), (1, 1), (8, 0), (30, 7), (30, 30)], ids=str
)
def test_loss_matches_reference(tokens, ignored, make_inputs, assert_agrees):
    inputs, targets = make_inputs(tokens, ignored)
    assert_agrees(
        lambda **x: cross_entropy(**x, targets=targets),
        lambda **x: cross_entropy_reference(**x, targets=targets),
        inputs,
        FP64,
    )


@pytest.mark.usefixtures("chunks")
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
    inputs, targets = make_inputs(30, 7, dtype, weight_dtype)
    errors = assert_agrees(
        lambda **x: cross_entropy(**x, targets=targets),
        lambda **x: cross_entropy_reference(**x, targets=targets),
        inputs,
        tolerance,
    )
    # The logits are fp32, so the loss itself has no bf16 error.
    assert errors["output 0"] <= FP32


@pytest.mark.usefixtures("chunks")
def test_gradients_match_finite_differences(make_inputs, generator):
    inputs, targets = make_inputs(30, 7)
    for name, x in inputs.items():
        direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        step = 1e-6 * direction
        above, below = (
            cross_entropy(**(inputs | {name: x + sign * step}), targets=targets) for sign in (1, -1)
        )
        leaf = x.clone().requires_grad_()
        cross_entropy(**(inputs | {name: leaf}), targets=targets).backward()
        slope = (leaf.grad * direction).sum()
        torch.testing.assert_close((above - below) / 2e-6, slope, rtol=1e-7, atol=0)


def test_a_second_backward_pass_is_an_error_not_a_wrong_gradient(make_inputs):
    inputs, targets = make_inputs(5)
    inputs["weight"].requires_grad_()
    loss = cross_entropy(**inputs, targets=targets)
    loss.backward(torch.tensor(0.5, dtype=torch.float64), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["fp64", "bf16"])
def test_gradients_scale_with_the_loss(dtype, make_inputs, assert_agrees):
    inputs, targets = make_inputs(30, 7, dtype)
    assert_agrees(
        lambda **x: cross_entropy(**x, targets=targets) * 0.3 / 23,
        lambda **x: cross_entropy_reference(**x, targets=targets) * 0.3 / 23,
        inputs,
        FP64 if dtype == torch.float64 else BF16,
    )


def test_the_scale_of_bf16_gradients_is_not_rounded():
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.tensor([[0.0], [508.0]])  # the gradient is 508 - 0
    (cross_entropy(hidden, weight, torch.tensor([0])) * 1.0035).backward()
    assert hidden.grad.item() == 510  # 508 with the scale that bf16 has next to 1.0035, 1


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_one_gradient_can_be_had_alone(wanted, make_inputs):
    inputs, targets = make_inputs(9)
    inputs[wanted].requires_grad_()
    cross_entropy(**inputs, targets=targets).backward()
    (expected,) = torch.autograd.grad(
        cross_entropy_reference(**inputs, targets=targets), inputs[wanted]
    )
    torch.testing.assert_close(inputs[wanted].grad, expected)


def test_loss_without_gradients_is_the_same(make_inputs):
    inputs, targets = make_inputs(30, 7)
    with torch.no_grad():
        loss = cross_entropy(**inputs, targets=targets)
    torch.testing.assert_close(loss, cross_entropy_reference(**inputs, targets=targets))


def test_extreme_logits_give_a_finite_loss():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    loss = cross_entropy(hidden, weight, torch.tensor([0, 0]))
    loss.backward()
    assert loss.item() == 2e4
    assert hidden.grad.tolist() == [[0.0], [-2.0]]


def test_logits_are_fp32_products_of_widened_operands(generator):
    hidden = torch.randn(3, 4, 64, generator=generator).bfloat16()
    weight = torch.randn(10, 64, generator=generator).bfloat16()
    logits = lm_head(hidden, weight)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, hidden.float() @ weight.float().T)
    assert lm_head(hidden.double(), weight.double()).dtype == torch.float64


@pytest.mark.parametrize("target", [-1, -99, -101, VOCAB, 10**6])
def test_targets_outside_the_vocabulary_are_named(target, make_inputs):
    inputs, targets = make_inputs(5, 1)
    targets[3] = target
    with pytest.raises(ValueError, match=f"target {target} outside a vocabulary of {VOCAB}"):
        cross_entropy(**inputs, targets=targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(1, 5, DIM)}, r"hidden \(1, 5, 12\)"),
        ({"weight": torch.ones(VOCAB, DIM + 1)}, r"weight \(50, 13\)"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, r"targets \(4,\)"),
        ({"targets": torch.zeros(5, dtype=torch.int32)}, "got torch.int32"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    args = {
        "hidden": torch.ones(5, DIM),
        "weight": torch.ones(VOCAB, DIM),
        "targets": torch.zeros(5, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        cross_entropy(**(args | changes))


MEASURE = """
import resource, torch
from linnet.ops import cross_entropy

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6

torch.set_num_threads(1)
hidden = torch.randn(8192, 32, requires_grad=True)
weight = torch.randn(200_064, 32, requires_grad=True)
targets = torch.randint(200_064, (8192,))
cross_entropy(hidden[:1], weight[:1], targets[:1] * 0).backward()
before = peak()
cross_entropy(hidden, weight, targets).backward()
print(peak() - before)
"""


@pytest.mark.slow
def test_a_large_vocabulary_takes_little_memory():
    run = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    megabytes = float(run.stdout)
    print(f"8,192 tokens of a vocabulary of 200,064: {megabytes:.0f} MB more at the peak")
    assert megabytes < 600
