"""int8 weights with one scale per output channel, for inference (SPEC section 4: W8A16).

    W[n, d] ~ scale[n] q[n, d]        scale[n] = max_d |W[n, d]| / 127

Router gates, the shared expert's coefficient, LM head, embedding and norms stay as they are, as in
the published recipe: they are small, and the choice of experts and tokens hangs on them.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from linnet.errors import TrainingError
from linnet.model.layers import Linear
from linnet.model.moe import Experts, MixtureOfExperts
from linnet.ops.matmul import product_dtype, wide_dtype
from linnet.ops.moe import Routing

if TYPE_CHECKING:
    from linnet.model.transformer import Model

Quantization = Literal["int8"]

KEPT = ("gate", "coefficient", "lm_head")
"""Linear maps that are not quantized."""


class _Int8(nn.Module):
    """int8 matrices with fp32 scales, both buffers: there is nothing to train."""

    def _add(self, name: str, weight: Tensor) -> None:
        values, scale = quantize_rows(weight)
        self.register_buffer(name, values)
        self.register_buffer(f"{name}_scale", scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scales = {name: getattr(self, name) for name in self._buffers if name.endswith("_scale")}
        super()._apply(fn, recurse)
        # fp32 whatever `model.to(...)` asks for.
        for name, scale in scales.items():
            setattr(self, name, scale.to(getattr(self, name).device))
        return self

    def _refuse_gradients(self, x: Tensor) -> None:
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            raise TrainingError(
                "int8 weights have no gradients: train the model before it is quantized, "
                "and call eval() on one that is"
            )


class Int8Linear(_Int8):
    """A `Linear` with int8 weights.

    Args:
        linear: the map to be replaced.
    """

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self._add("weight", linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., out_features]."""
        self._refuse_gradients(x)
        return _product(x, self.weight, self.weight_scale)


class Int8Experts(_Int8):
    """`Experts` with int8 weights; each is widened when it has tokens, one after the other.

    Args:
        experts: to be replaced.
    """

    gate_up: Tensor
    gate_up_scale: Tensor
    down: Tensor
    down_scale: Tensor

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self._add("gate_up", experts.gate_up)
        self._add("down", experts.down)

    def forward(self, x: Tensor, routing: Routing, dispatch: Callable[..., Tensor]) -> Tensor:
        """Apply the routed experts to tokens [T, D]."""
        return dispatch(x, routing, self)

    def apply_one(self, x: Tensor, expert: int) -> Tensor:
        """Apply one expert to rows [R, D] -> [R, D]."""
        self._refuse_gradients(x)
        hidden = _product(x, self.gate_up[expert], self.gate_up_scale[expert])
        gate, up = hidden.chunk(2, -1)
        return _product(F.silu(gate) * up, self.down[expert], self.down_scale[expert])


def dispatch_int8(x: Tensor, routing: Routing, experts: Int8Experts) -> Tensor:
    """Apply the routed experts to tokens [T, D] and add up the weighted results."""
    y = x.new_zeros(x.shape, dtype=wide_dtype(x.dtype))
    for expert in routing.experts.unique().tolist():
        tokens, choices = torch.where(routing.experts == expert)
        weights = routing.weights[tokens, choices, None]
        y.index_add_(0, tokens, experts.apply_one(x[tokens], expert) * weights)
    return y.to(x.dtype)


def quantize_int8(model: "Model") -> "Model":
    """Replace the weights of projections and experts by int8 ones, in place, and return the model.

    What is left can neither be trained nor saved. A model that is quantized already stays as it is.

    Args:
        model: on any device, with weights.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    # Names, not modules: each weight is freed as soon as it is replaced.
    for path in [path for path, _ in model.named_modules()]:
        module = model.get_submodule(path)
        owner, _, name = path.rpartition(".")
        if isinstance(module, MixtureOfExperts) and type(module.experts) is Experts:
            moe: Any = module  # Any: what stands in for the experts is no `Experts`
            moe.experts, moe.dispatch = Int8Experts(module.experts), dispatch_int8
        elif type(module) is Linear and name not in KEPT:
            setattr(model.get_submodule(owner), name, Int8Linear(module))
    return model.requires_grad_(False).eval()


def is_quantized(model: "Model") -> bool:
    """Return whether a model has int8 weights."""
    return any(isinstance(module, _Int8) for module in model.modules())


@torch.no_grad()
def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 255 steps, symmetric around 0.

    Args:
        weight: [..., N, D] of any floating dtype.

    Returns:
        int8 [..., N, D] and fp32 scales [..., N]; their product is within half a step of `weight`.

    Raises:
        ValueError: a weight is NaN or infinite.
    """
    values = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(weight.shape[:-1], dtype=torch.float32, device=weight.device)
    # One matrix at a time: the fp32 copies of all experts together would take twice their memory.
    for matrix, out, scales in zip(
        *(x.flatten(0, -3) if x.ndim > 2 else x[None] for x in (weight, values)),
        scale.reshape(-1, scale.shape[-1]),
        strict=True,
    ):
        wide = matrix.float()
        largest = wide.abs().amax(-1)
        if not largest.is_meta and not largest.isfinite().all():
            raise ValueError("weights that are NaN or infinite cannot be quantized")
        scales.copy_(largest / 127)
        scales.masked_fill_(scales == 0, 1.0)  # rows of zeros: any scale will do
        out.copy_((wide / scales[:, None]).round_().clamp_(-127, 127))
    return values, scale


def _product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return `x @ (scale * weight).T` in the dtype of `x`; int8 is exact in bf16 and fp32."""
    dtype = product_dtype(x.dtype, x.device)
    return (F.linear(x.to(dtype), weight.to(dtype)) * scale).to(x.dtype)
