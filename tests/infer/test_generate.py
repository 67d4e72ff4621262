import dataclasses

import pytest
import torch

import linnet
from linnet.infer import SamplingParams, generate, stream_text, stream_tokens
from linnet.infer.generate import end_tokens


class Script(torch.nn.Module):
    """A model that writes given tokens whatever it reads, for tests of what happens to text."""

    def __init__(self, model, tokens):
        super().__init__()
        self.config, self.tokenizer, self.device = model.config, model.tokenizer, model.device
        self.new_cache, self.tokens = model.new_cache, iter(tokens)
        self.eval()

    def forward(self, tokens, cache, logits_to_keep):
        logits = torch.zeros(1, 1, self.config.vocab_size)
        logits[..., next(self.tokens)] = 1
        return logits


@pytest.fixture
def script(model, tokenizer):
    """Return the text that a scripted model gives under stop strings, and its pieces."""

    def run(text, stop=(), one_byte_tokens=False):
        encode = single_bytes if one_byte_tokens else type(tokenizer).encode
        tokens = encode(tokenizer, text)
        params = SamplingParams(max_tokens=len(tokens), temperature=0, stop=tuple(stop))
        return list(stream_text(Script(model, tokens), "x", params))

    return run


def single_bytes(tokenizer, text: str) -> list[int]:
    """Return the ids of the bytes of `text`, one token each."""
    by_byte = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    return [by_byte[bytes([byte])] for byte in text.encode()]


def test_greedy_text_is_the_argmax_of_full_forward_passes(model, tokenizer):
    prompt = tokenizer.encode("the cat")
    params = SamplingParams(max_tokens=12, temperature=0)
    tokens = list(stream_tokens(model, prompt, params))
    text = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            text.append(int(model(torch.tensor([text]))[0, -1].argmax()))
    assert tokens == text[len(prompt) :]
    assert len(set(tokens)) > 1


def test_same_seed_gives_the_same_text_and_another_seed_another(model):
    texts = [generate(model, "the cat", max_tokens=40, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_seed_texts_differ(model):
    assert generate(model, "the", max_tokens=30) != generate(model, "the", max_tokens=30)


@pytest.mark.parametrize("chunk", [1, 3, 10, 50, 10_000])
def test_prefill_chunk_does_not_change_the_tokens(model, tokenizer, chunk):
    prompt = tokenizer.encode("the cat and the hat " * 4)
    params = SamplingParams(max_tokens=20, seed=3)
    whole = list(stream_tokens(model, prompt, params))
    assert list(stream_tokens(model, prompt, params, prefill_chunk=chunk)) == whole


def test_streamed_pieces_joined_are_the_text(model):
    params = SamplingParams(max_tokens=60, seed=5)
    pieces = list(stream_text(model, "the", params))
    assert len(pieces) > 5 and "" not in pieces
    assert "".join(pieces) == generate(model, "the", max_tokens=60, seed=5)


def test_text_and_its_tokens_are_the_same_prompt(model, tokenizer):
    begin = tokenizer.begin_of_document_id
    as_ids = generate(model, [begin, *tokenizer.encode("the hat")], max_tokens=10, temperature=0)
    assert generate(model, "the hat", max_tokens=10, temperature=0) == as_ids


def test_characters_of_several_tokens_are_never_split(script):
    pieces = script("a 🦜 你好 🏳️‍🌈", one_byte_tokens=True)
    assert "".join(pieces) == "a 🦜 你好 🏳️‍🌈"
    assert "\ufffd" not in "".join(pieces) and all(piece for piece in pieces)
    assert "🦜" in pieces


def test_unfinished_character_ends_as_a_replacement(model, tokenizer):
    tokens = single_bytes(tokenizer, "a🦜")[:3]
    params = SamplingParams(max_tokens=3, temperature=0)
    assert "".join(stream_text(Script(model, tokens), "x", params)) == "a\ufffd"


@pytest.mark.parametrize("one_byte_tokens", [False, True], ids=["merges", "bytes"])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("the cat and the hat", ["and"], "the cat "),
        ("the cat and the hat", ["t and t"], "the ca"),
        ("the cat", ["the"], ""),
        ("the cat", ["t"], ""),
        ("the cat", ["dog"], "the cat"),
        ("the cat", ["cats"], "the cat"),  # a part of a stop string that never ends is text
        ("ababababac", ["ababac"], "abab"),
        ("the hat cat", ["cat", "hat"], "the "),
        ("the hat", ["at", "hat"], "the "),
        ("ab", ["abc", "b"], "a"),
        ("你好 🦜 cat", ["🦜"], "你好 "),
        ("a\n\nb", ["\n\n"], "a"),
    ],
    ids=ascii,
)
def test_stop_string_ends_the_text_and_no_part_of_it_leaks(
    script, text, stop, expected, one_byte_tokens
):
    pieces = script(text, stop, one_byte_tokens)
    assert "".join(pieces) == expected
    assert all(expected.startswith("".join(pieces[:count])) for count in range(len(pieces)))


def test_stop_may_be_one_string(model):
    whole = generate(model, "the", max_tokens=40, temperature=0)
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    expected = whole[: whole.index(stop)]
    assert generate(model, "the", max_tokens=40, temperature=0, stop=stop) == expected


@pytest.mark.parametrize("name", ["end_of_document_id", "end_of_sentence_id"])
def test_end_token_ends_the_text(model, tokenizer, name):
    tokens = [*tokenizer.encode("the"), getattr(tokenizer, name), *tokenizer.encode("cat")]
    params = SamplingParams(max_tokens=10, temperature=0)
    assert "".join(stream_text(Script(model, tokens), "x", params)) == "the"


def test_end_tokens_are_those_of_config_and_tokenizer(model, tokenizer):
    of_tokenizer = {tokenizer.end_of_document_id, tokenizer.end_of_sentence_id}
    assert end_tokens(model) == of_tokenizer
    for declared, ids in ((7, {7}), ((7, 8), {7, 8})):
        model.config = dataclasses.replace(model.config, eos_token_id=declared)
        assert end_tokens(model) == of_tokenizer | ids
    model.tokenizer = None
    assert end_tokens(model) == {7, 8}


def test_no_tokens_are_no_text(model):
    assert generate(model, "the", max_tokens=0) == ""


def test_empty_text_starts_a_document(model, tokenizer):
    from_begin = generate(model, [tokenizer.begin_of_document_id], max_tokens=5, temperature=0)
    assert generate(model, "", max_tokens=5, temperature=0) == from_begin


def test_generation_leaves_no_gradients_and_no_mode(model):
    for _ in stream_text(model, "the", SamplingParams(max_tokens=3, temperature=0)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the prompt has no tokens"),
        ([300], "token id 300 outside the vocabulary of 300"),
        ([-1], "token id -1 outside"),
    ],
)
def test_prompt_that_cannot_be_read_is_refused(model, prompt, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompt, max_tokens=2)


def test_mistakes_are_told_before_the_first_piece(model):
    params = SamplingParams()
    with pytest.raises(ValueError, match="prefill_chunk is 0"):
        stream_tokens(model, [1], params, prefill_chunk=0)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        stream_text(model, [], params)
    with pytest.raises(ValueError, match=r"training mode; call model\.eval"):
        stream_text(model.train(), "the", params)
    model.tokenizer = None
    with pytest.raises(ValueError, match="the model has no tokenizer"):
        stream_text(model.eval(), "the", params)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_are_told(model, temperature):
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="the logits are not finite"):
        generate(model, "the", max_tokens=2, temperature=temperature)


def test_generate_is_public():
    assert linnet.generate is generate
