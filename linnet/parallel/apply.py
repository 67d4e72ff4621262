"""A model over the ranks of a mesh: built in parts, cut, joined by exchanges, and sharded.

The one-device model is changed from outside, always in this order:

1. stages: the layers of other pipeline stages go;
2. boxes: each parameter shrinks to what this rank holds (heads, experts, widths of experts);
3. heads: attention works on this rank's heads, and the ranks' results are added up;
4. experts: tokens go to the ranks of their experts, and capacity is that of all ranks' tokens;
5. rows: attention reaches over the ranks that share a row;
6. weights: filled part by part, from a seed or a folder; no rank ever holds the whole model;
7. shards: each part is sharded by FSDP as soon as it is filled, experts over edp, the rest over
   dp_shard x cp.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import Shard as ShardPlacement

from linnet.errors import ConfigError
from linnet.model.attention import LightningAttention, SoftmaxAttention
from linnet.model.config import ModelConfig
from linnet.model.layout import FP32_PARAMETERS
from linnet.model.transformer import Block, Model
from linnet.parallel import ring_attention
from linnet.parallel.context import ContextParallel, Shard
from linnet.parallel.exchange import Mode, Nodes
from linnet.parallel.expert import ExpertsAcrossRanks, GlobalRouter
from linnet.parallel.filling import Weights
from linnet.parallel.mesh import Mesh
from linnet.parallel.pipeline import Stage
from linnet.parallel.placement import Box, Coordinates, local_box
from linnet.parallel.split import split_row
from linnet.parallel.stages import stage_bounds
from linnet.parallel.tensor import share_heads


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchanges:
    """How things travel between ranks; all ways give the same result but for rounding."""

    states: Mode | Literal["auto"] = "auto"
    """Lightning states along a row: all_gather (LASP+), two_level or ring. "auto" is two_level
    where a row's ranks are whole nodes, several of them, and all_gather elsewhere."""
    node_size: int = 1
    """Neighboring ranks with fast links between them."""
    keys: ring_attention.Exchange = "ring"
    """Keys and values along a row: ring or gather."""
    balanced: bool = False
    """Whether each rank has an early and a late piece of a row."""
    token_groups: int = 2
    """Parts in which tokens go to their experts, so that exchanges overlap with computing."""


class ParallelModel:
    """A model over ranks, and where its parameters are.

    Args:
        config: of the whole model.
        mesh: the ranks; its layout must fit the model.
        weights: to be filled with.
        exchanges: how things travel.
        dtype: of the parameters; router and LM head are fp32 always.
        compute_dtype: of the activations.
        length: tokens of a sequence, for stages of equal cost.
        shards: whether FSDP is applied; inference does without.

    Attributes:
        model: this rank's part.
        mesh: the ranks.
        context: how rows are split; None if each rank has whole ones.
        boxes: by the parameters' names, where this rank's part, after FSDP, lies in the whole.
        parameters: by name, this rank's part, a DTensor where it is sharded by FSDP.
        replicas: by name, how many ranks hold the same part of a parameter.
        routers: the global routers of the layers.
        stage: what a pipeline runs.
        layers: numbers of this stage's layers.

    Raises:
        ConfigError: the layout does not divide the model.
        CheckpointError: the weights do not fit the config.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        weights: Weights,
        exchanges: Exchanges | None = None,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
        length: int = 8192,
        shards: bool = True,
    ) -> None:
        exchanges = Exchanges() if exchanges is None else exchanges
        mesh.layout.check_model(config)
        self.mesh, self.config = mesh, config
        with torch.device("meta"):
            self.model = Model(config, compute_dtype)
        self.is_first, self.is_last = mesh.rank("pp") == 0, mesh.rank("pp") == mesh.size("pp") - 1
        bounds = stage_bounds(config, mesh.size("pp"), length)
        self.layers = range(*bounds[mesh.rank("pp") : mesh.rank("pp") + 2])
        self._keep_stage()
        self.stage = Stage(self.model, self.is_first, self.is_last)
        self.boxes = self._cut(dtype)
        self.replicas = {name: self._replicas(name) for name in self.boxes}
        self.routers: list[GlobalRouter] = []
        self.context: ContextParallel | None = None
        self._connect(exchanges)
        self._fill(weights, shards and _is_sharded(mesh), reshards=mesh.size("pp") == 1)
        self.parameters = dict(self.model.named_parameters())
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor):
                self.boxes[name] = _shard_box(self.boxes[name], parameter)

    def _keep_stage(self) -> None:
        layers: dict[str, nn.Module] = self.model.layers._modules  # type: ignore[attr-defined]
        for number in range(self.config.num_hidden_layers):
            if number not in self.layers:
                del layers[str(number)]  # the others keep their names
        if not self.is_first:
            del self.model.embed_tokens
        if not self.is_last:
            del self.model.norm, self.model.lm_head

    def _cut(self, dtype: torch.dtype) -> dict[str, Box]:
        """Give every parameter the shape of this rank's part; return the parts."""
        at = Coordinates(*(self.mesh.rank(axis) for axis in ("tp", "ep", "etp")))
        boxes = {}
        for name, parameter in list(self.model.named_parameters()):
            box = local_box(name, tuple(parameter.shape), self.mesh.layout, at)
            keeps_fp32 = name.endswith(FP32_PARAMETERS) and dtype != torch.float64
            own = torch.float32 if keeps_fp32 else dtype
            _set(self.model, name, torch.empty(box.local_shape, dtype=own, device="meta"))
            boxes[name] = box
        return boxes

    def _connect(self, exchanges: Exchanges) -> None:
        """Let the layers exchange what crosses ranks."""
        mesh = self.mesh
        for layer in self.model.layers:
            attention, moe = layer.self_attn, layer.block_sparse_moe
            if mesh.size("tp") > 1:
                assert isinstance(attention, LightningAttention | SoftmaxAttention)
                share_heads(attention, mesh.group("tp"))
            moe.dispatch = ExpertsAcrossRanks(
                mesh, self.config.num_local_experts, exchanges.token_groups, moe.dispatch
            )
            if mesh.size("tokens") > 1:
                moe.admit = GlobalRouter(mesh.group("tokens"))
                self.routers.append(moe.admit)
        if mesh.size("cp") > 1:
            states, nodes = self._state_mode(exchanges)
            self.context = ContextParallel(
                mesh.group("cp"), exchanges.balanced, states, exchanges.keys, nodes
            )
            self.context.apply(self.model)

    def _state_mode(self, exchanges: Exchanges) -> tuple[Mode, Nodes | None]:
        """Return how states travel along a row.

        Raises:
            ConfigError: `two_level` without whole nodes, or pieces out of order in a ring.
        """
        if exchanges.balanced and exchanges.states == "ring":
            raise ConfigError("balanced rows exchange states at once: states = 'all_gather'")
        size = self.mesh.size("cp")
        per_node = exchanges.node_size // self.mesh.size("tp")  # tp ranks are the nearest
        has_nodes = 1 < per_node < size and size % per_node == 0 and not exchanges.balanced
        if exchanges.states == "two_level" and not has_nodes:
            raise ConfigError(
                f"states = 'two_level' wants rows over several whole nodes, in order; cp = {size} "
                f"ranks, {per_node} of them per node, balanced = {exchanges.balanced}"
            )
        if exchanges.states in ("two_level", "auto") and has_nodes:
            return "two_level", self.mesh.nodes(per_node)
        return "all_gather" if exchanges.states == "auto" else exchanges.states, None

    def _fill(self, weights: Weights, shards: bool, reshards: bool) -> None:
        for prefix, tensors in weights.parts(self.config, self.boxes):
            for name, tensor in tensors.items():
                meta = self.model.get_parameter(name)
                value = tensor.reshape(self.boxes[name].local_shape)
                _set(self.model, name, value.to(self.mesh.device, meta.dtype))
            if prefix and tensors and shards:
                block = self.model.get_submodule(prefix.rstrip("."))
                assert isinstance(block, Block)
                _shard_block(block, self.mesh, reshards)
        for module in self.model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self.mesh.device))
        if shards:
            root = self.model if self.mesh.size("pp") == 1 else self.stage
            fully_shard(root, mesh=self.mesh.fsdp_mesh(), reshard_after_forward=False)
            _sum_gradients(root)
            register_fsdp_forward_method(self.model, "hidden_states")

    def shard(self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor) -> Shard:
        """Return this rank's part of a row; arguments as of `ContextParallel.shard`."""
        tokens, targets = tokens.to(self.mesh.device), targets.to(self.mesh.device)
        if self.context is not None:
            return self.context.shard(tokens, targets, cu_seqlens)
        positions = split_row(cu_seqlens, 1).positions(0).to(self.mesh.device)
        return Shard(tokens, targets, positions, cu_seqlens)

    @property
    def least_tokens(self) -> int:
        """The fewest tokens that a row may have."""
        return 1 if self.context is None else self.context.size * (1 + self.context.is_balanced)

    def received_rows(self) -> list[int]:
        """Return the rows that this rank's experts had in the last pass, of each layer it has."""
        dispatches = [layer.block_sparse_moe.dispatch for layer in self.model.layers]
        return [d.received for d in dispatches if isinstance(d, ExpertsAcrossRanks)]

    def reshard(self) -> None:
        """Free what FSDP gathered and has not freed yet."""
        for module in self.stage.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def local(self, name: str) -> Tensor:
        """Return this rank's part of a parameter, as its box is shaped."""
        return local_part(self.parameters[name]).view(self.boxes[name].size)

    def _replicas(self, name: str) -> int:
        layout = self.mesh.layout
        if ".experts." in name:
            return 1
        by_head = self.boxes[name].size != self.boxes[name].whole
        return layout.dp_replicate * (1 if by_head else layout.tp)


def local_part(x: Tensor) -> Tensor:
    """Return what this rank holds of a tensor that may be sharded."""
    return x.to_local() if isinstance(x, DTensor) else x


def _shard_block(block: Block, mesh: Mesh, reshards: bool) -> None:
    experts = block.block_sparse_moe.experts
    # Along the hidden size, if that can be: a rank may have fewer experts than there are ranks.
    is_even = experts.down.shape[1] % mesh.size("edp") == 0
    dims = {id(experts.gate_up): 2, id(experts.down): 1}
    fully_shard(
        experts,
        mesh=mesh.expert_mesh(),
        reshard_after_forward=reshards,
        shard_placement_fn=lambda p: ShardPlacement(dims[id(p)] if is_even else 0),
    )
    fully_shard(block, mesh=mesh.fsdp_mesh(), reshard_after_forward=reshards)
    for module in (experts, block):
        _sum_gradients(module)


def _sum_gradients(module: nn.Module) -> None:
    """Add gradients up over the ranks: the loss is divided by the targets of all of them."""
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    # Otherwise the factor asks for an operation that gloo does not have.
    module.set_force_sum_reduction_for_comms(True)


def _shard_box(box: Box, parameter: DTensor) -> Box:
    """Return which part of a box this rank holds of a parameter that FSDP shards."""
    for dim, placement in enumerate(parameter.placements):
        if isinstance(placement, ShardPlacement):
            size, rank = parameter.device_mesh.size(dim), parameter.device_mesh.get_local_rank(dim)
            length = parameter.shape[placement.dim]
            step = -(-length // size)  # as torch.chunk cuts
            start = min(rank * step, length)
            box = box.shard(placement.dim, start, min(step, length - start))
    assert parameter.to_local().numel() == torch.Size(box.size).numel()
    return box


def _is_sharded(mesh: Mesh) -> bool:
    return mesh.size("tokens") > 1 or mesh.size("edp") > 1


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, nn.Parameter(value))
