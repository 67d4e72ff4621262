"""The prompt around the documents: they stand first and the question last.

So all questions about the same documents begin alike, and what was computed for the first one
serves the others.
"""

from linnet.errors import DataError
from linnet.text.chat import encode_chat
from linnet.text.tokenizer import Tokenizer

INTRODUCTION = "Answer questions about these files."

_MARKS = ("A", "B")
"""Two letters that are one token each, on a line of their own."""


def frame_documents(
    tokenizer: Tokenizer, question: str, template: str | None = None
) -> tuple[list[int], list[int]]:
    """Return the ids before and after the documents of a chat about them.

    The documents are the system's message, or the beginning of the user's where a template shows
    none of the system's. They are encoded on their own, line by line as it were, and put between.

    Args:
        tokenizer: of the model.
        question: the user's.
        template: as for `encode_chat`.

    Raises:
        DataError: the template cannot be rendered, or shows neither message as it is.
    """
    layouts = (
        lambda text: [
            {"role": "system", "content": text},
            {"role": "user", "content": question},
        ],
        lambda text: [{"role": "user", "content": f"{text}\n\n{question}"}],
    )
    failure = DataError("the chat template shows no message as it is, so no documents either")
    for messages in layouts:
        try:
            first, second = (
                encode_chat(tokenizer, messages(f"{INTRODUCTION}\n\n{mark}"), template=template)
                for mark in _MARKS
            )
        except DataError as error:
            failure = error
            continue
        place = next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), -1)
        is_mark = place >= 0 and tokenizer.decode(first[place : place + 1]) == _MARKS[0]
        if is_mark and first[place + 1 :] == second[place + 1 :]:
            return first[:place], first[place + 1 :]
    raise failure
