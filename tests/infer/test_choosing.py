import math
import random

import pytest
import torch

from linnet.infer import SamplingParams
from linnet.infer.choosing import Choice, Chooser, choose_all, prompt_logprobs
from linnet.infer.sampler import RepetitionStop
from linnet.infer.vocabulary import Vocabulary

SIZE, END, STOP = 50, 1, 7


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(None, SIZE, frozenset({END}))


@pytest.fixture
def choose(vocabulary):
    """Return the choices that one request makes of rows of logits."""

    def run(rows, prompt=(3,), **rules) -> list[Choice]:
        chooser = Chooser(SamplingParams(**rules), prompt, vocabulary)
        return [chooser.choose(row) for row in rows]

    return run


def rows_for(*tokens: int) -> torch.Tensor:
    """Return logits that are highest for these tokens, one after the other."""
    rows = torch.arange(SIZE).flip(0).repeat(len(tokens), 1) / SIZE
    rows[range(len(tokens)), tokens] = 5
    return rows


def test_greedy_takes_the_most_probable_token(choose, generator):
    rows = torch.randn(20, SIZE, generator=generator)
    tokens = [choice.token for choice in choose(rows, temperature=0)]
    assert tokens == rows.argmax(-1).tolist()


def test_only_plain_greedy_rows_need_no_work(vocabulary):
    plain = Chooser(SamplingParams(temperature=0, stop_token_ids=(STOP,)), [3], vocabulary)
    assert not plain.needs_row_work
    for rules in (
        {"temperature": 1.0},
        {"presence_penalty": 0.1},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 1},
        {"logprobs": 0},
        {"repetition_stop": RepetitionStop()},
    ):
        params = SamplingParams(**{"temperature": 0.0, **rules})
        assert Chooser(params, [3], vocabulary).needs_row_work


MIXED = [
    {"temperature": 0.0},
    {"temperature": 0.7, "seed": 1},
    {"top_p": 0.6, "seed": 1},
    {"top_k": 8, "top_p": 0.9, "seed": 2},
    {"temperature": 0.0, "frequency_penalty": 1.0},
    {"repetition_penalty": 1.5, "min_p": 0.05, "seed": 3},
    {"temperature": 0.0, "logprobs": 2},
    {"seed": 4, "logit_bias": {5: 3.0}, "min_tokens": 6},
]


def test_a_seed_gives_the_same_tokens_whatever_runs_beside_it(vocabulary, generator, rng):
    logits = 2 * torch.randn(12, SIZE, generator=generator)
    alone = []
    for rules in MIXED:
        chooser = Chooser(SamplingParams(**rules), [3, 4], vocabulary)
        alone.append([chooser.choose(row) for row in logits])
    for _ in range(5):
        choosers = [Chooser(SamplingParams(**rules), [3, 4], vocabulary) for rules in MIXED]
        together = [[] for _ in MIXED]
        while any(len(done) < len(logits) for done in together):
            running = [n for n, done in enumerate(together) if len(done) < len(logits)]
            running = rng.sample(running, rng.randint(1, len(running)))
            rows = torch.stack([logits[len(together[n])] for n in running])
            for n, choice in zip(
                running, choose_all([choosers[n] for n in running], rows), strict=True
            ):
                together[n].append(choice)
        assert together == alone


def test_other_seeds_and_no_seed_give_other_tokens(choose):
    rows = torch.zeros(30, SIZE)
    texts = {
        tuple(choice.token for choice in choose(rows, seed=seed)) for seed in (1, 2, None, None)
    }
    assert len(texts) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rules", [{"temperature": 0.0}, {}, {"top_k": 3}], ids=str)
def test_damaged_logits_end_their_row_alone(vocabulary, bad, rules):
    rows = rows_for(4, 5, 6)
    if bad == -math.inf:
        rows[1] = bad
    else:
        rows[1, 9] = bad
    choosers = [Chooser(SamplingParams(seed=1, **rules), [3], vocabulary) for _ in range(3)]
    first, second, third = choose_all(choosers, rows)
    assert isinstance(second, ValueError) and "\n" not in str(second)
    assert str(second) == "the logits are not finite; the weights or the input are damaged"
    assert isinstance(first, Choice) and isinstance(third, Choice)
    with pytest.raises(ValueError, match="not finite"):
        Chooser(SamplingParams(**rules), [3], vocabulary).choose(rows[1])


def test_no_token_left_is_an_error(choose):
    row = torch.full((1, SIZE), -math.inf)
    row[0, END] = 0
    with pytest.raises(ValueError, match="-inf for every token that the rules of the request"):
        choose(row, min_tokens=1)


def test_penalties_count_prompt_and_completion(choose):
    rows = rows_for(4, 4, 4)
    assert [c.token for c in choose(rows, temperature=0, presence_penalty=2)] == [4, 4, 4]
    rows[:, 4] = 1.5
    tokens = [c.token for c in choose(rows, temperature=0, presence_penalty=2)]
    assert tokens == [4, 0, 1]
    tokens = [c.token for c in choose(rows, prompt=(4,), temperature=0, repetition_penalty=2)]
    assert tokens[0] == 0


def test_bias_decides(choose):
    (choice,) = choose(rows_for(4), temperature=0, logit_bias={9: 100})
    assert choice.token == 9
    assert all(c.token != 4 for c in choose(rows_for(*[4] * 50), logit_bias={4: -100}))


def test_an_end_token_ends(choose):
    (choice,) = choose(rows_for(END), temperature=0)
    assert choice == Choice(END, is_end=True)


def test_no_end_before_min_tokens(choose):
    rows = rows_for(END, STOP, END, STOP)
    choices = choose(rows, temperature=0, min_tokens=2, stop_token_ids=(STOP,))
    assert [choice.token for choice in choices] == [0, 0, END, STOP]
    assert [choice.is_end for choice in choices] == [False, False, True, False]
    assert choices[3].stop_token == STOP


def test_ignored_end_tokens_are_tokens_like_others(choose):
    choices = choose(rows_for(END, 4), temperature=0, ignore_eos=True)
    assert choices == [Choice(END), Choice(4)]
    (choice,) = choose(rows_for(END), temperature=0, ignore_eos=True, stop_token_ids=(END,))
    assert choice == Choice(END, stop="stop", stop_token=END)


def test_a_stop_token_stops(choose):
    (choice,) = choose(rows_for(STOP), temperature=0, stop_token_ids=(3, STOP))
    assert choice == Choice(STOP, stop="stop", stop_token=STOP)


@pytest.mark.parametrize("top", [0, 1, 5, 100])
def test_logprobs_are_those_of_the_distribution_before_all_rules(choose, top, generator):
    rows = 3 * torch.randn(6, SIZE, generator=generator)
    rules = {"temperature": 0.5, "top_k": 3, "frequency_penalty": 1.0, "logit_bias": {2: 9.0}}
    for row, choice in zip(rows, choose(rows, logprobs=top, seed=1, **rules), strict=True):
        scores = row.log_softmax(-1)
        assert choice.logprob is not None
        assert choice.logprob.token == choice.token
        assert choice.logprob.logprob == scores[choice.token]
        best = scores.sort(descending=True)
        expected = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))[:top]
        assert list(choice.logprob.top) == expected


def test_without_logprobs_none_are_given(choose):
    assert choose(rows_for(4))[0].logprob is None


def test_prompt_logprobs_are_those_of_log_softmax(generator):
    logits, tokens = (
        torch.randn(9, SIZE, generator=generator),
        random.Random(1).choices(range(SIZE), k=9),
    )
    scores = logits.log_softmax(-1)
    for row, (token, given) in enumerate(
        zip(tokens, prompt_logprobs(logits, tokens, 2), strict=True)
    ):
        assert (given.token, given.logprob) == (token, scores[row, token])
        assert [probability for _, probability in given.top] == scores[row].topk(2).values.tolist()


def test_repetition_stops_after_so_many_certain_tokens_in_a_row(choose):
    certain, unsure = rows_for(4)[0] * 10, rows_for(4)[0]
    assert certain.softmax(-1)[4] > 0.99 > unsure.softmax(-1)[4]
    rows = torch.stack([certain, certain, unsure, certain, certain, certain])
    rule = RepetitionStop(num_tokens=3, probability=0.99)
    for rules in ({"temperature": 0.0}, {"logprobs": 1, "seed": 0}):
        choices = choose(rows, repetition_stop=rule, logit_bias={4: 100.0}, **rules)
        assert [choice.stop for choice in choices] == [None] * 5 + ["repetition"]


def test_a_probability_is_judged_before_temperature(choose):
    rows = rows_for(4).expand(5, -1)
    rule = RepetitionStop(num_tokens=1, probability=0.99)
    assert all(c.stop is None for c in choose(rows, repetition_stop=rule, temperature=0.01))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"logit_bias": {SIZE: 1.0}}, "logit_bias has token 50; the vocabulary ends at 49"),
        ({"stop_token_ids": (99,)}, "stop_token_ids has token 99; the vocabulary ends at 49"),
        ({"thinking_budget": 3}, "a thinking budget needs a tokenizer"),
        ({"reasoning_effort": "low"}, "a thinking budget needs a tokenizer"),
    ],
    ids=str,
)
def test_rules_that_a_vocabulary_cannot_keep_are_refused(vocabulary, rules, message):
    with pytest.raises(ValueError, match=message):
        Chooser(SamplingParams(**rules), [3], vocabulary)
