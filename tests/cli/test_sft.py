"""`linnet sft` from a model folder, dialogues and a recipe to the outcome and the report."""

import dataclasses
import json
from pathlib import Path

import pytest

from linnet.cli import main
from linnet.model import Model, load_model, preset
from linnet.model.init import initialize
from linnet.text import Tokenizer
from linnet.train.metrics import read_metrics

SMALL = """
[train]
total_tokens = 2048
batch_tokens = 512
micro_batch_tokens = 512
seq_len = 256
dtype = "float32"
eval_every = 2
eval_tokens = 500
final_eval_tokens = 500
save_every = 2

[optim]
learning_rate = 1e-2
warmup_steps = 2
"""
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "attn_type_list": (0, 1),
    "num_attention_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "num_local_experts": 4,
}
MIX = """
[[mix]]
source = "{file}"
weight = 3.0

[[mix]]
source = "text"

[corpus]
source = "{corpus}"
held_out = 0.3
"""


@pytest.fixture
def recipe(tmp_path: Path) -> list[str]:
    """Write a model to start from, dialogues and a recipe; return the arguments that use them."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(6):
        lines = [f"value_{number}_{i} = {i * number}\n" for i in range(80)]
        (corpus / f"{number}.py").write_text("".join(lines))
    model = initialize(Model(dataclasses.replace(preset("nano"), **SHAPE)))
    model.tokenizer = Tokenizer.train([path.read_text() for path in corpus.iterdir()], 320)
    model.save(tmp_path / "first")
    dialogues = [
        {
            "messages": [
                {"role": "user", "content": f"{number}?"},
                {"role": "assistant", "content": f"{number}"},
            ]
        }
        for number in range(20)
    ]
    file = tmp_path / "dialogues.jsonl"
    file.write_text("\n".join(map(json.dumps, dialogues)))
    path = tmp_path / "second.toml"
    start = f'name = "second"\nstart = "{tmp_path}/first"\nsamples = 2\n'
    path.write_text(start + SMALL + MIX.format(file=file, corpus=corpus))
    return ["sft", str(path), "--set", f"out={tmp_path}/runs"]


def test_fine_tuning_prints_its_recipe_outcome_answers_and_report(recipe, tmp_path, capsys):
    assert main(recipe) == 0
    out, err = capsys.readouterr()
    assert '"weight"=3.0' in err
    assert out.count("bold: written by the model") == 2
    folder = tmp_path / "runs" / "second"
    assert str(folder / "report.html") in "".join(out.split())
    assert read_metrics(folder)[-1]["train/tokens"] >= 2048
    assert load_model(folder / "model", dtype="float32").tokenizer is not None
    assert main([*recipe, "--quiet"]) == 1
    assert "--resume" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("start=/no/model", "start '/no/model' is not a folder"),
        ("mix=[{source='recalll'}]", "did you mean 'recall'"),
        ("mix=[{source='/no/file.jsonl'}]", "/no/file.jsonl cannot be read"),
        ("corpus.source=/no/such/folder", "/no/such/folder"),
        ("data.source=stdlib", "unknown key 'data'"),
    ],
)
def test_mistakes_end_in_one_line(recipe, override, message, capsys):
    assert main([*recipe, "--quiet", "--set", override]) == 1
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
