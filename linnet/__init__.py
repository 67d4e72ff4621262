"""linnet: hybrid lightning-attention mixture-of-experts language models.

    model = linnet.load("runs/nano/model")
    print(linnet.generate(model, "def main", max_tokens=64, temperature=0.0))

Names are imported on first use, so that `import linnet` and `linnet --help` stay quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linnet.infer import SamplingParams, generate
    from linnet.model import Cache, Model, ModelConfig, preset
    from linnet.model.weights import load_model as load
    from linnet.ops import lightning_attention
    from linnet.text import Tokenizer
    from linnet.train import Recipe, Trainer

__version__ = "0.1.0"

_HOMES = {
    "Cache": "linnet.model",
    "Model": "linnet.model",
    "ModelConfig": "linnet.model",
    "Recipe": "linnet.train",
    "SamplingParams": "linnet.infer",
    "Tokenizer": "linnet.text",
    "Trainer": "linnet.train",
    "generate": "linnet.infer",
    "lightning_attention": "linnet.ops",
    "load": "linnet.model.weights",
    "preset": "linnet.model",
}

__all__ = [
    "Cache",
    "Model",
    "ModelConfig",
    "Recipe",
    "SamplingParams",
    "Tokenizer",
    "Trainer",
    "__version__",
    "generate",
    "lightning_attention",
    "load",
    "preset",
]


def __getattr__(name: str) -> Any:  # Any: whatever the public name is
    if name not in _HOMES:
        raise AttributeError(f"module 'linnet' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), "load_model" if name == "load" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
