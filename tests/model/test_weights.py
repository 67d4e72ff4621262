"""Folders on disk: what is read, what is written, what is refused, and what survives a failure."""

import errno
import json
import logging
import os
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import linnet
from linnet.errors import CheckpointError, ConfigError, DataError, LinnetError
from linnet.model import Model, weights
from linnet.text import Tokenizer

PUBLISHED_CONFIG = {
    "architectures": ["MiniMaxM1ForCausalLM"],
    "attention_dropout": 0.0,
    "attn_type_list": [0, 0, 1, 0],
    "auto_map": {"AutoConfig": "configuration_minimax_m1.MiniMaxM1Config"},
    "bos_token_id": None,
    "eos_token_id": None,
    "head_dim": 8,
    "hidden_act": "silu",
    "hidden_size": 24,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "layernorm_full_attention_alpha": 3.5565588200778455,
    "layernorm_full_attention_beta": 1.0,
    "layernorm_linear_attention_alpha": 3.5565588200778455,
    "layernorm_linear_attention_beta": 1.0,
    "layernorm_mlp_alpha": 3.5565588200778455,
    "layernorm_mlp_beta": 1.0,
    "max_position_embeddings": 10240000,
    "model_type": "minimax_m1",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "output_router_logits": False,
    "postnorm": True,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000000,
    "rotary_dim": 4,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0,
    "shared_intermediate_size": 0,
    "shared_moe_mode": "sigmoid",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "transformers_version": "4.45.2",
    "use_cache": True,
    "vocab_size": 61,
}
# What a file says about itself and its caller, not about the model.
BOOKKEEPING = {"auto_map", "transformers_version", "use_cache", "output_router_logits"}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """SPEC 2.4, written out for the config above: heads are 32 wide together, hidden is 24."""
    shapes = {
        "model.embed_tokens.weight": (61, 24),
        "model.norm.weight": (24,),
        "lm_head.weight": (61, 24),
    }
    lightning = {
        "qkv_proj": (96, 24),
        "output_gate": (32, 24),
        "norm": (32,),
        "out_proj": (24, 32),
    }
    softmax = {"q_proj": (32, 24), "k_proj": (16, 24), "v_proj": (16, 24), "o_proj": (24, 32)}
    for layer, kind in enumerate(PUBLISHED_CONFIG["attn_type_list"]):
        stem = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{stem}.{norm}.weight"] = (24,)
        for name, shape in (softmax if kind else lightning).items():
            shapes[f"{stem}.self_attn.{name}.weight"] = shape
        shapes[f"{stem}.block_sparse_moe.gate.weight"] = (3, 24)
        for expert in range(3):
            for name, shape in (("w1", (20, 24)), ("w2", (24, 20)), ("w3", (20, 24))):
                shapes[f"{stem}.block_sparse_moe.experts.{expert}.{name}.weight"] = shape
    return shapes


@pytest.fixture(params=["one-file", "sharded"])
def published(request, tmp_path, generator):
    """Write a folder as the M1 release has it: bf16, routers fp32, names of SPEC 2.4."""
    folder = tmp_path / "published"
    folder.mkdir()
    tensors = {}
    for name, shape in published_shapes().items():
        dtype = torch.float32 if "gate.weight" in name and "moe" in name else torch.bfloat16
        tensors[name] = (torch.randn(shape, generator=generator) * 0.2).to(dtype)
    (folder / "config.json").write_text(json.dumps(PUBLISHED_CONFIG))
    if request.param == "one-file":
        save_file(tensors, folder / "model.safetensors")
        return folder
    names, weight_map = list(tensors), {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, folder / file)
        weight_map |= dict.fromkeys(names[number::3], file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def raw_tensors(folder) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of every tensor, read from the files themselves."""
    found = {}
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name != "__metadata__":
                start, stop = (8 + length + offset for offset in entry["data_offsets"])
                found[name] = (entry["dtype"], entry["shape"], data[start:stop])
    return found


def test_published_folder_comes_back_byte_for_byte(published, tmp_path):
    model = linnet.load(published)
    model.save(tmp_path / "again", dialect="minimax_m1")
    before, after = raw_tensors(published), raw_tensors(tmp_path / "again")
    assert len(before) == len(published_shapes())
    assert before == after
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    expected = {k: v for k, v in PUBLISHED_CONFIG.items() if k not in BOOKKEEPING}
    assert config == expected | {"torch_dtype": "bfloat16"}


@torch.no_grad()
def test_published_folder_gives_the_logits_of_its_tensors(published):
    model = linnet.load(published, dtype="float32")
    raw = {name: value for file in published.glob("*.safetensors") for name, value in tensors(file)}
    experts = model.layers[1].block_sparse_moe.experts
    stem = "model.layers.1.block_sparse_moe.experts.2"
    assert torch.equal(experts.gate_up[2, :20], raw[f"{stem}.w1.weight"].float())
    assert torch.equal(experts.gate_up[2, 20:], raw[f"{stem}.w3.weight"].float())
    assert torch.equal(experts.down[2], raw[f"{stem}.w2.weight"].float())
    assert model(torch.arange(61)[None]).isfinite().all()


def tensors(file):
    return load_file(file).items()


def test_router_and_lm_head_are_fp32_in_memory(published):
    model = linnet.load(published, dtype="bfloat16")
    fp32 = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    gates = {f"layers.{layer}.block_sparse_moe.gate.weight" for layer in range(4)}
    assert fp32 == {"lm_head.weight"} | gates
    assert model.compute_dtype == torch.bfloat16 and not model.training


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@torch.no_grad()
def test_saved_model_loads_with_the_same_logits(tiny_model, tmp_path, dtype):
    model = tiny_model("LSL", dtype=getattr(torch, dtype), shared_intermediate_size=12)
    model.save(tmp_path / "model")
    again = linnet.load(tmp_path / "model", dtype="auto")
    assert again.embed_tokens.weight.dtype == getattr(torch, dtype)
    assert again.config == model.config
    tokens = torch.arange(61)[None]
    assert torch.equal(again(tokens), model(tokens))


def test_shards_are_split_by_size_and_listed(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 20_000)
    model = tiny_model()
    model.save(tmp_path / "model")
    files = sorted(file.name for file in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    raw = raw_tensors(tmp_path / "model")
    assert index["weight_map"].keys() == raw.keys()
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in raw.values())
    for file in files:
        assert (tmp_path / "model" / file).stat().st_size < 20_000 + 10_000
    loaded = dict(linnet.load(tmp_path / "model", dtype="float32").named_parameters())
    assert all(torch.equal(p, loaded[name]) for name, p in model.named_parameters())


def test_tokenizer_travels_with_the_model(tiny_model, tmp_path):
    model = tiny_model(vocab_size=300)
    model.tokenizer = Tokenizer.train(["some text, some more text"], vocab_size=280)
    model.save(tmp_path / "model")
    again = linnet.load(tmp_path / "model").tokenizer
    assert again is not None and again.fingerprint == model.tokenizer.fingerprint


def test_preset_has_random_weights_and_says_so(caplog):
    with caplog.at_level(logging.INFO, "linnet"):
        first, again = linnet.load("nano"), linnet.load("nano", seed=0)
        other = linnet.load("nano", seed=1)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "preset 'nano' has no trained weights: random ones, seed 0"
    assert len(lines) == 3
    weight = first.embed_tokens.weight
    assert torch.equal(weight, again.embed_tokens.weight)
    assert not torch.equal(weight, other.embed_tokens.weight)


def test_meta_device_reads_no_weights(saved):
    (saved / "model.safetensors").write_bytes((saved / "model.safetensors").read_bytes())
    model = linnet.load(saved, device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


# What is refused. Each case damages a good folder and names what the message must hold.


@pytest.fixture
def saved(tiny_model, tmp_path):
    model = tiny_model(vocab_size=61)
    model.save(tmp_path / "model")
    return tmp_path / "model"


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def cut(folder, keep):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:keep])


def set_index(folder, content):
    (folder / "model.safetensors.index.json").write_text(json.dumps(content))


def fill_nan(tensors):
    tensors["model.layers.2.self_attn.norm.weight"][3] = float("nan")


def make_integer(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)


def duplicate(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({"lm_head.weight": tensors["lm_head.weight"]}, folder / "other.safetensors")
    set_index(folder, {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}})


DAMAGE = {
    "no-weights": (lambda f: (f / "model.safetensors").unlink(), "model.safetensors is missing"),
    "empty-file": (lambda f: cut(f, 0), "model.safetensors is damaged or cut short"),
    "cut-length": (lambda f: cut(f, 5), "model.safetensors is damaged or cut short"),
    "cut-header": (lambda f: cut(f, 500), "model.safetensors is damaged or cut short"),
    "cut-data": (lambda f: cut(f, -1), "model.safetensors is damaged or cut short"),
    "corrupt-header": (
        lambda f: (f / "model.safetensors").write_bytes(
            struct.pack("<Q", 9) + b'{"a": {{{' + bytes(99)
        ),
        "model.safetensors is damaged or cut short",
    ),
    "huge-header": (
        lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + bytes(99)),
        "model.safetensors is damaged or cut short",
    ),
    "pickle": (
        lambda f: torch.save({}, f / "model.safetensors"),
        "model.safetensors is damaged or cut short",
    ),
    "folder-for-file": (
        lambda f: ((f / "model.safetensors").unlink(), (f / "model.safetensors").mkdir()),
        "model.safetensors is damaged or cut short",
    ),
    "missing-tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")),
        "lacks tensors: model.norm.weight",
    ),
    "missing-layer": (
        lambda f: edit_tensors(
            f, lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.3.")]
        ),
        "and 16 more",
    ),
    "extra-tensor": (
        lambda f: edit_tensors(f, lambda t: t.update(bias=torch.zeros(1))),
        "has unexpected tensors: bias",
    ),
    "misshapen-tensor": (
        lambda f: edit_tensors(f, lambda t: t.update({"lm_head.weight": torch.zeros(60, 24)})),
        r"lm_head.weight has shape \[60, 24\]; the config asks for \[61, 24\]",
    ),
    "nan": (
        lambda f: edit_tensors(f, fill_nan),
        "model.layers.2.self_attn.norm.weight has 1 values that are NaN or inf",
    ),
    "integers": (lambda f: edit_tensors(f, make_integer), "model.norm.weight is I8; linnet reads"),
    "index-outside": (
        lambda f: set_index(f, {"weight_map": {"a": "../x.safetensors"}}),
        "names '../x.safetensors', which is no file of this folder",
    ),
    "index-absolute": (
        lambda f: set_index(f, {"weight_map": {"a": "/etc/passwd"}}),
        "names '/etc/passwd', which is no file of this folder",
    ),
    "index-parent": (lambda f: set_index(f, {"weight_map": {"a": ".."}}), "is damaged"),
    "index-null-byte": (lambda f: set_index(f, {"weight_map": {"a": "x\0y"}}), "is missing"),
    "index-missing-file": (
        lambda f: set_index(f, {"weight_map": {"a": "model-2.safetensors"}}),
        "model-2.safetensors is missing; the checkpoint is incomplete",
    ),
    "index-number": (lambda f: set_index(f, {"weight_map": {"a": 1}}), "names 1"),
    "index-list": (lambda f: set_index(f, []), "is not a valid index"),
    "index-no-map": (lambda f: set_index(f, {}), "is not a valid index"),
    "index-empty": (lambda f: set_index(f, {"weight_map": {}}), "lacks tensors"),
    "index-bad-json": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "is not a valid index",
    ),
    "tensor-in-two-files": (duplicate, "lm_head.weight is in model.safetensors and other"),
    "other-width": (lambda f: edit_config(f, hidden_size=32), "the config asks for"),
    "more-layers": (
        lambda f: edit_config(f, num_hidden_layers=5, attn_type_list=[0, 0, 0, 1, 0]),
        "lacks tensors: model.layers.4",
    ),
    "huge-width": (lambda f: edit_config(f, intermediate_size=2**30), "the config asks for"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_folder_is_refused_in_one_line(saved, damage):
    harm, message = DAMAGE[damage]
    harm(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        linnet.load(saved)
    assert "\n" not in str(caught.value)


def test_value_too_large_for_the_wanted_dtype_is_refused(saved):
    edit_tensors(saved, lambda t: t["model.norm.weight"].fill_(1e5))
    assert linnet.load(saved, dtype="bfloat16").norm.weight.isfinite().all()
    with pytest.raises(CheckpointError, match=r"model.norm.weight has 24 values.* as float16"):
        linnet.load(saved, dtype="float16")


def test_tokenizer_larger_than_the_vocabulary_is_refused(saved):
    Tokenizer.train(["some text"], vocab_size=280).save(saved)
    with pytest.raises(CheckpointError, match=r"tokenizer has 2.. ids, the model vocab_size 61"):
        linnet.load(saved)


def test_damaged_tokenizer_is_refused(saved):
    (saved / "tokenizer.json").write_text("{")
    with pytest.raises(DataError) as caught:
        linnet.load(saved)
    assert "\n" not in str(caught.value)


def test_model_larger_than_the_machine_is_refused():
    with pytest.raises(CheckpointError, match="the weights take 912 GB and this machine has"):
        linnet.load("minimax-m1")


@pytest.mark.parametrize("dtype", ["bfloat61", "int8", torch.int64, None])
def test_unknown_dtype_is_refused(saved, dtype):
    with pytest.raises(ConfigError, match="is not supported"):
        linnet.load(saved, dtype=dtype)


def test_unknown_dialect_is_refused(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match="unknown dialect 'minimax_m'; did you mean 'minimax_m1'"):
        tiny_model().save(tmp_path / "model", dialect="minimax_m")


# What a failed save leaves behind.


def test_existing_folder_is_replaced_only_when_asked(tiny_model, saved):
    before = raw_tensors(saved)
    (saved / "notes.txt").write_text("mine")
    other = tiny_model(num_local_experts=3)
    with pytest.raises(CheckpointError, match="exists; choose another name or ask to overwrite"):
        other.save(saved)
    assert raw_tensors(saved) == before
    other.save(saved, overwrite=True)
    assert linnet.load(saved).config == other.config
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert not (saved / "notes.txt").exists()


def test_folder_that_is_no_model_is_never_replaced(tiny_model, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds something other than a model"):
        tiny_model().save(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_file_is_never_replaced_by_a_folder(tiny_model, tmp_path):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(CheckpointError, match="is a file; choose another name"):
        tiny_model().save(tmp_path / "model", overwrite=True)
    assert (tmp_path / "model").read_text() == "a file"


def full_after_a_part(tensors, path, metadata=None):
    path.write_bytes(bytes(100))
    raise SafetensorError("I/O error: No space left on device (os error 28)")


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


FAILURES = {
    "weights": (weights, "save_file", full_after_a_part),
    "config": (type(weights.Path()), "write_text", no_space),
    "tokenizer": (Tokenizer, "save", no_space),
    "fsync": (os, "fsync", no_space),
    "folder": (type(weights.Path()), "mkdir", no_space),
    "interrupt": (weights, "save_file", lambda *_a, **_k: (_ for _ in ()).throw(KeyboardInterrupt)),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_failed_save_keeps_the_old_folder_and_leaves_nothing(tiny_model, saved, failure):
    owner, name, fail = FAILURES[failure]
    before = raw_tensors(saved)
    other = tiny_model(vocab_size=300)
    other.tokenizer = Tokenizer.train(["some text"], vocab_size=280)
    expected = KeyboardInterrupt if failure == "interrupt" else CheckpointError
    with pytest.MonkeyPatch.context() as patch, pytest.raises(expected) as caught:
        patch.setattr(owner, name, fail)
        other.save(saved, overwrite=True)
    if failure != "interrupt":
        assert "No space left" in str(caught.value) and "\n" not in str(caught.value)
        assert str(saved) in str(caught.value)
    assert [path.name for path in saved.parent.iterdir()] == ["model"]
    assert raw_tensors(saved) == before
    assert linnet.load(saved).config.vocab_size == 61


def test_saving_over_the_folder_a_model_came_from_keeps_its_weights(saved):
    before = raw_tensors(saved)
    linnet.load(saved, dtype="float32").save(saved, overwrite=True)
    assert raw_tensors(saved) == before


def test_every_error_is_a_linnet_error(tmp_path):
    with pytest.raises(LinnetError):
        linnet.load(tmp_path)


def test_model_is_built_uninitialized_and_says_where_to_go(tiny_config):
    assert Model.__doc__ is not None and "linnet.load" in Model.__doc__
    assert Model(tiny_config()).embed_tokens.weight.isnan().all()


def test_safetensors_metadata_names_the_framework(saved):
    with safe_open(saved / "model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
