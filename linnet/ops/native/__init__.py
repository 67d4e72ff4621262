"""C++ kernels for the CPU, compiled at first use and called through ctypes.

Every kernel takes a pointer to one structure of plain pointers, sizes and strides, so a call costs
a few microseconds. They run on torch's own OpenMP threads.
"""

import ctypes
import functools
import logging

import torch

from linnet.ops.native.compiler import BuildError, Level, build, requested_level

__all__ = ["Level", "level", "library", "pointer"]

logger = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernels, or None if there are none; says why once at WARNING.

    Raises:
        ConfigError: LINNET_CPU_LEVEL names no level, or one that this processor cannot run.
    """
    wanted = requested_level()
    if wanted is None:
        return None
    try:
        kernels = ctypes.CDLL(str(build(wanted)))
    except (BuildError, OSError) as error:
        logger.warning("no native CPU kernels, the slower torch path is used: %s", error)
        return None
    if wanted == "amx" and not kernels.linnet_has_tiles():
        logger.warning("the operating system refuses AMX tiles; slower vectors are used instead")
    return kernels


def level() -> Level | None:
    """Return the level of the kernels in use, None if there are none."""
    return requested_level() if library() is not None else None


def pointer(tensor: torch.Tensor | None) -> int | None:
    """Return the address of a tensor's data for a `c_void_p` field."""
    return None if tensor is None else tensor.data_ptr()
