"""Bodies of `/v1/completions`."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from linnet.serve.schemas.base import (
    PromptProgress,
    SamplingFields,
    StreamOptions,
    Timings,
    Usage,
    omitted,
)
from linnet.serve.schemas.chat import ReasoningEffort, ResponseFormat

MAX_PROMPTS = 1024


def _kind_of_prompt(value: Any) -> str:  # Any: JSON from outside
    """Tell texts and token ids apart by the first item, so that only one is validated."""
    if not isinstance(value, list):
        return "text"
    first = value[0] if value else None
    if isinstance(first, list):
        return "batch of tokens"
    return "texts" if isinstance(first, str) else "tokens"


Prompts = Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
Tokens = Annotated[list[int], Field(min_length=1)]
Batch = Annotated[list[Tokens], Field(min_length=1, max_length=MAX_PROMPTS)]
Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[Prompts, Tag("texts")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[Batch, Tag("batch of tokens")],
    Discriminator(_kind_of_prompt),
]


class CompletionRequest(SamplingFields):
    """Prompts to continue."""

    model: str | None = Field(default=None, description="the served model if left out")
    prompt: Prompt = Field(description="a text or token ids, or a list of either")
    max_tokens: int | None = Field(default=None, ge=0, description="default 16; 0 only with echo")
    echo: bool | None = Field(
        default=None, description="give the prompt back before the completion"
    )
    logprobs: int | None = Field(default=None, ge=0, le=20, description="alternatives per token")
    add_special_tokens: bool | None = Field(
        default=None, description="begin a text prompt as a document; default true"
    )
    best_of: int | None = Field(default=None, description="only n is supported")
    suffix: str | None = Field(default=None, description="not supported")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: ReasoningEffort | None = None
    return_progress: bool | None = Field(
        default=None, description="tell how the prompt is taken in"
    )


class CompletionLogprobs(BaseModel):
    """Logprobs of a text, token by token."""

    text_offset: list[int] = Field(description="where each token begins in the text")
    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="null for the first of a prompt")
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = Field(
        default=None, description="the stop string or token that ended it"
    )
    logprobs: CompletionLogprobs | None = None


class Completion(BaseModel):
    """Completions, those of the first prompt first."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    timings: Timings


class CompletionChunkChoice(BaseModel):
    """What is new in one completion."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = omitted()
    logprobs: CompletionLogprobs | None = None


class CompletionChunk(BaseModel):
    """A piece of a stream of completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = omitted()
    timings: Timings | None = omitted()
    prompt_progress: PromptProgress | None = omitted()
