import gzip
import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from linnet.data import open_source
from linnet.errors import ConfigError, DataError


def texts(spec, split="train", **options):
    return [document.text for document in open_source(str(spec), **options).documents(split)]


def everything(spec, **options):
    return texts(spec, held_out=0.0, **options)


def test_a_folder_is_read_recursively_in_sorted_order(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".venv").mkdir()
    for name in ("b/2.py", "a.md", "b/1.rst", "c.txt", "ignored.bin", ".venv/hidden.py"):
        (tmp_path / name).write_text(name)
    source = open_source(str(tmp_path), held_out=0.0)
    names = [document.name for document in source.documents("train")]
    assert names == ["a.md", "b/1.rst", "b/2.py", "c.txt"]


def test_line_ends_and_odd_characters_are_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes("a\r\nb\rc\0\ufeff".encode())
    assert everything(tmp_path / "a.txt") == ["a\r\nb\rc\0\ufeff"]


def test_globs_and_comma_separated_sources_combine_without_repetition(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert everything(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    spec = f"{tmp_path}/*.txt, {tmp_path}/c.md,{tmp_path}/a.txt"
    assert sorted(everything(spec)) == ["a.txt", "b.txt", "c.md"]


def write_gzip(path, data):
    path.write_bytes(gzip.compress(data))


def write_zstandard(path, data):
    path.write_bytes(zstandard.compress(data[:9]) + zstandard.compress(data[9:]))


def write_plain(path, data):
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("suffix", "write"),
    [("", write_plain), (".gz", write_gzip), (".zst", write_zstandard)],
    ids=["plain", "gzip", "zstandard"],
)
def test_json_lines_are_read_by_field(tmp_path, suffix, write):
    lines = "".join(json.dumps({"body": text}) + "\n" for text in ("é1", "2", "", "3"))
    write(tmp_path / f"a.jsonl{suffix}", lines.encode())
    assert everything(tmp_path, text_field="body") == ["é1", "2", "3"]


def test_compressed_text_is_read(tmp_path):
    write_gzip(tmp_path / "a.txt.gz", "é".encode())
    assert everything(tmp_path) == ["é"]


def test_parquet_is_read_by_column(tmp_path):
    table = pyarrow.table({"body": ["a", None, "b"], "n": [1, 2, 3]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert everything(tmp_path, text_field="body") == ["a", "b"]


def test_a_missing_column_is_named_with_those_found(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no text column 'text'; found: body, n"):
        everything(tmp_path)
    with pytest.raises(DataError, match="no text column 'n'"):
        everything(tmp_path, text_field="n")


def test_a_missing_field_is_named_with_file_and_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n\n{"body": "b", "n": 1}\n')
    with pytest.raises(DataError, match=r"a\.jsonl' line 3 .*'text'; found: body, n"):
        everything(tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b"{"),
        ("a.jsonl", b'{"text": "\xff"}'),
        ("a.jsonl.gz", b"not gzip"),
        ("a.txt.gz", gzip.compress(b"a" * 99)[:-9]),
        ("a.jsonl.zst", b"not zstandard"),
        ("a.parquet", b"not parquet"),
    ],
    ids=["json", "json not UTF-8", "gzip", "truncated gzip", "zstandard", "parquet"],
)
def test_a_damaged_file_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name):
        everything(tmp_path)


def test_a_missing_path_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nowhere' does not exist"):
        open_source(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("spec", ["", " ", "stdlib,"], ids=repr)
def test_an_empty_name_is_refused(spec):
    with pytest.raises(DataError, match="empty"):
        open_source(spec)


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "a.bin").write_text("a")
    for path in (tmp_path, tmp_path / "a.bin", tmp_path / "*.bin"):
        with pytest.raises(DataError, match=r"no usable file .* supported: \.txt"):
            open_source(str(path))


def test_an_empty_corpus_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no text"):
        everything(tmp_path)


def test_an_empty_split_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"held_out part of .* is empty"):
        texts(tmp_path, "held_out", held_out=0.0)


def test_a_held_out_fraction_of_one_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="held_out is 1"):
        open_source(str(tmp_path), held_out=1)


def test_undecodable_files_are_skipped_with_a_count(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_bytes(b"\xff")
    assert everything(tmp_path) == ["a"]
    assert "1 of 2 files are not UTF-8" in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_a_corpus_of_undecodable_files_is_refused(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"\xff")
    with pytest.raises(DataError, match="1 of 1 files are not UTF-8"):
        everything(tmp_path)


def test_the_split_is_disjoint_complete_and_about_the_asked_fraction(tmp_path):
    lines = [json.dumps({"text": f"document {index}"}) for index in range(1000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    train = texts(tmp_path, "train", held_out=0.2)
    held_out = texts(tmp_path, "held_out", held_out=0.2)
    assert set(train).isdisjoint(held_out)
    assert len(train) + len(held_out) == 1000
    assert 150 < len(held_out) < 250


def test_the_split_survives_renaming_and_copies_count_once(tmp_path):
    before, after = tmp_path / "before", tmp_path / "after"
    for folder in (before, after):
        folder.mkdir()
    for index in range(40):
        (before / f"{index}.txt").write_text(f"document {index}")
        (after / f"{99 - index}.py").write_text(f"document {index}")
        (after / f"copy{index}.py").write_text(f"document {index}")
    for split in ("train", "held_out"):
        assert sorted(texts(before, split, held_out=0.3)) == sorted(
            texts(after, split, held_out=0.3)
        )


def test_the_standard_library_is_a_source_without_installed_packages():
    files = dict(open_source("stdlib").files)
    assert "json/decoder.py" in files
    assert not any("site-packages" in name or "__pycache__" in name for name in files)


def test_the_fingerprint_follows_files_and_settings(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    first = open_source(str(tmp_path)).fingerprint
    assert open_source(str(tmp_path)).fingerprint == first
    assert open_source(str(tmp_path), held_out=0.1).fingerprint != first
    (tmp_path / "a.txt").write_text("ab")
    assert open_source(str(tmp_path)).fingerprint != first
