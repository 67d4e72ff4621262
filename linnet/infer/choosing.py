"""The one way to choose a token: `Chooser` for one request, `choose_all` for all of a step."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from linnet.infer.drawing import Penalties, Row, draw, top_ids
from linnet.infer.gate import GrammarGate
from linnet.infer.sampler import SamplingParams
from linnet.infer.thinking import ThinkSpans
from linnet.infer.updates import TokenLogprob
from linnet.infer.vocabulary import Vocabulary

_NOT_FINITE = "the logits are not finite; the weights or the input are damaged"
_RULED_OUT = np.float32(-math.inf)
_NOTHING_LEFT = "the logits are -inf for every token that the rules of the request allow"


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, and whether the completion ends with it."""

    token: int
    logprob: TokenLogprob | None = None
    """If it was asked for."""
    is_end: bool = False
    """It is an end token, and counts as one."""
    stop: Literal["stop", "repetition"] | None = None
    """Why the completion ends with this token, which is part of it unless it is `stop_token`."""
    stop_token: int | None = None
    """The token itself, if it is one of `stop_token_ids`."""


class Chooser:
    """Chooses the tokens of one request, one after the other.

    The same seed and the same logits give the same tokens, whatever else runs.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocabulary: Vocabulary
    ) -> None:
        """Prepare at the end of a prompt; may be called from any thread.

        Raises:
            ValueError: a rule that the vocabulary cannot keep.
            GrammarError: the grammar cannot be used; that is found out within seconds.
        """
        vocabulary.check(params)
        self._params, self._vocabulary = params, vocabulary
        self._random = random.Random(params.seed)
        budget = params.think_tokens
        starts_open = vocabulary.starts_thinking(prompt)
        self._spans = ThinkSpans(vocabulary.close_tokens, starts_open, budget)
        self._gate = None
        if params.grammar is not None:
            may_think = budget != 0 and (budget is not None or vocabulary.thinks)
            self._gate = GrammarGate(params.grammar, vocabulary, self._spans, may_think)
        self._penalties = None
        if (
            params.presence_penalty
            or params.frequency_penalty
            or params.repetition_penalty != 1
            or params.logit_bias
        ):
            self._penalties = Penalties(params, prompt, vocabulary.size)
        self._num_tokens = 0
        self._num_certain = 0
        self.needs_row_work = bool(
            params.temperature > 0
            or self._penalties
            or self._gate
            or params.min_tokens
            or params.logprobs is not None
            or budget is not None
            or params.repetition_stop
        )
        """False if each token is the most probable one, and nothing else is asked."""

    @property
    def reasoning_tokens(self) -> int:
        """Tokens inside think spans so far, without those of the tags."""
        return self._spans.num_tokens

    def choose(self, logits: Tensor) -> Choice:
        """Choose the next token, and go on by it.

        Args:
            logits: [vocab] fp32, on the CPU.

        Raises:
            ValueError: the logits are NaN, infinite, or -inf for all that is allowed, or the
                grammar has reached its limits. The request cannot go on.
        """
        (choice,) = choose_all([self], logits[None])
        if isinstance(choice, ValueError):
            raise choice
        return choice

    def _choose(self, logits: Tensor, row: Row) -> Choice:
        token = self._spans.forced
        if token is None:
            token = self._pick(row)
        logprob, repeats = None, False
        if self._params.logprobs is not None or self._params.repetition_stop is not None:
            scores = logits.log_softmax(-1).numpy()
            repeats = self._repeats(float(scores[token]))
            if self._params.logprobs is not None:
                logprob = _token_logprob(scores, token, self._params.logprobs)
        return self._go_on(token, logprob, repeats)

    def _pick(self, row: Row) -> int:
        if self._penalties:
            row = row.copy()
            self._penalties.apply(row)
        if self._gate and self._gate.next_of_open_tag is not None:
            # The model opens a span as often as it would without a grammar, not more often because
            # the grammar leaves so few other tokens.
            token = self._draw(row)
            if token == self._gate.next_of_open_tag:
                return token
        allowed = self._allowed()
        if allowed is not None:
            row = np.where(allowed, row, _RULED_OUT)
        token = self._draw(row)
        while self._gate and self._gate.spills(token):
            row[token] = _RULED_OUT
            token = self._draw(row)
        return token

    def _draw(self, row: Row) -> int:
        best = int(row.argmax())
        if not math.isfinite(row[best]):
            raise ValueError(_NOTHING_LEFT)
        if self._params.temperature == 0:
            return best
        return draw(row, row[best], self._params, self._random)

    def _allowed(self) -> NDArray[np.bool_] | None:
        """Return for each of [vocab] whether it may come next; None if all may."""
        is_too_short = self._num_tokens < self._params.min_tokens
        if self._gate is None and not is_too_short:
            return None
        allowed = self._gate.allowed() if self._gate else np.ones(self._vocabulary.size, dtype=bool)
        going_on = allowed.copy()
        if is_too_short or self._params.ignore_eos:
            going_on[list(self._vocabulary.end_ids)] = False
        if is_too_short:
            going_on[list(self._params.stop_token_ids)] = False
        # Where a grammar allows nothing but the end, the end it is.
        return going_on if going_on.any() else allowed

    def _go_on(
        self, token: int, logprob: TokenLogprob | None = None, repeats: bool = False
    ) -> Choice:
        counts_ends = self._gate is not None or not self._params.ignore_eos
        if counts_ends and token in self._vocabulary.end_ids:
            return Choice(token, logprob, is_end=True)
        self._num_tokens += 1
        if self._penalties:
            self._penalties.count(token)
        if self._gate:
            self._gate.push(token)
        else:
            self._spans.push(self._vocabulary.token_bytes(token))
        if token in self._params.stop_token_ids:
            return Choice(token, logprob, stop="stop", stop_token=token)
        if self._gate and self._gate.is_complete:
            return Choice(token, logprob, stop="stop")
        return Choice(token, logprob, stop="repetition" if repeats else None)

    def _repeats(self, logprob: float) -> bool:
        rule = self._params.repetition_stop
        if rule is None:
            return False
        is_certain = math.exp(logprob) > rule.probability
        self._num_certain = self._num_certain + 1 if is_certain else 0
        return self._num_certain >= rule.num_tokens


def choose_all(choosers: Sequence[Chooser], logits: Tensor) -> list[Choice | ValueError]:
    """Choose the next token of several requests, and go on by it.

    Args:
        choosers: n of them.
        logits: [n, vocab] fp32, on the CPU.

    Returns:
        For each its choice, or the error that ends it; the others are not affected.
    """
    rows = logits.numpy()
    tokens = rows.argmax(-1)
    choices: list[Choice | ValueError] = []
    for at, (chooser, token) in enumerate(zip(choosers, tokens.tolist(), strict=True)):
        try:
            # A NaN counts as the largest, so that this finds all.
            if not math.isfinite(rows[at, token]):
                raise ValueError(_NOT_FINITE)
            if chooser.needs_row_work:
                choices.append(chooser._choose(logits[at], rows[at]))
            else:
                choices.append(chooser._go_on(token))
        except ValueError as error:
            choices.append(error)
    return choices


def prompt_logprobs(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """Return how probable the tokens of a prompt were.

    Args:
        logits: [T, vocab] fp32, on the CPU; row i predicts `tokens[i]`. Nothing predicts the first
            token of a prompt.
        tokens: T ids.
        top: how many of the most probable tokens to add.
    """
    rows = zip(logits, tokens, strict=True)
    return tuple(_token_logprob(row.log_softmax(-1).numpy(), token, top) for row, token in rows)


def _token_logprob(scores: Row, token: int, top: int) -> TokenLogprob:
    ids = top_ids(scores, top)
    best = tuple(zip(ids.tolist(), scores[ids].tolist(), strict=True))
    return TokenLogprob(token, float(scores[token]), best)
