"""On a GPU these tests run the compiled kernels, elsewhere Triton's interpreter, on small sizes."""

import ast
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from linnet.ops import lightning_attention
from linnet.ops.lightning_attention import triton as op
from linnet.ops.lightning_attention import triton_decode as decoding
from linnet.ops.lightning_attention.operator import lightning_attention_op
from linnet.ops.lightning_attention.recurrent import decode_step
from linnet.ops.lightning_attention.reference import blockwise, reference

pytest.importorskip("triton")


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FP32 = 2e-5
BF16 = 3.5e-3
FP16 = 1e-3

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SUPPORT = load(Path(__file__).parents[1] / "triton_interpreter.py")
KERNELS = SUPPORT.load_kernels("linnet.ops.lightning_attention.triton_kernels")

DOCUMENTS = {
    "no_document": [0],
    "all_empty": [0, 0, 0],
    "some_empty": [0, 0, 5, 5, 70, 70],
    "one_token_each": [0, 1, 2, 3],
    "whole_chunks": [0, 64, 128],
}


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    if DEVICE == "cuda":
        yield
        return
    for module in (op, decoding):
        monkeypatch.setattr(module, "kernels", lambda: KERNELS)
    # The chunks that bf16 has on a GPU; those of fp32 have a test of their own.
    configure = op.launch_config
    monkeypatch.setattr(
        op, "launch_config", lambda k, v, dtype, silu=False: configure(k, v, torch.bfloat16)
    )
    with SUPPORT.repaired_interpreter():
        yield


@pytest.fixture
def segments(monkeypatch):
    """Cut every sequence into segments, as a GPU with many idle processors would."""
    monkeypatch.setattr(op, "_num_processors", lambda device: 1000)
    monkeypatch.setattr(op, "MIN_SEGMENT", 20)


@pytest.fixture
def decay():
    """Slopes of two heads, fewer than elsewhere: the interpreter is slow."""
    return torch.tensor([0.0, 0.7], dtype=torch.float64)


def run(decay, cu_seqlens=None):
    """Return the operator on the device, as a function of tensors on the CPU."""
    offsets = None if cu_seqlens is None else cu_seqlens.to(DEVICE)

    def call(q, k, v, initial_state=None):
        tensors = [None if x is None else x.to(DEVICE) for x in (q, k, v, decay, initial_state)]
        o, state = lightning_attention(*tensors, offsets, backend="triton")
        return o.cpu(), state.cpu()

    return call


def plain(decay, cu_seqlens=None, form=blockwise):
    return lambda q, k, v, initial_state=None: reference(
        q, k, v, decay, initial_state, cu_seqlens, form
    )


def small(make_inputs, length, **kwargs):
    return make_inputs(length, **{"batch": 1, "heads": 2, "dtype": torch.float32} | kwargs)


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 130])
def test_matches_reference(length, make_inputs, decay, assert_agrees):
    assert_agrees(run(decay), plain(decay), small(make_inputs, length, batch=2), FP32)


@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 128), (128, 16), (20, 70), (1, 1)])
def test_other_head_sizes_match_reference(key_dim, value_dim, make_inputs, decay, assert_agrees):
    inputs = small(make_inputs, 70, key_dim=key_dim, value_dim=value_dim)
    assert_agrees(run(decay), plain(decay), inputs, FP32)


def test_smaller_chunks_match_reference(make_inputs, decay, assert_agrees, monkeypatch):
    config = op.LaunchConfig(16, 16, 4, 1)
    monkeypatch.setattr(op, "launch_config", lambda *args: config)
    assert_agrees(run(decay), plain(decay), small(make_inputs, 50, value_dim=40), FP32)


def test_matches_reference_without_initial_state(make_inputs, decay, assert_agrees):
    inputs = small(make_inputs, 66)
    del inputs["initial_state"]
    assert_agrees(run(decay), plain(decay), inputs, FP32)


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_matches_reference(documents, make_inputs, decay, assert_agrees):
    inputs = small(make_inputs, documents[-1], states=len(documents) - 1)
    offsets = torch.tensor(documents, dtype=torch.int32)
    assert_agrees(run(decay, offsets), plain(decay, offsets), inputs, FP32)


@pytest.mark.usefixtures("segments")
@pytest.mark.parametrize("documents", [None, [0, 0, 5, 140]], ids=["rows", "packed"])
def test_segments_match_reference(documents, make_inputs, decay, assert_agrees):
    config = op.LaunchConfig(16, 16, 4, 1)
    num = 1 if documents is None else len(documents) - 1
    inputs = small(make_inputs, 140, heads=1, states=num, value_dim=12)
    assert op._num_segments(inputs["k"], inputs["v"], num, config) > 1
    offsets = None if documents is None else torch.tensor(documents)
    assert_agrees(run(decay[1:], offsets), plain(decay[1:], offsets), inputs, FP32)


def test_steep_decay_does_not_overflow(make_inputs, assert_agrees):
    decay = torch.tensor([50.0, 3e38])
    assert_agrees(run(decay), plain(decay), small(make_inputs, 130), FP32)


def test_interleaved_inputs_are_read_in_place(make_inputs, decay, assert_agrees, monkeypatch):
    inputs = small(make_inputs, 70, key_dim=8, value_dim=8)
    qkv = torch.cat([inputs[name] for name in "qkv"], -1)
    assert all(op.with_contiguous_channels(x) is x for x in qkv.split(8, -1))
    assert_agrees(
        lambda qkv: run(decay)(*qkv.split(8, -1)),
        lambda qkv: plain(decay)(*qkv.split(8, -1)),
        {"qkv": qkv},
        FP32,
    )


def test_strided_states_match_reference(make_inputs, decay, assert_agrees):
    inputs = small(make_inputs, 5)
    inputs["initial_state"] = inputs["initial_state"].mT.contiguous()
    assert_agrees(
        lambda initial_state, **x: run(decay)(**x, initial_state=initial_state.mT),
        lambda initial_state, **x: plain(decay)(**x, initial_state=initial_state.mT),
        inputs,
        FP32,
    )


@pytest.mark.parametrize("index", [0, 1], ids=["outputs", "state"])
def test_gradient_of_one_result_alone(index, make_inputs, decay, assert_agrees):
    # The gradient of a sum is one number expanded, with strides of 0.
    inputs = small(make_inputs, 9)
    assert_agrees(
        lambda **x: run(decay)(**x)[index].sum(),
        lambda **x: plain(decay)(**x)[index].sum(),
        inputs,
        FP32,
    )


def test_bf16_stays_close_to_fp64(make_inputs, assert_agrees, monkeypatch):
    # Operands rounded to bf16, as on a GPU.
    monkeypatch.setattr(op, "product", lambda dtype, device: (dtype, "ieee"))
    decay = torch.tensor([0.5, 0.1, 4e-3, 6e-5])
    inputs = small(make_inputs, 320, heads=4, key_dim=64, value_dim=64, dtype=torch.bfloat16)
    errors = assert_agrees(run(decay), plain(decay), inputs, BF16)
    print("bf16, T=320:", {name: f"{error:.1e}" for name, error in errors.items()})


def test_fp16_matches_reference(make_inputs, decay, assert_agrees):
    assert_agrees(run(decay), plain(decay), small(make_inputs, 65, dtype=torch.float16), FP16)


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state", "upstream"])
def test_a_poisoned_document_touches_no_other(name, make_inputs, decay):
    offsets = torch.tensor([0, 20, 40, 50])
    inputs = small(make_inputs, 50, states=3)
    inputs["upstream"] = torch.ones_like(inputs["v"])
    poisoned = {key: x.clone() for key, x in inputs.items()}
    if name == "initial_state":
        poisoned[name][1] = float("nan")
    else:
        poisoned[name][:, 20:40] = float("nan")
    clean = with_gradients(decay, offsets, **inputs)
    with np.errstate(invalid="ignore"):
        dirty = with_gradients(decay, offsets, **poisoned)
    position = torch.arange(50)
    for key, value in clean.items():
        per_document = key.endswith("state")
        kept = torch.arange(3) != 1 if per_document else (position < 20) | (position >= 40)
        axis, index = 0 if per_document else 1, kept.nonzero()[:, 0]
        assert torch.equal(dirty[key].index_select(axis, index), value.index_select(axis, index))


def with_gradients(decay, offsets, upstream, **inputs):
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, state = run(decay, offsets)(**leaves)
    torch.autograd.backward((o, state), (upstream, torch.ones_like(state)))
    return {"o": o, "state": state, **{f"grad {n}": x.grad for n, x in leaves.items()}}


def test_tokens_behind_the_last_document_give_zeros(make_inputs, decay, monkeypatch):
    monkeypatch.setattr(op, "document_bounds", lambda *args: None)  # unchecked, as on a GPU
    inputs = small(make_inputs, 100, states=2)
    o, _ = run(decay, torch.tensor([0, 3, 10]))(**inputs)
    assert torch.count_nonzero(o[:, 10:]) == 0 and bool(o[:, :10].isfinite().all())
    o, _ = run(decay, torch.tensor([0, 90, 1000]))(**inputs)
    expected, _ = run(decay, torch.tensor([0, 90, 100]))(**inputs)
    assert torch.equal(o, expected)


@pytest.mark.parametrize("documents", [None, [0, 3, 70]], ids=["rows", "packed"])
def test_silu_on_load_equals_silu_before(documents, make_inputs, decay):
    offsets = None if documents is None else torch.tensor(documents, device=DEVICE)
    inputs = small(make_inputs, 70, key_dim=16, states=1 if documents is None else 2)
    qkv = torch.cat([inputs[name] * 4 - 1 for name in "qkv"], -1).to(DEVICE)
    state = inputs["initial_state"].to(DEVICE)
    actual = lightning_attention(
        *qkv.split(16, -1), decay.to(DEVICE), state, offsets, backend="triton", activation="silu"
    )
    q, k, v = F.silu(qkv).split(16, -1)
    expected = lightning_attention(q, k, v, decay.to(DEVICE), state, offsets, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=FP32, atol=FP32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_decoding_in_slots_matches_decode_step(dtype, make_inputs, decay):
    inputs = small(make_inputs, 1, batch=4, key_dim=20, value_dim=40, states=6)
    pool = inputs.pop("initial_state").to(DEVICE)
    before = pool.clone()
    slots = torch.tensor([4, -1, 0, 6], dtype=dtype, device=DEVICE)
    q, k, v = (x.to(DEVICE) for x in inputs.values())
    o = decoding.decode_slots(q, k, v, decay.to(DEVICE), pool, slots)
    for row, slot in [(0, 4), (2, 0)]:
        tokens = (x[row : row + 1] for x in (q, k, v))
        expected = decode_step(*tokens, decay.to(DEVICE), before[slot : slot + 1])
        actual = o[row : row + 1], pool[slot : slot + 1]
        torch.testing.assert_close(actual, expected, rtol=FP32, atol=FP32)
    assert torch.count_nonzero(o[1]) == 0 and torch.count_nonzero(o[3]) == 0
    assert torch.equal(pool[[1, 2, 3, 5]], before[[1, 2, 3, 5]])


def test_decoding_from_the_projection_applies_silu(make_inputs, decay):
    inputs = small(make_inputs, 1, key_dim=16)
    qkv = torch.cat([inputs[name] * 4 - 1 for name in "qkv"], -1).to(DEVICE)
    pools = [inputs["initial_state"].to(DEVICE, copy=True) for _ in range(2)]
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    o = decoding.decode_slots(*qkv.split(16, -1), decay.to(DEVICE), pools[0], slots, True)
    expected = decoding.decode_slots(*F.silu(qkv).split(16, -1), decay.to(DEVICE), pools[1], slots)
    torch.testing.assert_close((o, pools[0]), (expected, pools[1]), rtol=FP32, atol=FP32)


def test_decoding_keeps_the_slope_of_slow_heads(generator):
    # lambda in fp32 would be off by 3e-8, with one sign at every step; rounding has either sign.
    decay = torch.tensor([16.5 * 2.0**-24])
    before = torch.rand(1, 1, 32, 32, generator=generator) + 0.5
    pool, zeros = before.to(DEVICE, copy=True), torch.zeros(1, 1, 1, 32, device=DEVICE)
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    decoding.decode_slots(zeros, zeros, zeros, decay.to(DEVICE), pool, slots)
    exact = before.double() * torch.exp(-decay.double())
    assert abs(float((pool.cpu() / exact - 1).mean())) < 5e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_verify_and_commit_equal_step_by_step(dtype, make_inputs, decay):
    inputs = small(make_inputs, 20, batch=4, key_dim=16, states=5, dtype=dtype)
    pool = inputs.pop("initial_state").to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in inputs.values())
    decay = decay.to(DEVICE)
    slots = torch.tensor([3, -1, 0, 1], device=DEVICE)
    lengths = torch.tensor([20, 20, 1, 17], device=DEVICE)
    accepted = torch.tensor([17, 5, 0, 2], device=DEVICE)
    before, stepped = pool.clone(), pool.clone()
    for x in (q, k, v):
        x[2, 1:] = float("nan")  # past the row's length: must not be read
    o = decoding.verify_slots(q, k, v, decay, pool, slots, lengths)
    assert torch.equal(pool, before)
    decoding.commit_slots(k, v, decay, pool, slots, accepted)
    o_tolerance = FP32 if dtype == torch.float32 else 4e-3  # outputs are rounded to bf16
    for t in range(20):
        alive = torch.where(t < lengths, slots, -1)
        step = (x[:, t : t + 1] for x in (q, k, v))
        expected = decoding.decode_slots(*step, decay, stepped, alive)
        torch.testing.assert_close(o[:, t : t + 1], expected, rtol=o_tolerance, atol=o_tolerance)
        for row in (accepted == t + 1).nonzero()[:, 0].tolist():
            if (slot := int(slots[row])) >= 0:
                actual, exact = pool[slot], stepped[slot]
                torch.testing.assert_close(actual, exact, rtol=FP32, atol=FP32)
    assert torch.equal(pool[[0, 2, 4]], before[[0, 2, 4]])


@pytest.mark.parametrize("width", [1, 48, 100])
def test_norm_with_gate_matches_its_parts(width, generator):
    x, gate = (torch.randn(2, 3, width, generator=generator).to(DEVICE) for _ in range(2))
    weight = torch.randn(width, generator=generator).to(DEVICE)
    actual = decoding.rms_norm_sigmoid_gate(x, gate, weight, 1e-6)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight
    expected = normed * torch.sigmoid(gate)
    torch.testing.assert_close(actual, expected, rtol=FP32, atol=FP32)
    strided = torch.cat((gate, x), -1)[..., width:]
    torch.testing.assert_close(
        decoding.rms_norm_sigmoid_gate(strided, gate, weight, 1e-6), actual, rtol=0, atol=0
    )


def test_unsupported_inputs_are_named(monkeypatch):
    def reason(key_dim=16, value_dim=16, dtype=torch.float32):
        q = torch.zeros(1, 2, 3, key_dim, dtype=dtype, device=DEVICE)
        return op.unsupported_reason(q, q, q.new_zeros(1, 2, 3, value_dim))

    assert reason() is None
    assert "K = 129, V = 16 are outside of 1 .. 128" in reason(key_dim=129)
    assert "V = 256" in reason(value_dim=256)
    assert "got torch.float64" in reason(dtype=torch.float64)
    compiled = types.SimpleNamespace(JITFunction=int)
    with monkeypatch.context() as patch:
        patch.setattr(op, "kernels", lambda: types.SimpleNamespace(triton=compiled, scan_kernel=1))
        if DEVICE == "cpu":
            assert "TRITON_INTERPRET=1" in reason()
    monkeypatch.setattr(op, "_is_installed", lambda: False)
    assert "pip install 'linnet[gpu]'" in reason()


def test_wrong_arguments_raise(make_inputs, decay):
    inputs = {name: x.to(DEVICE) for name, x in small(make_inputs, 2, key_dim=130).items()}
    q, k, v, state = inputs.values()
    with pytest.raises(ValueError, match=r"'triton' cannot be used: head sizes K = 130"):
        lightning_attention(q, k, v, decay, state, backend="triton")
    q, k, pool = q[..., :4], k[..., :4], state[..., :4, :]
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="one token per row; got T = 2"):
        decoding.decode_slots(q, k, v, decay, pool, slots)
    with pytest.raises(ValueError, match=r"pool \(1, 2, 4, 8\)"):
        decoding.verify_slots(q, k, v, decay, pool[..., :8], slots)
    with pytest.raises(ValueError, match="last dim must be contiguous"):
        decoding.verify_slots(q, k, v, decay, pool.mT.contiguous().mT, slots)
    with pytest.raises(ValueError, match=r"slots \(2,\)"):
        decoding.verify_slots(q, k, v, decay, pool, slots.expand(2))
    with pytest.raises(ValueError, match=r"lengths \(1,\) torch.float32"):
        decoding.commit_slots(k, v, decay, pool, slots, slots.float())


@pytest.mark.parametrize("silu", [False, True], ids=["plain", "silu"])
def test_the_operator_passes_opcheck(silu, make_inputs, decay):
    offsets = torch.tensor([0, 3, 3], device=DEVICE)
    inputs = small(make_inputs, 3, heads=1, states=2)
    q, k, v, state = (x.to(DEVICE).requires_grad_() for x in inputs.values())
    args = (q, k, v, decay[1:].to(DEVICE), state, offsets, "triton", silu)
    torch.library.opcheck(lightning_attention_op, args)


def test_slot_ops_pass_opcheck(make_inputs, decay):
    inputs = small(make_inputs, 1, heads=1, key_dim=16)
    q, k, v, pool = (x.to(DEVICE) for x in inputs.values())
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    decay, gate, weight = decay[1:].to(DEVICE), torch.ones_like(v), torch.ones_like(v[0, 0, 0])
    torch.library.opcheck(decoding._decode_op, (q, k, v, decay, pool, slots, False))
    torch.library.opcheck(decoding._verify_op, (q, k, v, decay, pool, slots, slots, False))
    torch.library.opcheck(decoding._commit_op, (k, v, decay, pool, slots, slots, False))
    torch.library.opcheck(decoding.rms_norm_sigmoid_gate, (v, gate, weight, 1e-6))


def test_only_kernels_import_triton():
    # They are loaded by name at the first call, so linnet works where Triton is absent.
    package = Path(op.__file__).parents[2]
    importers = {
        file.name
        for file in package.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Import) and any(x.name.startswith("triton") for x in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").startswith("triton"))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").endswith("triton_kernels"))
    }
    assert importers == {"triton_kernels.py", "moe_triton_kernels.py"}


@pytest.mark.slow
def test_all_kernels_compile_for_hopper(tmp_path):
    script = Path(__file__).parents[1] / "triton_compile.py"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    subprocess.run([sys.executable, str(script)], check=True, env=environment)
