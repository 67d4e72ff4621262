"""Whole runs on many ranks: the loss curve of one process, resumed on any number of ranks."""

import resource
import signal

import pytest
import torch
import torch.distributed as dist

from linnet.errors import CheckpointError, ConfigError, DataError
from linnet.model import load_model
from linnet.parallel.launch import Launch
from linnet.train import Recipe, Trainer
from linnet.train.checkpoint import list_checkpoints
from linnet.train.metrics import read_metrics
from linnet.train.trainer import workers_of

STEPS = 8
MANY_STEPS = 50
TOKENS = 96
"""Of a row; a step has four."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(8):
        lines = [f"def f{number}_{i}(x):\n    return x * {i} + {number}\n" for i in range(12)]
        (folder / f"m{number}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def recipe_in(corpus, tmp_path_factory):
    """Return a function that gives the tables of a recipe in a folder of their own."""
    out = tmp_path_factory.mktemp("runs")

    def build(name, parallel=None, steps=STEPS, **train):
        return {
            "name": name,
            "out": str(out),
            "samples": 0,
            "data": {"source": str(corpus), "held_out": 0.2, "folder": str(out / "data")},
            "optim": {"learning_rate": 4e-3, "min_learning_rate": 1e-3, "warmup_steps": 5},
            "train": {
                "total_tokens": 4 * TOKENS * steps,
                "batch_tokens": 4 * TOKENS,
                "micro_batch_tokens": TOKENS,
                "seq_len": 64,
                "dtype": "float32",
                "eval_every": 4,
                "eval_tokens": 500,
                "final_eval_tokens": 500,
                "save_every": 5 if steps == STEPS else 20,
                **train,
            },
            "parallel": {"timeout_s": 60, "check_every": 10, **(parallel or {})},
            "model": {
                "preset": "nano",
                "vocab_size": 300,
                "hidden_size": 24,
                "intermediate_size": 20,
                "num_hidden_layers": 4,
                "attn_type_list": [0, 0, 1, 0],
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "rotary_dim": 4,
                "num_local_experts": 4,
            },
        }

    return build


def train(group, tables, resume=False, stop=None):
    """Train on the ranks of the world, to a step or to the end; return the record."""
    recipe = Recipe.from_dict(tables)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    launch = Launch(rank, size, rank) if size > 1 else None
    trainer = Trainer(recipe, resume, False, workers_of(recipe, launch, False))
    take_step = trainer._step

    def step():
        values = take_step()
        # One rank alone is told to stop; all do.
        trainer._stop_requested = rank == size - 1 and trainer.progress.step == stop
        return values

    trainer._step = step
    record = trainer.run()
    return record["summary"]["bits_per_byte"], trainer.progress.step


def train_alone(tables, resume=False, stop=None):
    trainer = Trainer(Recipe.from_dict(tables), resume, False)
    take_step = trainer._step

    def step():
        values = take_step()
        trainer._stop_requested = trainer.progress.step == stop
        return values

    trainer._step = step
    return trainer.run()["summary"]["bits_per_byte"], trainer.progress.step


def curve(tables, key="train/loss"):
    recipe = Recipe.from_dict(tables)
    return [row[key] for row in read_metrics(recipe.folder) if key in row]


@pytest.fixture(scope="module")
def reference(recipe_in):
    """Return a function that gives the tables of a trained run of one process."""
    done = {}

    def run(steps=STEPS):
        if steps not in done:
            done[steps] = recipe_in(f"one-{steps}", steps=steps)
            assert train_alone(done[steps])[1] == steps
        return done[steps]

    return run


def assert_same_curve(tables, reference):
    for key in ("train/loss", "eval/bits_per_byte", "moe/aux_loss"):
        torch.testing.assert_close(
            torch.tensor(curve(tables, key)),
            torch.tensor(curve(reference, key)),
            rtol=2e-5,
            atol=0,
            msg=lambda text, key=key: f"{key}: {text}",
        )


LAYOUTS = {
    "fsdp": {},
    "replicas": {"dp_replicate": 2, "ep": 2},
    "rows, widths": {"cp": 2, "etp": 2, "balanced": True},
    "heads, experts": {"tp": 2, "ep": 4},
    "stages, rows": {"pp": 2, "cp": 2, "ep": 2},
}
LONG = "stages, rows"


def assert_trained_as_one(ranks, tables, reference, steps):
    results = ranks(train, 4, tables)
    assert {step for _, step in results} == {steps}
    assert len({bits for bits, _ in results}) == 1
    assert_same_curve(tables, reference)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != LONG])
def test_steps_are_those_of_one_process(ranks, recipe_in, reference, layout):
    tables = recipe_in(layout.replace(", ", "-"), LAYOUTS[layout])
    assert_trained_as_one(ranks, tables, reference(), STEPS)


@pytest.mark.slow
def test_fifty_steps_are_those_of_one_process(ranks, recipe_in, reference):
    tables = recipe_in("fifty", LAYOUTS[LONG], MANY_STEPS)
    assert_trained_as_one(ranks, tables, reference(MANY_STEPS), MANY_STEPS)


def test_resumed_on_four_two_one_and_four_ranks(ranks, recipe_in, reference):
    tables = recipe_in("resumed")
    ranks(train, 4, {**tables, "parallel": {"tp": 2, "ep": 2}}, False, 2)
    ranks(train, 2, {**tables, "parallel": {"pp": 2}}, True, 4)
    train_alone(tables, True, 5)
    ranks(train, 4, {**tables, "parallel": {"cp": 2, "etp": 2}}, True, None)
    assert_same_curve(tables, reference())


def test_exported_model_is_the_one_that_was_trained(recipe_in, ranks, reference):
    tables = recipe_in("exported", {"pp": 2, "etp": 2})
    ranks(train, 4, tables)
    folder = Recipe.from_dict(tables).folder
    own = dict(load_model(folder / "model", dtype="float32").named_parameters())
    one = Recipe.from_dict(reference()).folder
    for name, value in load_model(one / "model", dtype="float32").named_parameters():
        torch.testing.assert_close(own[name], value, rtol=0, atol=2e-4, msg=name)
    assert sorted(path.name for path in folder.glob(".*")) == []
    checkpoint = list_checkpoints(folder / "checkpoints")[-1]
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "config.json",
        "sharded",
        "state.json",
    ]


def refused(group, tables, resume=False):
    try:
        train(group, tables, resume)
    except (ConfigError, DataError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return "not refused"


def refused_differently(group, tables, key, values):
    section, name = key.split(".")
    value = values[dist.get_rank(group)]
    return refused(group, {**tables, section: {**tables[section], name: value}})


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        ({"tp": 3}, "4 ranks cannot be cut: tp=3 = 3 does not divide 4"),
        ({"ep": 3}, "(1*4*1*1) are no multiple of ep*etp = 3*1 = 3"),
        ({"tp": 4}, "tp = 4 does not divide num_key_value_heads = 2"),
        ({"pp": 4, "dp_shard": 2}, "pp=4 * dp_shard=2 = 8 ranks; 4 were started"),
        ({"cp": 2, "pp": 2, "dp_shard": 3}, "cp=2 * dp_shard=3 = 12 ranks; 4 were started"),
    ],
)
def test_layouts_that_cannot_be_are_refused_with_the_arithmetic(
    ranks, recipe_in, parallel, message
):
    for text in ranks(refused, 4, recipe_in("refused", parallel)):
        assert text.startswith("ConfigError") and message in text


def test_batches_that_the_ranks_cannot_share_are_refused(ranks, recipe_in):
    for text in ranks(refused, 3, recipe_in("thirds")):
        assert "a batch of 4 rows" in text and "cannot be shared" in text
    for text in ranks(refused, 4, recipe_in("stages", {"pp": 4}, batch_tokens=2 * TOKENS)):
        assert "pp = 4 stages need as many rows in turn" in text


def test_rank_with_another_config_stops_all(ranks, recipe_in):
    tables = recipe_in("differs")
    for text in ranks(refused_differently, 4, tables, "optim.learning_rate", [4e-3] * 3 + [5e-3]):
        assert "ranks 3 have another 'optim' than rank 0" in text


def test_row_shorter_than_the_ranks_is_refused(ranks, recipe_in):
    tables = recipe_in(
        "short", {"cp": 4}, micro_batch_tokens=3, batch_tokens=12, seq_len=3, eval_tokens=50
    )
    for text in ranks(train_error, 4, tables):
        assert "a row of 3 tokens cannot be split into 4 pieces" in text


def train_error(group, tables):
    try:
        train(group, tables)
    except ValueError as error:
        return str(error)
    return "not refused"


def other_data(group, tables):
    recipe = Recipe.from_dict(tables)
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    trainer = Trainer(recipe, False, False, workers_of(recipe, Launch(rank, size, rank), False))
    if rank == 3:
        next(trainer.material.stream)
    try:
        trainer.run()
    except DataError as error:
        return str(error)
    return "not noticed"


def test_rank_that_reads_other_data_stops_all(ranks, recipe_in):
    for text in ranks(other_data, 4, recipe_in("other-data", {"tp": 2})):
        assert text == ("step 1: ranks 3 read other tokens of row 1 than rank 2; their data differ")


def full_on_rank(group, tables):
    """Train where this rank alone cannot write files of more than some bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank(group) == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        return train(group, tables)
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_of_one_rank_stops_all_with_one_line(ranks, recipe_in):
    tables = recipe_in("full")
    for message in ranks(full_on_rank, 2, tables):
        assert message.startswith("cannot write ") and "\n" not in message
        assert "rank 1: " in message and "File too large" in message
    assert list_checkpoints(Recipe.from_dict(tables).folder / "checkpoints") == []


def test_checkpoint_without_the_file_of_a_rank_is_refused(ranks, recipe_in):
    tables = recipe_in("damaged")
    ranks(train, 2, tables, False, 3)
    folder = Recipe.from_dict(tables).folder
    checkpoint = list_checkpoints(folder / "checkpoints")[-1]
    sorted((checkpoint / "sharded").iterdir())[0].unlink()
    for text in ranks(refused, 4, tables, True):
        assert text.startswith("CheckpointError") and "lacks" in text
    with pytest.raises(CheckpointError, match="lacks"):
        train_alone(tables, True, None)


def test_balance_is_written_per_layer_and_rank(ranks, recipe_in):
    tables = recipe_in("balance", {"tp": 2, "ep": 4}, steps=1)
    ranks(train, 4, tables)
    folder = Recipe.from_dict(tables).folder
    lines = (folder / "balance.txt").read_text().splitlines()
    assert lines[0].split()[:2] == ["layer", "expert"] and len(lines) == 5
    rows = [int(n) for n in lines[1].split()[6:]]
    assert len(rows) == 4 and sum(rows) == 2 * 2 * TOKENS  # two rows at a time, two experts each
