"""Compile the Triton kernels for Hopper on a machine without a GPU; a script, for a fresh process.

The interpreter accepts what the compiler refuses: a name that changes its type in a loop, a block
that no tensor core takes, more shared memory than there is.
"""

import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from linnet.ops import moe_triton
from linnet.ops.lightning_attention import triton as op
from linnet.ops.lightning_attention import triton_decode as decoding

SHARED_BYTES = 227 * 1024


class Hopper:
    """What Triton asks a driver before it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compile_instead_of_launching() -> None:
    driver.set_active(Hopper())
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        assert kernel.metadata.shared <= SHARED_BYTES, (self.__name__, kernel.metadata.shared)

    JITFunction.run = compile_only
    for module in (op, decoding):
        module.device_reason = lambda device: None
    moe_triton.unsupported_reason = lambda x, weights: None
    gpu = torch.device("meta")  # any that is not the CPU
    product, language_dtype = op.product, moe_triton._product_dtype
    for module in (op, decoding):
        module.product = lambda dtype, device: product(dtype, gpu)
    moe_triton._product_dtype = lambda x: language_dtype(x.to(gpu))


def compile_attention(dtype: torch.dtype, dim: int, heads: int) -> None:
    q, k, v = torch.randn(1, 70, heads, 3 * dim).to(dtype).chunk(3, -1)
    decay, state = torch.rand(heads), torch.randn(2, heads, dim, dim)
    offsets = torch.tensor([0, 3, 70])
    o, _ = op.forward(q, k, v, decay, state, offsets)
    op.backward(o, state, q, k, v, decay, state, offsets)
    op.forward(q, k, v, decay, None, None, silu=True)
    slots = torch.zeros(1, dtype=torch.int64)
    token = (x[:, :1] for x in (q, k, v))
    decoding.decode_slots(*token, decay, state, slots, fused_silu=True)
    decoding.verify_slots(q, k, v, decay, state, slots)
    decoding.commit_slots(k, v, decay, state, slots, slots)


def main() -> None:
    compile_instead_of_launching()
    compile_attention(torch.bfloat16, 128, heads=4)
    compile_attention(torch.bfloat16, 64, heads=1)
    compile_attention(torch.float16, 64, heads=2)
    op._num_processors, op.MIN_SEGMENT = lambda device: 132, 16
    compile_attention(torch.bfloat16, 40, heads=3)
    decoding.rms_norm_sigmoid_gate(*(torch.randn(2, 6144) for _ in range(2)), torch.ones(6144), 0.0)
    for rows, experts, dtype in [(20, 1, torch.bfloat16), (4096, 4, torch.bfloat16)]:
        x, gate_up = torch.randn(rows, 256).to(dtype), torch.randn(experts, 512, 256)
        down, offsets = torch.randn(experts, 256, 256), torch.tensor([0] * experts + [rows])
        y, hidden = moe_triton.ffn_forward(x, gate_up, down, offsets)
        moe_triton.ffn_backward(y, x, hidden, gate_up, down, offsets)


if __name__ == "__main__":
    sys.exit(main())
