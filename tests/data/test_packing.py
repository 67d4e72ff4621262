from itertools import pairwise

import numpy as np
import pytest
import torch

from linnet.data import evaluation_batches
from linnet.errors import ConfigError


def sequences(batch):
    """Yield (inputs, targets) of each sequence of a batch."""
    ends = batch.cu_seqlens.tolist()
    for start, stop in pairwise(ends):
        yield batch.tokens[0, start:stop].tolist(), batch.targets[0, start:stop].tolist()


@pytest.mark.parametrize("batch_tokens", [64, 65, 1000, 10**6])
@pytest.mark.parametrize("seq_len", [1, 63, 64])
def test_evaluation_covers_every_target_once_and_in_order(store, batch_tokens, seq_len):
    documents = [store.document(i).tolist() for i in range(store.num_documents)]
    expected_inputs = [token for document in documents for token in document[:-1]]
    expected_targets = [token for document in documents for token in document[1:]]
    held_out = evaluation_batches(store, batch_tokens, seq_len)
    pairs = [pair for batch in held_out for pair in sequences(batch)]
    assert [token for inputs, _ in pairs for token in inputs] == expected_inputs
    assert [token for _, targets in pairs for token in targets] == expected_targets
    assert max(len(inputs) for inputs, _ in pairs) <= seq_len
    assert held_out.num_targets == len(expected_targets) == sum(b.num_targets for b in held_out)
    assert held_out.num_bytes == store.num_bytes


def test_a_batch_has_the_promised_shapes_and_types(store):
    for batch in evaluation_batches(store, 100, 64):
        length = batch.tokens.shape[1]
        assert length <= 100
        assert batch.tokens.shape == batch.targets.shape == (1, length)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert batch.cu_seqlens.dtype == torch.int32
        assert (batch.cu_seqlens[0], batch.cu_seqlens[-1]) == (0, length)
        assert (batch.cu_seqlens.diff() > 0).all()


def test_a_held_out_subset_is_whole_documents_evenly_spread(store):
    held_out = evaluation_batches(store, 1000, 64, max_tokens=store.num_tokens // 4)
    documents = held_out.documents
    lengths = [len(store.document(i)) for i in documents]
    assert 0.1 * store.num_tokens < sum(lengths) <= store.num_tokens // 4
    assert held_out.num_bytes == sum(int(store.document_bytes[i]) for i in documents)
    assert sum(batch.num_targets for batch in held_out) == sum(lengths) - len(lengths)
    assert np.diff(documents).max() < 3 * store.num_documents / len(documents)


def test_the_smallest_held_out_subset_is_one_document(store):
    assert len(evaluation_batches(store, 64, 64, max_tokens=1).documents) == 1


@pytest.mark.parametrize(("batch_tokens", "seq_len"), [(64, 65), (64, 0)])
def test_lengths_that_do_not_fit_are_refused(store, batch_tokens, seq_len):
    with pytest.raises(ConfigError, match="1 <= seq_len <= batch_tokens"):
        evaluation_batches(store, batch_tokens, seq_len)
