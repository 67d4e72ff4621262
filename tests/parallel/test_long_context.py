"""A sequence whose keys lie on several ranks against the cache of one process."""

import pytest
import torch

from linnet.model import Model, ModelConfig
from linnet.parallel.long_context import LongContext
from linnet.parallel.spread_keys import KeyBlocks, Shares
from linnet.parallel.traffic import Traffic

PATTERN = (0, 1, 0, 1)  # the last layer attends by softmax, or by neither with its reverse
HEADS, GROUPS, DIM = 4, 2, 8
NUM_DECODED = 8
CHUNKS = {
    "one chunk": [97],
    "odd sizes": [41, 1, 30, 7, 2, 55],
    "fewer tokens than ranks": [1, 2, 1],
    "short between long": [64, 3, 5, 33],
}
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def model_of(dtype=torch.float32, pattern=PATTERN):
    config = ModelConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=len(pattern),
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=DIM,
        attn_type_list=pattern,
        rotary_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = Model(config, dtype).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
    return model.eval()


def prompt_of(length):
    return torch.randint(61, (1, length), generator=torch.Generator().manual_seed(1))


def run(extend, chunks):
    """Return the last logits after each chunk and each of the tokens drawn then, and these."""
    logits = [extend(tokens) for tokens in prompt_of(sum(chunks)).split(chunks, 1)]
    for _ in range(NUM_DECODED):
        logits.append(extend(logits[-1].argmax(-1)))
    return torch.cat(logits, 1)[0]


def whole(chunks, *options):
    model = model_of(*options)
    cache = model.new_cache()
    return run(lambda tokens: model(tokens, cache=cache, logits_to_keep=1), chunks)


def on_rank(group, chunks, *options):
    context = LongContext(model_of(*options), group, min_part_len=1, block_len=8)
    return run(context.extend, chunks), context.kv_bytes, context.state_bytes


def assert_same(results, expected, tolerance):
    for logits, *_ in results:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        error = (logits - expected).abs().max() / expected.abs().max()
        assert error < tolerance, float(error)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(
    "size", [pytest.param(size, marks=[pytest.mark.slow] * (size != 3)) for size in (1, 2, 3, 4)]
)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_are_those_of_one_process(ranks, size, chunks, dtype):
    results = ranks(on_rank, size, chunks, dtype)
    assert_same(results, whole(chunks, dtype), TOLERANCE[dtype])


@pytest.mark.parametrize("pattern", [(1, 1, 0), (0, 0), (1,)], ids=str)
def test_any_order_of_layers_will_do(ranks, pattern):
    chunks = CHUNKS["short between long"]
    results = ranks(on_rank, 3, chunks, torch.float32, pattern)
    assert_same(results, whole(chunks, torch.float32, pattern), 1e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_keep_equal_shares_of_the_keys(ranks, size):
    chunks = CHUNKS["short between long"]
    token = PATTERN.count(1) * 2 * GROUPS * DIM * 4
    state = PATTERN.count(0) * HEADS * DIM * DIM * 4
    num_tokens = sum(chunks) + NUM_DECODED
    results = ranks(on_rank, size, chunks)
    assert sum(kv for _, kv, _ in results) == num_tokens * token
    assert {kv for _, kv, _ in results} <= {
        num_tokens // size * token,
        -(-num_tokens // size) * token,
    }
    assert [states for *_, states in results] == [state] * size


def bf16_on_rank(group):
    context = LongContext(model_of(torch.bfloat16), group, min_part_len=1)
    return context.extend(prompt_of(40)), context.extend(prompt_of(1)), context.kv_bytes


def test_bf16_keys_stay_bf16(ranks):
    model = model_of(torch.bfloat16)
    cache = model.new_cache()
    expected = [model(prompt_of(40), cache=cache)[:, -1:], model(prompt_of(1), cache=cache)]
    results = ranks(bf16_on_rank, 2)
    assert sum(kv for *_, kv in results) == 41 * PATTERN.count(1) * 2 * GROUPS * DIM * 2
    for *logits, _ in results:
        for own, single in zip(logits, expected, strict=True):
            assert (own - single).norm() < 0.03 * single.norm()


def traffic_on_rank(group, pattern, lengths):
    """Return what is received for each of several chunks, and then for one token."""
    context = LongContext(model_of(pattern=pattern), group, min_part_len=2)
    counted = []
    for length in (*lengths, 1):
        with Traffic() as traffic:
            context.extend(prompt_of(length))
        counted.append(dict(traffic.received))
    return counted


def test_lightning_layers_receive_states_whatever_the_length(ranks):
    num_layers, others = 2, 3
    state, hidden = HEADS * DIM * DIM * 4, 24 * 4
    expected = {"all_gather": others * (num_layers * state + hidden)}
    for counted in ranks(traffic_on_rank, 4, (0, 0), [40, 400, 1600]):
        assert counted == [expected] * 3 + [{}]


@pytest.mark.parametrize("length", [40, 1600])
def test_a_decoded_token_receives_one_small_answer_per_softmax_layer(ranks, length):
    num_layers, others = PATTERN.count(1), 3
    for counted in ranks(traffic_on_rank, 4, PATTERN, [length]):
        assert counted[-1] == {"all_gather": others * num_layers * HEADS * (DIM + 1) * 4}


def test_the_smaller_of_keys_and_queries_travels(ranks):
    pattern, others = (1, 0), 3
    key, query = 2 * GROUPS * DIM * 4, HEADS * (DIM + DIM + 1) * 4
    counted = ranks(traffic_on_rank, 4, pattern, [400, 40])[0]
    assert counted[0]["receive"] == others * 100 * key
    # A short chunk after a long one: not the 110 tokens of each share, but 10 queries and answers.
    assert counted[1]["receive"] == others * 10 * query < others * 110 * key


def test_one_query_of_each_rank_travels_in_the_last_layer(ranks):
    others, query = 3, HEADS * (DIM + DIM + 1) * 4
    for counted in ranks(traffic_on_rank, 4, (0, 1), [43, 17]):
        assert [part["receive"] for part in counted[:2]] == [others * query] * 2


def refused_on_rank(group):
    context = LongContext(model_of(), group, min_part_len=1)
    context.extend(prompt_of(20))
    messages = []
    too_large = prompt_of(30)
    too_large[0, 0] = 61  # in the part of the first rank alone
    for tokens in (prompt_of(0), prompt_of(4).view(2, 2), too_large, prompt_of(9).float()):
        with pytest.raises(ValueError) as caught:
            context.extend(tokens)
        messages.append(str(caught.value))
    return messages, context.extend(prompt_of(1))


def test_refused_tokens_change_nothing(ranks):
    model = model_of()
    cache = model.new_cache()
    model(prompt_of(20), cache=cache)
    expected = model(prompt_of(1), cache=cache)
    for messages, logits in ranks(refused_on_rank, 3):
        assert messages[0] == "a long context takes tokens [1, T] with T > 0; got (1, 0)"
        assert messages[1] == "a long context takes tokens [1, T] with T > 0; got (2, 2)"
        assert messages[2].startswith("token id 61 outside the vocabulary of 61")
        assert messages[3] == "tokens must be [B, T] int64; got (1, 9) torch.float32"
        torch.testing.assert_close(logits, expected)


def broken_off_on_rank(group):
    model = model_of()
    context = LongContext(model, group, min_part_len=1)
    context.extend(prompt_of(20))
    last = model.layers[-1].block_sparse_moe
    dispatch = last.dispatch

    def fail(*args):
        raise RuntimeError("no memory")

    last.dispatch = fail
    for length in (30, 1):
        with pytest.raises(RuntimeError, match="no memory"):
            context.extend(prompt_of(length))
    last.dispatch = dispatch
    return context.num_tokens, context.extend(prompt_of(30)), model(prompt_of(12))


def test_a_pass_that_breaks_off_leaves_context_and_model_as_they_were(ranks):
    model = model_of()
    cache = model.new_cache()
    model(prompt_of(20), cache=cache)
    expected = model(prompt_of(30), cache=cache, logits_to_keep=1)
    for num_tokens, logits, alone in ranks(broken_off_on_rank, 3):
        assert num_tokens == 20
        torch.testing.assert_close(logits, expected)
        assert torch.equal(alone, model(prompt_of(12)))


def inference_mode_on_rank(group):
    context = LongContext(model_of(), group, min_part_len=1)
    with torch.inference_mode():
        context.extend(prompt_of(20))
    return context.extend(prompt_of(30))


def test_a_context_of_inference_mode_goes_on_outside_of_it(ranks):
    model = model_of()
    cache = model.new_cache()
    model(prompt_of(20), cache=cache)
    expected = model(prompt_of(30), cache=cache, logits_to_keep=1)
    for logits in ranks(inference_mode_on_rank, 2):
        torch.testing.assert_close(logits, expected)


def unusable_on_rank(group):
    with pytest.raises(ValueError, match="min_part_len is 0 and block_len 4096"):
        LongContext(model_of(), group, min_part_len=0)


def test_lengths_below_one_are_refused(ranks):
    ranks(unusable_on_rank, 1)


def test_shares_stay_within_one_token_of_each_other():
    held = (0,) * 5
    for length in (7, 1, 1, 13, 2, 4, 100, 3):
        shares = Shares.of(held, length)
        assert sum(shares.lengths) == length == shares.bounds[-1]
        assert max(shares.lengths) - min(shares.lengths) <= 1
        held = shares.after
        assert max(held) - min(held) <= 1


def test_blocks_give_back_what_was_written_over_their_borders():
    keys = KeyBlocks(block_len=4)
    k, v = torch.randn(2, 1, 11, GROUPS, DIM).unbind(0)
    for start, stop in ((0, 3), (3, 3), (3, 10), (10, 11)):
        keys.write(start, k[:, start:stop], v[:, start:stop], room=stop)
    blocks = list(keys.until(11))
    assert [len(block) for block in blocks] == [4, 4, 3]
    assert torch.equal(torch.cat(blocks), torch.stack((k[0], v[0]), 1))
    assert [len(block) for block in keys.until(8)] == [4, 4]
