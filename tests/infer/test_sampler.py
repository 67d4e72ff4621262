import pytest

from linnet.infer import SamplingParams
from linnet.infer.sampler import RepetitionStop


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"min_tokens": -1}, "min_tokens is -1"),
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
        ({"presence_penalty": 2.1}, "presence_penalty is 2.1"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty is inf"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias of token 3 is inf"),
        ({"logit_bias": {3: -101}}, "logit_bias of token 3 is -101"),
        ({"logit_bias": {-3: 1.0}}, "logit_bias has token -3"),
        ({"stop_token_ids": (4, -2)}, "stop_token_ids has token -2"),
        ({"stop": ("",)}, "non-empty strings"),
        ({"stop": "text"}, "expected a tuple"),
        ({"stop": ("a" * 4000, "b" * 97)}, "stop has 4097 characters"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"thinking_budget": -1}, "thinking_budget is -1"),
        ({"reasoning_effort": "huge"}, "reasoning_effort is 'huge'; expected one of low, medium"),
        ({"reasoning_effort": "low", "thinking_budget": 5}, "are both given"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_rule_out_of_range_is_named_in_one_line(rules, message):
    with pytest.raises(ValueError, match=message) as refusal:
        SamplingParams(**rules)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("rules", "message"),
    [({"num_tokens": 0}, "num_tokens is 0"), ({"probability": 1.1}, "probability is 1.1")],
    ids=str,
)
def test_repetition_stop_out_of_range_is_named(rules, message):
    with pytest.raises(ValueError, match=message):
        RepetitionStop(**rules)


@pytest.mark.parametrize(("effort", "budget"), [("low", 200), ("medium", 500), ("high", 800)])
def test_effort_is_a_share_of_max_tokens(effort, budget):
    assert SamplingParams(max_tokens=1000, reasoning_effort=effort).think_tokens == budget


def test_without_an_effort_the_budget_is_what_was_given():
    assert SamplingParams().think_tokens is None
    assert SamplingParams(thinking_budget=0).think_tokens == 0
