import pytest
import tokenizers

from linnet.text import (
    M1_TEMPLATE,
    M2_TEMPLATE,
    Tokenizer,
    render_chat,
    starts_thinking,
    tool_format_of,
)

M1_TURNS = ["<beginning_of_sentence>", "<end_of_sentence>"]
M2_TOKENS = ["]~!b[", "]~b]", "[e~[", "<minimax:tool_call>", "</minimax:tool_call>"]


def tokenizer_with(special: list[str], template: str | None) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    return Tokenizer(backend, chat_template=template)


@pytest.mark.parametrize(
    ("special", "template", "tool_format"),
    [
        ([], M1_TEMPLATE, "m1"),
        ([], M2_TEMPLATE, "m2"),
        (M1_TURNS, None, "m1"),
        (["<tool_calls>"], None, "m1"),
        (M2_TOKENS, None, "m2"),
        (M2_TOKENS, M1_TEMPLATE, "m1"),
        (M1_TURNS, M2_TEMPLATE, "m2"),
        (M1_TURNS, "{{ messages }}", "m1"),
        ([], None, None),
        (["<|endoftext|>"], "{{ messages }}", None),
    ],
)
def test_the_template_tells_the_format_and_else_the_tokens(special, template, tool_format):
    assert tool_format_of(tokenizer_with(special, template)) == tool_format


def test_a_trained_tokenizer_speaks_m1():
    assert tool_format_of(Tokenizer.train(["text"], vocab_size=264)) == "m1"


def test_only_a_prompt_that_opens_a_think_span_starts_thinking():
    messages = [{"role": "user", "content": "<think>"}]
    assert starts_thinking(render_chat(messages, template=M2_TEMPLATE))
    assert not starts_thinking(render_chat(messages, template=M2_TEMPLATE) + "a")
    assert not starts_thinking(render_chat(messages))
