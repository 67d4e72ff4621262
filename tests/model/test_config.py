import json
import math

import pytest

from linnet.errors import CheckpointError, ConfigError, LinnetError
from linnet.model import PRESETS, ModelConfig, preset
from linnet.model.presets import config_of, hybrid


@pytest.fixture
def published(tiny_config):
    """Return the published `config.json` of a tiny model."""
    return tiny_config().to_dict("minimax_m1")


@pytest.fixture
def theirs(tiny_config):
    """Return the transformers `config.json` of a tiny model."""
    return tiny_config(rotary_dim=8).to_dict("transformers")


@pytest.mark.parametrize("dialect", ["linnet", "minimax_m1", "minimax_text_01", "transformers"])
def test_config_survives_a_round_trip_through_json(tiny_config, dialect):
    config = tiny_config(rotary_dim=8, bos_token_id=3, eos_token_id=(4, 5))
    again = ModelConfig.from_dict(json.loads(json.dumps(config.to_dict(dialect))))
    changed = {"slope_rule": "transformers"} if dialect == "transformers" else {}
    assert again.to_dict() == {**config.to_dict(), **changed}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_published_dialect(name):
    assert ModelConfig.from_dict(preset(name).to_dict("minimax_m1")) == preset(name)


def test_vision_config_is_read_by_its_text_part(published):
    text = {**published, "model_type": "MiniMaxText01"}
    vision = {"model_type": "minimax_vl_01", "text_config": text, "vision_config": {}}
    assert ModelConfig.from_dict(vision) == ModelConfig.from_dict(published)


@pytest.mark.parametrize("kind", ["minimax_m1", "minimax_text_01", "MiniMaxM1", "MiniMaxText01"])
def test_published_model_types_are_known(published, kind):
    assert ModelConfig.from_dict({**published, "model_type": kind}).vocab_size == 61


def test_presets_of_the_published_models_have_the_published_numbers():
    config = preset("minimax-m1")
    assert config == preset("minimax-text-01")
    assert [i for i, kind in enumerate(config.attn_type_list) if kind] == list(range(7, 80, 8))
    for alpha in (
        config.layernorm_full_attention_alpha,
        config.layernorm_linear_attention_alpha,
        config.layernorm_mlp_alpha,
    ):
        assert alpha == 3.5565588200778455
    assert config.residual_factors(0) == config.residual_factors(7) == (3.5565588200778455, 1.0)
    assert (config.rope_theta, config.rotary_dim, config.head_dim) == (1e7, 64, 128)


def test_hybrid_puts_softmax_at_the_end_of_each_period():
    assert hybrid(8) == (0, 0, 0, 0, 0, 0, 0, 1)
    assert hybrid(4, period=2) == (0, 1, 0, 1)


def test_published_config_keeps_its_nulls(published):
    for key in ("bos_token_id", "eos_token_id", "sliding_window"):
        assert published[key] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rotary_dims": 4}, "unknown key 'rotary_dims'; did you mean 'rotary_dim'"),
        ({"attn_type_list": [0, 1]}, "attn_type_list has 2 entries for num_hidden_layers 4"),
        ({"attn_type_list": [0, 0, 0, 2]}, "attn_type_list holds .2."),
        ({"attn_type_list": [0, 0, 0, "1"]}, "'attn_type_list' is '1'; expected int"),
        ({"attn_type_list": 1}, "'attn_type_list' is 1"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is no multiple of"),
        ({"rotary_dim": 3}, "rotary_dim 3 must be even and at most head_dim 8"),
        ({"rotary_dim": 10}, "rotary_dim 10 must be even and at most head_dim 8"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok 5 exceeds"),
        ({"hidden_size": "24"}, "'hidden_size' is '24'; expected int"),
        ({"hidden_size": 24.0}, "'hidden_size' is 24.0; expected int"),
        ({"hidden_size": None}, "'hidden_size' is None"),
        ({"postnorm": 1}, "'postnorm' is 1; expected bool"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be positive"),
        ({"vocab_size": -5}, "vocab_size is -5; it must be positive"),
        ({"vocab_size": 2**62}, "these sizes make a tensor of"),
        ({"num_local_experts": 2**45}, "these sizes make a tensor of"),
        ({"rope_theta": 0}, "rope_theta is 0.0; it must be positive"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; it must be positive"),
        ({"layernorm_mlp_alpha": math.nan}, "layernorm_mlp_alpha is nan; it must be finite"),
        ({"initializer_range": math.inf}, "initializer_range is inf; it must be finite"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; linnet supports 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"shared_moe_mode": "softmax"}, "'shared_moe_mode' is 'softmax'"),
        ({"lightning_norm_eps": 1e-5}, "'lightning_norm_eps' is no key of the published dialect"),
        ({"slope_rule": "published"}, "'slope_rule' is no key of the published dialect"),
        ({"capacity_factor": 1.0}, "'capacity_factor' is no key of the published dialect"),
        ({"model_type": "minimax_m2"}, "'minimax_m2' is unknown; did you mean 'minimax_m1'"),
        ({"model_type": "llama"}, "model_type 'llama' is unknown"),
        ({"model_type": None}, "model_type None is unknown"),
        ({"model_type": ["minimax_m1"]}, "model_type .* is unknown"),
        ({"model_type": "minimax_vl_01"}, "needs a 'text_config' section"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_value_is_named(published, changes, message):
    assert_refused({**published, **changes}, message)


@pytest.mark.parametrize(
    "key",
    [
        "rope_theta",
        "postnorm",
        "rotary_dim",
        "head_dim",
        "attn_type_list",
        "hidden_size",
        "layernorm_full_attention_alpha",
        "layernorm_linear_attention_beta",
        "layernorm_mlp_alpha",
        "model_type",
    ],
)
def test_published_config_must_say_what_it_is(published, key):
    del published[key]
    assert_refused(published, key)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": None}, "missing key 'layer_types'"),
        ({"layer_types": ["full_attention", "sparse"] * 2}, "layer_types holds 'sparse'"),
        ({"layer_types": ["full_attention", ["x"]] * 2}, "layer_types holds .'x'."),
        ({"layer_types": ["full_attention"]}, "attn_type_list has 1 entries"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "only rope_type 'default'"),
        ({"rope_parameters": {"factor": 2.0}}, "unknown keys in rope_parameters: .'factor'."),
        ({"rope_parameters": {"partial_rotary_factor": "half"}}, "partial_rotary_factor is 'half'"),
        ({"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor is 2"),
        ({"rope_parameters": [1]}, "rope_parameters is .1."),
        ({"full_attn_alpha_factor": "1"}, "'layernorm_full_attention_alpha' is '1'"),
        ({"eos_token_id": ["a"]}, "'eos_token_id' is"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_value_of_the_transformers_dialect_is_named(theirs, changes, message):
    assert_refused({**theirs, **changes}, message)


def test_transformers_config_may_leave_head_sizes_to_be_derived(theirs):
    theirs |= {"head_dim": None, "num_key_value_heads": None, "hidden_size": 32}
    config = ModelConfig.from_dict(theirs)
    assert (config.head_dim, config.num_key_value_heads, config.rotary_dim) == (8, 4, 8)


def test_transformers_config_may_turn_part_of_a_head(theirs):
    theirs["rope_parameters"]["partial_rotary_factor"] = 0.5
    assert ModelConfig.from_dict(theirs).rotary_dim == 4


def assert_refused(mapping, message):
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_dict(mapping)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"vocab_size": ' + b"9" * 5000 + b"}", "is not valid JSON"),
        (b"[]", "holds a list; expected an object"),
        (b"{}", "model_type None is unknown"),
        (None, "not found; a model folder holds a config.json"),
    ],
    ids=["cut", "bytes", "deep", "digits", "list", "empty", "missing"],
)
def test_unreadable_config_file_is_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        ModelConfig.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


def test_config_that_is_a_folder_is_an_error(tmp_path):
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("nanoo", ConfigError, "neither a model folder nor a preset; did you mean 'nano'"),
        ("none/model", CheckpointError, "model folder 'none/model' does not exist"),
        ("file", CheckpointError, "'file' is a file; pass the folder"),
    ],
)
def test_source_that_is_no_model_is_named(tmp_path, monkeypatch, source, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(error, match=message) as caught:
        config_of(source)
    assert isinstance(caught.value, LinnetError) and "\n" not in str(caught.value)


def test_folder_goes_before_a_preset_of_its_name(tmp_path, monkeypatch, tiny_config):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    (tmp_path / "nano" / "config.json").write_text(json.dumps(tiny_config().to_dict()))
    assert config_of("nano").vocab_size == 61
    assert config_of("tiny") == PRESETS["tiny"]


def test_misspelt_preset_suggests_the_nearest():
    with pytest.raises(ConfigError, match="unknown preset 'minimax-m'; did you mean 'minimax-m1'"):
        preset("minimax-m")
