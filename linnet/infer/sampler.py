"""From logits to the next token: greedy, or temperature with top-k, top-p and min-p.

The filters apply in the order temperature, top-k, top-p, min-p, each to what the one before left.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Raises:
        ValueError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens with at least this fraction of the most probable one's probability."""
    seed: int | None = None
    """Same seed, same text; None draws one."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; they are not part of it."""

    def __post_init__(self) -> None:
        if self.max_tokens < 0:
            raise ValueError(f"max_tokens is {self.max_tokens}; it must not be negative")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or positive")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must lie in [0, 1]")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}; it must lie in [0, 2^63)")
        if isinstance(self.stop, str) or any(not text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; expected a tuple of non-empty strings")


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Choose the next token.

    Args:
        logits: [vocab] fp32.
        params: the rules.
        generator: source of randomness; not touched when greedy.

    Raises:
        ValueError: the largest logit is NaN or infinite; -inf elsewhere rules tokens out.
    """
    if not logits.max().isfinite():
        raise ValueError("the logits are not finite; the weights or the input are damaged")
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities = filtered_probabilities(logits, params)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def filtered_probabilities(logits: Tensor, params: SamplingParams) -> Tensor:
    """Return the [vocab] distribution that `sample` draws from, for a temperature above 0."""
    # Shifted first, and fp64, so that a tiny temperature neither overflows nor rounds to zero.
    scaled = (logits - logits.max()).double() / params.temperature
    if 0 < params.top_k < scaled.shape[0]:
        # By index, not by value: ties must not let more than k through.
        top = scaled.topk(params.top_k)
        scaled = torch.full_like(scaled, float("-inf")).scatter(0, top.indices, top.values)
    probabilities = scaled.softmax(-1)
    if params.top_p < 1:
        ordered, order = probabilities.sort(descending=True, stable=True)
        # A token stays while those before it have not reached top_p; the first always stays.
        before = ordered.cumsum(0) - ordered
        probabilities[order[before >= params.top_p]] = 0
    if params.min_p > 0:
        probabilities[probabilities < params.min_p * probabilities.max()] = 0
    return probabilities / probabilities.sum()
