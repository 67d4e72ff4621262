"""The charts of a training report, drawn from the rows of `metrics.jsonl`.

Every chart is one matplotlib figure that is saved twice: as a PNG on white, and as an inline SVG
whose few colors are replaced by CSS variables, so that the same drawing is legible on a light and
on a dark page. Only the object API is used; no pyplot, no global figure state.
"""

import io
import itertools
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linnet.errors import LinnetError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]

# CSS variable -> its color on white. The values must differ: SVGs are rewritten by them.
COLORS = {
    "ink": "#1f2429",
    "muted": "#66707b",
    "grid": "#dfe4ea",
    "series-1": "#2b6cb0",
    "series-1-light": "#a9c7e8",
    "series-2": "#c05621",
    "series-3": "#2f855a",
}
_MAX_POINTS = 800  # per line; more cannot be seen and makes the page slow
_STYLE: dict[Any, Any] = {  # Any: the keys are a closed Literal in matplotlib
    "font.size": 9,
    "svg.fonttype": "none",  # text stays text: selectable, and in the font of the page
    "svg.hashsalt": "linnet",  # the same run gives the same file
    "text.color": COLORS["ink"],
    "axes.labelcolor": COLORS["muted"],
    "axes.edgecolor": COLORS["grid"],
    "xtick.color": COLORS["muted"],
    "ytick.color": COLORS["muted"],
    "grid.color": COLORS["grid"],
}


def series(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    """Return steps and values of one metric, without the rows that lack it or are not finite."""
    points = [(row["step"], row[name]) for row in rows if math.isfinite(row.get(name, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def smooth(values: Sequence[float]) -> list[float]:
    """Return the moving average of `values` over about 4 % of their number.

    The window is centered, so that the curve does not lag behind a fast descent, and shrinks
    towards the first value; at the end it keeps its past half, so that the last value is steady.
    """
    reach = len(values) // 50
    sums = [0.0, *itertools.accumulate(values)]
    result = []
    for place in range(len(values)):
        first = max(0, place - reach)
        last = min(len(values) - 1, 2 * place - first)
        result.append((sums[last + 1] - sums[first]) / (last + 1 - first))
    return result


def loss_chart(rows: Rows) -> "Figure | None":
    """Training loss per step, raw and smoothed."""
    steps, losses = series(rows, "train/loss")
    if not steps:
        return None
    figure, (axes,) = _panels(rows, "nats per token")
    _line(axes, steps, losses, "series-1-light", "every step")
    _line(axes, steps, smooth(losses), "series-1", "smoothed")
    _legend(axes)
    return figure


def bits_per_byte_chart(rows: Rows, baselines: Mapping[str, float]) -> "Figure | None":
    """Held-out bits per byte, with a line for each compressor on the same bytes."""
    steps, values = series(rows, "eval/bits_per_byte")
    if not steps:
        return None
    figure, (axes,) = _panels(rows, "bits per byte")
    _line(axes, steps, values, "series-1", "model", markers=True)
    for color, (name, value) in zip(("series-2", "series-3"), baselines.items(), strict=False):
        axes.axhline(value, color=COLORS[color], linewidth=1.2, linestyle=(0, (5, 3)), label=name)
    _legend(axes)
    return figure


def learning_rate_chart(rows: Rows) -> "Figure | None":
    """Learning rate, and the tokens of each batch."""
    return _stack(
        rows,
        {"train/learning_rate": "learning rate", "train/batch_tokens": "tokens per batch"},
    )


def grad_norm_chart(rows: Rows) -> "Figure | None":
    """Gradient norm before clipping."""
    steps, norms = series(rows, "train/grad_norm")
    if not steps:
        return None
    figure, (axes,) = _panels(rows, "gradient norm")
    _line(axes, steps, norms, "series-1-light", "every step")
    _line(axes, steps, smooth(norms), "series-1", "smoothed")
    if min(norms) > 0 and max(norms) > 30 * min(norms):
        axes.set_yscale("log")
    _legend(axes)
    return figure


def layers_chart(rows: Rows, metric: str, label: str) -> "Figure | None":
    """One `moe/layer_NN/<metric>` line per layer, colored by depth."""
    pattern = re.compile(rf"moe/layer_(\d+)/{re.escape(metric)}")
    names = sorted({name for row in rows for name in row if pattern.fullmatch(name)})
    lines = [(name, *series(rows, name)) for name in names]
    lines = [line for line in lines if line[1]]
    if not lines:
        return None
    figure, (axes,) = _panels(rows, label)
    from matplotlib.colors import LinearSegmentedColormap

    depth = LinearSegmentedColormap.from_list("depth", [COLORS["series-1"], "#d69e2e"])
    for number, (name, steps, values) in enumerate(lines):
        color = depth(number / max(1, len(lines) - 1))
        # A legend of 80 layers hides the chart: the first and the last one tell the direction.
        shown = number in (0, len(lines) - 1)
        text = f"layer {int(name.split('/')[1].removeprefix('layer_'))}" if shown else ""
        steps, values = _thin(steps, smooth(values))
        axes.plot(steps, values, color=color, linewidth=1.2, label=text, **_marker(steps))
    _legend(axes)
    return figure


def expert_load_chart(load: Sequence[Sequence[float]]) -> "Figure | None":
    """Heat map of each expert's share of its layer's tokens, times the number of experts.

    Args:
        load: tokens or shares per layer and expert; 1.0 on the map is a perfect balance.
    """
    experts = max((len(layer) for layer in load), default=0)
    if not experts or any(len(layer) != experts or sum(layer) <= 0 for layer in load):
        return None
    figure, (axes,) = _panels([], "layer", height=0.9 + 0.16 * max(8, min(len(load), 40)))
    from matplotlib import colormaps

    relative = [[share * experts / sum(layer) for share in layer] for layer in load]
    limit = max(2.0, max(map(max, relative)))
    # 32 colors: from 50 on matplotlib draws the color bar as a bitmap, which the page forbids.
    colors = colormaps["YlGnBu"].resampled(32)
    mesh = axes.pcolormesh(relative, cmap=colors, vmin=0.0, vmax=limit)
    axes.invert_yaxis()
    axes.set_xlabel("expert")
    for axis, count in ((axes.xaxis, experts), (axes.yaxis, len(load))):
        every = math.ceil(count / 12)
        shown = range(0, count, every)
        axis.set_ticks([place + 0.5 for place in shown], [str(place) for place in shown])
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.04, pad=0.02)
    bar.ax.tick_params(length=0, labelsize=9, labelcolor=COLORS["muted"])
    for spine in bar.ax.spines.values():
        spine.set_visible(False)
    return figure


def throughput_chart(rows: Rows) -> "Figure | None":
    """Tokens per second, and model FLOPs utilization in percent."""
    percent = [
        {**row, "percent": 100 * row["train/mfu"]} if "train/mfu" in row else row for row in rows
    ]
    return _stack(percent, {"train/tokens_per_s": "tokens/s", "percent": "MFU, %"}, from_zero=True)


def memory_chart(rows: Rows) -> "Figure | None":
    """Resident memory of the process, in GiB."""
    gib = [
        {**row, "gib": row["memory/rss_bytes"] / 2**30} if "memory/rss_bytes" in row else row
        for row in rows
    ]
    return _stack(gib, {"gib": "GiB"}, from_zero=True)


def to_svg(figure: "Figure", label: str) -> str:
    """Return `figure` as an inline SVG element in CSS-variable colors, with `label` for readers."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="\w+"', "<g", svg)  # `axes_1` would stand in the page once per chart
    # The page sets the size; the viewBox keeps the proportions.
    head, rest = svg.split(">", 1)
    svg = re.sub(r' (?:width|height)="[^"]*"', "", head) + ">" + rest
    for name, color in COLORS.items():
        svg = svg.replace(color, f"var(--{name})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def to_png(figure: "Figure", path: Path) -> None:
    """Save `figure` on white."""
    from matplotlib import rc_context

    with rc_context(_STYLE):
        figure.savefig(path, dpi=150, facecolor="white")


def _stack(rows: Rows, labels: Mapping[str, str], from_zero: bool = False) -> "Figure | None":
    """One panel under the other for each metric in `labels` that has data."""
    lines = {name: series(rows, name) for name in labels}
    names = [name for name in labels if lines[name][0]]
    if not names:
        return None
    height = 2.6 if len(names) == 1 else 3.1
    figure, panels = _panels(rows, *(labels[name] for name in names), height=height)
    for axes, name in zip(panels, names, strict=True):
        _line(axes, *lines[name], "series-1", "")
        if from_zero:
            axes.set_ylim(0, 1.15 * max(*lines[name][1], 1e-9, 0))
    return figure


def _panels(rows: Rows, *labels: str, height: float = 2.6) -> tuple["Figure", list["Axes"]]:
    """A figure with one panel per label, all over the same steps."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator, StrMethodFormatter
    except ImportError:
        raise LinnetError(
            "matplotlib is not installed, and the report needs it; pip install 'linnet[train]'"
        ) from None
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.4, height), layout="constrained")
        panels = list(figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0])
        for axes, label in zip(panels, labels, strict=True):
            axes.set_ylabel(label)
            axes.grid(axis="y", linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(length=0)
        figure.align_ylabels(panels)
    if rows:
        panels[-1].set_xlabel("step")
        panels[-1].xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        panels[-1].xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    return figure, panels


def _line(
    axes: "Axes",
    steps: Sequence[float],
    values: Sequence[float],
    color: str,
    label: str,
    markers: bool = False,
) -> None:
    from matplotlib.ticker import EngFormatter

    steps, values = _thin(steps, values)
    marker = _marker(steps, up_to=60 if markers else 1)
    axes.plot(steps, values, color=COLORS[color], linewidth=1.4, label=label, **marker)
    if max(map(abs, values)) >= 10_000:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _marker(steps: Sequence[float], up_to: int = 1) -> dict[str, Any]:  # Any: Line2D properties
    """Mark the points when there are few; a line through a single one is invisible."""
    return {"marker": "o", "markersize": 3.5} if len(steps) <= up_to else {}


def _thin(
    steps: Sequence[float], values: Sequence[float]
) -> tuple[Sequence[float], Sequence[float]]:
    """Keep every n-th point and the last one, at most about `_MAX_POINTS`."""
    every = math.ceil(len(steps) / _MAX_POINTS)
    kept = sorted({*range(0, len(steps), every), len(steps) - 1})
    return [steps[place] for place in kept], [values[place] for place in kept]


def _legend(axes: "Axes") -> None:
    legend = axes.legend(
        frameon=False, fontsize=8.5, labelcolor=COLORS["ink"], loc="best", ncols=3, handlelength=1.6
    )
    for text in legend.get_texts():
        text.set_parse_math(False)  # names come from the run; `$` is no formula
