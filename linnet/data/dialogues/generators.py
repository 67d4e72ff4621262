"""The built-in generators of dialogues, by the names that recipes use."""

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

from linnet.data.dialogues.arithmetic import arithmetic
from linnet.data.dialogues.chat import chat
from linnet.data.dialogues.completion import completion
from linnet.data.dialogues.copying import copying
from linnet.data.dialogues.dialogue import Dialogue
from linnet.data.dialogues.filler import Filler
from linnet.data.dialogues.recall import absent, definitions, recall
from linnet.data.dialogues.small_talk import small_talk
from linnet.data.dialogues.tools import tools

Generator = Callable[[random.Random, int, Filler], Dialogue]
"""Random source, tokens to aim for and text to use -> a dialogue of about that length."""

GENERATORS: Mapping[str, Generator] = MappingProxyType(
    {
        "absent": absent,
        "arithmetic": arithmetic,
        "chat": chat,
        "completion": completion,
        "copying": copying,
        "definitions": definitions,
        "recall": recall,
        "small_talk": small_talk,
        "tools": tools,
    }
)
