"""Inference: sampling rules and text generation."""

from linnet.infer.generate import generate, stream_text, stream_tokens
from linnet.infer.sampler import SamplingParams

__all__ = ["SamplingParams", "generate", "stream_text", "stream_tokens"]
