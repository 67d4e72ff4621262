"""The documents stand first, where every question finds the same tokens."""

import pytest

from linnet.errors import DataError
from linnet.text import M2_TEMPLATE, Tokenizer, encode_chat
from linnet.text.folder import frame_documents
from linnet.text.folder.prompt import INTRODUCTION

DOCUMENT = "File: a.py\n```\nprint(1)\n```\n\n"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([DOCUMENT, f"{INTRODUCTION}\n\nWhat is 'a'?\n"] * 3, vocab_size=330)


def whole(tokenizer, question, template):
    before, after = frame_documents(tokenizer, question, template)
    return [*before, *tokenizer.encode(DOCUMENT), *after]


def test_documents_are_the_message_of_the_system(tokenizer):
    messages = [
        {"role": "system", "content": f"{INTRODUCTION}\n\n{DOCUMENT}"},
        {"role": "user", "content": "What is 'a'?"},
    ]
    expected = encode_chat(tokenizer, messages)
    assert whole(tokenizer, "What is 'a'?", None) == expected


def test_part_before_the_documents_does_not_depend_on_the_question(tokenizer):
    first, second = (frame_documents(tokenizer, text) for text in ("A", "B and more <think>"))
    assert first[0] == second[0] and first[1] != second[1]


def test_template_without_a_system_gets_them_from_the_user(tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}<beginning_of_sentence>{{ m.role }}\n{{ m.content }}<end_of_sentence>\n"
        "{% endfor %}"
    )
    ids = whole(tokenizer, "Why?", template)
    expected = f"user\n{INTRODUCTION}\n\n{DOCUMENT}\n\nWhy?\n"
    assert tokenizer.decode(ids) == expected


def test_template_that_drops_the_system_gets_them_from_the_user(tokenizer):
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert tokenizer.decode(whole(tokenizer, "Why?", template)).startswith(INTRODUCTION)


def test_published_format_of_m2_is_framed(tokenizer):
    text = tokenizer.decode(whole(tokenizer, "Why?", M2_TEMPLATE))
    assert f"{INTRODUCTION}\n\n{DOCUMENT}" in text and text.index("Why?") > text.index(DOCUMENT)


def test_template_that_shows_no_message_is_an_error(tokenizer):
    with pytest.raises(DataError, match="shows no message as it is"):
        frame_documents(tokenizer, "Why?", "nothing")
