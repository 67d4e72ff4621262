import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from linnet.infer import SamplingParams
from linnet.infer.drawing import Penalties, draw, top_ids

RULES = [
    {},
    {"temperature": 0.3},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.1},
    {"top_p": 0.5},
    {"top_p": 0.9},
    {"top_p": 1e-9},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1.0},
    {"top_p": 0.8, "min_p": 0.1},
    {"top_k": 10, "top_p": 0.7, "min_p": 0.1, "temperature": 0.8},
]


def filtered(logits: list[float], params: SamplingParams) -> list[float]:
    """The documented distribution, one token at a time: temperature, top-k, top-p, min-p."""
    scaled = [math.exp((x - max(logits)) / params.temperature) for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    kept = order[: params.top_k] if params.top_k else order
    total = sum(scaled[i] for i in kept)
    chosen, reached = [], 0.0
    for i in kept:
        if params.top_p < 1 and reached >= params.top_p:
            break
        chosen.append(i)
        reached += scaled[i] / total
    chosen = [i for i in chosen if scaled[i] >= params.min_p * scaled[chosen[0]]]
    total = sum(scaled[i] for i in chosen)
    return [scaled[i] / total if i in chosen else 0.0 for i in range(len(scaled))]


def draw_from(logits: torch.Tensor, params: SamplingParams, source: random.Random) -> int:
    return draw(logits.numpy(), float(logits.max()), params, source)


class Grid(random.Random):
    """Numbers in equal steps through [0, 1), so that shares of draws are exact to a step."""

    def __init__(self, num_steps: int):
        super().__init__()
        self.steps, self.num_steps = iter(range(num_steps)), num_steps

    def random(self) -> float:
        return (next(self.steps) + 0.5) / self.num_steps


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_draws_follow_the_filtered_distribution(rules, generator, rng):
    params, num_draws = SamplingParams(**rules), 1000
    logits = 2 * torch.randn(40, generator=generator)
    expected = filtered(logits.tolist(), params)
    counts = Counter(draw_from(logits, params, rng) for _ in range(num_draws))
    for token, probability in enumerate(expected):
        if probability == 0:
            assert counts[token] == 0
        deviation = math.sqrt(num_draws * probability * (1 - probability))
        assert abs(counts[token] - num_draws * probability) <= 4.5 * deviation + 1


@pytest.mark.parametrize(
    "rules", [rule for rule in RULES if "top_k" in rule or "top_p" not in rule], ids=str
)
@pytest.mark.parametrize("vocab_size", [40, 300])
def test_one_number_goes_through_the_distribution_evenly(rules, vocab_size, generator):
    params, num_steps = SamplingParams(**rules), 500
    logits = 3 * torch.randn(vocab_size, generator=generator)
    expected = filtered(logits.tolist(), params)
    grid = Grid(num_steps)
    counts = Counter(draw_from(logits, params, grid) for _ in range(num_steps))
    for token, probability in enumerate(expected):
        assert abs(counts[token] - num_steps * probability) < 1.01


@pytest.mark.parametrize("rules", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.5}], ids=str)
def test_ruled_out_tokens_are_never_drawn(rules, rng):
    logits = torch.full((300,), -math.inf)
    logits[[1, 3, 299]] = 0.0
    drawn = {draw_from(logits, SamplingParams(**rules), rng) for _ in range(200)}
    assert drawn == {1, 3, 299}


@pytest.mark.parametrize("rules", [{"top_k": 3}, {"top_p": 0.3}], ids=str)
def test_ties_go_to_the_lower_ids(rules, rng):
    drawn = {draw_from(torch.zeros(10), SamplingParams(**rules), rng) for _ in range(200)}
    assert drawn == {0, 1, 2}


def test_a_token_just_outside_the_nucleus_is_never_drawn(rng):
    logits = torch.tensor([0.45, 0.3, 0.25]).log()
    drawn = {draw_from(logits, SamplingParams(top_p=0.5), rng) for _ in range(300)}
    assert drawn == {0, 1}


@pytest.mark.parametrize(
    "logits", [torch.zeros(5000), torch.linspace(0, 1, 5000)], ids=["flat", "steep"]
)
def test_a_small_nucleus_is_found_in_few_rounds(logits, rng):
    class Counting(random.Random):
        num_calls = 0

        def random(self) -> float:
            self.num_calls += 1
            return rng.random()

    source = Counting()
    for _ in range(20):
        assert logits[draw_from(logits, SamplingParams(top_p=1e-9), source)] == logits.max()
    assert source.num_calls < 20 * 20


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
@pytest.mark.parametrize("rules", [{}, {"top_k": 7}], ids=str)
def test_tiny_temperature_is_greedy(temperature, rules, generator, rng):
    logits = torch.randn(50, generator=generator) * 30
    params = SamplingParams(temperature=temperature, **rules)
    assert draw_from(logits, params, rng) == int(logits.argmax())


def test_logits_stay_as_they_were(generator, rng):
    logits = torch.randn(50, generator=generator)
    before = logits.clone()
    for rules in RULES:
        draw_from(logits, SamplingParams(**rules), rng)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("count", [0, 1, 2, 7, 39, 40, 100])
def test_top_ids_are_those_of_a_sort(count, rng):
    values = np.array([rng.choice([-math.inf, 0.0, 1.0, 2.5, 3.0]) for _ in range(40)], np.float32)
    expected = sorted(range(40), key=lambda i: (-values[i], i))[:count]
    assert top_ids(values, count).tolist() == expected


@pytest.mark.parametrize(
    "rules",
    [
        {"presence_penalty": 0.7},
        {"frequency_penalty": -0.4},
        {"repetition_penalty": 1.3},
        {"repetition_penalty": 0.5},
        {"logit_bias": {2: 5.0, 0: -100.0}},
        {
            "presence_penalty": 0.7,
            "frequency_penalty": 0.4,
            "repetition_penalty": 1.3,
            "logit_bias": {2: 5.0, 1: -3.0},
        },
    ],
    ids=str,
)
def test_penalties_are_those_of_the_formulas(rules, generator):
    params = SamplingParams(**rules)
    prompt, completion = [0, 1, 1, 5], [1, 2, 2, 2, 7]
    logits = 3 * torch.randn(10, generator=generator)
    expected = logits.tolist()
    for token in range(10):
        if token in prompt + completion:
            factor = params.repetition_penalty
            expected[token] *= 1 / factor if expected[token] > 0 else factor
        count = completion.count(token)
        expected[token] -= params.frequency_penalty * count
        expected[token] -= params.presence_penalty * (count > 0)
        expected[token] += params.logit_bias.get(token, 0)
    penalties = Penalties(params, prompt, 10)
    for token in completion:
        penalties.count(token)
    row = logits.numpy().copy()
    penalties.apply(row)
    np.testing.assert_allclose(row, expected, rtol=1e-6, atol=1e-6)
