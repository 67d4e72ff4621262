"""The model: configuration, blocks, cache, weights and cost."""

from linnet.model.cache import Cache, Snapshot
from linnet.model.config import ModelConfig
from linnet.model.presets import PRESETS, preset
from linnet.model.transformer import Model
from linnet.model.weights import load_model, save_model

__all__ = [
    "PRESETS",
    "Cache",
    "Model",
    "ModelConfig",
    "Snapshot",
    "load_model",
    "preset",
    "save_model",
]
