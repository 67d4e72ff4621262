import lzma
import zlib

import pytest

from linnet.data import compressed_bits_per_byte
from linnet.errors import DataError

TEXTS = ["abc é" * 50, "", "def 🦜" * 70]


def test_figures_are_those_of_one_stream_by_default():
    whole = "".join(TEXTS).encode()
    assert compressed_bits_per_byte(iter(TEXTS)) == {
        "zlib -9": 8 * len(zlib.compress(whole, 9)) / len(whole),
        "xz -9e": 8 * len(lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)) / len(whole),
    }


def test_texts_can_be_compressed_each_on_its_own():
    parts = [text.encode() for text in TEXTS]
    expected = 8 * sum(len(zlib.compress(part, 9)) for part in parts) / sum(map(len, parts))
    assert compressed_bits_per_byte(TEXTS, separately=True)["zlib -9"] == expected


def test_nothing_to_compress_is_refused():
    with pytest.raises(DataError, match="no text to compress"):
        compressed_bits_per_byte([""])
