"""Draw the pictures of docs/parallelism.md, one per axis of parallelism.

    python scripts/parallelism_pictures.py [--out docs/images]

What is drawn is computed by the code that it explains: coordinates by the arithmetic of `Layout`,
stages by their cost, the carry of states and the ring of keys by the split of a packed row, the
part of a weight that a rank holds by its box. Writes parallelism-{cuts,pp,dp,cp,tp,experts}.png.
"""

import argparse
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from linnet.model.config import SOFTMAX
from linnet.model.presets import preset
from linnet.parallel.layout import DENSE_AXES, SPARSE_AXES, Layout
from linnet.parallel.placement import Coordinates, local_box
from linnet.parallel.split import SequenceSplit
from linnet.parallel.stages import layer_costs, stage_bounds
from linnet.train.charts import COLORS, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OUT = Path(__file__).parents[1] / "docs" / "images"
WIDTH = 9.6
"""Inches; at 150 dots each, twice the width of a page's column."""

RANKS = (COLORS["series-1"], COLORS["series-2"], COLORS["series-3"], "#7b4fa3")
PALE = ("#cfe0f3", "#f6d9c6", "#cfe8d8", "#e2d5ee")
EMPTY = "#f3f5f7"
INK, MUTED, GRID = COLORS["ink"], COLORS["muted"], COLORS["grid"]
STYLE = {"font.size": 10, "text.color": INK}

WORLD = Layout(pp=2, dp_shard=2, cp=2, tp=2, ep=2, etp=2)
"""The 16 ranks of the pictures of the cuts and of the experts."""
MEANINGS = {
    "pp": "layers",
    "dp_replicate": "copies",
    "dp_shard": "rows, weights",
    "cp": "tokens of a row",
    "tp": "heads",
    "edp": "weights of experts",
    "ep": "experts",
    "etp": "widths of experts",
}
DOCUMENTS = (0, 9, 30, 34, 37, 48)
"""A packed row of five documents, some of which cross ranks."""


def main() -> None:
    """Draw all pictures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    for path in draw_all(args.out):
        print(f"wrote {path}")


def draw_all(folder: Path) -> list[Path]:
    """Write every picture into a folder; return the files."""
    from matplotlib import rc_context

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, draw in PICTURES.items():
        path = folder / f"parallelism-{name}.png"
        with rc_context(STYLE):
            to_png(draw(), path)
        paths.append(path)
    return paths


def canvas(width: float, height: float, inches: float) -> "tuple[Figure, Axes]":
    """Return a figure with one drawing area of some units, without frame."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, inches))
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: "Axes",
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    face: str = EMPTY,
    edge: str = "white",
    color: str = INK,
    size: float = 10,
) -> None:
    """Draw a rectangle with text in its middle."""
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x, y), width, height, facecolor=face, edgecolor=edge, linewidth=1.2))
    label(axes, x + width / 2, y + height / 2, text, color=color, size=size)


def label(
    axes: "Axes",
    x: float,
    y: float,
    text: str,
    color: str = INK,
    size: float = 10,
    ha: str = "center",
    weight: str = "normal",
) -> None:
    """Write text around a point."""
    axes.text(x, y, text, ha=ha, va="center", color=color, fontsize=size, fontweight=weight)


def arrow(
    axes: "Axes",
    start: tuple[float, float],
    end: tuple[float, float],
    color: str = MUTED,
    bend: float = 0.0,
    style: str = "-|>",
    width: float = 1.4,
) -> None:
    """Draw an arrow between two points."""
    axes.annotate(
        "",
        xy=end,
        xytext=start,
        arrowprops={
            "arrowstyle": style,
            "color": color,
            "linewidth": width,
            "connectionstyle": f"arc3,rad={bend}",
            "shrinkA": 0,
            "shrinkB": 0,
        },
    )


def places(layout: Layout, axes: Sequence[str]) -> Iterator[dict[str, int]]:
    """Yield every rank's coordinates: the last axis counts fastest."""
    sizes = [range(getattr(layout, axis)) for axis in axes]
    for place in itertools.product(*sizes):
        yield dict(zip(axes, place, strict=True))


def cuts() -> "Figure":
    """One world of ranks, cut by the dense axes above and by the sparse ones below."""
    world, left = WORLD, 5.2
    figure, axes = canvas(left + world.world_size + 4.4, 12.6, 4.4)
    for axes_of, y, name in ((DENSE_AXES, 12.0, "dense cut"), (SPARSE_AXES, 0.6, "sparse cut")):
        sizes = " x ".join(str(getattr(world, axis)) for axis in axes_of)
        what = "attention, norms, embedding, LM head" if axes_of is DENSE_AXES else "experts"
        label(axes, left - 0.3, y, name, ha="right", weight="bold")
        label(axes, left, y, f"{world.world_size} = {sizes}: {what}", MUTED, ha="left")
    for rank in range(world.world_size):
        box(axes, left + rank, 5.4, 1, 1, str(rank), face=INK, color="white", size=11)
    label(axes, left - 0.3, 5.9, "ranks", ha="right", weight="bold")
    for axes_of, first, step in ((DENSE_AXES, 10.5, -1.0), (SPARSE_AXES, 1.3, 1.0)):
        ranks = list(places(world, axes_of))
        for number, axis in enumerate(axes_of):
            x, y, size = left, first + step * number, getattr(world, axis)
            outer = axes_of[: number + 1]
            for at, run in itertools.groupby(ranks, lambda at, o=outer: [at[a] for a in o]):
                length = len(list(run))
                text = str(at[-1]) if length < 2 else f"{axis} {at[-1]}"
                box(axes, x, y, length, 0.9, text, face=PALE[at[-1]] if size > 1 else EMPTY)
                x += length
            label(axes, left - 0.3, y + 0.45, f"{axis} = {size}", ha="right")
            label(axes, x + 0.3, y + 0.45, MEANINGS[axis], MUTED, ha="left")
    return figure


class Turn(NamedTuple):
    """One forward or backward pass of a stage."""

    stage: int
    number: int
    is_forward: bool
    start: float
    stop: float


def turns_of_stage(stage: int, num_stages: int, num_batches: int) -> list[tuple[bool, int]]:
    """Return a stage's passes in the order of 1F1B: (is forward, micro-batch)."""
    first = min(num_batches, num_stages - stage)
    order = [(True, n) for n in range(first)]
    for n in range(num_batches):
        order.append((False, n))
        if first + n < num_batches:
            order.append((True, first + n))
    return order


def timeline(costs: Sequence[float], num_batches: int) -> list[Turn]:
    """Return when each pass runs: after the one before it, and what it needs of a neighbor.

    Args:
        costs: of a forward pass of each stage; a backward pass takes twice as long.
        num_batches: of a step.
    """
    waiting = [turns_of_stage(stage, len(costs), num_batches) for stage in range(len(costs))]
    free = [0.0] * len(costs)
    done: dict[tuple[int, bool, int], float] = {}
    turns = []
    while any(waiting):
        for stage, order in enumerate(waiting):
            if not order:
                continue
            is_forward, number = order[0]
            neighbor = stage - 1 if is_forward else stage + 1
            needs = (neighbor, is_forward, number)
            if 0 <= neighbor < len(costs) and needs not in done:
                continue
            start = max(free[stage], done.get(needs, 0.0))
            free[stage] = start + costs[stage] * (1 if is_forward else 2)
            done[stage, is_forward, number] = free[stage]
            turns.append(Turn(stage, number, is_forward, start, free[stage]))
            order.pop(0)
    return turns


def pipeline() -> "Figure":
    """Stages of layers, cut by cost, and the order of their passes."""
    config, num_stages, num_batches, length = preset("minimax-m1"), 4, 6, 131_072
    layers = layer_costs(config, length)
    bounds = stage_bounds(config, num_stages, length)
    figure, axes = canvas(100, 100, 4.8)
    left, width, base = 9.0, 90.0, 71.0
    step = width / len(layers)
    for stage, (start, stop) in enumerate(itertools.pairwise(bounds)):
        for number in range(start, stop):
            is_softmax = config.attn_type_list[number] == SOFTMAX
            height = 16 * layers[number] / max(layers)
            face = RANKS[stage] if is_softmax else PALE[stage]
            box(axes, left + number * step, base, step, height, face=face)
        middle = left + (start + stop) / 2 * step
        text = f"stage {stage}: {stop - start} layers"
        label(axes, middle, base - 4, text, RANKS[stage], weight="bold")
    label(axes, left, 96, "MiniMax-M1 at 131,072 tokens: FLOPs of each layer", ha="left")
    label(
        axes,
        left,
        91,
        "dark: softmax attention; the last stage also has the LM head",
        MUTED,
        ha="left",
    )
    costs = [float(sum(layers[a:b])) for a, b in itertools.pairwise(bounds)]
    costs[-1] += 2 * config.vocab_size * config.hidden_size
    turns = timeline(costs, num_batches)
    scale = width / max(turn.stop for turn in turns)
    for turn in turns:
        face = RANKS[turn.stage] if turn.is_forward else PALE[turn.stage]
        x, y = left + turn.start * scale, 42 - 11 * turn.stage
        span = (turn.stop - turn.start) * scale
        color = "white" if turn.is_forward else INK
        box(axes, x, y, span, 9, str(turn.number), face=face, color=color)
    for stage in range(num_stages):
        label(
            axes,
            left - 1,
            46.5 - 11 * stage,
            f"pp {stage}",
            RANKS[stage],
            ha="right",
            weight="bold",
        )
    text = "one step of six micro-batches. Dark: forward; light: backward"
    label(axes, left, 56, text, ha="left")
    arrow(axes, (left, 4), (left + width, 4))
    label(axes, left - 1, 4, "time", MUTED, ha="right")
    return figure


def data_parallel() -> "Figure":
    """Rows of tokens and shards of weights, over two replicas of two shards."""
    layout = Layout(dp_replicate=2, dp_shard=2)
    figure, axes = canvas(100, 100, 4.2)
    left, pitch, width = 14.0, 21.5, 18.0
    for rank, at in enumerate(places(layout, DENSE_AXES)):
        x = left + rank * pitch
        row = at["dp_replicate"] * layout.dp_shard + at["dp_shard"]
        label(axes, x + width / 2, 96, f"rank {rank}", weight="bold", size=11)
        box(axes, x, 82, width, 9, f"row {row}", face=RANKS[row], color="white")
        arrow(axes, (x + width / 2, 81), (x + width / 2, 73.5))
        for shard in range(layout.dp_shard):
            mine = shard == at["dp_shard"]
            face, color = (INK, "white") if mine else ("white", MUTED)
            text = f"shard {shard}" if mine else "gathered, freed"
            box(axes, x, 57 - 16 * shard, width, 15, text, face=face, edge=GRID, color=color)
    label(axes, left - 2, 86.5, "tokens", MUTED, ha="right")
    label(axes, left - 2, 56.5, "weights,\ngradients,\nmoments", MUTED, ha="right")
    middle = [left + rank * pitch + width / 2 for rank in range(layout.world_size)]
    for replica in range(layout.dp_replicate):
        x, end = middle[2 * replica], middle[2 * replica + 1]
        arrow(axes, (x, 36), (end, 36), RANKS[0], style="<|-|>")
        text = "dp_shard: gather weights,\nreduce-scatter gradients"
        label(axes, (x + end) / 2, 28.5, text, RANKS[0])
    for shard in range(layout.dp_shard):
        y = 18 - 6 * shard
        arrow(axes, (middle[shard], y), (middle[shard + 2], y), RANKS[1], style="<|-|>")
    text = "dp_replicate: add up the gradients of equal shards"
    label(axes, (middle[0] + middle[3]) / 2, 5, text, RANKS[1])
    return figure


def context_parallel() -> "Figure":
    """A packed row over four ranks: states, keys, and the balanced split."""
    figure, axes = canvas(100, 100, 7.2)
    split = SequenceSplit(DOCUMENTS, 4)
    _packed_row(axes, split, 79)
    _ring(axes, split, 62)
    label(axes, 14, 41.5, "balance", weight="bold", ha="left")
    text = "one document over all ranks: whose queries see how many of the keys"
    label(axes, 39, 41.5, text, MUTED, ha="left")
    for left, is_balanced in ((14.0, False), (60.0, True)):
        _pairs(axes, SequenceSplit((0, 48), 4, is_balanced), left, 2.5, 31.0)
    return figure


def _packed_row(axes: "Axes", split: SequenceSplit, y: float) -> None:
    left, width = 14.0, 84.0
    step = width / split.num_tokens
    for number, (start, stop) in enumerate(itertools.pairwise(split.offsets)):
        face = (GRID, EMPTY)[number % 2]
        text = f"document {number}" if stop - start > 5 else str(number)
        box(axes, left + start * step, y, (stop - start) * step, 4.4, text, face=face, edge=MUTED)
    label(axes, left - 1.5, y + 2.2, "packed row", MUTED, ha="right")
    for rank in range(split.num_ranks):
        (piece,) = split.own(rank)
        x = left + piece.start * step
        box(axes, x, y - 4.8, len(piece) * step, 4.4, f"cp {rank}", face=RANKS[rank], color="white")
    for source, target in itertools.combinations(range(split.num_ranks), 2):
        if split.distance(source, target) is None:
            continue
        start = left + split.pieces[source].stop * step - 6
        end = left + split.pieces[target].start * step + 3 * (target - source)
        bend = -0.5 if target - source == 1 else -0.3
        arrow(axes, (start, y + 4.8), (end, y + 4.8), RANKS[source], bend=bend)
    label(axes, left, 97.8, "LASP+, lightning layers", weight="bold", ha="left")
    text = "one state [H, K, V] per rank; it goes on as far as its document"
    label(axes, left + 25, 97.8, text, MUTED, ha="left")


def _ring(axes: "Axes", split: SequenceSplit, y: float) -> None:
    """Whose keys each rank holds at each step, as far as documents reach."""
    left, pitch, width, height = 14.0, 21.0, 17.0, 4.4
    ranks = range(split.num_ranks)
    pairs = itertools.combinations(ranks, 2)
    crossing = {(a, b) for a, b in pairs if split.distance(a, b) is not None}
    reach = max(b - a for a, b in crossing)
    label(axes, left, y + 7, "ring, softmax layers", weight="bold", ha="left")
    text = "keys and values move on by a rank per step; light: nothing to attend to"
    label(axes, left + 25, y + 7, text, MUTED, ha="left")
    for step in range(reach + 1):
        top = y - step * (height + 1)
        label(axes, left - 1.5, top + height / 2, f"step {step}", MUTED, ha="right")
        for rank in ranks:
            visitor = (rank - step) % split.num_ranks
            sees = not step or (visitor, rank) in crossing
            face, color = (RANKS[visitor], "white") if sees else (PALE[visitor], MUTED)
            x = left + rank * pitch
            box(axes, x, top, width, height, f"keys of {visitor}", face=face, color=color)
            if step < reach and rank + 1 < split.num_ranks:
                start, end = (x + width + 0.4, top + 1), (x + pitch - 0.4, top - height + 2.2)
                arrow(axes, start, end)


def _pairs(axes: "Axes", split: SequenceSplit, left: float, bottom: float, height: float) -> None:
    """Which rank computes which pairs of one long document, and how many each has."""
    from matplotlib.patches import Polygon

    owner = {n: rank for rank in range(split.num_ranks) for n in split.numbers(rank)}
    width, top = 0.75 * height, bottom + height
    wide, high = width / split.num_tokens, height / split.num_tokens
    counts = [0] * split.num_ranks
    for number, piece in enumerate(split.pieces):
        rank, upper, lower = owner[number], top - piece.start * high, top - piece.stop * high
        ends = left + piece.start * wide, left + piece.stop * wide
        corners = [(left, upper), (ends[0], upper), (ends[1], lower), (left, lower)]
        axes.add_patch(Polygon(corners, facecolor=RANKS[rank], edgecolor="white", linewidth=1.2))
        counts[rank] += sum(place + 1 for place in range(piece.start, piece.stop))
        text = f"cp {rank}"
        label(axes, left - 1, (upper + lower) / 2, text, RANKS[rank], ha="right")
    text = f"balanced = {str(split.is_balanced).lower()}"
    label(axes, left + 10, top + 0.5, text, ha="left", weight="bold")
    for rank, count in enumerate(counts):
        share, y = count / sum(counts), top - 5.5 - 4.4 * rank
        x = left + width - 4
        box(axes, x, y, 22 * share, 3.4, face=RANKS[rank])
        label(axes, x + 22 * share + 0.8, y + 1.7, f"{share:.0%}", MUTED, ha="left")


def tensor_parallel() -> "Figure":
    """Attention on the heads of each rank, and what crosses ranks."""
    layout, heads = Layout(tp=2), 4
    figure, axes = canvas(100, 100, 4.4)
    columns = {
        "q, k, v, gate:\nrows": (23, 15),
        "attention": (46, 13),
        "output:\ncolumns": (67, 13),
    }
    for text, (x, width) in {"tokens": (7, 9), **columns, "": (88, 11)}.items():
        label(axes, x + width / 2, 94, text, MUTED)
    label(axes, 93.5, 94, "sum,\nto experts", MUTED)
    for rank, y in enumerate((52.0, 8.0)):
        own = local_box("self_attn.q_proj.weight", (heads, 1), layout, Coordinates(tp=rank))
        label(axes, 5.5, y + 16, f"tp {rank}", RANKS[rank], ha="right", weight="bold", size=11)
        box(axes, 7, y, 9, 32, "all", face=INK, color="white")
        for head, (x, width) in itertools.product(range(heads), columns.values()):
            mine = own.start[0] <= head < own.start[0] + own.size[0]
            text, face = (f"head {head}", RANKS[rank]) if mine else ("", EMPTY)
            if mine or x != columns["attention"][0]:
                box(axes, x, y + 24.3 - 8.1 * head, width, 7.7, text, face=face, color="white")
        for share in range(layout.tp):
            mine = share == rank
            text, face = (f"half {share}", INK) if mine else ("", GRID)
            box(axes, 88, y + 16 * (1 - share), 11, 16, text, face=face, color="white")
        for start, stop in ((16, 23), (38, 46), (59, 67), (80, 88)):
            arrow(axes, (start + 0.7, y + 16), (stop - 0.7, y + 16))
    arrow(axes, (63, 24.6), (63, 67.4), RANKS[3], style="<|-|>")
    label(axes, 62, 46, "lightning: one mean square\nper token, for the norm", RANKS[3], ha="right")
    arrow(axes, (84, 24.6), (84, 67.4), RANKS[2], style="<|-|>")
    label(axes, 83, 46, "all-reduce\n[T, D]", RANKS[2], ha="right")
    return figure


def experts() -> "Figure":
    """Who holds which experts and widths, and how two groups of tokens travel."""
    num_experts, halves = 4, 2
    figure, axes = canvas(100, 100, 5.6)
    stage = [at for at in places(WORLD, SPARSE_AXES) if at["pp"] == 0]
    left, pitch, tile = 13.0, 11.0, 9.6
    side = tile / num_experts
    for expert in range(num_experts):
        label(axes, left + (expert + 0.5) * side, 94, str(expert), RANKS[expert], weight="bold")
    label(axes, left - 1.5, 94, "experts", MUTED, ha="right")
    label(axes, left - 1.5, 84, "widths", MUTED, ha="right")
    for rank, at in enumerate(stage):
        x, place = left + rank * pitch, Coordinates(ep=at["ep"], etp=at["etp"])
        own = local_box("layers.0.experts.down", (num_experts, 1, halves), WORLD, place)
        for expert, half in itertools.product(range(num_experts), range(halves)):
            has_expert = own.start[0] <= expert < own.start[0] + own.size[0]
            has_half = own.start[2] <= half < own.start[2] + own.size[2]
            face = RANKS[expert] if has_expert and has_half else EMPTY
            box(axes, x + expert * side, 84.5 - 6.5 * half, side, 6.5, face=face)
        label(axes, x + tile / 2, 74, f"rank {rank}", weight="bold")
    middle = [left + rank * pitch + tile / 2 for rank in range(len(stage))]
    _axis_lines(axes, stage, middle)
    _flights(axes)
    return figure


def _axis_lines(axes: "Axes", stage: list[dict[str, int]], middle: list[float]) -> None:
    """Draw, for each sparse axis, who exchanges with whom."""
    texts = {
        "etp": "etp: gather each other's rows, add up the parts",
        "ep": "ep: rows to their expert and back",
        "edp": "edp: equal parts, sharded by FSDP",
    }
    y = 69.5
    for number, (axis, text) in enumerate(texts.items()):
        color = (RANKS[1], RANKS[0], RANKS[2])[number]
        for a, b in itertools.combinations(range(len(stage)), 2):
            if all(stage[a][other] == stage[b][other] for other in SPARSE_AXES if other != axis):
                is_second = axis != "etp" and a % (b - a)
                shift = 1.9 * (a % (b - a)) if is_second else 0.0
                arrow(axes, (middle[a], y - shift), (middle[b], y - shift), color, style="<|-|>")
        y -= {"etp": 2.6, "ep": 4.4, "edp": 8.2}[axis]
        label(axes, (middle[0] + middle[-1]) / 2, y, text, color)
        y -= 4.2


def _flights(axes: "Axes") -> None:
    """Draw which exchange and which product runs when, for two groups of tokens."""
    route = (("ep", "send"), ("etp", "gather"), ("compute", "experts"), ("etp", "reduce"),
             ("ep", "send back"))  # fmt: skip
    rows = {"ep": 22.0, "etp": 13.5, "compute": 5.0}
    left, width, groups = 13.0, 14.4, 2
    for name, y in rows.items():
        label(axes, left - 1.5, y + 3.6, name, MUTED, ha="right")
    for group in range(groups):
        for stop, (row, text) in enumerate(route):
            x, face = left + (group + stop) * width, (INK, MUTED)[group]
            box(axes, x, rows[row], width, 7.2, f"{text} {group}", face=face, color="white")
    label(axes, left, 33, "two groups of tokens, one behind the other", weight="bold", ha="left")
    arrow(axes, (left, 2), (left + (len(route) + groups - 1) * width, 2))
    label(axes, left - 1.5, 2, "time", MUTED, ha="right")


PICTURES = {
    "cuts": cuts,
    "pp": pipeline,
    "dp": data_parallel,
    "cp": context_parallel,
    "tp": tensor_parallel,
    "experts": experts,
}


if __name__ == "__main__":
    main()
