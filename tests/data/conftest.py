from pathlib import Path

import pytest

from linnet.data import TokenStore, open_source, tokenize_source
from linnet.text import Tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """A tokenizer without merges: every byte is a token."""
    return Tokenizer.train(["a"], vocab_size=264)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """Sixty distinct documents of 1 to about 300 bytes, some not ASCII."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(60):
        text = f"{index} é" + "ab" * (index * index % 150)
        (folder / f"{index:02d}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def store(corpus, byte_tokenizer, tmp_path_factory) -> TokenStore:
    """The corpus as a store of several shards."""
    source = open_source(str(corpus), held_out=0.0)
    folder = tmp_path_factory.mktemp("store")
    return tokenize_source(source, "train", byte_tokenizer, folder, shard_tokens=1000)
