"""Sequences in pages that ranks share against the cache of one process."""

import itertools
from array import array

import pytest
import torch

from linnet.infer.runner import Chunk
from linnet.infer.spread_runner import SpreadRunner
from linnet.model import Model, ModelConfig, paged
from linnet.model.paged import PAGE_SIZE, PagedMemory, Row
from linnet.parallel.spread_pages import PageShare
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


def prompt_of(length, seed=1):
    return torch.randint(61, (1, length), generator=torch.Generator().manual_seed(seed))


class Sequences:
    """Some sequences on the ranks of a group, with pages one after the other in turn."""

    def __init__(self, model, group, num_rows=1, num_pages=40, min_part_len=1):
        share = PageShare(group)
        dtype = model.compute_dtype
        self.memory = PagedMemory(
            model.config, num_rows, num_rows * num_pages, dtype, page_len=share.page_len
        )
        pages = torch.randperm(num_rows * num_pages, generator=torch.Generator().manual_seed(2))
        self.rows = [
            Row(n, array("q", own.tolist())) for n, own in enumerate(pages.chunk(num_rows))
        ]
        for row in self.rows:
            self.memory.clear(row.slot)
        self.runner = SpreadRunner(model, self.memory, share, min_part_len=min_part_len)

    def extend(self, tokens, num_logits=1):
        """Let the first sequence take in tokens [1, T]; return logits [1, num_logits, vocab]."""
        step = self.runner.run([Chunk(self.rows[0], tokens[0].tolist(), num_logits)])
        step.commit([True])
        return step.logits[0][None]


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
    return run(Sequences(model_of(*options), group).extend, chunks)


def assert_same(results, expected, tolerance):
    for logits in results:
        assert torch.equal(logits, results[0])
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


def segmented_on_rank(group, chunks):
    """Gather the past from two pages at a time."""
    segment = paged.SEGMENT_PAGES
    paged.SEGMENT_PAGES = 2
    try:
        return on_rank(group, chunks)
    finally:
        paged.SEGMENT_PAGES = segment


def test_past_of_many_segments(ranks):
    chunks = [300, 1, 70, 33]
    assert_same(ranks(segmented_on_rank, 3, chunks), whole(chunks), 1e-5)


def mixed_on_rank(group, plan):
    """Run steps of several sequences; return the logits of each step and sequence."""
    sequences = Sequences(model_of(), group, num_rows=len(plan), min_part_len=10)
    texts = [prompt_of(sum(lengths), seed)[0] for seed, lengths in enumerate(plan)]
    found = []
    for lengths in itertools.zip_longest(*plan, fillvalue=0):
        rows = [row for row, n in zip(sequences.rows, lengths, strict=True) if n]
        chunks = []
        for row in rows:
            n = lengths[row.slot]
            tokens = texts[row.slot][row.length : row.length + n].tolist()
            chunks.append(Chunk(row, tokens, num_logits=min(n, 3 * row.slot)))
        step = sequences.runner.run(chunks)
        step.commit([True] * len(chunks))
        found.append(
            {row.slot: own for row, own in zip(rows, step.logits, strict=True) if own.numel()}
        )
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_sequences_beside_each_other_do_not_meet(ranks, size):
    plan = [(70, 5), (1, 1, 1, 1), (90, 64, 30, 2), (7, 200, 1)]
    model, expected = model_of(), []
    for seed, lengths in enumerate(plan):
        cache = model.new_cache()
        text = prompt_of(sum(lengths), seed)
        expected.append([model(part, cache=cache)[0] for part in text.split(lengths, 1)])
    for found in ranks(mixed_on_rank, size, plan):
        for step, logits in enumerate(found):
            wanted = {slot for slot, lengths in enumerate(plan) if slot and step < len(lengths)}
            assert logits.keys() == wanted
            for slot, own in logits.items():
                torch.testing.assert_close(own, expected[slot][step][-len(own) :])


def scored_on_rank(group, num_logits):
    return Sequences(model_of(), group).extend(prompt_of(47), num_logits)


@pytest.mark.parametrize("num_logits", [47, 30, 2])
def test_many_logits_of_a_split_chunk_are_those_of_one_process(ranks, num_logits):
    expected = model_of()(prompt_of(47))[:, -num_logits:]
    for logits in ranks(scored_on_rank, 3, num_logits):
        torch.testing.assert_close(logits, expected)


def forgotten_on_rank(group):
    """Forget a draft, of which some tokens lie in a page already, and go on with others."""
    sequences = Sequences(model_of(), group)
    (row,) = sequences.rows
    sequences.extend(prompt_of(62))
    draft = Chunk(row, prompt_of(9, seed=3)[0].tolist(), num_logits=1, is_draft=True)
    sequences.runner.run([draft]).commit([False])
    assert row.length == 62
    return sequences.extend(prompt_of(5))


def test_a_forgotten_draft_leaves_nothing(ranks):
    model = model_of()
    cache = model.new_cache()
    model(prompt_of(62), cache=cache)
    expected = model(prompt_of(5), cache=cache)[:, -1:]
    for logits in ranks(forgotten_on_rank, 2):
        torch.testing.assert_close(logits, expected)


def shares_on_rank(group):
    share = PageShare(group)
    kept = []
    for length in range(3 * PAGE_SIZE):
        index, places = share.own(torch.arange(length) % PAGE_SIZE)
        assert share.held(length) == len(index)
        assert places.tolist() == [n % share.page_len for n in range(len(index))]
        kept.append(len(index))
    return kept, share.page_len


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ranks_keep_equal_shares_of_every_page(ranks, size):
    results = ranks(shares_on_rank, size)
    for length, held in enumerate(zip(*(kept for kept, _ in results), strict=True)):
        assert sum(held) == length
        assert max(held) - min(held) <= -(-length // PAGE_SIZE)
    assert sum(page_len for _, page_len in results) == PAGE_SIZE


def bf16_on_rank(group):
    sequences = Sequences(model_of(torch.bfloat16), group)
    (dtype,) = {keys.dtype for keys in sequences.memory.keys if keys is not None}
    return sequences.extend(prompt_of(40)), sequences.extend(prompt_of(1)), dtype


def test_bf16_keys_stay_bf16(ranks):
    model = model_of(torch.bfloat16)
    cache = model.new_cache()
    expected = [model(prompt_of(40), cache=cache)[:, -1:], model(prompt_of(1), cache=cache)]
    for *logits, dtype in ranks(bf16_on_rank, 2):
        assert dtype == torch.bfloat16
        for own, single in zip(logits, expected, strict=True):
            assert (own - single).norm() < 0.03 * single.norm()


def traffic_on_rank(group, pattern, lengths, num_logits=1):
    """Return what is received for each of several chunks, and then for one token."""
    sequences = Sequences(model_of(pattern=pattern), group, min_part_len=2)
    counted = []
    for length in (*lengths, 1):
        with Traffic() as traffic:
            sequences.extend(prompt_of(length), num_logits)
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


@pytest.mark.parametrize("length", [80, 1600])
def test_kept_keys_do_not_travel(ranks, length):
    """A chunk receives its own keys, queries and answers, whatever was before it."""
    part, others = 10, 3
    keys, queries, answers = 2 * GROUPS * DIM * 4, HEADS * DIM * 4, HEADS * (DIM + 1) * 4
    state, hidden = HEADS * DIM * DIM * 4, 24 * 4
    for counted in ranks(traffic_on_rank, 4, (1, 0), [length, 4 * part]):
        assert counted[1] == {
            "all_gather": others * (part * (keys + queries) + state + hidden),
            "all_to_all": others * part * answers,
        }


def test_one_query_of_each_rank_travels_in_the_last_layer(ranks):
    others, answer = 3, HEADS * (DIM + 1) * 4
    for counted in ranks(traffic_on_rank, 4, (0, 1), [43, 17]):
        assert counted[1]["all_to_all"] == others * answer


@pytest.mark.parametrize("pattern", [(0, 1), (1, 0)], ids=str)
def test_nothing_travels_for_tokens_of_the_last_layer_that_nobody_reads(ranks, pattern):
    part, others = 10, 3
    keys, queries, answers = 2 * GROUPS * DIM * 4, HEADS * DIM * 4, HEADS * (DIM + 1) * 4
    state = HEADS * DIM * DIM * 4
    expected = {"all_gather": others * (part * keys + state)}
    if pattern[0]:
        expected["all_gather"] += others * part * queries
        expected["all_to_all"] = others * part * answers
    for counted in ranks(traffic_on_rank, 4, pattern, [80, 4 * part], 0):
        assert counted[1] == expected


def refused_on_rank(group):
    sequences = Sequences(model_of(), group)
    sequences.extend(prompt_of(20))
    too_large = prompt_of(30)
    too_large[0, 0] = 61  # in the part of the first rank alone
    with pytest.raises(ValueError) as caught:
        sequences.extend(too_large)
    return str(caught.value), sequences.extend(prompt_of(1))


def test_refused_tokens_change_nothing(ranks):
    model = model_of()
    cache = model.new_cache()
    model(prompt_of(20), cache=cache)
    expected = model(prompt_of(1), cache=cache)
    for message, logits in ranks(refused_on_rank, 3):
        assert message.startswith("token id 61 outside the vocabulary of 61")
        torch.testing.assert_close(logits, expected)


def broken_off_on_rank(group):
    model = model_of()
    sequences = Sequences(model, group)
    sequences.extend(prompt_of(20))
    last = model.layers[-1].block_sparse_moe
    dispatch = last.dispatch

    def fail(*args):
        raise RuntimeError("no memory")

    last.dispatch = fail
    for length in (30, 1):
        with pytest.raises(RuntimeError, match="no memory"):
            sequences.extend(prompt_of(length))
    last.dispatch = dispatch
    assert sequences.rows[0].length == 20
    return sequences.extend(prompt_of(30)), model(prompt_of(12))


def test_a_pass_that_breaks_off_leaves_sequence_and_model_as_they_were(ranks):
    model = model_of()
    cache = model.new_cache()
    model(prompt_of(20), cache=cache)
    expected = model(prompt_of(30), cache=cache, logits_to_keep=1)
    for logits, alone in ranks(broken_off_on_rank, 3):
        torch.testing.assert_close(logits, expected)
        assert torch.equal(alone, model(prompt_of(12)))
