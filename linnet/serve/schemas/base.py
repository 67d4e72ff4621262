"""What all request and response bodies share: strictness, sampling rules, usage, errors.

Unknown fields of a request are ignored, as clients of many servers send many; a known field with a
wrong value or type is an error.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


def _is_none(value: object) -> bool:
    return value is None


def omitted() -> Any:  # Any: the default of a field of any type
    """Return a field that is left out of the answer while it is None."""
    return Field(default=None, exclude_if=_is_none)


class RequestModel(BaseModel):
    """A part of a request."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class RepetitionStopFields(RequestModel):
    """When a text counts as stuck: so many tokens in a row, each above the probability."""

    num_tokens: int = Field(default=3000, ge=1)
    probability: float = Field(default=0.99, ge=0, le=1)


class SamplingFields(RequestModel):
    """The rules of sampling, as OpenAI's API and its imitators call them."""

    temperature: float | None = Field(
        default=None, ge=0, le=2, description="0 is greedy; default 1"
    )
    top_p: float | None = Field(default=None, ge=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, description="0 or -1 keeps all")
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=100)
    logit_bias: dict[str, float] | None = Field(
        default=None, description="token id to -100 ... 100"
    )
    seed: int | None = Field(
        default=None, ge=-(2**63), lt=2**64, description="same seed, same text"
    )
    n: int | None = Field(default=None, ge=1, le=128, description="completions of each prompt")
    stop: str | list[str] | None = Field(default=None, description="texts that end it, at most 16")
    stop_token_ids: list[int] | None = Field(default=None, max_length=64)
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    thinking_token_budget: int | None = Field(
        default=None, ge=0, description="tokens in think spans, after which they are closed"
    )
    repetition_stop: RepetitionStopFields | None = Field(
        default=None, description="end a text that is stuck; {} for MiniMax-M1's rule"
    )


class StreamOptions(RequestModel):
    """What a stream tells besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = Field(default=None, description="usage in every chunk")


class PromptTokensDetails(BaseModel):
    """Where the tokens of a prompt came from."""

    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """What the tokens of a completion were spent on."""

    reasoning_tokens: int


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class PromptProgress(BaseModel):
    """How much of a prompt has been taken in."""

    total: int
    cache: int = Field(description="tokens that the prefix cache held")
    processed: int = Field(description="tokens that are done, cached ones included")
    time_ms: int = Field(description="since the request came")


class Timings(BaseModel):
    """Where the time of a request went."""

    cache_n: int = Field(description="prompt tokens that the prefix cache held")
    prompt_n: int = Field(description="prompt tokens that were computed")
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float
    queue_ms: float
    first_token_ms: float | None = Field(description="from submission")


class ErrorDetails(BaseModel):
    """What is wrong."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    param: str | None
    code: str | None


class Error(BaseModel):
    """A refusal or failure, in OpenAI's shape."""

    error: ErrorDetails
