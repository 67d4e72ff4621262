"""Logprobs in the words of OpenAI's APIs."""

from collections.abc import Sequence

from linnet.infer.updates import TokenLogprob
from linnet.serve.schemas import chat
from linnet.serve.schemas.completions import CompletionLogprobs
from linnet.text import Tokenizer

_SMALLEST = -9999.0
"""Stands for minus infinity, which JSON has not."""


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[TokenLogprob]) -> chat.ChoiceLogprobs:
    """Return logprobs as chats give them."""
    return chat.ChoiceLogprobs(content=[_chat_token(tokenizer, item) for item in logprobs])


def _chat_token(tokenizer: Tokenizer, item: TokenLogprob) -> chat.TokenLogprob:
    top = [_top(tokenizer, token, logprob) for token, logprob in item.top]
    chosen = _top(tokenizer, item.token, item.logprob)
    return chat.TokenLogprob(**chosen.model_dump(), top_logprobs=top)


def _top(tokenizer: Tokenizer, token: int, logprob: float | None) -> chat.TopLogprob:
    data = tokenizer.token_bytes(token, skip_special=False)
    return chat.TopLogprob(token=_text(data), logprob=_finite(logprob), bytes=list(data))


class CompletionScribe:
    """Writes down the logprobs of one text, prompt or completion, as legacy completions do."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._offset = 0

    def write(self, logprobs: Sequence[TokenLogprob], num_top: int) -> CompletionLogprobs:
        """Return the entries for further tokens.

        Args:
            logprobs: of the tokens, in order.
            num_top: alternatives to list; the token itself is always among them.
        """
        offsets: list[int] = []
        for item in logprobs:
            offsets.append(self._offset)
            self._offset += len(self._stream.push(item.token))
        return CompletionLogprobs(
            text_offset=offsets,
            tokens=[self._name(item.token) for item in logprobs],
            token_logprobs=[
                None if item.logprob is None else _finite(item.logprob) for item in logprobs
            ],
            top_logprobs=[self._alternatives(item, num_top) for item in logprobs],
        )

    def _alternatives(self, item: TokenLogprob, num_top: int) -> dict[str, float] | None:
        if item.logprob is None:
            return None
        alternatives: dict[str, float] = {}
        for token, logprob in [*item.top[:num_top], (item.token, item.logprob)]:
            # Of two tokens with one name the first is the more probable one.
            alternatives.setdefault(self._name(token), _finite(logprob))
        return alternatives

    def _name(self, token: int) -> str:
        return _text(self._tokenizer.token_bytes(token, skip_special=False))


def _text(data: bytes) -> str:
    """Return the text of a token; one that is no text by itself is spelled in bytes."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _finite(logprob: float | None) -> float:
    return _SMALLEST if logprob is None else max(logprob, _SMALLEST)
