"""The report of a training run: one HTML file that answers "how good is it, and how did it go?".

The page is self-contained: no script, no network, charts as inline SVG, light and dark. It can be
written at any time, also for a run that was interrupted: what is not there is left out with a note.
Everything that comes from the run is escaped, since samples contain whatever the corpus contains.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linnet.errors import DataError
from linnet.storage import write_atomic
from linnet.train import charts
from linnet.train.metrics import METRICS_FILE, read_metrics
from linnet.train.progress import format_count, format_duration

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RUN_FILE = "run.json"
REPORT_FILE = "report.html"

# Any: run.json holds whatever the recipe and the environment hold.
Json = Mapping[str, Any]

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(run_folder: str | Path) -> Path:
    """Write `report.html` and the chart PNGs of a run into its folder.

    Args:
        run_folder: holds `metrics.jsonl` and `run.json`, of which one may be missing.

    Returns:
        The path of `report.html`.

    Raises:
        DataError: the folder holds neither file, or one of them is damaged.
        LinnetError: matplotlib is not installed.
    """
    folder = Path(run_folder)
    rows = read_metrics(folder)
    run = _read_run(folder)
    if not rows and not run:
        raise DataError(
            f"{folder} holds neither {METRICS_FILE} nor {RUN_FILE}; pass the folder of a run"
        )
    body = "\n".join(
        [
            _header(run, rows),
            _comparison(run, rows),
            _charts(run, rows, folder),
            _samples(run),
            _tables(run),
        ]
    )
    style = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    page = _PAGE.format(title=_text(_name(run)), style=style, body=body)
    path = folder / REPORT_FILE
    write_atomic(path, page)
    return path


def _read_run(folder: Path) -> Json:
    path = folder / RUN_FILE
    if not path.exists():
        return {}
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(run, dict):
        raise DataError(f"{path} is not a JSON object")
    return run


def _header(run: Json, rows: charts.Rows) -> str:
    model, environment = _section(run, "model"), _section(run, "environment")
    parts = [model.get("preset"), environment.get("cpu"), environment.get("dtype")]
    line = " &middot; ".join(_text(part) for part in parts if part)
    figures = "\n".join(
        f'<div class="card"><div class="value">{_text(value)}</div>'
        f'<div class="name">{_text(name)}</div></div>'
        for name, value in _key_figures(run, rows)
    )
    steps = max((row["step"] for row in rows), default=0)
    state = f"{steps:,.0f} steps" if rows else "No step was recorded"
    return (
        f'<h1>{_text(_name(run))}</h1>\n<p class="muted">{line or "Training run"} &middot; '
        f'{state}</p>\n<div class="figures">\n{figures}\n</div>'
    )


def _key_figures(run: Json, rows: charts.Rows) -> Iterator[tuple[str, str]]:
    """Name and text of each figure that is known, the most telling first."""
    summary, model = _section(run, "summary"), _section(run, "model")
    bits = _bits_per_byte(run, rows)
    if bits is not None:
        yield "held-out bits per byte", f"{bits:.3f}"
        best = min(_baselines(run).items(), key=lambda item: item[1], default=None)
        if best is not None:
            change = bits / best[1] - 1
            yield f"size against {best[0]}", f"{100 * change:+.1f}%"
    _, losses = charts.series(rows, "train/loss")
    loss = _number(summary.get("train_loss"))
    if loss is None and losses:
        loss = charts.smooth(losses)[-1]
    if loss is not None:
        yield "training loss, nats/token", f"{loss:.3f}"
    for name, value in (
        ("tokens trained on", summary.get("tokens")),
        ("parameters", model.get("params_total")),
        ("active per token", model.get("params_active")),
        ("tokens/s", summary.get("tokens_per_s")),
    ):
        if (number := _number(value)) is not None:
            yield name, format_count(number)
    if (mfu := _number(summary.get("mfu"))) is not None:
        peak = _number(summary.get("peak_tflops"))
        yield "MFU" + (f" of {peak:.2f} TFLOP/s" if peak else ""), f"{100 * mfu:.1f}%"
    if (seconds := _number(summary.get("seconds"))) is not None:
        yield "training time", format_duration(seconds)


def _comparison(run: Json, rows: charts.Rows) -> str:
    bits, baselines = _bits_per_byte(run, rows), _baselines(run)
    if bits is None or not baselines:
        return ""
    longest = max(bits, *baselines.values())
    bars = [("model", "this model", bits)]
    bars += [("", name, value) for name, value in baselines.items()]
    cells = "\n".join(
        f'<div class="{kind}">{_text(name)}</div>'
        f'<div><div class="{kind} bar" style="width:{100 * value / longest:.1f}%"></div></div>'
        f'<div class="{kind} value">{value:.3f}</div>'
        for kind, name, value in bars
    )
    return (
        "<h2>Compression of held-out text</h2>\n"
        f'<div class="card">\n<div class="bars">\n{cells}\n</div>\n'
        '<p class="note">Bits per byte; lower is better. A compressor sees the same bytes.</p>'
        "</div>"
    )


def _charts(run: Json, rows: charts.Rows, folder: Path) -> str:
    """Draw every chart that has data, save the PNGs, and name the charts that have none."""
    load = run.get("expert_load") or []
    layers = charts.layers_chart
    drawn: list[tuple[str, str, str, Figure | None]] = [
        ("Training loss", "", "loss.png", charts.loss_chart(rows)),
        (
            "Held-out bits per byte",
            "Lower is better; dashed: compressors on the text of the final measurement.",
            "bits_per_byte.png",
            charts.bits_per_byte_chart(rows, _baselines(run)),
        ),
        ("Learning rate and batch size", "", "learning_rate.png", charts.learning_rate_chart(rows)),
        ("Throughput", "", "throughput.png", charts.throughput_chart(rows)),
        (
            "Expert load balance",
            "Tokens of the busiest expert over the mean of its layer; 1 is perfect.",
            "load_balance.png",
            layers(rows, "load_max_over_mean", "max / mean"),
        ),
        (
            "Load per expert",
            "Tokens routed to each expert over the mean of its layer; 1 is perfect.",
            "",
            charts.expert_load_chart(load) if _is_table(load) else None,
        ),
        (
            "Router entropy",
            "Low entropy is a confident router; near zero, a collapsed one.",
            "",
            layers(rows, "entropy", "nats"),
        ),
        ("Dropped token assignments", "", "", layers(rows, "dropped", "dropped")),
        ("Gradient norm", "Before clipping.", "", charts.grad_norm_chart(rows)),
        ("Memory", "Resident memory of the training process.", "", charts.memory_chart(rows)),
    ]
    cards, missing = [], []
    for title, note, png, figure in drawn:
        if png:
            # A chart of an earlier report must not stand beside this one.
            (folder / png).unlink(missing_ok=True)
        if figure is None:
            missing.append(title.lower())
            continue
        if png:
            charts.to_png(figure, folder / png)
        cards.append(
            f'<figure class="card chart"><h3>{title}</h3><p class="note">{note}</p>'
            f"{charts.to_svg(figure, title)}</figure>"
        )
    omitted = f'<p class="note">Not recorded: {", ".join(missing)}.</p>' if missing else ""
    grid = '<div class="charts">\n' + "\n".join(cards) + "\n</div>" if cards else ""
    return f"<h2>How training went</h2>\n{grid}\n{omitted}"


def _samples(run: Json) -> str:
    samples = [item for item in run.get("samples") or [] if isinstance(item, Mapping)]
    if not samples:
        return ""
    cards = "\n".join(
        f'<div class="card sample"><h3>{_text(sample.get("name") or "sample")}</h3>\n'
        f'<div class="note">Prompt</div><pre>{_text(sample.get("prompt"))}</pre>\n'
        '<div class="texts">'
        f'<div><div class="note">The model wrote</div><pre>{_text(sample.get("completion"))}</pre>'
        "</div>\n"
        f'<div><div class="note">The file says</div><pre>{_text(sample.get("truth"))}</pre></div>'
        "</div></div>"
        for sample in samples
    )
    return f"<h2>Completions of held-out text</h2>\n{cards}"


def _tables(run: Json) -> str:
    tables = []
    for title, key in (
        ("Resolved configuration", "config"),
        ("Model", "model"),
        ("Environment", "environment"),
        ("Summary", "summary"),
    ):
        rows = "\n".join(
            f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>"
            for name, value in _flatten(_section(run, key))
        )
        if rows:
            tables.append(f'<div class="card"><h3>{title}</h3><table>\n{rows}\n</table></div>')
    if not tables:
        return ""
    return '<h2>What was run</h2>\n<div class="tables">\n' + "\n".join(tables) + "\n</div>"


def _flatten(value: Json, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, item in value.items():
        name = f"{prefix}{key}"
        if isinstance(item, Mapping):
            yield from _flatten(item, f"{name}.")
        elif isinstance(item, float):
            yield name, f"{item:.6g}"
        elif isinstance(item, int) and not isinstance(item, bool):
            yield name, f"{item:,}" if abs(item) >= 10_000 else str(item)
        else:
            yield name, item if isinstance(item, str) else json.dumps(item)


def _name(run: Json) -> str:
    return str(run.get("name") or "Training run")


def _bits_per_byte(run: Json, rows: charts.Rows) -> float | None:
    final = _number(_section(run, "summary").get("bits_per_byte"))
    _, values = charts.series(rows, "eval/bits_per_byte")
    return final if final is not None else (values[-1] if values else None)


def _baselines(run: Json) -> dict[str, float]:
    found = {_clean(str(key)): _number(value) for key, value in _section(run, "baselines").items()}
    return {name: value for name, value in found.items() if value is not None and value > 0}


def _section(run: Json, key: str) -> Json:
    value = run.get(key)
    return value if isinstance(value, Mapping) else {}


def _number(value: Any) -> float | None:
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if known else None


def _is_table(value: Any) -> bool:
    return isinstance(value, Sequence) and all(
        isinstance(layer, Sequence) and all(_number(share) is not None for share in layer)
        for layer in value
    )


def _text(value: object) -> str:
    return "" if value is None else escape(_clean(str(value)))


def _clean(text: str) -> str:
    """Replace control characters and lone surrogates, which neither HTML nor fonts can take."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)
