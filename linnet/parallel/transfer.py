"""Exchanges that run while the rank computes, in the backward pass too.

`begin` starts an exchange and `finish` waits for its result; what lies between runs meanwhile. In
the backward pass they change places by themselves: autograd runs what came later first, so `finish`
starts the exchange of the gradients, and `begin` waits for it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linnet.parallel.collectives import Pending

Start = Callable[[Tensor], Pending]


class Transfer:
    """One exchange, and the one that brings its gradients back.

    Args:
        there: starts the exchange of a tensor.
        back: starts the exchange of the gradient of the result, to the gradient of the tensor.
    """

    def __init__(self, there: Start, back: Start) -> None:
        self.there, self.back = there, back
        self.pending: Pending | None = None

    def arrive(self) -> Tensor:
        """Return what is on its way."""
        assert self.pending is not None
        pending, self.pending = self.pending, None
        return pending.wait()


def begin(x: Tensor, transfer: Transfer) -> Tensor:
    """Start an exchange; return what `finish` wants, an empty tensor that carries the gradient."""
    return _Begin.apply(x, transfer)


def finish(ticket: Tensor, transfer: Transfer) -> Tensor:
    """Return the result of an exchange that was begun."""
    return _Finish.apply(ticket, transfer)


class _Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.pending = transfer.there(x.detach())
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_grads: Tensor) -> tuple[Tensor, None]:
        return ctx.transfer.arrive(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        ctx.save_for_backward(ticket)
        return transfer.arrive()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,), (ticket,) = grads, ctx.saved_tensors
        ctx.transfer.pending = ctx.transfer.back(grad)
        return torch.zeros_like(ticket), None
