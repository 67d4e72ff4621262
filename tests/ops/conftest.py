"""How an operator is compared with its plain reference: outputs and every gradient, in fp64."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    """Let operators divide their work."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


Op = Callable[..., Tensor | tuple[Tensor, ...]]


SMALLEST_NORM = 0.1
"""Below it, errors are absolute (inputs are of order 1): a gradient may be 0 but for rounding."""


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|, in fp64."""
    assert actual.shape == expected.shape
    difference = actual.detach().double() - expected.detach()
    return float(difference.norm() / expected.detach().norm().clamp(min=SMALLEST_NORM))


def compare(op: Op, reference: Op, inputs: dict[str, Tensor], seed: int = 1) -> dict[str, float]:
    """Return the relative errors of all outputs and of the gradients of all inputs.

    The reference sees the same numbers in fp64, and both see the same upstream gradients.
    """
    results = []
    for function, widen in ((op, False), (reference, True)):
        leaves = {
            name: (x.double() if widen else x.clone()).detach().requires_grad_()
            for name, x in inputs.items()
        }
        outputs = function(**leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append((leaves, outputs))
    upstream = torch.Generator().manual_seed(seed)
    grads = [torch.randn(o.shape, generator=upstream).to(o.dtype) for o in results[0][1]]
    (outputs, gradients), (expected_outputs, expected_gradients) = (
        (outputs, backward(leaves, outputs, grads)) for leaves, outputs in results
    )
    errors = {
        f"output {n}": relative_error(actual, expected)
        for n, (actual, expected) in enumerate(zip(outputs, expected_outputs, strict=True))
    }
    for name, actual in gradients.items():
        errors[f"grad {name}"] = relative_error(actual, expected_gradients[name])
    return errors


def backward(
    leaves: dict[str, Tensor], outputs: tuple[Tensor, ...], grads: list[Tensor]
) -> dict[str, Tensor]:
    """Return the gradient of every leaf, zeros for one that nothing depends on."""
    tracked = [
        (o, grad.to(o.dtype)) for o, grad in zip(outputs, grads, strict=True) if o.requires_grad
    ]
    if tracked:
        torch.autograd.backward(*zip(*tracked, strict=True))
    return {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}


@pytest.fixture
def assert_agrees() -> Callable[..., dict[str, float]]:
    """A check that an op agrees with its reference within one tolerance."""

    def check(op: Op, reference: Op, inputs: dict[str, Tensor], tolerance: float):
        errors = compare(op, reference, inputs)
        wrong = {name: error for name, error in errors.items() if not error <= tolerance}
        assert not wrong, f"relative errors above {tolerance}: {wrong}"
        return errors

    return check
