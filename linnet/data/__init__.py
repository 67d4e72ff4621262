"""Documents to batches: sources, token shards, packing and the training stream."""

from linnet.data.compression import compressed_bits_per_byte
from linnet.data.loader import Loader
from linnet.data.packing import HeldOutSet, PackedBatch, evaluation_batches
from linnet.data.shards import TokenStore, tokenize_source
from linnet.data.sources import Document, Source, Split, open_source

__all__ = [
    "Document",
    "HeldOutSet",
    "Loader",
    "PackedBatch",
    "Source",
    "Split",
    "TokenStore",
    "compressed_bits_per_byte",
    "evaluation_batches",
    "open_source",
    "tokenize_source",
]
