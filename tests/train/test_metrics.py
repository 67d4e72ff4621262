import json
import logging
import math
import sys

import pytest

from linnet.errors import DataError
from linnet.train.metrics import MetricsWriter, read_metrics


def write_run(folder, steps, **options):
    with MetricsWriter(folder, tensorboard=False, **options) as writer:
        for step in steps:
            writer.write(step, {"train/loss": 1.0 / step})


def steps_in(folder):
    return [row["step"] for row in read_metrics(folder)]


def test_every_line_is_on_disk_before_the_next_step(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write(1, {"train/loss": 2.5})
    line = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert line["step"] == 1 and line["train/loss"] == 2.5 and line["time_s"] >= 0
    writer.close()
    writer.close()


def test_non_finite_values_survive_in_strictly_valid_json(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.0}
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, values)

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = read_metrics(tmp_path)
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf
    assert row["d"] == 1.0


def test_tensor_values_are_written_as_numbers(tmp_path):
    import torch

    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write(1, {"train/loss": torch.tensor(0.5)})  # type: ignore[dict-item]
    assert read_metrics(tmp_path)[0]["train/loss"] == 0.5


@pytest.mark.parametrize("name", ["step", "time_s"])
def test_reserved_names_are_refused(tmp_path, name):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        with pytest.raises(ValueError, match=name):
            writer.write(1, {name: 1.0})
        assert read_metrics(tmp_path) == []


def test_resume_drops_steps_after_the_checkpoint(tmp_path):
    write_run(tmp_path, [1, 2, 3, 4])
    write_run(tmp_path, [3, 4, 5], resume_step=2)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resume_drops_a_line_torn_by_a_kill(tmp_path):
    write_run(tmp_path, [1, 2])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "time_')
    write_run(tmp_path, [3], resume_step=3)
    assert steps_in(tmp_path) == [1, 2, 3]


def test_resumed_time_continues_from_the_last_kept_line(tmp_path):
    line = {"step": 7, "time_s": 1000.0, "train/loss": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    write_run(tmp_path, [8], resume_step=7)
    assert 1000.0 <= read_metrics(tmp_path)[1]["time_s"] < 1010.0


def test_resume_without_a_history_starts_one(tmp_path):
    write_run(tmp_path, [11], resume_step=10)
    assert steps_in(tmp_path) == [11]


def test_new_run_keeps_the_old_history_aside(tmp_path):
    write_run(tmp_path, [1, 2])
    write_run(tmp_path, [1])
    assert steps_in(tmp_path) == [1]
    assert len((tmp_path / "metrics.previous.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "tail",
    [b'{"step": 2', b'{"step": 2, "time_s": 1.0, "x": "\xc3', b"\x00\x00\x00", b"2", b"[]"],
    ids=["cut-key", "cut-character", "zeros", "number", "list"],
)
def test_reading_leaves_out_a_torn_last_line(tmp_path, tail):
    write_run(tmp_path, [1])
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(tail)
    assert steps_in(tmp_path) == [1]


def test_last_line_without_newline_is_kept_when_complete(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 0.5}')
    assert steps_in(tmp_path) == [1]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path):
    text = '{"step": 1, "time_s": 0.5}\ngarbage\n{"step": 3, "time_s": 0.7}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(DataError, match="line 2"):
        read_metrics(tmp_path)


def test_missing_file_reads_as_an_empty_history(tmp_path):
    assert read_metrics(tmp_path) == []


def test_tensorboard_receives_the_scalars(tmp_path):
    pytest.importorskip("tensorboard")
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 2.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"train/loss" in events.read_bytes()


def test_missing_tensorboard_is_one_warning_and_no_error(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with caplog.at_level(logging.WARNING), MetricsWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 2.5})
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "linnet[train]" in caplog.text and steps_in(tmp_path) == [1]
