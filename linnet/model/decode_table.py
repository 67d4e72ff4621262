"""What the native decode step needs to know of a model: the addresses of its parameters.

The C++ side reads them where they lie. The table is made from everything that `_Reader` looks up,
and is out of date as soon as any of that is not what it was.
"""

from collections.abc import Sequence
from contextlib import suppress
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linnet.model.attention import LightningAttention, SoftmaxAttention
from linnet.model.config import SOFTMAX, ModelConfig
from linnet.model.layers import Embedding, Linear, RMSNorm
from linnet.model.moe import Experts, MixtureOfExperts, SharedExpert, dispatch_locally
from linnet.model.quantize import Int8Experts, Int8Linear, dispatch_int8
from linnet.ops import lightning_attention, softmax_attention
from linnet.ops.native import decode as native
from linnet.ops.rotary import inverse_frequency

if TYPE_CHECKING:
    from linnet.model.transformer import Model

_FLOATS = (torch.float32, torch.bfloat16)


class _Unsupported(Exception):
    """The torch path has to run this model."""


def _require(condition: bool) -> None:
    if not condition:
        raise _Unsupported


class DecodeTable:
    """The C structures of one model; `native` is None if the torch path has to run it."""

    def __init__(self, model: "Model") -> None:
        self._reader = _Reader()
        self.native: native.Model | None = None
        with suppress(_Unsupported):
            self.native = self._read(model)
        self._reader.note_layouts()

    def is_current(self) -> bool:
        """Return whether the table still describes its model."""
        return self._reader.is_current()

    def _read(self, model: "Model") -> native.Model:
        from linnet.model.transformer import Block

        read = self._reader
        read.watch_calls(model)
        config = read.get(model, "config")
        _require(read.get(model, "compute_dtype") in _FLOATS)
        size, vocab = config.hidden_size, config.vocab_size
        blocks = read.get(model, "layers")
        _require(len(blocks) == config.num_hidden_layers)
        layers = (native.Layer * len(blocks))()
        for index, kind in enumerate(config.attn_type_list):
            block = read.module(blocks, str(index), Block)
            self._read_feed_forward(block, config, layers[index])
            self._read_attention(block, config, kind == SOFTMAX, layers[index])
        embedding = read.module(model, "embed_tokens", Embedding)
        self._frequency = inverse_frequency(
            config.rotary_dim, config.rope_theta, torch.device("cpu")
        )
        return native.Model(
            layers,
            native.Weight.of(read.tensor(embedding, "weight", (vocab, size))),
            self._norm(model, "norm", size),
            self._matrix(model, "lm_head", vocab, size),
            self._frequency.data_ptr(),
            config.num_hidden_layers,
            vocab,
            size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.rotary_dim,
            config.num_local_experts,
            config.num_experts_per_tok,
            config.intermediate_size,
            config.shared_intermediate_size,
            model.compute_dtype == torch.bfloat16,
        )

    def _read_attention(
        self, block: nn.Module, config: ModelConfig, is_softmax: bool, layer: native.Layer
    ) -> None:
        read, size, inner = self._reader, config.hidden_size, config.inner_size
        layer.alpha, layer.beta = read.get(block, "attention_factors")
        layer.input_norm = self._norm(block, "input_layernorm", size)
        if is_softmax:
            attention = read.module(block, "self_attn", SoftmaxAttention)
            _require(read.get(attention, "attend") is softmax_attention)
            kv_size = config.num_key_value_heads * config.head_dim
            rows = {"q_proj": inner, "k_proj": kv_size, "v_proj": kv_size}
            layer.output = self._matrix(attention, "o_proj", size, inner)
        else:
            attention = read.module(block, "self_attn", LightningAttention)
            _require(read.get(attention, "attend") is lightning_attention)
            rows = {"qkv_proj": 3 * inner, "output_gate": inner}
            layer.output = self._matrix(attention, "out_proj", size, inner)
            layer.inner_norm = self._norm(attention, "norm", inner)
            slopes = read.tensor(attention, "decay", (config.num_attention_heads,), _FLOATS[:1])
            layer.slopes = slopes.data_ptr()
        for place, (name, num_rows) in enumerate(rows.items()):
            layer.inputs[place] = self._matrix(attention, name, num_rows, size)

    def _read_feed_forward(
        self, block: nn.Module, config: ModelConfig, layer: native.Layer
    ) -> None:
        read, size, width = self._reader, config.hidden_size, config.intermediate_size
        num_experts = config.num_local_experts
        layer.is_postnorm = read.get(block, "postnorm")
        layer.mlp_alpha, layer.mlp_beta = read.get(block, "mlp_factors")
        layer.post_norm = self._norm(block, "post_attention_layernorm", size)
        moe = read.module(block, "block_sparse_moe", MixtureOfExperts)
        _require(read.get(moe, "top_k") == config.num_experts_per_tok)
        layer.router = self._matrix(moe, "gate", num_experts, size)
        experts = read.module(moe, "experts", Experts, Int8Experts)
        is_int8 = isinstance(experts, Int8Experts)
        _require(read.get(moe, "dispatch") is (dispatch_int8 if is_int8 else dispatch_locally))
        layer.gate_up = self._weight(experts, "gate_up", (num_experts, 2 * width, size))
        layer.down = self._weight(experts, "down", (num_experts, size, width))
        if not config.shared_intermediate_size:
            read.watch_absence(block, "shared_mlp")
            return
        width = config.shared_intermediate_size
        shared = read.module(block, "shared_mlp", SharedExpert)
        layer.shared_gate = self._matrix(shared, "gate_proj", width, size)
        layer.shared_up = self._matrix(shared, "up_proj", width, size)
        layer.shared_down = self._matrix(shared, "down_proj", size, width)
        layer.coefficient = self._matrix(block, "coefficient", 1, size)

    def _norm(self, owner: nn.Module, name: str, size: int) -> native.Norm:
        norm = self._reader.module(owner, name, RMSNorm)
        weight = self._reader.tensor(norm, "weight", (size,))
        return native.Norm(native.Weight.of(weight), self._reader.get(norm, "eps"))

    def _matrix(
        self, owner: nn.Module, name: str, num_rows: int, num_columns: int
    ) -> native.Weight:
        linear = self._reader.module(owner, name, Linear, Int8Linear)
        return self._weight(linear, "weight", (num_rows, num_columns))

    def _weight(self, owner: nn.Module, name: str, shape: tuple[int, ...]) -> native.Weight:
        if not isinstance(owner, Int8Linear | Int8Experts):
            return native.Weight.of(self._reader.tensor(owner, name, shape))
        scale = self._reader.tensor(owner, f"{name}_scale", shape[:-1], _FLOATS[:1])
        return native.Weight.of(self._reader.tensor(owner, name, shape, (torch.int8,)), scale)


class _Reader:
    """Looks attributes up and remembers where each came from and what it was."""

    def __init__(self) -> None:
        # Any: whatever attributes hold. Lists, not pairs: the caches are cold at every step.
        self._places: list[dict[str, Any]] = []
        self._names: list[str] = []
        self._values: list[Any] = []
        self._tensors: list[Tensor] = []
        self._layout: tuple[list, ...] = ()
        self._hooks: list[dict[int, Any]] = []

    def get(self, owner: nn.Module, name: str) -> Any:  # Any: see above
        """Return an attribute, parameter, buffer or child of a module."""
        for place in (owner.__dict__, owner._parameters, owner._buffers, owner._modules):
            if name in place:
                self._watch(place, name)
                return place[name]
        raise _Unsupported

    def module(self, owner: nn.Module, name: str, *kinds: type[nn.Module]) -> Any:  # Any: a kind
        """Return a child of exactly one of these classes, whose `forward` is that of the class."""
        child = self.get(owner, name)
        _require(type(child) in kinds)
        self.watch_calls(child)
        return child

    def watch_calls(self, module: nn.Module) -> None:
        """Notice a hook, and a `forward` other than that of the class."""
        hooks = (module._forward_hooks, module._forward_pre_hooks)
        _require(not any(hooks) and "forward" not in module.__dict__)
        self._hooks += hooks
        self._watch(module.__dict__, "forward")

    def watch_absence(self, owner: nn.Module, name: str) -> None:
        """Notice a child where there is none."""
        _require(name not in owner._modules)
        self._watch(owner._modules, name)

    def tensor(
        self,
        owner: nn.Module,
        name: str,
        shape: tuple[int, ...],
        dtypes: Sequence[torch.dtype] = _FLOATS,
    ) -> Tensor:
        """Return a parameter or buffer that the kernels can read."""
        tensor = self.get(owner, name)
        _require(type(tensor) in (nn.Parameter, Tensor))
        self._tensors.append(tensor)
        _require(tensor.shape == shape and tensor.dtype in dtypes)
        _require(tensor.is_cpu and tensor.is_contiguous())
        return tensor

    def note_layouts(self) -> None:
        """Remember where all tensors lie."""
        self._layout = self._layouts()

    def is_current(self) -> bool:
        """Return whether every attribute is the same object, and every tensor where it was."""
        return (
            all(map(is_, map(dict.get, self._places, self._names), self._values))
            and not any(self._hooks)
            and self._layouts() == self._layout
        )

    def _watch(self, place: dict[str, Any], name: str) -> None:
        self._places.append(place)
        self._names.append(name)
        self._values.append(place.get(name))

    def _layouts(self) -> tuple[list, ...]:
        # Three calls per tensor without Python between them: this runs at every step.
        return (
            list(map(Tensor.data_ptr, self._tensors)),
            list(map(_dtype_of, self._tensors)),
            list(map(Tensor.is_contiguous, self._tensors)),
        )


_dtype_of = attrgetter("dtype")
