"""From the fields of a request to the engine's rules of sampling."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from linnet.infer import SamplingParams
from linnet.infer.grammar import Grammar
from linnet.infer.sampler import RepetitionStop
from linnet.serve.errors import bad_request
from linnet.serve.schemas.base import SamplingFields
from linnet.serve.schemas.chat import ReasoningEffort

MAX_STOPS = 16
MAX_STOP_CHARS = 1000
MAX_BIASED_TOKENS = 4096
_SMALLEST_TOP_P = 1e-9
# OpenAI's levels, by those that the engine knows.
_EFFORTS: Mapping[str, Literal["low", "medium", "high"] | None] = {
    "none": None,
    "minimal": "low",
    "low": "low",
    "medium": "medium",
    "high": "high",
    "xhigh": "high",
    "max": "high",
}


def sampling_params(
    fields: SamplingFields,
    vocab_size: int,
    *,
    max_tokens: int,
    effort: ReasoningEffort | None = None,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
) -> list[SamplingParams]:
    """Return the rules for each of the `n` completions of a prompt, with derived seeds.

    Args:
        fields: of the request.
        vocab_size: of the model; a biased or stop token must lie below.
        max_tokens: most tokens to generate.
        effort: how much to think; "none" is a budget of 0.
        logprobs, prompt_logprobs: alternatives per token; None for no logprobs.
        grammar: what the completion must match.

    Raises:
        APIError: a value that cannot be meant.
    """
    try:
        params = SamplingParams(
            max_tokens=max_tokens,
            temperature=1.0 if fields.temperature is None else fields.temperature,
            top_k=max(fields.top_k or 0, 0),
            top_p=max(1.0 if fields.top_p is None else fields.top_p, _SMALLEST_TOP_P),
            min_p=fields.min_p or 0.0,
            presence_penalty=fields.presence_penalty or 0.0,
            frequency_penalty=fields.frequency_penalty or 0.0,
            repetition_penalty=fields.repetition_penalty or 1.0,
            logit_bias=_logit_bias(fields.logit_bias, vocab_size),
            min_tokens=fields.min_tokens or 0,
            ignore_eos=bool(fields.ignore_eos),
            stop=_stop(fields.stop),
            include_stop=bool(fields.include_stop_str_in_output),
            stop_token_ids=_stop_tokens(fields.stop_token_ids, vocab_size),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            thinking_budget=0 if effort == "none" else fields.thinking_token_budget,
            reasoning_effort=_EFFORTS[effort] if effort else None,
            grammar=grammar,
            repetition_stop=_repetition_stop(fields),
        )
    except ValueError as error:
        raise bad_request(str(error)) from None
    return [replace(params, seed=_seed(fields.seed, index)) for index in range(fields.n or 1)]


def _seed(seed: int | None, index: int) -> int | None:
    return None if seed is None else (seed + index) % 2**63


def _repetition_stop(fields: SamplingFields) -> RepetitionStop | None:
    rule = fields.repetition_stop
    if rule is None:
        return None
    return RepetitionStop(num_tokens=rule.num_tokens, probability=rule.probability)


def _stop(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(stops) > MAX_STOPS or any(not 0 < len(text) <= MAX_STOP_CHARS for text in stops):
        raise bad_request(
            f"stop may hold {MAX_STOPS} texts of 1 to {MAX_STOP_CHARS} characters", "stop"
        )
    return stops


def _stop_tokens(tokens: list[int] | None, vocab_size: int) -> tuple[int, ...]:
    for token in tokens or ():
        if not 0 <= token < vocab_size:
            raise bad_request(
                f"token {token} is outside the vocabulary of {vocab_size}", "stop_token_ids"
            )
    return tuple(tokens or ())


def _logit_bias(bias: dict[str, float] | None, vocab_size: int) -> dict[int, float]:
    if len(bias or ()) > MAX_BIASED_TOKENS:
        raise bad_request(f"logit_bias may name {MAX_BIASED_TOKENS} tokens", "logit_bias")
    result = {}
    for token, value in (bias or {}).items():
        if not token.isdecimal() or len(token) > 9 or int(token) >= vocab_size:
            raise bad_request(
                f"logit_bias names {token[:20]!r}, which is no token of the {vocab_size} there are",
                "logit_bias",
            )
        if not -100 <= value <= 100:
            raise bad_request(f"logit_bias of token {token} is not in -100 ... 100", "logit_bias")
        result[int(token)] = value
    return result
