import random

import pytest

from linnet.text import StreamDecoder, Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["hello world, 你好 🦜"] * 3, vocab_size=264)


def pieces(stream: StreamDecoder, ids: list[int]) -> list[str]:
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


@pytest.mark.parametrize("skip_special", [True, False])
def test_streamed_pieces_add_up_to_decode_for_random_ids(tokenizer, skip_special):
    source = random.Random(3)
    for _ in range(200):
        ids = [source.randrange(-1, tokenizer.vocab_size + 2) for _ in range(40)]
        streamed = "".join(pieces(tokenizer.stream(skip_special), ids))
        assert streamed == tokenizer.decode(ids, skip_special)


def test_half_a_character_is_held_back(tokenizer):
    ids = tokenizer.encode("🦉")
    assert len(ids) == 4
    assert pieces(tokenizer.stream(), ids) == ["", "", "", "🦉", ""]


def test_a_character_that_never_ends_is_replaced(tokenizer):
    first_bytes = tokenizer.encode("🦉")[:2]
    assert pieces(tokenizer.stream(), first_bytes) == ["", "", "\ufffd"]
    assert pieces(tokenizer.stream(), [*first_bytes, *tokenizer.encode("h")]) == [
        "",
        "",
        "\ufffdh",
        "",
    ]
