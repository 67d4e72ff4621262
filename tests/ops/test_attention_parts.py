"""Parts without a kernel against those of the kernel: outputs, log-sums and gradients."""

import pytest
import torch

from linnet.ops import attention_parts as parts

TOKENS, KEYS = 13, 29


def tensors(dtype=torch.float64, keys=KEYS):
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, TOKENS, 8), (2, 2, keys, 8), (2, 2, keys, 8), (2, 4, TOKENS, 8))
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes
    ]


@pytest.fixture(params=[1 << 26, 4 * 2 * 2 * KEYS, 1], ids=["whole", "in blocks", "row by row"])
def without_kernel(request, monkeypatch):
    def change():
        monkeypatch.setattr(parts, "_has_kernel", lambda q, v: False)
        monkeypatch.setattr(parts, "BLOCK_SCORES", request.param)

    return change


@pytest.mark.parametrize("name", ["past", "own"])
def test_parts_are_those_of_the_kernel(without_kernel, name):
    q, k, v, grad = tensors(keys=KEYS if name == "past" else TOKENS)
    attend, gradients = getattr(parts, f"attend_{name}"), getattr(parts, f"{name}_gradients")
    expected = attend(q, k, v)
    expected_gradients = gradients(grad, q, k, v, expected)
    without_kernel()
    found = attend(q, k, v)
    for own, whole in zip(found, expected, strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-12, atol=1e-12)
    for own, whole in zip(gradients(grad, q, k, v, found), expected_gradients, strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-12, atol=1e-12)


def test_statistics_of_bf16_are_wide(without_kernel):
    exact = parts.attend_past(*tensors()[:3])
    without_kernel()
    o, log_sum = parts.attend_past(*tensors(torch.bfloat16)[:3])
    assert o.dtype == torch.bfloat16 and log_sum.dtype == torch.float32
    rounded = parts.attend_past(*(x.double() for x in tensors(torch.bfloat16)[:3]))
    torch.testing.assert_close(log_sum.double(), rounded[1], rtol=1e-6, atol=1e-6)
    assert (o - exact[0]).norm() < 0.01 * exact[0].norm()
