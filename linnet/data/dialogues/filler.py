"""Text to hide things in: pieces of a corpus, and simple sentences."""

import random

import numpy as np

from linnet.data.dialogues import words
from linnet.data.shards import TokenStore
from linnet.text import Tokenizer

SENTENCE_TOKENS = 14
"""About what one of `sentence` takes."""


class Filler:
    """Draws lines of a corpus.

    Attributes:
        fingerprint: of the corpus.
    """

    def __init__(self, store: TokenStore, tokenizer: Tokenizer) -> None:
        """Take a store and the tokenizer that made it."""
        self._store, self._tokenizer = store, tokenizer
        self.fingerprint = store.fingerprint

    def lines(self, rng: random.Random, num_tokens: int) -> list[str]:
        """Return whole lines of about `num_tokens` tokens together, from one kind of text."""
        if rng.random() < 0.35:
            return sentences(rng, num_tokens)
        return self.code(rng, num_tokens)

    def code(self, rng: random.Random, num_tokens: int) -> list[str]:
        """Return whole lines of documents, each piece from a random place."""
        lines: list[str] = []
        while num_tokens > 0:
            document = rng.randrange(self._store.num_documents)
            tokens = self._store.document(document)[1:-1]
            start = rng.randrange(max(1, len(tokens) - num_tokens + 1))
            piece = tokens[start : start + num_tokens]
            text = self._tokenizer.decode(np.asarray(piece).tolist())
            # The cut ends lie within a line, or within a character.
            found = text.split("\n")[1 if start else 0 : -1]
            lines += [line for line in found if len(line) < 400]
            num_tokens -= max(len(piece), 16)
        return lines


def sentences(rng: random.Random, num_tokens: int) -> list[str]:
    """Return simple sentences, several per line, of about `num_tokens` tokens together."""
    lines = []
    for _ in range(round(num_tokens / SENTENCE_TOKENS / 3)):
        lines.append(" ".join(sentence(rng) for _ in range(rng.randint(1, 5))))
    return lines


def sentence(rng: random.Random) -> str:
    """Return a sentence of the kind that any story has."""
    person = rng.choice(words.PEOPLE)
    noun, place = rng.choice(words.THINGS), rng.choice(words.PLACES)
    kind, verb = rng.choice(words.ADJECTIVES), rng.choice(words.VERBS)
    shape = rng.randrange(5)
    if shape == 0:
        return f"The {person} {verb} the {kind} {noun}."
    if shape == 1:
        return f"In the {place} there is a {noun}."
    if shape == 2:
        return f"Then the {person} walks to the {place}."
    if shape == 3:
        return f"It is {rng.choice(words.WEATHER)} in the {place} and the {person} is tired."
    return f"The {person} has a {kind} {noun}, but nobody knows why."
