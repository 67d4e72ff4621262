import errno
import json
import os

import pytest
import torch

from linnet.errors import CheckpointError
from linnet.model import load_model
from linnet.train import Trainer
from linnet.train.checkpoint import (
    best_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)


@pytest.fixture
def trainer(recipe) -> Trainer:
    trainer = Trainer(recipe(), show_progress=False)
    trainer._step()
    return trainer


def save(trainer: Trainer, step: int, bits: float | None, keep_last: int = 2) -> None:
    trainer.progress.step = step
    trainer.progress.bits_per_byte = bits
    checkpoints = trainer._checkpoints
    save_checkpoint(
        checkpoints, trainer.model, trainer.workers.optimizer, trainer.progress, keep_last
    )


def names(trainer: Trainer) -> list[str]:
    return [path.name for path in list_checkpoints(trainer._checkpoints)]


def test_last_ones_and_the_best_are_kept(trainer):
    for step, bits in ((1, 3.0), (2, 2.0), (3, 2.5), (4, 2.6), (5, 2.7)):
        save(trainer, step, bits)
    assert names(trainer) == ["step_00000002", "step_00000004", "step_00000005"]
    best = best_checkpoint(trainer._checkpoints)
    assert best is not None and best.name == "step_00000002"
    assert sorted(os.listdir(trainer._checkpoints)) == names(trainer)


def test_checkpoint_restores_weights_moments_and_random_state(trainer, recipe):
    save(trainer, 1, None)
    expected = torch.rand(3)
    other = Trainer(recipe("other"), show_progress=False)
    torch.manual_seed(99)
    progress = load_checkpoint(
        list_checkpoints(trainer._checkpoints)[0], other.model, other.workers.optimizer
    )
    assert torch.equal(torch.rand(3), expected)
    assert progress.step == 1 and progress.data == trainer.progress.data
    for a, b in zip(trainer.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
        left, right = trainer.workers.optimizer.state[a], other.workers.optimizer.state[b]
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)


def test_checkpoint_is_a_model_folder(trainer):
    save(trainer, 1, None)
    model = load_model(list_checkpoints(trainer._checkpoints)[0] / "model", dtype="float32")
    assert model.tokenizer is not None
    assert torch.equal(model.lm_head.weight, trainer.model.lm_head.weight)


def test_full_disk_while_saving_leaves_the_checkpoints_before(trainer, monkeypatch):
    save(trainer, 1, 2.0)
    before = sorted(os.listdir(trainer._checkpoints))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            save(trainer, 2, 1.0)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(trainer._checkpoints)) == before
    load_model(list_checkpoints(trainer._checkpoints)[0] / "model")


def test_half_written_checkpoint_is_never_taken_for_a_whole_one(trainer):
    save(trainer, 1, 2.0)
    half = trainer._checkpoints / ".step_00000002.0badcafe.tmp"
    (half / "model").mkdir(parents=True)
    (half / "state.json").write_text("{}")
    assert names(trainer) == ["step_00000001"]
    save(trainer, 3, 2.0)
    assert not half.exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", b"{"),
        ("state.json", b'{"step": "one"}'),
        ("optimizer.safetensors", b"\x00" * 40),
        ("model/model.safetensors", b"short"),
    ],
)
def test_damaged_checkpoint_is_refused_in_one_line(trainer, file, content):
    save(trainer, 1, None)
    (checkpoint,) = list_checkpoints(trainer._checkpoints)
    (checkpoint / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")) as caught:
        load_checkpoint(checkpoint, trainer.model, trainer.workers.optimizer)
    assert "\n" not in str(caught.value)


def test_state_is_plain_json_without_code(trainer):
    save(trainer, 1, 2.0)
    (checkpoint,) = list_checkpoints(trainer._checkpoints)
    files = {path.name for path in checkpoint.rglob("*") if path.is_file()}
    assert not {name for name in files if not name.endswith((".json", ".safetensors", ".jinja"))}
    assert json.loads((checkpoint / "state.json").read_text())["tokens"] == 128
