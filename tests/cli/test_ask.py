"""A question about a folder: what is packed, what is reused, and what is told of it."""

import io
import json
import os
import shlex
import signal
import stat
import subprocess
import sys

import pytest

import linnet
from linnet.cli import build_parser, kept_prefix, main
from linnet.cli.kept_prefix import Kept, cache_folder, keep_prefix, stops_within
from linnet.infer import Engine, EngineSettings
from linnet.text import Tokenizer, encode_chat
from linnet.text.folder.prompt import INTRODUCTION

OPTIONS = ["--max-tokens", "16", "--dtype", "float32", "--json"]


@pytest.fixture
def project(tmp_path):
    """Return a folder of three files of about 500 tokens each, and things to leave out."""
    root = tmp_path / "project"
    for n, name in enumerate(("a.py", "sub/b.py", "z.md")):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(f"def f{n}_{i}(x): return {i}" for i in range(30)))
        os.utime(file, (1000 + n, 1000 + n))
    (root / "image.png").write_bytes(b"\x89PNG\0")
    (root / ".gitignore").write_text("*.log\n.gitignore\n")
    (root / "run.log").write_text("log")
    return root


@pytest.fixture
def ask(chat_folder, project, tmp_path, capsys):
    """Return a function that asks, and returns what `--json` printed."""

    def run(question, *options):
        arguments = ["--path", str(project), "--model", str(chat_folder), *OPTIONS, *options]
        cache = [] if "--no-cache" in options else ["--cache-dir", str(tmp_path / "cache")]
        assert main(["ask", question, *arguments, *cache]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_answer_is_that_of_a_chat_with_all_files_first(ask, chat_folder, project):
    result = ask("Where is f1?", "--no-cache")
    texts = [(name, (project / name).read_text()) for name in ("a.py", "sub/b.py", "z.md")]
    files = "".join(f"File: {name}\n```\n{text}\n```\n\n" for name, text in texts)
    model = linnet.load(chat_folder, dtype="float32")
    messages = [
        {"role": "system", "content": f"{INTRODUCTION}\n\n{files}"},
        {"role": "user", "content": "Where is f1?"},
    ]
    prompt = encode_chat(model.tokenizer, messages)
    assert result["prompt_tokens"] == len(prompt) and result["cached_tokens"] == 0
    assert result["answer"] == linnet.generate(model, prompt, max_tokens=16, temperature=0.0)
    assert [file["path"] for file in result["files"]] == [name for name, _ in texts]
    assert sum(file["num_tokens"] for file in result["files"]) < len(prompt)


def test_second_question_is_served_from_disk_with_the_same_answer(ask):
    first = ask("Where is f1?")
    second, again = ask("And where is f2_3?"), ask("Where is f1?")
    num_files = sum(file["num_tokens"] for file in first["files"])
    assert first["cached_tokens"] == 0
    # An engine of its own each time: there is nothing but the disk to have it from.
    assert second["cached_tokens"] == again["cached_tokens"] > num_files
    assert again["answer"] == first["answer"]
    assert second["answer"] == ask("And where is f2_3?", "--no-cache")["answer"]


def test_change_costs_what_stands_after_it(ask, project, monkeypatch):
    monkeypatch.setattr(kept_prefix, "FIRST_STOP", 2500)
    for name in ("a.py", "z.md"):
        (project / name).write_text("".join(f"{name} {n}\n" for n in range(400)))
    ask("Where is f1?", "--max-model-len", "20000")
    (project / "z.md").write_text("something else " * 40)
    later = ask("Where is f1?")
    kept = sum(file["num_tokens"] for file in later["files"][:2])
    assert kept / kept_prefix.GROWTH <= later["cached_tokens"] <= kept + 40
    assert later["answer"] == ask("Where is f1?", "--no-cache")["answer"]
    (project / "a.py").write_text("nothing as before " * 40)
    assert ask("Where is f1?")["cached_tokens"] == 0


def test_order_by_age_keeps_all_before_the_file_that_is_edited(ask, project):
    def edit(number):
        (project / "a.py").write_text(f"def edited{number}(): pass\n" * 30)
        os.utime(project / "a.py", (2000 + number, 2000 + number))

    (project / "z.md").write_text("".join(f"line {n}\n" for n in range(500)))
    os.utime(project / "z.md", (1002, 1002))
    edit(0)
    ask("Where is f1?", "--order", "age")
    edit(1)
    result = ask("Where is f1?", "--order", "age")
    tokens = [file["num_tokens"] for file in result["files"]]
    assert [file["path"] for file in result["files"]] == ["sub/b.py", "z.md", "a.py"]
    assert sum(tokens[:2]) > 2048 and result["cached_tokens"] >= sum(tokens[:2])


def test_prefixes_are_kept_at_the_stops(chat_folder, tmp_path):
    model = linnet.load(chat_folder, dtype="float32")
    settings = EngineSettings(
        max_sequences=1, max_model_len=4096, chunk_tokens=64, spill_folder=tmp_path
    )
    engine = Engine(model, settings)
    engine.start()
    tokens, seen = [10 + n % 200 for n in range(3001)], []
    assert keep_prefix(engine, tokens, [1000, 2000], seen.append) == Kept(0, is_complete=True)
    engine.stop()
    lengths = {int(file.name.partition("-")[0]) for file in tmp_path.rglob("*.safetensors")}
    assert {1000, 2000, 3000} <= lengths
    assert {progress.total for progress in seen} == {3000}
    processed = [progress.processed for progress in seen]
    assert processed == sorted(processed) and processed[-1] == 3000
    assert engine.counters().prompt_tokens_total == 3000  # nothing was computed twice


def test_ctrl_c_keeps_what_was_read(chat_folder, tmp_path):
    model = linnet.load(chat_folder, dtype="float32")
    tokens = [10 + n % 200 for n in range(4001)]

    def engine():
        settings = EngineSettings(
            max_sequences=1, max_model_len=4096, chunk_tokens=64, spill_folder=tmp_path
        )
        built = Engine(model, settings)
        built.start()
        return built

    presses = iter([signal.SIGINT])  # a second one would not wait for the engine

    def press_ctrl_c(progress):
        if progress.processed >= 1000 and (press := next(presses, None)):
            signal.raise_signal(press)

    first = engine()
    assert keep_prefix(first, tokens, [500], press_ctrl_c) == Kept(0, is_complete=False)
    first.stop()
    second = engine()
    seen = []
    kept = keep_prefix(second, tokens, [500, 2000], seen.append)
    second.stop()
    assert kept.is_complete and kept.num_cached >= 1000
    assert seen[0].processed == kept.num_cached and seen[-1].processed == 4000
    third = engine()
    assert keep_prefix(third, tokens, [500, 2000], seen.append) == Kept(4000, is_complete=True)
    third.stop()


def test_stops_grow_and_cost_at_most_half_of_the_cache(chat_engine):
    stops = stops_within(chat_engine, 100_000, 1 << 30)
    assert stops[:3] == [4096, 6144, 9216] and stops[-1] < 100_000
    assert sum(stops) < 3 * 100_000
    assert stops_within(chat_engine, 100_000, 1 << 20) == []
    assert stops_within(chat_engine, 3000, 1 << 30, [100, 400, 9999]) == [2500, 2900]


def test_prompt_that_does_not_fit_the_model_is_refused_with_numbers(project, chat_folder, capsys):
    (project / "huge.txt").write_text("hat " * 8000)
    arguments = ["ask", "Why?", "--path", str(project), "--model", str(chat_folder)]
    assert main([*arguments, "--no-cache"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("linnet: error: ") and error.count("\n") == 1
    assert " tokens in 4 files, " in error and "takes 8,192" in error
    assert "the largest are huge.txt (" in error and "1,024 for the answer" in error


def test_prompt_that_does_not_fit_into_memory_is_refused_with_numbers(project, chat_folder, capsys):
    arguments = ["ask", "Why?", "--path", str(project), "--model", str(chat_folder), "--no-cache"]
    limits = ["--max-tokens", str(10**12), "--max-model-len", str(10**13)]
    assert main([*arguments, *limits]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "free" in error and "The largest files are " in error


def test_what_is_packed_is_told_and_the_answer_stands_alone(project, chat_folder, tmp_path, capsys):
    arguments = ["--path", str(project), "--model", str(chat_folder), "--max-tokens", "16"]
    cache = ["--cache-dir", str(tmp_path / "cache")]
    assert main(["ask", "Why?", *arguments, *cache, "--dtype", "float32"]) == 0
    plain = capsys.readouterr()
    assert "packed    3 files, " in plain.err and "largest   " in plain.err
    assert "left out  1 binary: image.png" in plain.err
    assert "left out  2 ignored by .gitignore: .gitignore, run.log" in plain.err
    assert "0 of them cached; first token after" in plain.err and "tokens/s" in plain.err
    assert main(["ask", "Why?", *arguments, *cache, "--dtype", "float32", "--json"]) == 0
    assert plain.out == json.loads(capsys.readouterr().out)["answer"] + "\n"


def test_list_shows_files_and_asks_nothing(project, chat_folder, capsys):
    (project / "a\x1b[2J.txt").write_text("text")
    arguments = ["--path", str(project), "--model", str(chat_folder), "--list"]
    assert main(["ask", *arguments]) == 0
    output = capsys.readouterr().out
    tokenizer = Tokenizer.load(chat_folder)
    text = f"File: z.md\n```\n{(project / 'z.md').read_text()}\n```\n\n"
    assert f"{len(tokenizer.encode(text)):,}  z.md" in output
    assert "image.png  (binary)" in output and "4 files, " in output and "\x1b" not in output


def test_include_and_exclude_are_patterns(ask):
    result = ask("Why?", "--no-cache", "--include", "*.py", "--exclude", "sub/")
    assert [file["path"] for file in result["files"]] == ["a.py"]
    result = ask("Why?", "--no-cache", "--no-ignore", "--exclude", "*.py")
    assert [file["path"] for file in result["files"]] == [".gitignore", "run.log", "z.md"]


def test_question_may_come_from_standard_input(ask, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where is f1?\n"))
    assert ask("-", "--no-cache")["answer"] == ask("Where is f1?", "--no-cache")["answer"]


@pytest.mark.parametrize("question", [[], [""], [" \n"]])
def test_missing_question_is_an_error(question, chat_folder, capsys):
    assert main(["ask", *question, "--model", str(chat_folder)]) == 1
    assert "there is no question" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--path", "/nowhere", "--model", "MODEL"], "'/nowhere' cannot be read"),
        (["--model", "nano"], "no tokenizer"),
        (["--model", "none/model"], "model folder 'none/model' does not exist"),
        (["--model", "MODEL", "--top-p", "2"], "top_p is 2.0"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, message, chat_folder, capsys):
    arguments = [str(chat_folder) if value == "MODEL" else value for value in arguments]
    assert main(["ask", "Why?", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_cache_lies_where_the_user_has_caches_and_is_private(
    project, chat_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder() == tmp_path / "caches" / "linnet" / "prefixes"
    arguments = ["--path", str(project), "--model", str(chat_folder), "--max-tokens", "2"]
    assert main(["ask", "Why?", *arguments]) == 0
    assert stat.S_IMODE(cache_folder().stat().st_mode) == 0o700
    assert any(cache_folder().rglob("*.safetensors"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "linnet" / "prefixes"


def test_help_has_an_example_that_parses(capsys):
    with pytest.raises(SystemExit):
        main(["ask", "--help"])
    example = " ".join(capsys.readouterr().out.split()).rpartition("Example: linnet ")[2]
    assert build_parser().parse_args(shlex.split(example)).verb == "ask"


@pytest.mark.slow
def test_second_process_starts_where_the_first_ended(project, chat_folder, tmp_path):
    def ask(*options):
        arguments = ["--path", str(project), "--model", str(chat_folder), *OPTIONS, *options]
        process = subprocess.run(
            [sys.executable, "-m", "linnet", "ask", "Where is f1?", *arguments],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        )
        return json.loads(process.stdout)

    cold, warm, alone = ask(), ask(), ask("--no-cache")
    assert cold["cached_tokens"] == 0 and warm["cached_tokens"] > 0.9 * warm["prompt_tokens"]
    assert cold["answer"] == warm["answer"] == alone["answer"]
