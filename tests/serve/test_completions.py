"""`/v1/completions`, as the openai SDK and evaluation programs use it."""

import openai
import pytest
import torch


def ask(client, prompt="the cat", **options):
    options = {"model": "tiny", "max_tokens": 8, "seed": 1} | options
    return client.completions.create(prompt=prompt, **options)


@pytest.fixture
def loose(address):
    """A client that accepts what OpenAI sends and its types forbid: a null for a finish reason to
    come, and for the logprob of a first token."""
    with address.openai(is_strict=False) as client:
        yield client


def test_completion_has_every_field(client):
    answer = ask(client)
    (choice,) = answer.choices
    assert choice.text and (choice.index, choice.finish_reason) == (0, "length")
    assert answer.usage.completion_tokens == 8 and answer.id.startswith("cmpl-")


def test_chunks_add_up_to_the_whole(loose):
    chunks = list(ask(loose, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].text for c in chunks[:-1]) == ask(loose).choices[0].text
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8


def test_texts_and_their_tokens_are_the_same_prompt(client, http):
    tokens = [http.post("/tokenize", json={"prompt": t}).json()["tokens"] for t in ("cat", "hat")]
    texts = ask(client, ["cat", "hat"], n=2, temperature=0)
    ids = ask(client, tokens, n=2, temperature=0)
    assert [c.text for c in texts.choices] == [c.text for c in ids.choices]
    assert [c.index for c in texts.choices] == [0, 1, 2, 3]
    assert texts.choices[0].text == texts.choices[1].text != texts.choices[2].text
    assert ask(client, tokens[0], temperature=0).choices[0].text == texts.choices[0].text
    assert texts.usage.prompt_tokens == sum(map(len, tokens))


def test_echo_gives_the_prompt_back(loose):
    plain = ask(loose).choices[0].text
    assert ask(loose, echo=True).choices[0].text == "the cat" + plain
    chunks = list(ask(loose, echo=True, stream=True))
    assert "".join(c.choices[0].text for c in chunks) == "the cat" + plain


def test_scoring_equals_a_plain_forward(loose, http, address):
    """As evaluation programs do it: token ids in batches, echo, logprobs, one new token."""
    prompts = [
        http.post("/tokenize", json={"prompt": text}).json()["tokens"]
        for text in ("the cat and the hat 🦜", "a bat")
    ]
    answer = ask(loose, prompts, echo=True, logprobs=2, max_tokens=1, temperature=0)
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        with torch.no_grad():
            scores = address.engine.model(torch.tensor([prompt]))[0].log_softmax(-1)
        entries = choice.logprobs
        assert len(entries.tokens) == len(prompt) + 1 == len(entries.text_offset)
        assert entries.token_logprobs[0] is None and entries.top_logprobs[0] is None
        expected = [float(scores[i, token]) for i, token in enumerate(prompt[1:])]
        expected.append(float(scores[-1].max()))
        assert entries.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
        for row, top in zip(scores, entries.top_logprobs[1:], strict=True):
            assert max(top.values()) == pytest.approx(float(row.max()), abs=1e-4)


def test_scoring_without_a_new_token(loose):
    answer = ask(loose, echo=True, logprobs=0, max_tokens=0)
    (choice,) = answer.choices
    assert choice.text == "the cat" and answer.usage.completion_tokens == 0
    assert len(choice.logprobs.tokens) == answer.usage.prompt_tokens


def test_offsets_tell_where_tokens_begin(loose):
    choice = ask(loose, "the 🦜 cat", echo=True, logprobs=0, max_tokens=4).choices[0]
    entries = choice.logprobs
    for offset, token in zip(entries.text_offset, entries.tokens, strict=True):
        if not token.startswith(("bytes:", "<begin")):
            assert choice.text[offset:].startswith(token)


def test_streamed_logprobs_are_those_of_the_whole(loose):
    whole = ask(loose, echo=True, logprobs=1).choices[0].logprobs
    pieces = [c.choices[0].logprobs for c in ask(loose, echo=True, logprobs=1, stream=True)]
    pieces = [piece for piece in pieces if piece]
    assert [token for piece in pieces for token in piece.tokens] == whole.tokens
    assert [offset for piece in pieces for offset in piece.text_offset] == whole.text_offset


def test_text_starts_a_document_unless_told_otherwise(client):
    without = ask(client, extra_body={"add_special_tokens": False})
    assert without.usage.prompt_tokens == ask(client).usage.prompt_tokens - 1


def test_response_format_is_kept(client):
    pattern = {"type": "regex", "pattern": "[cb]at"}
    body = {"response_format": pattern, "thinking_token_budget": 0}
    assert ask(client, extra_body=body).choices[0].text in ("cat", "bat")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt.tokens: List should have at least 1 item"),
        ({"prompt": [[]]}, "should have at least 1 item"),
        ({"prompt": ["a", 1]}, "Input should be a valid string"),
        ({"prompt": [1, "a"]}, "Input should be a valid integer"),
        ({"prompt": [100000]}, "token id 100000 is outside the vocabulary"),
        ({"prompt": [-1]}, "token id -1 is outside the vocabulary"),
        ({"prompt": [1] * 3000}, "maximum context length is 2048 tokens"),
        ({"prompt": ["a"] * 13}, "asks for 13 completions; this server takes 12"),
        ({"prompt": {"a": 1}}, "prompt.text: Input should be a valid string"),
        ({"max_tokens": 0}, "max_tokens is 0, which only makes sense with echo"),
        ({"max_tokens": -1}, "max_tokens: Input should be greater than or equal to 0"),
        ({"suffix": "x"}, "suffix is not supported"),
        ({"best_of": 3}, "best_of is not supported"),
        ({"logprobs": 21}, "logprobs: Input should be less than or equal to 20"),
        ({"prompt": "", "add_special_tokens": False}, "the prompt has no tokens"),
    ],
    ids=str,
)
def test_wrong_value_is_a_400_that_names_it(client, fields, message):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body=fields)
    assert message in caught.value.body["message"]
