"""Prefill of a million tokens: seven lightning layers and one softmax layer, and softmax alone.

    python benchmarks/million.py [--max-tokens 1048576] [--limit-s 120]

Both small models take random tokens in chunks of 8192 with a cache, each in a process of its own.
The time so far and the memory held are recorded at each power of two, and written at once, so that
an interrupted run keeps what it has. The twin, whose layers are all softmax attention, stops after
the first chunk that ends beyond the limit. The hybrid's softmax layer is its last, of which a
prompt needs keys and values alone (docs/engine.md), so its time grows with the length. Writes
results/<device>/million.json and docs/million.png.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from harness import RESULTS, device_name, machine_facts, write_result
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from linnet.model import Model, ModelConfig, preset
from linnet.model.cache import Cache
from linnet.model.config import SOFTMAX
from linnet.model.cost import cost_of
from linnet.model.init import initialize
from linnet.train.charts import COLORS, to_png
from linnet.train.machine import compute_dtype, resident_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CHUNK = 8192
PICTURE = Path(__file__).parents[1] / "docs" / "million.png"
SIDES = {"hybrid": "7 lightning layers, 1 softmax", "softmax": "8 softmax layers"}
STYLE = {"hybrid": ("series-1", "o"), "softmax": ("series-2", "s")}


def main() -> None:
    """Measure both models and draw the picture; or measure one of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--max-tokens", type=int, default=2**20)
    parser.add_argument("--limit-s", type=float, default=120.0, help="of the softmax-only twin")
    parser.add_argument("--chunk", type=int, default=CHUNK)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        measure(args.side, args)
        return
    path = write_result("million", {"machine": machine_facts(args.threads), "chunk": args.chunk})
    # The twin first: it is done in minutes.
    for side in reversed(SIDES):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--side", side], check=True)
        draw(json.loads(path.read_text()), args.picture)
    print(f"wrote {path} and {args.picture}")


def config_of(side: str) -> ModelConfig:
    """Return the preset `nano` with one head of 32 channels, or its softmax-only twin.

    The twin's 5.5e11 pairs per layer at a million tokens decide the size: one head of 32 channels
    is the least that is still a usual shape.
    """
    base = dataclasses.replace(
        preset("nano"), num_attention_heads=1, num_key_value_heads=1, head_dim=32, rotary_dim=16
    )
    if side == "hybrid":
        return base
    return dataclasses.replace(base, attn_type_list=(SOFTMAX,) * base.num_hidden_layers)


def measure(side: str, args: argparse.Namespace) -> None:
    """Prefill one model and write what it took at each power of two."""
    dtype = compute_dtype("auto")
    config = config_of(side)
    model = initialize(Model(config, dtype), torch.Generator().manual_seed(0)).eval()
    limit_s = args.limit_s if side == "softmax" else float("inf")
    values: dict[str, Any] = {
        "layers": SIDES[side],
        "params_total": cost_of(config).params_total,
        "dtype": str(dtype).removeprefix("torch."),
        "limit_s": args.limit_s if side == "softmax" else None,
        "rss_before": resident_bytes(),
        "rows": [],
    }
    generator = torch.Generator().manual_seed(1)
    advance(model, model.new_cache(), min(args.chunk, 1024), generator)  # warm-up
    cache = model.new_cache()
    elapsed_s = 0.0
    with progress() as bar:
        task = bar.add_task(side, total=args.max_tokens, speed="")
        while cache.length < args.max_tokens and elapsed_s <= limit_s:
            start = time.perf_counter()
            advance(model, cache, min(args.chunk, args.max_tokens - cache.length), generator)
            elapsed_s += time.perf_counter() - start
            done = cache.length
            bar.update(task, completed=done, speed=f"{done / elapsed_s:,.0f} tokens/s")
            is_last = done >= args.max_tokens or elapsed_s > limit_s
            if done & (done - 1) == 0 or is_last:
                record(side, values, done, elapsed_s, cache.num_bytes)
                bar.console.print(f"{side}: {done:,} tokens in {elapsed_s:.1f} s")


@torch.inference_mode()
def advance(model: Model, cache: Cache, num_tokens: int, generator: torch.Generator) -> None:
    """Take in one chunk of random tokens."""
    tokens = torch.randint(0, model.config.vocab_size, (1, num_tokens), generator=generator)
    model(tokens, cache=cache, logits_to_keep=1)


def record(
    side: str, values: dict[str, Any], tokens: int, elapsed_s: float, cache_bytes: int
) -> None:
    """Add a row and write the file, keeping the other model's part of it."""
    values["rows"].append(
        {
            "tokens": tokens,
            "seconds": elapsed_s,
            "tokens_per_s": tokens / elapsed_s,
            "rss_bytes": resident_bytes(),
            "peak_bytes": peak_bytes(),
            "cache_bytes": cache_bytes,
        }
    )
    path = RESULTS / device_name() / "million.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    write_result("million", result | {side: values})


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM")


def progress() -> Progress:
    """Return a bar for a terminal; elsewhere only the lines of the recorded lengths are shown."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
        refresh_per_second=2,  # the drawing thread shares the cores with the model
        disable=not console.is_terminal,
    )


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw time and memory against length, both models in both panels."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    points = {side: result[side]["rows"] for side in SIDES if side in result}
    style = {
        "font.size": 10,
        "text.color": COLORS["ink"],
        "axes.labelcolor": COLORS["ink"],
        "axes.edgecolor": COLORS["grid"],
        "xtick.color": COLORS["muted"],
        "ytick.color": COLORS["muted"],
        "grid.color": COLORS["grid"],
    }
    with rc_context(style):
        figure = Figure(figsize=(9.6, 4.2), layout="constrained")
        times, memory = figure.subplots(1, 2)
        for side, rows in points.items():
            color, marker = STYLE[side]
            look = {"color": COLORS[color], "marker": marker, "label": SIDES[side]}
            tokens = [row["tokens"] for row in rows]
            times.plot(tokens, [row["seconds"] for row in rows], **look)
            memory.plot(tokens, [row["peak_bytes"] / 1e9 for row in rows], **look)
        guides(times, points)
        times.set(yscale="log", title="time to take in the prompt", ylabel="seconds")
        memory.set(title="most memory held by the process", ylabel="GB")
        # Room for the legend; and a guide must not stretch the panel far below the measurements.
        memory.set_ylim(0, 1.3 * memory.dataLim.ymax)
        fastest_s = min(row["seconds"] for rows in points.values() for row in rows)
        times.set_ylim(bottom=0.5 * fastest_s)
        for axes in (times, memory):
            arrange(axes)
        path.parent.mkdir(parents=True, exist_ok=True)
        to_png(figure, path)


def guides(axes: "Axes", points: dict[str, list[dict[str, float]]]) -> None:
    """Draw slopes 1 and 2 from the first point of the hybrid and the last one of the twin."""
    lengths = [row["tokens"] for rows in points.values() for row in rows]
    ends = [min(lengths), max(lengths)]
    for side, place, power in (("hybrid", 0, 1), ("softmax", -1, 2)):
        if side not in points:
            continue
        anchor = points[side][place]
        heights = [anchor["seconds"] * (x / anchor["tokens"]) ** power for x in ends]
        name, dash = ("linear", (1, 2)) if power == 1 else ("quadratic", (5, 3))
        look = {"color": COLORS["muted"], "linewidth": 1, "linestyle": (0, dash)}
        axes.plot(ends, heights, label=name, zorder=1, **look)


def arrange(axes: "Axes") -> None:
    """Label the lengths in powers of two, and drop what carries no information."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=9))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_name(x)))
    axes.minorticks_off()
    axes.set_xlabel("tokens")
    axes.grid(linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def length_name(tokens: float) -> str:
    """Return a length as it is spoken: 8K, 1M."""
    for size, suffix in ((2**20, "M"), (2**10, "K")):
        if tokens >= size:
            return f"{tokens / size:g}{suffix}"
    return f"{tokens:g}"


if __name__ == "__main__":
    main()
