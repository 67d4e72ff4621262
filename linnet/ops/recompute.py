"""Form a cheap intermediate again in the backward pass instead of keeping it.

Norms are a pass over memory; what they return is as large as their input, which is kept anyway.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class _Again(NamedTuple):
    """Stands for a view of a tensor that `form` makes."""

    form: Callable[[], Tensor]
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


@contextmanager
def recomputed(y: Tensor, form: Callable[[], Tensor]) -> Iterator[None]:
    """Within the context, autograd keeps no view of `y`, but calls `form` when it needs one.

    Not within a checkpointed function: the inputs that `form` holds would outlive it.

    Args:
        y: a dense tensor that `form` returns.
        form: called without gradients, once for each place where `y` was used; must return the
            same values at any time until the backward pass is over.
    """
    storage = y.untyped_storage().data_ptr()

    def pack(x: Tensor) -> Tensor | _Again:
        if x.untyped_storage().data_ptr() != storage:
            return x
        return _Again(form, x.size(), x.stride(), x.storage_offset())

    def unpack(kept: Tensor | _Again) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return kept.form().as_strided(kept.size, kept.stride, kept.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
