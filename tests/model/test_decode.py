"""The native decode step: the same logits as the torch path, and the same rules for the cache."""

import copy
import ctypes
from itertools import chain

import pytest
import torch
from torch import nn

from linnet.model import decode, preset
from linnet.model.init import initialize
from linnet.model.transformer import Model
from linnet.ops import lightning_attention, native
from linnet.ops.native import compiler
from linnet.ops.native import decode as native_decode

TOLERANCE = 1e-5
VARIANTS = {
    "lightning-first": {"pattern": "LLLS"},
    "softmax-first": {"pattern": "SLL"},
    "shared-expert": {"pattern": "LSL", "shared_intermediate_size": 12},
    "pre-norm": {"pattern": "LLS", "postnorm": False},
    "odd-sizes": {"pattern": "LS", "num_attention_heads": 3, "num_key_value_heads": 1}
    | {"head_dim": 24, "rotary_dim": 10, "hidden_size": 37, "intermediate_size": 19},
    "whole-vectors": {"pattern": "LS", "hidden_size": 64, "head_dim": 64, "rotary_dim": 64}
    | {"num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 48},
    "no-rotary-one-expert": {"pattern": "LS", "rotary_dim": 0, "num_experts_per_tok": 1},
    "three-experts": {"pattern": "LS", "num_experts_per_tok": 3},
}
LEVELS = [name for name, needed in compiler._REQUIRED.items() if needed <= compiler._cpu_features()]


@pytest.fixture(params=VARIANTS)
def model(request, tiny_model):
    return tiny_model(**VARIANTS[request.param])


@pytest.fixture
def use_level(monkeypatch):
    """Switch to the kernels of a level."""

    def use(level: str) -> None:
        monkeypatch.setenv("LINNET_CPU_LEVEL", level)
        native.library.cache_clear()

    yield use
    native.library.cache_clear()


@pytest.fixture
def torch_path(use_level):
    """Run a function without native kernels."""

    def run(function, *args):
        use_level("off")
        try:
            return function(*args)
        finally:
            use_level("")

    return run


@pytest.fixture
def native_steps(monkeypatch):
    """The list of native calls so far."""
    calls = []
    run = native_decode.run

    def counted(*args):
        calls.append(args)
        run(*args)

    monkeypatch.setattr(native_decode, "run", counted)
    return calls


def tokens_of(length, batch=1, seed=1):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def continue_by_steps(model, tokens, cache):
    return torch.cat([model(token, cache=cache) for token in tokens.split(1, 1)], 1)


@torch.no_grad()
def prefilled(model, tokens):
    cache = model.new_cache(len(tokens))
    model(tokens, cache=cache)
    return cache


def assert_close(actual, expected, tolerance=TOLERANCE):
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    difference = (actual - expected).abs().max().item()
    print(f"max abs difference {difference:.1e} of logits up to {expected.abs().max():.1f}")
    assert difference < tolerance


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_steps_give_the_logits_of_the_whole(model, batch, native_steps):
    tokens = tokens_of(24, batch)
    cache = prefilled(model, tokens[:, :5])
    with torch.no_grad():
        whole = model(tokens)
    assert_close(continue_by_steps(model, tokens[:, 5:], cache), whole[:, 5:])
    assert len(native_steps) == 19


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("variant", ["odd-sizes", "whole-vectors", "shared-expert"])
def test_every_level_gives_the_logits_of_the_torch_path(
    level, variant, tiny_model, use_level, torch_path, native_steps
):
    model, tokens = tiny_model(**VARIANTS[variant]), tokens_of(8, 7)
    expected = torch_path(continue_by_steps, model, tokens, model.new_cache(7))
    use_level(level)
    assert_close(continue_by_steps(model, tokens, model.new_cache(7)), expected)
    assert len(native_steps) == 8


def test_first_token_needs_no_prefill(tiny_model, native_steps):
    model, tokens = tiny_model("LS"), tokens_of(6)
    with torch.no_grad():
        assert_close(continue_by_steps(model, tokens, model.new_cache()), model(tokens))
    assert len(native_steps) == 6


def test_long_decode_over_grown_buffers(tiny_model, native_steps):
    model, tokens = tiny_model("LS"), tokens_of(310)
    with torch.no_grad():
        assert_close(continue_by_steps(model, tokens, model.new_cache()), model(tokens))
    assert len(native_steps) == 310


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("batch", [1, 3])
def test_any_number_of_threads_gives_the_same_logits(tiny_model, monkeypatch, threads, batch):
    # 900 keys: several ranges per head when there are more threads than heads.
    model, tokens = tiny_model("LS"), tokens_of(903, batch)
    cache = prefilled(model, tokens[:, :900])
    with torch.no_grad():
        expected = model(tokens)[:, 900:]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert_close(continue_by_steps(model, tokens[:, 900:], cache), expected)


@torch.no_grad()
def test_bf16_step_is_as_close_to_fp64_as_the_torch_path(tiny_model, torch_path, native_steps):
    # One expert: with several, a rounded router may choose another one near a tie.
    sizes = {"num_local_experts": 1, "num_experts_per_tok": 1, "hidden_size": 48, "head_dim": 16}
    half = tiny_model("LSLL", dtype=torch.bfloat16, **sizes)
    exact = copy.deepcopy(half).double()
    exact.compute_dtype = torch.float64
    tokens = tokens_of(40, 4)
    expected = exact(tokens)
    plain = torch_path(continue_by_steps, half, tokens, half.new_cache(4)) - expected
    step = continue_by_steps(half, tokens, half.new_cache(4)) - expected
    print(f"rms error {step.square().mean() ** 0.5:.4f}, torch {plain.square().mean() ** 0.5:.4f}")
    assert step.square().mean() <= plain.square().mean()
    assert len(native_steps) == 40


def test_equal_router_logits_choose_the_experts_of_torch(tiny_model, torch_path):
    for num_experts, top_k in ((4, 2), (7, 3), (130, 2)):
        sizes = {"num_local_experts": num_experts, "num_experts_per_tok": top_k}
        model, tokens = tiny_model("L", **sizes), tokens_of(3, 2)
        with torch.no_grad():
            model.layers[0].block_sparse_moe.gate.weight.zero_()
        expected = torch_path(continue_by_steps, model, tokens, model.new_cache(2))
        assert_close(continue_by_steps(model, tokens, model.new_cache(2)), expected)


def test_rollback_after_steps_in_place_is_bitwise_exact(model):
    cache = prefilled(model, tokens_of(9))
    continue_by_steps(model, tokens_of(3), cache)
    snapshot = cache.snapshot()
    first, second = tokens_of(5, seed=2), tokens_of(5, seed=3)
    expected = [
        continue_by_steps(model, text, restored(model, snapshot)) for text in (first, second)
    ]
    for _ in range(2):
        for text, logits in zip((first, second), expected, strict=True):
            cache.restore(snapshot)
            assert cache.length == 12
            assert torch.equal(continue_by_steps(model, text, cache), logits)


def restored(model, snapshot):
    cache = model.new_cache()
    cache.restore(snapshot)
    return cache


def test_caches_that_share_a_snapshot_go_their_own_ways(tiny_model):
    model = tiny_model("LS")
    cache = prefilled(model, tokens_of(9))
    other = restored(model, cache.snapshot())
    text = tokens_of(20, seed=2)
    mixed = [
        continue_by_steps(model, token, each)
        for token in text.split(1, 1)
        for each in (cache, other)
    ]
    assert torch.equal(torch.cat(mixed[::2], 1), torch.cat(mixed[1::2], 1))
    whole = torch.cat([tokens_of(9), text], 1)
    with torch.no_grad():
        assert_close(torch.cat(mixed[::2], 1), model(whole)[:, 9:])


def test_copied_cache_and_model_share_nothing(tiny_model):
    model = tiny_model("LS")
    cache = prefilled(model, tokens_of(9))
    continue_by_steps(model, tokens_of(2), cache)
    copied, text = copy.deepcopy(cache), tokens_of(4, seed=2)
    expected = continue_by_steps(model, text, cache)
    assert torch.equal(continue_by_steps(copy.deepcopy(model), text, copied), expected)


def test_state_that_was_handed_out_is_not_overwritten(tiny_model):
    model = tiny_model("L")
    cache = model.new_cache()
    continue_by_steps(model, tokens_of(3), cache)
    state = cache.state(0)
    before = state.clone()
    continue_by_steps(model, tokens_of(3), cache)
    assert torch.equal(state, before) and not torch.equal(cache.state(0), before)


def test_steady_steps_overwrite_their_states(tiny_model):
    model = tiny_model("LS")
    cache = model.new_cache()
    continue_by_steps(model, tokens_of(3), cache)
    before = [t.data_ptr() for t in (cache.own_state(0, ()), cache._buffers[1].k)]
    continue_by_steps(model, tokens_of(3), cache)
    assert before == [t.data_ptr() for t in (cache.own_state(0, ()), cache._buffers[1].k)]


@torch.no_grad()
def test_failed_step_leaves_the_cache_as_it_was(tiny_model, monkeypatch):
    model = tiny_model("LS")
    cache = prefilled(model, tokens_of(9))
    text = tokens_of(4, seed=2)
    expected = continue_by_steps(model, text, restored(model, cache.snapshot()))

    def fail(*_args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(native_decode, "run", fail)
        with pytest.raises(MemoryError):
            model(text[:, :1], cache=cache)
    assert cache.length == 9
    assert torch.equal(continue_by_steps(model, text, cache), expected)


def test_nan_stays_in_its_row(model):
    tokens = tokens_of(6, 4)
    tokens[tokens == 7] = 8
    expected = continue_by_steps(model, tokens, model.new_cache(4))
    with torch.no_grad():
        model.embed_tokens.weight[7] = float("nan")
    tokens[1, 2] = 7
    logits = continue_by_steps(model, tokens, model.new_cache(4))
    assert logits[1, 2:].isnan().all() and torch.equal(logits[1, :2], expected[1, :2])
    others = [0, 2, 3]
    assert torch.equal(logits[others], expected[others])


def test_logits_that_are_not_wanted_are_not_formed(tiny_model, native_steps):
    model, tokens = tiny_model("LS"), tokens_of(4)
    cache = model.new_cache()
    with torch.no_grad():
        assert model(tokens[:, :1], cache=cache, logits_to_keep=0).shape == (1, 0, 61)
        assert_close(continue_by_steps(model, tokens[:, 1:], cache), model(tokens)[:, 1:])
    assert len(native_steps) == 4


def changed_in_place(model):
    model.layers[0].self_attn.out_proj.weight.data.mul_(1.5)


def replaced_data(model):
    model.layers[0].self_attn.out_proj.weight.data = torch.randn(24, 24) / 4


def replaced_parameter(model):
    model.lm_head.weight = nn.Parameter(torch.randn(61, 24))


def replaced_norm(model):
    model.layers[1].input_layernorm = copy.deepcopy(model.layers[0].input_layernorm)


def assigned_state_dict(model):
    values = {name: value * 1.1 for name, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)


def transposed_data(model):
    # The same memory, shape and dtype, another layout.
    weight = model.layers[1].self_attn.q_proj.weight
    weight.data = weight.data.T


@pytest.mark.parametrize(
    "change",
    [
        changed_in_place,
        replaced_data,
        replaced_parameter,
        replaced_norm,
        assigned_state_dict,
        transposed_data,
    ],
)
def test_changed_weights_are_seen_at_the_next_step(change, tiny_model, torch_path):
    model, text = tiny_model("LS", head_dim=6), tokens_of(4)
    cache = prefilled(model, tokens_of(5))
    snapshot = cache.snapshot()
    before = continue_by_steps(model, text, cache)
    change(model)
    cache.restore(snapshot)
    after = continue_by_steps(model, text, cache)
    expected = torch_path(continue_by_steps, model, text, restored(model, snapshot))
    assert not torch.equal(after, before)
    assert_close(after, expected, 3 * TOLERANCE)


def test_changed_dtype_is_seen_at_the_next_step(tiny_model, torch_path, native_steps):
    model, text = tiny_model("LS"), tokens_of(4)
    cache = prefilled(model, tokens_of(5))
    snapshot = cache.snapshot()
    continue_by_steps(model, text, cache)
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float32):
        model.to(dtype)
        cache.restore(snapshot)
        before = len(native_steps)
        logits = continue_by_steps(model, text, cache)
        assert len(native_steps) - before == 4 * (dtype in (torch.bfloat16, torch.float32))
        cache.restore(snapshot)
        assert_close(logits, torch_path(continue_by_steps, model, text, cache), 3e-5)


def replace_attend(model):
    def attend(*args, **kwargs):
        o, state = lightning_attention(*args, **kwargs)
        return 2 * o, state

    model.layers[0].self_attn.attend = attend


def replace_dispatch(model):
    model.layers[1].block_sparse_moe.dispatch = lambda x, *_: x


def replace_forward(model):
    model.layers[0].input_layernorm.forward = lambda x: 2 * x


def add_hook(model):
    model.layers[1].register_forward_hook(lambda _module, _args, output: (output[0] * 2, None))


@pytest.mark.parametrize("change", [replace_attend, replace_dispatch, replace_forward, add_hook])
def test_replaced_parts_are_honored(change, tiny_model, torch_path, native_steps):
    model, text = tiny_model("LS"), tokens_of(4)
    before = continue_by_steps(model, text, model.new_cache())
    assert len(native_steps) == 4
    change(model)
    after = continue_by_steps(model, text, model.new_cache())
    assert len(native_steps) == 4
    assert not torch.equal(after, before)
    assert_close(after, torch_path(continue_by_steps, model, text, model.new_cache()))


def test_what_the_kernels_cannot_do_takes_the_torch_path(tiny_model, use_level, native_steps):
    model, tokens = tiny_model("LS"), tokens_of(3)
    model(tokens[:, :0], cache=model.new_cache())
    model(tokens, cache=model.new_cache())
    model.train()(tokens[:, :1], cache=model.new_cache())
    model.eval().compute_dtype = torch.float64
    model.double()(tokens[:, :1], cache=model.new_cache())
    model.float().compute_dtype = torch.float32
    use_level("off")
    model(tokens[:, :1], cache=model.new_cache())
    assert native_steps == []
    use_level("")
    model(tokens[:, :1], cache=model.new_cache())
    assert len(native_steps) == 1


def test_chunks_and_steps_mix_in_and_out_of_inference_mode(tiny_model):
    model, tokens = tiny_model("LLS"), tokens_of(20)
    cache, parts = model.new_cache(), []
    for index, chunk in enumerate(tokens.split([3, 1, 1, 5, 1, 1, 1, 7], 1)):
        with torch.inference_mode(index % 2 == 0):
            parts.append(model(chunk, cache=cache).clone())
    with torch.no_grad():
        assert_close(torch.cat(parts, 1), model(tokens))


def test_kernels_take_rows_of_different_lengths(tiny_model):
    model = tiny_model("LS")
    texts = [tokens_of(length, seed=length) for length in (5, 40, 300)]
    caches = [prefilled(model, text) for text in texts]
    token = tokens_of(1, 3)
    expected = [
        continue_by_steps(model, one[None], restored(model, cache.snapshot()))
        for one, cache in zip(token, caches, strict=True)
    ]
    continue_by_steps(model, token, model.new_cache(3))
    decoder = decode._decoders[model]
    for cache in caches:
        decoder.memory_of(cache)
    rows = [list(decoder._memories[cache].addresses) for cache in caches]  # [3][L * 2]
    layers = [[row[2 * layer : 2 * layer + 2] for row in rows] for layer in range(2)]
    memory = (ctypes.c_void_p * 12)(*chain.from_iterable(chain.from_iterable(layers)))
    lengths = torch.tensor([cache.length for cache in caches])
    logits = torch.empty(3, 1, 61)
    native_decode.run(
        decoder.table.native, token, lengths.data_ptr(), ctypes.addressof(memory), logits
    )
    assert lengths.tolist() == [6, 41, 301]
    assert_close(logits, torch.cat(expected))


def test_random_preset_agrees_with_the_whole(native_steps):
    model = initialize(Model(preset("nano")), torch.Generator().manual_seed(0)).eval()
    tokens = torch.randint(4096, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert_close(continue_by_steps(model, tokens, model.new_cache(2)), model(tokens))
    assert len(native_steps) == 12
