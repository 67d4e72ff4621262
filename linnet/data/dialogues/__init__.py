"""Dialogues to learn from: generated or read from a file, encoded with a loss mask, and packed."""

from linnet.data.dialogues.dialogue import Dialogue, DialogueFile, parse_dialogue
from linnet.data.dialogues.encoding import DialogueEncoder, Example, encode_text
from linnet.data.dialogues.filler import Filler
from linnet.data.dialogues.generators import GENERATORS
from linnet.data.dialogues.packing import (
    ExampleSource,
    HeldOutExamples,
    MixLoader,
    Share,
    held_out_examples,
    pack,
)
from linnet.data.dialogues.sources import FileSource, GeneratedSource, TextSource

__all__ = [
    "GENERATORS",
    "Dialogue",
    "DialogueEncoder",
    "DialogueFile",
    "Example",
    "ExampleSource",
    "FileSource",
    "Filler",
    "GeneratedSource",
    "HeldOutExamples",
    "MixLoader",
    "Share",
    "TextSource",
    "encode_text",
    "held_out_examples",
    "pack",
    "parse_dialogue",
]
