"""Text from one model and one prompt: prefill in chunks, decode token by token, stream the text."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from linnet.infer.choosing import Chooser
from linnet.infer.ranks import EngineRanks
from linnet.infer.sampler import SamplingParams
from linnet.infer.spread_text import SpreadText
from linnet.infer.text_output import TextOutput
from linnet.infer.vocabulary import Vocabulary
from linnet.model.transformer import Model
from linnet.text import Tokenizer

PREFILL_CHUNK = 2048
"""Prompt tokens per forward pass, to bound memory on long prompts."""


def generate(
    model: Model,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
) -> str:
    """Continue a prompt and return the new text.

    Args:
        model: with a tokenizer.
        prompt: text, or token ids to be used as they are.
        max_tokens: most tokens to add.
        temperature: 0 is greedy.
        top_k, top_p, min_p: filters, see `SamplingParams`.
        seed: same seed, same text.
        stop: texts that end the completion; they are not part of it.

    Raises:
        ValueError: the model has no tokenizer, the prompt is empty, or a rule is out of range.
    """
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=tuple(stop) if not isinstance(stop, str) else (stop,),
    )
    return "".join(stream_text(model, prompt, params))


def stream_text(
    model: Model,
    prompt: str | Sequence[int],
    params: SamplingParams,
    ranks: EngineRanks | None = None,
) -> Iterator[str]:
    """Yield the completion piece by piece; the pieces joined are the text of `generate`.

    A piece never ends inside a character, nor inside what may become a stop string.

    Args:
        model: with a tokenizer.
        prompt: text, or token ids to be used as they are.
        params: the rules.
        ranks: those that share the model and the text, which `follow`; None for this process.

    Raises:
        ValueError: at once, as `generate` does.
    """
    output = TextOutput(_tokenizer(model), params.stop, params.include_stop, params.min_tokens)
    tokens = stream_tokens(model, encode_prompt(model, prompt), params, ranks=ranks)
    return _pieces(tokens, output)


def _pieces(tokens: Iterator[int], output: TextOutput) -> Iterator[str]:
    for token in tokens:
        if piece := output.push(token):
            yield piece
        if output.is_closed:
            return
    if piece := output.finish():
        yield piece


def stream_tokens(
    model: Model,
    prompt: Sequence[int],
    params: SamplingParams,
    prefill_chunk: int = PREFILL_CHUNK,
    ranks: EngineRanks | None = None,
) -> Iterator[int]:
    """Yield the tokens after `prompt`, up to `max_tokens` or an end or stop token, not yielded.

    Args:
        model: in eval mode.
        prompt: ids, at least one.
        params: the rules; `stop` is a matter of text and ignored here, and log-probabilities are
            not reported.
        prefill_chunk: prompt tokens per forward pass of a rank; any value gives the same tokens.
        ranks: as of `stream_text`.

    Raises:
        MemoryPlanError: at once, if several ranks have no room for the text.
        ValueError: at once, for an empty prompt, a model in training mode, a chunk below 1 or a
            rule that the model cannot keep.
    """
    if not len(prompt):
        raise ValueError("the prompt has no tokens; give at least one character")
    if model.training:
        raise ValueError("the model is in training mode; call model.eval() first")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk is {prefill_chunk}; it must be positive")
    vocabulary = Vocabulary(model.tokenizer, model.config.vocab_size, end_tokens(model))
    chooser = Chooser(params, prompt, vocabulary)
    tokens = torch.tensor([list(prompt)], device=model.device)
    if ranks is not None:
        num_tokens = prefill_chunk * ranks.num_parts
        spread = SpreadText(ranks, len(prompt) + params.max_tokens, num_tokens)
        return _decode(tokens.split(num_tokens, 1), spread.extend, chooser, params.max_tokens)
    cache = model.new_cache()
    return _decode(
        tokens.split(prefill_chunk, 1),
        lambda chunk, is_last: model(chunk, cache=cache, logits_to_keep=int(is_last)),
        chooser,
        params.max_tokens,
    )


@torch.inference_mode()
def _decode(
    chunks: Sequence[Tensor],
    extend: Callable[[Tensor, bool], Tensor],
    chooser: Chooser,
    max_tokens: int,
) -> Iterator[int]:
    *first_chunks, pending = chunks
    for chunk in first_chunks:
        extend(chunk, False)
    for _ in range(max_tokens):
        logits = extend(pending, True)
        choice = chooser.choose(logits[0, -1].cpu())
        if choice.is_end or choice.stop_token is not None:
            return
        yield choice.token
        if choice.stop is not None:
            return
        pending = pending.new_tensor([[choice.token]])


def encode_prompt(model: Model, prompt: str | Sequence[int]) -> list[int]:
    """Return a prompt as ids; a text starts a document, as texts in training do."""
    if not isinstance(prompt, str):
        return list(prompt)
    tokenizer = _tokenizer(model)
    begin = tokenizer.begin_of_document_id
    return ([] if begin is None else [begin]) + tokenizer.encode(prompt)


def end_tokens(model: Model) -> frozenset[int]:
    """Return the ids that end a completion, by the config and by the tokenizer."""
    declared = model.config.eos_token_id
    ids = set(declared) if isinstance(declared, tuple) else {declared}
    if model.tokenizer is not None:
        ids |= {model.tokenizer.end_of_document_id, model.tokenizer.end_of_sentence_id}
    return frozenset(token for token in ids if token is not None)


def _tokenizer(model: Model) -> Tokenizer:
    if model.tokenizer is None:
        raise ValueError("the model has no tokenizer; put tokenizer.json into its folder")
    return model.tokenizer
