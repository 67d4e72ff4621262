"""docs/performance.md shows what the committed results say, losses included."""

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
MACHINE = {"cpu": "a processor", "threads": 2, "torch": "2", "matmul_peak_flops_fp32": 2e11}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "scripts" / "performance_page.py"
    spec = importlib.util.spec_from_file_location("performance_page", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_of(script: ModuleType, folder: Path, name: str, values: dict) -> str:
    device = folder / "device"
    device.mkdir()
    (device / f"{name}.json").write_text(json.dumps(values))
    return script.page(folder)


def side_by_side(speedup: float) -> dict:
    speeds = {"ours_tokens_per_s": 10 * speedup, "theirs_tokens_per_s": 10}
    return speeds | {"speedup": speedup, "speedup_min": speedup, "speedup_max": speedup}


def test_page_is_that_of_the_committed_results(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(script.RESULTS)


def test_every_link_of_the_page_exists(script):
    targets = re.findall(r"\]\(([^)\s]+)\)", script.PAGE.read_text(encoding="utf-8"))
    assert [target for target in targets if not (ROOT / "docs" / target).is_file()] == []


@pytest.mark.parametrize(
    ("speedup", "verdict"), [(4.0, "met"), (3.9, "**missed**"), (0.9, "linnet loses here")]
)
def test_verdict_is_said_in_words(script, tmp_path, speedup, verdict):
    values = {"model": "m", "dtype": "bfloat16", "machine": MACHINE}
    text = page_of(
        script, tmp_path, "bench_94m_bfloat16", values | {"decode": side_by_side(speedup)}
    )
    (line,) = [line for line in text.splitlines() if "decode, one sequence]" in line]
    assert verdict in line


def test_more_memory_than_allowed_is_a_miss(script):
    row = script.Row("memory", "", "", 0.5, "", 0.4, "", at_most=True)
    assert row.verdict() == "**missed**"


def test_skipped_side_is_no_miss(script, tmp_path):
    rows = [{"mode": "forward_backward", "tokens": 8, "ours_ms": 1.0, "skipped": {}}]
    values = {"heads": 1, "head_dim": 1, "machine": MACHINE, "rows": rows}
    text = page_of(script, tmp_path, "lightning_attention", values)
    assert "not measured" in text and "0 of 0 measured targets" in text


def test_page_says_that_no_gpu_was_measured(script, tmp_path):
    assert "No GPU result has been recorded yet" in script.page(tmp_path)
