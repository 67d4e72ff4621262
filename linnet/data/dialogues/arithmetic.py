"""Dialogues with short sums, worked out digit by digit in a think span."""

import random

from linnet.data.dialogues import words
from linnet.data.dialogues.dialogue import Dialogue
from linnet.data.dialogues.filler import Filler
from linnet.data.dialogues.turns import Message, answer, ask, opening

TURN_TOKENS = 90
QUESTIONS = (
    "What is {}?",
    "What is {}?",
    "{}",
    "{} = ?",
    "Calculate {}.",
    "How much is {}?",
    "Please compute {}.",
)
SPOKEN = {"+": "plus", "-": "minus", "*": "times"}


def arithmetic(rng: random.Random, num_tokens: int, filler: Filler) -> Dialogue:
    """Ask for sums, differences and products of small numbers.

    Many clients send earlier answers without their thoughts, so half of the dialogues show them
    so, as answers that are not learned.
    """
    del filler
    messages = opening(rng)
    forgets = rng.random() < 0.5
    for _ in range(max(1, num_tokens // TURN_TOKENS)):
        if forgets:
            messages = [_without_thought(message) for message in messages]
        messages += problem(rng)
    return Dialogue(tuple(messages))


def problem(rng: random.Random) -> list[Message]:
    """Return a question and its answer."""
    operator = rng.choice("++--*")
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    if operator == "-":
        a, b = max(a, b), min(a, b)
    if operator == "*":
        b = rng.randint(2, 9)
    steps, result = work_out(a, operator, b)
    thought = f"<think>\n{steps}\n</think>\n"
    if operator != "*" and rng.random() < 0.25:
        question, reply = _story(rng, a, operator, b, result)
    else:
        sign = SPOKEN[operator] if rng.random() < 0.2 else operator
        question = rng.choice(QUESTIONS).format(f"{a} {sign} {b}")
        reply = f"{a} {operator} {b} = {result}."
    return [ask(question), answer(thought + reply)]


def _without_thought(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {**message, "content": message["content"].split("</think>\n")[-1], "weight": 0}


def work_out(a: int, operator: str, b: int) -> tuple[str, int]:
    """Return the written steps and the result; operands below 100, the second of `*` below 10."""
    tens_a, ones_a = divmod(a, 10)
    tens_b, ones_b = divmod(b, 10)
    if operator == "+":
        ones, result = ones_a + ones_b, a + b
        carry = " + 1" if ones > 9 else ""
        tens = f"{tens_a} + {tens_b}{carry} = {result // 10}"
        return f"ones: {ones_a} + {ones_b} = {ones}, tens: {tens}", result
    if operator == "-":
        borrows = ones_a < ones_b
        top, result = ones_a + 10 * borrows, a - b
        tens = f"{tens_a} - {tens_b}{' - 1' if borrows else ''} = {result // 10}"
        return f"ones: {top} - {ones_b} = {top - ones_b}, tens: {tens}", result
    ones, result = ones_a * b, a * b
    tens = f"{tens_a} * {b} + {ones // 10} = {result // 10}"
    return f"ones: {ones_a} * {b} = {ones}, tens: {tens}", result


def _story(rng: random.Random, a: int, operator: str, b: int, result: int) -> tuple[str, str]:
    name, thing = rng.choice(words.NAMES), rng.choice(words.THINGS)
    verb = "buys" if operator == "+" else "loses"
    more = " more" if operator == "+" else ""
    question = f"{name} has {a} {thing}s and {verb} {b}{more}. How many {thing}s does {name} have?"
    return question, f"{name} has {result} {thing}s."
