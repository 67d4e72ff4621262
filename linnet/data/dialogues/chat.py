"""Dialogues of many short turns, in which every skill may be asked for at any time."""

import random

from linnet.data.dialogues.arithmetic import problem
from linnet.data.dialogues.dialogue import Dialogue
from linnet.data.dialogues.facts import draw_facts
from linnet.data.dialogues.filler import Filler, sentence
from linnet.data.dialogues.small_talk import small_talk_turn
from linnet.data.dialogues.turns import answer, ask, opening

TURN_TOKENS = 65
NOTED = "I will remember that."


def chat(rng: random.Random, num_tokens: int, filler: Filler) -> Dialogue:
    """Tell facts one by one and ask for them later, with sums and small talk in between."""
    del filler
    messages = opening(rng)
    facts = draw_facts(rng, max(2, num_tokens // 150))
    told = []
    for _ in range(max(2, num_tokens // TURN_TOKENS)):
        shape = rng.random()
        if facts and (shape < 0.3 or not told):
            fact = facts.pop()
            told.append(fact)
            messages += [ask(fact.statement), answer(NOTED)]
        elif told and shape < 0.65:
            fact = rng.choice(told)
            messages += [ask(rng.choice(fact.questions)), answer(fact.statement)]
        elif shape < 0.75:
            text = sentence(rng)
            messages += [ask(f"Repeat: {text}"), answer(text)]
        elif shape < 0.87:
            messages += problem(rng)
        else:
            messages += small_talk_turn(rng)
    return Dialogue(tuple(messages))
