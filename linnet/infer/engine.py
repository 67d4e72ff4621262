"""The engine: many requests at once on one model, step by step, in a thread of its own."""

import itertools
import logging
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import dataclass
from pathlib import Path

from linnet.errors import EngineError, Overloaded, PromptTooLong
from linnet.infer.blocks import Blocks
from linnet.infer.choosing import Chooser
from linnet.infer.completion import choose, note_prompt_logprobs, take
from linnet.infer.generate import end_tokens
from linnet.infer.plan import make_plan
from linnet.infer.prefix_cache import PrefixCache
from linnet.infer.ranks import EngineRanks, LedMemory, LedRunner
from linnet.infer.runner import Chunk, Runner
from linnet.infer.sampler import SamplingParams
from linnet.infer.scheduler import ALONE, Scheduler
from linnet.infer.sequence import Sequence
from linnet.infer.spill import Spill
from linnet.infer.text_output import TextOutput
from linnet.infer.updates import FinishReason, Update
from linnet.infer.vocabulary import Vocabulary
from linnet.model.paged import PagedMemory
from linnet.model.transformer import Model

MAX_FAILURES = 3
"""Steps that may fail in a row before the engine counts as unhealthy."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How much an engine takes on.

    Raises:
        ValueError: a value outside its range.
    """

    max_sequences: int = 32
    """Sequences that run at once."""
    max_model_len: int | None = None
    """Tokens of a prompt and its answer; None for what the config says, if it fits."""
    memory_bytes: int | None = None
    """To use beside the weights; None for a share of what is free."""
    chunk_tokens: int = 512
    """Prompt tokens in a step while others generate; of each rank that shares prompts."""
    max_queued_requests: int = 128
    max_queued_tokens: int = 4_000_000
    prefix_cache: bool = True
    spill_folder: Path | None = None
    """Where prefixes are kept across restarts."""
    spill_bytes: int = 4 << 30
    speculative_tokens: int = 0
    """Guesses from the text so far that a step verifies for each sequence."""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "chunk_tokens", "max_queued_requests", "max_queued_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 <= self.speculative_tokens <= 16:
            raise ValueError(
                f"speculative_tokens is {self.speculative_tokens}; it must lie in [0, 16]"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineCounters:
    """What an engine has done and is doing; totals since its start."""

    running: int
    waiting: int
    waiting_tokens: int
    prompt_tokens_total: int
    cached_tokens_total: int
    completion_tokens_total: int
    finished_total: Mapping[str, int]
    """Requests by their finish reason."""
    kv_pages_used: int
    kv_pages_total: int
    state_slots_used: int
    state_slots_total: int
    prefix_entries: int
    prefix_hits_total: int
    prefix_misses_total: Mapping[str, int]
    """Requests that continued no kept prefix, by the reason."""
    preemptions_total: int
    steps_total: int
    step_seconds_total: float
    model_seconds_total: float
    """Of the steps: time within the model."""


class Ticket:
    """A request that was taken; `cancel` ends it."""

    def __init__(self, engine: "Engine", sequence: Sequence) -> None:
        self._engine, self._sequence = engine, sequence

    def cancel(self) -> None:
        """End the request within one step; an update with "cancelled" follows, unless it ended."""
        self._engine.cancel(self._sequence)


class Engine:
    """Runs requests on a model.

    Args:
        model: in eval mode.
        settings: how much to take on; bytes are those of each rank.
        ranks: that share the model, made from it; this is rank 0, and the others `follow`. None for
            a model of this process alone.

    Raises:
        EngineError: the settings ask for what several ranks do not do.
        MemoryPlanError: the memory that is free is too small for the settings.
    """

    def __init__(
        self,
        model: Model,
        settings: EngineSettings | None = None,
        ranks: EngineRanks | None = None,
    ) -> None:
        self.model, self.settings = model, settings or EngineSettings()
        settings = self.settings
        self.ranks = ranks
        if ranks is not None and settings.spill_folder is not None:
            raise EngineError(
                "prefixes are not written to disk over several ranks; leave spill_folder out"
            )
        num_parts = 1 if ranks is None else ranks.num_parts
        chunk_tokens = settings.chunk_tokens * num_parts
        self.plan = make_plan(
            model,
            max_sequences=settings.max_sequences,
            chunk_tokens=ALONE * chunk_tokens,
            max_model_len=settings.max_model_len,
            memory_bytes=settings.memory_bytes,
            config=None if ranks is None else ranks.config,
            free=None if ranks is None else ranks.free_bytes,
            num_parts=num_parts,
        )
        self.max_model_len = self.plan.max_model_len
        ends = end_tokens(model)
        self.vocabulary = Vocabulary(model.tokenizer, model.config.vocab_size, ends)
        self._blocks, self._runner = self._memory_and_runner()
        self._spill = None
        if settings.prefix_cache and settings.spill_folder is not None:
            self._spill = Spill(settings.spill_folder, model, settings.spill_bytes)
        self._prefixes = PrefixCache(self._blocks, self._spill) if settings.prefix_cache else None
        self._scheduler = Scheduler(
            self._blocks,
            self._prefixes,
            max_sequences=settings.max_sequences,
            chunk_tokens=chunk_tokens,
            turn_ids=ends,
            speculative_tokens=settings.speculative_tokens,
            # Over ranks, what a preempted sequence had taken in is computed again.
            park_bytes=self.plan.budget_bytes // 10 if ranks is None else 0,
        )
        self._arrivals = itertools.count()
        self._lock = threading.Condition()
        self._new: list[Sequence] = []
        self._thread: threading.Thread | None = None
        self._is_stopping, self._failures = False, 0
        self.is_draining = False
        self._totals: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()
        self._step_s = self._model_s = 0.0

    @property
    def is_healthy(self) -> bool:
        """Whether steps succeed."""
        return self._failures < MAX_FAILURES

    def submit(
        self,
        prompt: Tokens[int],
        params: SamplingParams,
        on_update: Callable[[Update], None],
        *,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Ticket:
        """Take a request; safe to call from any thread.

        Args:
            prompt: ids, at least one.
            params: how to choose tokens and when to stop.
            on_update: called from the engine's thread with each `Update`; it returns quickly and
                raises nothing.
            priority: higher ones start first, and are parked last.
            timeout_s: after which the request ends with an error.

        Raises:
            Overloaded: too many requests wait, or the engine is stopping.
            PromptTooLong: there is no room for the prompt and one more token.
            ValueError: the prompt is empty or has ids outside the vocabulary, or the params ask for
                what this model cannot do.
        """
        tokens = self._checked(prompt)
        sequence = Sequence(
            arrival=next(self._arrivals),
            tokens=tokens,
            num_prompt=len(tokens),
            max_tokens=min(params.max_tokens, self.max_model_len - len(tokens)),
            params=params,
            chooser=Chooser(params, tokens, self.vocabulary),
            output=TextOutput(
                self.model.tokenizer, params.stop, params.include_stop, params.min_tokens
            ),
            on_update=on_update,
            priority=priority,
            deadline_s=None if timeout_s is None else time.monotonic() + timeout_s,
        )
        with self._lock:
            self._check_queue(len(tokens))
            self._new.append(sequence)
            self._lock.notify()
        return Ticket(self, sequence)

    def cancel(self, sequence: Sequence) -> None:
        """See `Ticket.cancel`."""
        with self._lock:
            sequence.is_cancelled = True
            self._lock.notify()

    def start(self) -> None:
        """Run steps in a thread of the engine's own, whenever there is something to do."""
        self._thread = threading.Thread(target=self._loop, name="linnet-engine", daemon=True)
        self._thread.start()

    def stop(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let the others finish for a while, cancel the rest, and end."""
        self.is_draining = True
        deadline = time.monotonic() + drain_s
        while time.monotonic() < deadline and self._is_busy():
            time.sleep(0.02)
        with self._lock:
            self._is_stopping = True
            self._lock.notify()
        if self._thread is not None:
            self._thread.join()
        if self._spill is not None:
            self._spill.close()
        if self.ranks is not None:
            self.ranks.close()

    def counters(self) -> EngineCounters:
        """Return what the engine has done and is doing."""
        memory, scheduler, prefixes = self._blocks.memory, self._scheduler, self._prefixes
        with self._lock:
            waiting = [*self._new, *scheduler.waiting]
        return EngineCounters(
            running=len(scheduler.running),
            waiting=len(waiting),
            waiting_tokens=sum(len(sequence.tokens) for sequence in waiting),
            prompt_tokens_total=self._totals["prompt"],
            cached_tokens_total=self._totals["cached"],
            completion_tokens_total=self._totals["completion"],
            finished_total=dict(self._finished),
            kv_pages_used=memory.num_pages - self._blocks.num_free_pages,
            kv_pages_total=memory.num_pages,
            state_slots_used=memory.num_slots - self._blocks.num_free_slots,
            state_slots_total=memory.num_slots,
            prefix_entries=len(prefixes) if prefixes else 0,
            prefix_hits_total=prefixes.hits if prefixes else 0,
            prefix_misses_total=dict(prefixes.misses) if prefixes else {"disabled": 0},
            preemptions_total=scheduler.preemptions,
            steps_total=self._totals["steps"],
            step_seconds_total=self._step_s,
            model_seconds_total=self._model_s,
        )

    def step(self) -> bool:
        """Run one step of everything; return whether there was anything to do.

        For callers without `start`, from one thread.
        """
        self._take_in()
        begin = time.perf_counter()
        for sequence in self._scheduler.admit():
            self._totals["cached"] += sequence.cached
            sequence.on_update(Update(progress=sequence.progress()))
            self._end_if_scored(sequence)
        work = list(self._scheduler.plan())
        # Making room for one sequence may have parked another one that was planned before it.
        work = [(sequence, chunk) for sequence, chunk in work if sequence.row is chunk.row]
        if not work:
            if self.ranks is not None:
                self.ranks.keep_waiting()
            return bool(self._scheduler.waiting or self._new)
        try:
            self._run([sequence for sequence, _ in work], [chunk for _, chunk in work])
            self._failures = 0
        except Exception as error:
            self._fail([sequence for sequence, _ in work], error)
        self._totals["steps"] += 1
        self._step_s += time.perf_counter() - begin
        return True

    def _memory_and_runner(self) -> tuple[Blocks, Runner | LedRunner]:
        model, plan, ranks = self.model, self.plan, self.ranks
        sizes = (plan.num_slots, plan.num_pages, model.compute_dtype)
        if ranks is None:
            memory = PagedMemory(model.config, *sizes, model.device)
            return Blocks(memory), Runner(model, memory)
        led = LedMemory(ranks, *sizes)
        return Blocks(led), LedRunner(ranks, led)

    def _checked(self, prompt: Tokens[int]) -> array:
        if not len(prompt):
            raise ValueError("the prompt has no tokens; give at least one character")
        if len(prompt) >= self.max_model_len:
            raise PromptTooLong(len(prompt), self.max_model_len)
        low, high = min(prompt), max(prompt)
        if low < 0 or high >= self.model.config.vocab_size:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.model.config.vocab_size}"
            )
        return array("i", prompt)

    def _check_queue(self, num_tokens: int) -> None:
        if self.is_draining or not self.is_healthy:
            reason = "is shutting down" if self.is_draining else "has failed"
            raise Overloaded(f"the engine {reason}; try again later", 10.0)
        settings = self.settings
        waiting = [*self._new, *self._scheduler.waiting]
        queued = sum(len(sequence.tokens) for sequence in waiting)
        is_long = waiting and queued + num_tokens > settings.max_queued_tokens
        if len(waiting) >= settings.max_queued_requests or is_long:
            speed = self._totals["taken"] / self._step_s if self._step_s else 1000.0
            wait_s = min(60.0, max(1.0, queued / max(1.0, speed)))
            raise Overloaded(
                f"{len(waiting)} requests with {queued:,} prompt tokens wait already; "
                f"try again in {wait_s:.0f} s",
                wait_s,
            )

    def _is_busy(self) -> bool:
        with self._lock:
            return bool(self._new or self._scheduler.waiting or self._scheduler.running)

    def _loop(self) -> None:
        while True:
            with self._lock:
                # Once in a while a step without work, in which ranks hear of each other.
                if not (self._is_stopping or self._new or self._has_work()):
                    self._lock.wait(1.0)
                if self._is_stopping:
                    break
            try:
                self.step()
            except Exception:
                # Not the model but the bookkeeping; nothing that runs can be trusted.
                _log.exception("a step of the engine failed outside of the model")
                self._failures = MAX_FAILURES
                self._end_all("error", "the engine failed; see its log")
        self._end_all("cancelled", None)

    def _has_work(self) -> bool:
        return bool(self._scheduler.waiting or self._scheduler.running)

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        self._take_in()
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            self._end(sequence, reason, error=error)

    def _take_in(self) -> None:
        """Let new requests wait, and end those that were cancelled or are too late."""
        with self._lock:
            new, self._new = self._new, []
            for sequence in new:
                self._scheduler.add(sequence)
        now = time.monotonic()
        for sequence in [*self._scheduler.running, *self._scheduler.waiting]:
            if sequence.is_cancelled:
                self._end(sequence, "cancelled")
            elif sequence.deadline_s is not None and now > sequence.deadline_s:
                self._end(sequence, "error", error="the request took longer than its timeout")

    def _run(self, sequences: list[Sequence], chunks: list[Chunk]) -> None:
        starts = [sequence.length for sequence in sequences]
        begin = time.perf_counter()
        step = self._runner.run(chunks)
        self._model_s += time.perf_counter() - begin
        chosen = choose(sequences, chunks, step.logits)
        # A draft that was not right to its end is forgotten; its right part is taken in again.
        step.commit(
            [
                not chunk.is_draft or len(choices) == len(chunk.tokens)
                for chunk, choices in zip(chunks, chosen, strict=True)
            ]
        )
        for n, (sequence, chunk) in enumerate(zip(sequences, chunks, strict=True)):
            self._scheduler.mark(sequence)
            num_prompt = min(sequence.num_prompt - starts[n], len(chunk.tokens))
            self._totals["prompt"] += max(0, num_prompt)
            self._totals["taken"] += len(chunk.tokens)
            self._totals["completion"] += len(chosen[n])
            if sequence.wants_prompt_logprobs and num_prompt > 0:
                note_prompt_logprobs(sequence, starts[n], step.logits[n])
            if chosen[n]:
                self._report(sequence, take(sequence, chosen[n]))
            elif num_prompt > 0:
                self._report(sequence, Update(progress=sequence.progress()))
                self._end_if_scored(sequence)

    def _end_if_scored(self, sequence: Sequence) -> None:
        """End a request that asks for no token once its prompt is taken in but for the last."""
        if sequence.max_tokens == 0 and sequence.length >= sequence.num_prompt - 1:
            news = Update(prompt_logprobs=tuple(sequence.prompt_logprobs))
            self._report(sequence, sequence.end("length", news=news))

    def _report(self, sequence: Sequence, update: Update) -> None:
        if update.finish_reason is not None:
            self._finished[update.finish_reason] += 1
            self._scheduler.release(sequence, keep=update.finish_reason != "error")
        sequence.on_update(update)

    def _end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        self._report(sequence, sequence.end(reason, error=error))

    def _fail(self, sequences: list[Sequence], error: Exception) -> None:
        # Ranks that failed in the middle of a step are not in step any more.
        self._failures = MAX_FAILURES if self.ranks is not None else self._failures + 1
        _log.error("a step of %d requests failed", len(sequences), exc_info=error)
        line = " ".join(f"{type(error).__name__}: {error}".split())
        for sequence in sequences:
            self._end(sequence, "error", error=f"the model failed: {line}")
