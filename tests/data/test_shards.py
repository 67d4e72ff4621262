import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from linnet.data import TokenStore, open_source, tokenize_source
from linnet.errors import DataError
from linnet.text import Tokenizer

SLOW_BUILD = """
import sys, time
from linnet.data import Source, open_source, tokenize_source
from linnet.text import Tokenizer

read = Source.documents
def slowly(source, split):
    for document in read(source, split):
        yield document
        print("read", flush=True)
        time.sleep(0.01)
Source.documents = slowly
tokenizer = Tokenizer.train(["a"], vocab_size=264)
tokenize_source(open_source(sys.argv[1], held_out=0.0), "train", tokenizer, sys.argv[2])
"""


def test_documents_equal_direct_tokenization(corpus, store, byte_tokenizer):
    documents = list(open_source(str(corpus), held_out=0.0).documents("train"))
    assert store.num_documents == len(documents) == 60
    for index, document in enumerate(documents):
        expected = [0, *byte_tokenizer.encode(document.text), 1]
        assert store.document(index).tolist() == expected
        assert store.slice(index, 2, 5).tolist() == expected[2:5]
    assert store.num_bytes == sum(len(document.text.encode()) for document in documents)


def test_taking_positions_crosses_shards(store):
    assert len(list(store.folder.glob("tokens-*.bin"))) > 3
    everything = np.concatenate([store.document(i) for i in range(store.num_documents)])
    positions = np.random.default_rng(0).permutation(store.num_tokens)
    assert np.array_equal(store.take(positions), everything[positions])


def test_a_large_vocabulary_is_stored_in_32_bits(corpus, byte_tokenizer, tmp_path, store):
    wide = Tokenizer.train(["a"], vocab_size=264)
    wide.vocab_size = 2**16 + 1
    source = open_source(str(corpus), held_out=0.0)
    wide_store = tokenize_source(source, "train", wide, tmp_path)
    assert wide_store.document(0).dtype == np.uint32
    assert store.document(0).dtype == np.uint16
    assert np.array_equal(wide_store.document(7), store.document(7))


def test_a_fitting_store_is_reused_and_another_is_rebuilt(corpus, byte_tokenizer, tmp_path):
    source = open_source(str(corpus), held_out=0.0)
    first = tokenize_source(source, "train", byte_tokenizer, tmp_path)
    made = (first.folder / "index.json").stat().st_mtime_ns
    again = tokenize_source(source, "train", byte_tokenizer, tmp_path)
    assert (again.folder / "index.json").stat().st_mtime_ns == made
    other = Tokenizer.train(["abab"] * 9, vocab_size=266)
    rebuilt = tokenize_source(source, "train", other, tmp_path)
    assert rebuilt.fingerprint != first.fingerprint
    assert rebuilt.num_tokens < first.num_tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == [".train.lock", "train"]


def test_a_changed_file_is_tokenized_anew(byte_tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a")
    for text in ("a", "bc"):
        (tmp_path / "a.txt").write_text(text)
        source = open_source(str(tmp_path / "a.txt"), held_out=0.0)
        store = tokenize_source(source, "train", byte_tokenizer, tmp_path / "store")
        assert byte_tokenizer.decode(store.document(0)) == text


@pytest.mark.parametrize("name", ["tokens-00000.bin", "offsets.npy", "document_bytes.npy"])
def test_a_truncated_or_missing_file_is_refused(corpus, byte_tokenizer, tmp_path, name):
    source = open_source(str(corpus), held_out=0.0)
    store = tokenize_source(source, "train", byte_tokenizer, tmp_path)
    path = store.folder / name
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(DataError, match=rf"{name}' has {size - 1} bytes; expected {size} bytes"):
        tokenize_source(source, "train", byte_tokenizer, tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name}' is missing; expected {size} bytes"):
        TokenStore(store.folder)


def test_a_folder_without_or_with_a_broken_index_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no index\.json"):
        TokenStore(tmp_path)
    (tmp_path / "index.json").write_text('{"dtype"')
    with pytest.raises(DataError, match="is damaged"):
        TokenStore(tmp_path)
    (tmp_path / "index.json").write_text('{"version": 0}')
    with pytest.raises(DataError, match="has version 0; expected 1"):
        TokenStore(tmp_path)


def test_a_folder_of_the_users_is_never_replaced(corpus, byte_tokenizer, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="name another folder"):
        tokenize_source(open_source(str(corpus)), "train", byte_tokenizer, tmp_path)
    assert (tmp_path / "train" / "mine.txt").read_text() == "precious"


def test_a_failed_build_leaves_the_old_store(byte_tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    build = lambda: tokenize_source(  # noqa: E731
        open_source(str(tmp_path / "a.jsonl"), held_out=0.0),
        "train",
        byte_tokenizer,
        tmp_path / "s",
    )
    build()
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n{')
    with pytest.raises(DataError, match="line 2"):
        build()
    assert byte_tokenizer.decode(TokenStore(tmp_path / "s" / "train").document(0)) == "a"


def test_a_tokenizer_without_document_tokens_is_refused(corpus, byte_tokenizer, tmp_path):
    bare = Tokenizer.train(["a"], vocab_size=264)
    bare.special_ids = {}
    with pytest.raises(DataError, match="<begin_of_document>"):
        tokenize_source(open_source(str(corpus)), "train", bare, tmp_path)


def test_a_killed_build_leaves_nothing_and_the_next_one_succeeds(
    corpus, store, byte_tokenizer, tmp_path
):
    build = subprocess.Popen(
        [sys.executable, "-c", SLOW_BUILD, str(corpus), str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with build:
        assert build.stdout is not None
        assert build.stdout.readline() == b"read\n"
        time.sleep(0.1)
        build.send_signal(signal.SIGKILL)
    assert (tmp_path / ".train.building").exists()
    with pytest.raises(DataError, match="not a token store"):
        TokenStore(tmp_path / "train")
    source = open_source(str(corpus), held_out=0.0)
    rebuilt = tokenize_source(source, "train", byte_tokenizer, tmp_path)
    assert rebuilt.num_tokens == store.num_tokens
    assert not (tmp_path / ".train.building").exists()


def test_progress_goes_to_the_terminal_only_when_asked(corpus, byte_tokenizer, tmp_path, capsys):
    source = open_source(str(corpus), held_out=0.0)
    tokenize_source(source, "train", byte_tokenizer, tmp_path / "quiet")
    assert capsys.readouterr() == ("", "")
    tokenize_source(source, "train", byte_tokenizer, tmp_path / "shown", progress=True)
    assert "60 documents" in capsys.readouterr().err
