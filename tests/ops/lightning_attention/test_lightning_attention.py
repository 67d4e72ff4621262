import pytest
import torch

from linnet.ops import lightning_attention

BACKENDS = ["chunked", "recurrent", "reference"]


def arguments(length=4, batch=1, dtype=torch.float32):
    """Return valid arguments: B = 1, T = 4, H = 2, K = 3, V = 5."""
    return {
        "q": torch.ones(batch, length, 2, 3, dtype=dtype),
        "k": torch.ones(batch, length, 2, 3, dtype=dtype),
        "v": torch.ones(batch, length, 2, 5, dtype=dtype),
        "decay": torch.tensor([0.5, 0.25]),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_have_the_promised_dtypes(backend):
    for dtype, wide in [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ]:
        o, state = lightning_attention(**arguments(1, dtype=dtype), backend=backend)
        assert (o.dtype, o.shape) == (dtype, (1, 1, 2, 5))
        assert (state.dtype, state.shape) == (wide, (1, 2, 3, 5))


def test_state_is_returned_only_on_request():
    assert lightning_attention(**arguments(), return_state=False)[1] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(1, 4, 2)}, r"q \(1, 4, 2\)"),
        ({"k": torch.ones(1, 4, 2, 4)}, r"k \(1, 4, 2, 4\)"),
        ({"v": torch.ones(1, 3, 2, 5)}, r"v \(1, 3, 2, 5\)"),
        ({"k": torch.ones(1, 4, 2, 3).bfloat16()}, "torch.float32, torch.bfloat16"),
        ({"decay": torch.ones(3)}, r"decay \(3,\) must be \[H\] = \(2,\)"),
        ({"decay": torch.ones(2).bfloat16()}, "decay must be .* got torch.bfloat16"),
        ({"decay": torch.ones(2).requires_grad_()}, "decay gets no gradient"),
        ({"initial_state": torch.ones(1, 2, 5, 3)}, r"\(1, 2, 5, 3\) must be \(1, 2, 3, 5\)"),
        ({"initial_state": torch.ones(1, 2, 3, 5).bfloat16()}, "initial_state is torch.bfloat16"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "int32 or int64; got torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 4]])}, r"\(1, 2\)"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, r"\(0,\)"),
        ({"cu_seqlens": torch.tensor([0, 4]), "initial_state": torch.ones(2, 2, 3, 5)}, "2, 2, 3"),
        ({"backend": "fastest"}, "'fastest' is none of 'native', 'triton'"),
        ({"backend": "recurrent"}, "got T = 4"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        lightning_attention(**(arguments() | changes))


def test_integer_inputs_are_refused():
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        lightning_attention(**arguments(dtype=torch.int64))


def test_packing_needs_a_batch_of_one():
    with pytest.raises(ValueError, match="B = 2"):
        lightning_attention(**arguments(batch=2), cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 3], "from 0 to T = 4; got 0 to 3"),
        ([0, 5], "got 0 to 5"),
        ([1, 4], "got 1 to 4"),
        ([-1, 4], "got -1 to 4"),
        ([0, 3, 2, 4], "entries 1 and 2 are 3, 2"),
        ([0, -2, 4], "entries 0 and 1 are 0, -2"),
    ],
)
def test_wrong_offsets_are_named(backend, offsets, message):
    with pytest.raises(ValueError, match=message):
        lightning_attention(**arguments(), cu_seqlens=torch.tensor(offsets), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slope", [-0.5, float("nan"), float("inf")])
def test_wrong_slopes_are_named(backend, slope):
    args = arguments(length=1) | {"decay": torch.tensor([0.1, slope])}
    with pytest.raises(ValueError, match=f"head 1 has {slope}"):
        lightning_attention(**args, backend=backend)


def test_offsets_are_checked_in_compiled_code():
    compiled = torch.compile(lightning_attention, fullgraph=True, backend="aot_eager")
    args = arguments()
    compiled(**args, cu_seqlens=torch.tensor([0, 4]))
    with pytest.raises(ValueError, match="got 0 to 3"):
        compiled(**args, cu_seqlens=torch.tensor([0, 3]))
