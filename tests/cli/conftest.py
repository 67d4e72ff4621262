"""A tiny model that writes all sorts of tokens, as a folder and in an engine."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import linnet
from linnet.infer import Engine, EngineSettings
from linnet.model import Model, ModelConfig
from linnet.text import Tokenizer


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory) -> Path:
    """Return the folder of a model with random weights and the M1 chat format."""
    text = [
        "def answer(question): the cat and the hat, 你好\n",
        "File: a/b.py\n```\nimport re\n```\n",
    ]
    tokenizer = Tokenizer.train(text * 3, vocab_size=320)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_type_list=(0, 0, 1),
        rotary_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=8192,
    )
    model = Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
        model.embed_tokens.weight.mul_(5)
    model.tokenizer = tokenizer
    folder = tmp_path_factory.mktemp("chat") / "model"
    model.save(folder)
    return folder


@pytest.fixture
def chat_engine(chat_folder) -> Iterator[Engine]:
    """Return a started engine for one request at a time."""
    model = linnet.load(chat_folder, dtype="float32")
    engine = Engine(model, EngineSettings(max_sequences=1, max_model_len=2048, chunk_tokens=64))
    engine.start()
    yield engine
    engine.stop()
