"""Which format a model speaks, from its tokenizer and its prompt."""

from linnet.text.output import calls_m1, calls_m2
from linnet.text.output.parser import THINK, ToolFormat
from linnet.text.special import BEGINNING_OF_SENTENCE
from linnet.text.tokenizer import Tokenizer


def tool_format_of(tokenizer: Tokenizer) -> ToolFormat | None:
    """Return how a model with this tokenizer writes tool calls; None if it knows no such format.

    The chat template decides, since it is what shows the model the format; without one, the
    special tokens do.
    """
    template = tokenizer.chat_template or ""
    if calls_m2.OPEN in template:
        return "m2"
    if calls_m1.OPEN in template:
        return "m1"
    if calls_m2.OPEN in tokenizer.special_ids:
        return "m2"
    # The published M1 tokenizer spells its tags with plain tokens; its turns are special.
    is_m1 = not {calls_m1.OPEN, BEGINNING_OF_SENTENCE}.isdisjoint(tokenizer.special_ids)
    return "m1" if is_m1 else None


def starts_thinking(prompt: str) -> bool:
    """Return whether a rendered prompt ends with the beginning of a think span, as M2's does."""
    return prompt.rstrip().endswith(THINK)
