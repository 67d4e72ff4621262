"""The planner's memory against torch's tracker, in a world of 2,048 ranks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_plan_memory.py"


@pytest.mark.slow
def test_memory_at_2048_ranks_is_what_the_tracker_sees():
    process = subprocess.run(
        [sys.executable, str(SCRIPT), "--json"], capture_output=True, text=True, check=True
    )
    ratios = {part: row["ratio"] for part, row in json.loads(process.stdout).items()}
    for part in ("parameters", "gradients", "AdamW moments"):
        assert ratios[part] == pytest.approx(1, abs=0.01)
    assert ratios["peak of all"] == pytest.approx(1, abs=0.02)
    assert ratios["kept by a lightning block"] == pytest.approx(1, abs=0.02)
    assert ratios["kept by a softmax block"] == pytest.approx(1, abs=0.02)
    # The tracker counts gradients of activations among those of weights.
    assert 0.85 < ratios["unsharded blocks"] < 1.05
