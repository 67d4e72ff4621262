import socket

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "allocate",
    [
        lambda like: torch.empty(2, 3, dtype=like.dtype),
        lambda like: torch.empty_like(like),
        lambda like: like.new_empty(4),
        lambda like: torch.empty_strided((2, 2), (2, 1), dtype=like.dtype),
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided"],
)
def test_uninitialized_floats_are_nan(allocate, dtype):
    assert allocate(torch.zeros(2, dtype=dtype)).isnan().all()


def test_uninitialized_parameters_and_integers_still_work():
    assert torch.empty(2, requires_grad=True).requires_grad
    assert torch.empty(2, dtype=torch.int64).shape == (2,)
    assert torch.empty(2, device="meta").device.type == "meta"


def test_device_context_still_applies():
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"


def test_connecting_to_another_machine_is_refused():
    with socket.socket() as outside, pytest.raises(RuntimeError, match="no network"):
        outside.connect(("192.0.2.1", 80))


def test_connecting_to_this_machine_works():
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


def test_seeded_fixtures_repeat(generator, rng):
    assert torch.rand(1, generator=generator) == torch.rand(
        1, generator=torch.Generator().manual_seed(0)
    )
    assert rng.random() == pytest.approx(0.8444218515250481)
