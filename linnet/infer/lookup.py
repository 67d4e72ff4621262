"""Prompt lookup: guess the next tokens from where the last ones occurred before."""

from array import array

WINDOW = 1 << 16
"""Tokens that are searched, the latest ones."""

MAX_NGRAM, MIN_NGRAM = 4, 2


def propose(tokens: array, max_tokens: int) -> list[int]:
    """Return what followed the latest earlier occurrence of the last few tokens.

    Args:
        tokens: "i" array of all so far.
        max_tokens: most to guess.

    Returns:
        Up to `max_tokens` guesses; none if the last tokens never occurred before.
    """
    if max_tokens < 1:
        return []
    recent = tokens[-WINDOW:]
    data, size = recent.tobytes(), recent.itemsize
    for ngram in range(min(MAX_NGRAM, len(recent) - 1), MIN_NGRAM - 1, -1):
        pattern, end = data[-ngram * size :], len(data) - size
        while (at := data.rfind(pattern, 0, end)) >= 0:
            if at % size == 0:
                return _continue(recent, at // size + ngram, max_tokens)
            end = at + len(pattern) - 1
    return []


def _continue(tokens: array, start: int, max_tokens: int) -> list[int]:
    """Return the tokens from `start` on, over again where they end: a loop may go on."""
    guesses = tokens[start : start + max_tokens].tolist()
    for place in range(len(guesses), max_tokens):
        guesses.append(guesses[place - (len(tokens) - start)])
    return guesses
