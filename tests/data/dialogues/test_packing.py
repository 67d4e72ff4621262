"""Windows of whole sequences: nothing cut, nothing lost, shares kept, resumed exactly."""

import itertools

import numpy as np
import pytest
import torch

from linnet.data.dialogues import Example, MixLoader, Share, encode_text, held_out_examples, pack
from linnet.errors import ConfigError, DataError


class Numbers:
    """Examples that spell their source and index, so that each can be told from its tokens."""

    def __init__(self, name: int, lengths: tuple[int, int]) -> None:
        self.fingerprint = f"numbers-{name}-{lengths}"
        self._name, self._lengths = name, lengths

    def example(self, index: int) -> Example:
        length = np.random.default_rng((self._name, index)).integers(*self._lengths) + 1
        tokens = np.full(length, self._name * 1000 + index)
        is_target = np.arange(length) >= length // 2
        is_target[0] = False
        return Example(tokens, is_target)


def mixture() -> list[Share]:
    return [Share(Numbers(1, (2, 20)), 1.0), Share(Numbers(2, (30, 64)), 3.0)]


def sequences(batch) -> list[list[int]]:
    bounds = batch.cu_seqlens.tolist()
    tokens = batch.tokens[0].tolist()
    return [tokens[a:b] for a, b in itertools.pairwise(bounds)]


def test_every_example_comes_whole_and_once():
    loader = MixLoader(mixture(), 64)
    seen = [sequence for _ in range(60) for sequence in sequences(next(loader))]
    names = [sequence[0] for sequence in seen]
    assert len(names) == len(set(names))
    for sequence in seen:
        source, index = divmod(sequence[0], 1000)
        expected = mixture()[source - 1].source.example(index).tokens[:-1]
        assert sequence == expected.tolist()


def test_windows_are_never_too_large_and_nearly_full():
    loader = MixLoader(mixture(), 128)
    sizes = [next(loader).tokens.shape[1] for _ in range(50)]
    assert max(sizes) <= 128 and sum(sizes) / len(sizes) > 0.95 * 128


def test_no_example_waits_for_ever():
    loader = MixLoader(mixture(), 64)
    for _ in range(200):
        next(loader)
    state = loader.state_dict()
    oldest = [min(i for p, i in state["waiting"] if p == place) for place in range(2)]
    assert all(drawn - first <= 24 for drawn, first in zip(state["drawn"], oldest, strict=True))


def test_tokens_are_shared_as_the_weights_say():
    loader = MixLoader(mixture(), 128)
    for _ in range(100):
        next(loader)
    first, second = loader.state_dict()["tokens"]
    assert second / first == pytest.approx(3.0, rel=0.05)


def test_resumed_stream_gives_the_same_windows():
    whole, first = MixLoader(mixture(), 64), MixLoader(mixture(), 64)
    for _ in range(7):
        next(whole), next(first)
    resumed = MixLoader(mixture(), 64)
    resumed.load_state_dict(first.state_dict())
    for _ in range(20):
        expected, batch = next(whole), next(resumed)
        assert torch.equal(expected.tokens, batch.tokens)
        assert torch.equal(expected.targets, batch.targets)
        assert torch.equal(expected.cu_seqlens, batch.cu_seqlens)


def test_state_of_another_mixture_is_refused():
    state = MixLoader(mixture(), 64).state_dict()
    with pytest.raises(DataError, match="has batch_tokens=64, this run 65"):
        MixLoader(mixture(), 65).load_state_dict(state)


def test_example_longer_than_a_window_is_an_error():
    with pytest.raises(DataError, match="a batch holds 40"):
        next(MixLoader(mixture(), 40))


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_weight_that_is_not_positive_is_refused(weight):
    with pytest.raises(ConfigError, match="positive weights"):
        MixLoader([Share(Numbers(1, (2, 20)), weight)], 64)


def test_targets_are_the_next_tokens_where_learned():
    first = Example(np.array([1, 2, 3, 4]), np.array([False, False, True, True]))
    batch = pack([first, encode_text(np.array([7, 8]))])
    assert batch.tokens.tolist() == [[1, 2, 3, 7]]
    assert batch.targets.tolist() == [[-100, 3, 4, 8]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4] and batch.num_targets == 3


def test_held_out_examples_hold_every_source_and_count_the_answers_bytes(tokenizer):
    shares = [Share(Numbers(0, (2, 9)), 1.0), Share(Numbers(0, (9, 12)), 1e-6)]
    held_out = held_out_examples(shares, tokenizer, 16, 10)
    assert {len(example) >= 9 for example in held_out.examples} == {True, False}
    assert sum(batch.num_targets for batch in held_out) == held_out.num_targets
    expected = b"".join(
        tokenizer.token_bytes(int(token))
        for example in held_out.examples
        for token in example.tokens[example.is_target]
    )
    assert held_out.num_bytes == len(expected)
