"""Blocks and sublayers against the same formulas written out in fp64."""

import pytest
import torch
import torch.nn.functional as F

from linnet.model import Model
from linnet.model.decay import layer_slopes
from linnet.model.init import initialize
from linnet.ops.lightning_attention.reference import recurrent

FP64 = torch.float64


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def hidden_of(model, length=70, batch=2):
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, length, model.config.hidden_size, generator=generator, dtype=FP64)


def context_of(model, length=70):
    from linnet.model.attention import Context
    from linnet.ops import rotary_tables

    tables = rotary_tables(
        torch.arange(length)[None], model.config.rotary_dim, model.config.rope_theta
    )
    return Context(tables, None, None)


def lightning_written_out(layer, x, slopes, head_dim):
    """SPEC 1.1: silu on q, k and v, heads interleaved [q_h k_h v_h], norm over all, then gate."""
    qkv = F.silu(x @ layer.qkv_proj.weight.T)
    heads = qkv.split(3 * head_dim, -1)
    q, k, v = (torch.stack([h.split(head_dim, -1)[i] for h in heads], 2) for i in range(3))
    state = x.new_zeros(x.shape[0], len(heads), head_dim, head_dim)
    o, _ = recurrent(q, k, v, slopes.to(FP64), state)
    o = rms_norm(o.flatten(-2), layer.norm.weight, 1e-6)
    return (torch.sigmoid(x @ layer.output_gate.weight.T) * o) @ layer.out_proj.weight.T


def softmax_written_out(layer, x, config):
    """SPEC 2.1: NeoX rotary on the first `rotary_dim` channels, scale 1/sqrt(K), grouped heads."""
    length, half = x.shape[1], config.rotary_dim // 2
    rates = config.rope_theta ** (-torch.arange(half, dtype=FP64) / half)
    angles = torch.arange(length, dtype=FP64)[:, None] * rates

    def turn(head):
        a, b, rest = head[..., :half], head[..., half : 2 * half], head[..., 2 * half :]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    outputs = []
    group = config.num_attention_heads // config.num_key_value_heads
    for head in range(config.num_attention_heads):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        shared = slice(head // group * config.head_dim, (head // group + 1) * config.head_dim)
        q = turn(x @ layer.q_proj.weight[rows].T)
        k = turn(x @ layer.k_proj.weight[shared].T)
        v = x @ layer.v_proj.weight[shared].T
        scores = q @ k.mT / config.head_dim**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
        outputs.append(scores.softmax(-1) @ v)
    return torch.cat(outputs, -1) @ layer.o_proj.weight.T


def experts_written_out(moe, x, config):
    """SPEC 2.3: top-k of the logits, softmax over those, W2 (silu(W1 x) * W3 x)."""
    top, chosen = (x @ moe.gate.weight.T).topk(config.num_experts_per_tok, -1)
    weights = top.softmax(-1)
    y = torch.zeros_like(x)
    for expert in range(config.num_local_experts):
        w1, w3 = moe.experts.gate_up[expert].chunk(2)
        out = (F.silu(x @ w1.T) * (x @ w3.T)) @ moe.experts.down[expert].T
        y += out * (weights * (chosen == expert)).sum(-1, keepdim=True)
    return y


def feed_forward_written_out(block, x, config):
    y = experts_written_out(block.block_sparse_moe, x, config)
    if not config.shared_intermediate_size:
        return y
    c = torch.sigmoid(x @ block.coefficient.weight.T)
    mlp = block.shared_mlp
    shared = F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
    return y * (1 - c) + (shared @ mlp.down_proj.weight.T) * c


def block_written_out(block, x, config, layer):
    """SPEC 2.2: the residual branch is the normed tensor with postnorm, else the raw one."""
    h = rms_norm(x, block.input_layernorm.weight, config.rms_norm_eps)
    if config.attn_type_list[layer]:
        y = softmax_written_out(block.self_attn, h, config)
        alpha, beta = config.layernorm_full_attention_alpha, config.layernorm_full_attention_beta
    else:
        slopes = layer_slopes(layer, config.num_hidden_layers, config.num_attention_heads)
        y = lightning_written_out(block.self_attn, h, slopes, config.head_dim)
        alpha = config.layernorm_linear_attention_alpha
        beta = config.layernorm_linear_attention_beta
    x = alpha * (h if config.postnorm else x) + beta * y
    h = rms_norm(x, block.post_attention_layernorm.weight, config.rms_norm_eps)
    y = feed_forward_written_out(block, h, config)
    residual = h if config.postnorm else x
    return config.layernorm_mlp_alpha * residual + config.layernorm_mlp_beta * y


VARIANTS = {
    "lightning": {"pattern": "LL", "layernorm_linear_attention_beta": 0.7},
    "lightning-six-heads": {"pattern": "LL", "num_attention_heads": 6},
    "softmax-half-rotary": {"pattern": "SL", "layernorm_full_attention_beta": 1.4},
    "softmax-whole-rotary": {"pattern": "SL", "rotary_dim": 8},
    "softmax-no-rotary": {"pattern": "SL", "rotary_dim": 0},
    "pre-norm": {"pattern": "SL", "postnorm": False},
    "pre-norm-lightning": {"pattern": "LS", "postnorm": False},
    "shared-expert": {"pattern": "LS", "shared_intermediate_size": 12},
    "one-expert": {"pattern": "LS", "num_local_experts": 1, "num_experts_per_tok": 1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_block_is_its_formula(tiny_model, variant):
    model = tiny_model(dtype=FP64, **VARIANTS[variant])
    x = hidden_of(model)
    actual, _ = model.layers[0](x, context_of(model))
    expected = block_written_out(model.layers[0], x, model.config, 0)
    # The rotary tables are fp32, and so turn by angles 1e-7 off.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_lightning_layer_is_its_formula_to_fp64_precision(tiny_model):
    model = tiny_model("LLS", dtype=FP64, num_attention_heads=3, num_key_value_heads=1)
    x = hidden_of(model)
    layer = model.layers[1].self_attn
    expected = lightning_written_out(layer, x, layer_slopes(1, 3, 3), model.config.head_dim)
    # The slopes are fp32 on both sides.
    torch.testing.assert_close(layer(x, context_of(model)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_slopes_stay_fp32_when_a_model_changes_its_dtype(tiny_model, dtype):
    attention = tiny_model("LLS").to(dtype).layers[1].self_attn
    assert attention.qkv_proj.weight.dtype == dtype
    assert torch.equal(attention.decay, layer_slopes(1, 3, 4))
    assert "decay" not in attention.state_dict()


@torch.no_grad()
def test_model_is_embedding_blocks_norm_and_head(tiny_model):
    model = tiny_model("LSL", dtype=FP64)
    tokens = torch.randint(61, (2, 40), generator=torch.Generator().manual_seed(1))
    x = model.embed_tokens.weight[tokens]
    for layer, block in enumerate(model.layers):
        x = block_written_out(block, x, model.config, layer)
    logits = rms_norm(x, model.norm.weight, model.config.rms_norm_eps) @ model.lm_head.weight.T
    torch.testing.assert_close(model(tokens), logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_lm_head_multiplies_in_fp32_in_a_bf16_model(tiny_model):
    model = tiny_model(dtype=torch.bfloat16)
    tokens = torch.randint(61, (1, 9), generator=torch.Generator().manual_seed(1))
    hidden, _ = model.hidden_states(tokens)
    assert hidden.dtype == torch.bfloat16
    expected = hidden.float() @ model.lm_head.weight.float().T
    torch.testing.assert_close(model(tokens), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shared", [0, 12])
def test_recomputed_activations_give_the_same_gradients_bit_for_bit(tiny_model, shared):
    model = tiny_model("LSL", shared_intermediate_size=shared, capacity_factor=1.0).train()
    tokens = torch.randint(61, (1, 90), generator=torch.Generator().manual_seed(1))
    offsets = torch.tensor([0, 20, 90])
    gradients = []
    for recompute in (False, True):
        model.activation_recompute = recompute
        model.zero_grad()
        hidden, stats = model.hidden_states(tokens, cu_seqlens=offsets)
        (hidden.square().sum() + sum(s.probability.square().sum() for s in stats)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters())) - 1  # all but the LM head
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_router_statistics_are_gathered_in_training_only(tiny_model):
    model = tiny_model("LS", num_local_experts=4, num_experts_per_tok=2, capacity_factor=0.5)
    tokens = torch.randint(61, (1, 50), generator=torch.Generator().manual_seed(1))
    assert model.hidden_states(tokens)[1] == []
    _, stats = model.train().hidden_states(tokens)
    assert len(stats) == 2
    for layer in stats:
        assert layer.load.sum().item() == pytest.approx(2)
        assert layer.probability.sum().item() == pytest.approx(1)
        assert layer.dropped > 0 and 0 < layer.entropy < torch.tensor(4.0).log()


@torch.no_grad()
def test_capacity_drops_no_token_outside_training(tiny_model):
    tokens = torch.randint(61, (1, 50), generator=torch.Generator().manual_seed(1))
    limited, free = (tiny_model("LS", capacity_factor=factor) for factor in (0.1, None))
    assert torch.equal(limited(tokens), free(tokens))
    assert not torch.equal(limited.train()(tokens), free(tokens))


def stds_of(model: Model, layer: int) -> dict[str, float]:
    block = model.layers[layer]
    attention, experts = block.self_attn, block.block_sparse_moe.experts
    named = {name: p for name, p in attention.named_parameters() if p.ndim == 2}
    if "qkv_proj.weight" in named:
        by_head = named.pop("qkv_proj.weight").unflatten(0, (attention.num_heads, 3, -1))
        named |= {part: by_head[:, i] for i, part in enumerate("qkv")}
    width = experts.down.shape[2]
    named |= {"w1": experts.gate_up[:, :width], "w3": experts.gate_up[:, width:]}
    named |= {"w2": experts.down, "router": block.block_sparse_moe.gate.weight}
    if block.shared_mlp is not None:
        named |= {f"shared.{n}": p for n, p in block.shared_mlp.named_parameters()}
    return {name.removesuffix(".weight"): p.std().item() for name, p in named.items()}


@pytest.mark.parametrize("postnorm", [True, False])
@torch.no_grad()
def test_initial_weights_are_xavier_with_deepnorm_gains(tiny_config, postnorm):
    sizes = {"hidden_size": 96, "intermediate_size": 80, "num_attention_heads": 4, "head_dim": 32}
    config = tiny_config(
        "LS", **sizes, shared_intermediate_size=64, postnorm=postnorm, rotary_dim=16
    )
    model = initialize(Model(config), torch.Generator().manual_seed(0))
    gain = (8 * 2) ** -0.25 if postnorm else 1.0
    d, inner, kv, width, shared = 96, 128, 64, 80, 64
    xavier = {
        "q": (1, d, inner),
        "k": (1, d, inner),
        "v": (gain, d, inner),
        "output_gate": (1, d, inner),
        "out_proj": (gain, inner, d),
        "q_proj": (1, d, inner),
        "k_proj": (1, d, kv),
        "v_proj": (gain, d, kv),
        "o_proj": (gain, inner, d),
        "w1": (gain, d, width),
        "w2": (gain, width, d),
        "w3": (gain, d, width),
        "router": (1, d, 4),
        "shared.gate_proj": (gain, d, shared),
        "shared.up_proj": (gain, d, shared),
        "shared.down_proj": (gain, shared, d),
    }
    measured = stds_of(model, 0) | stds_of(model, 1)
    assert measured.keys() == xavier.keys()
    for name, (part_gain, fan_in, fan_out) in xavier.items():
        expected = part_gain * (2 / (fan_in + fan_out)) ** 0.5
        assert measured[name] == pytest.approx(expected, rel=0.1), name
    for weight in (model.embed_tokens.weight, model.lm_head.weight):
        assert weight.std().item() == pytest.approx(config.initializer_range, rel=0.05)
    assert all((p == 1).all() for p in model.parameters() if p.ndim == 1)


def test_initial_weights_repeat_under_a_seed(tiny_config):
    weights = []
    for seed in (0, 0, 1):
        model = initialize(Model(tiny_config()), torch.Generator().manual_seed(seed))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert weights[0].isfinite().all()
