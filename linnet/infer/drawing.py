"""From logits to a token: penalties, and a draw that follows the filtered distribution exactly.

A draw costs a few passes over the vocabulary and no sort. top-k finds its k candidates by a
partition. top-p draws from the whole distribution, and if the token lies outside the nucleus,
draws again among the more probable ones: a token inside keeps its share of the nucleus in every
such round, so that it is drawn as often as from the nucleus alone.

Every function sees one row, never a batch: a seed gives the same text whatever runs beside it.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
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
        seen = np.flatnonzero(self._is_seen)
        self._ids = np.zeros(vocab_size, dtype=np.int32)
        self._ids[: len(seen)] = seen
        self._num_ids = len(seen)

    def apply(self, logits: Row) -> None:
        """Change the [vocab] fp32 logits in place."""
        ids = self._ids[: self._num_ids]
        values, counts = logits[ids], self._counts[ids]
        if self._repetition != 1:
            values = np.where(values > 0, values / self._repetition, values * self._repetition)
        values -= self._frequency * counts + self._presence * (counts > 0)
        logits[ids] = values
        logits[self._bias_ids] += self._biases

    def count(self, token: int) -> None:
        """Take note of a token of the completion."""
        self._counts[token] += 1
        if not self._is_seen[token]:
            self._is_seen[token] = True
            self._ids[self._num_ids] = token
            self._num_ids += 1


def draw(logits: Row, best: float, params: SamplingParams, source: random.Random) -> int:
    """Draw a token at a temperature above 0.

    Args:
        logits: [vocab] fp32; -inf rules a token out.
        best: the largest of them, which is finite.
        params: temperature, top-k, top-p and min-p.
        source: of randomness; a draw takes one number, with top-p sometimes more.
    """
    if 0 < params.top_k < len(logits):
        return _draw_among_top(logits, best, params, source)
    weights = _weights(logits, best, params.temperature)
    sums = _running_sums(weights)
    total = sums[-1]
    kept = weights
    if params.min_p > 0:
        kept = weights * (weights >= params.min_p)
        sums = _running_sums(kept)
    while True:
        token = _pick(kept, sums, source)
        # A weight above what the nucleus leaves out lies inside, without a look at the others.
        if weights[token] > (1 - params.top_p) * total:
            return token
        if _mass_before(weights, token) < params.top_p * total:
            return token
        kept = kept * (weights >= weights[token])
        kept[token:] *= weights[token:] > weights[token]
        sums = _running_sums(kept)


def top_ids(values: Row, count: int) -> NDArray[np.int64]:
    """Return the places of the `count` largest of [vocab] values, best first; ties by place."""
    if count == 0:
        return np.empty(0, dtype=np.int64)
    least = np.partition(values, -count)[-count] if count < len(values) else -np.inf
    ids = np.flatnonzero(values >= least)
    return ids[np.argsort(-values[ids], kind="stable")[:count]]


def _draw_among_top(logits: Row, best: float, params: SamplingParams, source: random.Random) -> int:
    ids = top_ids(logits, params.top_k)
    weights = _weights(logits[ids], best, params.temperature)
    if params.top_p < 1:
        before = weights.cumsum(dtype=np.float64) - weights
        weights[before >= params.top_p * weights.sum(dtype=np.float64)] = 0
    weights[weights < params.min_p] = 0
    return int(ids[_pick(weights, _running_sums(weights), source)])


def _weights(logits: Row, best: float, temperature: float) -> Row:
    """Return the probabilities as fractions of the largest."""
    buffer = torch.empty(len(logits))
    weights: Row = buffer.numpy()
    np.subtract(logits, best, out=weights)
    if temperature != 1:
        with np.errstate(over="ignore"):  # to -inf, which is a weight of 0
            weights /= max(temperature, _SMALLEST_TEMPERATURE)
    buffer.exp_()  # PyTorch's takes half as long as NumPy's
    return weights


def _mass_before(weights: Row, token: int) -> float:
    """Return the weight of what is more probable than a token, or as probable with a lower id."""
    weight = weights[token]
    ahead = (weights * (weights > weight)).sum()
    return float(ahead + weight * np.count_nonzero(weights[:token] == weight))


def _running_sums(weights: Row) -> NDArray[np.float64]:
    """Return the sum of the weights up to the end of each block."""
    starts = np.arange(0, len(weights), _BLOCK)
    return np.add.reduceat(weights, starts).cumsum(dtype=np.float64)


def _pick(weights: Row, sums: NDArray[np.float64], source: random.Random) -> int:
    """Return a place with the probability that its weight has among all."""
    # A running sum over the vocabulary would cost more than all the rest; one over blocks is short.
    target = source.random() * sums[-1]
    block = int(sums.searchsorted(target, side="right"))
    start = block * _BLOCK
    within = weights[start : start + _BLOCK].cumsum(dtype=np.float64)
    if block:
        target -= sums[block - 1]
    place = within.searchsorted(target, side="right")
    # The two sums are rounded differently: past the end means the last token with a weight.
    return start + int(min(place, within.searchsorted(within[-1])))
