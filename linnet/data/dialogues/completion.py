"""Dialogues that ask for the next lines of Python code."""

import random

from linnet.data.dialogues.dialogue import Dialogue
from linnet.data.dialogues.filler import Filler
from linnet.data.dialogues.turns import answer, ask, opening

REQUESTS = (
    "Complete this Python code:\n\n{}",
    "Continue this code:\n\n{}",
    "What comes next?\n\n{}",
    "```python\n{}\n```\n\nContinue.",
)
MOST_LINES = 10
FRAME_TOKENS = 40


def completion(rng: random.Random, num_tokens: int, filler: Filler) -> Dialogue:
    """Give the start of a piece of code, and let the assistant write the next lines."""
    lines: list[str] = []
    while len(lines) < 4:
        lines = filler.code(rng, max(64, num_tokens - FRAME_TOKENS))
        while lines and not lines[0].strip():
            lines.pop(0)
        while lines and not lines[-1].strip():
            lines.pop()
    cut = max(1, len(lines) - rng.randint(1, MOST_LINES))
    # The answer must not begin with a blank line.
    while cut < len(lines) - 1 and not lines[cut].strip():
        cut += 1
    given, rest = "\n".join(lines[:cut]), "\n".join(lines[cut:])
    fenced = f"```python\n{rest}\n```"
    return Dialogue((*opening(rng), ask(rng.choice(REQUESTS).format(given)), answer(fenced)))
