"""What the generated dialogues say is true: facts are in the text, sums are right, calls fit."""

import itertools
import json
import random

import pytest

from linnet.data.dialogues import GENERATORS
from linnet.data.dialogues.arithmetic import work_out
from linnet.data.dialogues.facts import draw_facts
from linnet.data.dialogues.filler import sentences
from linnet.data.dialogues.recall import UNKNOWN


def texts_and_turns(dialogue) -> tuple[str, list[tuple[str, str]]]:
    """Return what is given before the first answer to a question, and the questions."""
    messages = [m for m in dialogue.messages if m["content"] != "I have read it."]
    pairs = itertools.pairwise(messages)
    turns = [(a["content"], b["content"]) for a, b in pairs if b["role"] == "assistant"]
    given = "\n".join(m["content"] for m in messages if m["role"] != "assistant")
    return given, turns


def test_every_recalled_fact_is_in_the_text_once(filler, rng):
    for _ in range(20):
        given, turns = texts_and_turns(GENERATORS["recall"](rng, rng.randint(100, 900), filler))
        for _, reply in turns:
            assert given.count(reply) == 1


def test_absent_facts_are_not_in_the_text_and_the_others_are(filler, rng):
    replies = []
    for _ in range(20):
        given, turns = texts_and_turns(GENERATORS["absent"](rng, 500, filler))
        replies += [reply for _, reply in turns]
        assert all(reply in given for _, reply in turns if reply != UNKNOWN)
    assert 0.25 < replies.count(UNKNOWN) / len(replies) < 0.75


def test_definitions_are_lines_of_the_code(filler, rng):
    given, turns = texts_and_turns(GENERATORS["definitions"](rng, 900, filler))
    assert turns
    for question, reply in turns:
        name = reply.split("(")[0].split()[-1]
        assert reply in given and name in question


def test_copies_are_exact(filler, rng):
    for _ in range(10):
        _, turns = texts_and_turns(GENERATORS["copying"](rng, 300, filler))
        assert all(reply in question and reply == reply.strip() for question, reply in turns)


def test_facts_of_one_text_cannot_be_mixed_up(rng):
    for count in (5, 150):
        facts = draw_facts(rng, count)
        statements = [fact.statement for fact in facts]
        assert len(set(statements)) == count
        for fact in facts:
            assert fact.value in fact.statement
            assert sum(fact.key in other.key for other in facts) == 1


@pytest.mark.parametrize("operator", ["+", "-", "*"])
def test_written_sums_are_right(operator):
    for a in range(100):
        for b in range(100 if operator != "*" else 10):
            if operator == "-" and a < b:
                continue
            steps, result = work_out(a, operator, b)
            assert result == eval(f"{a} {operator} {b}")
            for step in steps.split(", "):
                left, right = step.split(": ")[-1].split(" = ")
                assert eval(left) == int(right), steps
            ones, tens = (int(step.split(" = ")[1]) for step in steps.split(", "))
            assert 10 * tens + ones % 10 == result


def test_calls_use_offered_tools_and_required_arguments(filler):
    rng = random.Random(1)
    num_calls = 0
    for _ in range(40):
        dialogue = GENERATORS["tools"](rng, 900, filler)
        offered = {tool["name"]: tool["parameters"]["required"] for tool in dialogue.tools}
        assert len(offered) == len(dialogue.tools)
        for message in dialogue.messages:
            for call in message.get("tool_calls", ()):
                num_calls += 1
                assert sorted(call["arguments"]) == sorted(offered[call["name"]])
                json.dumps(call)
    assert num_calls > 40


def test_sentences_fill_the_room_they_are_given(tokenizer, rng):
    text = "\n".join(sentences(rng, 3000))
    words = len(text.split())
    assert 1000 < words < 3000
