"""The registered operator: opaque to tracers, differentiable, over one of several implementations.

An implementation is a module with `forward`, `backward` and `unsupported_reason`. Which one runs is
decided when values are there, inside the operator, so compiled graphs hold one call.
"""

import functools
import logging
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from linnet.ops.lightning_attention import chunked, native, triton
from linnet.ops.matmul import wide_dtype

logger = logging.getLogger(__name__)


@torch.library.custom_op("linnet::lightning_attention", mutates_args=())
def lightning_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    implementation: str,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Forward pass; arguments and results as in `linnet.lightning_attention`."""
    return forward(q, k, v, decay, initial_state, cu_seqlens, implementation, silu)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    implementation: str,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    """Do what the operator does, for plain tensors without gradients.

    Going around the dispatcher saves a tenth of a millisecond at each call, and at the first one
    the seconds in which torch loads its compiler.
    """
    module = _choose(q, k, v, implementation)
    if module is not chunked:
        return module.forward(q, k, v, decay, initial_state, cu_seqlens, silu=silu)
    if silu:
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    return chunked.forward(q, k, v, decay, initial_state, cu_seqlens)


@lightning_attention_op.register_fake
def _(q, k, v, decay, initial_state, cu_seqlens, implementation, silu):
    return v.new_empty(v.shape), _empty_state(q, v, cu_seqlens)


@torch.library.custom_op("linnet::lightning_attention_backward", mutates_args=())
def backward_op(
    grad_o: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    implementation: str,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v and the initial state."""
    module = _choose(q, k, v, implementation)
    pre_activations = q, k, v
    if module is native:
        grads = native.backward(
            grad_o, grad_state, q, k, v, decay, initial_state, cu_seqlens, silu=silu
        )
    else:
        if silu:
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        grads = module.backward(grad_o, grad_state, q, k, v, decay, initial_state, cu_seqlens)
    if silu:
        silu_backward = torch.ops.aten.silu_backward
        grad_q, grad_k, grad_v = map(silu_backward, grads[:3], pre_activations)
        return grad_q, grad_k, grad_v, grads[3]
    return grads


@backward_op.register_fake
def _(grad_o, grad_state, q, k, v, decay, initial_state, cu_seqlens, implementation, silu):
    state = _empty_state(q, v, cu_seqlens)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), state


def _setup_context(ctx, inputs, output) -> None:
    del output
    ctx.save_for_backward(*inputs[:6])
    ctx.options = inputs[6:]


def _backward(ctx, grad_o: Tensor, grad_state: Tensor | None):
    q, k, v, decay, initial_state, cu_seqlens = ctx.saved_tensors
    grad_q, grad_k, grad_v, grad_initial = backward_op(
        grad_o, grad_state, q, k, v, decay, initial_state, cu_seqlens, *ctx.options
    )
    wants_state = initial_state is not None and ctx.needs_input_grad[4]
    return grad_q, grad_k, grad_v, None, grad_initial if wants_state else None, None, None, None


lightning_attention_op.register_autograd(_backward, setup_context=_setup_context)


def _choose(q: Tensor, k: Tensor, v: Tensor, implementation: str) -> ModuleType:
    if implementation == "chunked":
        return chunked
    is_asked_for = implementation != "auto"
    if not is_asked_for:
        implementation = "native" if q.device.type == "cpu" else "triton"
    module = {"native": native, "triton": triton}[implementation]
    reason = module.unsupported_reason(q, k, v)
    if reason is None:
        return module
    if is_asked_for:
        raise ValueError(f"backend {implementation!r} cannot be used: {reason}")
    _warn_once(implementation, reason)
    return chunked


@functools.cache
def _warn_once(implementation: str, reason: str) -> None:
    logger.warning("slower torch path of lightning_attention, not %s: %s", implementation, reason)


def _empty_state(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    num = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return q.new_empty(num, q.shape[2], q.shape[3], v.shape[3], dtype=wide_dtype(q.dtype))
