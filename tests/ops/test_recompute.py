import pytest
import torch

from linnet.ops import recomputed, rms_norm


@pytest.fixture
def inputs(generator):
    x = torch.randn(30, 8, generator=generator).requires_grad_()
    weight = torch.randn(8, generator=generator).requires_grad_()
    return x, weight


def loss_of(x, weight, again):
    """Use a norm twice, once through a view, and return the loss and how often it was formed."""
    formed = []

    def form():
        formed.append(1)
        return rms_norm(x, torch.ones(8), 1e-5)

    y = form()
    if again:
        with recomputed(y, form):
            z = (y @ weight).exp() + (y.view(15, 2, 8)[:, 1] * weight).sum()
    else:
        z = (y @ weight).exp() + (y.view(15, 2, 8)[:, 1] * weight).sum()
    return z.sum(), formed


def test_gradients_are_those_of_what_is_kept(inputs):
    grads = []
    for again in (False, True):
        loss, formed = loss_of(*inputs, again)
        grads.append(torch.autograd.grad(loss, inputs))
    assert len(formed) > 1
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_what_is_formed_again_is_not_kept_alive(inputs):
    x, weight = inputs
    y = rms_norm(x, torch.ones(8), 1e-5)
    with recomputed(y, lambda: rms_norm(x, torch.ones(8), 1e-5)):
        loss = (y @ weight).sum()
    storage = torch.multiprocessing.reductions.StorageWeakRef(y.untyped_storage())
    del y
    assert storage.expired()
    loss.backward()
    assert x.grad is not None
