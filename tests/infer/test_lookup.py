from array import array

import pytest

from linnet.infer.lookup import propose


@pytest.mark.parametrize(
    ("tokens", "max_tokens", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2], 2, [3, 4]),
        ([1, 2, 3, 1, 2, 4, 1, 2], 1, [4]),  # the latest occurrence
        ([9, 1, 2, 3, 8, 1, 2, 7, 9, 1, 2], 2, [3, 8]),  # the longest match
        ([5, 5, 5], 4, [5, 5, 5, 5]),  # a loop goes on
        ([1, 2, 1, 2, 1, 2], 3, [1, 2, 1]),
        ([1, 2, 3], 4, []),
        ([1], 4, []),
        ([], 4, []),
        ([1, 2, 3, 1, 2], 0, []),
        ([256, 1, 0, 256, 1], 1, [0]),  # bytes of one id within another are no occurrence
    ],
)
def test_guesses_are_what_followed_before(tokens, max_tokens, expected):
    assert propose(array("i", tokens), max_tokens) == expected


def test_bytes_across_tokens_are_no_occurrence():
    # 0x0100 0x0001 read one byte late holds 0x010001 ...
    tokens = array("i", [0x01000000, 0x00000001, 7, 0x00000001, 0x00010000])
    assert propose(tokens, 3) == []
