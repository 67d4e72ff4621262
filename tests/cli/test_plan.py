import json
import re
import subprocess
import sys
import time

import pytest

from linnet.cli import build_parser, main

M1 = ["plan", "minimax-m1", "--gpus", "8xH800"]
NANO = ["plan", "nano", "--gpus", "2xA100", "--context", "4K"]


def test_four_million_tokens_are_answered_within_seconds_with_reasons():
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "linnet", *M1, "--context", "4M"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - start < 10
    text = " ".join(process.stdout.split())
    assert text.startswith("8 x H800 hold 4M tokens of minimax-m1 with int8 weights: tp=8")
    for part in ("Why", "bf16 weights do not fit", "Memory breaks first at", "Assumed"):
        assert part in text


def test_help_has_an_example_that_parses(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan", "--help"])
    assert stop.value.code == 0
    example = " ".join(capsys.readouterr().out.split()).rpartition("Example: linnet ")[2]
    assert build_parser().parse_args(example.split()).verb == "plan"


def test_json_has_memory_time_and_exchanges(capsys):
    assert main([*M1, "--context", "4M", "--json", "--top", "2"]) == 0
    values = json.loads(capsys.readouterr().out)
    (plan,) = values["plans"]
    assert plan["fits"] and plan["job"]["weights"] == "int8" and len(plan["layouts"]) == 2
    best = plan["layouts"][0]
    assert best["layout"]["tp"] == 8
    assert sum(best["memory_bytes"].values()) == pytest.approx(best["needed_bytes"])
    for phase in best["phases"].values():
        assert sum(phase["parts_s"].values()) == pytest.approx(phase["seconds"])
        assert {"name", "axis", "num_bytes", "calls", "seconds"} <= phase["exchanges"][0].keys()


def test_a_batch_means_training(capsys):
    arguments = [*NANO, "--batch-tokens", "64K", "--json"]
    assert main(arguments) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert list(plan["layouts"][0]["phases"]) == ["step"]
    assert main([*arguments, "--mode", "infer"]) == 0
    (plan,) = json.loads(capsys.readouterr().out)["plans"]
    assert list(plan["layouts"][0]["phases"]) == ["prefill", "decode"]


def test_training_is_printed(capsys):
    assert main([*NANO, "--batch-tokens", "64K"]) == 0
    text = capsys.readouterr().out
    for part in ("2 x A100-80G train nano at 4K tokens", "AdamW moments", "tokens/s", "MFU"):
        assert part in text


def test_several_lengths_give_a_row_each(capsys):
    assert main([*M1, "--context", "128K,1M,32M"]) == 1  # 32M does not fit
    text = capsys.readouterr().out
    assert all(part in text for part in ("128K", "1M", "32M", "none fits", "do not hold"))


def test_axes_can_be_fixed_and_numbers_replaced(capsys):
    arguments = [*M1, "--context", "1M", "--weights", "int8", "--json", "--fix", "tp=8,ep=2"]
    assert main(arguments) == 0
    values = json.loads(capsys.readouterr().out)
    (layout,) = [x["layout"] for x in values["plans"][0]["layouts"]]
    assert (layout["tp"], layout["ep"], layout["etp"]) == (8, 2, 4)
    assert main([*arguments, "--memory-gib", "60", "--efficiency", "memory=0.9"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["device"]["memory_gib"] == 60 and values["efficiency"]["memory"] == 0.9
    assert not values["plans"][0]["fits"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--gpus", "8xH900"], "did you mean 'H800'"),
        (["--gpus", "8"], "say 8xH800"),
        (["--gpus", "8xH800", "--fix", "tq=8"], "'tq' is no axis; did you mean 'tp'"),
        (["--gpus", "8xH800", "--efficiency", "matmul=2"], "must be in (0, 1]"),
        (["--gpus", "8xH800", "--efficiency", "matmal=0.5"], "did you mean 'matmul'"),
        (["--gpus", "8xH800", "--batch", "0"], "must be positive"),
        (["--gpus", "8xH800", "--context", "1M", "--batch-tokens", "1K"], "raise --batch-tokens"),
    ],
)
def test_mistakes_are_one_line(arguments, complaint, capsys):
    assert main(["plan", "minimax-m1", *arguments]) == 1
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--context", "4X"], ["--context", "0"], ["--fix", "tp"], ["--efficiency", "a=b"]]
)
def test_unreadable_options_are_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*M1, *arguments])
    assert stop.value.code == 2


def test_page_is_self_contained(tmp_path, capsys):
    assert main([*NANO, "--page", str(tmp_path / "new" / "page.html")]) == 0
    html = (tmp_path / "new" / "page.html").read_text()
    assert (tmp_path / "new" / "page.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in html and "var(--series-1)" in html and "softmax only" in html
    assert not re.search(r'(src|href)="(?!#)', html)


def test_missing_matplotlib_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*NANO, "--page", str(tmp_path / "page")]) == 1
    assert "pip install 'linnet[train]'" in capsys.readouterr().err
