"""Real processes that die or hang: the others stop with one line, and a launcher goes on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from linnet.train import Recipe, Trainer
from linnet.train.checkpoint import list_checkpoints, read_progress
from linnet.train.metrics import read_metrics

pytestmark = pytest.mark.slow

RECIPE = """
name = "{name}"
out = "{out}"
samples = 0
[data]
source = "{source}"
held_out = 0.2
folder = "{out}/data"
[train]
total_tokens = {total}
batch_tokens = {batch}
micro_batch_tokens = 100
seq_len = 100
dtype = "float32"
eval_every = 5
eval_tokens = 500
final_eval_tokens = 500
save_every = 5
[optim]
learning_rate = 5e-4
min_learning_rate = 1e-4
warmup_steps = 5
[parallel]
timeout_s = 20
[model]
preset = "nano"
vocab_size = 300
num_hidden_layers = 4
attn_type_list = [0, 0, 1, 0]
"""


@pytest.fixture
def recipe(tmp_path):
    """Return a function that writes a recipe."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(8):
        lines = [f"def f{number}_{i}(x):\n    return x * {i} + {number}\n" for i in range(12)]
        (corpus / f"m{number}.py").write_text("\n".join(lines))

    def write(name: str, steps: int, batch: int = 1200) -> Path:
        path = tmp_path / f"{name}.toml"
        sizes = {"total": batch * steps, "batch": batch}
        path.write_text(RECIPE.format(name=name, out=tmp_path, source=corpus, **sizes))
        return path

    return write


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def start(recipe: Path, size: int) -> list[subprocess.Popen[str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "linnet", "train", str(recipe), "--quiet"],
            env=environment(
                RANK=str(rank),
                WORLD_SIZE=str(size),
                LOCAL_RANK=str(rank),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            ),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for rank in range(size)
    ]


def wait_for_steps(folder: Path, steps: int, timeout_s: float = 90) -> None:
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        if (folder / "metrics.jsonl").exists() and len(read_metrics(folder)) >= steps:
            return
        time.sleep(0.1)
    raise TimeoutError(f"{folder} has no {steps} steps after {timeout_s} s")


@pytest.mark.parametrize("loss", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_rank_that_dies_or_hangs_stops_all_others_with_one_line(recipe, tmp_path, loss):
    processes = start(recipe("lost", 5_000), 3)
    try:
        wait_for_steps(tmp_path / "lost", 7)
        processes[1].send_signal(loss)
        for rank in (0, 2):
            _, errors = processes[rank].communicate(timeout=60)
            lines = [line for line in errors.splitlines() if "error:" in line]
            assert processes[rank].returncode == 1
            assert len(lines) == 1 and "Traceback" not in errors, errors
            assert f"linnet: rank {rank}: error: lost contact with another rank" in lines[0]
            assert "--resume" in lines[0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    checkpoints = list_checkpoints(tmp_path / "lost" / "checkpoints")
    assert checkpoints
    for checkpoint in checkpoints:
        assert read_progress(checkpoint).step % 5 == 0
        assert len(list((checkpoint / "sharded").iterdir())) == 3


def torchrun(
    recipe: Path, size: int, *arguments: str, resume: bool = False
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command += ["--master-port", "0", "--rdzv-endpoint", "127.0.0.1:0", "--rdzv-backend", "c10d"]
    command += [*arguments, "-m", "linnet", "train", str(recipe), "--quiet"]
    command += ["--resume"] * resume
    return subprocess.Popen(
        command, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def children(process: subprocess.Popen[str]) -> list[int]:
    text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


def finish(process: subprocess.Popen[str]) -> int:
    process.communicate(timeout=240)
    return process.returncode


@pytest.mark.timeout(600)
def test_launcher_goes_on_after_a_killed_worker_and_then_with_fewer(recipe, tmp_path):
    Trainer(Recipe.from_file(recipe("whole", 10, batch=400)), show_progress=False).run()
    path = recipe("killed", 10, batch=400)
    killed = torchrun(path, 4, "--max-restarts", "2")
    try:
        wait_for_steps(tmp_path / "killed", 6)
        os.kill(children(killed)[1], signal.SIGKILL)
        wait_for_steps(tmp_path / "killed", 8)
    finally:
        killed.send_signal(signal.SIGTERM)
        finish(killed)
    assert list_checkpoints(tmp_path / "killed" / "checkpoints")
    assert finish(torchrun(path, 2, resume=True)) == 0
    losses = [
        [row["train/loss"] for row in read_metrics(tmp_path / name)] for name in ("whole", "killed")
    ]
    assert len(losses[0]) == 10
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert json.loads((tmp_path / "killed" / "run.json").read_text())["complete"]
