import pytest
import torch

from linnet.ops.lightning_attention.reference import blockwise, parallel, recurrent, reference

FP64 = 1e-13


def reading(form):
    """Return `reference` with one form and a fixed decay as a function of tensors."""

    def run(decay, cu_seqlens=None):
        return lambda q, k, v, initial_state: reference(
            q, k, v, decay, initial_state, cu_seqlens, form
        )

    return run


@pytest.mark.parametrize("form", [parallel, blockwise], ids=lambda form: form.__name__)
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000])
def test_forms_agree_with_the_recurrence(form, length, make_inputs, decay, assert_agrees):
    inputs = make_inputs(length, batch=1 if length == 1000 else 2)
    assert_agrees(reading(form)(decay), reading(recurrent)(decay), inputs, FP64)


def test_recurrence_gives_hand_computed_numbers():
    decay = torch.log(torch.tensor([2.0]))  # lambda = 1/2
    q, k, v = (torch.tensor(x).view(1, 3, 1, 1) for x in ([1.0, 2, 3], [1.0, 1, 2], [4.0, 8, 1]))
    state = torch.full((1, 1, 1, 1), 16.0)
    # S: 16 -> 8 + 4 = 12 -> 6 + 8 = 14 -> 7 + 2 = 9
    o, state = reference(q, k, v, decay, state, form=recurrent)
    torch.testing.assert_close(o.flatten(), torch.tensor([12.0, 28.0, 27.0]))
    torch.testing.assert_close(state.flatten(), torch.tensor([9.0]))


def test_documents_start_afresh(make_inputs, decay):
    inputs = make_inputs(10, batch=1, states=3)
    offsets = torch.tensor([0, 4, 4, 10])
    o, states = reading(parallel)(decay, offsets)(**inputs)
    initial = inputs.pop("initial_state")
    for n, span in enumerate((slice(0, 4), slice(4, 4), slice(4, 10))):
        document = {name: x[:, span] for name, x in inputs.items()}
        alone, state = reading(parallel)(decay)(**document, initial_state=initial[n : n + 1])
        torch.testing.assert_close(o[:, span], alone)
        torch.testing.assert_close(states[n : n + 1], state)
