"""Dialogues about a long text: planted facts, its own lines, and what it does not say."""

import random
import re

from linnet.data.dialogues.dialogue import Dialogue
from linnet.data.dialogues.facts import Fact, draw_facts
from linnet.data.dialogues.filler import Filler
from linnet.data.dialogues.turns import answer, ask, opening

FACT_TOKENS = 16
TURN_TOKENS = 58
"""About what a question and its answer take, with the frame of their messages."""
MOST_QUESTIONS = 48
UNKNOWN = "The text does not say that."
_DEFINITION = re.compile(r"\s*((?:async )?(?:def|class) ([A-Za-z]\w{3,})\b.*)")


def recall(rng: random.Random, num_tokens: int, filler: Filler) -> Dialogue:
    """Plant facts in a text and ask for them, in any order."""
    num_questions = _num_questions(rng, num_tokens)
    room = max(FACT_TOKENS, num_tokens - num_questions * TURN_TOKENS)
    # From nothing but facts to a single one per question in much other text.
    most = max(num_questions, int(room / FACT_TOKENS))
    num_facts = round(num_questions * (most / num_questions) ** (rng.random() ** 2))
    facts = draw_facts(rng, min(num_facts, 160))
    lines = plant(rng, facts, filler.lines(rng, room - len(facts) * FACT_TOKENS))
    asked = rng.sample(facts, min(num_questions, len(facts)))
    turns = [(rng.choice(fact.questions), fact.statement) for fact in asked]
    return _about(rng, lines, turns)


def absent(rng: random.Random, num_tokens: int, filler: Filler) -> Dialogue:
    """Ask for facts of which only some are in the text."""
    num_questions = _num_questions(rng, num_tokens)
    facts = draw_facts(rng, 2 * num_questions)
    told, untold = facts[::2], facts[1::2]
    room = num_tokens - num_questions * (TURN_TOKENS + FACT_TOKENS)
    lines = plant(rng, told, filler.lines(rng, room))
    turns = [(rng.choice(fact.questions), fact.statement) for fact in told]
    turns += [(rng.choice(fact.questions), UNKNOWN) for fact in untold]
    return _about(rng, lines, rng.sample(turns, num_questions))


def definitions(rng: random.Random, num_tokens: int, filler: Filler) -> Dialogue:
    """Ask for the lines of Python code that define functions and classes."""
    found: dict[str, str] = {}
    lines: list[str] = []
    num_questions = _num_questions(rng, num_tokens)
    room = max(64, num_tokens - num_questions * TURN_TOKENS)
    for _ in range(20):
        lines = filler.code(rng, room)
        matches = [match for line in lines if (match := _DEFINITION.match(line))]
        names = [match[2] for match in matches]
        found = {match[2]: match[1] for match in matches if names.count(match[2]) == 1}
        if found:
            break
    if not found:
        return recall(rng, num_tokens, filler)
    turns = []
    for name in rng.sample(sorted(found), min(num_questions, len(found))):
        question = rng.choice(
            (f"Where is {name} defined?", f"Show the definition of {name}.", f"Find {name}.")
        )
        turns.append((question, found[name]))
    return _about(rng, lines, turns)


def plant(rng: random.Random, facts: list[Fact], lines: list[str]) -> list[str]:
    """Return the lines with each fact at a random place, most of them on a line of their own."""
    result = list(lines)
    for fact in facts:
        place = rng.randint(0, len(result))
        if rng.random() < 0.25 and place < len(result):
            result[place] = f"{result[place]} {fact.statement}".strip()
        elif rng.random() < 0.15:
            result.insert(place, f"# {fact.statement}")
        else:
            result.insert(place, fact.statement)
    return result


def _num_questions(rng: random.Random, num_tokens: int) -> int:
    share = rng.uniform(0.2, 0.75)
    return max(1, min(MOST_QUESTIONS, round(share * num_tokens / TURN_TOKENS)))


def _about(rng: random.Random, lines: list[str], turns: list[tuple[str, str]]) -> Dialogue:
    """Return a dialogue in which the user gives a text and asks about it."""
    text = "\n".join(lines).strip("\n")
    first, *others = turns
    messages = opening(rng)
    shape = rng.randrange(6)
    if shape == 0:
        messages = [{"role": "system", "content": text}, ask(first[0])]
    elif shape == 1:
        messages += [ask(f"Read this text:\n\n{text}\n\n{first[0]}")]
    elif shape == 2:
        messages += [ask(f"{text}\n\nQuestion: {first[0]}")]
    elif shape == 3:
        name = rng.choice(("notes.txt", "main.py", "src/app.py", "README.md", "data.txt"))
        messages += [ask(f"File: {name}\n```\n{text}\n```\n\n{first[0]}")]
    elif shape == 4:
        # Not learned: a question may be easy to overlook after a long text.
        messages += [ask(text), {**answer("I have read it."), "weight": 0}, ask(first[0])]
    else:
        messages += [ask(f"{text}\n\n{first[0]}")]
    messages.append(answer(first[1]))
    for question, reply in others:
        messages += [ask(question), answer(reply)]
    return Dialogue(tuple(messages))
