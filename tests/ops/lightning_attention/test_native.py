"""The C++ kernels at every level that this processor runs, against the reference in fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from linnet.errors import ConfigError
from linnet.ops import lightning_attention, native
from linnet.ops.lightning_attention import operator
from linnet.ops.lightning_attention.reference import blockwise, parallel, reference
from linnet.ops.native import compiler

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3.5e-3}

DOCUMENTS = {
    "no_document": [0],
    "all_empty": [0, 0, 0],
    "some_empty": [0, 0, 5, 5, 70, 70],
    "one_token_each": list(range(8)),
    "very_different": [0, 1, 700, 703, 960],
}
LEVELS = [name for name, needed in compiler._REQUIRED.items() if needed <= compiler._cpu_features()]
CASES = [
    # At the emulated level fp32 takes the kernels of "avx512".
    *((level, torch.float32) for level in LEVELS if level != "amx-emulated"),
    # bf16 has kernels of its own, in tiles, where there are tiles.
    *((level, torch.bfloat16) for level in LEVELS if level.startswith("amx")),
]


@pytest.fixture(params=CASES, ids=[f"{level}-{str(x)[6:]}" for level, x in CASES], autouse=True)
def case(request, monkeypatch):
    monkeypatch.setenv("LINNET_CPU_LEVEL", request.param[0])
    native.library.cache_clear()
    yield request.param
    native.library.cache_clear()


@pytest.fixture
def dtype(case):
    return case[1]


def op(decay, cu_seqlens=None):
    return lambda q, k, v, initial_state=None: lightning_attention(
        q, k, v, decay, initial_state, cu_seqlens, backend="native"
    )


def plain(decay, cu_seqlens=None, form=parallel):
    return lambda q, k, v, initial_state=None: reference(
        q, k, v, decay, initial_state, cu_seqlens, form
    )


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000])
def test_native_matches_reference(length, dtype, make_inputs, decay, assert_agrees):
    inputs = make_inputs(length, dtype=dtype)
    errors = assert_agrees(op(decay), plain(decay), inputs, TOLERANCE[dtype])
    print(f"{dtype}, T={length}:", {name: f"{error:.1e}" for name, error in errors.items()})


@pytest.mark.parametrize(("key_dim", "value_dim"), [(1, 1), (24, 40), (128, 64), (33, 96)])
def test_any_head_dims_match_reference(
    key_dim, value_dim, dtype, make_inputs, decay, assert_agrees
):
    inputs = make_inputs(150, 1, 3, key_dim, value_dim, dtype=dtype)
    assert_agrees(op(decay), plain(decay), inputs, TOLERANCE[dtype])


def test_without_initial_state(dtype, make_inputs, decay, assert_agrees):
    inputs = make_inputs(130, key_dim=16, value_dim=4, dtype=dtype)
    del inputs["initial_state"]
    assert_agrees(op(decay), plain(decay), inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS)
def test_packed_matches_reference(documents, dtype, make_inputs, decay, assert_agrees):
    inputs = make_inputs(documents[-1], 1, states=len(documents) - 1, dtype=dtype)
    offsets = torch.tensor(documents, dtype=torch.int32)
    assert_agrees(op(decay, offsets), plain(decay, offsets), inputs, TOLERANCE[dtype])


@pytest.mark.parametrize("heads", [1, 3])
def test_one_sequence_in_parts_matches_reference(heads, dtype, make_inputs, decay, assert_agrees):
    # Fewer heads than keep two threads even: the sequence itself is split.
    slopes = torch.tensor([0.003, 0.1, 5.0])[:heads]
    inputs = make_inputs(2100, 1, heads, 16, 8, dtype=dtype)
    assert_agrees(op(slopes), plain(slopes, form=blockwise), inputs, TOLERANCE[dtype])


def test_interleaved_inputs_match_reference(dtype, make_inputs, decay, assert_agrees):
    inputs = make_inputs(100, key_dim=8, value_dim=8, dtype=dtype)
    qkv = torch.cat((inputs["q"], inputs["k"], inputs["v"]), -1)
    assert_agrees(
        lambda qkv: op(decay)(*qkv.split(8, -1)),
        lambda qkv: plain(decay)(*qkv.split(8, -1)),
        {"qkv": qkv},
        TOLERANCE[dtype],
    )


def test_activated_inputs_match_reference(dtype, make_inputs, decay, assert_agrees):
    def activated(q, k, v, initial_state):
        return plain(decay)(F.silu(q), F.silu(k), F.silu(v), initial_state)

    def fused(q, k, v, initial_state):
        return lightning_attention(
            q, k, v, decay, initial_state, backend="native", activation="silu"
        )

    # Tile products round the activations to bf16 before all else.
    tolerance = 2 * TOLERANCE[dtype] if dtype == torch.bfloat16 else TOLERANCE[dtype]
    inputs = make_inputs(150, 1, 3, 33, 24, dtype=dtype)
    assert_agrees(fused, activated, inputs, tolerance)


def test_steep_decay_does_not_overflow(dtype, make_inputs, assert_agrees):
    slopes = torch.tensor([50.0, 90.0, 1e4])
    inputs = make_inputs(1000, batch=1, dtype=dtype)
    assert_agrees(op(slopes), plain(slopes), inputs, TOLERANCE[dtype])


@pytest.mark.parametrize(("dim", "length", "heads"), [(64, 1024, 8), (128, 384, 2)])
def test_bf16_stays_close_to_fp64(dim, length, heads, make_inputs, assert_agrees):
    slopes = 2.0 ** -torch.linspace(1, 8, heads)
    inputs = make_inputs(length, 1, heads, dim, dim, dtype=torch.bfloat16)
    expected = plain(slopes, form=blockwise)
    errors = assert_agrees(op(slopes), expected, inputs, TOLERANCE[torch.bfloat16])
    print("bf16:", {name: f"{error:.1e}" for name, error in errors.items()})


@pytest.mark.parametrize("poison", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_a_poisoned_document_touches_no_other(poison, dtype, make_inputs, decay):
    documents = [0, 70, 200, 201, 300]
    inputs, results = make_inputs(300, 1, states=4, dtype=dtype), []
    for value in (0.0, poison):
        leaves = {name: x.clone() for name, x in inputs.items()}
        for name in ("q", "k", "v"):
            leaves[name][:, 70:200] = value
        for leaf in leaves.values():
            leaf.requires_grad_()
        o, state = op(decay, torch.tensor(documents))(**leaves)
        torch.autograd.backward((o, state), (torch.ones_like(o), torch.ones_like(state)))
        results.append((o, state, *(x.grad for x in leaves.values())))
    for clean, dirty in zip(*results, strict=True):
        axis = 0 if clean.shape[0] == 4 else 1
        kept = range(4) if axis == 0 else itertools.chain(range(70), range(200, 300))
        index = torch.tensor([i for i in kept if axis == 1 or i != 1])
        assert torch.equal(dirty.index_select(axis, index), clean.index_select(axis, index))


@pytest.mark.parametrize("offsets", [None, [0, 30, 30, 100]], ids=["rows", "packed"])
def test_compiled_equals_eager(offsets, dtype, make_inputs, decay, assert_agrees):
    offsets = None if offsets is None else torch.tensor(offsets)
    inputs = make_inputs(100, batch=1, states=1 if offsets is None else 3, dtype=dtype)
    compiled = torch.compile(op(decay, offsets), fullgraph=True, backend="aot_eager")
    assert_agrees(compiled, plain(decay, offsets), inputs, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("dtype", "dim", "message"),
    [(torch.float64, 8, "not float64"), (torch.float32, 300, "up to 256, not K = 300")],
)
def test_what_it_does_not_take_is_named(dtype, dim, message, make_inputs, decay, caplog):
    inputs = make_inputs(3, key_dim=dim, dtype=dtype)
    with pytest.raises(ValueError, match=message):
        op(decay)(**inputs)
    operator._warn_once.cache_clear()
    for _ in range(2):
        lightning_attention(**inputs, decay=decay)
    assert len(caplog.messages) == 1
    assert message in caplog.text


def test_without_kernels_the_torch_path_is_taken(make_inputs, decay, monkeypatch, caplog):
    inputs = make_inputs(100, dtype=torch.float32)
    expected, _ = lightning_attention(**inputs, decay=decay, backend="chunked")
    monkeypatch.setattr(compiler, "_compiler", no_compiler)
    monkeypatch.setattr(
        compiler, "SOURCES", compiler.SOURCES / ".."
    )  # another hash: not in the cache
    operator._warn_once.cache_clear()
    native.library.cache_clear()
    for _ in range(2):
        o, _ = lightning_attention(**inputs, decay=decay)
        assert torch.equal(o, expected)
    assert caplog.text.count("install g++") == 1
    with pytest.raises(ValueError, match="kernels are not there"):
        lightning_attention(**inputs, decay=decay, backend="native")


def no_compiler():
    raise compiler.BuildError("no C++ compiler was found; install g++")


def test_a_level_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("LINNET_CPU_LEVEL", "sse9")
    native.library.cache_clear()
    with pytest.raises(ConfigError, match="'sse9'; expected one of amx"):
        native.library()


def test_off_means_the_torch_path(make_inputs, decay, monkeypatch):
    monkeypatch.setenv("LINNET_CPU_LEVEL", "off")
    native.library.cache_clear()
    assert native.library() is None
    assert native.level() is None
    lightning_attention(**make_inputs(3, dtype=torch.float32), decay=decay)
