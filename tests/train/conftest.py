"""A corpus, a recipe and a model small enough that a whole training run takes a second."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from linnet.train import Recipe

MODEL = {
    "preset": "nano",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "attn_type_list": [0, 1],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "rotary_dim": 4,
    "num_local_experts": 4,
}
TRAIN = {
    "total_tokens": 1536,
    "batch_tokens": 128,
    "micro_batch_tokens": 64,
    "seq_len": 32,
    "dtype": "float32",
    "eval_every": 4,
    "eval_tokens": 500,
    "save_every": 4,
}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of eight short Python files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(8):
        lines = [f"def f{number}_{i}(x):\n    return x * {i} + {number}\n" for i in range(12)]
        (folder / f"m{number}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture
def recipe(corpus: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """Return a function that builds a small recipe; keywords change sections."""

    def build(name: str = "run", **sections: dict[str, Any]) -> Recipe:
        base: dict[str, Any] = {
            "name": name,
            "out": str(tmp_path),
            "data": {"source": str(corpus), "held_out": 0.2, "folder": str(tmp_path / "data")},
            "optim": {"learning_rate": 1e-2, "min_learning_rate": 1e-3, "warmup_steps": 3},
            "train": TRAIN,
            "model": MODEL,
        }
        for key, changes in sections.items():
            base[key] = {**base[key], **changes} if isinstance(changes, dict) else changes
        return Recipe.from_dict(base)

    return build
