"""The engine: what each request gets is what it would get alone, whatever else happens."""

import random
import threading
import time

import pytest
import torch

from linnet.errors import MemoryPlanError, Overloaded, PromptTooLong
from linnet.infer import Engine, EngineSettings, SamplingParams
from linnet.infer.generate import stream_tokens

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)


class Answer:
    """Collects the updates of one request."""

    def __init__(self):
        self.updates = []
        self.done = threading.Event()

    def __call__(self, update):
        assert not self.done.is_set(), "an update after the last one"
        self.updates.append(update)
        if update.finish_reason is not None:
            self.done.set()

    @property
    def text(self):
        return "".join(update.text for update in self.updates)

    @property
    def tokens(self):
        return [token for update in self.updates for token in update.tokens]

    @property
    def last(self):
        return self.updates[-1]


def settle(engine):
    """Run steps until nothing is left to do."""
    for _ in range(100_000):
        if not engine.step():
            return
    raise AssertionError("the engine does not come to an end")


def ask(engine, prompt, params=GREEDY, **options):
    answer = Answer()
    answer.ticket = engine.submit(prompt, params, answer, **options)
    return answer


def alone(model, prompt, params):
    return list(stream_tokens(model, prompt, params))


def prompt_of(rng, length):
    return [rng.randrange(10, 290) for _ in range(length)]


@pytest.fixture
def engine(model):
    """Build engines on the tiny model; small chunks, so that prompts take several steps."""

    def build(**settings):
        defaults = {"max_sequences": 4, "max_model_len": 2048, "chunk_tokens": 64}
        return Engine(model, EngineSettings(**{**defaults, **settings}))

    return build


def everything_is_free(engine):
    """Whether only kept prefixes own anything, and nothing once these are evicted."""
    while engine._prefixes is not None and engine._prefixes.evict():
        pass
    counters = engine.counters()
    return counters.kv_pages_used == counters.state_slots_used == 0


def test_one_request_gets_what_generate_gives(engine, model, rng):
    built, prompt = engine(), prompt_of(rng, 150)
    answer = ask(built, prompt)
    settle(built)
    assert answer.tokens == alone(model, prompt, GREEDY)
    assert answer.text == model.tokenizer.decode(answer.tokens)
    assert answer.last.finish_reason == "length"
    usage = answer.last.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (150, 24, 0)
    assert everything_is_free(built)


@pytest.mark.parametrize("chunk", [1, 63, 64, 65, 1000])
def test_chunks_of_any_size_give_the_same_logprobs(engine, model, rng, chunk):
    prompt = prompt_of(rng, 200)
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
    built = engine(chunk_tokens=chunk, max_sequences=2)
    answer = ask(built, prompt, params)
    settle(built)
    with torch.no_grad():
        expected = model(torch.tensor([prompt + answer.tokens])).log_softmax(-1)[0, 199:-1]
    got = [part for update in answer.updates for part in update.logprobs]
    for row, entry in zip(expected, got, strict=True):
        assert abs(row[entry.token].item() - entry.logprob) < 1e-4
        assert entry.token == entry.top[0][0] == int(row.argmax())


@pytest.mark.parametrize("length", [17, 64, 65, 127, 128, 300])
def test_cache_hit_at_every_boundary_changes_nothing(engine, model, rng, length):
    built = engine()
    shared = prompt_of(rng, length)
    first = ask(built, shared)
    settle(built)
    again = ask(built, shared)
    longer = shared + first.tokens[:-1] + prompt_of(rng, 9)
    turn = ask(built, longer)
    settle(built)
    assert first.tokens == again.tokens == alone(model, shared, GREEDY)
    assert turn.tokens == alone(model, longer, GREEDY)
    assert again.last.usage.cached_tokens == length - 1
    assert turn.last.usage.cached_tokens == length + len(first.tokens) - 1
    assert built.counters().prefix_hits_total == 2


def test_prompts_that_part_are_joined_where_they_did(engine, model, rng):
    built, shared = engine(), prompt_of(rng, 400)
    prompts = [shared + prompt_of(rng, 30) for _ in range(3)]
    cached = []
    for prompt in prompts:
        answer = ask(built, prompt)
        settle(built)
        assert answer.tokens == alone(model, prompt, GREEDY)
        cached.append(answer.last.usage.cached_tokens)
    assert cached == [0, 0, 384]


def test_question_about_a_long_text_finds_the_text(engine, model, rng):
    built, text = engine(max_model_len=4096), prompt_of(rng, 2500)
    first, second = (ask(built, text + prompt_of(rng, 20)) for _ in range(2))
    settle(built)
    third = ask(built, text + prompt_of(rng, 25))
    settle(built)
    assert third.last.usage.cached_tokens >= 2500 - 64
    assert first.last.usage.cached_tokens == second.last.usage.cached_tokens == 0


def test_disk_keeps_prefixes_across_restarts(engine, model, rng, tmp_path):
    prompt = prompt_of(rng, 300)
    first = engine(spill_folder=tmp_path)
    answer = ask(first, prompt)
    settle(first)
    first.stop()
    second = engine(spill_folder=tmp_path)
    again = ask(second, prompt)
    settle(second)
    second.stop()
    assert again.tokens == answer.tokens
    assert again.last.usage.cached_tokens == 299


def test_damaged_file_is_dropped_and_computed_again(engine, rng, tmp_path):
    prompt = prompt_of(rng, 300)
    first = engine(spill_folder=tmp_path)
    answer = ask(first, prompt)
    settle(first)
    first.stop()
    files = list(tmp_path.rglob("*.safetensors"))
    assert files
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    second = engine(spill_folder=tmp_path)
    again = ask(second, prompt)
    settle(second)
    second.stop()
    assert again.tokens == answer.tokens
    assert again.last.usage.cached_tokens == 0


def test_other_weights_find_nothing_on_disk(engine, model, rng, tmp_path):
    prompt = prompt_of(rng, 300)
    first = engine(spill_folder=tmp_path)
    ask(first, prompt)
    settle(first)
    first.stop()
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    second = engine(spill_folder=tmp_path)
    again = ask(second, prompt)
    settle(second)
    second.stop()
    assert again.last.usage.cached_tokens == 0


def test_disk_is_bounded(engine, rng, tmp_path):
    built = engine(spill_folder=tmp_path, spill_bytes=200_000)
    for _ in range(6):
        ask(built, prompt_of(rng, 300))
        settle(built)
        time.sleep(0.05)
    built.stop()
    sizes = [file.stat().st_size for file in tmp_path.rglob("*.safetensors")]
    assert 0 < sum(sizes) <= 200_000


def test_preempted_sequences_go_on_as_if_nothing_had_been(engine, model, rng):
    # 12 pages of 64 tokens: three sequences of 130 + 150 tokens need 15.
    built = engine(max_model_len=512, prefix_cache=False)
    blocks = built._blocks
    taken = [blocks._free_pages.pop() for _ in range(blocks.num_free_pages - 12)]
    params = SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)
    prompts = [prompt_of(rng, 130) for _ in range(3)]
    answers = [ask(built, prompt, params) for prompt in prompts]
    settle(built)
    assert built.counters().preemptions_total > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == alone(model, prompt, params)
    assert blocks.num_free_pages + len(taken) == blocks.memory.num_pages


@pytest.mark.parametrize("park_bytes", [0, 1 << 30])
def test_sequence_without_room_to_park_is_computed_again(engine, model, rng, park_bytes):
    built = engine(max_model_len=512, prefix_cache=False)
    built._scheduler._park_bytes = park_bytes
    sequence_prompt = prompt_of(rng, 100)
    answer = ask(built, sequence_prompt)
    for _ in range(8):
        built.step()
    (sequence,) = built._scheduler.running
    built._scheduler._park(sequence)
    assert (sequence.parked is not None) == bool(park_bytes)
    settle(built)
    assert answer.tokens == alone(model, sequence_prompt, GREEDY)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculation_changes_nothing(engine, model, rng, temperature):
    params = SamplingParams(max_tokens=60, temperature=temperature, seed=5, ignore_eos=True)
    # Repetitive, so that guesses are made.
    prompts = [prompt_of(rng, 20) * 4, prompt_of(rng, 90)]
    built = engine(speculative_tokens=4)
    answers = [ask(built, prompt, params) for prompt in prompts]
    settle(built)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == alone(model, prompt, params)
    assert everything_is_free(built)


def test_right_guesses_save_steps(engine, model, rng):
    # A model that says the same for ever is easy to guess.
    with torch.no_grad():
        model.lm_head.weight.zero_()
    params = SamplingParams(max_tokens=64, temperature=0.0, ignore_eos=True)
    built = engine(speculative_tokens=4)
    answer = ask(built, [0] * 10, params)
    settle(built)
    assert answer.tokens == [0] * 64
    assert built.counters().steps_total < 30


def test_same_seed_gives_the_same_text_in_any_company(engine, model, rng):
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=7, top_p=0.9)
    prompt = prompt_of(rng, 40)
    built = engine(prefix_cache=False)
    answers = [ask(built, prompt, params) for _ in range(2)]
    others = [ask(built, prompt_of(rng, 70)) for _ in range(5)]
    settle(built)
    lonely = ask(built, prompt, params)
    settle(built)
    assert answers[0].tokens == answers[1].tokens == lonely.tokens == alone(model, prompt, params)
    assert all(other.last.finish_reason == "length" for other in others)


def test_prompt_logprobs_are_those_of_the_whole(engine, model, rng):
    prompt = prompt_of(rng, 90)
    params = SamplingParams(max_tokens=0, prompt_logprobs=1)
    built = engine()
    answer = ask(built, prompt, params)
    settle(built)
    got = [entry for update in answer.updates for entry in update.prompt_logprobs]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).log_softmax(-1)[0]
    assert [entry.token for entry in got] == prompt
    assert got[0].logprob is None
    for row, entry in zip(expected, got[1:], strict=False):
        assert abs(row[entry.token].item() - entry.logprob) < 1e-4
    assert answer.last.finish_reason == "length" and answer.tokens == []


def test_long_prompt_does_not_hold_up_short_ones(engine, rng):
    built = engine(chunk_tokens=64, max_model_len=2048)
    long = ask(built, prompt_of(rng, 1900))
    short = ask(built, prompt_of(rng, 40))
    for _ in range(40):
        built.step()
        if short.done.is_set():
            break
    assert short.done.is_set() and not long.done.is_set()
    settle(built)
    assert long.done.is_set()


def test_stream_of_short_prompts_does_not_starve_a_long_one(engine, rng):
    built = engine(chunk_tokens=64, max_sequences=4)
    long = ask(built, prompt_of(rng, 1000), SamplingParams(max_tokens=1))
    for _ in range(200):
        if built.counters().waiting < 8:
            ask(built, prompt_of(rng, 60), SamplingParams(max_tokens=1))
        built.step()
        if long.done.is_set():
            return
    raise AssertionError("the long prompt was starved")


def test_higher_priority_starts_first(engine, rng):
    built = engine(max_sequences=1)
    order = []
    for name, priority in (("low", 0), ("high", 5)):
        built.submit(
            prompt_of(rng, 30),
            GREEDY,
            lambda update, name=name: order.append(name) if update.finish_reason else None,
            priority=priority,
        )
    settle(built)
    assert order == ["high", "low"]


def test_cancel_frees_within_a_step_and_keeps_the_prefix(engine, rng):
    built, prompt = engine(), prompt_of(rng, 1500)
    answer = ask(built, prompt)
    for _ in range(3):
        built.step()
    answer.ticket.cancel()
    built.step()
    assert answer.last.finish_reason == "cancelled"
    assert built.counters().running == 0
    again = ask(built, prompt)
    settle(built)
    assert again.last.usage.cached_tokens >= 3 * 64
    assert everything_is_free(built)


def test_cancel_of_a_waiting_request(engine, rng):
    built = engine(max_sequences=1)
    first, second = (ask(built, prompt_of(rng, 50)) for _ in range(2))
    built.step()
    second.ticket.cancel()
    settle(built)
    assert (first.last.finish_reason, second.last.finish_reason) == ("length", "cancelled")


def test_timeout_ends_with_an_error(engine, rng):
    built = engine()
    answer = ask(built, prompt_of(rng, 50), timeout_s=0.0)
    time.sleep(0.01)
    settle(built)
    assert answer.last.finish_reason == "error" and "timeout" in answer.last.error


def test_failed_step_ends_its_requests_and_the_engine_goes_on(engine, model, rng, monkeypatch):
    built, prompt = engine(), prompt_of(rng, 50)
    run = built._runner.run
    monkeypatch.setattr(built._runner, "run", lambda chunks: 1 / 0)
    answer = ask(built, prompt)
    settle(built)
    assert answer.last.finish_reason == "error" and "ZeroDivisionError" in answer.last.error
    monkeypatch.setattr(built._runner, "run", run)
    assert built.is_healthy
    good = ask(built, prompt)
    settle(built)
    assert good.tokens == alone(model, prompt, GREEDY)
    assert everything_is_free(built)


def test_nan_ends_only_the_request_that_meets_it(engine, model, rng):
    with torch.no_grad():
        model.embed_tokens.weight[299] = float("nan")
    built = engine()
    bad, good = ask(built, [*prompt_of(rng, 30), 299, 5]), ask(built, prompt_of(rng, 33))
    settle(built)
    assert bad.last.finish_reason == "error" and "not finite" in bad.last.error
    assert good.last.finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "error"),
    [([], "no tokens"), ([-1], "outside the vocabulary"), ([5, 300], "outside the vocabulary")],
)
def test_bad_prompts_are_refused(engine, prompt, error):
    with pytest.raises(ValueError, match=error):
        ask(engine(), prompt)


def test_prompt_without_room_is_refused_with_the_numbers(engine, rng):
    with pytest.raises(PromptTooLong, match=r"2,048 tokens; requests may have 2,048") as refusal:
        ask(engine(), prompt_of(rng, 2048))
    assert (refusal.value.num_tokens, refusal.value.limit) == (2048, 2048)


def test_answer_ends_where_the_room_ends(engine, rng):
    built = engine(max_model_len=256)
    answer = ask(built, prompt_of(rng, 250), SamplingParams(max_tokens=50, ignore_eos=True))
    settle(built)
    assert len(answer.tokens) == 6 and answer.last.finish_reason == "length"


def test_full_queue_is_refused(engine, rng):
    built = engine(max_queued_requests=2, max_queued_tokens=100)
    ask(built, prompt_of(rng, 60))
    with pytest.raises(Overloaded, match="try again") as refusal:
        ask(built, prompt_of(rng, 60))
    assert refusal.value.retry_after_s >= 1
    ask(built, prompt_of(rng, 30))
    with pytest.raises(Overloaded):
        ask(built, prompt_of(rng, 1))
    settle(built)
    ask(built, prompt_of(rng, 90))


def test_memory_that_does_not_suffice_is_refused_with_numbers(engine):
    with pytest.raises(MemoryPlanError, match="may be used of"):
        engine(memory_bytes=1 << 20)


@pytest.mark.parametrize("name", ["max_sequences", "chunk_tokens", "max_queued_tokens"])
def test_settings_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=name):
        EngineSettings(**{name: 0})


def test_thread_serves_and_stops(engine, model, rng):
    built = engine()
    built.start()
    prompts = [prompt_of(rng, 60) for _ in range(8)]
    answers = [ask(built, prompt) for prompt in prompts]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.done.wait(30)
        assert answer.tokens == alone(model, prompt, GREEDY)
    built.stop()
    with pytest.raises(Overloaded, match="shutting down"):
        ask(built, prompts[0])


def test_drain_finishes_what_runs(engine, rng):
    built = engine()
    built.start()
    answer = ask(built, prompt_of(rng, 60))
    built.stop(drain_s=30)
    assert answer.last.finish_reason == "length"


def test_stop_without_drain_cancels(engine, rng):
    built = engine()
    built.start()
    answer = ask(built, prompt_of(rng, 1500), SamplingParams(max_tokens=500, ignore_eos=True))
    built.stop()
    assert answer.last.finish_reason == "cancelled"


@pytest.mark.parametrize("seed", range(2))
def test_random_schedules_give_each_its_own_text(engine, model, seed):
    run_schedules(engine, model, random.Random(seed), 4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_random_schedules(engine, model):
    run_schedules(engine, model, random.Random(1000), 250)


def run_schedules(engine, model, rng, count):
    """Submit, step, cancel and preempt at random; every answer is that of its prompt alone."""
    pool = [prompt_of(rng, rng.choice((1, 2, 30, 63, 64, 65, 130, 200))) for _ in range(6)]
    prompts = pool + [base + prompt_of(rng, rng.randrange(1, 40)) for base in pool]
    known = {}
    for _ in range(count):
        built = engine(
            chunk_tokens=rng.choice((1, 7, 64, 300)),
            max_sequences=rng.choice((1, 2, 4)),
            speculative_tokens=rng.choice((0, 0, 3)),
            prefix_cache=rng.random() < 0.8,
        )
        answers = []
        for _ in range(rng.randrange(2, 8)):
            prompt = rng.choice(prompts)
            params = SamplingParams(
                max_tokens=rng.randrange(1, 20), temperature=0.0, ignore_eos=True
            )
            answers.append((prompt, params, ask(built, prompt, params)))
            for _ in range(rng.randrange(6)):
                built.step()
            if rng.random() < 0.15:
                rng.choice(answers)[2].ticket.cancel()
            if built._scheduler.running and rng.random() < 0.2:
                built._scheduler._park(rng.choice(built._scheduler.running))
        settle(built)
        for prompt, params, answer in answers:
            whole = known.setdefault(tuple(prompt), alone(model, prompt, GREEDY_LONG))
            expected = whole[: params.max_tokens]
            if answer.last.finish_reason == "cancelled":
                expected = expected[: len(answer.tokens)]
            assert answer.tokens == expected
        assert everything_is_free(built)


GREEDY_LONG = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def test_hit_does_not_evict_itself(engine, model, rng):
    # Pages for one prompt and a half: all that the second request needs is shared.
    built = engine(max_model_len=1024)
    blocks = built._blocks
    prompt = prompt_of(rng, 900)
    blocks._free_pages = blocks._free_pages[:24]
    first = ask(built, prompt)
    settle(built)
    again = ask(built, prompt)
    settle(built)
    assert again.tokens == first.tokens
    assert again.last.usage.cached_tokens == 899
