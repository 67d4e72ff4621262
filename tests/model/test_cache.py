"""One text, one set of logits: whole, in chunks, token by token, packed, batched, rolled back."""

import random
from itertools import accumulate

import pytest
import torch

TOLERANCE = 1e-5
LENGTH = 150
VARIANTS = {
    "lightning-first": {"pattern": "LLLS"},
    "softmax-first": {"pattern": "SLL"},
    "all-lightning": {"pattern": "LL"},
    "all-softmax": {"pattern": "SS"},
    "shared-expert": {"pattern": "LSL", "shared_intermediate_size": 12},
    "pre-norm": {"pattern": "LLS", "postnorm": False},
    "three-heads": {"pattern": "LSL", "num_attention_heads": 3, "num_key_value_heads": 1},
    "six-heads": {"pattern": "LLS", "num_attention_heads": 6, "num_key_value_heads": 3},
    "no-rotary": {"pattern": "LS", "rotary_dim": 0},
}


@pytest.fixture(params=VARIANTS)
def model(request, tiny_model):
    return tiny_model(**VARIANTS[request.param])


def tokens_of(length: int = LENGTH, batch: int = 1) -> torch.Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


def in_chunks(model, tokens, sizes, cache=None):
    cache = model.new_cache(tokens.shape[0]) if cache is None else cache
    return torch.cat([model(chunk, cache=cache) for chunk in tokens.split(sizes, 1)], 1)


def assert_close(actual, expected):
    assert actual.shape == expected.shape
    if not actual.numel():
        return
    difference = (actual - expected).abs().max().item()
    print(f"max abs difference {difference:.1e} of logits up to {expected.abs().max():.1f}")
    assert difference < TOLERANCE


@torch.no_grad()
def test_chunks_of_any_size_give_the_logits_of_the_whole(model):
    tokens = tokens_of(batch=2)
    whole = model(tokens)
    source = random.Random(0)
    for _ in range(4):
        cuts = sorted(source.sample(range(1, LENGTH), source.randint(1, 12)))
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, LENGTH], strict=True)]
        assert_close(in_chunks(model, tokens, sizes), whole)


@torch.no_grad()
def test_token_by_token_gives_the_logits_of_the_whole(model):
    tokens = tokens_of(70)
    assert_close(in_chunks(model, tokens, 1), model(tokens))


@torch.no_grad()
def test_empty_chunk_changes_nothing(model):
    tokens = tokens_of(20)
    sizes = [0, 7, 0, 0, 13, 0]
    assert_close(in_chunks(model, tokens, sizes), model(tokens))


@torch.no_grad()
def test_packed_documents_give_the_logits_of_separate_ones(model):
    lengths = [1, 63, 0, 64, 65, 2, 100]
    tokens = tokens_of(sum(lengths))
    offsets = torch.tensor([0, *accumulate(lengths)])
    packed = model(tokens, cu_seqlens=offsets)
    separate = [model(document) for document in tokens.split(lengths, 1) if document.shape[1]]
    assert_close(packed, torch.cat(separate, 1))


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other(model):
    tokens = tokens_of(batch=2)
    assert_close(model(tokens), torch.cat([model(row[None]) for row in tokens]))


@pytest.mark.parametrize("keep", [0, 1, 3, LENGTH, LENGTH + 5])
@torch.no_grad()
def test_logits_to_keep_are_the_last_ones(tiny_model, keep):
    model, tokens = tiny_model(), tokens_of()
    kept = model(tokens, logits_to_keep=keep)
    expected = model(tokens)[:, max(0, LENGTH - keep) :]
    torch.testing.assert_close(kept, expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("keep", [0, 1, 3, 40, 64])
@torch.no_grad()
def test_logits_that_nobody_reads_leave_the_same_cache(model, keep):
    tokens = tokens_of(batch=2)
    whole, cache = model(tokens), model.new_cache(2)
    for start, stop in ((0, 64), (64, 66), (66, 130)):
        kept = model(tokens[:, start:stop], cache=cache, logits_to_keep=keep)
        assert_close(kept, whole[:, max(start, stop - keep) : stop])
    assert_close(model(tokens[:, 130:], cache=cache), whole[:, 130:])


@torch.no_grad()
def test_rollback_is_bitwise_exact_for_diverging_continuations(model):
    first, second = tokens_of(40), tokens_of(40).flip(1)
    cache = model.new_cache()
    model(tokens_of(30), cache=cache)
    snapshot = cache.snapshot()
    expected = [in_chunks(model, text, [1, 20, 19], cache_at(model)) for text in (first, second)]
    for _ in range(2):
        for text, logits in zip((first, second), expected, strict=True):
            cache.restore(snapshot)
            assert torch.equal(in_chunks(model, text, [1, 20, 19], cache), logits)


def cache_at(model):
    cache = model.new_cache()
    model(tokens_of(30), cache=cache)
    return cache


@torch.no_grad()
def test_old_snapshot_then_newer_one_restores_both(model):
    cache = model.new_cache()
    tokens = tokens_of()
    snapshots = {0: cache.snapshot()}
    for start in (0, 50, 100):
        model(tokens[:, start : start + 50], cache=cache)
        snapshots[start + 50] = cache.snapshot()
    probe = tokens_of(9)
    expected = {}
    for length in (0, 50, 100):
        fresh = model.new_cache()
        for start in range(0, length, 50):
            model(tokens[:, start : start + 50], cache=fresh)
        expected[length] = model(probe, cache=fresh)
    for length in (50, 100, 0, 100, 50):
        cache.restore(snapshots[length])
        assert cache.length == length
        assert torch.equal(model(probe, cache=cache), expected[length])


@torch.no_grad()
def test_snapshot_continues_in_another_cache(tiny_model):
    model = tiny_model()
    cache, other = cache_at(model), model.new_cache()
    other.restore(cache.snapshot())
    probe = tokens_of(9)
    expected = model(probe, cache=cache_at(model))
    assert torch.equal(model(probe, cache=other), expected)
    assert torch.equal(model(probe, cache=cache), expected)


def test_snapshot_of_another_batch_size_or_model_is_refused(tiny_model):
    cache = tiny_model("LS").new_cache(2)
    for other in (tiny_model("LS").new_cache(3), tiny_model("LLS").new_cache(2)):
        with pytest.raises(ValueError, match="the snapshot has"):
            cache.restore(other.snapshot())


@torch.no_grad()
def test_failed_call_leaves_the_cache_as_it_was(tiny_model, monkeypatch):
    model = tiny_model("LSLS")
    cache, probe = cache_at(model), tokens_of(5)
    expected = model(probe, cache=cache_at(model))

    def interrupted(*_args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.layers[3], "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(probe, cache=cache)
    assert cache.length == 30
    assert torch.equal(model(probe, cache=cache), expected)


def test_cached_call_records_no_graph(tiny_model):
    model = tiny_model()
    cache = model.new_cache()
    assert not any(model(tokens_of(3), cache=cache).requires_grad for _ in range(3))
    assert model(tokens_of(3)).requires_grad


def test_cache_of_inference_mode_continues_outside_of_it(tiny_model):
    model, tokens = tiny_model(), tokens_of(12)
    cache = model.new_cache()
    with torch.inference_mode():
        first = model(tokens[:, :6], cache=cache)
    rest = in_chunks(model, tokens[:, 6:], [1, 5], cache)
    with torch.no_grad():
        assert_close(torch.cat([first, rest], 1), model(tokens))


@torch.no_grad()
def test_states_are_fp32_in_a_bf16_model(tiny_model):
    model = tiny_model("LS", dtype=torch.bfloat16)
    cache = model.new_cache()
    logits = in_chunks(model, tokens_of(20), [1, 18, 1], cache)
    state = cache.state(0)
    assert state is not None and state.dtype == torch.float32 and state.shape == (1, 4, 8, 8)
    assert logits.dtype == torch.float32


@torch.no_grad()
def test_bf16_chunks_stay_close_to_the_whole(tiny_model):
    # One expert: with several, a rounded router may choose another one near a tie.
    model = tiny_model(dtype=torch.bfloat16, num_local_experts=1, num_experts_per_tok=1)
    tokens = tokens_of()
    difference = in_chunks(model, tokens, [64, 1, 1, 50, 34]) - model(tokens)
    assert difference.abs().max() < 0.25 and difference.abs().mean() < 0.02


@torch.no_grad()
def test_cache_counts_its_bytes(tiny_model):
    model = tiny_model("LLS")
    cache = model.new_cache(2)
    assert cache.num_bytes == 0
    model(tokens_of(10, batch=2), cache=cache)
    states = 2 * 2 * 4 * 8 * 8 * 4
    assert cache.num_bytes == states + 2 * 2 * 256 * 2 * 8 * 4  # room for 256 tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "must be .B, T. int64"),
        ({"tokens": torch.zeros(1, 3, dtype=torch.int32)}, "must be .B, T. int64"),
        ({"tokens": torch.tensor([[61]])}, "token id 61 outside the vocabulary of 61"),
        ({"tokens": torch.tensor([[-1]])}, "token id -1 outside"),
        ({"logits_to_keep": -1}, "logits_to_keep is -1"),
        ({"cu_seqlens": torch.tensor([0, 2])}, "must run from 0 to T = 3"),
        ({"cu_seqlens": torch.tensor([1, 3])}, "must run from 0 to T = 3"),
        ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, "must not decrease"),
        ({"cu_seqlens": torch.tensor([], dtype=torch.int64)}, "must be .N . 1. offsets"),
        ({"cu_seqlens": torch.tensor([[0, 3]])}, "must be .N . 1. offsets"),
        ({"cu_seqlens": torch.tensor([0.0, 3.0])}, "must be int32 or int64"),
        ({"tokens": torch.ones(2, 3).long(), "cu_seqlens": torch.tensor([0, 3])}, "got B = 2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_do_not_fit_are_refused(tiny_model, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("L")(**{"tokens": tokens_of(3), **arguments})


def test_cache_with_packed_documents_or_other_rows_is_refused(tiny_model):
    model = tiny_model("L")
    with pytest.raises(ValueError, match="cannot be combined with cu_seqlens"):
        model(tokens_of(3), cache=model.new_cache(), cu_seqlens=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="the cache holds 2 sequences; got 1 rows"):
        model(tokens_of(3), cache=model.new_cache(2))
