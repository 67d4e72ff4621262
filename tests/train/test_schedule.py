import pytest

from linnet.errors import ConfigError
from linnet.train.recipe import OptimSection, TrainSection
from linnet.train.schedule import batch_tokens, count_steps, learning_rate

OPTIM = OptimSection(learning_rate=1.0, min_learning_rate=0.01, warmup_steps=10, decay_fraction=0.2)


def train_section(**changes) -> TrainSection:
    return TrainSection(
        **{
            "total_tokens": 1000,
            "batch_tokens": 40,
            "micro_batch_tokens": 10,
            "seq_len": 10,
            **changes,
        }
    )


def test_rate_warms_up_linearly_stays_and_decays_exponentially():
    assert learning_rate(0, 0, OPTIM, 1000) == pytest.approx(0.1)
    assert learning_rate(9, 90, OPTIM, 1000) == pytest.approx(1.0)
    assert learning_rate(50, 799, OPTIM, 1000) == pytest.approx(1.0)
    assert learning_rate(90, 900, OPTIM, 1000) == pytest.approx(0.1)
    assert learning_rate(99, 1000, OPTIM, 1000) == pytest.approx(0.01)
    assert learning_rate(120, 1200, OPTIM, 1000) == pytest.approx(0.01)


def test_no_decay_and_no_warmup_give_a_constant_rate():
    optim = OptimSection(
        learning_rate=0.5, min_learning_rate=0.5, warmup_steps=0, decay_fraction=0.0
    )
    assert {learning_rate(s, 10 * s, optim, 100) for s in range(11)} == {0.5}


def test_batch_grows_in_stages():
    train = train_section(batch_warmup=((100, 10), (300, 20)))
    assert [batch_tokens(t, train) for t in (0, 99, 100, 299, 300, 999)] == [10, 10, 20, 20, 40, 40]


@pytest.mark.parametrize("warmup", [(), ((100, 10),), ((95, 10), (300, 20)), ((2000, 10),)])
@pytest.mark.parametrize("start", [0, 10, 100, 130, 990, 1000])
def test_count_of_steps_is_the_number_that_the_loop_takes(warmup, start):
    train = train_section(batch_warmup=warmup)
    steps, tokens = 0, start
    while tokens < train.total_tokens:
        tokens += batch_tokens(tokens, train)
        steps += 1
    assert count_steps(train, start) == steps


def test_optimizer_settings_are_the_published_ones_by_default():
    optim = OptimSection()
    assert (optim.beta1, optim.beta2, optim.weight_decay) == (0.9, 0.95, 0.1)
    assert (optim.learning_rate, optim.min_learning_rate, optim.warmup_steps) == (2e-4, 3e-5, 500)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_tokens": 45}, "no multiple of micro_batch_tokens"),
        ({"batch_warmup": [[10, 15]]}, "no multiple of micro_batch_tokens"),
        ({"batch_warmup": [[300, 20], [100, 10]]}, "ascending"),
        ({"seq_len": 11}, "seq_len"),
        ({"total_tokens": 0}, "total_tokens"),
        ({"dtype": "float8"}, "dtype"),
        ({"batch_token": 40}, "did you mean 'batch_tokens'"),
    ],
)
def test_contradictions_are_refused_by_name(changes, message, recipe):
    with pytest.raises(ConfigError, match=message):
        recipe(
            train={"batch_tokens": 40, "micro_batch_tokens": 10, "seq_len": 10, **changes},
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_learning_rate": 0.0}, "min_learning_rate"),
        ({"learning_rate": 1e-6}, "min_learning_rate <= learning_rate"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"grad_clip": -1.0}, "grad_clip"),
        ({"eps": 0.0}, "eps"),
        ({"decay_fraction": 1.5}, "decay_fraction"),
    ],
)
def test_schedules_that_cannot_be_meant_are_refused(changes, message, recipe):
    with pytest.raises(ConfigError, match=message):
        recipe(optim={"learning_rate": 1e-2, "min_learning_rate": 1e-3, **changes})
