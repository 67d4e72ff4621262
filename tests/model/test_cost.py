import pytest
import torch

from linnet.model import PRESETS, Model, preset
from linnet.model.cost import (
    cost_of,
    decode_flops,
    forward_flops,
    m1_generation_curve,
    prefill_flops,
    r1_generation_curve,
    training_flops,
)
from linnet.model.layout import disk_dtype, disk_layout
from linnet.model.weights import build_model

VARIANTS = {
    "shared-expert": {"shared_intermediate_size": 12},
    "pre-norm": {"postnorm": False},
    "shared-pre-norm": {"shared_intermediate_size": 12, "postnorm": False},
    "three-heads": {"num_attention_heads": 3, "num_key_value_heads": 1},
    "all-softmax": {"pattern": "SS"},
    "all-lightning": {"pattern": "L"},
}


def assert_counts_agree(model: Model) -> None:
    cost = cost_of(model.config)
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    assert cost.params_total == sum(shapes.values())
    layout = disk_layout(model)
    sizes = [
        torch.Size(e.shape).numel() * disk_dtype(e.parameter, torch.bfloat16).itemsize
        for e in layout
    ]
    assert cost.checkpoint_bytes == sum(sizes)
    experts = sum(n for name, n in shapes.items() if ".experts." in name)
    outside = shapes["embed_tokens.weight"] + shapes["lm_head.weight"]
    config = model.config
    used = experts * config.num_experts_per_tok // config.num_local_experts
    assert cost.params_active == cost.params_total - experts - outside + used


@pytest.mark.parametrize("name", PRESETS)
def test_formulas_equal_the_parameters_of_presets(name):
    assert_counts_agree(build_model(preset(name), torch.bfloat16, "meta"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_formulas_equal_the_parameters_of_variants(tiny_model, variant):
    assert_counts_agree(tiny_model(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_cache_formulas_equal_what_a_cache_holds(tiny_model, variant):
    model = tiny_model(**VARIANTS[variant], dtype=torch.bfloat16)
    cache, cost = model.new_cache(), cost_of(model.config)
    model(torch.zeros(1, 256, dtype=torch.int64), cache=cache)  # as many as a buffer has room for
    assert cache.num_bytes == cost.state_bytes + 256 * cost.kv_bytes_per_token


def test_published_model_has_the_published_size():
    cost = cost_of(preset("minimax-m1"))
    assert cost.params_total == 456_089_655_296
    assert cost.params_active == 45_944_920_064
    assert cost.checkpoint_bytes == 912_210_767_872
    assert cost.kv_bytes_per_token == 40_960
    assert cost.state_bytes == 293_601_280


def test_published_model_has_the_published_tensors():
    model = build_model(preset("minimax-m1"), torch.bfloat16, "meta")
    layout = disk_layout(model)
    assert len(layout) == len({entry.name for entry in layout}) == 8243
    shapes = {entry.name: entry.shape for entry in layout}
    assert shapes["model.layers.0.self_attn.qkv_proj.weight"] == (24_576, 6144)
    assert shapes["model.layers.79.self_attn.k_proj.weight"] == (1024, 6144)
    assert shapes["model.layers.79.block_sparse_moe.experts.31.w2.weight"] == (6144, 9216)
    assert shapes["model.embed_tokens.weight"] == shapes["lm_head.weight"] == (200_064, 6144)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 456_089_655_296


def test_m1_and_r1_curves_are_those_of_the_report():
    # SPEC 5.5: F(n) = a n + b n^2 in units of 1K tokens and 1e16 FLOPs.
    ours, theirs = m1_generation_curve(preset("minimax-m1")), r1_generation_curve()
    for curve, a, b in (
        (ours, 1.0703971e-2, 2.0615844e-5),
        (theirs, 7.722445e-3, 3.667902e-4),
    ):
        assert curve.per_token * 1024 / 1e16 == pytest.approx(a, rel=1e-7)
        assert curve.per_pair * 1024**2 / 1e16 == pytest.approx(b, rel=1e-7)
    assert (ours.per_pair, theirs.per_pair) == (196_608, 3_497_984)


TABLE = {  # n: (R1, M1, M1/R1), as printed in SPEC 5.5
    8: (".0853", ".0870", "1.02"),
    16: (".2175", ".1765", ".81"),
    32: (".6227", ".3636", ".58"),
    40: (".8958", ".4611", ".515"),
    64: ("1.9966", ".7695", ".385"),
    80: ("2.9653", ".9883", ".333"),
    96: ("4.1217", "1.2176", ".295"),
    100: ("4.4401", "1.2766", ".288"),
    128: ("6.998", "1.7079", ".244"),
}


@pytest.mark.parametrize("length", TABLE)
def test_m1_and_r1_table_is_that_of_the_report(length):
    tokens = length * 1024
    ours = m1_generation_curve(preset("minimax-m1")).flops(tokens) / 1e16
    theirs = r1_generation_curve().flops(tokens) / 1e16
    for value, printed in zip((theirs, ours, ours / theirs), TABLE[length], strict=True):
        half_a_digit = 0.5 * 10 ** -len(printed.split(".")[1])
        assert value == pytest.approx(float(printed), abs=half_a_digit * 1.001)


def test_forward_flops_are_those_of_its_products(tiny_config):
    config = tiny_config("LS")
    length, inner, head_dim = 300, 32, 8
    weights = cost_of(config).params_active + 61 * 24
    pairs = 256 * 257 // 2 + 44 * 45 // 2
    lightning = 4 * inner * head_dim * length + 4 * inner * pairs
    softmax = 4 * inner * (300 * 301 // 2)
    assert forward_flops(config, length) == 2 * weights * length + lightning + softmax
    assert training_flops(config, length) == 3 * forward_flops(config, length)


@pytest.mark.parametrize("kind", ["S", "L"])
def test_prefill_leaves_out_what_nobody_reads(tiny_config, kind):
    length, unread = 300, 299
    config, before = tiny_config("L" + kind), tiny_config("L")
    head = 2 * config.vocab_size * config.hidden_size
    last_layer = prefill_flops(config, length) - forward_flops(before, length) + head * unread
    whole = 2 * (cost_of(config).params_active - cost_of(before).params_active)
    hidden, inner, width = config.hidden_size, config.inner_size, config.head_dim
    if kind == "S":
        kept = 2 * hidden * (1 + 2 * config.num_key_value_heads * width)  # a norm, keys, values
        attention = 4 * inner * length
    else:
        kept = 2 * (hidden + 3 * hidden * inner + inner)  # two norms, and what the state needs
        attention = 4 * inner * (width * length + 256 * 257 // 2 + 44 * 45 // 2)
    assert last_layer == whole + kept * unread + attention


def test_decoding_all_tokens_costs_a_prefill_without_its_blocks(tiny_config):
    config = tiny_config("SS")
    decoded = sum(decode_flops(config, position) for position in range(50))
    assert decoded == forward_flops(config, 50)
