"""The planner's arithmetic against the papers' numbers, and its search against what must hold."""

import dataclasses
import math

import pytest

from linnet.errors import ConfigError
from linnet.model.config import SOFTMAX
from linnet.model.cost import (
    cost_of,
    forward_flops,
    m1_generation_curve,
    prefill_flops,
    r1_generation_curve,
)
from linnet.model.presets import preset
from linnet.parallel.layout import Layout
from linnet.parallel.plan import (
    Efficiency,
    ServingJob,
    TrainingJob,
    both_curves,
    cluster_of,
    headline,
    reasons,
    search_any_weights,
    search_serving,
    search_training,
)
from linnet.parallel.plan.estimate import exposed_seconds
from linnet.parallel.plan.search import gpus_needed
from linnet.parallel.plan.serving_memory import weight_bytes
from linnet.parallel.plan.shape import forward_parts, prefill_parts, softmax_twin, stages_of
from linnet.parallel.plan.volumes import (
    collect_bytes,
    dispatch_bytes,
    key_exchange_bytes,
    lasp_bytes,
    state_bytes,
)

M1 = preset("minimax-m1")
K, M, GIB, MIB = 2**10, 2**20, 2**30, 2**20
EIGHT = cluster_of("8xH800")
PAPER_LENGTH = 1_024_000


def test_parameters_and_checkpoint_are_the_published_ones():
    (stage,) = stages_of(M1, 1, 8192)
    assert stage.params == cost_of(M1).params_total == 456_089_655_296
    assert cost_of(M1).params_active == 45_944_920_064
    assert cost_of(M1).checkpoint_bytes == 912_210_767_872
    assert stage.experts == 434_865_438_720
    held = sum(weight_bytes(M1, stage, Layout(), "bf16").values())
    # Serving keeps norms in fp32 beside the routers.
    assert held == pytest.approx(912_210_767_872, rel=1e-5)


@pytest.mark.parametrize("pp", [1, 2, 5, 8])
def test_stages_add_up_to_the_model(pp):
    for model in (M1, softmax_twin(M1), preset("nano")):
        stages = stages_of(model, pp, 131_072)
        assert sum(stage.params for stage in stages) == cost_of(model).params_total
        parts = [forward_parts(model, stage, 10_000) for stage in stages]
        assert sum(part.total for part in parts) == forward_flops(model, 10_000)
        parts = [prefill_parts(model, stage, 10_000) for stage in stages]
        # `prefill_flops` leaves out the last layer's routers and a norm as well.
        expected = prefill_flops(model, 10_000)
        assert sum(part.total for part in parts) == pytest.approx(expected, rel=2e-3)


def test_softmax_is_most_of_the_work_at_a_million_tokens():
    (stage,) = stages_of(softmax_twin(M1), 1, PAPER_LENGTH)
    twin = forward_parts(softmax_twin(M1), stage, PAPER_LENGTH)
    assert twin.softmax / (twin.softmax + twin.experts) == pytest.approx(0.961, abs=5e-4)
    # As the survey counts a lightning layer: all 80, beside the same experts.
    hybrid = forward_parts(M1, stages_of(M1, 1, PAPER_LENGTH)[0], PAPER_LENGTH)
    lightning = hybrid.lightning * 80 / 70
    assert lightning / (lightning + twin.experts) == pytest.approx(0.012, abs=1e-3)


@pytest.mark.parametrize(
    ("length", "ratio"), [(8 * K, 0.89), (128 * K, 2.1), (M, 5.4), (4 * M, 7.1)]
)
def test_hybrid_saves_flops_from_long_contexts_on(length, ratio):
    saved = forward_flops(softmax_twin(M1), length) / forward_flops(M1, length)
    assert saved == pytest.approx(ratio, abs=0.05 if ratio > 1 else 0.006)


def test_generation_curves_are_those_of_the_report():
    ours, theirs = m1_generation_curve(M1), r1_generation_curve()
    published = {8: 1.02, 16: 0.81, 32: 0.58, 64: 0.385, 80: 0.333, 96: 0.295, 100: 0.288}
    for length, ratio in published.items():
        found = ours.flops(length * K) / theirs.flops(length * K)
        assert found == pytest.approx(ratio, abs=0.006)


def test_cache_of_a_million_tokens():
    assert cost_of(M1).kv_bytes_per_token * PAPER_LENGTH / GIB == pytest.approx(39, abs=0.1)
    assert cost_of(M1).state_bytes / 1e9 == pytest.approx(0.29, abs=0.005)


@pytest.mark.parametrize(
    ("ranks", "mib", "keys_mib", "gib"),
    [(8, 28, 3500, 3.8), (64, 252, 3938, 34.5), (256, 1020, 3984, 140), (1024, 4092, 3996, 560)],
)
def test_volumes_of_context_parallelism(ranks, mib, keys_mib, gib):
    layout = Layout(cp=ranks)
    assert state_bytes(M1) == 4 * MIB
    assert lasp_bytes(M1, layout) == mib * MIB
    assert 70 * 2 * lasp_bytes(M1, layout) / GIB == pytest.approx(gib, rel=0.01)
    keys = key_exchange_bytes(M1, layout, PAPER_LENGTH / ranks)
    assert keys / MIB == pytest.approx(keys_mib, abs=0.6)
    assert lasp_bytes(M1, Layout(cp=ranks, tp=8)) == mib * MIB / 8


def test_all_to_all_is_48_kib_per_token_and_layer():
    # All but the rank's own part travels: with many ranks nearly all.
    layout = Layout(dp_shard=32, ep=32)
    assert dispatch_bytes(M1, layout, 1) == 48 * K * 31 / 32
    assert collect_bytes(M1, layout, 1) == 0


def test_prefill_of_a_million_tokens_is_near_the_reported_time():
    """About 140 s on 8 H800 with tp=8 and W8A16 (MiniMax-01, figure 2); within a factor of 2.5."""
    job = ServingJob(context=PAPER_LENGTH, weights="int8")
    plans = search_serving(M1, EIGHT, job, fixed={"tp": 8, "ep": 1})
    seconds = plans.best[0].phases[0].seconds
    assert 140 / 2.5 < seconds < 140 * 2.5


@pytest.mark.parametrize(("gpus", "tokens"), [("8xH800", 2 * M), ("8xH20", 5 * M)])
def test_the_published_deployments_fit(gpus, tokens):
    """vLLM with int8 experts holds 2M tokens on 8 H800 and 5M on 8 H20 (MiniMax-01's guide)."""
    job = ServingJob(context=tokens, weights="experts-int8")
    assert search_serving(M1, cluster_of(gpus), job, fixed={"tp": 8}).best


def test_four_million_tokens_fit_on_eight_gpus_with_int8_alone():
    tried = search_any_weights(M1, EIGHT, ServingJob(context=4 * M))
    assert [plans.job.weights for plans in tried] == ["bf16", "experts-int8", "int8"]
    assert [bool(plans.best) for plans in tried] == [False, False, True]
    best = tried[-1].best[0]
    assert best.layout.tp == 8 and best.memory["keys and values"] == 20 * GIB
    assert best.phases[0].limit == "softmax attention"
    text = " ".join([headline("minimax-m1", EIGHT, tried[-1]), *reasons(M1, EIGHT, tried)])
    for part in ("int8", "tp=8", "bf16 weights do not fit", "needs 126.8 GiB", "7.7 times"):
        assert part in text


def test_a_plan_that_does_not_fit_says_what_would():
    tried = search_any_weights(M1, EIGHT, ServingJob(context=16 * M))
    assert not tried[-1].best
    assert "keys and values 80.0" in headline("minimax-m1", EIGHT, tried[-1])
    assert "What would help: 16 x H800" in reasons(M1, EIGHT, tried)[-1]
    needed = gpus_needed(M1, EIGHT.device, tried[-1].job)
    assert needed == 16


def test_parts_of_a_time_add_up_and_nothing_is_negative():
    cluster = cluster_of("8x8xH100")
    fixed = {"pp": 1, "tp": 1}
    config = dataclasses.replace(M1, num_hidden_layers=16, attn_type_list=M1.attn_type_list[:16])
    job = TrainingJob(context=128 * K, batch_tokens=8 * M)
    plans = search_training(config, cluster, job, fixed=fixed)
    for estimate in plans.best:
        (step,) = estimate.phases
        assert min(step.parts.values()) >= 0 and 0 < step.mfu < Efficiency().matmul
        assert step.seconds == pytest.approx(sum(step.parts.values()))
        assert estimate.needed_bytes <= estimate.usable_bytes
        assert estimate.layout.world_size == 64
        estimate.layout.check_model(config)
    rates = [estimate.phases[0].tokens_per_s for estimate in plans.best]
    assert rates == sorted(rates, reverse=True) and len(rates) > 10


def test_recomputation_trades_memory_for_time():
    config = dataclasses.replace(M1, num_hidden_layers=8, attn_type_list=M1.attn_type_list[:8])
    job = TrainingJob(context=8 * K, batch_tokens=4 * M)
    found = [
        search_training(config, cluster_of("8x8xH200"), job, recompute=again, fixed={"pp": 1})
        for again in (False, True)
    ]
    by_layout = [
        {(e.layout, e.choices["row"]): e for e in plans.best if e.layout.cp == 1} for plans in found
    ]
    both = by_layout[0].keys() & by_layout[1].keys()
    assert both
    for key in both:
        without, again = by_layout[0][key], by_layout[1][key]
        assert without.phases[0].seconds < again.phases[0].seconds
        assert without.needed_bytes >= again.needed_bytes
    smallest = [min(plan.needed_bytes for plan in plans.values()) for plans in by_layout]
    assert smallest[0] > smallest[1]


def test_more_sequences_take_more_memory_and_give_more_tokens():
    one, many = (
        search_serving(M1, cluster_of("8xH200"), ServingJob(context=128 * K, sequences=n)).best[0]
        for n in (1, 16)
    )
    assert many.memory["keys and values"] > 8 * one.memory["keys and values"]
    assert many.phases[1].tokens_per_s > 3 * one.phases[1].tokens_per_s


def test_exchanges_hide_behind_a_share_of_the_computing():
    compute = {"experts": 10.0, "lightning attention": 1.0, "softmax attention": 4.0}
    exchange_s = {
        "tensor parallel sums": 2.0,
        "expert all-to-all": 6.0,
        "LASP+ states": 1.0,
        "keys and values": 1.0,
        "FSDP dense": 6.0,
    }
    found = exposed_seconds(exchange_s, compute, Efficiency(overlap=0.5, hidden_dispatch=0.5))
    assert found == {
        "tensor parallel sums": 2.0,
        "expert all-to-all": 3.0,
        "LASP+ states": 0.5,
        "keys and values": 0.0,
        # 7.5 s of the computing hide exchanges, of which others take 3 + 0.5 + 1.
        "FSDP weights and gradients": 3.0,
    }


def test_twin_has_softmax_attention_alone():
    twin = softmax_twin(M1)
    assert set(twin.attn_type_list) == {SOFTMAX}
    assert cost_of(twin).kv_bytes_per_token == 8 * cost_of(M1).kv_bytes_per_token


def test_curves_of_the_hybrid_stay_below_those_of_its_twin():
    weights, (hybrid, twin) = both_curves(
        M1, EIGHT, cluster_of("32x8xH800"), Efficiency(), (128 * K, M), (32 * K,)
    )
    assert weights == "experts-int8"
    for ours, theirs in zip(hybrid.serving, twin.serving, strict=True):
        assert ours.memory_bytes < theirs.memory_bytes
        assert ours.flops_per_token < theirs.flops_per_token
    assert twin.serving[1].first_token_s is None and twin.serving[1].num_gpus == 16
    assert hybrid.training[0].tokens_per_s is not None


@pytest.mark.parametrize(
    ("text", "num_gpus", "per_node", "name"),
    [("8xH800", 8, 8, "H800"), ("256x8xh100", 2048, 8, "H100"), ("2x4xA100", 8, 4, "A100-80G")],
)
def test_clusters_are_read(text, num_gpus, per_node, name):
    cluster = cluster_of(text)
    assert cluster.num_gpus == num_gpus
    assert (cluster.device.gpus_per_node, cluster.device.name) == (per_node, name)


def test_an_unknown_gpu_can_be_described():
    numbers = {"memory_gib": 10, "tflops": 20, "fp32_tflops": 5, "hbm_gbs": 300, "node_gbs": 30}
    assert cluster_of("4xMine", **numbers).device.tflops == 20
    assert cluster_of("8xH800", memory_gib=60).device.memory_gib == 60
    with pytest.raises(ConfigError, match="or give --tflops"):
        cluster_of("4xMine", **{k: v for k, v in numbers.items() if k != "tflops"})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("H800", "say 8xH800"), ("8xH900", "did you mean 'H800'"), ("12xH800", "do not fill nodes")],
)
def test_wrong_clusters_are_refused(text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        cluster_of(text)


def test_rings_share_the_network_ports_of_a_node():
    efficiency = Efficiency(links=1, node_latency_us=1e-9, network_latency_us=1e-9)
    cluster = cluster_of("2x8xH800")
    seconds = {
        "ring": cluster.transfer_s(16e9, 16, 1, efficiency),
        "all-to-all": cluster.transfer_s(15e9, 16, 1, efficiency, is_ring=False),
        "in a node": cluster.transfer_s(20e9, 8, 1, efficiency),
        "across": cluster.transfer_s(5e9, 2, 8, efficiency),
        "alone": cluster.transfer_s(5e9, 1, 1, efficiency),
    }
    expected = {"ring": 0.08, "all-to-all": 0.16, "in a node": 0.1, "across": 0.1, "alone": 0.0}
    assert all(math.isclose(seconds[k], expected[k], rel_tol=1e-6) for k in expected)


def test_a_batch_smaller_than_a_sequence_is_refused():
    with pytest.raises(ConfigError, match="raise --batch-tokens"):
        TrainingJob(context=M, batch_tokens=K)
