"""The model that comes with the package: it loads by its name, and does what its card says."""

from pathlib import Path

import pytest

import linnet
from linnet.model import Model
from linnet.text import encode_chat

FOLDER = Path(linnet.__file__).parent / "bundled"
MAX_BYTES = 20_000_000


@pytest.fixture(scope="module")
def model() -> Model:
    return linnet.load("bundled", dtype="float32")


def reply(model: Model, *messages: dict, tools: tuple = ()) -> str:
    assert model.tokenizer is not None
    prompt = encode_chat(model.tokenizer, messages, tools)
    return linnet.generate(model, prompt, max_tokens=80, temperature=0.0)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def test_folder_is_small_enough_for_the_wheel():
    sizes = [path.stat().st_size for path in FOLDER.iterdir()]
    assert sum(sizes) <= MAX_BYTES


def test_card_has_scores_and_says_what_the_model_cannot_do():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "cannot" in card and "| recalling planted facts, 1K tokens |" in card
