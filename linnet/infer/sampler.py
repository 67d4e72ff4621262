"""The rules of one request: how its tokens are chosen, and when it stops.

What a choice does, in this order: the repetition penalty, the frequency and presence penalties,
the logit bias, what `min_tokens` and the grammar rule out; then temperature, top-k, top-p and
min-p, each on what the one before left.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, isfinite
from typing import Literal

from linnet.infer.grammar import Grammar

ReasoningEffort = Literal["low", "medium", "high"]
EFFORT_SHARES: Mapping[str, float] = {"low": 0.2, "medium": 0.5, "high": 0.8}
"""The part of `max_tokens` that a reasoning effort lets a model think."""

MAX_STOP_CHARACTERS = 4096
"""In all stop strings together: every piece of text is compared with each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RepetitionStop:
    """End a completion that is stuck: many tokens in a row, each all but certain (MiniMax-M1).

    Raises:
        ValueError: a value outside its range.
    """

    num_tokens: int = 3000
    probability: float = 0.99
    """Each must be above it, in the distribution before temperature and filters."""

    def __post_init__(self) -> None:
        _check(self, "num_tokens", 1, inf, "must be positive")
        _check(self, "probability", 0, 1, "must lie in [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Raises:
        ValueError: a value outside its range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    """0 takes the most probable token."""
    top_k: int = 0
    """Only the k most probable tokens; 0 for all."""
    top_p: float = 1.0
    """Only the most probable tokens that together reach this probability."""
    min_p: float = 0.0
    """Only tokens with at least this fraction of the most probable one's probability."""
    seed: int | None = None
    """Same seed, same text, whatever else the engine runs; None draws one."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the completion already has, once."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token for each time that the completion already has it."""
    repetition_penalty: float = 1.0
    """Divides a positive logit, and multiplies a negative one, of every token that the prompt or
    the completion already has (CTRL, section 4.1)."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    min_tokens: int = 0
    """No end token, stop token or stop string ends the completion before it has this many."""
    ignore_eos: bool = False
    """End tokens are tokens like any other; a grammar still ends where it is complete."""
    stop: tuple[str, ...] = ()
    """Texts that end the completion; they are not part of it."""
    include_stop: bool = False
    """The text keeps the stop string that ended it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, besides the model's end tokens."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many of the most probable ones."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""
    thinking_budget: int | None = None
    """Tokens inside think spans, over all spans; then the span is closed. 0 closes one at once."""
    reasoning_effort: ReasoningEffort | None = None
    """A thinking budget as a share of `max_tokens`: low 20%, medium 50%, high 80%."""
    grammar: Grammar | None = None
    """What the completion must match, apart from a think span before it."""
    repetition_stop: RepetitionStop | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_tokens"):
            _check(self, name, 0, inf, "must not be negative")
        _check(self, "top_k", 0, inf, "must be 0 (all) or positive")
        _check(self, "min_p", 0, 1, "must lie in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(self, name, -2, 2, "must lie in [-2, 2]")
        for name in ("logprobs", "prompt_logprobs", "thinking_budget"):
            _check(self, name, 0, inf, "must be None, 0 or positive")
        _check(self, "seed", 0, 2**63 - 1, "must lie in [0, 2^63)")
        if not 0 <= self.temperature < inf:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must lie in (0, 1]")
        if not 0.01 <= self.repetition_penalty <= 100:
            raise ValueError(
                f"repetition_penalty is {self.repetition_penalty}; it must lie in [0.01, 100]"
            )
        self._check_tokens()
        self._check_stop()
        if self.reasoning_effort is not None:
            self._check_effort()

    @property
    def think_tokens(self) -> int | None:
        """Tokens that may lie inside think spans, by the budget or the effort; None for any."""
        if self.reasoning_effort is None:
            return self.thinking_budget
        return int(EFFORT_SHARES[self.reasoning_effort] * self.max_tokens)

    def _check_tokens(self) -> None:
        for token, bias in self.logit_bias.items():
            if not (isfinite(bias) and abs(bias) <= 100):
                raise ValueError(
                    f"logit_bias of token {token} is {bias}; it must lie in [-100, 100]"
                )
        for name, tokens in (
            ("logit_bias", self.logit_bias),
            ("stop_token_ids", self.stop_token_ids),
        ):
            if lowest := min((token for token in tokens if token < 0), default=None):
                raise ValueError(f"{name} has token {lowest}; token ids are not negative")

    def _check_stop(self) -> None:
        if isinstance(self.stop, str) or any(not text for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; expected a tuple of non-empty strings")
        if (length := sum(map(len, self.stop))) > MAX_STOP_CHARACTERS:
            raise ValueError(
                f"stop has {length} characters in all; at most {MAX_STOP_CHARACTERS} are allowed"
            )

    def _check_effort(self) -> None:
        if self.reasoning_effort not in EFFORT_SHARES:
            raise ValueError(
                f"reasoning_effort is {self.reasoning_effort!r}; "
                f"expected one of {', '.join(EFFORT_SHARES)}"
            )
        if self.thinking_budget is not None:
            raise ValueError("thinking_budget and reasoning_effort are both given; one says it all")


def _check(rules: object, name: str, lowest: float, highest: float, expected: str) -> None:
    value = getattr(rules, name)
    # Not `value < lowest`: NaN must fail too.
    if value is not None and not lowest <= value <= highest:
        raise ValueError(f"{name} is {value}; it {expected}")
