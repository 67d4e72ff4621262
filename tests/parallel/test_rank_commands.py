"""`linnet generate` and `linnet serve` as processes of a launcher."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import httpx2
import pytest
import torch

from linnet.cli import main
from linnet.model import Model, ModelConfig
from linnet.model.init import initialize
from linnet.text import Tokenizer

TEXT = "user name ai assistant the cat and the hat"
PROMPT = {
    "messages": [{"role": "user", "content": "the cat"}],
    "max_tokens": 5,
    "temperature": 0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = Tokenizer.train([TEXT], 290)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_type_list=(0, 1),
        rotary_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.4,
    )
    model = initialize(Model(config), torch.Generator().manual_seed(0))
    model.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("models") / "cat"
    model.save(folder)
    return folder


def torchrun(*arguments) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, "--nproc-per-node", "2", "-m", "linnet", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--tp", "2", "--ep", "2"], ["--cp", "2"], []], ids=str)
def test_generate_over_ranks_writes_what_one_process_writes(folder, capsys, options):
    arguments = ["generate", str(folder), TEXT * 5, "--dtype", "float32", "--max-tokens", "20"]
    arguments += ["--seed", "3"]
    process = torchrun(*arguments, *options)
    assert main(arguments) == 0
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert out == capsys.readouterr().out


@pytest.mark.slow
def test_error_is_told_by_the_first_rank_alone(folder):
    process = torchrun("generate", folder, TEXT, "--tp", "2", "--ep", "3")
    out, errors = process.communicate(timeout=120)
    assert process.returncode and not out
    (line,) = [line for line in errors.splitlines() if "error:" in line and "linnet" in line]
    assert line.startswith("linnet: rank 0: error: ") and "ep*etp = 3" in line


def test_ranks_without_a_launcher_are_refused(folder, capsys):
    assert main(["serve", str(folder), "--port", "0", "--ep", "2"]) == 1
    assert "--ep 2 needs several ranks; start them with torchrun" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "ending"), [("tp", "told"), ("cp", "killed")])
def test_server_over_ranks_answers_until_it_ends(folder, axis, ending):
    arguments = ["serve", folder, "--port", "0", "--max-model-len", "512", "--memory-gib", "0.1"]
    process = torchrun(*arguments, f"--{axis}", "2", "--ep", "2", "--dtype", "float32")
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(5)]
        url = lines[-1].split()[1]
        with httpx2.Client(base_url=url, timeout=60) as http:
            answer = http.post("/v1/chat/completions", json=PROMPT).json()
        assert answer["usage"]["completion_tokens"] > 0
        assert f"ranks   2: {axis} 2, ep 2; memory is that of each\n" in lines
        ranks = children(process)
        if ending == "told":
            process.send_signal(signal.SIGTERM)
        else:
            os.kill(ranks[0], signal.SIGKILL)
        process.communicate(timeout=60)
        deadline = time.monotonic() + 30
        while any(map(is_alive, ranks)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(is_alive, ranks))
    finally:
        process.kill()


def children(process: subprocess.Popen[str]) -> list[int]:
    """Return the processes of rank 0 and the others, in the order of their start."""
    with open(f"/proc/{process.pid}/task/{process.pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


def is_alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False
