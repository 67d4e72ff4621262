"""Files and folders appear whole or not at all: on errors, on a full disk, on SIGKILL."""

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from linnet import storage
from linnet.errors import CheckpointError
from linnet.storage import atomic_folder, write_atomic


def full_disk(*_args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill(folder, text):
    (folder / "inner").mkdir()
    (folder / "inner" / "a").write_text(text)
    (folder / "b").write_text(text)


def texts(folder):
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def old(tmp_path):
    with atomic_folder(tmp_path / "model") as staging:
        fill(staging, "old")
    return tmp_path / "model"


def test_file_is_written_and_replaced(tmp_path):
    write_atomic(tmp_path / "a", "one")
    write_atomic(tmp_path / "a", b"\xff\n")
    assert (tmp_path / "a").read_bytes() == b"\xff\n"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch, step):
    write_atomic(tmp_path / "a", "old")
    owner = os if step == "fsync" else type(tmp_path)
    monkeypatch.setattr(owner, step, full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*No space left on device"):
        write_atomic(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("path", ["missing/a", "file/a", "folder"])
def test_file_that_cannot_be_written_is_named(tmp_path, path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match=f"cannot write .*{path}") as caught:
        write_atomic(tmp_path / path, "x")
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_folder_appears_with_all_its_files(old):
    assert texts(old) == {"inner/a": "old", "b": "old"}
    assert [path.name for path in old.parent.iterdir()] == ["model"]


def test_parents_are_made(tmp_path):
    with atomic_folder(tmp_path / "x" / "y" / "model") as staging:
        fill(staging, "new")
    assert texts(tmp_path / "x" / "y" / "model")["b"] == "new"


def test_empty_folder_may_be_filled(tmp_path):
    (tmp_path / "model").mkdir()
    with atomic_folder(tmp_path / "model") as staging:
        fill(staging, "new")
    assert texts(tmp_path / "model")["b"] == "new"


def test_existing_folder_is_refused_before_anything_is_done(old):
    with pytest.raises(CheckpointError, match="exists"), atomic_folder(old):
        raise AssertionError("the body must not run")


@pytest.mark.parametrize("can_exchange", [True, False])
def test_folder_is_replaced(old, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    with atomic_folder(old, overwrite=True) as staging:
        (staging / "c").write_text("new")
        assert texts(old)["b"] == "old"
    assert texts(old) == {"c": "new"}
    assert [path.name for path in old.parent.iterdir()] == ["model"]


def test_folder_behind_a_link_is_replaced_and_the_link_stays(old, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(old)
    with atomic_folder(link, overwrite=True) as staging:
        (staging / "c").write_text("new")
    assert link.is_symlink() and texts(old) == {"c": "new"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "model"]


def fail_exchange_and_second_rename(monkeypatch, path_type):
    calls = []
    rename = path_type.rename

    def second_fails(self, target):
        calls.append(target)
        return full_disk() if len(calls) == 2 else rename(self, target)

    monkeypatch.setattr(storage, "_exchange", lambda *_: False)
    monkeypatch.setattr(path_type, "rename", second_fails)


@pytest.mark.parametrize("step", ["body", "fsync", "rename"])
def test_failure_keeps_the_old_folder_and_leaves_nothing(old, monkeypatch, step):
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", full_disk)
    if step == "rename":
        fail_exchange_and_second_rename(monkeypatch, type(old))
    with (
        pytest.raises(CheckpointError, match=r"cannot save .*No space left.*untouched"),
        atomic_folder(old, overwrite=True) as staging,
    ):
        (staging / "c").write_text("new")
        if step == "body":
            full_disk()
    assert texts(old) == {"inner/a": "old", "b": "old"}
    assert [path.name for path in old.parent.iterdir()] == ["model"]


def test_other_errors_pass_through_and_leave_nothing(old):
    with pytest.raises(KeyboardInterrupt), atomic_folder(old, overwrite=True) as staging:
        (staging / "c").write_text("new")
        raise KeyboardInterrupt
    assert texts(old)["b"] == "old"
    assert [path.name for path in old.parent.iterdir()] == ["model"]


KILL = """
    import os, signal, sys
    from pathlib import Path
    from linnet import storage
    target, step = Path(sys.argv[1]), sys.argv[2]
    die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    if step == "fsync":
        os.fsync = die
    if step == "before-move":
        storage._move_into_place = die
    if step == "after-move":
        storage._sync_folder = lambda folder: die() if folder == target.parent else None
    with storage.atomic_folder(target, overwrite=True) as staging:
        (staging / "c").write_text("new")
        if step == "body":
            die()
"""


@pytest.mark.parametrize("step", ["body", "fsync", "before-move", "after-move"])
def test_killed_save_leaves_the_old_folder_or_the_new_one(old, step):
    code = textwrap.dedent(KILL)
    process = subprocess.run([sys.executable, "-c", code, str(old), step], check=False)
    assert process.returncode == -signal.SIGKILL
    expected = {"c": "new"} if step == "after-move" else {"inner/a": "old", "b": "old"}
    assert texts(old) == expected


LOOP = """
    import sys
    from pathlib import Path
    from linnet.storage import atomic_folder
    for version in range(10**6):
        with atomic_folder(Path(sys.argv[1]), overwrite=True) as staging:
            (staging / "a").write_text(str(version))
            (staging / "b").write_text(str(version))
"""


def test_kills_at_random_moments_never_leave_a_mixture(old):
    source = random.Random(0)
    (old / "a").write_text("old")
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(LOOP), str(old)])
        time.sleep(0.15 + 0.1 * source.random())
        process.kill()
        process.wait()
        files = texts(old)
        assert files["a"] == files["b"]
