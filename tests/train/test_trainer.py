import base64
import json
import logging
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from linnet.data import PackedBatch
from linnet.errors import CheckpointError, ConfigError, DataError, TrainingError
from linnet.model import Model, load_model
from linnet.model.init import initialize
from linnet.train import Trainer
from linnet.train.checkpoint import list_checkpoints, read_progress
from linnet.train.loss import batch_loss
from linnet.train.metrics import read_metrics


def run(recipe, **kwargs) -> Trainer:
    trainer = Trainer(recipe, show_progress=False, **kwargs)
    trainer.run()
    return trainer


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder, dtype="float32").named_parameters())


def assert_same_run(left: Path, right: Path) -> None:
    for (name, a), (_, b) in zip(
        weights(left / "model").items(), weights(right / "model").items(), strict=True
    ):
        assert torch.equal(a, b), name
    losses = [[row["train/loss"] for row in read_metrics(folder)] for folder in (left, right)]
    assert losses[0] == losses[1]


def test_training_lowers_the_loss(recipe):
    trainer = run(recipe(train={"total_tokens": 6400, "save_every": 100, "eval_every": 100}))
    rows = read_metrics(trainer.folder)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] - 1.5
    assert rows[-1]["step"] == 50


def test_same_seed_gives_the_same_run(recipe):
    first, second = run(recipe("a")), run(recipe("b"))
    assert_same_run(first.folder, second.folder)


def test_resumed_run_equals_uninterrupted_one_bit_for_bit(recipe):
    whole = run(recipe("whole", train={"keep_last": 9}))
    for step in (4, 8):
        name = f"resumed_{step}"
        folder = whole.folder.parent / name
        folder.mkdir()
        checkpoint = f"checkpoints/step_{step:08d}"
        shutil.copytree(whole.folder / checkpoint, folder / checkpoint)
        # The metrics of a killed run go on past its last checkpoint.
        shutil.copy(whole.folder / "metrics.jsonl", folder)
        resumed = run(recipe(name), resume=True)
        assert resumed.progress.step == 12
        assert_same_run(whole.folder, folder)


def test_resumed_run_keeps_the_held_out_measurements(recipe):
    whole = run(recipe("whole", train={"keep_last": 9}))
    bits = [row["eval/bits_per_byte"] for row in read_metrics(whole.folder) if row["step"] % 4 == 0]
    saved = [read_progress(path).bits_per_byte for path in list_checkpoints(whole._checkpoints)]
    assert bits == saved


CHILD = """
import sys, torch
from linnet.train import Recipe, Trainer
from linnet.config import read_toml
torch.set_num_threads(1)
recipe = Recipe.from_file(sys.argv[1])
Trainer(recipe, resume=sys.argv[2] == "resume", show_progress=False).run()
"""


def write_toml(path: Path, recipe) -> None:
    sections = recipe.to_dict()
    lines = [f"{k} = {json.dumps(v)}" for k, v in sections.items() if not isinstance(v, dict)]
    for name, section in sections.items():
        if isinstance(section, dict):
            lines.append(f"[{name}]")
            lines += [f"{k} = {json.dumps(v)}" for k, v in section.items() if v is not None]
    path.write_text("\n".join(lines))


def lines_in(folder):
    return len(read_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0


@pytest.mark.slow
def test_run_killed_at_random_moments_ends_as_if_it_never_was(recipe, tmp_path):
    long = {"total_tokens": 128 * 60, "save_every": 5, "eval_every": 20, "threads": 1}
    whole, killed = recipe("whole", train=long), recipe("killed", train=long)
    write_toml(tmp_path / "whole.toml", whole)
    write_toml(tmp_path / "killed.toml", killed)
    command = [sys.executable, "-c", CHILD]
    subprocess.run([*command, tmp_path / "whole.toml", "new"], check=True)
    generator = random.Random(0)
    kills = 0
    for _ in range(40):
        saved = list_checkpoints(killed.folder / "checkpoints")
        for path in saved:
            load_model(path / "model", dtype="float32")
        process = subprocess.Popen(
            [*command, tmp_path / "killed.toml", "resume" if saved else "new"],
            stderr=subprocess.DEVNULL,
        )
        # Killed while training or saving, not while importing: wait for a new line of metrics.
        before = lines_in(killed.folder)
        while process.poll() is None and lines_in(killed.folder) <= before:
            time.sleep(0.01)
        time.sleep(generator.uniform(0.0, 0.4))
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert process.returncode == 0 and kills >= 3
    assert_same_run(whole.folder, killed.folder)


def test_interrupt_saves_and_a_resumed_run_ends_the_same(recipe, monkeypatch):
    whole = run(recipe("whole", train={"save_every": 100}))
    stopped = Trainer(recipe("stopped", train={"save_every": 100}), show_progress=False)
    take_step = stopped._step

    def step_then_interrupt():
        values = take_step()
        if stopped.progress.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return values

    monkeypatch.setattr(stopped, "_step", step_then_interrupt)
    record = stopped.run()
    assert record["complete"] is False
    assert [path.name for path in list_checkpoints(stopped._checkpoints)] == ["step_00000005"]
    resumed = run(recipe("stopped", train={"save_every": 100}), resume=True)
    assert resumed.is_complete
    assert_same_run(whole.folder, resumed.folder)


def test_interrupt_while_measuring_saves_too(recipe, monkeypatch):
    trainer = Trainer(recipe("stopped", train={"save_every": 100}), show_progress=False)
    measure = trainer.measure

    def interrupted(held_out):
        if not trainer._stop_requested:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(held_out)

    monkeypatch.setattr(trainer, "measure", interrupted)
    record = trainer.run()
    assert record["complete"] is False and record["baselines"] == {}
    assert [path.name for path in list_checkpoints(trainer._checkpoints)] == ["step_00000004"]


def test_resuming_another_model_is_refused_and_another_recipe_is_noted(recipe, caplog):
    run(recipe())
    with pytest.raises(CheckpointError, match="postnorm differ"):
        Trainer(recipe(model={"postnorm": False}), resume=True, show_progress=False)
    with caplog.at_level(logging.WARNING):
        Trainer(recipe(optim={"learning_rate": 0.5}), resume=True, show_progress=False)
    assert "changed since this run began: optim.learning_rate" in caplog.text


def test_resumed_trainer_holds_the_saved_random_state(recipe):
    whole = run(recipe("whole", train={"keep_last": 9}))
    state = read_progress(list_checkpoints(whole._checkpoints)[-1]).rng
    Trainer(recipe("whole"), resume=True, show_progress=False)
    assert base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode() == state


def test_micro_batches_give_the_gradient_of_the_whole_batch(recipe):
    config = recipe().model
    model = initialize(Model(config), torch.Generator().manual_seed(0)).train()
    tokens = torch.randint(0, 300, (1, 97), generator=torch.Generator().manual_seed(1))

    def batch(start: int, stop: int) -> PackedBatch:
        cu_seqlens = torch.tensor([0, stop - start])
        inputs, targets = tokens[:, start:stop], tokens[:, start + 1 : stop + 1]
        return PackedBatch(inputs, targets, cu_seqlens, stop - start)

    # Two documents of different length, together and one after the other.
    joined = PackedBatch(tokens[:, :96], tokens[:, 1:], torch.tensor([0, 32, 96]), 96)
    (batch_loss(model, joined, "paper").nll / 96).backward()
    whole = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for part in (batch(0, 32), batch(32, 96)):
        (batch_loss(model, part, "paper").nll / 96).backward()
    for (name, parameter), expected in zip(model.named_parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4, msg=name)


def test_step_with_a_non_finite_gradient_changes_nothing_and_is_counted(recipe, caplog):
    trainer = Trainer(recipe(), show_progress=False)
    accumulate = trainer._accumulate
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}

    def poisoned(count):
        values = accumulate(count)
        trainer.model.norm.weight.grad[0] = math.nan
        return values

    trainer._accumulate = poisoned
    with caplog.at_level(logging.WARNING):
        values = trainer._step()
    assert values["train/skipped_steps"] == 1
    assert "step 1 skipped" in caplog.text
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_run_stops_after_too_many_non_finite_steps_and_keeps_its_checkpoints(recipe):
    trainer = Trainer(recipe(train={"max_skipped_steps": 3}), show_progress=False)
    take_step = trainer._step

    def damaged_after_six():
        if trainer.progress.step == 6:
            with torch.no_grad():
                trainer.model.norm.weight.fill_(math.inf)
        return take_step()

    trainer._step = damaged_after_six
    with pytest.raises(TrainingError, match="3 steps in a row were not finite"):
        trainer.run()
    saved = list_checkpoints(trainer._checkpoints)
    assert saved and all(load_model(path / "model") for path in saved)


def test_capacity_drops_are_counted_in_training_only(recipe):
    trainer = run(recipe(model={"capacity_factor": 0.5}, optim={"aux_loss_coef": 0.0}))
    rows = read_metrics(trainer.folder)
    assert rows[-1]["moe/layer_00/dropped"] >= 128
    trainer.model.eval()
    tokens = torch.randint(0, 300, (1, 64))
    full = trainer.model(tokens)
    halves = torch.cat((trainer.model(tokens[:, :32]), full[:, 32:]), 1)
    torch.testing.assert_close(halves, full, atol=1e-5, rtol=1e-5)


def test_resuming_without_a_checkpoint_starts_and_a_finished_run_stays_as_it_is(recipe):
    first = run(recipe(), resume=True)
    before = weights(first.folder / "model")
    again = Trainer(recipe(), resume=True, show_progress=False)
    record = again.run()
    assert record["complete"] and record["summary"]["steps"] == 12
    assert [len(layer) for layer in record["expert_load"]] == [4, 4]
    assert sum(record["expert_load"][0]) == pytest.approx(2)
    after = weights(first.folder / "model")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(read_metrics(first.folder)) == 12


def test_run_folder_in_use_is_refused_without_resume(recipe):
    run(recipe())
    with pytest.raises(ConfigError, match="resume it with --resume"):
        Trainer(recipe(), show_progress=False)


def test_resuming_with_other_data_settings_is_refused(recipe):
    run(recipe())
    with pytest.raises(DataError, match="seq_len"):
        Trainer(recipe(train={"seq_len": 16, "total_tokens": 4096}), True, show_progress=False)


def test_tokenizer_larger_than_the_vocabulary_is_refused(recipe, tmp_path):
    run(recipe("first"))
    small = {"vocab_size": 280}
    with pytest.raises(ConfigError, match="284 ids"):
        Trainer(
            recipe(model=small, data={"tokenizer": str(tmp_path / "data" / "tokenizer")}),
            show_progress=False,
        )


def test_bf16_computation_keeps_fp32_master_weights(recipe):
    trainer = run(recipe(train={"dtype": "bfloat16"}))
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())
    assert trainer.model.hidden_states(torch.zeros(1, 3, dtype=torch.int64))[0].dtype == (
        torch.bfloat16
    )
    rows = read_metrics(trainer.folder)
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


@pytest.mark.slow
def test_a_thousand_steps_do_not_grow_memory(recipe):
    train = {"total_tokens": 64 * 1000, "batch_tokens": 64, "save_every": 250, "eval_every": 250}
    trainer = run(recipe(train=train))
    rows = read_metrics(trainer.folder)
    early = max(row["memory/rss_bytes"] for row in rows if 300 <= row["step"] <= 550)
    late = max(row["memory/rss_bytes"] for row in rows if row["step"] > 750)
    assert rows[-1]["step"] == 1000
    assert late - early < 4 * 2**20, f"grew by {(late - early) / 2**20:.1f} MiB"
