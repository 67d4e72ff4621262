"""`linnet train` from a recipe file to the printed outcome and the report."""

import json
from pathlib import Path

import pytest

from linnet.cli import main
from linnet.train.metrics import read_metrics

RECIPE = """
name = "small"
samples = 2

[model]
preset = "nano"
vocab_size = 300
hidden_size = 16
intermediate_size = 16
num_hidden_layers = 2
attn_type_list = [0, 1]
num_attention_heads = 2
head_dim = 8
rotary_dim = 4
num_local_experts = 4

[train]
total_tokens = 1024
batch_tokens = 128
micro_batch_tokens = 128
seq_len = 64
dtype = "float32"
eval_every = 4
save_every = 4

[optim]
learning_rate = 1e-2
warmup_steps = 2
"""


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """Write a recipe and a corpus; return the arguments that train on them."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(6):
        lines = [f"value_{number}_{i} = {i * number} + [markup] * {i}\n" for i in range(80)]
        (corpus / f"{number}.py").write_text("".join(lines))
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    places = ["--set", f"out={tmp_path}/runs", "--set", f"data.source={corpus}"]
    return ["train", str(path), *places, "--set", "data.held_out=0.3"]


def test_training_prints_the_comparison_the_completions_and_the_report(recipe, tmp_path, capsys):
    assert main(recipe) == 0
    out, err = capsys.readouterr()
    for expected in ("small", "zlib -9, each file", "xz -9e, one stream", "bits per byte"):
        assert expected in out
    assert out.count("bold: written by the model") == 2
    folder = tmp_path / "runs" / "small"
    assert str(folder / "report.html") in "".join(out.split())
    assert "learning_rate" in err
    report = (folder / "report.html").read_text()
    assert "value_" in report and "<script" not in report
    assert {path.name for path in folder.glob("*.png")} >= {"loss.png", "bits_per_byte.png"}
    record = json.loads((folder / "run.json").read_text())
    assert record["config"]["train"]["total_tokens"] == 1024
    assert len(record["samples"]) == 2
    assert read_metrics(folder)[-1]["step"] == 8


def test_second_call_needs_resume_and_then_ends_at_once(recipe, capsys):
    assert main([*recipe, "--quiet"]) == 0
    capsys.readouterr()
    assert main([*recipe, "--quiet"]) == 1
    assert "--resume" in capsys.readouterr().err
    assert main([*recipe, "--quiet", "--resume"]) == 0
    assert "bits per byte" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.source=/no/such/folder", "/no/such/folder"),
        ("train.batch_tokns=3", "did you mean 'batch_tokens'"),
        ("model.hidden_sise=3", "did you mean 'hidden_size'"),
        ("train.batch_tokens=100", "micro_batch_tokens"),
        ("model.attn_type_list=[0]", "attn_type_list has 1 entries"),
        ("model.preset=nanoo", "did you mean 'nano'"),
        ("data.tokenizer=/no/tokenizer", "/no/tokenizer"),
    ],
)
def test_mistakes_end_in_one_line(recipe, override, message, capsys):
    assert main([*recipe, "--quiet", "--set", override]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_empty_corpus_ends_in_one_line(recipe, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.py").write_text("")
    assert main([*recipe, "--quiet", "--set", f"data.source={empty}"]) == 1
    err = capsys.readouterr().err
    assert "holds no text" in err and err.count("\n") == 1
