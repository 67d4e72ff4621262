"""What the engine tells the one who asked, while a request runs: small frozen records."""

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length", "repetition", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How probable a token was, in the distribution before temperature and filters."""

    token: int
    logprob: float | None
    """Natural logarithm; None for the first token of a prompt, which nothing predicts."""
    top: tuple[tuple[int, float], ...] = ()
    """The most probable tokens and their logprobs, best first."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a prompt has been taken in."""

    processed: int
    """Tokens of the prompt that are done, cached ones included."""
    total: int
    cached: int
    """Tokens that a prefix cache already held."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a finished request took."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    """Completion tokens inside think spans."""
    queue_s: float
    """Seconds from submission until the first chunk of the prompt ran."""
    first_token_s: float | None
    """Seconds from submission to the first token; None if there was none."""
    total_s: float


@dataclass(frozen=True, slots=True)
class Update:
    """News of one request: new text, prefill progress, or its end."""

    text: str = ""
    """New text, which never ends inside a character or what may become a stop string."""
    tokens: tuple[int, ...] = ()
    """New token ids, an end token and stop strings' tokens included."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens`, if they were asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """One for each token of the prompt, if they were asked for; in the first update with tokens."""
    progress: Progress | None = None
    finish_reason: FinishReason | None = None
    """Set in the last update, and only there."""
    stop_reason: str | int | None = None
    """The stop string or token id that ended it, if one did."""
    error: str | None = None
    """One line, when `finish_reason` is "error"."""
    usage: Usage | None = None
    """In the last update."""
