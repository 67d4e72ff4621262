"""Dialogues in which the assistant calls a tool and answers with what the tool returned.

A task is a tool, what a user may say, the arguments that follow from it, the result, and the
answer that the result allows. Half of the tools are drawn from a few everyday ones; the other half
are made up of a noun and a kind of thing, so that names must be read from the list.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from linnet.data.dialogues import words
from linnet.data.dialogues.dialogue import Dialogue
from linnet.data.dialogues.filler import Filler
from linnet.data.dialogues.small_talk import small_talk_turn
from linnet.data.dialogues.turns import Message, answer, ask, opening

Arguments = dict[str, str | int]
TURN_TOKENS = 150
PREAMBLE_TOKENS = 190
DETAILS = words.words(
    """
    price size weight height age speed color status owner address rating score name total rank
    level balance date length temperature
    """
)
KINDS = words.words(
    """
    product user order city car animal book team player file server country account train hotel
    room ticket movie song company
    """
)


@dataclass(frozen=True)
class Task:
    """One use of a tool.

    Attributes:
        tool: its JSON description.
        request: what the user says.
        arguments: of the call.
        result: what the tool returns, as text.
        reply: the answer.
    """

    tool: dict[str, Any]  # Any: JSON
    request: str
    arguments: Arguments
    result: str
    reply: str

    @property
    def name(self) -> str:
        """The tool's name."""
        return self.tool["name"]

    @property
    def call(self) -> Message:
        """The call as an assistant's message has it."""
        return {"name": self.name, "arguments": self.arguments}


def tools(rng: random.Random, num_tokens: int, filler: Filler) -> Dialogue:
    """Let the user ask for things that one of several tools can tell."""
    del filler
    num_turns = max(1, min(6, (num_tokens - PREAMBLE_TOKENS) // TURN_TOKENS))
    first = draw_task(rng)
    offered = {first.name: first}
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        task = draw_task(rng)
        offered.setdefault(task.name, task)
    messages = opening(rng)
    for turn in range(num_turns):
        shape = rng.random()
        if turn and shape < 0.15:
            messages += small_talk_turn(rng)
        elif shape < 0.3:
            messages += _parallel(rng, offered)
        else:
            messages += _single(again(rng, rng.choice(list(offered.values()))))
    listed = [task.tool for task in offered.values()]
    return Dialogue(tuple(messages), tuple(rng.sample(listed, len(listed))))


def draw_task(rng: random.Random) -> Task:
    """Return a task with any tool."""
    return rng.choice(EVERYDAY)(rng) if rng.random() < 0.5 else _made_up(rng)


def again(rng: random.Random, task: Task) -> Task:
    """Return another task with the same tool."""
    for make in EVERYDAY:
        if make.__name__.removeprefix("_") == task.name:
            return make(rng)
    _, detail, kind = task.name.split("_")
    return _made_up(rng, detail, kind)


def _single(task: Task) -> list[Message]:
    call = {"role": "assistant", "content": "", "tool_calls": [task.call]}
    result = {"role": "tool", "name": task.name, "content": task.result}
    return [ask(task.request), call, result, answer(task.reply)]


def _parallel(rng: random.Random, offered: dict[str, Task]) -> list[Message]:
    """Two requests at once, and two calls in one answer."""
    pair = [again(rng, rng.choice(list(offered.values()))) for _ in range(2)]
    calls = {"role": "assistant", "content": "", "tool_calls": [task.call for task in pair]}
    parts = [{"type": "text", "name": task.name, "text": task.result} for task in pair]
    reply = " ".join(task.reply for task in pair)
    return [
        ask(" ".join(task.request for task in pair)),
        calls,
        {"role": "tool", "content": parts},
        answer(reply),
    ]


def describe(name: str, about: str, **parameters: str) -> dict[str, Any]:  # Any: JSON
    """Return a tool's description; all parameters are required."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return {"name": name, "description": about, "parameters": schema}


def _made_up(rng: random.Random, detail: str = "", kind: str = "") -> Task:
    detail, kind = detail or rng.choice(DETAILS), kind or rng.choice(KINDS)
    subject = rng.choice(
        (
            rng.choice(words.NAMES),
            rng.choice(words.CITIES),
            f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.THINGS)}",
            str(rng.randint(10, 9999)),
        )
    )
    value = rng.choice((str(rng.randint(1, 9999)), rng.choice(words.ADJECTIVES)))
    request = rng.choice(
        (
            f"What is the {detail} of the {kind} {subject}?",
            f"Tell me the {detail} of the {kind} {subject}.",
            f"Look up the {detail} of the {kind} {subject}, please.",
        )
    )
    about = f"Return the {detail} of one {kind}."
    tool = describe(f"get_{detail}_{kind}", about, **{kind: "string"})
    result = rng.choice((value, json.dumps({detail: value}), f"{detail}: {value}"))
    reply = f"The {detail} of the {kind} {subject} is {value}."
    return Task(tool, request, {kind: subject}, result, reply)


def _get_weather(rng: random.Random) -> Task:
    city, sky, degrees = rng.choice(words.CITIES), rng.choice(words.WEATHER), rng.randint(-9, 39)
    request = rng.choice(
        (f"What is the weather in {city}?", f"How is the weather in {city} today?")
    )
    tool = describe("get_weather", "Current weather of a city.", city="string")
    result = json.dumps({"sky": sky, "temperature": degrees})
    reply = f"In {city} it is {sky} with {degrees} degrees."
    return Task(tool, request, {"city": city}, result, reply)


def _get_time(rng: random.Random) -> Task:
    city = rng.choice(words.CITIES)
    now = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
    request = rng.choice((f"What time is it in {city}?", f"Tell me the time in {city}."))
    tool = describe("get_time", "Current time in a city.", city="string")
    return Task(tool, request, {"city": city}, now, f"It is {now} in {city}.")


def _calculate(rng: random.Random) -> Task:
    a, b, operator = rng.randint(100, 9999), rng.randint(100, 9999), rng.choice("+-*")
    value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    expression = f"{a} {operator} {b}"
    request = rng.choice((f"What is {expression}?", f"Calculate {expression}."))
    tool = describe("calculate", "Evaluate an arithmetic expression.", expression="string")
    reply = f"{expression} = {value}."
    return Task(tool, request, {"expression": expression}, str(value), reply)


def _read_file(rng: random.Random) -> Task:
    path = f"{rng.choice(words.THINGS)}.{rng.choice(('txt', 'py', 'md', 'csv'))}"
    text = " ".join(rng.sample(words.THINGS, rng.randint(2, 5)))
    request = rng.choice((f"What is in the file {path}?", f"Read {path}.", f"Open {path}, please."))
    tool = describe("read_file", "Return the text of a file.", path="string")
    return Task(tool, request, {"path": path}, text, f"The file {path} says: {text}")


def _search(rng: random.Random) -> Task:
    query = f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.THINGS)}"
    count = rng.randint(0, 500)
    request = rng.choice((f"Search for {query}.", f"Find pages about {query}."))
    tool = describe("search", "Search the web and count the pages found.", query="string")
    result = json.dumps({"pages": count})
    return Task(tool, request, {"query": query}, result, f"I found {count} pages about {query}.")


def _set_timer(rng: random.Random) -> Task:
    minutes = rng.randint(1, 90)
    request = rng.choice((f"Set a timer for {minutes} minutes.", f"Wake me in {minutes} minutes."))
    tool = describe("set_timer", "Start a timer.", minutes="integer")
    return Task(
        tool, request, {"minutes": minutes}, "ok", f"The timer is set for {minutes} minutes."
    )


def _send_message(rng: random.Random) -> Task:
    name = rng.choice(words.NAMES)
    text = f"I am in the {rng.choice(words.PLACES)}"
    request = rng.choice((f'Send "{text}" to {name}.', f'Write to {name}: "{text}"'))
    tool = describe("send_message", "Send a text to a person.", to="string", text="string")
    return Task(tool, request, {"to": name, "text": text}, "sent", f"I sent it to {name}.")


EVERYDAY: tuple[Callable[[random.Random], Task], ...] = (
    _get_weather,
    _get_time,
    _calculate,
    _read_file,
    _search,
    _set_timer,
    _send_message,
)
