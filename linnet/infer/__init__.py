"""Inference: sampling rules, text generation, and the engine for many requests at once."""

from linnet.infer.engine import Engine, EngineCounters, EngineSettings, Ticket
from linnet.infer.generate import generate, stream_text, stream_tokens
from linnet.infer.grammar import Grammar, GrammarError
from linnet.infer.sampler import RepetitionStop, SamplingParams

__all__ = [
    "Engine",
    "EngineCounters",
    "EngineSettings",
    "Grammar",
    "GrammarError",
    "RepetitionStop",
    "SamplingParams",
    "Ticket",
    "generate",
    "stream_text",
    "stream_tokens",
]
