"""Triton kernels on the CPU: private, interpreted copies of kernel modules, for the tests.

A module is interpreted or compiled once and for all when it is imported, so the tests import a copy
of their own and leave the installed one to the rest of the suite.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import numpy as np
import pytest
import torch


def load_kernels(name: str) -> ModuleType:
    """Import a module of kernels; interpreted, and not the copy in `sys.modules`, without a GPU."""
    if torch.cuda.is_available():
        return importlib.import_module(name)
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        spec.loader.exec_module(module)
    return module


@contextmanager
def repaired_interpreter() -> Iterator[None]:
    """Mend what Triton's interpreter does not do as a GPU would, and halve its time."""
    from triton.runtime import interpreter

    convert, patch_tensor = interpreter._convert_float, interpreter._patch_lang_tensor
    dot = interpreter.InterpreterBuilder.create_dot

    def convert_rounding(data, source, target, mode):
        # It cuts digits off where the hardware rounds to the nearest.
        if str(source) == "fp32" and str(target) == "bf16":
            wide = torch.from_numpy(np.ascontiguousarray(data).view(np.float32))
            return wide.bfloat16().view(torch.uint16).numpy()
        return convert(data, source, target, mode)

    def dot_of_values(self, a, b, d, *args):
        # It multiplies the bits of bf16 numbers.
        a, b = (widened(self, x) for x in (a, b))
        return dot(self, a, b, d, *args)

    def widened(builder, x):
        is_bf16 = str(x.dtype.scalar) == "bf16"
        return builder.cast_impl(x, interpreter.tl.float32) if is_bf16 else x

    def patch_tensor_for_numpy(tensor, scope):
        # Triton 3.6 with numpy 2.4: an array of one element is no longer a Python number.
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def call(self, *args, **kwargs):
        # It patches the whole language again for every call between kernels.
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", convert_rounding)
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor_for_numpy)
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_of_values)
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        # A check of every sum and product of integers, by more of them.
        patch.setattr(
            interpreter.TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *args: None
        )
        yield
