"""From logits to a token: penalties, and a draw that follows the filtered distribution exactly.

Most of the time of a draw is spent on passes over the vocabulary, so there are few of them and no
sort. top-k picks its k candidates by a partition. top-p alone draws from the whole distribution and
draws again if the token lies outside the nucleus, among the tokens that are more probable: what is
kept has the proportions of the filtered distribution, as a draw from that would.

Every function sees one row, never a batch: a seed gives the same text whatever runs beside it.
"""

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from linnet.infer.sampler import SamplingParams

Row = NDArray[np.float32]

_BLOCK = 128
_SMALLEST_TEMPERATURE = 1e-30  # A smaller one would be 0 in fp32; this one is greedy already.


class Penalties:
    """Changes logits by what the prompt and the completion already have, and by the bias."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        self._repetition = params.repetition_penalty
        self._presence, self._frequency = params.presence_penalty, params.frequency_penalty
        self._bias_ids = np.fromiter(params.logit_bias, dtype=np.int64)
        self._biases = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self._counts = np.zeros(vocab_size, dtype=np.float32)
        self._is_seen = np.zeros(vocab_size, dtype=bool)
        if self._repetition != 1:
            self._is_seen[np.asarray(prompt, dtype=np.int64)] = True

    def apply(self, logits: Row) -> None:
        """Change the [vocab] fp32 logits in place."""
        if self._repetition != 1:
            seen = np.flatnonzero(self._is_seen)
            values = logits[seen]
            factors = np.where(values > 0, 1 / self._repetition, self._repetition)
            logits[seen] = values * factors
        if self._frequency:
            logits -= self._frequency * self._counts
        if self._presence:
            logits -= self._presence * (self._counts > 0)
        logits[self._bias_ids] += self._biases

    def count(self, token: int) -> None:
        """Take note of a token of the completion."""
        self._counts[token] += 1
        self._is_seen[token] = True


def draw(logits: Row, params: SamplingParams, source: random.Random) -> int:
    """Draw a token at a temperature above 0.

    Args:
        logits: [vocab] fp32; the largest is finite, -inf rules a token out.
        params: temperature, top-k, top-p and min-p.
        source: of randomness; a draw takes one number, with top-p sometimes more.
    """
    if 0 < params.top_k < len(logits):
        return _draw_among_top(logits, params, source)
    weights = _weights(logits, params.temperature)
    kept = weights * (weights >= params.min_p) if params.min_p > 0 else weights
    if params.top_p == 1:
        return _pick(kept, source)
    nucleus = params.top_p * weights.sum()
    while True:
        token = _pick(kept, source)
        weight = weights[token]
        # Before a token come the more probable ones, and equal ones with lower ids.
        ahead = (weights * (weights > weight)).sum()
        ahead += weight * np.count_nonzero(weights[:token] == weight)
        if ahead < nucleus:
            return token
        kept = kept * (weights >= weight)
        kept[token:] *= weights[token:] > weight


def top_ids(values: Row, count: int) -> NDArray[np.int64]:
    """Return the places of the `count` largest of [vocab] values, best first; ties by place."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    if count >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -count)[-count]
    above = np.flatnonzero(values > least)
    ties = np.flatnonzero(values == least)[: count - len(above)]
    ids = np.concatenate([above, ties])
    return ids[np.argsort(-values[ids], kind="stable")]


def _draw_among_top(logits: Row, params: SamplingParams, source: random.Random) -> int:
    ids = top_ids(logits, params.top_k)
    weights = _weights(logits[ids], params.temperature)
    if params.top_p < 1:
        before = weights.cumsum(dtype=np.float64) - weights
        weights[before >= params.top_p * weights.sum(dtype=np.float64)] = 0
    weights[weights < params.min_p] = 0
    return int(ids[_pick(weights, source)])


def _weights(logits: Row, temperature: float) -> Row:
    """Return the probabilities as fractions of the largest."""
    weights = logits - logits.max()
    with np.errstate(over="ignore"):  # to -inf, which is a weight of 0
        weights /= max(temperature, _SMALLEST_TEMPERATURE)
    return np.exp(weights, out=weights)


def _pick(weights: Row, source: random.Random) -> int:
    """Return a place with the probability that its weight has among all."""
    # A running sum over the vocabulary would cost more than all the rest; one over blocks is short.
    starts = np.arange(0, len(weights), _BLOCK)
    sums = np.add.reduceat(weights, starts).cumsum(dtype=np.float64)
    target = source.random() * sums[-1]
    block = int(sums.searchsorted(target, side="right"))
    start = block * _BLOCK
    within = weights[start : start + _BLOCK].cumsum(dtype=np.float64)
    if block:
        target -= sums[block - 1]
    place = within.searchsorted(target, side="right")
    # The two sums are rounded differently: past the end means the last token with a weight.
    return start + int(min(place, within.searchsorted(within[-1])))
