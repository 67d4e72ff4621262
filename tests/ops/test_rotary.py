import pytest
import torch

from linnet.ops import apply_rotary, rotary_tables

FP64 = 1e-6  # the tables are fp32
THETA = 10_000.0


def complex_reference(x, positions, rotary_dim, theta=THETA):
    """Turn channel pairs (i, i + rotary_dim / 2) as complex numbers, in fp64."""
    half = rotary_dim // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / max(1, half))
    turn = torch.polar(torch.ones(()).double(), positions[..., None, None] * frequency)
    turned = torch.complex(x[..., :half], x[..., half:rotary_dim]) * turn
    return torch.cat((turned.real, turned.imag, x[..., rotary_dim:]), -1)


@pytest.mark.parametrize("rotary_dim", [0, 2, 8, 16], ids=["none", "pair", "half", "full"])
@pytest.mark.parametrize("length", [0, 1, 65])
def test_rotary_matches_complex_numbers(rotary_dim, length, generator, assert_agrees):
    x = torch.randn(2, length, 3, 16, generator=generator, dtype=torch.float64)
    positions = torch.arange(7, 7 + length)[None]
    tables = rotary_tables(positions, rotary_dim, THETA)
    assert_agrees(
        lambda x: apply_rotary(x, *tables),
        lambda x: complex_reference(x, positions, rotary_dim),
        {"x": x},
        FP64,
    )


def test_channels_past_rotary_dim_stay_as_they_are(generator):
    x = torch.randn(1, 9, 2, 16, generator=generator)
    y = apply_rotary(x, *rotary_tables(torch.arange(9)[None], 8, THETA))
    assert torch.equal(y[..., 8:], x[..., 8:])
    assert not torch.isclose(y[:, 1:, :, :4], x[:, 1:, :, :4]).all(-1).any()


def test_products_depend_on_the_distance_only(generator):
    q, k = torch.randn(2, 1, 1, 1, 16, generator=generator, dtype=torch.float64)
    products = []
    for shift in (0, 5, 900):
        turned = [
            apply_rotary(x, *rotary_tables(torch.tensor([[position + shift]]), 8, THETA))
            for x, position in ((q, 13), (k, 4))
        ]
        products.append((turned[0] * turned[1]).sum())
    torch.testing.assert_close(torch.stack(products), products[0].expand(3), rtol=0, atol=1e-4)
    unturned = (q * k).sum()
    assert abs(products[0] - unturned) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_tables_are_fp32_and_the_dtype_of_x_is_kept(dtype, generator):
    tables = rotary_tables(torch.arange(300)[None], 8, THETA)
    assert {table.dtype for table in tables} == {torch.float32}
    x = torch.randn(1, 300, 1, 16, generator=generator).to(dtype)
    y = apply_rotary(x, *tables)
    assert y.dtype == dtype
    # Rounded once: as good as the exact result rounded to the dtype.
    exact = complex_reference(x.double(), torch.arange(300)[None], 8)
    eps = max(torch.finfo(dtype).eps, 1e-4)
    torch.testing.assert_close(y.double(), exact, rtol=eps, atol=eps)


def test_packed_documents_may_have_positions_of_their_own(generator):
    x = torch.randn(1, 5, 2, 8, generator=generator)
    tables = rotary_tables(torch.tensor([[0, 1, 2, 0, 1]]), 8, THETA)
    alone = apply_rotary(x[:, 3:], *rotary_tables(torch.arange(2)[None], 8, THETA))
    assert torch.equal(apply_rotary(x, *tables)[:, 3:], alone)


@pytest.mark.parametrize("rotary_dim", [-2, 3])
def test_odd_or_negative_widths_are_refused(rotary_dim):
    with pytest.raises(ValueError, match=f"got {rotary_dim}"):
        rotary_tables(torch.arange(3), rotary_dim, THETA)


def test_tables_that_do_not_fit_are_refused():
    x = torch.ones(1, 5, 2, 8)
    with pytest.raises(ValueError, match="rotary_dim 10 exceeds the head dim 8"):
        apply_rotary(x, *rotary_tables(torch.arange(5)[None], 10, THETA))
    with pytest.raises(ValueError, match="tables of 5 positions"):
        apply_rotary(x, *rotary_tables(torch.arange(1)[None], 8, THETA))
