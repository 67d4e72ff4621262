"""Sequences with a loss mask: dialogues, of which only the answers are learned, and plain text.

An answer is what follows the generation prompt up to its end token, both as `encode_chat` writes
them, so a model is trained on exactly the tokens that it sees and is to write when it is served.
"""

from dataclasses import dataclass

import numpy as np

from linnet.data.dialogues.dialogue import Dialogue, is_learned
from linnet.errors import DataError
from linnet.text import Tokenizer, encode_chat, render_chat


@dataclass(frozen=True)
class Example:
    """One sequence to learn from.

    Attributes:
        tokens: [L] int64.
        is_target: [L] bool, which tokens are learned; never the first, which nothing predicts.
    """

    tokens: np.ndarray
    is_target: np.ndarray

    def __len__(self) -> int:
        """Number of inputs: every token but the last."""
        return len(self.tokens) - 1


class DialogueEncoder:
    """Encodes dialogues with a tokenizer's chat template, MiniMax-M1's if it has none."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Find out what the template writes before an answer.

        Raises:
            DataError: it opens an answer without a control token, which any text could imitate, or
                the tokenizer has no token that ends a turn.
        """
        self._tokenizer = tokenizer
        self._template = tokenizer.chat_template
        question = [{"role": "user", "content": "?"}]
        without = encode_chat(tokenizer, question, None, False, self._template)
        self._opening = encode_chat(tokenizer, question, None, True, self._template)[len(without) :]
        end_id = tokenizer.end_of_sentence_id
        if end_id is None or tokenizer.control_ids.isdisjoint(self._opening):
            raise DataError(
                "answers cannot be told apart: the chat template must open them with a control "
                "token, and the tokenizer must have a token that ends a turn"
            )
        self._end_id = end_id

    def encode(self, dialogue: Dialogue, where: str = "dialogue") -> Example:
        """Return the tokens up to the last answer; targets are the answers with their end tokens.

        Args:
            dialogue: with at least one message of the assistant; one of weight 0 is not learned.
            where: file and line, for errors.

        Raises:
            DataError: an answer cannot be told apart from its prompt, or has no end token.
        """
        learned = [is_learned(message) for message in dialogue.messages]
        messages = dialogue.messages[: len(learned) - learned[::-1].index(True)]
        places = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        try:
            tools = dialogue.tools
            ids = encode_chat(self._tokenizer, messages, tools, False, self._template)
            self._check_prompts(Dialogue(messages, tools), places, where)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from None
        tokens = np.array(ids, dtype=np.int64)
        starts = self._answer_starts(tokens)
        if len(starts) != len(places):
            raise DataError(
                f"{where}: {len(places)} answers, of which the template opens {len(starts)} as it "
                "opens one that is generated; remove blanks at the start of answers"
            )
        ends = np.flatnonzero(tokens == self._end_id)
        is_target = np.zeros(len(tokens), dtype=bool)
        last = 0
        for place, start in zip(places, starts, strict=True):
            after = ends[ends >= start]
            if not len(after):
                raise DataError(f"{where}: the template writes no end token after an answer")
            last = int(after[0])
            is_target[start : last + 1] = learned[place]
        return Example(tokens[: last + 1], is_target[: last + 1])

    def _check_prompts(self, dialogue: Dialogue, places: list[int], where: str) -> None:
        """Make sure that each answer follows the very text that it follows when it is served."""
        messages, tools = dialogue.messages, dialogue.tools
        whole = render_chat(messages, tools, False, self._template)
        for place in places:
            if not whole.startswith(render_chat(messages[:place], tools, True, self._template)):
                raise DataError(
                    f"{where}: the chat template rewrites what stands before message {place} once "
                    "that is answered; let each dialogue end at an answer that is to be learned"
                )

    def _answer_starts(self, tokens: np.ndarray) -> list[int]:
        """Return where each answer begins: after the opening, which only the template can write."""
        width = len(self._opening)
        if len(tokens) < width:
            return []
        windows = np.lib.stride_tricks.sliding_window_view(tokens, width)
        return (np.flatnonzero((windows == self._opening).all(1)) + width).tolist()


def encode_text(tokens: np.ndarray) -> Example:
    """Return plain text, [L] ids, of which every token but the first is learned."""
    is_target = np.ones(len(tokens), dtype=bool)
    is_target[0] = False
    return Example(np.asarray(tokens, dtype=np.int64), is_target)
