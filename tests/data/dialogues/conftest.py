"""A tokenizer with the control tokens of chats, and a small corpus to hide things in."""

from pathlib import Path

import pytest

from linnet.data import TokenStore, open_source, tokenize_source
from linnet.data.dialogues import Filler
from linnet.text import Tokenizer


@pytest.fixture(scope="session")
def code() -> list[str]:
    """Return short Python files."""
    return [
        "\n".join(
            f"def function_{number}_{i}(value):\n    return value * {i} + {number}\n"
            for i in range(40)
        )
        for number in range(6)
    ]


@pytest.fixture(scope="session")
def tokenizer(code: list[str]) -> Tokenizer:
    return Tokenizer.train([*code, "The code of the blue door is 7342. Where does Ada live?"], 400)


@pytest.fixture(scope="session")
def store(
    code: list[str], tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> TokenStore:
    folder: Path = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(code):
        (folder / f"{number}.py").write_text(text)
    source = open_source(str(folder), held_out=0)
    return tokenize_source(source, "train", tokenizer, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="session")
def filler(store: TokenStore, tokenizer: Tokenizer) -> Filler:
    return Filler(store, tokenizer)
