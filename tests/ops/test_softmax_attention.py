import itertools

import pytest
import torch

from linnet.ops import continue_softmax_attention, softmax_attention
from linnet.ops.softmax_attention import softmax_attention_reference

FP64 = 1e-12
FP32 = 1e-6
BF16 = 4e-3


@pytest.fixture
def make_qkv(generator):
    def make(queries, keys=None, batch=2, heads=6, groups=2, key_dim=8, value_dim=8, dtype=None):
        keys = queries if keys is None else keys
        shapes = {
            "q": (batch, queries, heads, key_dim),
            "k": (batch, keys, groups, key_dim),
            "v": (batch, keys, groups, value_dim),
        }
        return {
            name: torch.randn(shape, generator=generator, dtype=torch.float64).to(
                dtype or torch.float64
            )
            for name, shape in shapes.items()
        }

    return make


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(0, 0), (0, 5), (1, 1), (1, 65), (63, 63), (64, 100), (65, 65), (200, 201)],
    ids=lambda n: str(n),
)
def test_attention_matches_reference(queries, keys, heads, make_qkv, assert_agrees):
    inputs = make_qkv(queries, keys, heads=heads[0], groups=heads[1])
    assert_agrees(softmax_attention, softmax_attention_reference, inputs, FP64)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FP32), (torch.bfloat16, BF16)], ids=["fp32", "bf16"]
)
def test_narrow_inputs_stay_close_to_fp64(dtype, tolerance, make_qkv, assert_agrees):
    errors = assert_agrees(
        softmax_attention, softmax_attention_reference, make_qkv(100, 200, dtype=dtype), tolerance
    )
    print(dtype, {name: f"{error:.1e}" for name, error in errors.items()})


def test_scale_and_value_width_are_free(make_qkv, assert_agrees):
    inputs = make_qkv(20, 30, value_dim=5)
    assert_agrees(
        lambda **x: softmax_attention(**x, scale=0.7),
        lambda **x: softmax_attention_reference(**x, scale=0.7),
        inputs,
        FP64,
    )


@pytest.mark.parametrize("rows", [1, 7, 40])
def test_a_continued_chunk_is_masked_in_blocks(rows, make_qkv, assert_agrees, monkeypatch):
    monkeypatch.setitem(softmax_attention.__globals__, "QUERY_BLOCK", rows)
    assert_agrees(softmax_attention, softmax_attention_reference, make_qkv(40, 90), FP64)


def test_no_query_sees_a_later_key(make_qkv):
    inputs = make_qkv(10, 30)
    before = softmax_attention(**inputs)
    for name in ("k", "v"):
        inputs[name][:, 25:] += 1
    after = softmax_attention(**inputs)
    assert torch.equal(after[:, :5], before[:, :5])
    assert not torch.isclose(after[:, 5:], before[:, 5:]).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize(
    "documents", [[0], [0, 0, 0], [0, 1, 1, 70, 100]], ids=["none", "all_empty", "mixed"]
)
def test_packed_matches_reference_and_separate(documents, dtype, make_qkv, assert_agrees):
    inputs = make_qkv(documents[-1], batch=1)
    offsets = torch.tensor(documents, dtype=dtype)
    assert_agrees(
        lambda **x: softmax_attention(**x, cu_seqlens=offsets),
        lambda **x: softmax_attention_reference(**x, cu_seqlens=offsets),
        inputs,
        FP64,
    )
    o = softmax_attention(**inputs, cu_seqlens=offsets)
    for start, stop in itertools.pairwise(documents):
        document = {name: x[:, start:stop] for name, x in inputs.items()}
        torch.testing.assert_close(o[:, start:stop], softmax_attention_reference(**document))


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_poisoned_document_touches_no_other(name, make_qkv):
    offsets = torch.tensor([0, 10, 30, 50])
    inputs = make_qkv(50, batch=1)
    results = []
    for poison in (0.0, float("nan")):
        leaves = {key: x.clone() for key, x in inputs.items()}
        leaves[name][:, 10:30] += poison
        leaves = {key: x.requires_grad_() for key, x in leaves.items()}
        o = softmax_attention(**leaves, cu_seqlens=offsets)
        o.sum().backward()
        results.append([o, *(x.grad for x in leaves.values())])
    for clean, dirty in zip(*results, strict=True):
        for span in (slice(0, 10), slice(30, 50)):
            assert torch.equal(clean[:, span], dirty[:, span])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.ones(1, 4, 6)}, r"q \(1, 4, 6\)"),
        ({"k": torch.ones(1, 4, 2, 5)}, r"k \(1, 4, 2, 5\)"),
        ({"v": torch.ones(1, 3, 2, 8)}, r"v \(1, 3, 2, 8\)"),
        ({"q": torch.ones(1, 4, 5, 8)}, "5 query heads .* 2 key heads"),
        ({"q": torch.ones(1, 5, 6, 8)}, "4 keys are fewer than 5 queries"),
        ({"q": torch.ones(1, 4, 6, 8).double()}, "got torch.float64, torch.float32"),
        ({"cu_seqlens": torch.tensor([0.0, 4.0])}, "got torch.float32"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "T = 4; got 0 to 3"),
        ({"cu_seqlens": torch.tensor([0, 5, 4])}, "entries 1 and 2 are 5, 4"),
        ({"q": torch.ones(1, 3, 6, 8), "cu_seqlens": torch.tensor([0, 3])}, "got 4 and 3"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    args = {
        "q": torch.ones(1, 4, 6, 8),
        "k": torch.ones(1, 4, 2, 8),
        "v": torch.ones(1, 4, 2, 8),
    }
    with pytest.raises(ValueError, match=message):
        softmax_attention(**(args | changes))


@pytest.mark.parametrize("sizes", [(), (5,), (3, 1, 64), (1, 1)])
@pytest.mark.parametrize("length", [1, 7, 65])
def test_segments_of_a_past_give_the_attention_of_the_whole(generator, sizes, length):
    past = sum(sizes)
    q = torch.randn(1, past + length, 4, 8, generator=generator)
    k, v = (torch.randn(1, past + length, 2, 8, generator=generator) for _ in range(2))
    expected = softmax_attention_reference(q.double(), k.double(), v.double())[:, past:]
    segments = zip(k[:, :past].split(sizes, 1), v[:, :past].split(sizes, 1), strict=True)
    new = (x[:, past:] for x in (q, k, v))
    o = continue_softmax_attention(*new, segments if sizes else ())
    torch.testing.assert_close(o.double(), expected, atol=1e-5, rtol=0)
