import json
import subprocess
import sys
import time

import pytest

from linnet.cli import main
from linnet.model import preset

MEASURED = """
import sys
from linnet.cli import main
code = main(["info", "minimax-m1", "--json"])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], file=sys.stderr)
sys.exit(code)
"""


def test_published_model_is_described_within_seconds_and_little_memory():
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", MEASURED], capture_output=True, text=True, check=True
    )
    assert time.perf_counter() - start < 20
    assert int(process.stderr) * 1024 < 2e9
    values = json.loads(process.stdout)
    expected = {
        "params_total": 456089655296,
        "params_active": 45944920064,
        "checkpoint_bytes": 912210767872,
        "kv_bytes_per_token": 40960,
        "state_bytes": 293601280,
    }
    assert {key: values[key] for key in expected} == expected


def test_folder_and_preset_give_the_same_figures(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(preset("tiny").to_dict("minimax_m1")))
    answers = []
    for source in ("tiny", str(tmp_path)):
        assert main(["info", source, "--json", "--lengths", "10,1000"]) == 0
        answers.append(json.loads(capsys.readouterr().out) | {"model": ""})
    assert answers[0] == answers[1]
    assert list(answers[0]["flops_per_token"]) == ["10", "1000"]
    assert answers[0]["config"]["hidden_size"] == 384


def test_curve_of_the_report_is_printed(capsys):
    assert main(["info", "minimax-m1", "--json", "--generation-flops"]) == 0
    curve = json.loads(capsys.readouterr().out)["generation_flops"]
    assert curve["100K"]["ratio"] == pytest.approx(0.2875, abs=5e-5)
    assert curve["100K"]["deepseek-r1"] == pytest.approx(4.4401e16, rel=2e-5)


def test_people_get_tables(capsys):
    assert main(["info", "minimax-m1", "--generation-flops"]) == 0
    text = capsys.readouterr().out
    for part in ("456,089,655,296", "45,944,920,064", "293,601,280", "1,048,576", "0.288"):
        assert part in text
