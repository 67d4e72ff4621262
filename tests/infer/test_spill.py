"""Prefixes on disk, after the process that wrote them was killed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from linnet.infer import Engine, EngineSettings, SamplingParams
from linnet.model.weights import load_model

PROGRAM = """
import sys, itertools
from pathlib import Path
from linnet.infer import Engine, EngineSettings, SamplingParams
from linnet.model.weights import load_model
model = load_model(sys.argv[1], dtype="float32")
engine = Engine(model, EngineSettings(max_model_len=1024, spill_folder=Path(sys.argv[2])))
print("ready", flush=True)
for n in itertools.count():
    prompt = [10 + (7 * n + k) % 200 for k in range(300)]
    engine.submit(prompt, SamplingParams(max_tokens=2, temperature=0.0), lambda update: None)
    while engine.step():
        pass
"""


@pytest.mark.slow
def test_kill_leaves_only_whole_files(model, tmp_path):
    model.save(tmp_path / "model")
    folder = tmp_path / "prefixes"
    for pause_s in (0.3, 0.7, 1.1):
        command = [sys.executable, "-c", PROGRAM, str(tmp_path / "model"), str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(pause_s)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert list(folder.rglob("*.safetensors"))
    loaded = load_model(tmp_path / "model", dtype="float32")
    engine = Engine(loaded, EngineSettings(max_model_len=1024, spill_folder=folder))
    fresh = Engine(loaded, EngineSettings(max_model_len=1024))
    assert not list(folder.rglob("*.tmp"))
    ends = []
    for one in (engine, fresh):
        updates = []
        prompt = [10 + k % 200 for k in range(300)]
        one.submit(prompt, SamplingParams(max_tokens=8, temperature=0.0), updates.append)
        while one.step():
            pass
        ends.append(([t for u in updates for t in u.tokens], updates[-1].usage.cached_tokens))
    engine.stop()
    assert ends[0][0] == ends[1][0]
    assert (ends[0][1], ends[1][1]) == (299, 0)
