"""The page of `linnet plan --page`: curves over the length, as one PNG and one HTML file.

The HTML is self-contained, light and dark, with the numbers and the assumptions below the curves.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from linnet.errors import LinnetError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from linnet.model import ModelConfig
    from linnet.parallel.plan import Cluster, Curves, Efficiency

SERIES = ("series-1", "series-2")

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }}
th, td {{ text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--grid); }}
th:first-child, td:first-child {{ text-align: left; }}
.chart svg {{ min-width: 760px; }}
.scroll {{ overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_page(
    out: Path, model: str, config: "ModelConfig", cluster: "Cluster", efficiency: "Efficiency"
) -> list[Path]:
    """Write OUT.html and OUT.png, and return their paths.

    Args:
        out: the path without its ending; .html or .png is taken off.
        model: its name.
        config: of the model.
        cluster: on which it is served, and trained if it has as many GPUs as that takes.
        efficiency: the assumptions.

    Raises:
        LinnetError: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise LinnetError(
            "matplotlib is not installed, and the page needs it; pip install 'linnet[train]'"
        ) from None
    from linnet.parallel.plan import TRAINING_GPUS, Cluster, both_curves
    from linnet.storage import write_atomic
    from linnet.train import charts

    base = out.with_suffix("") if out.suffix in (".html", ".png") else out
    training = Cluster(max(cluster.num_gpus, TRAINING_GPUS), cluster.device)
    weights, curves = both_curves(config, cluster, training, efficiency)
    usable = cluster.device.memory_gib * efficiency.memory
    figure = draw(curves, usable, cluster, training)
    html, png = (base.with_name(base.name + ending) for ending in (".html", ".png"))
    html.parent.mkdir(parents=True, exist_ok=True)
    charts.to_png(figure, png)
    title = f"{model} by length"
    about = (
        f"One sequence on {cluster} with {weights} weights, and training on {training}: the "
        "hybrid model beside the same one with softmax attention in every layer. Each figure is "
        "that of its best layout."
    )
    svg = charts.to_svg(figure, about)
    style = Path(charts.__file__).with_name("report.css").read_text(encoding="utf-8")
    body = [f'<p class="muted">{escape(about)}</p>', f'<figure class="chart card">{svg}</figure>']
    body += ["<h2>Serving</h2>", _serving_table(curves), "<h2>Training</h2>"]
    body += [_training_table(curves), "<h2>Assumed</h2>", _assumed(cluster, efficiency, weights)]
    page = _PAGE.format(title=escape(title), style=style, body="\n".join(body))
    write_atomic(html, page.encode())
    return [html, png]


def draw(
    curves: "Sequence[Curves]", usable_gib: float, cluster: "Cluster", training: "Cluster"
) -> "Figure":
    """Return six panels over the length: time, memory, GPUs; generation, training, FLOPs."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from linnet.train import charts

    with rc_context(charts._STYLE):
        figure = Figure(figsize=(11.5, 6.6), layout="constrained")
        panels = figure.subplots(2, 3)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
        names = (
            (f"time to the first token, {cluster}", "seconds"),
            (f"memory per GPU of {cluster}", "GiB"),
            (f"{cluster.device.name} GPUs that hold it", "GPUs"),
            (f"generation at that length, {cluster}", "tokens/s"),
            (f"training, {training}", "tokens/s per GPU"),
            ("FLOPs of a token, forward", "GFLOP"),
        )
        for axes, (title, unit) in zip(panels.flat, names, strict=True):
            _prepare(axes, title, unit)
        for color, model in zip(SERIES, curves, strict=True):
            _add(panels, model, charts.COLORS[color], training.num_gpus)
        limit = panels[0, 1]
        limit.axhline(usable_gib, color=charts.COLORS["muted"], linewidth=1, linestyle=(0, (4, 3)))
        limit.text(2**13, usable_gib * 1.04, "usable", color=charts.COLORS["muted"], fontsize=8)
        panels[0, 0].legend(frameon=False, fontsize=8.5, loc="upper left")
        for axes in (panels[0, 1], panels[0, 2], panels[1, 0]):
            axes.set_yscale("linear")
        for axes in panels.flat:
            _scale(axes)
    return figure


def _add(panels, model: "Curves", color: str, num_training_gpus: int) -> None:
    """Draw one model into all panels; what does not fit is left out."""
    lengths = [point.length for point in model.serving]
    columns = (
        [point.first_token_s for point in model.serving],
        [point.memory_bytes / 2**30 for point in model.serving],
        [point.num_gpus for point in model.serving],
        [point.tokens_per_s for point in model.serving],
        [p.tokens_per_s and p.tokens_per_s / num_training_gpus for p in model.training],
        [point.flops_per_token / 1e9 for point in model.serving],
    )
    stages = [point.length for point in model.training]
    for number, (axes, values) in enumerate(zip(panels.flat, columns, strict=True)):
        xs = stages if number == 4 else lengths
        points = [(x, y) for x, y in zip(xs, values, strict=True) if y]
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=color,
            linewidth=1.5,
            marker="o",
            markersize=3,
            label=model.name,
            drawstyle="steps-pre" if number == 2 else "default",
        )


def _prepare(axes: "Axes", title: str, unit: str) -> None:
    from linnet.train import charts

    axes.set_title(title, fontsize=9.5, loc="left", color=charts.COLORS["ink"])
    axes.set_ylabel(unit)
    axes.set_xlabel("tokens")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.grid(axis="y", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0, which="both")


def _scale(axes: "Axes") -> None:
    """Put few and readable ticks on both axes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    from linnet.parallel.plan import tokens_text

    ticks = [2**power for power in range(13, 23, 3)]
    axes.set_xticks(ticks, [tokens_text(tick) for tick in ticks])
    axes.set_xlim(2**12.7, 2**22.3)
    if axes.get_yscale() == "linear":
        axes.set_ylim(0)
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 4, 5, 8, 10], integer=True))
        return
    low, high = axes.get_ylim()
    # Within two decades the powers of ten alone are too few.
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}" if y >= 1 else f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _serving_table(curves: "Sequence[Curves]") -> str:
    from linnet.parallel.plan import gib, rate_text, time_text, tokens_text

    head = ["tokens"]
    for model in curves:
        head += [f"{model.name}: first token", "tokens/s", "GiB per GPU", "GPUs", "GFLOP/token"]
    rows = []
    for points in zip(*(model.serving for model in curves), strict=True):
        row = [tokens_text(points[0].length)]
        for p in points:
            row += [
                time_text(p.first_token_s) if p.first_token_s else "does not fit",
                rate_text(p.tokens_per_s) if p.tokens_per_s else "",
                gib(p.memory_bytes),
                f"{p.num_gpus:,}" if p.num_gpus else "over 1,024",
                f"{p.flops_per_token / 1e9:,.0f}",
            ]
        rows.append(row)
    return _table(head, rows)


def _training_table(curves: "Sequence[Curves]") -> str:
    from linnet.parallel.plan import rate_text, tokens_text

    head = ["tokens"]
    for model in curves:
        head += [f"{model.name}: tokens/s", "MFU"]
    rows = []
    for points in zip(*(model.training for model in curves), strict=True):
        row = [tokens_text(points[0].length)]
        for p in points:
            row += [rate_text(p.tokens_per_s) if p.tokens_per_s else "does not fit"]
            row += [f"{p.mfu:.1%}" if p.mfu else ""]
        rows.append(row)
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    lines += ["<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in rows]
    return '<div class="card scroll"><table>\n' + "\n".join(lines) + "\n</table></div>"


def _assumed(cluster: "Cluster", efficiency: "Efficiency", weights: str) -> str:
    from linnet.cli.plan_tables import assumptions

    lines = [
        *assumptions(cluster, efficiency, is_serving=True),
        f"Weights are {weights} and keys and values bf16 in serving; training has fp32 weights "
        "that FSDP gathers in bf16, without pipeline, replicas and tensor parallelism, in steps of "
        "32M tokens, one document per sequence.",
    ]
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"
