"""A whole model over ranks against one process: the loss, and the gradient of every parameter.

Every axis alone and in combinations, over rows whose documents begin and end on and off the cuts.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from linnet.model import Model, ModelConfig
from linnet.model.init import initialize
from linnet.ops import cross_entropy, load_balancing_loss
from linnet.ops.cross_entropy import IGNORE
from linnet.parallel.apply import Exchanges, ParallelModel, local_part
from linnet.parallel.balance import share_stats
from linnet.parallel.context import Shard
from linnet.parallel.filling import FromSeed
from linnet.parallel.layout import Layout
from linnet.parallel.mesh import Mesh
from linnet.parallel.pipeline import Pipeline
from linnet.parallel.split import split_row

ROWS = {
    "one document": [0, 48],
    "borders on the cuts": [0, 12, 24, 36, 48],
    "borders beside the cuts": [0, 11, 25, 48],
    "many": [0, 3, 5, 6, 15, 16, 17, 30, 48],
}
COEFFICIENT = 0.01
NUM_LAYERS = 4


def config_of(capacity_factor=None, shared=0) -> ModelConfig:
    return ModelConfig(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        attn_type_list=(0, 0, 1, 0),
        rotary_dim=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.4,
        shared_intermediate_size=shared,
        capacity_factor=capacity_factor,
    )


def rows_of(offsets, num_rows):
    """Return the rows of one step, each with its own tokens."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(num_rows):
        tokens = torch.randint(61, (1, offsets[-1]), generator=generator)
        targets = tokens.roll(-1, 1)
        targets[0, [stop - 1 for stop in offsets[1:]]] = IGNORE
        rows.append((tokens, targets, torch.tensor(offsets)))
    return rows


def aux_of(stats, num_rows):
    losses = [load_balancing_loss(s.load, s.probability, "transformers") for s in stats]
    return torch.stack(losses).sum() * COEFFICIENT / NUM_LAYERS / num_rows


def num_targets(rows):
    return sum(int((targets != IGNORE).sum()) for _, targets, _ in rows)


def whole(offsets, config, num_rows=2):
    """Return loss and gradients of one process that adds up rows."""
    model = initialize(Model(config), torch.Generator().manual_seed(3)).train()
    rows = rows_of(offsets, num_rows)
    loss = torch.zeros(())
    for tokens, targets, cu_seqlens in rows:
        hidden, stats = model.hidden_states(tokens, cu_seqlens)
        nll = cross_entropy(hidden[0], model.lm_head.weight, targets[0]) / num_targets(rows)
        part = nll + aux_of(stats, num_rows)
        part.backward()
        loss += part.detach()
    return loss, {name: p.grad for name, p in model.named_parameters()}


def on_rank(group, offsets, config, sizes, exchanges, recompute):
    layout = Layout.for_world(dist.get_world_size(group), **sizes)
    mesh = Mesh(layout, dist.get_process_group_ranks(group))
    parallel = ParallelModel(config, mesh, FromSeed(3), Exchanges(**exchanges), length=48)
    parallel.model.train().activation_recompute = recompute
    parallel.stage.train()
    rows = rows_of(offsets, num_rows_of(layout))
    own = rows[place(mesh) :: layout.num_rows]
    shards = [shard_of(parallel, row) for row in own]
    loss = backward(parallel, shards, rows)
    parallel.reshard()
    dist.all_reduce(loss, group=group)
    gradients = {
        name: (parallel.boxes[name], local_part(p.grad).view(parallel.boxes[name].size))
        for name, p in parallel.parameters.items()
    }
    # Each tp rank has the loss of the same tokens.
    return loss / layout.tp, gradients


def num_rows_of(layout):
    """Return how many rows a step has: stages and ranks with a row each want more of them."""
    return 4 if layout.pp > 1 or layout.num_rows > 2 else 2


def place(mesh):
    return mesh.rank("dp_replicate") * mesh.size("dp_shard") + mesh.rank("dp_shard")


def shard_of(parallel, row):
    if parallel.context is not None:
        return parallel.context.shard(*row)
    positions = split_row(row[2], 1).positions(0)
    return Shard(row[0], row[1], positions, row[2])


def backward(parallel, shards, rows):
    total = num_targets(rows)

    def nll(hidden, targets):
        return cross_entropy(hidden[0], parallel.model.lm_head.weight, targets[0]) / total

    def aux(stats, shard):
        stats = share_stats(stats, shard.tokens.shape[1], parallel.mesh.group("cp"))
        return aux_of(stats, len(rows))

    loss = torch.zeros(())
    if parallel.mesh.size("pp") > 1:
        pipeline = Pipeline(parallel.stage, parallel.mesh.group("pp"), 24, torch.float32, nll, aux)
        losses = pipeline.run(shards)
        for part in losses:
            loss += part.detach()
        for stats, shard in zip(parallel.stage.stats, shards, strict=True):
            loss += aux(stats, shard).detach() / parallel.mesh.size("cp")
        return loss
    for shard in shards:
        hidden, stats = parallel.model.hidden_states(
            shard.tokens, shard.cu_seqlens, shard.positions
        )
        own_nll, own_aux = nll(hidden, shard.targets), aux(stats, shard)
        (own_nll + own_aux).backward()
        loss += (own_nll + own_aux / parallel.mesh.size("cp")).detach()
    return loss


def worst_error(results, expected):
    """Return the largest relative error of the loss and of any gradient, over all ranks."""
    loss, gradients = expected
    seen, worst = dict.fromkeys(gradients, 0), 0.0
    for own_loss, own in results:
        worst = max(worst, abs(float(own_loss - loss)) / float(loss))
        for name, (box, gradient) in own.items():
            seen[name] += gradient.numel()
            wanted = box.take(gradients[name])
            error = (gradient - wanted).norm() / gradients[name].norm().clamp(min=1e-3)
            assert error < 1e-5, (name, float(error))
            worst = max(worst, float(error))
    for name, count in seen.items():
        assert count >= gradients[name].numel(), f"nobody has all of {name}"
    return worst


LAYOUTS = {
    "fsdp": (2, {}, {}),
    "fsdp 4": (4, {}, {}),
    "replicas of shards": (4, {"dp_replicate": 2}, {}),
    "replicas": (2, {"dp_replicate": 2}, {}),
    "rows": (3, {"cp": 3}, {}),
    "rows, balanced": (4, {"cp": 4}, {"balanced": True}),
    "rows, rings": (4, {"cp": 4}, {"states": "ring", "keys": "ring"}),
    "rows, gathered": (4, {"cp": 4}, {"states": "all_gather", "keys": "gather"}),
    "rows, two levels": (4, {"cp": 4}, {"node_size": 2}),
    "heads": (2, {"tp": 2}, {}),
    "experts": (4, {"ep": 4}, {}),
    "experts in one group": (2, {"ep": 2}, {"token_groups": 1}),
    "experts in three groups": (2, {"ep": 2}, {"token_groups": 3}),
    "widths": (2, {"etp": 2}, {}),
    "experts, widths": (4, {"ep": 2, "etp": 2}, {}),
    "experts, replicated": (4, {"ep": 2}, {}),
    "stages": (2, {"pp": 2}, {}),
    "four stages": (4, {"pp": 4}, {}),
    "stages of shards": (4, {"pp": 2}, {}),
    "heads, rows, experts": (4, {"tp": 2, "cp": 2, "ep": 4}, {}),
    "heads, experts, widths": (4, {"tp": 2, "ep": 2, "etp": 2}, {}),
    "stages, rows, widths": (4, {"pp": 2, "cp": 2, "etp": 2}, {}),
    "stages, heads, experts": (4, {"pp": 2, "tp": 2, "ep": 2}, {}),
}


@pytest.fixture(scope="module")
def references():
    """Return loss and gradients of one process, each computed once."""
    cache = {}

    def reference(layout, row, **options):
        size, sizes, _ = LAYOUTS[layout]
        num_rows = num_rows_of(Layout.for_world(size, **sizes))
        key = (row, num_rows, *sorted(options.items()))
        if key not in cache:
            cache[key] = whole(ROWS[row], config_of(**options), num_rows)
        return cache[key]

    return reference


# Of the layouts without a row over ranks, one packing shows as much as the others.
QUICK = {"many", "borders beside the cuts"}


def is_slow(layout, row):
    over_rows = "cp" in LAYOUTS[layout][1]
    return row not in (QUICK if over_rows else {"many"})


@pytest.mark.parametrize(
    ("layout", "row"),
    [
        pytest.param(layout, row, marks=[pytest.mark.slow] * is_slow(layout, row))
        for layout in LAYOUTS
        for row in ROWS
    ],
)
def test_loss_and_gradients_are_those_of_one_process(
    ranks, references, layout, row, record_property
):
    size, sizes, exchanges = LAYOUTS[layout]
    results = ranks(on_rank, size, ROWS[row], config_of(), sizes, exchanges, False)
    error = worst_error(results, references(layout, row))
    assert error < 1e-5
    record_property("parity", [f"{size}: {layout}", row, error])


@pytest.mark.parametrize("layout", ["heads, rows, experts", "stages of shards"])
def test_recomputed_activations_change_nothing(ranks, references, layout):
    size, sizes, exchanges = LAYOUTS[layout]
    results = ranks(on_rank, size, ROWS["many"], config_of(), sizes, exchanges, True)
    assert worst_error(results, references(layout, "many")) < 1e-5


@pytest.mark.parametrize("layout", ["rows", "heads, rows, experts"])
def test_capacity_is_that_of_all_tokens_of_a_row(ranks, references, layout):
    """Each process alone would drop other slots: the first choices of a late rank go first."""
    size, sizes, exchanges = LAYOUTS[layout]
    config = config_of(capacity_factor=0.8)
    results = ranks(on_rank, size, ROWS["many"], config, sizes, exchanges, False)
    assert worst_error(results, references(layout, "many", capacity_factor=0.8)) < 1e-5


@pytest.mark.parametrize("layout", ["heads, experts, widths"])
def test_shared_expert(ranks, references, layout):
    size, sizes, exchanges = LAYOUTS[layout]
    results = ranks(on_rank, size, ROWS["many"], config_of(shared=12), sizes, exchanges, False)
    assert worst_error(results, references(layout, "many", shared=12)) < 1e-5


def test_experts_that_no_number_of_ranks_divides(ranks):
    """Three ranks: the hidden size cannot be cut evenly, so whole experts are dealt out."""
    config = replace(config_of(), hidden_size=20)
    results = ranks(on_rank, 3, ROWS["many"], config, {"cp": 3}, {}, False)
    assert worst_error(results, whole(ROWS["many"], config)) < 1e-5
