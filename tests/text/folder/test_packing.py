"""A folder becomes texts: the same ones in the same order each time, and nothing but text."""

import os

import pytest

from linnet.errors import DataError
from linnet.text.folder import packing
from linnet.text.folder.packing import SkippedFile, pack_folder


def write(root, files):
    for path, content in files.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())


def paths(packed):
    return [file.path for file in packed.files]


def reasons(packed):
    return {item.path: item.reason for item in packed.skipped}


def test_files_come_by_path_with_their_names(tmp_path):
    write(tmp_path, {"b.txt": "two\n", "a/z.py": "one\n", "a.md": "three", "B.txt": "four"})
    packed = pack_folder(tmp_path)
    assert paths(packed) == ["B.txt", "a/z.py", "a.md", "b.txt"]
    assert packed.files[1].text == "File: a/z.py\n```\none\n```\n\n"
    assert pack_folder(tmp_path) == packed


def test_order_by_age_puts_the_last_change_last(tmp_path):
    write(tmp_path, dict.fromkeys("abc", "text"))
    for name, seconds in (("a", 300), ("b", 100), ("c", 200)):
        os.utime(tmp_path / name, (seconds, seconds))
    assert paths(pack_folder(tmp_path, order="age")) == ["b", "c", "a"]
    assert paths(pack_folder(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG\0\0data", "binary"),
        (b"text with a\0 zero", "binary"),
        ("Grüße".encode("latin-1"), "not UTF-8"),
        (b"\xff\xfea", "not UTF-8"),
        (b" \n\n", "empty"),
        (b"", "empty"),
        (b"x" * 2049, "larger than 2 KiB"),
    ],
)
def test_file_that_is_no_text_is_skipped_with_the_reason(tmp_path, content, reason):
    write(tmp_path, {"a.txt": "text", "b": content})
    packed = pack_folder(tmp_path, max_file_bytes=2048)
    assert paths(packed) == ["a.txt"] and packed.skipped == (SkippedFile("b", reason),)


@pytest.mark.parametrize(
    "content",
    ["Grüße\r\n你好\r\n".encode("utf-8-sig"), "Grüße\n你好".encode("utf-16")],
    ids=["utf-8 with a mark", "utf-16"],
)
def test_encodings_with_a_mark_are_read(tmp_path, content):
    write(tmp_path, {"a.txt": content})
    assert pack_folder(tmp_path).files[0].text == "File: a.txt\n```\nGrüße\n你好\n```\n\n"


def test_fence_is_longer_than_those_within(tmp_path):
    write(tmp_path, {"a.md": "x\n````python\ny\n````\n", "b.md": "inline ````` only"})
    first, second = pack_folder(tmp_path).files
    assert first.text.startswith("File: a.md\n`````\nx\n````python")
    assert second.text.startswith("File: b.md\n```\ninline")


def test_links_and_special_files_are_not_read(tmp_path):
    write(tmp_path, {"a/a.txt": "text"})
    (tmp_path / "a" / "link.txt").symlink_to("a.txt")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "gone").symlink_to("nothing")
    os.mkfifo(tmp_path / "a" / "pipe")
    packed = pack_folder(tmp_path / "a")
    assert paths(packed) == ["a.txt"]
    assert reasons(packed) == {
        "gone": "a link",
        "link.txt": "a link",
        "loop": "a link",
        "pipe": "no regular file",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_skipped(tmp_path):
    write(tmp_path, {"a.txt": "text", "b.txt": "text", "c/d.txt": "text"})
    (tmp_path / "b.txt").chmod(0)
    (tmp_path / "c").chmod(0)
    packed = pack_folder(tmp_path)
    (tmp_path / "c").chmod(0o700)
    assert reasons(packed) == {
        "b.txt": "unreadable (Permission denied)",
        "c/": "unreadable (Permission denied)",
    }


def test_names_cannot_steer_a_terminal_or_forge_a_line(tmp_path):
    write(tmp_path, {"a\x1b[2J\nFile: b\u202e.txt": "text"})
    (file,) = pack_folder(tmp_path).files
    assert file.path == "a\ufffd[2J\ufffdFile: b\ufffd.txt"
    assert file.text.startswith(f"File: {file.path}\n```\n")


def test_name_that_is_no_unicode_is_packed(tmp_path):
    write(tmp_path, {os.fsdecode(b"a\xff.txt"): "text"})
    assert paths(pack_folder(tmp_path)) == ["a\ufffd.txt"]


def test_single_file_is_packed_whatever_the_rules_say(tmp_path):
    write(tmp_path, {".gitignore": "*\n", "a.txt": "text"})
    assert paths(pack_folder(tmp_path / "a.txt")) == ["a.txt"]


def test_deep_folders_are_not_entered(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MAX_DEPTH", 2)
    write(tmp_path, {"1/2/a.txt": "text", "1/2/3/b.txt": "text"})
    packed = pack_folder(tmp_path)
    assert paths(packed) == ["1/2/a.txt"]
    assert reasons(packed) == {"1/2/3/": "deeper than 2 folders"}


def test_folder_without_text_says_why(tmp_path):
    with pytest.raises(DataError, match="no text file to pack: it is empty"):
        pack_folder(tmp_path)
    write(tmp_path, {"a.bin": b"\0", ".env": "x"})
    with pytest.raises(DataError, match="no text file to pack: binary, left out by default"):
        pack_folder(tmp_path)


def test_folder_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(DataError, match="'/nowhere/at/all' cannot be read: No such file"):
        pack_folder("/nowhere/at/all")


def test_folder_with_too_much_text_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MAX_TOTAL_BYTES", 3 << 20)
    write(tmp_path, {f"{n}.txt": "x" * (1 << 20) for n in range(4)})
    with pytest.raises(DataError, match="more than 3 MiB of text"):
        pack_folder(tmp_path)


def test_search_that_takes_too_long_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MAX_SEARCH_S", -1.0)
    write(tmp_path, {"a.txt": "text"})
    with pytest.raises(DataError, match="took longer"):
        pack_folder(tmp_path)
