"""Inputs of the lightning attention tests."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops.lightning_attention import layout


@pytest.fixture
def make_inputs(generator: torch.Generator) -> Callable[..., dict[str, Tensor]]:
    """Random q, k, v as the model makes them (after SiLU), and an initial state."""

    def make(
        length: int,
        batch: int = 2,
        heads: int = 3,
        key_dim: int = 8,
        value_dim: int = 16,
        states: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> dict[str, Tensor]:
        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        num_states = batch if states is None else states
        return {
            "q": F.silu(random(batch, length, heads, key_dim)).to(dtype),
            "k": F.silu(random(batch, length, heads, key_dim)).to(dtype),
            "v": F.silu(random(batch, length, heads, value_dim)).to(dtype),
            "initial_state": random(num_states, heads, key_dim, value_dim).to(state_dtype),
        }

    return make


@pytest.fixture
def decay() -> Tensor:
    """Slopes of three heads: one never forgets, one slowly, one within a token."""
    return torch.tensor([0.0, 0.1, 5.0], dtype=torch.float64)


@pytest.fixture(params=["one_block", "many_blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run with all chunks in one block, and with at most two chunks in a block."""
    if request.param == "many_blocks":
        monkeypatch.setattr(layout, "BLOCK_ELEMENTS", 2 * 3 * 64 * 64)
