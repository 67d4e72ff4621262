"""A whole model over ranks against one process: the loss, and the gradient of every parameter."""

import pytest
import torch
import torch.distributed as dist

from linnet.model import Model, ModelConfig
from linnet.ops import cross_entropy, load_balancing_loss
from linnet.ops.cross_entropy import IGNORE
from linnet.parallel.context import ContextParallel

ROWS = {
    "one document": [0, 96],
    "borders on the cuts": [0, 24, 48, 72, 96],
    "borders beside the cuts": [0, 23, 50, 96],
    "many": [0, 3, 5, 6, 31, 32, 33, 60, 96],
}
PATTERN = (0, 0, 1, 0)


def model_of(recompute: bool = False) -> Model:
    config = ModelConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=len(PATTERN),
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_type_list=PATTERN,
        rotary_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    model = Model(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
    model.activation_recompute = recompute
    return model.train()


def batch(offsets):
    tokens = torch.randint(61, (1, offsets[-1]), generator=torch.Generator().manual_seed(1))
    targets = tokens.roll(-1, 1)
    targets[0, [stop - 1 for stop in offsets[1:]]] = IGNORE
    return tokens, targets, torch.tensor(offsets)


def loss_of(model, hidden, targets, stats, num_targets):
    nll = cross_entropy(hidden[0], model.lm_head.weight, targets[0]) / num_targets
    aux = torch.stack([load_balancing_loss(s.load, s.probability, "transformers") for s in stats])
    return nll + 0.01 * aux.mean()


def whole(offsets):
    model, (tokens, targets, cu_seqlens) = model_of(), batch(offsets)
    hidden, stats = model.hidden_states(tokens, cu_seqlens)
    loss = loss_of(model, hidden, targets, stats, int((targets != IGNORE).sum()))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def on_rank(group, offsets, recompute=False, **options):
    model, row = model_of(recompute), batch(offsets)
    parallel = ContextParallel(group, **options)
    parallel.apply(model)
    shard = parallel.shard(*row)
    hidden, stats = model.hidden_states(shard.tokens, shard.cu_seqlens, shard.positions)
    stats = [parallel.share(s, shard) for s in stats]
    loss = loss_of(model, hidden, shard.targets, stats, int((row[1] != IGNORE).sum()))
    loss.backward()
    parallel.sum_gradients(model)
    total = loss.detach().clone()
    dist.all_reduce(total, group=group)
    return total, {name: p.grad for name, p in model.named_parameters()}


def on_rank_with(group, offsets, options):
    return on_rank(group, offsets, **options)


def assert_same(results, expected):
    loss, gradients = expected
    for own_loss, own in results:
        assert abs(float(own_loss - loss)) < 1e-5 * float(loss)
        for name, gradient in gradients.items():
            error = (own[name] - gradient).norm() / gradient.norm().clamp(min=1e-3)
            assert error < 1e-5, (name, float(error))


OPTIONS = {
    "contiguous": {},
    "balanced": {"is_balanced": True},
    "ring of states, gathered keys": {"states": "ring", "keys": "gather"},
    "recomputed": {"recompute": True},
}


@pytest.mark.parametrize("offsets", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradients_are_those_of_one_process(ranks, offsets, size, options):
    assert_same(ranks(on_rank_with, size, offsets, options), whole(offsets))
