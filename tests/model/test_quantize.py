"""int8 weights: how they are rounded, what keeps its precision, and that all paths agree."""

import copy

import pytest
import torch
from torch import nn

import linnet
from linnet.errors import CheckpointError, ConfigError, TrainingError
from linnet.model import Model
from linnet.model.decode import decode_step
from linnet.model.quantize import (
    Int8Experts,
    Int8Linear,
    is_quantized,
    quantize_int8,
    quantize_rows,
)
from linnet.ops import native

TOLERANCE = 1e-5


def tokens_of(length, batch=1):
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def pair(tiny_model):
    """A quantized model, and a plain one with the weights that its int8 numbers stand for."""

    def build(dtype=torch.float32, **changes):
        sizes = {"shared_intermediate_size": 12, **changes}
        model = tiny_model("LSL", dtype=dtype, **sizes)
        plain = copy.deepcopy(model).float()
        plain.compute_dtype = torch.float32
        return quantize_int8(model), with_weights_of(plain, model)

    return build


@torch.no_grad()
def with_weights_of(plain: Model, quantized: Model) -> Model:
    for path, module in quantized.named_modules():
        twin = plain.get_submodule(path)
        if isinstance(module, Int8Linear):
            twin.weight.copy_(module.weight * module.weight_scale[:, None])
        elif isinstance(module, Int8Experts):
            twin.gate_up.copy_(module.gate_up * module.gate_up_scale[..., None])
            twin.down.copy_(module.down * module.down_scale[..., None])
    return plain


def assert_close(actual, expected, tolerance=TOLERANCE):
    difference = (actual - expected).abs().max().item()
    print(f"max abs difference {difference:.1e} of logits up to {expected.abs().max():.1f}")
    assert difference < tolerance


@pytest.mark.parametrize("shape", [(7, 33), (3, 5, 16), (1, 1)])
def test_rows_are_within_half_a_step(shape, generator):
    weight = torch.randn(shape, generator=generator)
    values, scale = quantize_rows(weight)
    assert values.dtype == torch.int8 and scale.dtype == torch.float32
    assert values.shape == shape and scale.shape == shape[:-1]
    steps = (weight / scale[..., None] - values).abs()
    assert steps.max() <= 0.5 + 1e-5
    assert (values.abs().amax(-1) == 127).all()


def test_rows_of_zeros_stay_zeros():
    values, scale = quantize_rows(torch.zeros(3, 8))
    assert not values.any() and scale.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.ones(3, 8)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinite cannot be quantized"):
        quantize_rows(weight)


def test_routers_head_embedding_and_norms_keep_their_precision(pair):
    model, _ = pair()
    kept = {name.rpartition(".layers.")[2] for name, _ in model.named_parameters()}
    plain = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
    layered = {name for name in kept if name not in plain}
    assert plain <= kept
    assert all(
        name.endswith(("norm.weight", "layernorm.weight", "gate.weight", "coefficient.weight"))
        for name in layered
    )
    assert sum(buffer.dtype == torch.int8 for buffer in model.buffers()) == 3 * 5 + 3 + 4 + 3
    assert is_quantized(model) and not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("level", ["", "off"])
def test_all_paths_compute_with_the_rounded_weights(pair, monkeypatch, level, batch):
    model, plain = pair()
    tokens = tokens_of(12, batch)
    monkeypatch.setenv("LINNET_CPU_LEVEL", level)
    native.library.cache_clear()
    try:
        with torch.no_grad():
            expected = plain(tokens)
            assert_close(model(tokens), expected)
            cache = model.new_cache(batch)
            model(tokens[:, :7], cache=cache)
            if level == "":
                logits = [decode_step(model, t, cache, True) for t in tokens[:, 7:].split(1, 1)]
            else:
                logits = [model(t, cache=cache) for t in tokens[:, 7:].split(1, 1)]
        assert_close(torch.cat(logits, 1), expected[:, 7:])
    finally:
        native.library.cache_clear()


@torch.no_grad()
def test_bf16_activations_stay_close(pair):
    model, plain = pair(torch.bfloat16, num_local_experts=1, num_experts_per_tok=1)
    tokens = tokens_of(12, 2)
    expected = plain(tokens)
    cache = model.new_cache(2)
    steps = torch.cat([model(token, cache=cache) for token in tokens.split(1, 1)], 1)
    for logits in (model(tokens), steps):
        assert (logits - expected).abs().mean() < 0.02


@torch.no_grad()
def test_rounding_changes_the_logits_a_little(tiny_model):
    model = tiny_model("LSL", hidden_size=64, num_local_experts=1, num_experts_per_tok=1)
    tokens = tokens_of(30)
    before = model(tokens)
    error = (quantize_int8(model)(tokens) - before).square().mean().sqrt()
    print(f"rms error {error:.4f} of logits with rms {before.square().mean().sqrt():.2f}")
    assert 1e-4 < error < 0.05 * before.square().mean().sqrt()


def test_casting_the_model_keeps_numbers_and_scales(pair):
    model, _ = pair()
    before = copy.deepcopy(model.layers[0].self_attn.qkv_proj)
    after = model.to(torch.bfloat16).layers[0].self_attn.qkv_proj
    assert torch.equal(after.weight, before.weight) and after.weight.dtype == torch.int8
    assert torch.equal(after.weight_scale, before.weight_scale)


def test_a_second_time_changes_nothing(pair):
    model, _ = pair()
    before = model.layers[0].block_sparse_moe.experts
    assert quantize_int8(model).layers[0].block_sparse_moe.experts is before


def test_gradients_are_refused(pair):
    model, _ = pair()
    with pytest.raises(TrainingError, match="int8 weights have no gradients"):
        model.train()(tokens_of(3))
    model.eval().embed_tokens.weight.requires_grad_()
    with pytest.raises(TrainingError, match="int8 weights have no gradients"):
        model(tokens_of(3))
    with torch.no_grad():
        model(tokens_of(3))


def test_saving_is_refused(pair, tmp_path):
    model, _ = pair()
    with pytest.raises(CheckpointError, match="int8 weights are not saved; load the original"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_load_quantizes_what_it_read(tiny_model, tmp_path):
    tiny_model("LS").save(tmp_path / "model")
    model = linnet.load(tmp_path / "model", dtype="float32", quantization="int8")
    expected = quantize_int8(linnet.load(tmp_path / "model", dtype="float32"))
    assert is_quantized(model)
    assert torch.equal(model(tokens_of(5)), expected(tokens_of(5)))


def test_shape_alone_can_be_quantized():
    model = linnet.load("nano", device="meta", quantization="int8")
    assert is_quantized(model) and all(x.is_meta for x in model.buffers() if x.dtype != torch.float)


def test_unknown_quantization_is_refused():
    with pytest.raises(ConfigError, match="quantization 'int4' is unknown"):
        linnet.load("nano", quantization="int4")  # type: ignore[arg-type]


def test_other_linear_maps_are_left_alone(tiny_model):
    model = tiny_model("L")
    model.extra = nn.Linear(3, 3)
    assert type(quantize_int8(model).extra) is nn.Linear
