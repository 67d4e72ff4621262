"""Which part of each parameter a rank holds, before any sharding by FSDP.

Parts are boxes: a range in every dimension. W1 and W3 of an expert are stacked in one parameter, so
that a range of its width would be two pieces; seen as [E, 2, F, D] it is one.
"""

from dataclasses import dataclass

from torch import Tensor

from linnet.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class Coordinates:
    """A rank's place on the axes that cut parameters."""

    tp: int = 0
    ep: int = 0
    etp: int = 0


@dataclass(frozen=True, slots=True)
class Box:
    """A range in every dimension of a whole parameter.

    Attributes:
        whole: shape of the whole parameter, with gate_up as [E, 2, F, D].
        start: where the range begins in each dimension.
        size: how long it is.
    """

    whole: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def of_whole(cls, shape: tuple[int, ...]) -> "Box":
        """Return the box that is all of a parameter."""
        return cls(shape, (0,) * len(shape), shape)

    def part(self, dim: int, rank: int, size: int) -> "Box":
        """Return one of `size` equal parts along a dimension."""
        length = self.size[dim] // size
        start = (*self.start[:dim], self.start[dim] + rank * length, *self.start[dim + 1 :])
        return Box(self.whole, start, (*self.size[:dim], length, *self.size[dim + 1 :]))

    def take(self, whole: Tensor) -> Tensor:
        """Return the view of this box in a whole parameter of any shape with the same elements."""
        ranges = zip(self.start, self.size, strict=True)
        return whole.view(self.whole)[tuple(slice(a, a + n) for a, n in ranges)]

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the parameter that holds this box alone: gate_up is [E, 2F, D] there."""
        if len(self.size) < 4:
            return self.size
        experts, both, width, hidden = self.size
        return experts, both * width, hidden

    def shard(self, dim: int, start: int, length: int) -> "Box":
        """Return a range of this box along a dimension of its parameter."""
        dim += len(self.size) - len(self.local_shape) if dim > 1 else 0
        begin = (*self.start[:dim], self.start[dim] + start, *self.start[dim + 1 :])
        return Box(self.whole, begin, (*self.size[:dim], length, *self.size[dim + 1 :]))


def whole_box(name: str, shape: tuple[int, ...]) -> Box:
    """Return the box that is all of a parameter of `Model`."""
    if name.endswith("experts.gate_up"):
        experts, width, hidden = shape
        return Box.of_whole((experts, 2, width // 2, hidden))
    return Box.of_whole(shape)


def local_box(name: str, shape: tuple[int, ...], layout: Layout, at: Coordinates) -> Box:
    """Return the box of a parameter that the rank at some coordinates holds.

    Args:
        name: of the parameter in `Model`.
        shape: of the whole.
        layout: sizes of the axes.
        at: the rank's coordinates.
    """
    box = whole_box(name, shape)
    if name.endswith(("experts.gate_up", "experts.down")):
        return box.part(0, at.ep, layout.ep).part(2, at.etp, layout.etp)
    if name.endswith(_BY_HEAD_ROWS):
        return box.part(0, at.tp, layout.tp)
    if name.endswith(_BY_HEAD_COLUMNS):
        return box.part(1, at.tp, layout.tp)
    return box


_BY_HEAD_ROWS = (
    "self_attn.qkv_proj.weight",
    "self_attn.output_gate.weight",
    "self_attn.norm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
)
_BY_HEAD_COLUMNS = ("self_attn.out_proj.weight", "self_attn.o_proj.weight")
