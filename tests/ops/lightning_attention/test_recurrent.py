import pytest
import torch

from linnet.ops import lightning_attention
from linnet.ops.lightning_attention.reference import reference

FP64 = 1e-12
BF16 = 4e-3


def test_decoding_token_by_token_equals_chunked(make_inputs, decay):
    inputs = make_inputs(150)
    o, state = lightning_attention(**inputs, decay=decay, backend="chunked")
    carried = inputs.pop("initial_state")
    for t in range(150):
        token = {name: x[:, t : t + 1] for name, x in inputs.items()}
        out, carried = lightning_attention(
            **token, decay=decay, initial_state=carried, backend="recurrent"
        )
        torch.testing.assert_close(out, o[:, t : t + 1], rtol=FP64, atol=FP64)
    torch.testing.assert_close(carried, state, rtol=FP64, atol=FP64)


def test_decode_step_matches_reference_with_gradients(make_inputs, decay, assert_agrees):
    assert_agrees(
        lambda **x: lightning_attention(**x, decay=decay, backend="recurrent"),
        lambda **x: reference(**x, decay=decay),
        make_inputs(1),
        FP64,
    )


def test_decode_step_starts_from_zeros(make_inputs, decay):
    inputs = make_inputs(1)
    del inputs["initial_state"]
    o, state = lightning_attention(**inputs, decay=decay)
    expected_o, expected_state = reference(**inputs, decay=decay)
    torch.testing.assert_close(o, expected_o)
    torch.testing.assert_close(state, expected_state)


def test_decode_step_leaves_the_given_state_alone(make_inputs, decay):
    inputs = make_inputs(1)
    before = inputs["initial_state"].clone()
    lightning_attention(**inputs, decay=decay)
    assert torch.equal(inputs["initial_state"], before)


def test_bf16_decoding_keeps_an_exact_state(make_inputs):
    decay = torch.tensor([1e-5, 4e-3, 0.5])
    inputs = make_inputs(1000, batch=1, dtype=torch.bfloat16)
    carried, outputs = inputs["initial_state"], []
    for t in range(1000):
        token = {name: inputs[name][:, t : t + 1] for name in "qkv"}
        out, carried = lightning_attention(**token, decay=decay, initial_state=carried)
        outputs.append(out)
    expected_o, expected = reference(**{n: x.double() for n, x in inputs.items()}, decay=decay)
    o = torch.cat(outputs, 1)
    assert o.dtype == torch.bfloat16
    assert carried.dtype == torch.float32
    assert float((o - expected_o).norm() / expected_o.norm()) <= BF16
    assert float((carried - expected).norm() / expected.norm()) <= 1e-6


@pytest.mark.parametrize("length", [0, 2])
def test_recurrent_backend_takes_one_token(length, make_inputs, decay):
    with pytest.raises(ValueError, match=f"one token per row; got T = {length}"):
        lightning_attention(**make_inputs(length), decay=decay, backend="recurrent")


@torch.no_grad()
def test_compiled_decode_step_equals_eager(make_inputs, decay):
    inputs = make_inputs(1)
    compiled = torch.compile(lightning_attention, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        compiled(**inputs, decay=decay), lightning_attention(**inputs, decay=decay), strict=True
    ):
        assert torch.equal(actual, expected)
