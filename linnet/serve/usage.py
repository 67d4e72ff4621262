"""What requests took, in the words of OpenAI's and llama.cpp's APIs."""

from collections.abc import Sequence

from linnet.infer import updates
from linnet.serve.schemas.base import (
    CompletionTokensDetails,
    PromptProgress,
    PromptTokensDetails,
    Timings,
    Usage,
)


def usage(prompt: int, completion: int, cached: int = 0, reasoning: int = 0) -> Usage:
    """Return token counts."""
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
        completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning),
    )


def total_usage(requests: Sequence[updates.Usage], per_prompt: int) -> Usage:
    """Return the token counts of several requests; those of one prompt count it once.

    Args:
        requests: `per_prompt` completions of the first prompt, then those of the next.
        per_prompt: completions of each prompt.
    """
    firsts = requests[::per_prompt]
    return usage(
        sum(request.prompt_tokens for request in firsts),
        sum(request.completion_tokens for request in requests),
        sum(request.cached_tokens for request in firsts),
        sum(request.reasoning_tokens for request in requests),
    )


def timings(requests: Sequence[updates.Usage]) -> Timings:
    """Return where the time went: of the first prompt, and of all completions together."""
    first = requests[0]
    first_token_s = first.total_s if first.first_token_s is None else first.first_token_s
    prompt_s = max(first_token_s - first.queue_s, 0.0)
    predicted_s = max(request.total_s for request in requests) - first_token_s
    num_computed = first.prompt_tokens - first.cached_tokens
    num_predicted = sum(request.completion_tokens for request in requests)
    return Timings(
        cache_n=first.cached_tokens,
        prompt_n=num_computed,
        prompt_ms=_ms(prompt_s),
        prompt_per_second=_rate(num_computed, prompt_s),
        predicted_n=num_predicted,
        predicted_ms=_ms(predicted_s),
        # The first token of each came with its prompt.
        predicted_per_second=_rate(num_predicted - len(requests), predicted_s),
        queue_ms=_ms(first.queue_s),
        first_token_ms=None if first.first_token_s is None else _ms(first.first_token_s),
    )


def prompt_progress(progress: updates.Progress, seconds: float) -> PromptProgress:
    """Return how much of a prompt is taken in, so many seconds after the request came."""
    return PromptProgress(
        total=progress.total,
        cache=progress.cached,
        processed=progress.processed,
        time_ms=int(1000 * seconds),
    )


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _rate(count: int, seconds: float) -> float:
    return round(count / seconds, 3) if count > 0 and seconds > 0 else 0.0
