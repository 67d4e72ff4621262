"""Compare the planner's bytes per rank with torch's memory tracker at 2,048 ranks.

    python scripts/check_plan_memory.py [--layers 3] [--tokens 1024] [--json]

One process plays rank 0 of a world of 2,048: the "fake" process group answers every collective at
once, tensors are fake (shapes without memory), and `FSDPMemTracker` sums what lives, by kind. The
model is MiniMax-M1 cut to a few layers, sharded as `linnet.parallel.apply` does it: experts over
edp, blocks over all ranks, embedding and LM head kept gathered. Compared are

- the shards of parameters, gradients and AdamW moments: arithmetic, to be equal to 1 percent;
- unsharded blocks with their gradients and buffers, at their peak in the backward pass;
- the activations that a block keeps.

Routing is replaced by an even one, since fake tensors hold no numbers that could route.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from linnet.model.config import LIGHTNING, SOFTMAX, ModelConfig
from linnet.model.moe import Experts
from linnet.model.presets import preset
from linnet.model.transformer import Model
from linnet.ops.moe import Routing, grouped_ffn
from linnet.parallel.layout import Layout
from linnet.parallel.mesh import Mesh
from linnet.parallel.plan.shape import stages_of
from linnet.parallel.plan.training_memory import (
    Microbatch,
    activation_bytes,
    gathered_bytes,
    training_memory,
)

WORLD, EP = 2048, 16
GATHERED = ("Unsharded Param", "All Gather", "Unsharded Grad", "Reduce Scatter", "Temp")
"""Kinds of the tracker; gradients of weights are "Temp" until they are where they belong."""

POLICY = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def cut_config(num_layers: int) -> ModelConfig:
    """Return MiniMax-M1 with fewer layers, of which the last is softmax attention."""
    kinds = (LIGHTNING,) * (num_layers - 1) + (SOFTMAX,)
    return dataclasses.replace(
        preset("minimax-m1"), num_hidden_layers=num_layers, attn_type_list=kinds
    )


def planned(config: ModelConfig, tokens: int) -> dict[str, float]:
    """Return the planner's bytes."""
    layout = Layout(dp_shard=WORLD, ep=EP)
    (stage,) = stages_of(config, 1, tokens)
    parts = training_memory(config, stage, layout, Microbatch(tokens, False, False))
    kept = {
        kind: sum(activation_bytes(config, kind, layout, tokens)) for kind in (LIGHTNING, SOFTMAX)
    }
    return {
        "parameters": parts["parameters"],
        "gradients": parts["gradients"],
        "AdamW moments": parts["AdamW moments"],
        "unsharded blocks": gathered_bytes(config, stage, layout),
        "kept by a lightning block": kept[LIGHTNING],
        # On the CPU keys and values are repeated for each query head, which no GPU kernel does.
        "kept by a softmax block": kept[SOFTMAX] + 2 * 2 * config.inner_size * tokens,
        "peak of all": sum(parts.values()),
    }


def tracked(config: ModelConfig, tokens: int) -> dict[str, float]:
    """Return the tracker's bytes."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD)
    mesh = Mesh(Layout(dp_shard=WORLD, ep=EP))
    meshes = mesh.fsdp_mesh(), mesh.expert_mesh()  # before tensors are fake
    in_model = patch("linnet.model.transformer.recomputed", _recomputed)
    with FakeTensorMode(), in_model, patch("linnet.ops.recomputed", _recomputed):
        model = _sharded(config, *meshes)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        tracker = _Tracker(model, optimizer)
        tracker.root_bytes = 4 * (2 * config.vocab_size + 1) * config.hidden_size
        tracker.head_bytes = 4 * config.vocab_size * config.hidden_size
        rows = torch.zeros(1, tokens, dtype=torch.int64)
        with tracker:
            shards = {}
            for step in range(2):  # the moments come with the first step
                loss = model(rows, logits_to_keep=1).sum()
                tracker.is_backward = True
                loss.backward()
                tracker.is_backward = False
                shards = _now(tracker)
                optimizer.step()
                optimizer.zero_grad()
                if step == 0:
                    tracker.reset_mod_stats()
            peak = _total(tracker, "peak")
    dist.destroy_process_group()
    blocks = [_moments(tracker, f"layers.{layer}") for layer in range(config.num_hidden_layers)]
    return {
        "parameters": shards["Sharded Param"],
        "gradients": shards["Sharded Grad"],
        "AdamW moments": shards["OptState"],
        "unsharded blocks": tracker.most_gathered,
        "kept by a lightning block": _kept(blocks[0]),
        "kept by a softmax block": _kept(blocks[-1]),
        "peak of all": peak,
    }


def _sharded(config: ModelConfig, everyone: DeviceMesh, edp: DeviceMesh) -> Model:
    model = Model(config, torch.bfloat16).eval()  # no statistics of a routing that is not there
    model._check = lambda *_: None  # it reads token ids
    for layer in model.layers:
        moe = layer.block_sparse_moe
        experts = moe.experts
        for name in ("gate_up", "down"):
            shape = getattr(experts, name).shape
            setattr(experts, name, nn.Parameter(torch.empty(shape[0] // EP, *shape[1:])))
        moe.dispatch = _evenly
        places = {id(experts.gate_up): Shard(2), id(experts.down): Shard(1)}
        shard = partial(fully_shard, mp_policy=POLICY)
        shard(experts, mesh=edp, shard_placement_fn=lambda p, at=places: at[id(p)])
        shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone, reshard_after_forward=False)
    return model


def _evenly(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """Apply the local experts to as many rows as a rank gets of an even routing."""
    top_k, num = routing.experts.shape[1], len(experts.gate_up)
    rows = x.repeat(top_k, 1)
    offsets = torch.empty(num + 1, dtype=torch.int64)
    y = grouped_ffn(rows, experts.gate_up, experts.down, offsets).view(top_k, *x.shape)
    return (y * routing.weights.T[..., None].to(x.dtype)).sum(0)


@contextmanager
def _recomputed(y: Tensor, form: Callable[[], Tensor]) -> Iterator[None]:
    """Stand in for `ops.recomputed`: fake tensors have no addresses to compare."""
    storage = y.untyped_storage()._cdata

    def pack(x: Tensor):
        if x.untyped_storage()._cdata != storage:
            return x
        return x.size(), x.stride(), x.storage_offset()

    def unpack(kept):
        return kept if isinstance(kept, Tensor) else form().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _now(tracker: FSDPMemTracker) -> dict[str, int]:
    (snapshot,) = tracker.get_tracker_snapshot("current").values()
    return {getattr(kind, "value", kind): size for kind, size in snapshot.items()}


def _total(tracker: FSDPMemTracker, which: str) -> int:
    (snapshot,) = tracker.get_tracker_snapshot(which).values()
    return snapshot["Total"]


def _moments(tracker: FSDPMemTracker, name: str) -> dict[str, dict[str, int]]:
    """Return the tracker's snapshots of a module by moment."""
    (stats,) = (s for s in tracker.memory_tracking.values() if s.mod_fqn.endswith("." + name))
    result = {}
    for moment, snapshots in stats.snapshots.items():
        (snapshot,) = snapshots[0].values()
        result[moment.value] = {getattr(k, "value", k): size for k, size in snapshot.items()}
    return result


def _kept(moments: dict[str, dict[str, int]]) -> float:
    before, after = moments["Before Pre-Forward"], moments["After Post-Forward"]
    return after["Activation"] - before["Activation"]


class _Tracker(FSDPMemTracker):
    """Also keeps the most that blocks had gathered, with gradients and buffers, in backward.

    That of embedding, LM head and final norm is left out: they are gathered before, and reduced
    when no block is left; of them the LM head's gradient alone lives meanwhile.
    """

    root_bytes = head_bytes = 0
    is_backward = False
    most_gathered = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for snapshot in self.get_tracker_snapshot("current").values():
            sizes = {getattr(kind, "value", kind): size for kind, size in snapshot.items()}
            is_at_end = max(sizes["Unsharded Grad"], sizes["Temp"]) >= 2 * self.head_bytes
            if self.is_backward and not is_at_end:
                most = sum(sizes[kind] for kind in GATHERED) - self.root_bytes - self.head_bytes
                self.most_gathered = max(self.most_gathered, most)
        return result


def compare(num_layers: int, tokens: int) -> dict[str, dict[str, float]]:
    """Return the bytes of both, and their ratio."""
    config = cut_config(num_layers)
    ours, theirs = planned(config, tokens), tracked(config, tokens)
    return {
        part: {"planned": ours[part], "tracked": theirs[part], "ratio": ours[part] / theirs[part]}
        for part in ours
    }


def main() -> int:
    """Print the comparison; fail if the shards differ by more than 1 percent."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1024, help="per rank")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = compare(args.layers, args.tokens)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(f"{args.layers} layers, {args.tokens:,} tokens per rank, {WORLD:,} ranks, ep={EP}")
        for part, row in found.items():
            sizes = f"{row['planned'] / 2**20:12,.2f} {row['tracked'] / 2**20:12,.2f} MiB"
            print(f"{part:28}{sizes}{row['ratio']:9.4f}")
    shards = ("parameters", "gradients", "AdamW moments")
    return 0 if all(abs(found[part]["ratio"] - 1) < 0.01 for part in shards) else 1


if __name__ == "__main__":
    sys.exit(main())
