"""What general-purpose compressors make of a text: the bits per byte a language model must beat."""

import lzma
import zlib
from collections.abc import Iterable

from linnet.errors import DataError


def compressed_bits_per_byte(texts: Iterable[str], separately: bool = False) -> dict[str, float]:
    """Return compressed bits per UTF-8 byte, which bits per byte of a model compares with.

    Args:
        texts: what to compress, read once.
        separately: forget each text before the next, as a model does; the figures are then larger.
            By default all texts are one stream, the stronger opponent.

    Returns:
        Bits per byte by compressor: `zlib -9` and `xz -9e`.

    Raises:
        DataError: there is no text.
    """
    makers = {
        "zlib -9": lambda: zlib.compressobj(9),
        "xz -9e": lambda: lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
    }
    compressors = {name: make() for name, make in makers.items()}
    sizes = dict.fromkeys(makers, 0)
    num_bytes = 0
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        num_bytes += len(data)
        for name, make in makers.items():
            sizes[name] += len(compressors[name].compress(data))
            if separately:
                sizes[name] += len(compressors[name].flush())
                compressors[name] = make()
    if not num_bytes:
        raise DataError("no text to compress; give at least one text that is not empty")
    if not separately:
        for name, compressor in compressors.items():
            sizes[name] += len(compressor.flush())
    return {name: 8 * size / num_bytes for name, size in sizes.items()}
