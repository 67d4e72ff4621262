"""Messages, and the ways in which a dialogue may begin."""

import random
from typing import Any

Message = dict[str, Any]  # Any: JSON

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are linnet, a small language model.",
    "Answer briefly.",
    "Be precise and honest.",
)


def ask(text: str) -> Message:
    """Return a message of the user."""
    return {"role": "user", "content": text}


def answer(text: str) -> Message:
    """Return an answer of the assistant."""
    return {"role": "assistant", "content": text}


def opening(rng: random.Random) -> list[Message]:
    """Return what stands before the first question: mostly nothing."""
    if rng.random() < 0.75:
        return []
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS)}]
