"""The process groups of a layout: for each axis, the ranks that differ in this axis alone.

Some axes act together, and have a group of their own:

    fsdp      dp_shard x cp                 over which dense weights are sharded
    tokens    dp_replicate x dp_shard x cp  that hold different tokens: loss and router count here
    experts   ep x etp                      that hold all experts once
    rows      cp x tp                       that read the same row
"""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from linnet.parallel.exchange import Nodes
from linnet.parallel.layout import DENSE_AXES, SPARSE_AXES, Layout

_JOINT = {
    "fsdp": ("dp_shard", "cp"),
    "tokens": ("dp_replicate", "dp_shard", "cp"),
    "rows": ("cp", "tp"),
    "experts": ("ep", "etp"),
}

CPU = torch.device("cpu")


class Mesh:
    """The groups that this rank is in.

    Args:
        layout: sizes of the axes.
        ranks: the global ranks, in the order of the layout; all of the world if None. Each of
            these, and no other, makes the mesh.
        device: of this rank's tensors.
        timeout: after which a collective that somebody does not enter fails; torch's default if
            None.

    Raises:
        ValueError: the layout has another number of ranks.
    """

    def __init__(
        self,
        layout: Layout,
        ranks: Sequence[int] | None = None,
        device: torch.device = CPU,
        timeout: timedelta | None = None,
    ) -> None:
        ranks = range(dist.get_world_size()) if ranks is None else ranks
        if len(ranks) != layout.world_size:
            raise ValueError(f"{layout} has {layout.world_size} ranks; got {len(ranks)}")
        self.layout, self.device, self._timeout = layout, device, timeout
        dense = torch.tensor(list(ranks)).view([getattr(layout, axis) for axis in DENSE_AXES])
        sparse = dense.view([getattr(layout, axis) for axis in SPARSE_AXES])
        self._ranks: dict[str, list[int]] = {}
        for cut, axes in ((dense, DENSE_AXES), (sparse, SPARSE_AXES)):
            place = (cut == dist.get_rank()).nonzero()[0].tolist()
            joint = {name: parts for name, parts in _JOINT.items() if set(parts) <= set(axes)}
            for name, parts in {**{axis: (axis,) for axis in axes}, **joint}.items():
                index = tuple(
                    slice(None) if axis in parts else at
                    for axis, at in zip(axes, place, strict=True)
                )
                self._ranks[name] = cut[index].flatten().tolist()
        self._ranks["world"] = list(ranks)
        self._groups = {name: self._make(members, timeout) for name, members in self._unique()}

    def _unique(self) -> list[tuple[str, list[int]]]:
        """Return the axes, one of those that have the same ranks, in an order all ranks share."""
        seen: dict[tuple[int, ...], str] = {}
        for name, members in self._ranks.items():
            seen.setdefault(tuple(members), name)
        self._same = {name: seen[tuple(members)] for name, members in self._ranks.items()}
        return [(name, list(members)) for members, name in seen.items()]

    def _make(self, members: list[int], timeout: timedelta | None) -> dist.ProcessGroup:
        # Only the members call: at 2,048 ranks everyone would else make every group.
        group = dist.new_group(members, timeout=timeout, use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def group(self, axis: str) -> dist.ProcessGroup:
        """Return the group of an axis, or of axes that act together."""
        return self._groups[self._same[axis]]

    def size(self, axis: str) -> int:
        """Return how many ranks an axis has."""
        return len(self._ranks[axis])

    def rank(self, axis: str) -> int:
        """Return this rank's place in an axis."""
        return self._ranks[axis].index(dist.get_rank())

    def nodes(self, size: int) -> Nodes:
        """Return the groups of a two-level exchange along a row; all cp ranks call this.

        Args:
            size: neighboring cp ranks in a node; it divides their number.
        """
        ranks, own = self._ranks["cp"], self.rank("cp")
        node = own // size
        within = self._make(ranks[node * size : (node + 1) * size], self._timeout)
        return Nodes(size, within, self._make(ranks[own % size :: size], self._timeout))

    def fsdp_mesh(self) -> DeviceMesh:
        """Return the mesh over which dense weights are sharded, and replicated if asked for."""
        if self.layout.dp_replicate == 1:
            return DeviceMesh.from_group(self.group("fsdp"), self.device.type)
        mesh = torch.tensor(self._ranks["tokens"]).view(self.layout.dp_replicate, -1)
        groups = [self.group("dp_replicate"), self.group("fsdp")]
        names = ("dp_replicate", "fsdp")
        return DeviceMesh.from_group(groups, self.device.type, mesh=mesh, mesh_dim_names=names)

    def expert_mesh(self) -> DeviceMesh:
        """Return the mesh over which each part of the experts is sharded."""
        return DeviceMesh.from_group(self.group("edp"), self.device.type)
