"""The README's commands and Python blocks, run as they stand, but for shorter trainings."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from linnet.ops.native.compiler import build, detect_level

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = "".join(re.findall(r"^```bash\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE))
COMMANDS = re.findall(r"^linnet .*", SHELL, flags=re.MULTILINE)
LAUNCHED = re.findall(r"^torchrun .*", SHELL, flags=re.MULTILINE)
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
SHORTER = ["train.total_tokens=12_288", "train.final_eval_tokens=2_000", "samples=1"]
TALKING = {"chat": "Hello\n"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Make a folder like a clone in which `make run` and `make train` were called."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "linnet", "models"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "runs/nano").mkdir(parents=True)
    shutil.copytree(ROOT / "models/nano", folder / "runs/nano/model")
    # What the kernels' own tests compiled; `linnet ask` keeps what it reads in a cache of its own.
    (folder / "cache/linnet").mkdir(parents=True)
    shutil.copy(build(detect_level()), folder / "cache/linnet")
    (folder / "notes").mkdir()
    for number, path in enumerate(sorted((ROOT / "linnet/text").rglob("*.py"))):
        shutil.copy(path, folder / "notes" / f"{number}.txt")
    return folder


def start(arguments: list[str], folder: Path, **options) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(folder / "cache")}
    command = [sys.executable, "-m", "linnet", *arguments]
    return subprocess.Popen(command, cwd=folder, env=environment, text=True, **options)


@contextmanager
def serving(arguments: list[str], folder: Path) -> Iterator[str]:
    """Serve at any port, and give the address."""
    process = start([*arguments, "--port", "0"], folder, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        address = next(match[0] for line in lines if (match := re.search(r"http://\S+", line)))
        yield address
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 0


@pytest.mark.parametrize("command", COMMANDS)
def test_command_succeeds(command, folder):
    verb, *rest = shlex.split(command)[1:]
    if verb == "serve":
        with serving([verb, *rest], folder) as address:
            assert address.startswith("http://127.0.0.1:")
        return
    if verb in ("train", "sft"):
        rest += [word for change in SHORTER for word in ("--set", change)]
    if verb == "sft":
        rest += ["--set", f"corpus.source={folder / 'notes'}"]
    process = start([verb, *rest], folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    output, _ = process.communicate(TALKING.get(verb, ""), timeout=280)
    assert process.returncode == 0 and output.strip()


@pytest.mark.parametrize("command", LAUNCHED)
def test_launched_command_succeeds(command, folder):
    arguments = shlex.split(command)[1:]
    changes = [*SHORTER, "train.total_tokens=6_144", f"data.source={folder / 'notes'}"]
    arguments += [word for change in changes for word in ("--set", change)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Any free port: the default one may be another's.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [*launcher, *arguments], cwd=folder, env=environment, text=True, stdout=pipe, stderr=pipe
    )
    try:
        output, errors = process.communicate(timeout=280)
    finally:
        process.terminate()  # and, unlike a kill, the ranks with it
    assert process.returncode == 0, errors[-2000:]
    assert "6,144 tokens" in output and "report.html" in output


def test_there_are_launched_commands():
    sizes = [re.search(r"--nproc-per-node (\d)", command) for command in LAUNCHED]
    assert [size and size[1] for size in sizes] == ["2", "4"]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number, folder, monkeypatch, capsys):
    block = BLOCKS[number]
    monkeypatch.chdir(folder)
    if "base_url" in block:
        with serving(["serve"], folder) as address:
            exec(compile(block.replace("http://127.0.0.1:8000", address), "README.md", "exec"), {})
        assert capsys.readouterr().out == "The code of the blue door is 7342.\n"
        return
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    if "print(" in block:
        assert capsys.readouterr().out.strip()
    else:
        assert names["o"].shape == (1, 1000, 8, 64) and names["state"].shape == (2, 8, 64, 64)
