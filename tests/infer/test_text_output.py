import itertools

import pytest

from linnet.infer.text_output import TextOutput


def cut(tokenizer, text: str, places: tuple[int, ...]) -> list[list[int]]:
    """Return the bytes of `text` as tokens of one byte, in runs cut at `places`."""
    by_byte = {tokenizer.token_bytes(i): i for i in reversed(range(tokenizer.vocab_size))}
    tokens = [by_byte[bytes([byte])] for byte in text.encode()]
    return [tokens[a:b] for a, b in itertools.pairwise((0, *places, len(tokens)))]


class Runs:
    """A tokenizer whose tokens are runs of another's, to split a text at any place."""

    def __init__(self, tokenizer, runs):
        self._bytes = [b"".join(map(tokenizer.token_bytes, run)) for run in runs]
        self._stream = tokenizer.stream

    def stream(self):
        stream = self._stream()
        stream._token_bytes = self._bytes.__getitem__
        return stream


CASES = [
    ("the cat and the hat", ("and",), "the cat ", "and"),
    ("the cat and the hat", ("cat and the hat", "and"), "the cat ", "and"),
    ("the cat", ("dog", "cats"), "the cat", None),
    ("ababababac!", ("ababac",), "abab", "ababac"),
    ("the hat", ("at", "hat"), "the ", "hat"),
    ("ab", ("abc", "b"), "a", "b"),
    ("aab", ("aaa", "ab"), "a", "ab"),
    ("你好 🦜 cat", ("🦜", "好 x"), "你好 ", "🦜"),
]


@pytest.mark.parametrize("include_stop", [False, True])
@pytest.mark.parametrize(("text", "stop", "expected", "which"), CASES, ids=ascii)
def test_a_stop_string_is_found_wherever_tokens_cut_it(
    tokenizer, text, stop, expected, which, include_stop
):
    if include_stop and which is not None:
        expected += which
    for places in itertools.combinations(range(1, len(text.encode())), 2):
        runs = cut(tokenizer, text, places)
        output = TextOutput(Runs(tokenizer, runs), stop, include_stop)
        pieces = [output.push(n) for n in range(len(runs))]
        pieces.append(output.finish())
        assert "".join(pieces) == expected
        assert output.stop_string == which and output.is_closed == (which is not None)
        assert not any("\ufffd" in piece for piece in pieces)


def test_every_token_of_its_own_gives_the_same_text(tokenizer):
    for text, stop, expected, which in CASES:
        output = TextOutput(tokenizer, stop)
        (tokens,) = cut(tokenizer, text, ())
        assert "".join(map(output.push, tokens)) + output.finish() == expected
        assert output.stop_string == which


@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, "a"), (2, "a"), (3, "aba"), (6, "ababa"), (7, "ababab")]
)
def test_stop_strings_do_not_count_before_min_tokens(tokenizer, min_tokens, expected):
    output = TextOutput(tokenizer, ("b",), min_tokens=min_tokens)
    (tokens,) = cut(tokenizer, "ababab", ())
    assert "".join(map(output.push, tokens)) + output.finish() == expected


def test_a_stop_string_that_begins_before_min_tokens_counts(tokenizer):
    output = TextOutput(tokenizer, ("bc",), min_tokens=3)
    (tokens,) = cut(tokenizer, "abcabc", ())
    assert "".join(map(output.push, tokens)) + output.finish() == "a"


def test_after_the_end_nothing_is_shown(tokenizer):
    output = TextOutput(tokenizer, ("b",))
    (tokens,) = cut(tokenizer, "abc", ())
    assert [*map(output.push, tokens), output.finish()] == ["a", "", "", ""]


def test_control_tokens_are_not_text_but_think_tags_are(tokenizer):
    output = TextOutput(tokenizer)
    ids = tokenizer.special_ids
    tokens = [ids["<think>"], tokenizer.encode("a")[0], ids["<end_of_sentence>"], ids["</think>"]]
    assert "".join(map(output.push, tokens)) == "<think>a</think>"


def test_without_a_tokenizer_there_is_no_text():
    output = TextOutput(None, ("a",))
    assert output.push(3) + output.finish() == "" and not output.is_closed
