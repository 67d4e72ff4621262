"""Our logits against transformers' MiniMax, where that is right (see notes, section 4).

It is wrong after a cached prefill when layer 0 is lightning, so there our chunks are compared with
its prefill of the whole text.
"""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

import linnet
from linnet.infer import SamplingParams, stream_tokens

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4
NAMES = {"L": "linear_attention", "S": "full_attention"}
SHAPES = [(2, 1, "LLS"), (3, 1, "SLL"), (4, 2, "LSLL"), (6, 3, "LLLLLLLS"), (6, 2, "SLSL")]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "disabled", True)
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def theirs_of(fill):
    def build(heads: int, kv_heads: int, pattern: str, **changes):
        config = transformers.MiniMaxConfig(
            vocab_size=61,
            hidden_size=24,
            intermediate_size=20,
            num_hidden_layers=len(pattern),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=8,
            num_local_experts=4,
            layer_types=[NAMES[letter] for letter in pattern],
            full_attn_alpha_factor=1.7,
            linear_attn_alpha_factor=1.3,
            mlp_alpha_factor=1.5,
            mlp_beta_factor=0.9,
            **changes,
        )
        model = transformers.MiniMaxForCausalLM(config).eval()
        fill(model)
        return model

    return build


def tokens_of(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(61, (batch, length), generator=torch.Generator().manual_seed(1))


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    difference = (ours - theirs).abs().max().item()
    print(f"max abs difference {difference:.2e} of logits up to {theirs.abs().max().item():.1f}")
    return difference


@pytest.mark.parametrize(("heads", "kv_heads", "pattern"), SHAPES, ids=lambda value: str(value))
@torch.no_grad()
def test_folder_that_transformers_saved_gives_its_logits(
    theirs_of, tmp_path, heads, kv_heads, pattern
):
    theirs = theirs_of(heads, kv_heads, pattern)
    theirs.save_pretrained(tmp_path)
    ours = linnet.load(tmp_path, dtype="float32")
    assert any("slope_rate" in name for name in load_file(tmp_path / "model.safetensors"))
    for length in (1, 63, 65, 300):
        tokens = tokens_of(length)
        assert largest_difference(ours(tokens), theirs(tokens).logits) < TOLERANCE


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 1), (6, 3)])
@torch.no_grad()
def test_continuing_a_cache_gives_transformers_logits_where_full_attention_is_first(
    theirs_of, tmp_path, heads, kv_heads
):
    theirs = theirs_of(heads, kv_heads, "SLLS")
    theirs.save_pretrained(tmp_path)
    ours = linnet.load(tmp_path, dtype="float32")
    cache, their_cache = ours.new_cache(2), None
    for chunk in tokens_of(60).split([30, 1, 1, 17, 11], 1):
        output = theirs(chunk, past_key_values=their_cache, use_cache=True)
        their_cache = output.past_key_values
        assert largest_difference(ours(chunk, cache=cache), output.logits) < TOLERANCE


@pytest.mark.parametrize("pattern", ["LLLS", "LSL"])
@torch.no_grad()
def test_our_chunks_give_transformers_full_prefill_where_lightning_is_first(
    theirs_of, tmp_path, pattern
):
    theirs = theirs_of(3, 1, pattern)
    theirs.save_pretrained(tmp_path)
    ours = linnet.load(tmp_path, dtype="float32")
    tokens = tokens_of(310)
    cache = ours.new_cache(2)
    sizes = [64, 1, 200, 1, 1, 43]
    chunks = [ours(chunk, cache=cache) for chunk in tokens.split(sizes, 1)]
    assert largest_difference(torch.cat(chunks, 1), theirs(tokens).logits) < TOLERANCE


@torch.no_grad()
def test_greedy_tokens_are_those_of_transformers_generate(theirs_of, tmp_path):
    # generate() passes positions itself, so decode is right in any order of layers.
    theirs = theirs_of(4, 2, "LLS", bos_token_id=None, eos_token_id=None, pad_token_id=0)
    theirs.save_pretrained(tmp_path)
    ours = linnet.load(tmp_path, dtype="float32")
    prompt = tokens_of(20, batch=1)
    expected = theirs.generate(prompt, max_new_tokens=24, do_sample=False)[0, 20:].tolist()
    params = SamplingParams(max_tokens=24, temperature=0)
    assert list(stream_tokens(ours, prompt[0].tolist(), params)) == expected


@torch.no_grad()
def test_folder_with_stacked_experts_gives_transformers_logits(theirs_of, tmp_path):
    theirs = theirs_of(3, 1, "LSL")
    weights = {name: value.clone() for name, value in theirs.state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in weights
    assert "model.layers.0.mlp.gate.weight" in weights
    save_file(weights, tmp_path / "model.safetensors")
    theirs.config.save_pretrained(tmp_path)
    ours = linnet.load(tmp_path, dtype="float32")
    tokens = tokens_of(70)
    assert largest_difference(ours(tokens), theirs(tokens).logits) < TOLERANCE


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_transformers_loads_what_we_save_for_it(tiny_model, tmp_path, dtype):
    ours = tiny_model("LLSL", dtype=getattr(torch, dtype), rotary_dim=8, slope_rule="transformers")
    ours.save(tmp_path / "model", dialect="transformers")
    theirs, loading = transformers.MiniMaxForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    # Its decay tables are not in the folder (66 KB per head and layer); it computes them itself.
    assert not loading["unexpected_keys"] and not loading["mismatched_keys"]
    tables = ("slope_rate", "query_decay", "key_decay", "diagonal_decay")
    assert all(name.endswith(tables) for name in loading["missing_keys"])
    again = linnet.load(tmp_path / "model", dtype="float32")
    tokens = tokens_of(300)
    assert largest_difference(again(tokens), theirs(tokens).logits) < TOLERANCE


@torch.no_grad()
def test_published_slopes_agree_with_transformers_where_we_save_for_it(tiny_model, tmp_path):
    ours = tiny_model("LLLS", rotary_dim=8)  # a power of two heads, softmax last: the rules agree
    ours.save(tmp_path / "model", dialect="transformers")
    theirs = transformers.MiniMaxForCausalLM.from_pretrained(tmp_path / "model")
    tokens = tokens_of(300)
    assert largest_difference(ours(tokens), theirs(tokens).logits) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": "LLSL"}, "other decay slopes"),  # the last layer's slope is half of theirs
        ({"num_attention_heads": 6}, "other decay slopes"),
        ({"rotary_dim": 4}, "turns whole heads"),
        ({"postnorm": False}, "postnorm=false"),
        ({"shared_intermediate_size": 8}, "shared expert"),
        ({"lightning_norm_eps": 1e-5}, "lightning_norm_eps"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_model_that_transformers_would_compute_differently_is_refused(
    tiny_model, tmp_path, changes, message
):
    model = tiny_model(**{"rotary_dim": 8, **changes})
    with pytest.raises(linnet.errors.ConfigError, match=message):
        model.save(tmp_path / "model", dialect="transformers")
    assert list(tmp_path.iterdir()) == []


def test_transformers_defaults_mean_to_us_what_they_mean_there(tmp_path):
    theirs = transformers.MiniMaxConfig(hidden_size=64, num_attention_heads=8, num_hidden_layers=2)
    theirs.save_pretrained(tmp_path)
    config = linnet.ModelConfig.from_folder(tmp_path)
    assert config.head_dim == 8 and config.rotary_dim == 8
    assert config.rope_theta == 1e6 and config.rms_norm_eps == theirs.rms_norm_eps
    assert config.attn_type_list == (1, 0) and config.layernorm_mlp_alpha == 1
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "head_dim" not in written or written["head_dim"] is None
