import math

import pytest
import torch

from linnet.data import PackedBatch
from linnet.model import Model
from linnet.model.init import initialize
from linnet.model.moe import RouterStats
from linnet.train import Trainer
from linnet.train.alone import step_sums
from linnet.train.loss import batch_loss, held_out_nll
from linnet.train.optim import build_optimizer, clip_gradients
from linnet.train.recipe import OptimSection
from linnet.train.trainer import router_metrics


@pytest.fixture
def model(recipe) -> Model:
    return initialize(Model(recipe().model), torch.Generator().manual_seed(0)).train()


@pytest.fixture
def batch(generator) -> PackedBatch:
    tokens = torch.randint(0, 300, (1, 51), generator=generator)
    return PackedBatch(tokens[:, :-1], tokens[:, 1:], torch.tensor([0, 20, 50]), 50)


def test_loss_is_that_of_the_full_logits(model, batch):
    loss = batch_loss(model, batch, "paper")
    logits = model(batch.tokens, cu_seqlens=batch.cu_seqlens)[0]
    expected = torch.nn.functional.cross_entropy(logits, batch.targets[0], reduction="sum")
    torch.testing.assert_close(loss.nll, expected)
    assert len(loss.router) == model.config.num_hidden_layers


@pytest.mark.parametrize("normalization", ["paper", "transformers"])
def test_auxiliary_loss_is_the_mean_over_layers_and_reaches_the_routers(
    model, batch, normalization
):
    loss = batch_loss(model, batch, normalization)
    experts = model.config.num_local_experts
    factor = experts if normalization == "transformers" else 1 / experts
    layers = [float((s.load * s.probability.detach()).sum()) * factor for s in loss.router]
    assert loss.aux.item() == pytest.approx(sum(layers) / len(layers))
    loss.aux.backward()
    for layer in model.layers:
        assert layer.block_sparse_moe.gate.weight.grad.abs().sum() > 0


def test_held_out_loss_is_measured_in_eval_mode_without_gradients(model, batch):
    total = held_out_nll(model, [batch, batch])
    assert total == pytest.approx(2 * batch_loss(model, batch, "paper").nll.item(), rel=1e-5)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_bits_per_byte_of_a_uniform_model_is_log2_of_the_vocabulary_per_token(recipe):
    trainer = Trainer(recipe(), show_progress=False)
    with torch.no_grad():
        trainer.model.lm_head.weight.zero_()
    held_out = trainer.material.held_out
    expected = math.log2(300) * held_out.num_targets / held_out.num_bytes
    assert trainer.measure(held_out) == pytest.approx(expected, rel=1e-5)


def test_optimizer_step_is_adamw_with_decay_on_matrices_only(model, batch):
    config = OptimSection(learning_rate=1e-2)
    optimizer = build_optimizer(model.parameters(), config)
    batch_loss(model, batch, "paper").nll.backward()
    chosen = {"lm_head.weight": 0.1, "norm.weight": 0.0}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if n in chosen}
    optimizer.step()
    for name, decay in chosen.items():
        parameter = dict(model.named_parameters())[name]
        # After one step both moments are unbiased: the update is the sign of the gradient.
        update = parameter.grad / (parameter.grad.abs() + config.eps)
        expected = before[name] * (1 - 1e-2 * decay) - 1e-2 * update
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-5)


def test_clipping_scales_all_gradients_to_the_joint_norm(model, batch):
    batch_loss(model, batch, "paper").nll.backward()
    norm = clip_gradients(model, 0.0)
    assert norm > 1
    assert clip_gradients(model, 0.5) == pytest.approx(norm)
    assert clip_gradients(model, 0.0) == pytest.approx(0.5, rel=1e-4)
    model.norm.weight.grad[0] = math.inf
    assert clip_gradients(model, 0.5) == math.inf


def test_router_metrics_join_the_micro_batches_of_a_step():
    def stats(load: list[float], dropped: int, entropy: float) -> RouterStats:
        tensor = torch.tensor(load)
        return RouterStats(tensor, tensor / 2, torch.tensor(dropped), torch.tensor(entropy))

    first, second = stats([2.0, 0.0], 1, 0.2), stats([1.0, 1.0], 2, 0.4)
    empty = PackedBatch(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(2), 1)
    values = router_metrics(step_sums(0.0, 0.0, [empty, empty], [[first], [second]]))
    assert values["moe/layer_00/load_max_over_mean"] == pytest.approx(1.5)
    assert values["moe/layer_00/dropped"] == 3
    assert values["moe/layer_00/entropy"] == pytest.approx(0.3)
