"""Dialogues that ask for a text again, word by word."""

import random

from linnet.data.dialogues import words
from linnet.data.dialogues.dialogue import Dialogue
from linnet.data.dialogues.filler import Filler, sentences
from linnet.data.dialogues.turns import answer, ask, opening

REQUESTS = (
    "Repeat this text exactly:\n\n{}",
    "Copy this:\n\n{}",
    "Say this again, word by word:\n\n{}",
    "{}\n\nRepeat the text above.",
    "Repeat: {}",
)
FRAME_TOKENS = 36


def copying(rng: random.Random, num_tokens: int, filler: Filler) -> Dialogue:
    """Give texts that are to be repeated exactly."""
    messages = opening(rng)
    num_texts = min(rng.choice((1, 1, 2, 3)), max(1, num_tokens // 80))
    for _ in range(num_texts):
        room = max(4, (num_tokens // num_texts - FRAME_TOKENS) // 2)
        text = _text(rng, room, filler)
        messages += [ask(rng.choice(REQUESTS).format(text)), answer(text)]
    return Dialogue(tuple(messages))


def _text(rng: random.Random, num_tokens: int, filler: Filler) -> str:
    """Return a text without blanks at its ends."""
    shape = rng.randrange(5)
    if shape == 0:
        return " ".join(_pseudo_word(rng) for _ in range(max(2, num_tokens // 4)))
    if shape == 1:
        return " ".join(str(rng.randrange(1000)) for _ in range(max(2, num_tokens // 3)))
    if shape == 2:
        pool = words.THINGS + words.ADJECTIVES + words.PLACES
        return " ".join(rng.choice(pool) for _ in range(max(2, num_tokens // 3)))
    lines = sentences(rng, num_tokens) if shape == 3 else filler.code(rng, num_tokens)
    return "\n".join(lines).strip() or "Hello."


def _pseudo_word(rng: random.Random) -> str:
    return "".join(rng.choice(words.SYLLABLES) for _ in range(rng.randint(1, 3)))
