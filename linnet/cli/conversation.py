"""A conversation with an engine: what was said, and how the next prompt is made of it."""

from dataclasses import dataclass
from typing import Any

from linnet.cli.answering import Answer, Display, as_message, stream_answer
from linnet.infer import Engine, SamplingParams
from linnet.text import Tokenizer, chat_template_of, encode_chat

Message = dict[str, Any]  # Any: JSON


@dataclass(frozen=True, slots=True)
class _LastTurn:
    """How the last turn stands in the next prompt."""

    encoded: list[int]
    """Its prompt, as the messages are encoded."""
    tokens: list[int]
    """Its prompt as the model saw it, and the answer as the model wrote it."""


class Conversation:
    """Asks and remembers.

    The whole conversation is the prompt of each turn; the engine keeps what it has computed of it,
    so that a turn takes in little more than what is new.

    Args:
        engine: started.
        params: how to choose tokens.
        display: where answers are shown.
        system: what the model is told first.

    Raises:
        ConfigError: the model knows no chat format.
    """

    def __init__(
        self, engine: Engine, params: SamplingParams, display: Display, system: str | None = None
    ) -> None:
        self.engine, self.system = engine, system
        self.turns: list[Message] = []
        """Of the user and the assistant."""
        self.last: Answer | None = None
        self._params, self._display = params, display
        self._template = chat_template_of(engine.model.tokenizer)
        self._last_turn: _LastTurn | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's."""
        tokenizer = self.engine.model.tokenizer
        assert tokenizer is not None
        return tokenizer

    @property
    def messages(self) -> list[Message]:
        """All that was said, the system's message first."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, *self.turns]

    def ask(self, text: str) -> Answer:
        """Say something and show the answer; a turn that got no answer is forgotten.

        Raises:
            EngineError: the conversation has grown too long, or the engine failed.
            ValueError, DataError: the messages cannot be rendered.
        """
        question = {"role": "user", "content": text}
        encoded = encode_chat(self.tokenizer, [*self.messages, question], template=self._template)
        prompt = self._as_seen(encoded)
        self.last = stream_answer(self.engine, prompt, self._params, self._display)
        if self.last.text:
            self.turns += [question, as_message(self.last, self._template)]
            self._last_turn = self._as_said(encoded, prompt, self.last)
        return self.last

    def reset(self) -> None:
        """Forget all turns, but not what the model is told first."""
        self.turns, self.last, self._last_turn = [], None, None

    def _as_seen(self, encoded: list[int]) -> list[int]:
        """Return a prompt in which what the model wrote is not encoded anew.

        Other tokens for the same text would be another prefix than the one that the engine knows.
        """
        last, end = self._last_turn, self.tokenizer.end_of_sentence_id
        if last is None or encoded[: len(last.encoded)] != last.encoded:
            return encoded
        rest = encoded[len(last.encoded) :]
        return last.tokens + rest[rest.index(end) :] if end in rest else encoded

    def _as_said(self, encoded: list[int], prompt: list[int], answer: Answer) -> _LastTurn | None:
        """Note a turn; None if its tokens are not its text: a stop string has cut it."""
        control, tokens = self.tokenizer.control_ids, list(answer.tokens)
        if tokens and tokens[-1] in control:
            tokens.pop()
        is_text = control.isdisjoint(tokens) and self.tokenizer.decode(tokens) == answer.text
        return _LastTurn(encoded, prompt + tokens) if is_text else None
