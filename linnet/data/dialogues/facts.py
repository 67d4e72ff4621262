"""Facts that can be stated, asked for and answered: what recall is taught and measured with."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from linnet.data.dialogues import words


@dataclass(frozen=True)
class Fact:
    """One thing to remember.

    Attributes:
        key: what it is about; no two facts of a text share it.
        statement: the sentence that tells it, which is also the answer.
        questions: ways to ask for it.
        value: the part of the answer that only the text can tell.
    """

    key: str
    statement: str
    questions: tuple[str, ...]
    value: str


def draw_facts(rng: random.Random, count: int) -> list[Fact]:
    """Return facts with different keys, half of them of one kind, easy to mix up."""
    favorite = rng.choice(KINDS)
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        fact = (favorite if rng.random() < 0.5 else rng.choice(KINDS))(rng)
        if not any(fact.key in known or known in fact.key for known in facts):
            facts[fact.key] = fact
        elif rng.random() < 0.02:
            favorite = rng.choice(KINDS)  # a kind of few keys may be used up
    return list(facts.values())


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10 ** rng.randint(1, 4), 10**5)) if rng.random() < 0.9 else "7"


def _word(rng: random.Random) -> str:
    return "".join(rng.choice(words.SYLLABLES) for _ in range(rng.randint(2, 4)))


def _identifier(rng: random.Random) -> str:
    parts = rng.sample(words.THINGS + words.ADJECTIVES + words.PEOPLE, rng.randint(1, 2))
    return "_".join(parts)


def _of_thing(rng: random.Random) -> Fact:
    what = rng.choice(("code", "number", "price", "weight", "height", "secret code", "label"))
    thing = f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.THINGS)}"
    value = _word(rng) if what == "label" else _number(rng)
    subject = f"the {what} of the {thing}"
    return Fact(
        f"{what} of the {thing}",
        f"The {what} of the {thing} is {value}.",
        (f"What is {subject}?", f"Tell me {subject}.", f"Do you know {subject}?"),
        value,
    )


def _home(rng: random.Random) -> Fact:
    name, city = rng.choice(words.NAMES), rng.choice(words.CITIES)
    questions = (f"Where does {name} live?", f"In which city does {name} live?")
    return Fact(f"{name} lives", f"{name} lives in {city}.", questions, city)


def _password(rng: random.Random) -> Fact:
    name, value = rng.choice(words.NAMES), _word(rng)
    what = rng.choice(("password", "user name", "nickname"))
    questions = (f"What is the {what} of {name}?", f"I forgot the {what} of {name}.")
    return Fact(f"{what} of {name}", f"The {what} of {name} is {value}.", questions, value)


def _favorite(rng: random.Random) -> Fact:
    name = rng.choice(words.NAMES)
    options = {"color": words.COLORS, "food": words.FOODS, "animal": words.ANIMALS}
    what = rng.choice(tuple(options))
    value = rng.choice(options[what])
    questions = (
        f"What is the favorite {what} of {name}?",
        f"Which {what} does {name} like best?",
    )
    statement = f"The favorite {what} of {name} is {value}."
    return Fact(f"favorite {what} of {name}", statement, questions, value)


def _place(rng: random.Random) -> Fact:
    thing = f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.THINGS)}"
    place = rng.choice(words.PLACES)
    questions = (f"Where is the {thing}?", f"Where can I find the {thing}?")
    return Fact(f"{thing} is", f"The {thing} is in the {place}.", questions, place)


def _owned(rng: random.Random) -> Fact:
    name, animal = rng.choice(words.NAMES), rng.choice(words.THINGS)
    value = str(rng.randint(2, 999))
    questions = (f"How many {animal}s does {name} have?",)
    return Fact(f"{name} has {animal}", f"{name} has {value} {animal}s.", questions, value)


def _setting(rng: random.Random) -> Fact:
    name = _identifier(rng)
    value = rng.choice((_number, _word))(rng)
    questions = (f"What is the value of {name}?", f"Which value does {name} have?")
    return Fact(f"value of {name}", f"The value of {name} is {value}.", questions, value)


KINDS: tuple[Callable[[random.Random], Fact], ...] = (
    _of_thing,
    _of_thing,
    _home,
    _password,
    _favorite,
    _place,
    _owned,
    _setting,
)
