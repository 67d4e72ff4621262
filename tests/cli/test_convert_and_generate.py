"""Converting and generating as a user types it, on a tiny model folder."""

import io
import sys
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

import linnet
from linnet.cli import main
from linnet.text import Tokenizer


@pytest.fixture
def folder(tmp_path):
    model = linnet.load("nano", dtype="float32")
    model.tokenizer = Tokenizer.train(["the cat and the hat"], vocab_size=290)
    model.save(tmp_path / "model")
    return tmp_path / "model"


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_round_trip_through_a_published_dialect_loses_nothing(folder, tmp_path, capsys):
    published, back = tmp_path / "m1", tmp_path / "back"
    assert main(["convert", str(folder), str(published), "--dialect", "minimax_m1"]) == 0
    assert capsys.readouterr().out == f"wrote {published} (minimax_m1, float32)\n"
    assert main(["convert", str(published), str(back)]) == 0
    before, after = weights(folder), weights(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for file in ("config.json", "tokenizer.json"):
        assert (back / file).read_bytes() == (folder / file).read_bytes()


def test_dtype_is_changed_when_asked(folder, tmp_path):
    assert main(["convert", str(folder), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    dtypes = {name: value.dtype for name, value in weights(tmp_path / "out").items()}
    routers = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert routers == {f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(8)}


def test_existing_target_is_replaced_only_when_asked(folder, tmp_path, capsys):
    target = str(tmp_path / "out")
    assert main(["convert", str(folder), target]) == 0
    assert main(["convert", str(folder), target]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["convert", str(folder), target, "--overwrite"]) == 0


def test_model_that_a_dialect_cannot_express_is_refused(folder, tmp_path, capsys):
    arguments = ["convert", str(folder), str(tmp_path / "out"), "--dialect", "transformers"]
    assert main(arguments) == 1
    assert "turns whole heads" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_generated_text_follows_the_prompt(folder, capsys):
    arguments = ["generate", str(folder), "the cat", "--max-tokens", "9", "--temperature", "0"]
    assert main([*arguments, "--dtype", "float32"]) == 0
    model = linnet.load(folder, dtype="float32")
    expected = linnet.generate(model, "the cat", max_tokens=9, temperature=0)
    assert capsys.readouterr().out == f"the cat{expected}\n"


def test_prompt_comes_from_standard_input(folder, capsys, monkeypatch):
    arguments = ["generate", str(folder), "--max-tokens", "9", "--seed", "1", "--dtype", "float32"]
    assert main([*arguments, "the\ncat"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\ncat"))
    assert main([*arguments, "-"]) == 0
    assert capsys.readouterr().out == expected


def test_text_is_streamed_as_it_comes(folder, monkeypatch):
    flushed = []

    class Screen(io.StringIO):
        def flush(self):
            flushed.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Screen())
    assert main(["generate", str(folder), "the", "--max-tokens", "20", "--seed", "2"]) == 0
    assert len(flushed) > 5
    assert all(later.startswith(earlier) for earlier, later in pairwise(flushed))


def test_stop_ends_the_text(folder, capsys):
    arguments = ["generate", str(folder), "the", "--max-tokens", "40", "--seed", "3"]
    assert main(arguments) == 0
    text = capsys.readouterr().out.removeprefix("the").removesuffix("\n")
    stop = text[len(text) // 2 :][:2]
    assert main([*arguments, "--stop", stop]) == 0
    assert capsys.readouterr().out == f"the{text[: text.index(stop)]}\n"


def test_int8_weights_generate(folder, capsys):
    arguments = ["generate", str(folder), "the cat", "--max-tokens", "9", "--temperature", "0"]
    assert main([*arguments, "--dtype", "float32", "--quantization", "int8"]) == 0
    model = linnet.load(folder, dtype="float32", quantization="int8")
    expected = linnet.generate(model, "the cat", max_tokens=9, temperature=0)
    assert capsys.readouterr().out == f"the cat{expected}\n"
