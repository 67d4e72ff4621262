"""One request while it is in the engine."""

import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from linnet.infer.choosing import Chooser
from linnet.infer.runner import Chunk
from linnet.infer.sampler import SamplingParams
from linnet.infer.text_output import TextOutput
from linnet.infer.updates import FinishReason, Progress, TokenLogprob, Update, Usage
from linnet.model.paged import Extract, Row


@dataclass(slots=True, eq=False)
class Sequence:
    """The tokens of a request, how many of them are taken in, and what is known of it."""

    arrival: int
    """Number of the request, in the order of submission."""
    tokens: array
    """"i" ids of the prompt and of what was generated; the last ones may not be taken in yet."""
    num_prompt: int
    max_tokens: int
    """Most tokens to generate; `params.max_tokens`, or less where the engine has no room."""
    params: SamplingParams
    chooser: Chooser
    output: TextOutput
    on_update: Callable[[Update], None]
    priority: int = 0
    deadline_s: float | None = None
    """On the monotonic clock."""
    row: Row | None = None
    """Where it lies while it runs."""
    parked: Extract | None = None
    """What it had taken in when it was preempted."""
    cached: int = 0
    """Tokens that a kept prefix saved."""
    marks: list[int] = field(default_factory=list)
    """Lengths at which its prefix is to be kept, ascending."""
    draft: list[int] = field(default_factory=list)
    """Guesses that are being verified in this step."""
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    is_cancelled: bool = False
    submitted_s: float = field(default_factory=time.monotonic)
    started_s: float | None = None
    first_token_s: float | None = None

    @property
    def length(self) -> int:
        """Tokens taken in."""
        return self.row.length if self.row else 0

    @property
    def num_pending(self) -> int:
        """Known tokens that are not taken in."""
        return len(self.tokens) - self.length

    @property
    def num_generated(self) -> int:
        """Tokens of the completion so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether the logits after every token of the prompt are needed."""
        return self.params.prompt_logprobs is not None

    def length_with(self, chunk: Chunk) -> int:
        """Return the tokens taken in once a chunk is."""
        return self.length + len(chunk.tokens)

    def note_first_token(self) -> None:
        """Remember when the first token came."""
        if self.first_token_s is None:
            self.first_token_s = time.monotonic()

    def progress(self) -> Progress:
        """Return how much of the prompt is taken in."""
        return Progress(min(self.length, self.num_prompt), self.num_prompt, self.cached)

    def usage(self) -> Usage:
        """Return what it took until now."""
        now, first, started = time.monotonic(), self.first_token_s, self.started_s
        return Usage(
            prompt_tokens=self.num_prompt,
            cached_tokens=self.cached,
            completion_tokens=self.num_generated,
            reasoning_tokens=self.chooser.reasoning_tokens,
            queue_s=(started or now) - self.submitted_s,
            first_token_s=None if first is None else first - self.submitted_s,
            total_s=now - self.submitted_s,
        )

    def end(
        self,
        reason: FinishReason,
        stop_reason: str | int | None = None,
        error: str | None = None,
        news: Update | None = None,
    ) -> Update:
        """Return the last update, with other news if there are any."""
        return replace(
            news or Update(),
            finish_reason=reason,
            stop_reason=stop_reason,
            error=error,
            usage=self.usage(),
        )
