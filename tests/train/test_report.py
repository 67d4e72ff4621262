import json
import math
import random
import re
import sys
from html.parser import HTMLParser

import pytest

from linnet.errors import DataError, LinnetError
from linnet.train.charts import smooth
from linnet.train.report import write_report

PNGS = {"loss.png", "bits_per_byte.png", "load_balance.png", "throughput.png", "learning_rate.png"}
RUN = {
    "name": "nano",
    "model": {"preset": "nano", "params_total": 26_300_000, "params_active": 9_400_000},
    "config": {"optimizer": {"learning_rate": 3e-4, "betas": [0.9, 0.95]}, "compile": True},
    "environment": {"torch": "2.13.0", "cpu": "two cores", "dtype": "bfloat16"},
    "summary": {"bits_per_byte": 1.2, "tokens": 6_144_000, "mfu": 0.41, "peak_tflops": 1.9},
    "baselines": {"zlib -9": 1.78, "xz -9e": 1.5},
    "samples": [{"name": "a.py", "prompt": "def", "completion": " f(x)", "truth": " g(x)"}],
    "expert_load": [[3, 1, 2, 2], [1, 1, 1, 1]],
}


def rows(steps, layers=2):
    generator = random.Random(0)
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "time_s": float(step),
            "train/loss": 2 + 3 / step + generator.gauss(0, 0.1),
            "train/learning_rate": 1e-3 / step,
            "train/batch_tokens": 4096.0,
            "train/grad_norm": 1.0,
            "train/tokens_per_s": 12_000.0,
            "train/mfu": 0.4,
            "memory/rss_bytes": 3e9,
        }
        for layer in range(layers):
            row[f"moe/layer_{layer:02d}/load_max_over_mean"] = 1.3
            row[f"moe/layer_{layer:02d}/dropped"] = 0.0
            row[f"moe/layer_{layer:02d}/entropy"] = 2.0
        if step % 5 == 0:
            row["eval/bits_per_byte"] = 1 + 1 / step
        yield row


def write_run(folder, lines, run=None):
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if run is not None:
        (folder / "run.json").write_text(json.dumps(run))


class Balance(HTMLParser):
    """Collects tags that are closed in the wrong order."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.svgs = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.svgs += tag == "svg"
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def parse(page):
    parser = Balance()
    parser.feed(page)
    assert parser.wrong == [] and parser.open == []
    return parser


@pytest.fixture(scope="module")
def full_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_run(folder, rows(20), RUN)
    assert write_report(folder) == folder / "report.html"
    return folder


def test_full_run_gives_every_chart_and_figure(full_run):
    page = (full_run / "report.html").read_text()
    assert parse(page).svgs == 10
    assert {file.name for file in full_run.glob("*.png")} == PNGS
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in full_run.glob("*.png"))
    for text in ("1.200", "-20.0%", "size against xz -9e", "26.3M", "41.0%", "optimizer.betas"):
        assert text in page
    assert "Not recorded" not in page


def test_page_loads_nothing_from_elsewhere(full_run):
    page = (full_run / "report.html").read_text()
    assert "default-src 'none'" in page
    assert not re.search(r"<(script|link|img|iframe|image)\b|@import|url\((?!#)", page)
    namespaces = re.compile(r' xmlns(:\w+)?="[^"]*"')
    assert "://" not in namespaces.sub("", page)


def test_charts_use_the_colors_of_the_page(full_run):
    page = (full_run / "report.html").read_text()
    charts = page[page.index("</style>") :]
    assert "var(--series-1)" in charts and "var(--ink)" in charts
    assert "fill: #ffffff" not in charts and "#1f2429" not in charts


def test_text_of_the_run_is_escaped(tmp_path):
    evil = "<script>alert('$x^$')</script>\x00&\ud800"
    sample = dict.fromkeys(["name", "prompt", "completion", "truth"], evil)
    run = {
        "name": evil,
        "samples": [sample],
        "config": {evil: evil},
        "baselines": {evil: 2.0},
        "model": {"preset": evil},
    }
    lines = [{"step": 1, "time_s": 0.0, "eval/bits_per_byte": 1.0}]
    write_run(tmp_path, lines, run)
    page = write_report(tmp_path).read_text()
    assert "<script" not in page and "\x00" not in page
    assert page.count("&lt;script&gt;") >= 8
    parse(page)


@pytest.mark.parametrize("steps", [0, 1, 2], ids=lambda steps: f"{steps}-steps")
def test_short_runs_give_a_report(tmp_path, steps):
    write_run(tmp_path, rows(steps), {"name": "short"})
    page = write_report(tmp_path).read_text()
    parse(page)
    assert "Not recorded" in page


@pytest.mark.parametrize("missing", ["train/", ""], ids=["no-train", "none"])
def test_missing_series_are_left_out_with_a_note(tmp_path, missing):
    kept = [
        {k: v for k, v in row.items() if k in ("step", "time_s") or not k.startswith(missing)}
        for row in rows(6)
    ]
    write_run(tmp_path, kept, {})
    page = write_report(tmp_path).read_text()
    parse(page)
    assert "Not recorded" in page


def test_non_finite_values_are_left_out(tmp_path):
    lines = list(rows(6, layers=0))
    lines[3]["train/loss"] = "nan"
    lines[4]["train/grad_norm"] = "inf"
    write_run(tmp_path, lines, {**RUN, "summary": {"bits_per_byte": math.inf}})
    assert "1.200" in write_report(tmp_path).read_text()  # the last held-out value, 1 + 1 / 5


def test_report_is_possible_without_run_json(tmp_path):
    write_run(tmp_path, [{"step": 1, "time_s": 0.0, "eval/bits_per_byte": 1.1}])
    assert "1.100" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    "run",
    [
        {"summary": None, "model": [], "samples": [3, {}], "baselines": {"zlib -9": None}},
        {"expert_load": [[1, 2], [1]], "baselines": {"zlib -9": 0}},
        {"expert_load": "no", "samples": None, "config": {"a": {"b": None}}},
        {"expert_load": [[0, 0]], "summary": {"tokens": True, "mfu": "fast"}},
    ],
    ids=["nulls", "ragged", "strings", "zeros"],
)
def test_unexpected_run_json_values_are_left_out(tmp_path, run):
    write_run(tmp_path, [{"step": 1, "time_s": 0.0, "eval/bits_per_byte": 1.1}], run)
    parse(write_report(tmp_path).read_text())


def test_chart_of_an_earlier_report_is_removed_when_its_data_is_gone(tmp_path):
    (tmp_path / "load_balance.png").write_bytes(b"old")
    write_run(tmp_path, [{"step": 1, "time_s": 0.0}])
    write_report(tmp_path)
    assert not (tmp_path / "load_balance.png").exists()


def test_same_run_gives_the_same_report(tmp_path):
    write_run(tmp_path, [{"step": 1, "time_s": 0.0, "eval/bits_per_byte": 1.1}], RUN)
    first = write_report(tmp_path).read_bytes()
    assert write_report(tmp_path).read_bytes() == first


def test_long_runs_give_a_small_page(tmp_path):
    names = [f"moe/layer_{layer:02d}/entropy" for layer in range(4)]
    lines = [
        {"step": step, "time_s": 0.0, "train/loss": step % 7, **dict.fromkeys(names, step % 5)}
        for step in range(20_000)
    ]
    write_run(tmp_path, lines)
    assert write_report(tmp_path).stat().st_size < 400_000


def test_smoothing_keeps_a_line_straight_and_its_length():
    line = [float(place) for place in range(500)]
    smoothed = smooth(line)
    assert smoothed[:489] == pytest.approx(line[:489]) and len(smoothed) == 500
    assert smooth([]) == [] and smooth([3.0]) == [3.0]


def test_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="neither"):
        write_report(tmp_path)


def test_damaged_run_json_is_an_error(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DataError, match=r"run\.json"):
        write_report(tmp_path)


def test_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    write_run(tmp_path, rows(3), RUN)
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LinnetError, match=r"linnet\[train\]"):
        write_report(tmp_path)
