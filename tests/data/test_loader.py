import random
from collections import Counter
from itertools import islice, pairwise

import pytest
import torch

from linnet.data import Loader
from linnet.errors import ConfigError, DataError


def same(left, right):
    return all(
        torch.equal(getattr(left, name), getattr(right, name))
        for name in ("tokens", "targets", "cu_seqlens")
    )


def sequence_pairs(batch):
    ends = batch.cu_seqlens.tolist()
    for start, stop in pairwise(ends):
        yield (
            tuple(batch.tokens[0, start:stop].tolist()),
            tuple(batch.targets[0, start:stop].tolist()),
        )


def all_pairs(store):
    pairs = Counter()
    for index in range(store.num_documents):
        document = store.document(index).tolist()
        pairs.update(pairwise(document))
    return pairs


@pytest.mark.parametrize("batch_tokens", [7, 64, 1000, 20_000])
def test_every_epoch_has_every_target_exactly_once(store, batch_tokens):
    loader = Loader(store, batch_tokens, seq_len=min(batch_tokens, 50))
    epoch_tokens = store.num_tokens - store.num_documents
    assert loader.epoch_tokens == epoch_tokens
    windows = islice(loader, 3 * epoch_tokens // batch_tokens + 1)
    stream = [
        pair
        for batch in windows
        for pair in zip(batch.tokens[0].tolist(), batch.targets[0].tolist(), strict=True)
    ]
    for epoch in range(3):
        seen = Counter(stream[epoch * epoch_tokens : (epoch + 1) * epoch_tokens])
        assert seen == all_pairs(store)


def test_sequences_are_runs_of_one_document_and_marked_by_cu_seqlens(store):
    documents = [store.document(i).tolist() for i in range(store.num_documents)]
    runs = {tuple(d[a : a + n]) for d in documents for a in range(len(d)) for n in range(1, 51)}
    for batch in islice(Loader(store, 128, seq_len=50), 100):
        assert batch.tokens.shape == batch.targets.shape == (1, 128)
        assert batch.num_targets == 128
        assert batch.cu_seqlens.dtype == torch.int32
        assert (int(batch.cu_seqlens[0]), int(batch.cu_seqlens[-1])) == (0, 128)
        for inputs, targets in sequence_pairs(batch):
            assert 1 <= len(inputs) <= 50
            assert inputs in runs
            assert inputs[1:] == targets[:-1]


def test_epochs_and_seeds_are_ordered_differently(store):
    tokens = store.num_tokens - store.num_documents
    loader = Loader(store, tokens, seq_len=50)
    first, second = next(loader), next(loader)
    assert not torch.equal(first.tokens, second.tokens)
    assert not torch.equal(first.tokens, next(Loader(store, tokens, 50, seed=1)).tokens)
    assert same(first, next(Loader(store, tokens, 50)))


def test_resuming_at_any_point_gives_the_same_windows(store):
    source = random.Random(0)
    windows = list(islice(Loader(store, 100, 64), 200))
    for _ in range(20):
        start = source.randrange(190)
        before = Loader(store, 100, 64)
        for _ in range(start):
            next(before)
        after = Loader(store, 100, 64)
        after.load_state_dict(before.state_dict())
        assert after.epoch == before.epoch
        assert all(same(next(after), window) for window in windows[start : start + 5])


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_read_what_one_would(store, world_size):
    alone = Loader(store, 100, 64)
    ranks = [Loader(store, 100, 64, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(60):
        for rank in ranks:
            assert same(next(rank), next(alone))
    assert all(rank.state_dict() == alone.state_dict() for rank in ranks)


def test_a_run_resumes_on_another_number_of_ranks(store):
    two = [Loader(store, 100, 64, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(9):
        for loader in two:
            next(loader)
    windows = list(islice(Loader(store, 100, 64), 21))
    for rank in range(3):
        loader = Loader(store, 100, 64, rank=rank, world_size=3)
        loader.load_state_dict(two[0].state_dict())
        assert same(next(loader), windows[18 + rank])


@pytest.mark.parametrize(
    ("key", "other"), [("seed", 1), ("seq_len", 32), ("batch_tokens", 64), ("store", "x")]
)
def test_the_state_of_another_stream_is_refused(store, key, other):
    loader = Loader(store, 100, 64)
    with pytest.raises(DataError, match=f"{key}={other!r}"):
        loader.load_state_dict(loader.state_dict() | {key: other})


def test_a_rank_outside_the_world_is_refused(store):
    with pytest.raises(ConfigError, match="rank is 2"):
        Loader(store, 100, 64, rank=2, world_size=2)
