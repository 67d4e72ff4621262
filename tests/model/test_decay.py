import pytest
import torch

from linnet.model.decay import head_slopes, layer_slopes


def test_first_layer_of_the_published_model_has_the_published_slopes():
    slopes = layer_slopes(0, 80, 64)
    # SPEC 1.2 prints the base slopes; layer 0 multiplies them by 1 + 1e-5.
    assert slopes.shape == (64,) and slopes.dtype == torch.float32
    expected = {0: 0.917004, 1: 0.840896, 63: 0.00390625}
    for head, slope in expected.items():
        assert head_slopes(64)[head] == pytest.approx(slope, abs=5e-7)
        assert slopes[head].item() == pytest.approx(slope * (1 + 1e-5), abs=5e-7)


@pytest.mark.parametrize(
    ("layer", "factor"), [(0, 1.00001), (1, 1 - 1 / 79 + 1e-5), (78, 0.01267), (79, 1e-5)]
)
def test_later_layers_forget_more_slowly(layer, factor):
    ratio = layer_slopes(layer, 80, 64) / torch.tensor(head_slopes(64))
    assert torch.allclose(ratio, torch.full((64,), factor), rtol=1e-3, atol=1e-9)


def test_other_head_counts_follow_alibi():
    # The largest power of two below, then every other slope of twice that power.
    assert head_slopes(2) == [2**-4, 2**-8]
    assert head_slopes(3) == [2**-4, 2**-8, 2**-2]
    assert head_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert len(head_slopes(12)) == 12 and len(set(head_slopes(12))) == 12


def test_transformers_rule_ignores_that_heads_are_no_power_of_two():
    assert head_slopes(3, "transformers") == [2 ** (-8 * (h + 1) / 3) for h in range(3)]
    assert head_slopes(4, "transformers") == head_slopes(4)


@pytest.mark.parametrize("layer", [0, 3, 6, 7])
def test_transformers_rule_is_the_formula_of_its_source(layer):
    base = 1 / (2 ** (8 / 6))
    factor = 1 - layer / (8 - 1 + 1e-5) + 1e-5
    expected = base ** (torch.arange(6, dtype=torch.float64) + 1) * factor
    assert torch.allclose(layer_slopes(layer, 8, 6, "transformers").double(), expected, rtol=1e-6)


@pytest.mark.parametrize("layer", [0, 3, 7])
def test_level_slopes_are_those_of_the_heads_in_every_layer(layer):
    assert layer_slopes(layer, 8, 5, "level").tolist() == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1]


@pytest.mark.parametrize("rule", ["published", "transformers"])
def test_single_layer_has_finite_slopes(rule):
    slopes = layer_slopes(0, 1, 4, rule)
    assert torch.allclose(slopes, torch.tensor(head_slopes(4)) * (1 + 1e-5))


def test_slopes_have_values_inside_a_meta_device_context():
    with torch.device("meta"):
        assert layer_slopes(0, 8, 4).device.type == "cpu"
