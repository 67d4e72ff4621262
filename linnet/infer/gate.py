"""A grammar that waits while the model thinks."""

import numpy as np
from numpy.typing import NDArray

from linnet.infer.grammar import Grammar
from linnet.infer.thinking import ThinkSpans
from linnet.infer.vocabulary import Vocabulary


class GrammarGate:
    """Says what may come next in a completion that must match a grammar.

    A model that thinks may open one think span, at the start. Inside of it anything goes but the
    end of the text; the grammar starts right after the close tag.
    """

    def __init__(
        self, grammar: Grammar, vocabulary: Vocabulary, spans: ThinkSpans, may_think: bool
    ) -> None:
        """Start at the end of a prompt.

        Raises:
            GrammarError: the grammar cannot be used.
        """
        self._matcher = vocabulary.matcher(grammar)
        self._vocabulary, self._spans = vocabulary, spans
        self._opening = vocabulary.open_tokens if may_think and not spans.is_open else ()
        """What is left of an open tag, as long as all that was written is one."""
        self._is_matching = True
        """Whether the grammar allows all that was written, be it the start of an open tag."""
        self.is_started = not spans.is_open and not self._opening
        """Whether the grammar decides alone."""

    @property
    def is_complete(self) -> bool:
        """Whether the text matches the grammar and cannot go on."""
        return self.is_started and self._matcher.is_complete

    @property
    def next_of_open_tag(self) -> int | None:
        """The token that goes on with an open tag, where there may be one."""
        return self._opening[0] if self._opening else None

    def allowed(self) -> NDArray[np.bool_]:
        """Return for each of [vocab] whether it may come next, `next_of_open_tag` apart.

        Raises:
            GrammarError: the limits of work or memory are reached, or nothing may come next.
        """
        if self.is_started or (self._opening and self._is_matching):
            return self._matcher.allowed()
        if self._opening:
            allowed = np.zeros(self._vocabulary.size, dtype=bool)
            allowed[self._opening[0]] = True
            return allowed
        allowed = np.ones(self._vocabulary.size, dtype=bool)
        allowed[list(self._vocabulary.end_ids)] = False
        return allowed

    def spills(self, token: int) -> bool:
        """Whether a token closes the think span and goes on, past what the grammar can judge."""
        if self.is_started or self._opening:
            return False
        return bool(self._spans.after_close(self._vocabulary.token_bytes(token)))

    def push(self, token: int) -> None:
        """Go on by one allowed token, which the think spans have not seen yet."""
        data = self._vocabulary.token_bytes(token)
        if self._opening and token == self._opening[0]:
            self._advance_tag(token)
        elif self.is_started or self._opening:
            self.is_started, self._opening = True, ()
            self._matcher.push(token)
            return
        self._spans.push(data)
        self.is_started = not self._opening and not self._spans.is_open

    def _advance_tag(self, token: int) -> None:
        self._opening = self._opening[1:]
        if not self._opening:
            self._matcher.reset()
            return
        self._is_matching = self._is_matching and bool(self._matcher.allowed()[token])
        if self._is_matching:
            self._matcher.push(token)
