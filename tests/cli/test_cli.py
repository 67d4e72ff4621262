"""The command as a user types it: help, exit codes, errors of one line."""

import os
import shlex
import subprocess
import sys
import time

import pytest

from linnet import __version__
from linnet.cli import build_parser, main

VERBS = ["train", "sft", "generate", "chat", "ask", "serve", "info", "plan", "convert"]


def run(*arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, on one thread."""
    return subprocess.run(
        [sys.executable, "-m", "linnet", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_help_lists_every_verb(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "Example: linnet" in text
    assert all(f"\n    {verb} " in text for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example_that_parses(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    example = " ".join(capsys.readouterr().out.split()).rpartition("Example: linnet ")[2]
    assert build_parser().parse_args(shlex.split(example)).verb == verb


def test_help_starts_quickly_and_without_torch():
    fastest_s = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        assert run("--help").returncode == 0
        fastest_s = min(fastest_s, time.perf_counter() - start)
    assert fastest_s < 0.5
    code = "import sys; from linnet.cli import build_parser; build_parser(); print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"torch", "numpy", "rich", "tokenizers"} & set(modules)


def test_version_is_printed(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"linnet {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["infer"],
        ["info"],
        ["info", "nano", "--lengths", "8,x"],
        ["info", "nano", "--lengths", "0"],
        ["convert", "a", "b", "--dialect", "minimax"],
        ["generate", "a", "b", "--top-k", "x"],
        ["info", "nano", "--unknown"],
    ],
    ids=" ".join,
)
def test_command_that_cannot_be_parsed_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: linnet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "nanoo"], "did you mean 'nano'"),
        (["info", "none/model"], "model folder 'none/model' does not exist"),
        (["generate", "none/model", "x"], "model folder 'none/model' does not exist"),
        (["convert", "none/model", "out"], "model folder 'none/model' does not exist"),
        (["train", "none.toml"], "recipe 'none.toml' is not a file"),
        (["generate", "nano", "x"], "the model has no tokenizer"),
        (["generate", "nano", "x", "--top-p", "2"], "top_p is 2.0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_error_is_one_line_and_exit_code_1(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    output = capsys.readouterr()
    lines = [line for line in output.err.splitlines() if line.startswith("linnet: error:")]
    assert len(lines) == 1 and message in lines[0] and output.err.endswith(lines[0] + "\n")
    assert output.out == ""


@pytest.mark.parametrize("arguments", [["--debug", "info", "nanoo"], ["info", "nanoo", "--debug"]])
def test_debug_shows_the_traceback(arguments):
    process = run(*arguments)
    assert process.returncode == 1
    assert "Traceback" in process.stderr and "ConfigError" in process.stderr


def test_error_of_a_process_is_one_line():
    process = run("info", "nanoo")
    assert process.returncode == 1 and process.stdout == ""
    assert process.stderr.startswith("linnet: error: ") and process.stderr.count("\n") == 1


def test_interrupt_exits_with_130(monkeypatch, capsys):
    from linnet.cli import info

    def interrupted(_args):
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "run", interrupted)
    assert main(["info", "nano"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_closed_pipe_is_no_traceback():
    # `true` ends before anything is written.
    script = f"{sys.executable} -m linnet info nano --json | true; echo ${{PIPESTATUS[0]}}"
    process = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert (process.stdout, process.stderr) == ("1\n", "")
