import math

import pytest
import torch

from linnet.infer import SamplingParams
from linnet.infer.sampler import filtered_probabilities, sample


def brute_force(logits: list[float], params: SamplingParams) -> list[float]:
    """The filters one token at a time: temperature, top-k, top-p, min-p."""
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


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 1000},
        {"top_p": 0.5},
        {"top_p": 1e-9},
        {"top_p": 0.999},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 10, "top_p": 0.7, "min_p": 0.1, "temperature": 0.8},
    ],
    ids=str,
)
def test_filters_agree_with_brute_force(rules, generator):
    params = SamplingParams(**rules)
    for _ in range(10):
        logits = 2 * torch.randn(40, generator=generator)
        expected = torch.tensor(brute_force(logits.tolist(), params), dtype=torch.float64)
        actual = filtered_probabilities(logits, params)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)
        assert (actual > 0).sum() == (expected > 0).sum()


def test_top_k_keeps_k_tokens_of_a_tie():
    probabilities = filtered_probabilities(torch.zeros(8), SamplingParams(top_k=3))
    assert (probabilities > 0).sum() == 3 and probabilities.sum() == 1


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300, 5e-324])
def test_tiny_temperature_is_greedy(generator, temperature):
    logits = torch.randn(50, generator=generator) * 30
    params = SamplingParams(temperature=temperature)
    assert sample(logits, params, generator) == int(logits.argmax())


def test_greedy_leaves_the_generator_alone(generator):
    before = generator.get_state()
    assert sample(torch.tensor([0.0, 2.0, 1.0]), SamplingParams(temperature=0), generator) == 1
    assert torch.equal(generator.get_state(), before)


def test_samples_follow_the_distribution(generator):
    logits = torch.tensor([0.6, 0.3, 0.1]).log()
    drawn = [sample(logits, SamplingParams(), generator) for _ in range(3000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=3) / 3000
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.3, 0.1]), rtol=0, atol=0.03)


def test_ruled_out_tokens_are_never_drawn(generator):
    logits = torch.tensor([float("-inf"), 0.0, float("-inf"), 0.0])
    assert {sample(logits, SamplingParams(), generator) for _ in range(50)} == {1, 3}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_logits_are_refused(generator, bad, temperature):
    logits = torch.tensor([0.0, bad, 1.0])
    with pytest.raises(ValueError, match="the logits are not finite"):
        sample(logits, SamplingParams(temperature=temperature), generator)
    with pytest.raises(ValueError, match="the logits are not finite"):
        sample(torch.full((3,), float("-inf")), SamplingParams(), generator)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**70}, "seed is 11"),
        ({"stop": ("",)}, "non-empty strings"),
        ({"stop": "text"}, "expected a tuple"),
    ],
    ids=lambda value: str(value),
)
def test_rule_out_of_range_is_named(rules, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**rules)
