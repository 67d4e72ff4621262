import itertools

import pytest
import torch
from torch import Tensor

from linnet.ops import lightning_attention
from linnet.ops.lightning_attention import chunked
from linnet.ops.lightning_attention.operator import backward_op, lightning_attention_op
from linnet.ops.lightning_attention.reference import blockwise, parallel, reference

FP64 = 1e-12
FP32 = 2e-5
BF16 = 3.5e-3
DRIFT = 1e-4

DOCUMENTS = {
    "no_document": [0],
    "all_empty": [0, 0, 0],
    "some_empty": [0, 0, 5, 5, 70, 70],
    "one_token_each": list(range(8)),
    "whole_chunks": [0, 64, 192, 256],
    "very_different": [0, 1, 700, 703, 960],
    "single": [0, 100],
}


def op(decay, cu_seqlens=None):
    return lambda q, k, v, initial_state=None: lightning_attention(
        q, k, v, decay, initial_state, cu_seqlens, backend="chunked"
    )


def plain(decay, cu_seqlens=None, form=parallel):
    return lambda q, k, v, initial_state=None: reference(
        q, k, v, decay, initial_state, cu_seqlens, form
    )


def run_with_gradients(decay, inputs, cu_seqlens=None, upstream=None):
    """Return o, state and the gradients of all inputs."""
    leaves = {name: x.clone().requires_grad_() for name, x in inputs.items()}
    o, state = op(decay, cu_seqlens)(**leaves)
    grad_o = torch.ones_like(o) if upstream is None else upstream
    torch.autograd.backward((o, state), (grad_o, torch.ones_like(state)))
    return {"o": o, "state": state, **{f"grad {n}": x.grad for n, x in leaves.items()}}


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000])
def test_chunked_matches_reference(length, make_inputs, decay, assert_agrees):
    assert_agrees(op(decay), plain(decay), make_inputs(length), FP64)


def test_chunked_matches_reference_without_initial_state(make_inputs, decay, assert_agrees):
    inputs = make_inputs(130, key_dim=16, value_dim=4)
    del inputs["initial_state"]
    assert_agrees(op(decay), plain(decay), inputs, FP64)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_matches_reference(documents, dtype, make_inputs, decay, assert_agrees):
    inputs = make_inputs(documents[-1], batch=1, states=len(documents) - 1)
    offsets = torch.tensor(documents, dtype=dtype)
    assert_agrees(op(decay, offsets), plain(decay, offsets), inputs, FP64)


def test_packed_equals_separate(make_inputs, decay):
    documents = DOCUMENTS["very_different"]
    inputs = make_inputs(documents[-1], batch=1, states=len(documents) - 1)
    o, states = op(decay, torch.tensor(documents))(**inputs)
    initial = inputs.pop("initial_state")
    for n, (start, stop) in enumerate(itertools.pairwise(documents)):
        document = {name: x[:, start:stop] for name, x in inputs.items()}
        alone, state = op(decay)(**document, initial_state=initial[n : n + 1])
        torch.testing.assert_close(o[:, start:stop], alone, rtol=0, atol=FP64)
        torch.testing.assert_close(states[n : n + 1], state, rtol=0, atol=FP64)


def test_gradients_pass_gradcheck(make_inputs, decay):
    inputs = make_inputs(67, batch=1, heads=3, key_dim=2, value_dim=1, states=3)
    offsets = torch.tensor([0, 1, 1, 67])
    leaves = [x.requires_grad_() for x in inputs.values()]
    assert torch.autograd.gradcheck(op(decay, offsets), leaves, fast_mode=True)


def test_interleaved_inputs_match_reference(make_inputs, decay, assert_agrees):
    inputs = make_inputs(100, key_dim=8, value_dim=8)
    qkv = torch.cat((inputs["q"], inputs["k"], inputs["v"]), -1)
    assert_agrees(
        lambda qkv: op(decay)(*qkv.split(8, -1)),
        lambda qkv: plain(decay)(*qkv.split(8, -1)),
        {"qkv": qkv},
        FP64,
    )


def test_steep_decay_does_not_overflow(make_inputs, assert_agrees):
    decay = torch.tensor([50.0, 90.0, 1e4], dtype=torch.float64)
    assert_agrees(op(decay), plain(decay), make_inputs(1000, batch=1), FP64)
    inputs = make_inputs(1000, batch=1, dtype=torch.float32)
    assert_agrees(op(decay), plain(decay), inputs, FP32)


def test_fp32_stays_close_to_fp64(make_inputs, assert_agrees):
    decay = torch.tensor([0.9, 0.01, 1e-5, 0.0])
    inputs = make_inputs(4096, 1, 4, 32, 32, dtype=torch.float32)
    errors = assert_agrees(op(decay), plain(decay, form=blockwise), inputs, FP32)
    print("fp32, T=4096:", {name: f"{error:.1e}" for name, error in errors.items()})


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32], ids=["bf16", "widened"])
def test_bf16_stays_close_to_fp64(products, make_inputs, assert_agrees, monkeypatch):
    monkeypatch.setattr(chunked, "product_dtype", lambda dtype, device: products)
    decay = 2.0 ** -torch.arange(1.0, 9.0)
    inputs = make_inputs(1024, 1, 8, 64, 64, dtype=torch.bfloat16)
    errors = assert_agrees(op(decay), plain(decay, form=blockwise), inputs, BF16)
    print(f"bf16, {products}:", {name: f"{error:.1e}" for name, error in errors.items()})


def test_state_does_not_drift(make_inputs):
    decay = torch.tensor([1e-5, 1e-2])
    inputs = make_inputs(65_536, 1, 2, 16, 16, dtype=torch.float32)
    _, state = op(decay)(**inputs)
    age = torch.arange(65_535, -1, -1, dtype=torch.float64)
    weight = torch.exp(-age[:, None] * decay)
    expected = torch.einsum(
        "bthk,bthv,th->bhkv", inputs["k"].double(), inputs["v"].double(), weight
    )
    expected += torch.exp(-65_536.0 * decay.double())[:, None, None] * inputs["initial_state"]
    errors = (state - expected).norm(dim=(2, 3)) / expected.norm(dim=(2, 3))
    print("drift after 65,536 tokens:", [f"{error:.1e}" for error in errors[0].tolist()])
    assert errors.max() <= DRIFT


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, FP64), (torch.float32, FP32)], ids=["fp64", "fp32"]
)
def test_one_call_equals_many_with_a_carried_state(dtype, tolerance, make_inputs, decay, rng):
    inputs = make_inputs(500, dtype=dtype)
    o, state = op(decay)(**inputs)
    carried, outputs, start = inputs.pop("initial_state"), [], 0
    while start < 500:
        stop = start + rng.choice([0, 1, 1, 17, 64, 90])
        part = {name: x[:, start:stop] for name, x in inputs.items()}
        # The backend is chosen here: single tokens take the decode step.
        out, carried = lightning_attention(**part, decay=decay, initial_state=carried)
        outputs.append(out)
        start = stop
    torch.testing.assert_close(torch.cat(outputs, 1), o, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(carried, state, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state", "upstream"])
def test_a_poisoned_document_touches_no_other(name, poison, make_inputs, decay):
    documents = torch.tensor([0, 70, 200, 201, 300])
    inputs = make_inputs(300, batch=1, states=4)
    inputs["upstream"] = torch.ones_like(inputs["v"])
    poisoned = {key: x.clone() for key, x in inputs.items()}
    if name == "initial_state":
        poisoned[name][1] = poison
    else:
        poisoned[name][:, 70:200] = poison
    clean = run_with_gradients(decay, **split_upstream(inputs), cu_seqlens=documents)
    dirty = run_with_gradients(decay, **split_upstream(poisoned), cu_seqlens=documents)
    for key, value in clean.items():
        per_document = key in ("state", "grad initial_state")
        other = torch.arange(4) != 1 if per_document else ~inside(300, 70, 200)
        axis = 0 if per_document else 1
        kept = other.nonzero()[:, 0]
        assert torch.equal(dirty[key].index_select(axis, kept), value.index_select(axis, kept)), key


@pytest.mark.parametrize("name", ["q", "k", "v", "initial_state", "upstream"])
def test_a_poisoned_row_touches_no_other(name, make_inputs, decay):
    inputs = make_inputs(100, batch=3)
    inputs["upstream"] = torch.ones_like(inputs["v"])
    poisoned = {key: x.clone() for key, x in inputs.items()}
    poisoned[name][1] = float("nan")
    clean = run_with_gradients(decay, **split_upstream(inputs))
    dirty = run_with_gradients(decay, **split_upstream(poisoned))
    for key, value in clean.items():
        assert torch.equal(dirty[key][::2], value[::2]), key


def split_upstream(inputs: dict[str, Tensor]) -> dict:
    rest = {name: x for name, x in inputs.items() if name != "upstream"}
    return {"inputs": rest, "upstream": inputs["upstream"]}


def inside(length: int, start: int, stop: int) -> Tensor:
    position = torch.arange(length)
    return (position >= start) & (position < stop)


def test_graph_keeps_only_the_inputs(make_inputs, decay):
    inputs = make_inputs(1024)
    leaves = [x.requires_grad_() for x in inputs.values()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        op(decay)(*leaves)
    allowed = {x.untyped_storage().data_ptr() for x in (*leaves, decay)}
    assert {x.untyped_storage().data_ptr() for x in kept} <= allowed


def test_final_state_keeps_no_other_memory_alive(make_inputs, decay):
    _, state = op(decay)(**make_inputs(1024))
    assert state.untyped_storage().nbytes() == state.nbytes


@pytest.mark.parametrize("offsets", [None, [0, 30, 30, 100]], ids=["rows", "packed"])
def test_compiled_equals_eager(offsets, make_inputs, decay, assert_agrees):
    offsets = None if offsets is None else torch.tensor(offsets)
    inputs = make_inputs(100, batch=1, states=1 if offsets is None else 3)
    compiled = torch.compile(op(decay, offsets), fullgraph=True, backend="aot_eager")
    assert_agrees(compiled, plain(decay, offsets), inputs, FP64)


@pytest.mark.parametrize("offsets", [None, [0, 3, 3, 7]], ids=["rows", "packed"])
def test_custom_ops_pass_opcheck(offsets, make_inputs, decay):
    offsets = None if offsets is None else torch.tensor(offsets)
    inputs = make_inputs(7, batch=1, states=1 if offsets is None else 3, dtype=torch.float32)
    q, k, v, state = (x.requires_grad_() for x in inputs.values())
    torch.library.opcheck(lightning_attention_op, (q, k, v, decay, state, offsets, "auto", True))
    args = [x.detach() for x in (v, state, q, k, v, decay, state)]
    torch.library.opcheck(backward_op, (*args, offsets, "auto", True))
