"""What choosing a token needs to know of a model's vocabulary, made once per model."""

from collections.abc import Sequence
from functools import cached_property

from linnet.infer.grammar import Grammar, GrammarCompiler, GrammarError, GrammarMatcher
from linnet.infer.sampler import SamplingParams
from linnet.infer.thinking import CLOSE, OPEN, thinks_at_end
from linnet.text import Tokenizer, tool_format_of

_PROMPT_PIECE = 1024
"""Prompt tokens that are looked through at a time for a think tag, from the end."""


class Vocabulary:
    """The ids of a model: which end a text, which open and close a think span, and their bytes."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        end_ids: frozenset[int],
        thinks: bool | None = None,
    ) -> None:
        """Keep the parts.

        Args:
            tokenizer: None if the model has none; think spans and grammars need one.
            vocab_size: length of a row of logits.
            end_ids: tokens that end a completion.
            thinks: whether the model may open a think span before what a grammar describes; None
                for whether the tokenizer has tokens of its own for the tags, or is MiniMax-M1's,
                which spells them.
        """
        self.tokenizer, self.size, self.end_ids = tokenizer, vocab_size, end_ids
        has_tags = (len(self.open_tokens), len(self.close_tokens(0))) == (1, 1)
        is_m1 = tokenizer is not None and tool_format_of(tokenizer) == "m1"
        self.thinks = has_tags or is_m1 if thinks is None else thinks

    def check(self, params: SamplingParams) -> None:
        """Refuse rules that this vocabulary cannot keep.

        Raises:
            ValueError: a token id outside the vocabulary, or a rule that needs a tokenizer.
        """
        for name in ("logit_bias", "stop_token_ids"):
            if (highest := max(getattr(params, name), default=0)) >= self.size:
                raise ValueError(
                    f"{name} has token {highest}; the vocabulary ends at {self.size - 1}"
                )
        if self.tokenizer is None and params.think_tokens is not None:
            raise ValueError("a thinking budget needs a tokenizer; the model has none")

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that a token writes; none without a tokenizer."""
        # Special tokens too: the think tags may be some.
        return b"" if self.tokenizer is None else self.tokenizer.token_bytes(token, False)

    def starts_thinking(self, prompt: Sequence[int]) -> bool:
        """Whether a completion of `prompt` starts inside a think span; control tokens end one."""
        if self.tokenizer is None:
            return False
        text, ends = b"", self.tokenizer.control_ids - {*self.open_tokens, *self.close_tokens(0)}
        for end in range(len(prompt), 0, -_PROMPT_PIECE):
            piece = prompt[max(0, end - _PROMPT_PIECE) : end]
            turn = max((at for at, token in enumerate(piece) if token in ends), default=-1)
            text = b"".join(map(self.token_bytes, piece[turn + 1 :])) + text[: len(CLOSE)]
            if turn >= 0 or OPEN in text or CLOSE in text:
                break
        return thinks_at_end(text)

    @cached_property
    def open_tokens(self) -> tuple[int, ...]:
        """The tokens that open a think span."""
        return self._tag(OPEN)

    def close_tokens(self, num_typed: int) -> tuple[int, ...]:
        """Return the tokens that complete a close tag of which `num_typed` bytes are written."""
        whole = self._tag(CLOSE)
        return whole if len(whole) == 1 or not num_typed else self._tag(CLOSE[num_typed:])

    def matcher(self, grammar: Grammar) -> GrammarMatcher:
        """Return a matcher at the start of a grammar; compiled grammars are remembered.

        Raises:
            GrammarError: the grammar cannot be used, or the model lacks what it needs.
        """
        if self._grammars is None:
            raise GrammarError("a grammar needs a tokenizer and an end token; the model has none")
        return self._grammars.matcher(grammar)

    @cached_property
    def _grammars(self) -> GrammarCompiler | None:
        if self.tokenizer is None or not self.end_ids:
            return None
        return GrammarCompiler(self.tokenizer, self.size, self.end_ids)

    def _tag(self, tag: bytes) -> tuple[int, ...]:
        if self.tokenizer is None:
            return ()
        token = self.tokenizer.token_to_id(tag.decode())
        return tuple(self.tokenizer.encode(tag.decode())) if token is None else (token,)
