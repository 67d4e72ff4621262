"""From the logits of a step to the next tokens and the text of each sequence."""

from collections.abc import Sequence as Many
from typing import NamedTuple

import torch
from torch import Tensor

from linnet.infer.choosing import Choice, choose_all, prompt_logprobs
from linnet.infer.runner import Chunk
from linnet.infer.sequence import Sequence
from linnet.infer.updates import FinishReason, TokenLogprob, Update

Chosen = Choice | ValueError
"""A choice, or why the sequence cannot go on."""


def choose(
    sequences: Many[Sequence], chunks: Many[Chunk], logits: Many[Tensor]
) -> list[list[Chosen]]:
    """Choose the next token of each sequence whose tokens are all taken in, or several of a draft.

    Args:
        sequences: of the step, not yet committed.
        chunks: theirs.
        logits: [num_logits, vocab] fp32 of each chunk.

    Returns:
        The choices for each sequence: none while its prompt is taken in, and after a draft those
        that agree with it and the first that does not. An error is the last of its sequence.
    """
    chosen: list[list[Chosen]] = [[] for _ in sequences]
    single = []
    for n, (sequence, chunk) in enumerate(zip(sequences, chunks, strict=True)):
        if chunk.is_draft:
            chosen[n] = _verify(sequence, logits[n])
        elif sequence.length_with(chunk) == len(sequence.tokens):
            single.append(n)
    if single:
        rows = torch.stack([logits[n][-1] for n in single])
        choices = choose_all([sequences[n].chooser for n in single], rows)
        for n, choice in zip(single, choices, strict=True):
            chosen[n] = [choice]
    return chosen


def _verify(sequence: Sequence, logits: Tensor) -> list[Chosen]:
    choices: list[Chosen] = []
    for row, guess in zip(logits, [*sequence.draft, None], strict=True):
        (choice,) = choose_all([sequence.chooser], row[None])
        choices.append(choice)
        if isinstance(choice, ValueError) or choice.token != guess or choice.is_end or choice.stop:
            break
    sequence.draft = []
    return choices


def take(sequence: Sequence, choices: Many[Chosen]) -> Update:
    """Append tokens to a sequence, and return its news: its end as well, if it ended."""
    sequence.note_first_token()
    taken: list[Choice] = []
    text, ending = "", None
    for choice in choices:
        if isinstance(choice, ValueError):
            ending = _Ending("error", error=" ".join(str(choice).split()))
        else:
            sequence.tokens.append(choice.token)
            taken.append(choice)
            piece, ending = _push(sequence, choice)
            text += piece
        if ending is not None:
            break
    news = Update(
        text=text,
        tokens=tuple(choice.token for choice in taken),
        logprobs=tuple(choice.logprob for choice in taken if choice.logprob is not None),
        prompt_logprobs=tuple(sequence.prompt_logprobs),
    )
    sequence.prompt_logprobs = []
    return news if ending is None else sequence.end(*ending, news)


class _Ending(NamedTuple):
    reason: FinishReason
    stop: str | int | None = None
    error: str | None = None


def _push(sequence: Sequence, choice: Choice) -> tuple[str, _Ending | None]:
    """Return the text that a token completes, and the end of the sequence if it is one."""
    output = sequence.output
    if choice.is_end or choice.stop_token is not None:
        return output.finish(), _Ending("stop", choice.stop_token)
    text = output.push(choice.token)
    if output.is_closed:
        return text, _Ending("stop", output.stop_string)
    if choice.stop is not None:
        return text + output.finish(), _Ending(choice.stop)
    if sequence.num_generated >= sequence.max_tokens:
        return text + output.finish(), _Ending("length")
    return text, None


def note_prompt_logprobs(sequence: Sequence, start: int, logits: Tensor) -> None:
    """Remember how probable the tokens of a prompt were after those of one chunk.

    Args:
        sequence: which wants them.
        start: place of the chunk's first token.
        logits: [T, vocab] fp32 after each of the chunk's tokens.
    """
    top = sequence.params.prompt_logprobs
    assert top is not None
    if start == 0:
        sequence.prompt_logprobs.append(TokenLogprob(sequence.tokens[0], None))
    following = sequence.tokens[start + 1 : min(start + 1 + len(logits), sequence.num_prompt)]
    if following:
        sequence.prompt_logprobs += prompt_logprobs(logits[: len(following)], following, top)
