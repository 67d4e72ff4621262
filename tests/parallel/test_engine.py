"""The engine over ranks against the engine of one process: every answer and its probabilities."""

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import linnet
from linnet.errors import ConfigError, EngineError, MemoryPlanError
from linnet.infer import Engine, EngineSettings, SamplingParams
from linnet.infer.plan import make_plan
from linnet.infer.ranks import EngineRanks
from linnet.model import Model, ModelConfig
from linnet.parallel.inference import inference_layout
from linnet.parallel.loading import load_parallel
from linnet.parallel.mesh import Mesh

LENGTHS = (150, 3, 70, 1, 64)
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)


def config_of(**changes) -> ModelConfig:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 20,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "attn_type_list": (0, 1, 0, 1),
        "rotary_dim": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    return ModelConfig(**{**sizes, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Save a model that writes all sorts of tokens, with logits that are not flat."""
    model = Model(config_of())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5, generator=generator)
        model.embed_tokens.weight.mul_(5)
    folder = tmp_path_factory.mktemp("ranks") / "model"
    model.save(folder)
    return folder


def prompt_of(seed, length):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 290, (length,), generator=generator).tolist()


class Answer:
    """Collects the updates of one request."""

    def __init__(self, engine, prompt, params=GREEDY):
        self.updates, self.done = [], threading.Event()
        self.ticket = engine.submit(prompt, params, self)

    def __call__(self, update):
        self.updates.append(update)
        if update.finish_reason is not None:
            self.done.set()

    def facts(self):
        """Return tokens, log-probabilities, cached tokens and the reason of the end."""
        tokens = [token for update in self.updates for token in update.tokens]
        logprobs = [entry.logprob for update in self.updates for entry in update.logprobs]
        last = self.updates[-1]
        return tokens, logprobs, last.usage.cached_tokens, last.finish_reason


def settle(engine):
    for _ in range(10_000):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


def mixed(engine):
    """Several requests at once, greedy and drawn; then prompts that share what is kept."""
    drawn = SamplingParams(max_tokens=12, temperature=1.0, top_p=0.9, seed=7, ignore_eos=True)
    answers = [
        Answer(engine, prompt_of(n, length), drawn if n % 2 else GREEDY)
        for n, length in enumerate(LENGTHS)
    ]
    settle(engine)
    answers += [
        Answer(engine, prompt_of(0, 150)),
        Answer(engine, prompt_of(0, 150) + prompt_of(9, 5)),
        Answer(engine, prompt_of(0, 150)[:100] + prompt_of(8, 40), drawn),
    ]
    settle(engine)
    return [answer.facts() for answer in answers]


def aborted(engine):
    """One request ends in the middle of its text; the others go on, and it is found again."""
    prompts = [prompt_of(n, 90) for n in range(3)]
    first, *others = [Answer(engine, prompt) for prompt in prompts]
    for _ in range(6):
        engine.step()
    first.ticket.cancel()
    settle(engine)
    again = Answer(engine, prompts[0])
    settle(engine)
    assert first.facts()[-1] == "cancelled"
    return [answer.facts() for answer in (*others, again)]


def guessed(engine):
    """Text that repeats itself, so that guesses are right, and wrong ones are taken back."""
    prompt = prompt_of(5, 20) * 6
    answers = [Answer(engine, prompt), Answer(engine, prompt[:70])]
    settle(engine)
    return [answer.facts() for answer in answers]


def crowded(engine):
    """More text than pages: sequences give way and are computed again."""
    params = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    answers = [Answer(engine, prompt_of(n, 100), params) for n in range(3)]
    settle(engine)
    assert engine.counters().preemptions_total
    return [answer.facts() for answer in answers]


def scored(engine):
    """Probabilities of prompts' own tokens, of long chunks and short ones."""
    params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True, prompt_logprobs=1)
    answers = [Answer(engine, prompt_of(n, length), params) for n, length in enumerate(LENGTHS)]
    settle(engine)
    facts = []
    for answer in answers:
        tokens, _, *others = answer.facts()
        first, *scores = [x.logprob for update in answer.updates for x in update.prompt_logprobs]
        assert first is None  # nothing comes before it
        facts.append((tokens, scores, *others))
    return facts


SCENARIOS = {function.__name__: function for function in (mixed, aborted, guessed, crowded, scored)}
SETTINGS = {
    "mixed": {"chunk_tokens": 48},
    "aborted": {"chunk_tokens": 64},
    "guessed": {"speculative_tokens": 3},
    "crowded": {"prefix_cache": False},
    "scored": {"chunk_tokens": 48},
}


def engine_of(model, scenario, ranks=None):
    """Return an engine; in a crowd, one with pages for little more than the longest request."""
    settings = EngineSettings(max_sequences=4, max_model_len=512, **SETTINGS[scenario])
    engine = Engine(model, settings, ranks)
    if scenario == "crowded":
        free = engine._blocks._free_pages
        del free[: len(free) - 10]
    return engine


def on_rank(group, folder, sizes, scenario, quantization=None):
    """Run a scenario on rank 0 while the others follow; return what it says."""
    model, ranks = parts(group, folder, sizes, quantization)
    if dist.get_rank(group):
        ranks.follow()
        return None
    engine = engine_of(model, scenario, ranks)
    try:
        return SCENARIOS[scenario](engine)
    finally:
        engine.stop()


def parts(group, folder, sizes, quantization=None, timeout=None):
    world = dist.get_world_size(group)
    layout = inference_layout(linnet.load(folder, device="meta").config, world, **sizes)
    mesh = Mesh(layout, dist.get_process_group_ranks(group), timeout=timeout)
    model = load_parallel(folder, mesh, torch.float32, quantization)
    return model, EngineRanks(model, mesh)


LAYOUTS = {
    "heads and experts": (2, {}),
    "heads": (2, {"ep": 1, "etp": 1}),
    "heads and widths": (2, {"etp": 2}),
    "experts": (2, {"tp": 1}),
    "four of each": (4, {}),
    "two and two": (4, {"tp": 2, "ep": 2}),
    "prompts": (2, {"cp": 2}),
    "prompts of three": (3, {"cp": 3, "ep": 1, "etp": 1}),
    "prompts, heads and widths": (4, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}),
}


def assert_same(facts, expected):
    for own, other in zip(facts, expected, strict=True):
        assert own[0] == other[0]
        assert own[2:] == other[2:]
        assert own[1] == pytest.approx(other[1], rel=1e-5, abs=1e-5)


def slow_but(*quick, of=LAYOUTS):
    """Return layouts; the others take as long and seldom fail alone."""
    marks = {name: () if name in quick else (pytest.mark.slow,) for name in of}
    return [pytest.param(name, marks=marks[name]) for name in of]


SERVING = (
    "heads and experts",
    "experts",
    "prompts",
    "prompts of three",
    "prompts, heads and widths",
)


@pytest.mark.parametrize("layout", slow_but("heads and experts", "prompts", of=SERVING))
def test_answers_are_those_of_one_process(ranks, folder, layout):
    size, sizes = LAYOUTS[layout]
    (facts, *_) = ranks(on_rank, size, folder, sizes, "mixed")
    expected = mixed(engine_of(linnet.load(folder, "float32"), "mixed"))
    assert all(cached for _, _, cached, _ in expected[5:7])
    assert_same(facts, expected)


@pytest.mark.parametrize("sizes", [{}, {"cp": 2}], ids=str)
@pytest.mark.parametrize(
    "scenario", ["aborted", "guessed", pytest.param("crowded", marks=pytest.mark.slow), "scored"]
)
def test_whatever_happens_the_ranks_stay_in_step(ranks, folder, scenario, sizes):
    (facts, *_) = ranks(on_rank, 2, folder, sizes, scenario)
    assert_same(facts, SCENARIOS[scenario](engine_of(linnet.load(folder, "float32"), scenario)))


def test_ranks_that_share_pages_hold_more_tokens():
    model = Model(config_of())
    sizes = {"max_sequences": 2, "chunk_tokens": 64, "max_model_len": 5000, "memory_bytes": 10**8}
    whole, half, third = (make_plan(model, **sizes, num_parts=parts) for parts in (1, 2, 3))
    token = 2 * 2 * 4 * 8 * 4  # two layers, keys and values of four groups, fp32
    assert [plan.page_bytes for plan in (whole, half, third)] == [
        64 * token,
        32 * token,
        22 * token,
    ]
    assert whole.slot_bytes == half.slot_bytes and whole.num_pages == half.num_pages
    assert half.kv_bytes < whole.kv_bytes and half.workspace_bytes > whole.workspace_bytes


def hidden_on_rank(group, folder, sizes, tokens, quantization=None):
    model, _ = parts(group, folder, sizes, quantization)
    with torch.no_grad():
        return model(tokens)


@pytest.mark.parametrize("quantization", [None, "int8"])
@pytest.mark.parametrize("layout", slow_but("heads and experts", "four of each"))
def test_logits_are_those_of_one_process(ranks, folder, layout, quantization):
    size, sizes = LAYOUTS[layout]
    tokens = torch.tensor([prompt_of(3, 75)])
    whole = linnet.load(folder, "float32", quantization=quantization)
    with torch.no_grad():
        expected = whole(tokens)
    # Where columns are cut, each rank's part of a row has a scale of its own, the closer one.
    is_cut = quantization is not None and layout != "experts"
    tolerance = 0.05 if is_cut else 1e-5
    for logits in ranks(hidden_on_rank, size, folder, sizes, tokens, quantization):
        error = (logits - expected).norm() / expected.norm()
        assert error < tolerance, float(error)


def test_int8_answers_over_ranks_of_experts_are_those_of_one_process(ranks, folder):
    (facts, *_) = ranks(on_rank, 2, folder, {"tp": 1}, "mixed", "int8")
    model = linnet.load(folder, "float32", quantization="int8")
    assert_same(facts, mixed(engine_of(model, "mixed")))


def refused_on_rank(group, folder, settings):
    model, ranks = parts(group, folder, {})
    if dist.get_rank(group):
        ranks.follow()
        return None
    try:
        Engine(model, EngineSettings(**settings), ranks)
    except EngineError as error:
        return type(error), str(error)
    finally:
        ranks.close()


def test_settings_that_ranks_cannot_keep_are_refused(ranks, folder, tmp_path):
    ((kind, message), _) = ranks(refused_on_rank, 2, folder, {"spill_folder": tmp_path})
    assert kind is EngineError and "not written to disk over several ranks" in message
    ((kind, _), _) = ranks(refused_on_rank, 2, folder, {"memory_bytes": 1000})
    assert kind is MemoryPlanError


def broken_on_rank(group, folder):
    model, ranks = parts(group, folder, {})
    if dist.get_rank(group):
        # The beginning, and the one step that is told.
        return [ranks._channel.receive() for _ in range(2)]
    engine = Engine(model, EngineSettings(max_sequences=2, max_model_len=64), ranks)
    engine._runner._own.run = fail
    answer = Answer(engine, prompt_of(0, 5))
    settle(engine)
    try:
        Answer(engine, prompt_of(2, 5))
    except EngineError as error:
        return answer.updates[-1].error, engine.is_healthy, str(error)
    finally:
        engine.stop()


def fail(chunks):
    raise RuntimeError("out of memory")


def test_a_failed_step_ends_the_engine_for_good(ranks, folder):
    ((message, is_healthy, refusal), _) = ranks(broken_on_rank, 2, folder)
    assert message == "the model failed: RuntimeError: out of memory"
    assert not is_healthy and "the engine has failed" in refusal


def idle_on_rank(group, folder, seconds):
    """Leave the engine idle for longer than a rank waits, then ask it something."""
    linnet.infer.ranks.HEARTBEAT_S = 0.5
    model, ranks = parts(group, folder, {}, timeout=timedelta(seconds=3))
    if dist.get_rank(group):
        ranks.follow()
        return None
    engine = Engine(model, EngineSettings(max_sequences=2, max_model_len=64), ranks)
    engine.start()
    try:
        time.sleep(seconds)
        answer = Answer(engine, prompt_of(0, 5))
        assert answer.done.wait(30)
        return answer.facts()[-1]
    finally:
        engine.stop()


@pytest.mark.slow
def test_an_idle_engine_stays_in_touch(ranks, folder):
    assert ranks(idle_on_rank, 2, folder, 5.0) == ["length", None]


def silent_on_rank(group, folder):
    _, ranks = parts(group, folder, {}, timeout=timedelta(seconds=1))
    if not dist.get_rank(group):
        time.sleep(2)
        return None
    try:
        ranks.follow()
    except EngineError as error:
        return str(error)


def test_a_rank_does_not_wait_for_ever_for_a_silent_one(ranks, folder):
    (_, message) = ranks(silent_on_rank, 2, folder)
    assert message.startswith("rank 0 has ended, or is silent for too long")


@pytest.mark.parametrize(
    ("heads", "groups", "experts", "world", "sizes", "expected"),
    [
        (8, 4, 4, 4, {}, (4, 1, 4, 1)),
        (8, 4, 2, 4, {}, (4, 1, 2, 2)),
        (5, 1, 8, 2, {}, (1, 2, 2, 1)),
        (64, 8, 32, 16, {}, (8, 2, 16, 1)),
        (8, 4, 4, 4, {"cp": 2}, (2, 2, 4, 1)),
        (8, 4, 4, 4, {"tp": 2, "etp": 2}, (2, 2, 2, 2)),
    ],
    ids=str,
)
def test_layout_takes_what_divides(heads, groups, experts, world, sizes, expected):
    config = config_of(
        num_attention_heads=heads, num_key_value_heads=groups, num_local_experts=experts
    )
    layout = inference_layout(config, world, **sizes)
    assert (layout.tp, layout.dp_shard, layout.ep, layout.etp) == expected


@pytest.mark.parametrize(
    ("world", "sizes", "message"),
    [
        (8, {"tp": 8}, "tp = 8 does not divide num_key_value_heads = 4"),
        (2, {"tp": 3}, "2 ranks cannot be cut: tp=3 = 3 does not divide 2"),
        (4, {"ep": 3}, "4 ranks per stage .* no multiple of ep\\*etp"),
        (2, {"tp": 1, "cp": 3}, "cp=3 .* = 3 ranks; 2 were started"),
        (4, {"tp": 2, "cp": 4}, "= 8 ranks; 4 were started"),
        (3, {"cp": 3, "etp": 3}, "etp = 3 does not divide intermediate_size = 20"),
        (65, {"tp": 1}, "65 ranks .65 / tp = 1. cannot share pages of 64 tokens"),
    ],
    ids=str,
)
def test_layout_that_does_not_divide_is_refused(world, sizes, message):
    with pytest.raises(ConfigError, match=message):
        inference_layout(config_of(), world, **sizes)
